"""Where a surface was measured and where it was imagined: the support of vertices by points, and cuts along it.

The zero set of a signed distance field is closed. Where the scan is not, part of it was never measured: a lid over a
neck, the back of a terrain. What supports a vertex are the points around it whose normals agree with its own. Its
support is their density there over that among themselves (as the local outlier factor compares densities: Breunig et
al. 2000), at most 1. It does not depend on units or spacing, is about 1 where points lie as closely as they usually do,
a half at a straight border of theirs, and falls with the square of the distance from them.

Vertices with less than BORDER are unsupported. Of a region of these, all is cut away if it reaches below DEEP: a hole
as wide as that is a border of the scan; what is narrower is bridged, as by any interpolation.

World units; normals outward. Nothing here is random.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sdfserver.cloud import PointCloud
from sdfserver.config import SurfaceKind
from sdfserver.mesh import TriangleMesh, face_areas, half_edges, keep_faces
from sdfserver.neighbours import neighbours_of
from sdfserver.sampling import normals_of

Floats = NDArray[np.float64]

SUPPORTERS = 16
"""Points that support a vertex: the nearest ones whose normals agree, out of twice as many."""
JUDGES = 500_000
"""Points of a larger cloud, at even steps, that supporters are taken from."""
BORDER = 0.6
DEEP = 0.2
"""As in the middle of a round hole about 14 spacings wide."""
SMOOTHED = 1.5
"""Point spacings over which support is averaged along the surface: chance makes it vary, and borders ragged."""
MOST_ROUNDS = 200
SNAP = 0.15
"""A cut that passes a vertex by less than this share of an edge goes through it: no slivers."""

LEAST_PIECE = 1e-3
"""Share of the points below which what they support is no piece of its own once the rest is cut away."""

MOSTLY_OPEN = 0.12
"""Share of the area that is cut off by an open surface from which on `auto` takes the cloud for open."""
END_AREA, END_EXTENT = 0.004, 0.08
"""A hole where the scan ends has at least this share of the area, and of the cloud's diagonal."""
FLAT_RIM = 0.12
"""How much the rim of such a hole spreads across its plane, over how much along it, at most."""
BEYOND = 0.01
"""Share of the points that may lie beyond that plane, by more than a hundredth of the diagonal."""


@dataclass(frozen=True, kw_only=True)
class SurfaceReport:
    """What became of the parts of a surface that no points support."""

    asked: SurfaceKind
    kind: str
    """closed or open: how the mesh was left."""
    why: str
    unsupported: float
    """Share of the area that is unsupported and reaches deep, before anything was cut."""
    holes: int
    """How many such regions there are."""
    cut: int
    """How many of them were cut away."""


