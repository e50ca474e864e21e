"""The second stage of the fit: local networks where the coarse one has left an error.

Everything in the unit frame; sdf < 0 inside; normals point outward. Cells, u and H are those of `local`.

Cells follow the spacing of the points around them. Each gets the points in it, its neighbours' overlap included, but
for some that are held out, and samples of the space with the coarse field as their target. It is fitted to them with
the terms of `losses`, many cells at once, none knowing of the others. What is held out then decides, cell by cell,
whether the local network or the coarse one stands: where the points are noise, or few, a network fitted to them alone
is farther from the held-out ones.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdfserver.config import LocalConfig, LossWeights
from sdfserver.device import Captured, in_halves, sums
from sdfserver.errors import FieldFormatError, Stopped
from sdfserver.files import reason
from sdfserver.local import CellGrid, LocalLevel, LocalSirens, PartitionOfUnity, in_blocks
from sdfserver.losses import (
    NO_WIDTH,
    distance_slope,
    gradient_slope,
    surface_slope,
)
from sdfserver.sampling import Samples
from sdfserver.siren import Siren, back, there
from sdfserver.stack import Adam, stacked_locally, unstacked_locally

GROUP = 192
"""Networks that are fitted together on a CPU, where their activations then stay in cache."""
GROUP_ON_DEVICE = 4096
"""And elsewhere, if there is room: enough to fill any device."""
CHUNK = 32_768
"""Points at which the coarse network is asked at a time."""
CHECK_EVERY = 25
MAX_HELD = 48
"""Held-out points of a cell."""
PRIOR = 8
"""A cell is judged by its held-out points and by this many that are like the average of all cells."""
MAX_WRONG_SIGNS = 0.005
"""Share of a cell's held-out samples of the space, clearly off the surface, that may have the other sign than the
coarse field: none of a hundred. A sheet of its own takes one in a hundred at least."""
CLEARLY_OFF = 0.25
"""Distance from zero, in H, from which on the sign of the coarse field is not doubted."""
LATE, SETTLED = 0.3, 0.01
"""Below this share of the highest learning rate a fit stops when its held-out cost falls by less than that share from
one check to the next; at higher rates it goes up and down by chance."""
MEAN_OF_NORMAL = math.sqrt(2 / math.pi)
"""Mean |x| of a normal distribution with a standard deviation of 1."""


@dataclass(frozen=True, kw_only=True)
class RefineReport:
    """How the second stage went."""

    tried: int
    """Cells that got a network."""
    kept: int
    """Of these, the cells where it is better than the coarse one on the held-out points."""
    cell_steps: int
    """Steps of all cells' fits together."""
    sides: tuple[int, ...]
    """Cells along each side of the cube, of the levels that were kept."""
    seconds: float
    before: float
    """Mean distance of the cells' held-out points from the coarse field's zero, to first order."""
    after: float
    """The same with the local networks, before it is decided which are kept."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Members:
    """Points (n, 3) and normals (n, 3), and who of them is in which of the cells (k, 3), overlap included.

    Those in cell i are rows[start[i] : start[i] + count[i]], in no order; the first held[i] of them are held out.
    """

    grid: CellGrid
    cells: Tensor
    points: Tensor
    normals: Tensor
    rows: Tensor
    start: Tensor
    count: Tensor
    held: Tensor

    def __getitem__(self, some: Tensor | slice) -> "_Members":
        picked = {name: getattr(self, name)[some] for name in ("cells", "start", "count", "held")}
        return replace(self, **picked)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """For every held-out point the cell's row, and the point's."""
        owner, place = _ranges(self.start, self.held)
        return owner, self.rows[place]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Verdict:
    """How k cells stand on their held-out points, `held` (k,) each.

    before, after: (k, 2), the coarse and the local networks' mean distance and mean 1 - cos to the normals there.
    sound: (k,) bool, the local network is finite and has no sheets of its own. steps: (k,) that its fit took.
    """

    held: Tensor
    before: Tensor
    after: Tensor
    sound: Tensor
    steps: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class FittedCells(_Verdict):
    """Local networks of one level as their fit left them, with what is needed to judge them.

    planned: cells that had enough points, tried or not. cells: (k, 3) int64, those tried. networks: their parameters,
    named as in LocalSirens.
    """

    side: int
    planned: int
    cells: Tensor
    networks: dict[str, Tensor]


_JUDGED = ("held", "before", "after", "sound", "steps")
_SAVED = ("cells", *_JUDGED)


class Refinement:
    """The second stage for a cloud that comes in one piece or in several.

    The same seed on the same device gives the same networks, in whatever order the pieces come.
    """

    def __init__(self, coarse: Siren, noise: float, config: LocalConfig, *, seed: int = 0) -> None:
        self._coarse, self._noise, self._config, self._seed = coarse, noise, config, seed
        self._seconds = 0.0

    def fit(
        self,
        points: Tensor,
        normals: Tensor,
        leaves: list[tuple[CellGrid, Tensor]],
        *,
        piece: int | None = None,
        on_progress: Callable[[float], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[FittedCells]:
        """Networks for `leaves`, grids and their cells, from all points (n, 3) and normals (n, 3) in these cells.

        `piece` numbers this piece of the cloud; None is the whole, of which nothing is fitted when too few of its cells
        are worth a try for any to be kept.

        `on_progress` gets a rising share from 0 to 1; `should_stop` is asked before every step. Raises Stopped when it
        says so.
        """
        begin = time.perf_counter()
        on_progress, should_stop = on_progress or (lambda _: None), should_stop or (lambda: False)
        generator = torch.Generator().manual_seed(self._seed + 1 + 65_537 * (piece or 0))
        shuffled = torch.randperm(len(points), generator=generator).to(points.device)
        points, normals = points[shuffled], normals[shuffled]
        floor = self._config.worth * MEAN_OF_NORMAL * self._noise
        plan = []
        for grid, cells in leaves:
            members = _members(points, normals, grid, cells, self._config)
            plan.append((len(members.cells), *_worth_it(self._coarse, members, floor)))
        total, done, found = sum(len(members.cells) for _, members, _ in plan), 0, []
        if piece is None and total < self._config.least_kept * sum(planned for planned, _, _ in plan):
            plan = [(planned, members[:0], before[:0]) for planned, members, before in plan]
        for planned, members, before in plan:
            nobody = members.held[:0]  # all that is known of a level where nothing is tried
            verdicts = [
                _Verdict(held=nobody.float(), before=before[:0], after=before[:0], sound=nobody > 0, steps=nobody)
            ]
            parts: list[dict[str, Tensor]] = []
            for group in _groups(members):
                fit = partial(self._fit_group, members, before, generator, generator.get_state(), should_stop)
                for sirens, verdict in in_halves(fit, group.tolist()):
                    parts.append(sirens.state_dict())
                    verdicts.append(verdict)
                done += len(group)
                on_progress(done / total)
            names = parts[0] if parts else ()
            found.append(
                FittedCells(
                    side=members.grid.side,
                    planned=planned,
                    cells=members.cells,
                    networks={name: torch.cat([part[name] for part in parts]) for name in names},
                    **vars(_joined(verdicts)),
                )
            )
        self._seconds += time.perf_counter() - begin
        return found

    def _fit_group(
        self,
        members: _Members,
        before: Tensor,
        generator: torch.Generator,
        state: Tensor,
        should_stop: Callable[[], bool],
        rows: list[int],
    ) -> tuple[LocalSirens, _Verdict]:
        generator.set_state(state)  # whether it is tried for the first time, or again in halves
        some = torch.tensor(rows, device=before.device)
        return _fit_cells(self._coarse, members[some], before[some], self._noise, self._config, generator, should_stop)

    def join(self, found: Iterable[FittedCells]) -> tuple[PartitionOfUnity | Siren, RefineReport]:
        """The coarse network with those local ones over it that are closer to held-out points, and how that went."""
        found = list(found)
        planned = sum(part.planned for part in found)
        tried = [part for part in found if len(part.cells)]
        if not tried:
            return self._coarse, RefineReport(
                tried=0, kept=0, cell_steps=0, sides=(), seconds=self._seconds, before=math.nan, after=math.nan
            )
        overall = _joined(tried)
        average = _gains(overall).T @ overall.held / overall.held.sum()
        levels = []
        for side in sorted({part.side for part in tried}):
            parts = [part for part in tried if part.side == side]
            verdict = _joined(parts)
            held = verdict.held[:, None]
            believed = (_gains(verdict) * held + average * PRIOR) / (held + PRIOR)
            good = ((believed > 0).all(dim=1) & verdict.sound).nonzero()[:, 0]
            cells = torch.cat([part.cells for part in parts])[good]
            order = CellGrid(side, self._config.network.margin).numbers(cells).argsort()
            sirens = LocalSirens(len(good), replace(self._config.network, side=side))
            sirens.load_state_dict(
                {name: torch.cat([part.networks[name] for part in parts])[good][order] for name in parts[0].networks}
            )
            if len(good):
                levels.append(LocalLevel(cells[order], sirens.to(cells.device)).requires_grad_(False))
        if sum(len(level.cells) for level in levels) < self._config.least_kept * planned:
            levels = []
        report = RefineReport(
            tried=sum(len(part.cells) for part in tried),
            kept=sum(len(level.cells) for level in levels),
            cell_steps=int(overall.steps.sum()),
            sides=tuple(level.grid.side for level in levels),
            seconds=self._seconds,
            before=float(overall.before[:, 0] @ overall.held / overall.held.sum()),
            after=float(overall.after[:, 0] @ overall.held / overall.held.sum()),
        )
        return (PartitionOfUnity(self._coarse, levels) if levels else self._coarse), report


def refine(
    coarse: Siren,
    samples: Samples,
    config: LocalConfig,
    *,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[PartitionOfUnity | Siren, RefineReport]:
    """`coarse` with local networks over it where they are closer to held-out points, and how that went.

    As Refinement, for a cloud in one piece.
    """
    refinement = Refinement(coarse, samples.noise.least, config, seed=seed)
    leaves = plan_cells(samples.points, samples.spacings, config, of=len(samples.whole_points))
    return refinement.join(
        refinement.fit(
            samples.whole_points, samples.whole_normals, leaves, on_progress=on_progress, should_stop=should_stop
        )
    )


def plan_cells(
    points: Tensor, spacings: Tensor, config: LocalConfig, *, of: int | None = None
) -> list[tuple[CellGrid, Tensor]]:
    """The leaves of an octree over `points` (n, 3), by level: grids, and which of their cells (k, 3).

    The points may be some that are drawn from a cloud `of` more; the spacings are those of the whole cloud.

    A leaf is as wide as holds about `points_per_cell` points of a surface through its middle, by the `spacings` (n,)
    of neighbouring points: a cloud of even density gets a single level, whatever the count in a cell's corner.
    """
    per_cell = max(config.points_per_cell, 1.5 * (of or len(points)) / config.most_cells)
    wanted = torch.log2(2 / (spacings.clamp_min(1e-9) * math.sqrt(per_cell)))
    typical = max(1.0, float(wanted.median()))
    depth = max(0, round(typical - 2.5))  # of the typical leaf, under a first grid of 4 to 8 cells a side
    side = round(2 ** (typical - depth))
    surplus = wanted - math.log2(side)  # levels that a point wants below the one at hand
    leaves = []
    while len(points):
        grid = CellGrid(side, config.network.margin)
        home = ((points + 1) / grid.width).floor().long().clamp(0, side - 1)
        numbers, owner, counts = torch.unique(grid.numbers(home), return_inverse=True, return_counts=True)
        mean = sums(surplus[:, None], owner, len(numbers))[:, 0] / counts
        split = (mean > 0.5) & (side * 2 <= config.finest_side)
        if not split.all():
            leaves.append((grid, grid.cells(numbers[~split])))
        below = split[owner]
        points, surplus = points[below], surplus[below] - 1
        side *= 2
    return leaves


def _members(points: Tensor, normals: Tensor, grid: CellGrid, cells: Tensor, config: LocalConfig) -> _Members:
    """Who of the points is in which of the cells; cells with too few are left out."""
    row_of = torch.full((grid.side**3,), -1, dtype=torch.int32, device=points.device)
    row_of[grid.numbers(cells)] = torch.arange(len(cells), dtype=torch.int32, device=points.device)
    rows, numbers = grid.overlaps(points)
    owner = row_of[numbers]
    rows, owner = rows[owner >= 0], owner[owner >= 0]
    rows = rows[owner.sort(stable=True).indices]
    count = torch.bincount(owner, minlength=len(cells))
    members = _Members(
        grid=grid,
        cells=cells,
        points=points,
        normals=normals,
        rows=rows,
        start=count.cumsum(0) - count,
        count=count,
        held=(count * config.held_share).long().clamp(1, MAX_HELD),
    )
    return members[(count >= config.fewest_points).nonzero()[:, 0]]


def _worth_it(coarse: Siren, members: _Members, floor: float) -> tuple[_Members, Tensor]:
    """The cells whose held-out points are farther than `floor` from the coarse field's zero, and how it stands there.

    That is (k, 2), as _Verdict's `before`.
    """
    owner, rows = members.held_out()
    phi, gradient = _in_chunks(coarse.value_and_gradient, members.points[rows])
    left = _means(_misfit(phi, gradient, members.normals[rows]), owner)
    held = members.held
    average = (left[:, 0] * held).sum() / held.sum().clamp_min(1)
    some = ((left[:, 0] * held + average * PRIOR) / (held + PRIOR) > floor).nonzero()[:, 0]
    return members[some], left[some]


def _groups(members: _Members) -> Iterator[Tensor]:
    rows = torch.arange(len(members.cells), device=members.cells.device)
    if not len(rows):
        return
    yield from torch.split(rows, GROUP if rows.device.type == "cpu" else GROUP_ON_DEVICE)


def _fit_cells(
    coarse: Siren,
    members: _Members,
    before: Tensor,
    noise: float,
    config: LocalConfig,
    generator: torch.Generator,
    should_stop: Callable[[], bool],
) -> tuple[LocalSirens, _Verdict]:
    """The networks of the cells, fitted, and how they stand beside the coarse one, which stands as `before` (k, 2)."""
    grid, device, k = members.grid, members.points.device, len(members.cells)
    centres = grid.centres(members.cells)
    sirens = LocalSirens(k, replace(config.network, side=grid.side), generator=generator).to(device)
    space = torch.rand((k, config.pool, 3), generator=generator).to(device) * 2 - 1
    (target,) = _in_chunks(lambda x: (coarse(x),), (space * grid.half + centres[:, None]).reshape(-1, 3))
    target = target.view(k, -1) / grid.half
    owner, rows = members.held_out()
    held_u, held_normals = (members.points[rows] - centres[owner]) / grid.half, members.normals[rows]
    # The coarse field's own error is no target.
    doubt = (3 * before[:, :1] / grid.half).clamp_min(config.trusted_distance)
    known = target.abs() > doubt
    _start_as_planes(sirens, space, target)
    member, place = _ranges(members.start + members.held, members.count - members.held)
    rows = members.rows[place]
    fitted_to = config.pool - config.pool // 4
    fits = _CellFits(
        sirens,
        points=torch.cat([(members.points[rows] - centres[member]) / grid.half, members.normals[rows]], dim=1),
        count=members.count - members.held,
        space=torch.cat([space, target[..., None], known[..., None]], dim=2)[:, :fitted_to],
        weights=config.weights_for(noise / grid.half),
        config=config,
    )

    def misfit() -> Tensor:
        with torch.no_grad():
            f, g = in_blocks(sirens.value_and_gradient, held_u, owner)
        return _means(_misfit(f * grid.half, g, held_normals), owner)

    last_cost = math.inf
    for step in range(config.steps):
        if should_stop():
            raise Stopped("the local fits were stopped")
        fits.take()
        if (step + 1) % CHECK_EVERY == 0 and config.rate(step) < LATE * config.learning_rate:
            fits.leave()
            cost = float(_relative(misfit(), before).nanmean())  # here the host waits for the device
            if cost > (1 - SETTLED) * last_cost:
                break
            last_cost = cost
    fits.leave()
    fits.close()
    after = misfit()
    with torch.no_grad():
        held_target = target[:, fitted_to:]
        clearly = held_target.abs() > (2 * doubt).clamp_min(CLEARLY_OFF)
        wrong = ((sirens(space[:, fitted_to:]) * held_target < 0) & clearly).float().mean(dim=1)
    sound = torch.isfinite(after).all(dim=1) & (wrong <= MAX_WRONG_SIGNS)
    return sirens.requires_grad_(False), _Verdict(
        held=members.held.float(),
        before=before,
        after=after,
        sound=sound,
        steps=torch.full_like(members.held, step + 1),
    )


class _CellFits:
    """The fits of k local networks, none of which knows of the others, as one batch of products.

    points: (p, 6) in each cell's coordinates, with normals, one cell's after the other's, so many in each as `count`
    (k,) says. space: (k, s, 5) samples of the space, with the target's value there and whether it is known.

    On a CUDA device a step is recorded once: what it sees follows from a counter there.
    """

    def __init__(
        self,
        sirens: LocalSirens,
        *,
        points: Tensor,
        count: Tensor,
        space: Tensor,
        weights: LossWeights,
        config: LocalConfig,
    ) -> None:
        self._sirens, self._config, self._weights = sirens, config, weights
        self._stack, device = stacked_locally(sirens), points.device
        self._points, self._count, self._first = points, count[:, None], (count.cumsum(0) - count)[:, None]
        self._space = space.view(len(sirens), -1, config.batch_space, space.shape[2])
        self._batch = torch.arange(config.batch_surface, device=device)
        self._rates = torch.tensor([config.rate(step) for step in range(config.steps)], device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._rate = self._rates[0].clone()
        self._optimizer = Adam(self._stack, self._rate, config.beta2)
        self._width = self._rate.new_tensor(NO_WIDTH)
        self._captured: Captured[None] | None = Captured(self._take, device)

    def take(self) -> None:
        """One step."""
        if self._captured is not None:
            self._captured()

    @torch.no_grad()
    def _take(self) -> None:
        stack, n, step = self._stack, self._config.batch_surface, self._step
        on = self._points[self._first + (step * n + self._batch) % self._count]
        off = self._space.index_select(1, step % self._space.shape[1])[:, 0]
        *layers, linear = stack.layers(torch.float32)
        phi, gradient, tape = there(torch.cat([on[..., :3], off[..., :3]], dim=1), linear, layers, keep=True)
        d_phi, d_gradient = self._slopes(phi, gradient, on[..., 3:], off[..., 3], off[..., 4])
        back(tape, d_phi, d_gradient, linear=True, out=stack.derivatives(torch.float32))
        stack.collect(torch.float32)
        self._rate.copy_(self._rates.index_select(0, step)[0])
        self._optimizer.step()
        step += 1

    def _slopes(
        self, phi: Tensor, gradient: Tensor, normals: Tensor, target: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """With respect to phi and gradient, of the weighted terms; their means are over each cell's own samples."""
        n, m, weights = normals.shape[1], target.shape[1], self._weights
        d_on = surface_slope(phi[:, :n], self._width) * (weights.surface / 2 / n)
        d_off = distance_slope(phi[:, n:], target, known, self._config.slack) * (weights.distance / m)
        d_gradient = gradient_slope(gradient, normals, eikonal=weights.eikonal / (n + m), normal=weights.normal / 2 / n)
        return torch.cat([d_on, d_off], dim=1), d_gradient

    def leave(self) -> None:
        """Leave the parameters, as they are, in the networks."""
        unstacked_locally(self._stack, self._sirens)

    def close(self) -> None:
        """Let go of what was recorded, and of its memory: the last of what is done."""
        self._captured = None


