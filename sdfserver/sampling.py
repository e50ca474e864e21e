"""Samples of the fit: points of the cloud, and a pool of points in the space around it.

Everything in the unit frame; sdf < 0 inside; normals point outward.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from sdfserver.cloud import PointCloud
from sdfserver.config import PoolConfig
from sdfserver.errors import CloudError
from sdfserver.neighbours import Neighbours, along_a_curve, neighbours_of
from sdfserver.winding import DipoleTree, blurred_distance, mean_spacing, point_areas, winding_number

FAR_SPACINGS, FAR_NOISES = 2, 8
"""Beyond this many mean spacings, and standard deviations of the noise, the nearest point of the cloud is as far as the
surface, for the fit's purposes: at two spacings it is some 2% farther."""

FULL_GUESS = 0.4
"""The first guess is the whole distance where the winding number is this far from 1/2, and less of it nearer by."""

SURELY_WOUND, FEWEST_WOUND = 0.75, 0.001
"""A winding number beyond the first is no open sheet's; fewer samples than the second, by share, say nothing."""

HELD_SHARE, FEWEST_HELD, MOST_HELD = 0.02, 5, 1000
"""Points of the cloud, and samples of the pool, that are held out of the fit: a share, within bounds."""
NOISE_NEIGHBOURS, NOISE_POINTS = 24, 4000
MORE_NEIGHBOURS, THICK_POINTS = (96, 384), 1000
THICK = 0.3
"""Noise over the reach of a point's neighbours above which it cannot be told from them. Scans tried have up to 0.12."""
HERMITE_NEIGHBOURS, HERMITE_SHARE = 8, 0.8
"""Of a scan's noise, what is seen between nearest neighbours: it is alike there, and so are the normals."""
MEDIAN_OF_NORMAL = 0.6745
"""Median |x| of a normal distribution with a standard deviation of 1."""
SKETCH = 300_000
"""Points of a larger cloud, drawn from it, that stand for it where the nearest point is looked for."""
PATCHES, PATCH_REACH = 200, 6
"""Where the noise of a larger cloud is looked for: around so many points, as far as so many spacings."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Two estimates of how far the points scatter along their normals, both too large where they err."""

    by_quadrics: float
    """Takes waves that are not much longer than the way to two dozen neighbours for noise; so does a coarse network."""
    by_normals: float
    """Takes errors of the normals for noise."""

    @property
    def least(self) -> float:
        """What neither explains otherwise."""
        return min(self.by_quadrics, self.by_normals)

    def scaled(self, factor: float) -> "Noise":
        """The same in other units."""
        return Noise(by_quadrics=self.by_quadrics * factor, by_normals=self.by_normals * factor)


