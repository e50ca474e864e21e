"""Creases: a mesh of a field, rounded where the surface has an edge, is given the edge back along edges of its own.

A network is smooth: its zero set turns at a crease over about the spacing of the points, and ripples for another one
beside it. Sharper contouring of the field finds just that. What is sharp is the cloud, whose points and normals stay
what they are up to the crease. So the mesh is kept, closed and manifold as it was extracted, and the cloud says where
its creases are:

1. Sides. Each vertex near points whose normals differ is put on one of the smooth pieces around it (`sdfserver.sides`),
   the one that it is nearest to. Where that leaves a ragged border, neighbours decide: energy |J| / h + BORDER per
   neighbour on another side goes down vertex by vertex (iterated conditional modes, Besag 1986).
2. Creases. An edge of the mesh whose ends have normals TURN apart crosses a crease if the normals of the points around
   are those of the two sides and hardly any lie between, as they would on something round, or with noise as large as
   the turn. Crossed edges that hang together by faces are one crease; one that is short, or of which too much lies
   between on the whole, is refused. What is refused stays as it was.
3. Splitting. Each crossed edge gets a vertex where the two sides meet, a face with three of them one where all three
   meet. The cut faces are split along these, so that creases run along edges: nothing else changes in how faces are
   connected, and a closed manifold stays one.
4. Vertices within BAND spacings go onto their sides, fading out; crease vertices slide along the crease, the others
   within their sides, until triangles are even. Faces that end up turned over are put back to where they were.

J: signed distance from a side. h: mean length of the mesh's edges. Lengths are those of the mesh; "spacing" is that of
the points nearby.

Splitting along an intersection of extrapolated sides: Attene, Falcidieno, Rossignac and Spagnuolo, Edge-Sharpener:
recovering sharp features in triangulations of non-adaptively re-meshed surfaces, SGP 2003. Vertices where tangent
planes meet: Kobbelt, Botsch, Schwanecke and Seidel, Feature sensitive surface extraction from volume data, SIGGRAPH
2001; Ju, Losasso, Schaefer and Warren, Dual contouring of Hermite data, SIGGRAPH 2002.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sdfserver.cloud import PointCloud
from sdfserver.creasing import Crossings, edges_of, face_edges, split_and_even
from sdfserver.mesh import TriangleMesh, half_edges, unit_vectors, vertex_normals
from sdfserver.neighbours import Neighbours, neighbours_of
from sdfserver.sampling import normals_of
from sdfserver.sides import Floats, Jets, Rows, Sides, angle, blended, dot

TURN = math.radians(25.0)
"""The least angle between the sides of a crease."""
NEAR, LOOK = 32, 16
"""Neighbours of a point that its jet is fitted to, and of a vertex whose jets it may be on."""
AROUND = 12
"""Neighbours of a point whose normals are compared with its own."""
REACH = 2.0
"""Spacings from such points to vertices that are looked at."""
FARTHEST = 3.0
"""Spacings from an edge to the crease that it crosses: a sharp one is rounded deep."""
BAND = 2.5, 1.25
"""Spacings from a crossed edge: beyond the first, vertices stay; within the second they are wholly on their sides."""
HERE = 0.02
"""What a jet costs a vertex for the square of its distance, beside |J|, all in spacings."""
FACING = math.cos(math.radians(110.0))
"""Points whose normals are farther than that from the field's gradient are on the other side of a wall."""
FEWEST = 2.5
"""The least support of a jet, in points."""
BORDER = 0.15
"""What each neighbour on another side costs, in mean lengths of edges."""
SWEEPS = 8
ENDS, ASIDE = 0.25, 0.7
"""A normal is that of a side up to this share of the turn, seen along the crease; farther from both it is between them.
One whose product with the direction of the crease is larger than the second is on yet another side."""
MOST_BETWEEN, MOST_ON_THE_WHOLE = 0.2, 0.015
"""How many normals may be between for one of the sides': at one edge, and on average along a crease."""
FEWEST_BESIDE = 3
"""Points on either side, of the NEAR ones, without which an edge crosses nothing."""
SHORTEST = 6.0
"""Spacings across the box around a crease."""
_NO_CREASES = (
    "no_creases: nothing was sharpened: where the surface turns, the normals of the points turn gradually, or are too "
    "noisy or too few to tell; more points, or normals not averaged over edges, may show the creases"
)
CHUNK = 8192
"""Points and vertices that are seen to at a time: what is made for them then stays in cache."""


