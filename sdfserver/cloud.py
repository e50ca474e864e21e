"""PointCloud and its frames.

World frame: the input's own units and position, float64 throughout.
Unit frame: the cloud's box, centred, inside [-0.9, 0.9]^3: unit = scale * (world - center).
sdf < 0 inside; normals point outward.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNIT_EXTENT = 0.9


@dataclass(frozen=True, eq=False, kw_only=True)
class PointCloud:
    """Points and their normals.

    points: (n, 3) float64.
    normals: (n, 3) float64, pointing outward, or None where the file had none.
    """

    points: NDArray[np.float64]
    normals: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Frame:
    """The similarity between world and unit coordinates: unit = scale * (world - center)."""

    center: NDArray[np.float64]
    scale: float

    @classmethod
    def around(cls, points: NDArray[np.float64]) -> "Frame":
        """The frame in which the box of `points` (n, 3) fits [-0.9, 0.9]^3, centred."""
        low, high = points.min(axis=0), points.max(axis=0)
        return cls(center=(low + high) / 2, scale=2 * UNIT_EXTENT / float((high - low).max()))

    def to_unit(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """World points (n, 3) in the unit frame."""
        return (points - self.center) * self.scale

    def to_world(self, points_unit: NDArray[np.float64]) -> NDArray[np.float64]:
        """Unit points (n, 3) in the world frame."""
        return points_unit / self.scale + self.center
