"""Voxel grids: the field's values at the nodes of a regular grid, as NPZ.

values: (nx, ny, nz) float32; values[i, j, k] belongs to origin + spacing (i, j, k). origin: (3,) float64, spacing: a
float64. World units; negative inside. Beside them what sdfserver.asking.error_arrays has.
"""

import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sdfserver.asking import distance_error_of, error_arrays
from sdfserver.errors import ConfigError
from sdfserver.queries import FieldQueries

MIN_NODES, MAX_NODES = 2, 2048
NODES_AT_A_TIME = 1 << 16


def write_grid(
    field: FieldQueries,
    stream: BinaryIO,
    *,
    resolution: int = 128,
    box: NDArray[np.float64] | None = None,
    true_distances: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[int, int, int]:
    """Write the grid of `resolution` nodes along its longest side, in constant memory, and tell its shape.

    box: (2, 3) the low and the high corner, world units; by default the cube that the field was fitted in.
    true_distances: to the closest point of the surface, in place of the field's own values: far from the surface
    these are no distances, but they take a hundredth of the time.

    Raises ConfigError for a resolution out of its range or a box beyond the cube, NoSurfaceError where true distances
    are asked for and the field has no surface.
    """
    if not MIN_NODES <= resolution <= MAX_NODES:
        raise ConfigError(f"the resolution of a grid is {resolution}; it must be from {MIN_NODES} to {MAX_NODES}")
    low, high = _checked(field, box)
    spacing = float((high - low).max()) / (resolution - 1)
    nx, ny, nz = shape = tuple((np.floor((high - low) / spacing + 1e-6).astype(int) + 1).tolist())
    count = nx * ny * nz
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("values.npy", "w", force_zip64=True) as out:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, count, NODES_AT_A_TIME):
                nodes = np.arange(start, min(start + NODES_AT_A_TIME, count))
                points = low + spacing * np.stack(np.unravel_index(nodes, shape), axis=1)
                if true_distances:
                    values = field.distance(points)
                else:
                    values = field.at(field.frame.to_unit(points), 0)[0] / field.frame.scale
                out.write(values.astype("<f4").tobytes())
                if on_progress is not None:
                    on_progress((start + len(nodes)) / count)
        rest = {"origin": low, "spacing": np.array(spacing), **error_arrays(distance_error_of(field))}
        for name, array in rest.items():
            with archive.open(f"{name}.npy", "w") as out:
                np.lib.format.write_array(out, np.asarray(array), allow_pickle=False)
    return nx, ny, nz


def _checked(field: FieldQueries, box: NDArray[np.float64] | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The low and the high corner (3,) of the grid."""
    frame = field.frame
    reach = np.array([[-1.0], [1.0]]) / frame.scale + frame.center
    if box is None:
        return reach[0], reach[1]
    low, high = np.asarray(box, dtype=np.float64)
    if not (np.isfinite([low, high]).all() and (low < high).all()):
        raise ConfigError(f"the box runs from {_shown(low)} to {_shown(high)}; its corners must be finite and apart")
    slack = 1e-9 * np.abs(reach).max() + 1e-6 / frame.scale
    if (low < reach[0] - slack).any() or (high > reach[1] + slack).any():
        raise ConfigError(
            f"the box runs from {_shown(low)} to {_shown(high)}, beyond the cube that the field was fitted in, from "
            f"{_shown(reach[0])} to {_shown(reach[1])}; stay within it"
        )
    return low, high


def _shown(corner: NDArray[Any]) -> str:
    return ", ".join(f"{value:.6g}" for value in corner)
