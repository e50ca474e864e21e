"""Voxel grids: the field's values at the nodes of a regular grid, as NPZ.

values: (nx, ny, nz) float32; values[i, j, k] belongs to origin + spacing (i, j, k). origin: (3,) float64, spacing: a
float64. World units; negative inside. Beside them what sdfserver.asking.error_arrays has.
"""

import io
import math
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sdfserver.asking import distance_error_of, error_arrays
from sdfserver.cloud import shown
from sdfserver.errors import ConfigError
from sdfserver.queries import FieldQueries

MIN_NODES, MAX_NODES = 2, 2048
NODES_AT_A_TIME = 1 << 16


def write_grid(
    field: FieldQueries, stream: BinaryIO, *, on_progress: Callable[[float], None] | None = None, **options: Any
) -> tuple[int, int, int]:
    """Write a grid, in constant memory, and tell its shape; `options` are those of VoxelGrid, and raise as there."""
    grid = VoxelGrid(field, **options)
    for share, part in grid.parts():
        stream.write(part)
        if on_progress is not None:
            on_progress(share)
    return grid.shape


class VoxelGrid:
    """A grid of `resolution` nodes along its longest side.

    box: (2, 3) the low and the high corner, world units; by default the cube that the field was fitted in.
    true_distances: to the closest point of the surface, in place of the field's own values: far from the surface
    these are no distances, but they take a thirtieth of the time.

    Raises ConfigError for a resolution out of its range or a box beyond the cube, NoSurfaceError where true distances
    are asked for and the field has no surface.
    """

    def __init__(
        self,
        field: FieldQueries,
        *,
        resolution: int = 128,
        box: NDArray[np.float64] | None = None,
        true_distances: bool = False,
    ) -> None:
        if not MIN_NODES <= resolution <= MAX_NODES:
            raise ConfigError(f"the resolution of a grid is {resolution}; it must be from {MIN_NODES} to {MAX_NODES}")
        self.origin, high = _checked(field, box)
        self.spacing = float((high - self.origin).max()) / (resolution - 1)
        nx, ny, nz = (np.floor((high - self.origin) / self.spacing + 1e-6).astype(int) + 1).tolist()
        self.shape: tuple[int, int, int] = (nx, ny, nz)
        self._field, self._true_distances = field, true_distances
        if true_distances:
            _ = field.distance_error  # it raises where there is no surface

    def parts(self) -> Iterator[tuple[float, bytes]]:
        """The file, a part at a time, and how much of it is done (0 to 1)."""
        stream, count = _Parts(), math.prod(self.shape)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("values.npy", "w", force_zip64=True) as out:
                header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(out, header)
                for start in range(0, count, NODES_AT_A_TIME):
                    end = min(start + NODES_AT_A_TIME, count)
                    out.write(self._values(np.arange(start, end)).astype("<f4").tobytes())
                    yield end / count, stream.taken()
            rest = {"origin": self.origin, "spacing": np.array(self.spacing)}
            for name, array in (rest | error_arrays(distance_error_of(self._field))).items():
                with archive.open(f"{name}.npy", "w") as out:
                    np.lib.format.write_array(out, np.asarray(array), allow_pickle=False)
        yield 1.0, stream.taken()

    def _values(self, nodes: NDArray[np.int64]) -> NDArray[np.float64]:
        points = self.origin + self.spacing * np.stack(np.unravel_index(nodes, self.shape), axis=1)
        if self._true_distances:
            return self._field.distance(points)
        values: NDArray[np.float64] = self._field.at(self._field.frame.to_unit(points), 0)[0] / self._field.frame.scale
        return values


class _Parts(io.RawIOBase):
    """What was written since it was last taken; it cannot be gone back in."""

    def __init__(self) -> None:
        self._parts = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._parts += data
        return len(data)

    def taken(self) -> bytes:
        """It, and begin anew."""
        part = bytes(self._parts)
        self._parts.clear()
        return part


def _checked(field: FieldQueries, box: NDArray[np.float64] | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The low and the high corner (3,) of the grid."""
    frame = field.frame
    reach = np.array([[-1.0], [1.0]]) / frame.scale + frame.center
    if box is None:
        return reach[0], reach[1]
    low, high = np.asarray(box, dtype=np.float64)
    if not (np.isfinite([low, high]).all() and (low < high).all()):
        raise ConfigError(f"the box runs from {shown(low)} to {shown(high)}; its corners must be finite and apart")
    slack = 1e-9 * np.abs(reach).max() + 1e-6 / frame.scale
    if (low < reach[0] - slack).any() or (high > reach[1] + slack).any():
        raise ConfigError(
            f"the box runs from {shown(low)} to {shown(high)}, beyond the cube that the field was fitted in, from "
            f"{shown(reach[0])} to {shown(reach[1])}; stay within it"
        )
    return low, high
