"""Splitting the faces of a mesh along creases, and making the triangles there even.

What is known of the creases comes from `sdfserver.sharp`. An edge "crosses" where its ends are on two sides; each face
of the result lies on one side, whose normal tells whether it is turned over.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdfserver.mesh import TriangleMesh, face_normals, half_edges, unit_vectors
from sdfserver.sides import Floats, Rows, Sides, dot

RINGS = 3
"""Rings of faces around a crease whose vertices are moved for the sake of the triangles."""
ALONG, ROUNDS, FREE_ROUNDS = 10, 12, 5
"""Rounds in which vertices slide along creases alone, and all of them do; in so many of these no face is watched: those
that start on the wrong side of each other have to pass."""
HALF = 0.5
"""Share of its way to the mean of its neighbours that a vertex goes in a round."""
UPRIGHT, TILTED, OVER = 0.5, 0.3, 1e-3
"""Cosines between a face and its side: from the first on a face may move as it likes, up to the second it is to be
mended, up to the last it is turned over."""
TALL, STEP = 0.15, 0.3
"""Mean edges: how far a vertex is moved off the edge that it had crossed, and the most it goes at a time."""
MENDING, BACKWARDS = 20, 8


@dataclass(frozen=True, eq=False, kw_only=True)
class Crossings:
    """The m edges of a mesh that cross creases.

    edges: (m, 2) vertices, ascending. ends: (m, 2) rows of the sides of these. places: (m, 3), where the sides meet.
    of_faces: (f, 3), which of them is the edge of the face from its first corner to the second, from there to the
    third, and back; -1 for none.
    """

    edges: Rows
    ends: Rows
    places: Floats
    of_faces: Rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Creased:
    """A mesh with creases: the old vertices come first, then one for each crossing, then the corners.

    lines: (l, 2), the edges along creases. beside: (v,), which vertices belong to faces that were looked after.
    corners: vertices where three sides meet. put_back: vertices left where the round mesh has them.
    """

    vertices: Floats
    faces: Rows
    lines: Rows
    beside: NDArray[np.bool_]
    corners: int
    put_back: int


def edges_of(faces: Rows, n_vertices: int) -> Rows:
    """The edges (e, 2) of faces (f, 3), each once, ascending."""
    ends = np.sort(half_edges(faces), axis=1)
    keys = np.unique(ends[:, 0] * n_vertices + ends[:, 1])
    return np.stack([keys // n_vertices, keys % n_vertices], axis=1)


def face_edges(faces: Rows, edges: Rows, n_vertices: int) -> Rows:
    """Rows of `edges` (e, 2), ascending, that are edges of faces (f, 3), as Crossings.of_faces has them."""
    found = np.full(faces.shape, -1)
    if not len(edges):
        return found
    keys = edges[:, 0] * n_vertices + edges[:, 1]
    among = np.zeros(n_vertices, bool)
    among[edges] = True
    some = np.flatnonzero(among[faces].sum(axis=1) > 1)
    ends = np.sort(np.stack([faces[some], np.roll(faces[some], -1, axis=1)], axis=-1), axis=-1)
    asked = ends[..., 0] * n_vertices + ends[..., 1]
    place = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    found[some] = np.where(keys[place] == asked, place, -1)
    return found


def split_and_even(
    mesh: TriangleMesh, vertices: Floats, crossings: Crossings, sides: Sides, row: Rows, *, farthest: Floats
) -> Creased:
    """`mesh`, its vertices moved to `vertices` (v, 3), split along the crossings, with even triangles beside them.

    `row` (v,) tells the vertices' rows of `sides`, -1 for none; a corner goes no farther than `farthest` (c,), by those
    rows, from the crossings around it.
    """
    faces, owners, lines, corner_faces = _split(mesh.faces, vertices, crossings)
    corners = _corners(mesh.faces[corner_faces], crossings, crossings.of_faces[corner_faces], sides, row, farthest)
    round_ones = mesh.vertices[crossings.edges].mean(axis=1), mesh.vertices[mesh.faces[corner_faces]].mean(axis=1)
    patch = _Patch(faces, owners, lines, crossings, sides, row, first=len(vertices))
    moved = np.concatenate([vertices, crossings.places, corners])
    moved = patch.mended(patch.evened(moved))
    moved, put_back = patch.put_back(moved, np.concatenate([mesh.vertices, *round_ones]))
    beside = np.zeros(len(moved), bool)
    beside[patch.faces] = True
    return Creased(vertices=moved, faces=faces, lines=lines, beside=beside, corners=len(corners), put_back=put_back)


def _split(faces: Rows, vertices: Floats, crossings: Crossings) -> tuple[Rows, Rows, Rows, Rows]:
    """The faces (f, 3), a vertex (f,) on whose side each is, or -1; the lines (l, 2); which faces became corners.

    A face with one crossing edge ends a crease: it becomes two. With two it becomes three, with three six.
    """
    first, of_faces = len(vertices), crossings.of_faces
    count = (of_faces >= 0).sum(axis=1)
    places = np.concatenate([vertices, crossings.places])
    out, owners, lines = [faces[count == 0]], [np.full(int((count == 0).sum()), -1)], []
    for turn in range(3):
        ending = (count == 1) & (of_faces[:, turn] >= 0)
        a, b, c = np.roll(faces[ending], -turn, axis=1).T
        p = first + of_faces[ending, turn]
        out += [np.stack([a, p, c], axis=1), np.stack([p, b, c], axis=1)]
        owners += [a, b]
        # a and b are on one side, c on another.
        passing = (count == 2) & (of_faces[:, turn] < 0)
        a, b, c = np.roll(faces[passing], -turn, axis=1).T
        p, q = first + np.roll(of_faces[passing], -turn, axis=1)[:, 1:].T
        shorter = _length(places, a, p) < _length(places, b, q)
        out += [
            np.stack([c, q, p], axis=1),
            np.where(shorter, [a, b, p], [a, b, q]).T,
            np.where(shorter, [a, p, q], [b, p, q]).T,
        ]
        owners += [c, a, np.where(shorter, a, b)]
        lines.append(np.stack([p, q], axis=1))
    corner = np.flatnonzero(count == 3)
    middle = first + len(crossings.places) + np.arange(len(corner))
    for turn in range(3):
        a = faces[corner, turn]
        p, q = first + of_faces[corner, turn], first + of_faces[corner, turn - 1]
        out += [np.stack([a, p, middle], axis=1), np.stack([a, middle, q], axis=1)]
        owners += [a, a]
        lines.append(np.stack([p, middle], axis=1))
    return np.concatenate(out), np.concatenate(owners), np.concatenate(lines), corner


def _length(places: Floats, a: Rows, b: Rows) -> Floats:
    length: Floats = np.linalg.norm(places[b] - places[a], axis=1)
    return length


def _corners(faces: Rows, crossings: Crossings, of_faces: Rows, sides: Sides, row: Rows, farthest: Floats) -> Floats:
    """Where the three sides at the corners of `faces` (k, 3) meet: Newton's method, least moves."""
    start = crossings.places[of_faces].mean(axis=1)
    x: Floats = start.copy()
    for _ in range(5):
        met = [sides.at(row[faces[:, corner]], x) for corner in range(3)]
        distances, normals = np.stack([d for d, _ in met], axis=1), np.stack([n for _, n in met], axis=1)
        # Three sides may share a line, or nearly: then only what is across it is determined.
        x = x - (np.linalg.pinv(normals, rcond=0.1) @ distances[..., None])[..., 0]
    gone = np.linalg.norm(x - start, axis=1) > farthest[row[faces[:, 0]]]
    x[gone] = start[gone]
    return x