@dataclass(frozen=True, kw_only=True)
class SharpReport:
    """What became of the creases.

    crease_vertices: vertices on creases; corners of these where three sides meet. length: of all creases, world units.
    put_back: vertices that stayed round for the sake of their faces. The rest are edges of the mesh that seemed to
    cross a crease and were left alone, with round: too many normals between; unsupported: too few points beside, or no
    place where the sides meet; short: no crease worth the name.
    """

    crease_vertices: int = 0
    corners: int = 0
    length: float = 0.0
    put_back: int = 0
    round: int = 0
    unsupported: int = 0
    short: int = 0

    def warnings(self) -> list[str]:
        """What is to be said of a cloud that has turns, but no crease that could be told from them."""
        if self.crease_vertices or not self.round + self.unsupported + self.short:
            return []
        return [_NO_CREASES]


class _Cloud:
    """The cloud, its spacings and who is near whom."""

    def __init__(self, cloud: PointCloud, device: str) -> None:
        self.points, self.normals = cloud.points, normals_of(cloud)
        self.search: Neighbours = neighbours_of(self.points, device)
        # The n-th neighbour of an even spread is sqrt(n / pi) spacings away.
        distance, self.near = self.search.query(self.points, min(NEAR, len(self.points)))
        nth = min(6, distance.shape[1] - 1)
        spacings = distance[:, nth] / math.sqrt(nth / math.pi)
        self.spacings = np.maximum(spacings, 1e-9 * float(np.ptp(self.points, axis=0).max()))

    def turning(self) -> NDArray[np.bool_]:
        """Which points (n,) have a neighbour with another normal."""
        found = np.zeros(len(self.points), bool)
        for column in self.near.T[1 : AROUND + 1]:
            found |= angle(self.normals, self.normals[column]) > TURN
        return found


@dataclass(eq=False)
class _Region:
    """The vertices that may be beside a crease: `vertices` (c,), their sides, the spacings (c,) there."""

    vertices: Rows
    sides: Sides
    spacings: Floats


def sharpen(mesh: TriangleMesh, cloud: PointCloud, *, device: str = "cpu") -> tuple[TriangleMesh, SharpReport]:
    """`mesh` with the creases that its oriented `cloud` has, in the same frame; it must have normals.

    Edges of the result join the vertices of each crease; a mesh without creases is returned as it is. What is closed
    or manifold stays so; no vertex is lost, and new ones follow the old. The same input gives the same result.
    Neighbours are looked for on `device`.
    """
    if mesh.normals is None:
        raise ValueError("the mesh has no normals")
    if len(cloud.points) <= AROUND or not len(mesh.faces):
        return mesh, SharpReport()
    known = _Cloud(cloud, device)
    turning = known.turning()
    if not turning.any():
        return mesh, SharpReport()
    region = _region(mesh.vertices, mesh.normals, known, turning, device)
    row = np.full(len(mesh.vertices), -1)
    row[region.vertices] = np.arange(len(region.vertices))
    inner = mesh.faces[(row[mesh.faces] >= 0).any(axis=1)]
    edges = edges_of(inner, len(mesh.vertices))
    edges = edges[(row[edges] >= 0).all(axis=1)]
    if not len(edges):
        return mesh, SharpReport()
    _settle(region, row[edges], mesh.vertices)
    crossings, refused = _crossings(mesh, known, region, edges, row)
    if not len(crossings.edges):
        return mesh, refused
    vertices = _onto_sides(mesh.vertices, region, crossings.edges, device)
    made = split_and_even(mesh, vertices, crossings, region.sides, row, farthest=FARTHEST * region.spacings)
    normals = vertex_normals(made.vertices, made.faces)
    same = (made.vertices[: len(mesh.vertices)] == mesh.vertices).all(axis=1) & ~made.beside[: len(mesh.vertices)]
    normals[: len(same)][same] = mesh.normals[same]
    ways = made.vertices[made.lines]
    report = SharpReport(
        crease_vertices=len(made.vertices) - len(mesh.vertices),
        corners=made.corners,
        length=float(np.linalg.norm(ways[:, 1] - ways[:, 0], axis=1).sum()),
        put_back=made.put_back,
        round=refused.round,
        unsupported=refused.unsupported,
        short=refused.short,
    )
    return TriangleMesh(vertices=made.vertices, faces=made.faces, normals=normals), report