def _start_as_planes(sirens: LocalSirens, space: Tensor, target: Tensor) -> None:
    """Sets the linear parts to the least-squares planes of the coarse field's values `target` at `space`."""
    affine = torch.cat([torch.ones_like(space[..., :1]), space], dim=2)
    plane = torch.linalg.solve(affine.mT @ affine, affine.mT @ target[..., None])
    with torch.no_grad():
        sirens.biases[-1].copy_(plane[:, :1])
        sirens.linear.copy_(plane[:, 1:])


def _misfit(phi: Tensor, gradient: Tensor, normals: Tensor) -> Tensor:
    """The distance to phi = 0, to first order, and 1 - cos to the normals (p, 2); being steep earns no credit."""
    length = gradient.norm(dim=-1).clamp_min(1e-6)
    misaligned = 1 - (gradient * normals).sum(dim=-1) / length
    return torch.stack([phi.abs() / length.clamp(0.5, 1.0), misaligned], dim=1)


def _relative(misfit: Tensor, before: Tensor) -> Tensor:
    """Distance and misalignment (k, 2), each as a share of its mean before, added up (k,)."""
    return (misfit / before.mean(dim=0).clamp_min(1e-12)).sum(dim=1)


def _gains(verdict: _Verdict) -> Tensor:
    """What share of the distance, and of distance and misalignment together, the local networks save (k, 2)."""
    costs = [(x[:, 0], _relative(x, verdict.before)) for x in (verdict.before, verdict.after)]
    gains = [1 - after / before.clamp_min(1e-12) for before, after in zip(*costs, strict=True)]
    return torch.stack(gains, dim=1).nan_to_num(-1.0).clamp_min(-1.0)


