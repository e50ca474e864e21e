"""What is light enough to be looked at while a job runs and after it: a few points, a coarse surface, a small picture.

World units, sdf < 0 inside, normals point outward, as everywhere.
"""

import os

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, median_filter
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from sdfserver.attributes import attributes_from
from sdfserver.cloud import PointCloud
from sdfserver.errors import ExtractionError
from sdfserver.field import SignedDistanceField
from sdfserver.files import replacing
from sdfserver.io import write_ply
from sdfserver.mesh import TriangleMesh, simplify, vertex_normals
from sdfserver.metrics import sample_surface

MAX_POINTS = 50_000
MAX_FACES = 200_000
COARSE_RESOLUTION = 36
"""Cells along each side of the grid for a surface that is still forming."""
REACH = 2
"""How many cells from the points it is looked for."""
PICTURE_PX = 160
_SAMPLES_PER_PIXEL = 4
_EYE = np.array([0.55, -0.75, 0.38])
"""From where a picture is taken, where z is up."""
_LIGHT = np.array([0.2, -0.6, 0.75])
_COLOR = np.array([150.0, 178.0, 212.0])


def some_points(cloud: PointCloud) -> PointCloud:
    """MAX_POINTS of the cloud's points, spread evenly over their order, or all if they are fewer."""
    rows = np.linspace(0, len(cloud.points) - 1, min(len(cloud.points), MAX_POINTS)).round().astype(np.int64)
    return cloud.take(rows)


def coarse_surface(field: SignedDistanceField, points: NDArray[np.float64]) -> TriangleMesh:
    """The zero set of a field near `points` (n, 3, world units), on a coarse grid, where marching cubes puts it.

    What forms farther than REACH cells from every point is left out, so that most of the grid need not be evaluated: a
    field that is still forming is no distance yet, by which more could be told. Raises ExtractionError where there is
    nothing.
    """
    n = COARSE_RESOLUTION
    cells = np.zeros((n, n, n), dtype=bool)
    low = np.floor((field.frame.to_unit(points) + 1) / 2 * n).astype(np.int64).clip(0, n - 1)
    cells[tuple(low.T)] = True
    cells = binary_dilation(cells, np.ones((3, 3, 3), dtype=bool), iterations=REACH)
    nodes = np.zeros((n + 1, n + 1, n + 1), dtype=bool)
    for corner in np.ndindex(2, 2, 2):
        nodes[tuple(slice(i, i + n) for i in corner)] |= cells
    values = np.ones(nodes.shape, dtype=np.float32)
    where = torch.from_numpy((np.argwhere(nodes) / n * 2 - 1).astype(np.float32)).to(field.device)
    with torch.no_grad():
        values[nodes] = field.value(where).float().cpu().numpy()
    wanted = np.zeros_like(nodes)
    wanted[1:, 1:, 1:] = cells  # scikit-image asks the mask at a cell's far corner
    try:
        vertices, faces, _, _ = marching_cubes(values, 0.0, mask=wanted, allow_degenerate=False)
    except (ValueError, RuntimeError):
        raise ExtractionError("the field has no surface near the points yet") from None
    world = field.frame.to_world(vertices.astype(np.float64) / n * 2 - 1)
    return TriangleMesh(vertices=world, faces=faces.astype(np.int64), normals=vertex_normals(world, faces))


def write_surface(mesh: TriangleMesh, cloud: PointCloud, path: str | os.PathLike[str]) -> None:
    """Write the mesh with MAX_FACES or fewer, as PLY, with each vertex's `distance` to the cloud's nearest point.

    Colours and `confidence` are those of the mesh.
    """
    if len(mesh.faces) > MAX_FACES:
        mesh = attributes_from(mesh, simplify(mesh, MAX_FACES))
    distance, _ = cKDTree(cloud.points).query(mesh.vertices)
    write_ply(
        path,
        mesh.vertices,
        normals=mesh.normals,
        colors=mesh.colors,
        faces=mesh.faces,
        distance=distance,
        confidence=mesh.confidence,
    )


