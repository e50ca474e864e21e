"""What a field can be asked, by name, and what is answered: one vocabulary for HTTP, client, command line and files.

World units; sdf < 0 inside. n is the number of points, or of rays.
"""

from typing import Literal

What = Literal["distance", "gradient", "true_distance", "closest", "curvature", "inside"]
MEANS: dict[What, str] = {
    "distance": "`distances` (n,): the field's own value, which is a distance near the surface, as far as "
    "`distance_error` says, and only tells inside from outside far from it; quick",
    "gradient": "`gradients` (n, 3) of that value; near the surface of length 1 and along the normal",
    "true_distance": "`true_distances` (n,): signed, to the closest point of the surface, however far off; slow",
    "closest": "`closest_points` (n, 3), and the `true_distances` from them; slow",
    "curvature": "`mean_curvatures` and `gaussian_curvatures` (n,) of the level sets through the points, "
    "1 / length and 1 / length^2, positive where the inside is convex",
    "inside": "`inside` (n,) bool",
}
"""What may be asked of points, and what answers it."""
RAYS_MEAN = (
    "`hits` (n,) bool: whether each ray crosses the surface; `ray_distances` (n,) from the origins to where it first "
    "does, `hit_points` and outward `hit_normals` (n, 3) there"
)
