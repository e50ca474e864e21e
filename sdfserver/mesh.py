"""TriangleMesh: what comes out, as plain arrays in world units."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, kw_only=True)
class TriangleMesh:
    """Triangles in world units, wound counter-clockwise seen from outside.

    vertices: (v, 3) float64.
    faces: (f, 3) int64 rows of `vertices`.
    normals: (v, 3) float32 unit vectors that point outward, or None where they were not computed.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]
    normals: NDArray[np.float32] | None = None