@dataclass(frozen=True, eq=False, kw_only=True)
class SpacePool:
    """Samples in the cube [-1, 1]^3.

    points: (m, 3) float32. signed_distance: (m,) to the nearest point of the cloud, negative inside.
    first_guess: (m,) the same, fading to 0 as the winding number nears 1/2: no step where a sheet may be missing.
    trusted: (m,) bool, the sign is known. far: (m,) bool, the sign is known and the distance is that to the surface.
    """

    points: Tensor
    signed_distance: Tensor
    first_guess: Tensor
    trusted: Tensor
    far: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def to(self, device: torch.device) -> "SpacePool":
        """The same pool on `device`."""
        return SpacePool(**{name: value.to(device) for name, value in vars(self).items()})

    def __getitem__(self, rows: Tensor | slice) -> "SpacePool":
        return SpacePool(**{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class Samples:
    """All that a fit draws from, and what is held out of it to judge it.

    points, held_points: (n, 3) and (h, 3) float32 points of the cloud, or of a sketch of it if it is large, the first
        along a space-filling curve; normals, held_normals: theirs.
    spacings: (n,) float32, the distance between neighbouring points of the cloud around each of `points`.
    whole_points, whole_normals: (w, 3) float32, all of the cloud; but what is held out, if that is not large.
    pool, held_pool: samples in the space around it, the first along a space-filling curve.
    spacing: mean distance between neighbouring ones of `points`.
    noise: standard deviation of the points along the normals.
    """

    points: Tensor
    normals: Tensor
    spacings: Tensor
    whole_points: Tensor
    whole_normals: Tensor
    held_points: Tensor
    held_normals: Tensor
    pool: SpacePool
    held_pool: SpacePool
    spacing: float
    noise: Noise

    def to(self, device: torch.device) -> "Samples":
        """The same samples on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")}
        return replace(self, **moved)


def draw_samples(
    cloud_unit: PointCloud, config: PoolConfig, rng: np.random.Generator, device: torch.device | str = "cpu"
) -> Samples:
    """The cloud parted into points to fit and points to judge by, and a pool of samples around it, on `device`.

    What is drawn at random is drawn on the host, and so the same on whatever device.
    """
    points, normals = cloud_unit.points, normals_of(cloud_unit)
    n = len(points)
    if n <= SKETCH:
        return sketch_samples(cloud_unit, config, rng, of=n, device=device)
    drawn = sketch_rows(n, rng)
    sketch = cloud_unit.take(drawn)
    samples = sketch_samples(sketch, config, rng, of=n, device=device)
    near = Patches(sketch.points, samples.spacing * math.sqrt(len(drawn) / n), rng).mask(points)
    patches = cloud_unit.take(near)
    return replace(
        samples,
        whole_points=_tensor(points).to(device),
        whole_normals=_tensor(normals).to(device),
        noise=noise_of(patches, rng, device),
    )


def sketch_samples(
    sketch: PointCloud,
    config: PoolConfig,
    rng: np.random.Generator,
    *,
    of: int,
    device: torch.device | str = "cpu",
) -> Samples:
    """Samples of a cloud `of` so many points, from those drawn from it: all, or a `sketch` that stands for them.

    A sketch's noise is that of its own points, and the whole cloud is taken to be no more than the sketch.
    """
    points, normals = sketch.points, normals_of(sketch)
    neighbours = neighbours_of(points, device)
    areas = point_areas(points, neighbours)
    spacing = mean_spacing(areas)
    noise = estimate_noise(points, normals, neighbours, rng)
    far = max(FAR_SPACINGS * spacing, FAR_NOISES * noise.least)
    positions = pool_positions(points, config, rng)
    at = _tensor(positions).to(device)
    w = winding_number(at, DipoleTree(points, normals, areas, device))
    distance = _tensor(neighbours.query(positions, 1)[0][:, 0]).to(device)
    pool = _space_pool(at, distance, w, near=blurred_distance(areas), far=far, config=config)
    shuffled = rng.permutation(len(points))
    n_held, n_pool_held = (min(max(FEWEST_HELD, round(HELD_SHARE * n)), MOST_HELD) for n in (len(points), config.size))
    held, kept = shuffled[:n_held], shuffled[n_held:]
    kept = kept[along_a_curve(torch.from_numpy(points[kept])).numpy()]
    pool, held_pool = pool[n_pool_held:], pool[:n_pool_held]
    kept_points, kept_normals = _tensor(points[kept]).to(device), _tensor(normals[kept]).to(device)
    return Samples(
        points=kept_points,
        normals=kept_normals,
        spacings=_tensor(np.sqrt(areas[kept] * len(points) / of)).to(device),
        whole_points=kept_points,
        whole_normals=kept_normals,
        held_points=_tensor(points[held]).to(device),
        held_normals=_tensor(normals[held]).to(device),
        pool=pool[along_a_curve(pool.points)],
        held_pool=held_pool,
        spacing=spacing,
        noise=noise,
    )


def normals_of(cloud: PointCloud) -> NDArray[np.float64]:
    """The normals (n, 3) of a cloud, or CloudError where it has none."""
    if cloud.normals is None:
        raise CloudError("the cloud has no normals; a signed distance cannot be fitted to it")
    return cloud.normals


class Patches:
    """Where the noise of a large cloud is looked for: it shows between neighbours, and a sketch has few of them."""

    def __init__(self, sketch: NDArray[np.float64], spacing: float, rng: np.random.Generator) -> None:
        """Around some points of `sketch` (m, 3), as far as a few times the whole cloud's `spacing`."""
        self._centres = cKDTree(sketch[rng.permutation(len(sketch))[:PATCHES]])
        self._reach = PATCH_REACH * spacing

    def mask(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of `points` (n, 3) lie in a patch."""
        distance, _ = self._centres.query(points, distance_upper_bound=self._reach, workers=-1)
        inside: NDArray[np.bool_] = np.isfinite(distance)
        return inside


def sketch_rows(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which of n points stand for all: every one of a cloud that is not large, else some drawn at random."""
    return np.arange(n) if n <= SKETCH else np.sort(rng.permutation(n)[:SKETCH])


def noise_of(cloud: PointCloud, rng: np.random.Generator, device: torch.device | str = "cpu") -> Noise:
    """As estimate_noise, of an oriented cloud whose neighbours are of no other use."""
    return estimate_noise(cloud.points, normals_of(cloud), neighbours_of(cloud.points, device), rng)


def estimate_noise(
    points: NDArray[np.float64], normals: NDArray[np.float64], among: Neighbours, rng: np.random.Generator
) -> Noise:
    """The standard deviation of the points along their normals, in the units of `points`.

    Medians over a few thousand points: creases and thin walls are few enough not to move them. By quadrics: what is
    left of the 24 neighbours' heights over the tangent plane when the best quadric is taken away, or of more neighbours
    where noise makes a ball of these. By normals: how far
    the 8 nearest lie off the plane through the midpoint across the mean of the two normals, which for any quadric is
    nothing (Hermite interpolation).
    """
    rows = rng.permutation(len(points))[:NOISE_POINTS]
    by_quadrics, reach, neighbours = _off_quadrics(points, normals, among, rows, NOISE_NEIGHBOURS)
    if by_quadrics > THICK * reach:
        # The neighbours are a ball, not a sheet: more of them, and farther apart than the noise, show how thick it is.
        for more in MORE_NEIGHBOURS:
            by_quadrics, reach, _ = _off_quadrics(points, normals, among, rows[:THICK_POINTS], more)
            if by_quadrics <= THICK * reach:
                break
        return Noise(by_quadrics=by_quadrics, by_normals=by_quadrics)
    nearest = neighbours[:, 1 : 1 + HERMITE_NEIGHBOURS]
    between = ((points[nearest] - points[rows, None]) * (normals[nearest] + normals[rows, None]) / 2).sum(axis=2)
    by_normals = np.median(np.abs(between)) / (math.sqrt(2) * MEDIAN_OF_NORMAL * HERMITE_SHARE)
    return Noise(by_quadrics=by_quadrics, by_normals=float(by_normals))


def _off_quadrics(
    points: NDArray[np.float64], normals: NDArray[np.float64], among: Neighbours, rows: NDArray[np.int64], k: int
) -> tuple[float, float, NDArray[np.int64]]:
    """How far the k neighbours of points in `rows` scatter about the best quadric, and how far off they are.

    Standard deviation and largest distance, the medians; and the neighbours (n, k + 1), each point its own first.
    """
    k = min(k, len(points) - 1)
    distance, neighbours = among.query(points[rows], k + 1)
    reach = np.maximum(distance[:, -1:], 1e-12)
    offsets = (points[neighbours] - points[rows, None]) / reach[..., None]
    axis = np.where(np.abs(normals[rows, :1]) < 0.7, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
    u = np.cross(normals[rows], axis)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    x, y, height = (np.einsum("nki,ni->nk", offsets, e) for e in (u, np.cross(normals[rows], u), normals[rows]))
    quadric = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    gram = np.einsum("nki,nkj->nij", quadric, quadric) + 1e-9 * np.eye(6)
    coefficients = np.linalg.solve(gram, np.einsum("nki,nk->ni", quadric, height)[..., None])
    residual = height - (quadric @ coefficients)[..., 0]
    degrees_of_freedom = max(1, k + 1 - 6)
    off = float(np.median(np.sqrt((residual**2).sum(axis=1) / degrees_of_freedom) * reach[:, 0]))
    return off, float(np.median(reach)), neighbours


def thickness(points: NDArray[np.float64], normals: NDArray[np.float64], among: Neighbours, k: int) -> float:
    """How far the k neighbours of a point scatter about a quadric, over how far off they are: 0.4 is a ball of them."""
    rows = np.random.default_rng(0).permutation(len(points))[:THICK_POINTS]
    off, reach, _ = _off_quadrics(points, normals, among, rows, k)
    return off / reach


def _space_pool(
    positions: Tensor,
    distance: Tensor,
    w: Tensor,
    *,
    near: float,
    far: float,
    config: PoolConfig,
) -> SpacePool:
    """A pool of samples at `positions` (m, 3), from their `distance` (m,) to the cloud and winding numbers w (m,).

    Nearer than `near` no sign is trusted; beyond `far` the distance to the nearest point is that to the surface.
    """
    clear = distance > near
    if _seen_from_inside(w[clear]):
        w = w + 1
    sure = (w > 0.5 + config.inside_confidence) | (w < 0.5 - config.outside_confidence)
    trusted = sure & clear
    return SpacePool(
        points=positions,
        signed_distance=torch.where(w > 0.5, -distance, distance),
        first_guess=distance * ((0.5 - w) / FULL_GUESS).clamp(-1, 1),
        trusted=trusted,
        far=trusted & (distance > far),
    )


def _seen_from_inside(w: Tensor) -> bool:
    """Whether these winding numbers (m,) are those of a room: -1 in its air, 0 in all that is solid around it.

    An open sheet has both signs, up to one half; few of them, or as many of the one as of the other, say nothing.
    """
    hollow, solid = int((w < -SURELY_WOUND).sum()), int((w > SURELY_WOUND).sum())
    return hollow > max(FEWEST_WOUND * len(w), 10 * solid)


def pool_positions(points: NDArray[np.float64], config: PoolConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """Where the pool's samples are (m, 3): some around `points` (n, 3), some all over the cube."""
    n_near = round(config.size * config.near_share)
    uniform = rng.random((config.size - n_near, 3)) * 2 - 1
    # A width drawn per sample puts many close to the surface and some far out.
    width = 2 * config.near_sigma * rng.random((n_near, 1))
    near = points[rng.integers(0, len(points), n_near)] + rng.normal(size=(n_near, 3)) * width
    return rng.permutation(np.clip(np.concatenate([near, uniform]), -1, 1))


def _tensor(array: NDArray[np.float64]) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)
