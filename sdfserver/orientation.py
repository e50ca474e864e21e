"""Which side of the surface normals point to: whether they agree, and how to make them agree.

Arrays of points and unit normals in, both (n, 3); signs are +1 or -1, to be multiplied with the normals.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

_JUDGED_POINTS = 20_000
_JUDGED_NEIGHBOURS = 8
_FEWEST_FOR_PATCHES = 1000
"""Among fewer points too few pairs separate any two patches."""
_FEWEST_CONTRADICTIONS = 0.002
"""Fewer pairs at opposite sides than this do not make patches that contradict each other."""
_MOST_CONTRADICTIONS = 0.12
"""With more, noise has mixed the two sides of thin walls, and any tree would seem to resolve it."""
_MANY_TURNED = 0.01
"""Of the normals, by share: with so many contradicted by those around them, a few contradictions left are no chance."""
_LEVEL = 0.3
"""Two neighbours that both lie this much behind each other (cosines, summed) are on two sides of a wall."""
_RESOLVED = 0.08
"""The share of contradictions that may be left where a tree is believed."""


def disagreement(points: NDArray[np.float64], normals: NDArray[np.float64], device: str = "cpu") -> float:
    """About 0 where all normals point to one side of the surface, 0.5 where the side is chance.

    The larger of two shares. First, of neighbours on the same piece of surface, those whose normals point to opposite
    sides of it: 0.5 for random signs, 2 p (1 - p) where a share p is flipped at random. Second, of the normals,
    those to be flipped for all to agree, where whole patches contradict each other (as when every normal was given a
    positive largest component): a spanning tree of the most similar neighbours says which, and is believed only where
    it resolves nearly all contradictions and few are thin walls, because on noise and thin walls it errs.

    Large clouds are judged by 20,000 of their points, whose neighbours are looked for on `device`. Deterministic. 0
    where no neighbours can be compared.
    """
    if len(points) > _JUDGED_POINTS:
        chosen = np.random.default_rng(0).choice(len(points), _JUDGED_POINTS, replace=False)
        points, normals = points[chosen], normals[chosen]
    if len(points) < 2:
        return 0.0
    pairs = _neighbours(points, normals, _JUDGED_NEIGHBOURS, device)
    signs = np.ones(len(points))
    share, walls = _opposite_share(pairs, signs)
    signs = _without_lone_flips(pairs, signs)
    left = _opposite_share(pairs, signs)[0]
    if (
        walls > 3 * share
        or len(points) < _FEWEST_FOR_PATCHES
        or not _FEWEST_CONTRADICTIONS < left < _MOST_CONTRADICTIONS
    ):
        return share
    tree_signs, flipped = _tree_signs(pairs, signs)
    resolved = _opposite_share(pairs, tree_signs)[0] < _RESOLVED * left
    return max(share, flipped) if resolved else share


@dataclass(frozen=True, eq=False, kw_only=True)
class Agreement:
    """What makes normals agree with those around them, as far as anything does.

    signs: (n,) +1 or -1, to multiply them with. flipped: the share of -1.
    seam: pairs of neighbours that contradict each other whatever the signs, over the root of the number of points: the
    length of a seam in spacings, about, over how many spacings the surface is wide; 0 on every surface with two sides.
    """

    signs: NDArray[np.float64]
    flipped: float
    seam: float


def agreement_of(points: NDArray[np.float64], normals: NDArray[np.float64], device: str = "cpu") -> Agreement:
    """The signs that make normals agree: of single ones that most around them contradict, then of whole patches.

    Patches are told as `disagreement` does, and turned where they are the smaller side of a piece of surface. All of
    the points are looked at, their neighbours on `device`. Deterministic.
    """
    signs = np.ones(len(points))
    if len(points) < 2:
        return Agreement(signs=signs, flipped=0.0, seam=0.0)
    pairs = _neighbours(points, normals, _JUDGED_NEIGHBOURS, device)
    share, walls = _opposite_share(pairs, signs)
    if walls > 3 * share:
        return Agreement(signs=signs, flipped=0.0, seam=0.0)
    # Each of two points on either side of a thin wall lies behind the other; of two on one surface, one of which is
    # turned, one lies as far behind as the other in front.
    level = np.abs(pairs.behind_first + pairs.behind_second) < _LEVEL
    pairs = pairs.among(_comparable(pairs) & ((pairs.agreement > 0) | level))
    signs = _without_lone_flips(pairs, signs)
    left, seam = _opposite_share(pairs, signs)[0], 0.0
    if left > 0 and len(points) >= _FEWEST_FOR_PATCHES:
        tree_signs, _ = _tree_signs(pairs, signs, smaller_side=True)
        seam = _contradictions(pairs, tree_signs) / math.sqrt(len(points))
        resolved = _opposite_share(pairs, tree_signs)[0] < _RESOLVED * left
        # Among many turned ones some lie side by side, and hold each other up.
        some = left > _FEWEST_CONTRADICTIONS or (signs < 0).mean() > _MANY_TURNED
        if resolved and some and left < _MOST_CONTRADICTIONS:
            signs = tree_signs
    return Agreement(signs=signs, flipped=float((signs < 0).mean()), seam=seam)


def consistent_signs(points: NDArray[np.float64], normals: NDArray[np.float64], neighbours: int) -> NDArray[np.float64]:
    """Signs (n,) that make normals agree along a spanning tree of the most similar neighbours (Hoppe et al. 1992).

    Where the neighbours do not connect all points, the signs of two pieces have nothing to do with each other.
    """
    return _tree_signs(_neighbours(points, normals, neighbours), np.ones(len(points)))[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Pairs:
    """Neighbours: `first` and `second` are rows of the cloud, the rest one value for each pair.

    agreement: 1 where the normals agree on which side is outside, -1 where they contradict, near 0 where it cannot be
    told: the cosine after the first normal is reflected along the step between the points, as it turns along a circle
    through both; right on flat ground, over a crease and around a rim.
    behind_first, behind_second: cosine of the step to the other point with the point's own normal.
    """

    count: int
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    agreement: NDArray[np.float64]
    behind_first: NDArray[np.float64]
    behind_second: NDArray[np.float64]

    def among(self, chosen: NDArray[np.bool_]) -> "_Pairs":
        """These pairs alone."""
        return _Pairs(
            count=self.count,
            first=self.first[chosen],
            second=self.second[chosen],
            agreement=self.agreement[chosen],
            behind_first=self.behind_first[chosen],
            behind_second=self.behind_second[chosen],
        )


def _neighbours(
    points: NDArray[np.float64], normals: NDArray[np.float64], neighbours: int, device: str = "cpu"
) -> _Pairs:
    from sdfserver.neighbours import neighbours_of  # here: it needs torch, and whoever just reads a cloud does not

    points = points - (points.min(axis=0) + points.max(axis=0)) / 2
    _, near = neighbours_of(points, device).query(points, min(neighbours + 1, len(points)))
    first = np.repeat(np.arange(len(points)), near.shape[1] - 1)
    second = near[:, 1:].reshape(-1)
    step = points[second] - points[first]
    length = np.linalg.norm(step, axis=1)
    apart = length > 0
    first, second = first[apart], second[apart]
    step = step[apart] / length[apart, None]
    ahead = np.einsum("ij,ij->i", step, normals[first])
    beyond = np.einsum("ij,ij->i", step, normals[second])
    agreement = np.einsum("ij,ij->i", normals[first], normals[second]) - 2 * ahead * beyond
    return _Pairs(
        count=len(points), first=first, second=second, agreement=agreement, behind_first=ahead, behind_second=-beyond
    )


def _opposite_share(pairs: _Pairs, signs: NDArray[np.float64]) -> tuple[float, float]:
    """The share of comparable pairs that contradict each other, when the normals are multiplied by `signs`.

    Two sides of a wall thinner than the spacing contradict each other too, but each lies behind the other (in a slot:
    in front), while on one surface with wrong signs as many are in front as behind: only that balanced part counts.
    The share of the rest, the walls, comes second.
    """
    comparable = _comparable(pairs)
    opposite = comparable & (pairs.agreement * signs[pairs.first] * signs[pairs.second] < 0)
    offset = (pairs.behind_first * signs[pairs.first] + pairs.behind_second * signs[pairs.second])[opposite]
    front, behind = int((offset > 0).sum()), int((offset < 0).sum())
    level = len(offset) - front - behind
    total = max(int(comparable.sum()), 1)
    return (2 * min(front, behind) + level) / total, abs(front - behind) / total


def _comparable(pairs: _Pairs) -> NDArray[np.bool_]:
    """Which pairs lie on one piece of surface, as far as two points can tell."""
    level = np.maximum(np.abs(pairs.behind_first), np.abs(pairs.behind_second)) < 0.5
    return level & (np.abs(pairs.agreement) > 0.5)


def _contradictions(pairs: _Pairs, signs: NDArray[np.float64]) -> int:
    """How many pairs on ground that is flat beyond doubt contradict each other."""
    flat = np.maximum(np.abs(pairs.behind_first), np.abs(pairs.behind_second)) < 0.3
    flat &= np.abs(pairs.agreement) > 0.8
    return int((flat & (pairs.agreement * signs[pairs.first] * signs[pairs.second] < 0)).sum())


def _without_lone_flips(pairs: _Pairs, signs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The signs after points that contradict most of their neighbours gave in, three times over."""
    for _ in range(3):
        votes = np.bincount(pairs.first, pairs.agreement * signs[pairs.second], minlength=pairs.count)
        signs = np.where(votes * signs < -1, -signs, signs)
    return signs