def write_picture(mesh: TriangleMesh, path: str | os.PathLike[str]) -> None:
    """Write a picture of the mesh, PICTURE_PX wide and high, as PNG with nothing behind it."""
    from PIL import Image

    with replacing(path) as stream:
        Image.fromarray(picture(mesh)).save(stream, "PNG", optimize=True)


def picture(mesh: TriangleMesh, px: int = PICTURE_PX, *, up: int | None = None) -> NDArray[np.uint8]:
    """The mesh standing, seen from the front, above and a little from the side: (px, px, 4), RGBA.

    `up` is the axis that is up, 1 or 2, where that is known; else the mesh tells it. Samples of the surface, the
    nearest of each pixel, shaded by its normal, in the mesh's colours where it has them. Twice as large first, for
    smooth borders.
    """
    size = 2 * px
    points, normals = sample_surface(mesh, _SAMPLES_PER_PIXEL * size**2, np.random.default_rng(0))
    on_surface = points
    if (axis_up(points, normals) if up is None else up) == 1:
        points, normals = points[:, [0, 2, 1]] * [1, -1, 1], normals[:, [0, 2, 1]] * [1, -1, 1]
    eye, light = _EYE / np.linalg.norm(_EYE), _LIGHT / np.linalg.norm(_LIGHT)
    right = np.cross([0.0, 0.0, 1.0], eye)
    right /= np.linalg.norm(right)
    seen = points @ np.stack([right, np.cross(eye, right), eye], axis=1)
    low, high = seen.min(axis=0), seen.max(axis=0)
    across = (seen[:, :2] - (low + high)[:2] / 2) / (high - low)[:2].max() * 0.94
    column, row = ((across * [1, -1] + 0.5) * (size - 1)).round().astype(np.int64).T
    pixel = row * size + column
    nearest = np.full(size**2, -np.inf)
    np.maximum.at(nearest, pixel, seen[:, 2])
    front = seen[:, 2] == nearest[pixel]
    shade, color = np.zeros(size**2), np.zeros((size**2, 3))
    behind = normals @ eye < 0  # seen from its back, as an open surface may be: lit as well, but not as brightly
    normals = np.where(behind[:, None], -normals, normals)
    shade[pixel[front]] = (0.35 + 0.65 * np.clip(normals[front] @ light, 0, 1)) * np.where(behind[front], 0.7, 1.0)
    color[pixel[front]] = _COLOR if mesh.colors is None else _colors_at(mesh, mesh.colors, on_surface[front])
    color *= shade[:, None]
    # Where no sample of the front fell, the back shows through: the median takes such specks away.
    shade = median_filter(shade.reshape(size, size), 3)
    color = median_filter(color.reshape(size, size, 3), (3, 3, 1))
    cover = (shade > 0).reshape(px, 2, px, 2).sum(axis=(1, 3))[..., None]
    mean = color.reshape(px, 2, px, 2, 3).sum(axis=(1, 3)) / np.maximum(cover, 1)
    return np.concatenate([mean, 255 / 4 * cover], axis=2).round().astype(np.uint8)


def _colors_at(mesh: TriangleMesh, colors: NDArray[np.uint8], points: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Those (n, 3) of the vertices nearest to points (n, 3)."""
    nearest: NDArray[np.uint8] = colors[cKDTree(mesh.vertices).query(points)[1]]
    return nearest


def axis_up(points: NDArray[np.float64], normals: NDArray[np.float64]) -> int:
    """The axis that is up, y or z: that on whose lower side more of the surface looks down. Files do not say it."""
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    at_the_bottom = (points < low + 0.03 * extent) & (normals < -0.8)
    return 1 if at_the_bottom[:, 1].sum() > at_the_bottom[:, 2].sum() else 2