def support_of(mesh: TriangleMesh, cloud: PointCloud, *, device: str = "cpu") -> Floats:
    """The support (v,) of the vertices of a `mesh` with normals by the points of `cloud`, from 0 to 1."""
    step = -(-len(cloud.points) // JUDGES)
    points, normals = cloud.points[::step], normals_of(cloud)[::step]
    if mesh.normals is None:
        raise ValueError("support needs the normals of the vertices")
    vertex_normals = mesh.normals.astype(np.float64)
    k = min(SUPPORTERS, (len(points) - 1) // 2)
    tree = neighbours_of(points, device)
    own = tree.query(points, k + 1)[0][:, -1] ** 2
    asked, row = _spread(mesh.vertices, vertex_normals, own, k)
    distance, near = tree.query(mesh.vertices[asked], 2 * k)
    agrees = np.einsum("nki,ni->nk", normals[near], vertex_normals[asked]) > 0
    count = agrees.cumsum(axis=1)
    found = np.minimum(count[:, -1], k)
    # The disc that holds k of them, or all that were found: the k-th, or the last one looked at.
    last = np.where(count[:, -1] >= k, (count >= k).argmax(axis=1), 2 * k - 1)
    radius = np.take_along_axis(distance, last[:, None], axis=1)[:, 0]
    usual = _upper_quartile(np.where(agrees & (count <= k), own[near], -1.0), found)
    support = np.minimum(1.0, found / k * usual / np.maximum(radius**2, np.finfo(np.float64).tiny))
    spacing = np.sqrt(np.pi / k * np.median(own))
    return _smoothed(mesh, support[row], spacing)


def _spread(vertices: Floats, normals: Floats, own: Floats, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Vertices (m,) of all (v, 3) about a point's spacing from each other, and for each vertex (v,) its place in them.

    Support does not change within less. One with another normal is another one, as on the two sides of a wall.
    """
    cell = np.sqrt(np.pi / k * np.quantile(own, 0.1)) / 2
    cells = np.floor((vertices - vertices.min(axis=0)) / max(cell, np.finfo(np.float64).tiny)).clip(max=2**20 - 1)
    side = np.abs(normals).argmax(axis=1)
    side = 2 * side + (np.take_along_axis(normals, side[:, None], axis=1)[:, 0] > 0)
    x, y, z = cells.astype(np.int64).T
    _, first, row = np.unique(((x << 20 | y) << 20 | z) * 6 + side, return_index=True, return_inverse=True)
    return first, row


def _upper_quartile(values: Floats, found: NDArray[np.int64]) -> Floats:
    """For each row the upper quartile of the `found` (n,) values that are not negative; 0 where there are none.

    Not the mean: beside a part that was scanned more densely most of a vertex's supporters are of that part.
    """
    values = np.sort(values, axis=1)
    place = values.shape[1] - 1 - found // 4
    return np.maximum(np.take_along_axis(values, place[:, None], axis=1)[:, 0], 0.0)


def _smoothed(mesh: TriangleMesh, values: Floats, spacing: float) -> Floats:
    """`values` (v,) averaged along the surface over SMOOTHED times `spacing`, by rounds of means over edges."""
    edges = half_edges(mesh.faces)
    both = np.concatenate([edges, edges[:, ::-1]])
    count = len(mesh.vertices)
    beside = coo_array((np.ones(len(both), np.float32), (both[:, 0], both[:, 1])), shape=(count, count)).tocsr()
    degree = np.maximum(np.asarray(beside.sum(axis=1)).ravel(), 1)
    length = np.linalg.norm(mesh.vertices[edges[:, 0]] - mesh.vertices[edges[:, 1]], axis=1)
    # A round spreads by half an edge's mean square along each of two directions.
    rounds = 4 * (SMOOTHED * spacing) ** 2 / max(float(np.mean(length**2)), np.finfo(np.float64).tiny)
    for _ in range(int(np.clip(rounds, 1, MOST_ROUNDS))):
        values = (values + (beside @ values) / degree) / 2
    return values


def as_asked(mesh: TriangleMesh, cloud: PointCloud, asked: SurfaceKind) -> tuple[TriangleMesh, SurfaceReport]:
    """The mesh, closed or cut open along its confidence as `asked`, and what was done and why.

    auto: open where much of the surface has no support; else only where the scan ends: at a hole with a flat rim that
    has all points on one side, as at the neck of a bust or under an object that stood. Other holes stay closed.
    """
    if mesh.confidence is None:
        raise ValueError("a mesh is cut along its confidence; see support_of")
    support = mesh.confidence.astype(np.float64)
    holes = _holes(mesh, support)
    areas = face_areas(mesh.vertices, mesh.faces)
    shares = np.bincount(holes.of_face + 1, areas, minlength=holes.count + 1)[1:] / areas.sum()
    unsupported = float(shares.sum())
    chosen, why = np.zeros(holes.count, dtype=bool), ""
    if asked == "closed":
        why = "a closed surface was asked for"
    elif not holes.count:
        why = "all of it is supported by points, or close to some that are"
    elif asked == "open":
        chosen[:] = True
        why = "an open surface was asked for"
    elif unsupported > MOSTLY_OPEN:
        chosen[:] = True
        why = f"{unsupported:.0%} of the closed surface is far from all points, so that the scan is an open one"
    else:
        chosen = np.array([_is_end(mesh, cloud, holes, hole, shares[hole]) for hole in range(holes.count)])
        what = f"{unsupported:.1%} of the closed surface is far from all points"
        why = (
            f"{what}; the scan ends at {int(chosen.sum())} of the holes, which have a flat rim and nothing beyond it"
            if chosen.any()
            else f"{what}, in holes within the scan, which a smooth surface closes"
        )
    members = _members(holes, chosen)
    if members.all():
        chosen[:] = False
        why = "no points support any of it"
    if chosen.any():
        mesh = cut_below(mesh, np.where(members, support, np.maximum(support, BORDER)), BORDER)
    report = SurfaceReport(
        asked=asked,
        kind="open" if chosen.any() else "closed",
        why=why,
        unsupported=unsupported,
        holes=holes.count,
        cut=int(chosen.sum()),
    )
    return mesh, report


@dataclass(frozen=True, kw_only=True)
class _Holes:
    """Unsupported regions that reach deep, numbered from 0; -1 elsewhere. A face is of one if all its corners are."""

    count: int
    of_vertex: NDArray[np.int64]
    of_face: NDArray[np.int64]


def _holes(mesh: TriangleMesh, support: Floats) -> _Holes:
    low = support < BORDER
    edges = half_edges(mesh.faces)
    edges = edges[low[edges].all(axis=1)]
    count = len(mesh.vertices)
    links = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(count, count))
    region = connected_components(links, directed=False)[1]
    deep = np.unique(region[support < DEEP])
    number = np.full(int(region.max(initial=0)) + 1, -1)
    number[deep] = np.arange(len(deep))
    of_vertex = np.where(low, number[region], -1)
    corners = of_vertex[mesh.faces]
    return _Holes(count=len(deep), of_vertex=of_vertex, of_face=np.where((corners >= 0).all(axis=1), corners[:, 0], -1))


def _members(holes: _Holes, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which vertices (v,) are in one of the chosen holes."""
    members = np.zeros(len(holes.of_vertex), dtype=bool)
    within = holes.of_vertex >= 0
    members[within] = chosen[holes.of_vertex[within]]
    return members


def _is_end(mesh: TriangleMesh, cloud: PointCloud, holes: _Holes, hole: int, share: float) -> bool:
    """Whether the scan ends at a hole: it is large, its rim is flat, and all points are on one side of it."""
    if share < END_AREA:
        return False
    within = holes.of_vertex == hole
    corners = mesh.faces[within[mesh.faces].any(axis=1)]
    rim = mesh.vertices[np.unique(corners[~within[corners]])]
    if len(rim) < 3:
        return False
    centre = rim.mean(axis=0)
    spread, axes = np.linalg.svd(rim - centre, full_matrices=False)[1:]
    diagonal = float(np.linalg.norm(np.ptp(cloud.points, axis=0)))
    if spread[2] > FLAT_RIM * spread[0] or np.linalg.norm(np.ptp(rim, axis=0)) < END_EXTENT * diagonal:
        return False
    height = (cloud.points - centre) @ axes[2] / diagonal
    return min(float((height > 0.01).mean()), float((height < -0.01).mean())) <= BEYOND


def cut_below(mesh: TriangleMesh, values: Floats, level: float) -> TriangleMesh:
    """The part of `mesh` where `values` (v,) at its vertices, linear in between, are not below `level`.

    Triangles that the level passes through are cut; what the vertices carry is interpolated at the new ones. A closed
    mesh becomes one with borders, nothing else about it changes.
    """
    exact = values - level
    f = _snapped(mesh.faces, exact)
    above, below = (f > 0)[mesh.faces].sum(axis=1), (f < 0)[mesh.faces].sum(axis=1)
    # A face with all corners on the level is on the side that they came from.
    whole = (below == 0) & ((above > 0) | (exact[mesh.faces].sum(axis=1) > 0))
    pieces, ends, share = _pieces(mesh.faces[(below > 0) & (above > 0)], f)
    faces = np.concatenate([mesh.faces[whole], pieces])
    return keep_faces(replace(_with_points_between(mesh, ends, share), faces=faces), np.ones(len(faces), dtype=bool))


def _snapped(faces: NDArray[np.int64], f: Floats) -> Floats:
    """f (v,) with zeros at the vertices that the level f = 0 all but passes through, and nowhere else."""
    f = np.where(f == 0, np.finfo(np.float64).tiny, f)
    edges = half_edges(faces)
    a, b = edges[(f[edges[:, 0]] > 0) != (f[edges[:, 1]] > 0)].T
    place = f[a] / (f[a] - f[b])
    out = f.copy()
    out[a[place < SNAP]] = 0.0
    out[b[place > 1 - SNAP]] = 0.0
    return out


def _pieces(faces: NDArray[np.int64], f: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """The parts (p, 3) above zero of faces (n, 3) with corners on both sides of it, by f (v,).

    They have a new vertex on each of the edges (e, 2) at a share (e,) of the way from the first end to the second;
    these are numbered from v on.
    """
    # Each face is turned so that its first corner is the only one above, or the only one below.
    sign = np.sign(f[faces])
    alone_above = (sign > 0).sum(axis=1) == 1
    odd = np.where(alone_above, (sign > 0).argmax(axis=1), (sign < 0).argmax(axis=1))
    a, b, c = np.take_along_axis(faces, (odd[:, None] + np.arange(3)) % 3, axis=1).T
    crossed_b, crossed_c = f[b] != 0, f[c] != 0
    edges = np.concatenate([np.stack([a, b], axis=1)[crossed_b], np.stack([a, c], axis=1)[crossed_c]])
    ends, row = np.unique(np.sort(edges, axis=1), axis=0, return_inverse=True)
    share = f[ends[:, 0]] / (f[ends[:, 0]] - f[ends[:, 1]])
    new_b, new_c = b.copy(), c.copy()
    new_b[crossed_b], new_c[crossed_c] = np.split(len(f) + row.reshape(-1), [int(crossed_b.sum())])
    tips = np.stack([a, new_b, new_c], axis=1)[alone_above]
    first, second = (np.stack(three, axis=1)[~alone_above] for three in ((new_b, b, c), (new_b, c, new_c)))
    return np.concatenate([tips, first, second]), ends, share


def _with_points_between(mesh: TriangleMesh, ends: NDArray[np.int64], share: Floats) -> TriangleMesh:
    """The mesh with a new vertex on each of the edges `ends` (e, 2), at `share` (e,) of the way along it."""

    def grown(values: NDArray[np.generic] | None) -> Floats | None:
        if values is None:
            return None
        whole = values.astype(np.float64)
        t = share.reshape(-1, *[1] * (whole.ndim - 1))
        return np.concatenate([whole, (1 - t) * whole[ends[:, 0]] + t * whole[ends[:, 1]]])

    vertices, normals, colors, confidence = (
        grown(values) for values in (mesh.vertices, mesh.normals, mesh.colors, mesh.confidence)
    )
    if vertices is None:
        raise ValueError("a mesh has vertices")
    if normals is not None:
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return replace(
        mesh,
        vertices=vertices,
        normals=None if normals is None else normals.astype(np.float32),
        colors=None if colors is None else colors.round().astype(np.uint8),
        confidence=None if confidence is None else confidence.astype(np.float32),
    )