def _tree_signs(
    pairs: _Pairs, signs: NDArray[np.float64], *, smaller_side: bool = False
) -> tuple[NDArray[np.float64], float]:
    """Signs that agree along the minimum spanning tree, and the share of `signs` that differ (the smaller side).

    Of the two choices for a piece that which turns fewer, with `smaller_side`, else that which leaves its first point.
    """
    n = pairs.count
    low, high = np.minimum(pairs.first, pairs.second), np.maximum(pairs.first, pairs.second)
    once = np.unique(low * n + high, return_index=True)[1]
    low, high, agreement = low[once], high[once], pairs.agreement[once]
    bend = (np.abs(pairs.behind_first) + np.abs(pairs.behind_second))[once]
    weight = 1.001 - np.minimum(np.abs(agreement), 1) + bend / 4
    which = coo_array((np.arange(1, len(once) + 1), (low, high)), shape=(n, n)).tocsr()
    tree = minimum_spanning_tree(coo_array((weight, (low, high)), shape=(n, n)).tocsr()).tocoo()
    edge = np.asarray(which[tree.row, tree.col]).reshape(-1) - 1
    agree = agreement[edge] * signs[tree.row] * signs[tree.col] >= 0
    # Each point twice, as it is and flipped: what hangs together in this double is one consistent choice.
    rows = np.concatenate([tree.row, tree.row + n])
    columns = np.concatenate([np.where(agree, tree.col, tree.col + n), np.where(agree, tree.col + n, tree.col)])
    choice = connected_components(coo_array((np.ones(len(rows)), (rows, columns)), shape=(2 * n, 2 * n)), False)[1]
    piece = connected_components(tree, directed=False)[1]
    root = np.unique(piece, return_index=True)[1]
    flip = choice[:n] != choice[root[piece]]
    sizes, flips = np.bincount(piece), np.bincount(piece, weights=flip)
    if smaller_side:
        flip ^= (2 * flips > sizes)[piece]
    return np.where(flip, -signs, signs), float(np.minimum(flips, sizes - flips).sum() / n)