def _region(
    places: Floats, normals: NDArray[np.float32], cloud: _Cloud, turning: NDArray[np.bool_], device: str
) -> _Region:
    """The vertices near points that are `turning` (n,), of those at `places` (v, 3), each on the side nearest to it."""
    distance, row = neighbours_of(cloud.points[turning], device).query(places, 1)
    vertices = np.flatnonzero(distance[:, 0] < REACH * cloud.spacings[turning][row[:, 0]])
    x, gradients = places[vertices], normals[vertices].astype(np.float64)
    far, looked_at = cloud.search.query(x, min(LOOK, len(cloud.points)))
    used, rows = np.unique(looked_at, return_inverse=True)
    rows = rows.reshape(looked_at.shape)
    parts = [_jets_of(cloud, used[start : start + CHUNK]) for start in range(0, len(used), CHUNK)]
    jets = Jets.joined(parts)
    spacings = cloud.spacings[looked_at[:, :4]].mean(axis=1)
    sides = [
        _nearest_sides(x[part], gradients[part], jets, rows[part], far[part] / spacings[part, None], spacings[part])
        for part in (slice(start, start + CHUNK) for start in range(0, len(vertices), CHUNK))
    ]
    return _Region(vertices=vertices, sides=Sides.joined(sides), spacings=spacings)


def _jets_of(cloud: _Cloud, rows: Rows) -> Jets:
    near = cloud.near[rows]
    return Jets.fitted(
        cloud.points[rows], cloud.normals[rows], cloud.points[near], cloud.normals[near], cloud.spacings[rows]
    )


