"""Volume and area of a field's surface, each with a tolerance, from meshes of two resolutions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdfserver.extract import extract, leaves_the_cube
from sdfserver.field import SignedDistanceField
from sdfserver.metrics import mesh_health
from sdfserver.reconstruct import to_world


@dataclass(frozen=True, eq=False, kw_only=True)
class Measures:
    """Of the surface phi = 0 in the field's cube, in world units.

    low, high: (3,) the corners of its box. volume: of what it encloses, None where it is not closed.
    *_tolerance: how much the finer mesh changed the figure. A mesh's error falls by four when its cells are halved, so
    that this is about three times the error that is left.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    area: float
    area_tolerance: float
    volume: float | None
    volume_tolerance: float | None


def measure(field: SignedDistanceField, *, resolution: int = 192) -> Measures:
    """Volume, area and box, from meshes of `resolution` and half as many cells. Raises NoSurfaceError without one."""
    found = []
    for cells in (resolution // 2, resolution):
        surface = extract(field, resolution=cells)
        mesh = to_world(surface, field.frame)
        found.append((mesh_health(mesh, device=field.device), not leaves_the_cube(surface, cells)))
    (coarse, _), (fine, closed) = found
    return Measures(
        low=mesh.vertices.min(axis=0),
        high=mesh.vertices.max(axis=0),
        area=fine.area,
        area_tolerance=abs(fine.area - coarse.area),
        volume=fine.volume if closed else None,
        volume_tolerance=abs(fine.volume - coarse.volume) if closed else None,
    )