def saved_cells(found: list[FittedCells]) -> bytes:
    """The cells as safetensors."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    about = []
    for i, part in enumerate(found):
        about.append({"side": part.side, "planned": part.planned})
        parts = {name: getattr(part, name) for name in _SAVED} | part.networks
        tensors |= {f"{i}.{name}": value.contiguous().cpu() for name, value in parts.items()}
    return save(tensors, metadata={"cells": json.dumps(about)})


def loaded_cells(path: Path, device: torch.device) -> list[FittedCells]:
    """What `saved_cells` gave, from a file. Raises FieldFormatError where it is not that."""
    from safetensors import SafetensorError, safe_open

    found = []
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            for i, about in enumerate(json.loads(file.metadata()["cells"])):
                names = [name for name in file.keys() if name.startswith(f"{i}.")]  # noqa: SIM118 - not a mapping
                tensors = {name.removeprefix(f"{i}."): file.get_tensor(name) for name in names}
                saved = {name: tensors.pop(name) for name in _SAVED}
                found.append(FittedCells(**about, **saved, networks=tensors))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FieldFormatError(f"{path} holds no cells of a tile: {reason(error)}") from error
    return found


def _joined(verdicts: Sequence[_Verdict]) -> _Verdict:
    return _Verdict(**{name: torch.cat([getattr(v, name) for v in verdicts]) for name in _JUDGED})


def _means(values: Tensor, owner: Tensor) -> Tensor:
    """Means of values (p, c) over what has the same owner (p,), ascending, none missing."""
    count = torch.bincount(owner)
    return sums(values, owner, len(count), ascending=True) / count[:, None]


def _ranges(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The members of the ranges [start, start + count) (k,): for each its range and itself."""
    owner = torch.arange(len(start), device=start.device).repeat_interleave(count)
    shift = start - (count.cumsum(0) - count)
    return owner, torch.arange(len(owner), device=start.device) + shift.repeat_interleave(count)


@torch.no_grad()
def _in_chunks(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    parts = [function(part) for part in torch.split(x, CHUNK)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