def _nearest_sides(x: Floats, gradients: Floats, jets: Jets, rows: Rows, far: Floats, spacings: Floats) -> Sides:
    """For vertices x (c, 3), the mean of those of their jets `rows` (c, k), `far` spacings away, that go together."""
    distances, normals = jets.at(rows, x[:, None])
    cost = np.abs(distances) / spacings[:, None] + HERE * far**2
    cost += 10.0 * (dot(jets.normals[rows], gradients[:, None]) < FACING) + 1.0 * (jets.support[rows] < FEWEST)
    best = cost.argmin(axis=1)[:, None]
    apart = angle(normals, np.take_along_axis(normals, best[..., None], axis=1))
    weights = np.exp(-(far**2) / 2 - apart**2 / (TURN**2 / 2)) * jets.support[rows] * (apart < TURN)
    np.put_along_axis(weights, best, np.take_along_axis(weights, best, axis=1) + 1e-3, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    return blended(jets, rows, weights, x, distances, normals)


def _settle(region: _Region, edges: Rows, vertices: Floats) -> None:
    """Straightens the borders between sides: `edges` (e, 2), rows of the region, join its vertices."""
    sides, x = region.sides, vertices[region.vertices]
    h = float(np.linalg.norm(x[edges[:, 0]] - x[edges[:, 1]], axis=1).mean())
    edges = _near_borders(sides, edges)
    both = np.concatenate([edges, edges[:, ::-1]])
    start, end = both[np.argsort(both[:, 0], kind="stable")].T
    first = np.searchsorted(start, np.arange(len(x) + 1))
    for _ in range(SWEEPS):
        crossed = angle(sides.normals[start], sides.normals[end]) > TURN
        vertex, other = start[crossed], end[crossed]
        own_distance, _ = sides.at(vertex, x[vertex])
        other_distance, other_normal = sides.at(other, x[vertex])
        size = first[vertex + 1] - first[vertex]
        pair = np.repeat(np.arange(len(vertex)), size)
        ring = end[np.arange(len(pair)) + np.repeat(first[vertex] - np.cumsum(size) + size, size)]
        unlike_own = angle(sides.normals[vertex][pair], sides.normals[ring]) > TURN
        unlike_other = angle(other_normal[pair], sides.normals[ring]) > TURN
        fewer = np.bincount(pair, unlike_own.astype(float) - unlike_other, minlength=len(vertex))
        gain = (np.abs(own_distance) - np.abs(other_distance)) / h + BORDER * fewer
        best = np.zeros(len(x))
        np.maximum.at(best, vertex, gain)
        around = np.zeros(len(x))
        np.maximum.at(around, end, best[start])
        # Two neighbours that change sides at once may just change places: the one that gains more goes first.
        going = np.flatnonzero((gain > 1e-9) & (gain == best[vertex]) & (best[vertex] >= around[vertex]))
        _, once = np.unique(vertex[going], return_index=True)
        going = going[once]
        if not len(going):
            return
        sides.take(vertex[going], other[going], x[vertex[going]])


def _near_borders(sides: Sides, edges: Rows) -> Rows:
    """Those of `edges` (e, 2) that are no farther than two edges from one between two sides."""
    near = np.zeros(len(sides.normals), bool)
    near[edges[angle(sides.normals[edges[:, 0]], sides.normals[edges[:, 1]]) > TURN]] = True
    for _ in range(2):
        near[edges[near[edges].any(axis=1)]] = True
    return edges[near[edges].all(axis=1)]


def _crossings(
    mesh: TriangleMesh, cloud: _Cloud, region: _Region, edges: Rows, row: Rows
) -> tuple[Crossings, SharpReport]:
    """Which of the mesh's `edges` (e, 2) cross a crease, and where; and what was refused."""
    sides = region.sides
    ends = row[edges]
    turned = angle(sides.normals[ends[:, 0]], sides.normals[ends[:, 1]]) > TURN
    edges, ends = edges[turned], ends[turned]
    middles = mesh.vertices[edges].mean(axis=1)
    beside, between = _normals_around(cloud, sides, ends, middles)
    places = _meeting(sides, ends, middles)
    spacings = region.spacings[ends[:, 0]]
    met = np.linalg.norm(places - middles, axis=1) < FARTHEST * spacings
    sharp = between <= MOST_BETWEEN * beside.sum(axis=1)
    supported = (beside.min(axis=1) >= FEWEST_BESIDE) & met
    good = sharp & supported
    good |= met & _flanked(face_edges(mesh.faces, edges, len(mesh.vertices)), good)
    found = np.flatnonzero(good)
    share = (between / np.maximum(beside.sum(axis=1), 1)).clip(max=1)[found]
    of_faces = face_edges(mesh.faces, edges[found], len(mesh.vertices))
    kept = found[_long_enough(of_faces, places[found], spacings[found], share)]
    refused = SharpReport(
        round=int((~good & ~sharp).sum()), unsupported=int((~good & sharp).sum()), short=len(found) - len(kept)
    )
    return (
        Crossings(
            edges=edges[kept],
            ends=ends[kept],
            places=places[kept],
            of_faces=face_edges(mesh.faces, edges[kept], len(mesh.vertices)),
        ),
        refused,
    )


def _flanked(of_faces: Rows, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of the edges (e,), in faces as `of_faces` (f, 3) tells, lie between two that are `good` (e,)."""
    pairs = half_edges(of_faces)
    pairs = pairs[(pairs >= 0).all(axis=1)]
    first, second = np.concatenate([pairs, pairs[:, ::-1]]).T
    between: NDArray[np.bool_] = np.bincount(first, good[second], minlength=len(good)) >= 2
    return between


def _normals_around(cloud: _Cloud, sides: Sides, ends: Rows, middles: Floats) -> tuple[Rows, Rows]:
    """How many of the points around edges have the normal of either side (e, 2), and how many one between (e,)."""
    beside, between = np.zeros((len(ends), 2), np.int64), np.zeros(len(ends), np.int64)
    for start in range(0, len(ends), CHUNK):
        part = slice(start, start + CHUNK)
        a, b = sides.normals[ends[part, 0]], sides.normals[ends[part, 1]]
        along = unit_vectors(np.cross(a, b))
        _, rows = cloud.search.query(middles[part], min(NEAR, len(cloud.points)))
        around = cloud.normals[rows]
        # A side that is bent along the crease, as in a bore, has normals out of the plane that the crease crosses.
        turned = np.arctan2(dot(np.cross(along, a)[:, None], around), dot(a[:, None], around))
        share = turned / angle(a, b)[:, None]
        here = np.abs(dot(along[:, None], around)) < ASIDE
        beside[part, 0] = (here & (np.abs(share) <= ENDS)).sum(axis=1)
        beside[part, 1] = (here & (np.abs(share - 1) <= ENDS)).sum(axis=1)
        between[part] = (here & (np.abs(share - 0.5) < 0.5 - ENDS)).sum(axis=1)
    return beside, between


def _meeting(sides: Sides, ends: Rows, middles: Floats) -> Floats:
    """The places (e, 3) where both sides of edges meet, nearest to their `middles`: Newton's method, least moves."""
    x = middles.copy()
    for _ in range(4):
        to_a, a = sides.at(ends[:, 0], x)
        to_b, b = sides.at(ends[:, 1], x)
        cosine = dot(a, b)
        free = np.maximum(1 - cosine**2, 1e-3)
        x -= ((to_a - cosine * to_b) / free)[:, None] * a + ((to_b - cosine * to_a) / free)[:, None] * b
    return x


def _long_enough(of_faces: Rows, places: Floats, spacings: Floats, share: Floats) -> NDArray[np.bool_]:
    """Which of the crossed edges (e,) are part of a crease that is one: long, and sharp on the whole."""
    if not len(places):
        return np.zeros(0, bool)
    pairs = half_edges(of_faces)
    pairs = pairs[(pairs >= 0).all(axis=1)]
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=2 * (len(places),))
    count, crease = connected_components(graph, directed=False)
    low, high = np.full((count, 3), np.inf), np.full((count, 3), -np.inf)
    np.minimum.at(low, crease, places)
    np.maximum.at(high, crease, places)
    edges = np.bincount(crease)
    long = np.linalg.norm(high - low, axis=1) > SHORTEST * np.bincount(crease, spacings) / edges
    good: NDArray[np.bool_] = (long & (np.bincount(crease, share) / edges < MOST_ON_THE_WHOLE))[crease]
    return good


def _onto_sides(vertices: Floats, region: _Region, crossed: Rows, device: str) -> Floats:
    """All vertices (v, 3), those near `crossed` edges (e, 2) moved onto their sides, fading out with distance."""
    x, (outer, inner) = vertices[region.vertices], BAND
    distance, _ = neighbours_of(vertices[crossed].mean(axis=1), device).query(x, 1)
    share = ((outer - distance[:, 0] / region.spacings) / (outer - inner)).clip(0, 1)
    share = share * share * (3 - 2 * share)
    away, normals = region.sides.at(slice(None), x)
    moved = vertices.copy()
    moved[region.vertices] -= (share * away.clip(-region.spacings, region.spacings))[:, None] * normals
    return moved
