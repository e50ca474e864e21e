"""What a reconstruction takes for granted of its cloud: measured, put into words, and mended where neighbours can tell.

The points are those of one closed surface, sampled about evenly and more densely than its walls are thick; the normals
are right and point out of the solid. `measure` says how far that holds, by a sample of the points; `warnings_of` says
where it does not and what to do; `mended` turns single normals and patches that contradict their surroundings, averages
normals that are mostly noise and points that noise spreads around the surface, and leaves outliers out. A cloud that
needs none of it is returned as it came.

World units, normals outward, as everywhere. Nothing here is random: the same cloud gives the same figures.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sdfserver.cloud import PointCloud
from sdfserver.mesh import unit_vectors
from sdfserver.neighbours import neighbours_of
from sdfserver.orientation import agreement_of
from sdfserver.sampling import SKETCH, noise_of, normals_of, thickness
from sdfserver.winding import AREA_NEIGHBOURS, DipoleTree, winding_number

JUDGED = 20_000
"""Points of a larger cloud that it is judged by."""
VIEWS = 2000
"""Points of these at which the winding number is asked for on both sides."""
NEIGHBOURS = 16
MEAN_NEIGHBOURS = 12
THICK_NEIGHBOURS, FEWEST_THICK = 96, 2000
FAR, ODD = 3.0, 0.4
"""An outlier is so many times farther from its neighbours than is usual, and so much out of their planes (a sine)."""
OUTLIER_ROUNDS = 2
"""The second time those are told that had other outliers for neighbours."""
SIDE_STEPS = 2.0
"""How many spacings to the side of a point its winding number is asked for: nearer, single points tell."""
LINK = 4.0
"""Neighbours are one part up to this many spacings."""
FEWEST_OF_A_PART = 0.01
"""A part of fewer of the points, by share, is not looked at."""
RMS_OF_MEDIAN = 1.2011
"""Of an angle whose two components are normally distributed: sqrt(1 / ln 2)."""

# From where on an assumption is said to fail. Clean clouds and the scans tried are below all of these.
MOST_THICK = 1 / 3
MOST_INCONSISTENT = 0.01
MOST_NOISE_DEGREES = 22.0
MOST_INWARD = 0.5
MOST_NESTED = 0.05
MOST_OUTLIERS = 0.005
MOST_UNEVEN = 100.0
MOST_OPEN = 0.25
MOST_THIN = 0.3
LEAST_PART = 0.1
FLAT = 0.01
ONE_SIDED = 0.3


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """How far a cloud is from what is assumed of it. What can be mended is taken as mended by all that follow it."""

    noise_thick: float
    """Noise over the distance within which a point's neighbours lie, few or many; 0.4 where they are a ball of points.

    0 for a cloud of few points, or of so many that it is not fitted as a whole."""
    outliers: float
    """Share of points far from all others, off any surface that these lie on."""
    normals_inconsistent: float
    """Share of normals that point to the other side than those around them, or of the patches that do."""
    one_sided: float
    """Length of the seam along which no choice of signs lets normals agree, over the root of the number of points."""
    normals_noisy: float
    """Root mean square angle between normals and the true ones, in degrees, as far as their neighbours tell."""
    normals_inward: float
    """Share of points whose normals look into a hollow that is closed, or mostly."""
    bodies_nested: float
    """Share of points on a body that lies within another one."""
    open_surface: float
    """How much of what the points see of their own surface is missing: 0 if it is closed, 1 if it is a flat sheet."""
    thin: float
    """Share of points with the other side of a wall nearer than two spacings."""
    flat: float
    """Extent across the plane through the points over that along it, as standard deviations."""
    density_varies: float
    """Points per area, the 99th percentile over the 1st; about 4 for points drawn evenly."""
    parts: int
    """Parts that gaps keep apart, each with one in a hundred of the points or more."""
    smallest_part: float
    """The extent of the smallest of them over that of the whole."""
    spacing: float
    """Between neighbouring points, world units: the median."""


@dataclass(frozen=True, kw_only=True)
class Mending:
    """What was done to a cloud before the fit: points left out, normals turned, what was averaged."""

    outliers: int = 0
    turned: int = 0
    averaged: bool = False
    flattened: float | None = None
    """Where points were moved into mean planes: what noise they had before, in world units."""


def measure(cloud: PointCloud, *, device: str = "cpu") -> Assumptions:
    """How far an oriented cloud, validated, is what is assumed of it; neighbours are looked for on `device`."""
    points, normals = cloud.points, normals_of(cloud)
    whole = len(points)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = 1 / float((high - low).max())
    rows = np.random.default_rng(0).permutation(whole)[:JUDGED]
    patch = _Patch((points[rows] - (low + high) / 2) * scale, normals[rows], device)
    odd = patch.outliers()
    if odd.mean() > MOST_OUTLIERS:
        patch = _Patch(patch.points[~odd], patch.normals[~odd], device)
    agreement = agreement_of(patch.points, patch.normals, device)
    patch.normals = patch.normals * agreement.signs[:, None]
    thinned = math.sqrt(len(patch.points) / (whole * (1 - odd.mean())))
    beyond = patch.side()
    sizes = patch.parts()
    thick = 0.0
    if FEWEST_THICK <= whole <= SKETCH:
        centred = points - (low + high) / 2
        among = neighbours_of(centred, device)
        thick = min(thickness(centred, normals, among, k) for k in (NEIGHBOURS, THICK_NEIGHBOURS))
    return Assumptions(
        noise_thick=thick,
        outliers=float(odd.mean()),
        normals_inconsistent=agreement.flipped,
        one_sided=agreement.seam,
        normals_noisy=patch.noise_degrees(),
        normals_inward=float((beyond < -0.25).mean()),
        bodies_nested=float((beyond > 1.25).mean()),
        open_surface=float(2 * np.abs(beyond - 0.5 - np.round(beyond - 0.5)).mean()),
        thin=patch.thin(thinned),
        flat=patch.flatness(),
        density_varies=patch.unevenness(),
        parts=len(sizes),
        smallest_part=min(sizes),
        spacing=float(np.median(patch.spacings)) * thinned / scale,
    )


def warnings_of(found: Assumptions, mending: Mending | None = None) -> list[str]:
    """In words, each beginning with the name of the assumption that fails: what was found, and what to do."""
    mending = mending or Mending()
    said = []
    if found.noise_thick > MOST_THICK:
        moved = "each point was moved into the mean plane of those around it, which rounds what is small; "
        done = "" if mending.flattened is None else moved
        said.append(
            "noise_thick: the noise of the points is larger than the way between neighbours, so that they lie in a "
            f"cloud around the surface and not on it; {done}scan with less noise, or average several scans"
        )
    if found.outliers > MOST_OUTLIERS:
        done = f"{mending.outliers:,} were left out" if mending.outliers else "use --remove-outliers"
        said.append(f"outliers: {_percent(found.outliers)} of the points lie off any surface; {done}")
    if found.normals_inconsistent > MOST_INCONSISTENT:
        done = f"{mending.turned:,} were turned to agree" if mending.turned else "they were left as they are"
        said.append(
            f"normals_inconsistent: {_percent(found.normals_inconsistent)} of the normals point to the other side than "
            f"those around them; {done}; if that is wrong, export the cloud with outward normals, or use "
            "--normals estimate"
        )
    if found.one_sided > ONE_SIDED:
        said.append(
            "one_sided: along a loop the normals come back turned, as on a Moebius strip, so that the surface has no "
            "inside; the mesh is a closed skin around it, and wrong along the seam; cut the cloud there, or "
            "reconstruct it in pieces"
        )
    if found.normals_noisy > MOST_NOISE_DEGREES:
        done = "each was replaced by the mean of those around it, which rounds edges; " if mending.averaged else ""
        said.append(
            f"normals_noisy: the normals are off by {found.normals_noisy:.0f} degrees, as their neighbours tell; {done}"
            "--normals estimate may do better"
        )
    if found.normals_inward > MOST_INWARD:
        said.append(
            f"normals_inward: {_percent(found.normals_inward)} of the normals look into a hollow, and all around it is "
            "taken for solid, as with a room that is seen from inside; if it is a body, turn its normals, or use "
            "--normals estimate"
        )
    if found.bodies_nested > MOST_NESTED:
        said.append(
            f"bodies_nested: {_percent(found.bodies_nested)} of the points lie on bodies within another body, where no "
            "field can be a distance to both; leave them out, or turn their normals if they are hollows"
        )
    if found.open_surface > MOST_OPEN and found.thin <= MOST_THIN:
        what = "a plane, without an inside" if found.flat < FLAT else "open"
        said.append(
            f"open_surface: the surface is {what} ({_percent(found.open_surface)} of what its points face is missing); "
            "the mesh is left open there, or closed by a lid or a back that was never scanned, as --surface says"
        )
    if found.thin > MOST_THIN:
        said.append(
            f"thin: {_percent(found.thin)} of the points lie on walls or wires thinner than two spacings, which "
            f"({found.spacing:.2g}) merge or break; scan more densely"
        )
    if found.density_varies > MOST_UNEVEN:
        said.append(
            f"density_varies: some parts have {found.density_varies:.0f} times as many points per area as others; "
            "where they are few the surface is a guess; thin out the dense parts, or scan the others again"
        )
    if found.parts > 1 and found.smallest_part < LEAST_PART and found.thin <= MOST_THIN:
        said.append(
            f"parts_apart: of {found.parts} parts the smallest has {_percent(found.smallest_part)} of the cloud's "
            "extent, and no more of the resolution; reconstruct it on its own, or raise --resolution"
        )
    return said


def mended(cloud: PointCloud, found: Assumptions, *, device: str = "cpu") -> tuple[PointCloud, Mending]:
    """The cloud with what neighbours can tell put right, and what that was; the same cloud where nothing is wrong."""
    what = Mending()
    if found.outliers > MOST_OUTLIERS:
        for _ in range(OUTLIER_ROUNDS):
            odd = _Patch(cloud.points - cloud.points.mean(axis=0), normals_of(cloud), device).outliers()
            cloud = cloud.take(~odd)
            what = replace(what, outliers=what.outliers + int(odd.sum()))
    if found.normals_inconsistent > MOST_INCONSISTENT:
        agreement = agreement_of(cloud.points, normals_of(cloud), device)
        cloud = replace(cloud, normals=normals_of(cloud) * agreement.signs[:, None])
        what = replace(what, turned=int((agreement.signs < 0).sum()))
    if found.noise_thick > MOST_THICK:
        noise = noise_of(cloud, np.random.default_rng(0), device).least
        cloud, what = _flattened(cloud, device), replace(what, flattened=noise)
    if found.normals_noisy > MOST_NOISE_DEGREES:
        patch = _Patch(cloud.points - cloud.points.mean(axis=0), normals_of(cloud), device)
        cloud = replace(cloud, normals=patch.means(with_itself=True))
        what = replace(what, averaged=True)
    return cloud, what


def _flattened(cloud: PointCloud, device: str) -> PointCloud:
    """The cloud with each point moved along the mean normal of the neighbours on its side into their mean plane."""
    centre = cloud.points.mean(axis=0)
    points, normals = cloud.points - centre, normals_of(cloud)
    among = neighbours_of(points, device)
    moved, turned = np.empty_like(points), np.empty_like(normals)
    for start in range(0, len(points), JUDGED):
        part = slice(start, start + JUDGED)
        _, near = among.query(points[part], min(THICK_NEIGHBOURS, len(points)))
        # The other side of a thin part is not averaged with this one.
        beside = (np.einsum("nki,ni->nk", normals[near], normals[part]) > 0).astype(np.float64)
        beside /= beside.sum(axis=1, keepdims=True)
        mean = unit_vectors(np.einsum("nk,nki->ni", beside, normals[near]))
        above = np.einsum("ni,ni->n", points[part] - np.einsum("nk,nki->ni", beside, points[near]), mean)
        moved[part], turned[part] = points[part] - above[:, None] * mean, mean
    return replace(cloud, points=moved + centre, normals=turned)


class _Patch:
    """Points (n, 3) about the origin, their normals, and their nearest neighbours."""

    def __init__(self, points: NDArray[np.float64], normals: NDArray[np.float64], device: str) -> None:
        self.points, self.normals, self.device = points, normals, device
        count = min(NEIGHBOURS, len(points) - 1)
        distance, near = neighbours_of(points, device).query(points, count + 1)
        self.distance, self.near = distance[:, 1:], near[:, 1:]
        last = min(AREA_NEIGHBOURS, count)
        self.areas = math.pi * self.distance[:, last - 1] ** 2 / last
        self.spacings = np.sqrt(self.areas)

    def outliers(self) -> NDArray[np.bool_]:
        """Which points (n,) are far from others, and out of the planes of these or they out of its own."""
        reach = self.distance[:, 7]
        far = reach > FAR * np.median(reach)
        far |= reach > FAR * np.median(reach[self.near[:, :8]], axis=1)
        odd = np.zeros(len(far), dtype=bool)
        rows = np.flatnonzero(far)
        if rows.size:
            near = self.near[rows, :8]
            step = (self.points[near] - self.points[rows, None]) / self.distance[rows, :8, None]
            out = np.abs(np.einsum("nki,ni->nk", step, self.normals[rows]))
            out = np.maximum(out, np.abs(np.einsum("nki,nki->nk", step, self.normals[near])))
            odd[rows] = np.median(out, axis=1) > ODD
        return odd

    def means(self, *, with_itself: bool) -> NDArray[np.float64]:
        """The mean direction (n, 3) of the normals around each point, turned to its side."""
        around = self.normals[self.near[:, :MEAN_NEIGHBOURS]]
        side = np.sign(np.einsum("nki,ni->nk", around, self.normals))
        total = np.einsum("nki,nk->ni", around, side) + (self.normals if with_itself else 0.0)
        length = np.linalg.norm(total, axis=1, keepdims=True)
        mean: NDArray[np.float64] = np.where(length > 1e-6, total / np.maximum(length, 1e-6), self.normals)
        return mean

    def noise_degrees(self) -> float:
        """The angle of normals from the mean around them, from the median: creases and thin walls are few."""
        cosine = np.einsum("ni,ni->n", self.means(with_itself=False), self.normals)
        median = float(np.median(np.degrees(np.arccos(np.clip(cosine, -1, 1)))))
        return RMS_OF_MEDIAN * median / math.sqrt(1 + 1 / MEAN_NEIGHBOURS)

    def side(self) -> NDArray[np.float64]:
        """Winding numbers (m,) at some of the points, halfway between the two sides: 1/2 on a closed surface."""
        rows = np.linspace(0, len(self.points) - 1, min(VIEWS, len(self.points))).round().astype(np.int64)
        step = SIDE_STEPS * self.spacings[rows, None] * self.normals[rows]
        both = np.concatenate([self.points[rows] + step, self.points[rows] - step])
        tree = DipoleTree(self.points, self.normals, self.areas, self.device)
        w = winding_number(torch.from_numpy(both).float().to(self.device), tree).cpu().numpy()
        halfway: NDArray[np.float64] = w.reshape(2, -1).mean(axis=0).astype(np.float64)
        return halfway

    def thin(self, factor: float) -> float:
        """Share of the points with an opposite side nearer than two spacings, `factor` times those seen here."""
        opposite = np.einsum("nki,ni->nk", self.normals[self.near], self.normals) < -0.5
        close = self.distance < 2 * factor * self.spacings[:, None]
        return float((opposite & close).any(axis=1).mean())

    def flatness(self) -> float:
        """The least over the largest standard deviation along the principal axes."""
        spread = np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(self.points.T)), 0))
        return float(spread[0] / spread[-1])

    def unevenness(self) -> float:
        """The 99th percentile of the areas that points stand for over the 1st."""
        low, high = np.percentile(self.areas, [1, 99])
        return float(high / max(low, np.finfo(np.float64).tiny))

    def parts(self) -> list[float]:
        """The extents of the parts, over that of all."""
        near = self.near[:, :8]
        linked = self.distance[:, :8] <= LINK * np.maximum(self.spacings[:, None], self.spacings[near])
        rows = np.repeat(np.arange(len(near)), near.shape[1])[linked.ravel()]
        links = coo_array((np.ones(len(rows)), (rows, near[linked])), shape=(len(near), len(near)))
        label = connected_components(links, directed=False)[1]
        sizes = np.bincount(label)
        large = np.flatnonzero(sizes >= min(max(FEWEST_OF_A_PART * len(label), NEIGHBOURS), sizes.max()))
        whole = float(np.ptp(self.points, axis=0).max())
        return [float(np.ptp(self.points[label == part], axis=0).max()) / whole for part in large]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