class _Patch:
    """The faces around creases, and how their vertices may move."""

    def __init__(
        self, faces: Rows, owners: Rows, lines: Rows, crossings: Crossings, sides: Sides, row: Rows, *, first: int
    ) -> None:
        self.sides, self.first, self.ends = sides, first, crossings.ends
        self.count = n = int(faces.max()) + 1
        near = np.zeros(n, bool)
        near[first:] = True
        for _ in range(RINGS):
            near[faces[near[faces].any(axis=1)]] = True
        around = near[faces].any(axis=1)
        whole = np.bincount(faces[around].ravel(), minlength=n)
        self.faces, owner = faces[around], owners[around]
        self.row = np.concatenate([row, np.full(n - first, -1)])
        own = np.where(owner >= 0, self.row[owner], self.row[self.faces].max(axis=1))
        self.faces, own = self.faces[own >= 0], own[own >= 0]
        self.up = sides.normals[own]
        self.edges = edges_of(self.faces, n)
        self.degree = np.bincount(self.edges.ravel(), minlength=n)
        # Those of whose faces none is missing, and that have as many edges as faces: not on a border.
        full = near & (np.bincount(self.faces.ravel(), minlength=n) == whole) & (self.degree == whole)
        self.inner = np.flatnonzero(full[:first] & (row >= 0))
        self.lines = lines
        # A crease vertex with other than two neighbours along creases is an end or a junction, and stays.
        along = np.bincount(lines.ravel(), minlength=n) == 2
        self.sliding = np.flatnonzero(along & full)
        self.sliding = self.sliding[(self.sliding >= first) & (self.sliding < first + len(crossings.places))]

    def upright(self, x: Floats, rows: Rows | slice = slice(None)) -> Floats:
        """The cosines (r,) between the faces `rows` and their sides."""
        return dot(unit_vectors(face_normals(x, self.faces[rows])), self.up[rows])

    def evened(self, x: Floats) -> Floats:
        """The vertices x (v, 3), each about in the middle of its neighbours, on its side or crease."""
        for turn in range(ALONG + ROUNDS):
            before, watched = x.copy(), turn >= ALONG + FREE_ROUNDS
            x[self.sliding] = self._onto_creases(x[self.sliding] * (1 - HALF) + HALF * self._along(x))
            if turn < ALONG:
                continue
            x[self.inner] = self._within_sides(before[self.inner], HALF * (self._around(before) - before[self.inner]))
            if watched and not self._reconcile(x, before):
                return before
        return x

    def _along(self, x: Floats) -> Floats:
        return _sums(x, self.lines, self.count)[self.sliding] / 2

    def _around(self, x: Floats) -> Floats:
        return _sums(x, self.edges, self.count)[self.inner] / self.degree[self.inner, None]

    def _onto_creases(self, x: Floats) -> Floats:
        """Places x, of the sliding vertices, moved to where their sides meet."""
        a, b = self.ends[self.sliding - self.first].T
        for _ in range(2):
            (to_a, normal_a), (to_b, normal_b) = self.sides.at(a, x), self.sides.at(b, x)
            cosine = dot(normal_a, normal_b)
            free = np.maximum(1 - cosine**2, 0.05)
            x = x - ((to_a - cosine * to_b) / free)[:, None] * normal_a
            x -= ((to_b - cosine * to_a) / free)[:, None] * normal_b
        return x

    def _within_sides(self, x: Floats, move: Floats, rows: Rows | None = None) -> Floats:
        """Places x after a `move` that keeps their distances from their sides."""
        rows = self.row[self.inner] if rows is None else rows
        before, normals = self.sides.at(rows, x)
        target = x + move - dot(move, normals)[:, None] * normals
        after, normals = self.sides.at(rows, target)
        return target - (after - before)[:, None] * normals

    def _reconcile(self, x: Floats, before: Floats) -> bool:
        """Takes back, in x, moves that tilt faces; whether that was possible without taking back all."""
        least = np.minimum(self.upright(before), UPRIGHT) - 1e-9
        for _ in range(6):
            tilted = self.upright(x) < least
            if not tilted.any():
                return True
            corners = self.faces[tilted]
            x[corners] = before[corners]
        return False

    def mended(self, x: Floats) -> Floats:
        """The vertices x (v, 3), those of tilted faces pushed to the right side of the edge across from them."""
        free = np.zeros(self.count, bool)
        free[self.inner] = True
        h = float(np.linalg.norm(x[self.edges[:, 1]] - x[self.edges[:, 0]], axis=1).mean())
        wrong = np.maximum(TILTED - self.upright(x), 0)
        for _ in range(MENDING):
            bad = np.flatnonzero(wrong)
            move, hits = np.zeros_like(x), np.zeros(self.count)
            for corner in range(3):
                a, b, c = (self.faces[bad, (corner + step) % 3] for step in range(3))
                inward = unit_vectors(np.cross(self.up[bad], x[c] - x[b]))
                push = (TALL * h - dot(x[a] - x[b], inward)).clip(0, STEP * h)[:, None] * inward
                np.add.at(move, a, push * free[a, None])
                np.add.at(hits, a, free[a])
            pushed = np.flatnonzero(hits)
            if not len(pushed):
                break
            marked = np.zeros(self.count, bool)
            marked[pushed] = True
            star = np.flatnonzero(marked[self.faces].any(axis=1))
            target = x.copy()
            target[pushed] = self._within_sides(x[pushed], move[pushed] / hits[pushed, None], self.row[pushed])
            for _ in range(6):
                change = np.maximum(TILTED - self.upright(target, star), 0) - wrong[star]
                cost = np.bincount(self.faces[star].ravel(), np.repeat(change, 3), minlength=self.count)
                worse = pushed[cost[pushed] > 0]
                target[worse] = x[worse]
            change = np.maximum(TILTED - self.upright(target, star), 0) - wrong[star]
            if change.sum() >= 0:
                break
            x, wrong[star] = target, wrong[star] + change
        return x

    def put_back(self, x: Floats, round_ones: Floats) -> tuple[Floats, int]:
        """The vertices x (v, 3), those of faces that are turned over where `round_ones` has them; and how many."""
        back = np.zeros(self.count, bool)
        for _ in range(BACKWARDS):
            over = (self.upright(x) < OVER) & ~back[self.faces].all(axis=1)
            if not over.any():
                break
            back[self.faces[over]] = True
            x = np.where(back[:, None], round_ones, x)
        return x, int(back.sum())


def _sums(x: Floats, edges: Rows, n: int) -> Floats:
    """For each of n vertices the sum (n, 3) of its neighbours by edges (e, 2)."""
    to, of = edges.ravel(), edges[:, ::-1].ravel()
    return np.stack([np.bincount(to, x[of, axis], minlength=n) for axis in range(3)], axis=1)
