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

    A mesh's vertices lie on the surface and its edges do not, so that it has too little of both, by a quarter as much
    when its cells are half as wide. Hence the figures are extrapolated from two meshes (Richardson 1911), and the
    tolerance is what that added.
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
        found.append(
            (mesh_health(mesh, device=field.device), not leaves_the_cube(surface.vertices_unit, surface.faces, cells))
        )
    (coarse, _), (fine, closed) = found
    area = (fine.area - coarse.area) / 3
    volume = (fine.volume - coarse.volume) / 3
    return Measures(
        low=mesh.vertices.min(axis=0),
        high=mesh.vertices.max(axis=0),
        area=fine.area + area,
        area_tolerance=abs(area),
        volume=fine.volume + volume if closed else None,
        volume_tolerance=abs(volume) if closed else None,
    )
