"""The steps of the coarse fit, of one cloud or of k clouds alike: their networks are one batch of products.

Everything in the unit frame; sdf < 0 inside; normals point outward. n samples of a step are on the cloud, m in the
space around it; N = n + m. Batches of one network have no axis for it: (N, 3), not (1, N, 3).

On a CUDA device a step is recorded once and repeated from then on (`device`). So everything that changes from step to
step lies in arrays made for some dozen steps at a time, from which a counter on the device picks: batches and rates.
Each cloud has random numbers of its own, drawn on the host: its batches are the same in whatever company and on
whatever device it is fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdfserver.config import FitConfig, LossWeights
from sdfserver.device import Captured
from sdfserver.guard import Health, HeldOut, healths
from sdfserver.losses import (
    NO_WIDTH,
    distance_loss,
    distance_slope,
    eikonal_loss,
    gradient_slope,
    normal_loss,
    signed_off_surface_loss,
    signed_off_surface_slope,
    surface_loss,
    surface_slope,
)
from sdfserver.sampling import Samples, SpacePool
from sdfserver.siren import Siren, back, there, there_by_value
from sdfserver.stack import Adam, stacked, unstacked


@dataclass(frozen=True, eq=False)
class Task:
    """A network, what it is fitted to, and where its batches' random numbers come from, a generator on the host."""

    model: Siren
    samples: Samples
    generator: torch.Generator

    def saved(self) -> tuple[dict[str, Tensor], Tensor]:
        """The network and the generator as they are, for `restore`."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}, self.generator.get_state()

    def restore(self, saved: tuple[dict[str, Tensor], Tensor]) -> None:
        """Back to what was `saved`."""
        self.model.load_state_dict(saved[0])
        self.generator.set_state(saved[1])

    def weights(self, config: FitConfig) -> LossWeights:
        """Of the terms, for this cloud's noise."""
        return config.weights_for(self.samples.noise.by_quadrics)

    def width(self, config: FitConfig) -> float:
        """Within which the surface term is quadratic."""
        return config.quadratic_noises * self.samples.noise.least


class Batch(NamedTuple):
    """What a step sees. x: (N, 3), first the cloud's. normals: (n, 3). space: (m, 5), columns as SPACE_COLUMNS."""

    x: Tensor
    normals: Tensor
    space: Tensor


SPACE_COLUMNS = ("signed_distance", "first_guess", "trusted_sign", "share", "far")
"""Of a sample in space: the sign is 0 where it is not trusted, share the weight of the off-surface term, far 1 or 0."""


class Given(NamedTuple):
    """What the field gave on a batch: phi (N,), gradient (N, 3), or None in the warm start."""

    batch: Batch
    phi: Tensor
    gradient: Tensor | None


class Descent:
    """Fits that go down together: the networks of `tasks`, all of one shape, under one config.

    It begins at `step`, at `rate` times the config's learning rate.
    """

    def __init__(
        self, tasks: Sequence[Task], config: FitConfig, *, low_precision_steps: int = 0, most_at_once: int = 1
    ) -> None:
        """No more than `most_at_once` steps will be drawn at a time."""
        self.tasks, self.config, self.step, self.rate = tasks, config, 0, 1.0
        self._low_precision_steps, self._many = low_precision_steps, len(tasks) > 1
        self._device = device = tasks[0].samples.points.device
        self._stack = stacked([task.model for task in tasks])
        self._rate = torch.tensor(config.learning_rate, device=device)
        self._optimizer = Adam(self._stack, self._rate, config.beta2)
        self._batches = Batches([task.samples for task in tasks], config, most_at_once)
        self._held = HeldOut([task.samples for task in tasks])
        self._rates = torch.zeros(most_at_once, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._slope = _Slopes(tasks, config)
        self._takes = {
            (warm, low): Captured(partial(self._take, warm, low), device)
            for warm in (True, False)
            for low in (True, False)
        }
        self._look = Captured(self._look_at_held, device)
        self._given: Given | None = None
        self._saved = tuple(torch.empty_like(self._stack.values) for _ in range(3))
        self._saved_steps = [0] * len(tasks)
        self.save()

    def draw(self, count: int) -> None:
        """Draw the batches of the next `count` steps, and set their rates."""
        self._batches.draw(count, [task.generator for task in self.tasks])
        rates = [self.rate * self.config.rate(self.step + i) for i in range(count)]
        self._rates[:count] = torch.tensor(rates).to(self._device, non_blocking=True)
        self._row.zero_()

    def take(self) -> None:
        """One step, of those that were drawn."""
        warm, low = self.step < self.config.warm_start_steps, self.step < self._low_precision_steps
        self._given = self._takes[warm, low]()
        self.step += 1

    @torch.no_grad()
    def _take(self, warm: bool, low: bool) -> Given:
        stack, dtype = self._stack, torch.bfloat16 if low else torch.float32
        batch = self._batches.pick(self._row)
        layers, out = stack.layers(dtype), stack.derivatives(dtype)
        gradient: Tensor | None = None
        if warm:
            phi, tape = there_by_value(batch.x.to(dtype), layers)
            phi = phi.float()
            back(tape, self._slope.warm(phi, batch).to(dtype), out=out)
        else:
            phi, gradient, tape = there(batch.x.to(dtype), None, layers, keep=True)
            phi, gradient = phi.float(), gradient.float()
            d_phi, d_gradient = self._slope.full(phi, gradient, batch)
            back(tape, d_phi.to(dtype), d_gradient.to(dtype), out=out)
        stack.collect(dtype)
        if self.config.clip_norm is not None:
            self._clip(self.config.clip_norm)
        self._rate.copy_(self._rates.index_select(0, self._row)[0])
        self._optimizer.step()
        self._row += 1
        return Given(batch, phi, gradient)

    def _clip(self, most: float) -> None:
        """Shorten the derivatives of each network to the norm `most`."""
        derivatives = self._stack.derivatives(torch.float32)
        squared = torch.stack([d.square().sum(dim=(-2, -1)) for d in derivatives]).sum(dim=0)
        shorter = (most / (squared.sqrt() + 1e-6)).clamp(max=1.0)[..., None, None]
        for d in derivatives:
            d.mul_(shorter)

    def look(self) -> list[tuple[dict[str, float], Health]]:
        """Of each fit the terms on its last batch, unweighted, and how it does on what is held out of it."""
        given = self._given
        if given is None:
            raise RuntimeError("a descent is looked at after its first step")
        named = [terms_of(self._of(given, i), task, self.config) for i, task in enumerate(self.tasks)]
        looks = self._look()
        # Here the host waits for the device.
        rows = torch.stack([torch.stack([*terms.values()]) for terms in named]).tolist()
        terms = [dict(zip(named[0], row, strict=True)) for row in rows]
        losses = [task.weights(self.config).total(of) for task, of in zip(self.tasks, terms, strict=True)]
        return list(zip(terms, healths(losses, looks), strict=True))

    def _of(self, given: Given, i: int) -> Given:
        if not self._many:
            return given
        batch, phi, gradient = given
        return Given(Batch(*(array[i] for array in batch)), phi[i], None if gradient is None else gradient[i])

    @torch.no_grad()
    def _look_at_held(self) -> Tensor:
        phi, gradient, _ = there(self._held.x, None, self._stack.layers(torch.float32), keep=False)
        return self._held.look(phi, gradient)

    def save(self, some: Sequence[int] | None = None) -> None:
        """Keep the state of `some` tasks, or of all, to come back to."""
        whole = some is None or len(some) == len(self.tasks)
        rows = range(len(self.tasks)) if some is None else some
        for saved, now in zip(self._saved, (self._stack.values, *self._optimizer.moments), strict=True):
            if whole:
                saved.copy_(now)
            elif rows:
                for kept, parameter in zip(self._stack.parted(saved), self._stack.parted(now), strict=True):
                    kept[rows] = parameter[rows]
        for i in rows:
            self._saved_steps[i] = self.step

    def alone(self, i: int, *, rate: float) -> "Descent":
        """The fit of task i by itself, from where it was saved, at `rate` times its rate."""
        values, *moments = self._saved
        self._leave(values, [i])
        other = Descent(
            [self.tasks[i]],
            self.config,
            low_precision_steps=self._low_precision_steps,
            most_at_once=self._batches.room,
        )
        other.step, other.rate = self._saved_steps[i], self.rate * rate
        row: Any = i if self._many else ...
        parts = [torch.cat([part[row].flatten() for part in self._stack.parted(moment)]) for moment in moments]
        other._optimizer.begin(parts, other.step)
        other.save()
        return other

    def leave(self) -> None:
        """Leave the parameters, as they are, in the tasks' models."""
        self._leave(self._stack.values, range(len(self.tasks)))

    def _leave(self, values: Tensor, some: Sequence[int]) -> None:
        tensors = self._stack.parted(values)
        for i in some:
            unstacked([tensor[i] for tensor in tensors] if self._many else tensors, self.tasks[i].model)

    def close(self) -> None:
        """Let go of what was recorded, and of its memory; nothing can be done after that but `alone`."""
        self._takes.clear()
        del self._look


class _Slopes:
    """What a step sends back through the networks: the slopes of the weighted terms."""

    def __init__(self, tasks: Sequence[Task], config: FitConfig) -> None:
        self._config = config
        weights, n, m = [task.weights(config) for task in tasks], config.batch_surface, config.batch_space
        device, many = tasks[0].samples.points.device, len(tasks) > 1

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None] if many else torch.tensor(values, device=device)

        # Of the one-sided terms half a weight acts (LossWeights).
        self._surface = column([w.surface / 2 / n for w in weights])
        self._normal = column([w.normal / 2 / n for w in weights])[..., None]
        self._off_surface, self._distance = weights[0].off_surface / 2 / m, weights[0].distance / m
        self._eikonal, self._warm = weights[0].eikonal / (n + m), weights[0].warm_start / (n + m)
        self._width = column([max(NO_WIDTH, task.width(config)) for task in tasks])

    def warm(self, phi: Tensor, batch: Batch) -> Tensor:
        """With respect to phi (..., N), in the warm start."""
        return (phi - _warm_target(batch)).sign_().mul_(self._warm)

    def full(self, phi: Tensor, gradient: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """With respect to phi (..., N) and to the gradient (..., N, 3)."""
        n, config = self._config.batch_surface, self._config
        signed_distance, _, trusted_sign, share, far = batch.space.unbind(-1)
        on, off = phi[..., :n], phi[..., n:]
        d_on = surface_slope(on, self._width) * self._surface
        d_off = signed_off_surface_slope(off, trusted_sign, share, alpha=config.alpha) * self._off_surface
        d_off += distance_slope(off, signed_distance, far) * self._distance
        d_gradient = gradient_slope(gradient, batch.normals, eikonal=self._eikonal, normal=self._normal)
        return torch.cat([d_on, d_off], dim=-1), d_gradient


class Batches:
    """Batches for up to `room` steps, drawn from the samples of k clouds."""

    def __init__(self, several: Sequence[Samples], config: FitConfig, room: int) -> None:
        self.room, self._config, self._one = room, config, len(several) == 1
        device, k = several[0].points.device, len(several)
        self._on = [torch.cat([samples.points, samples.normals], dim=1) for samples in several]
        self._off = [_table(samples.pool, config.untrusted_share) for samples in several]
        n, m = config.batch_surface, config.batch_space
        self._x = torch.zeros((room, k, n + m, 3), device=device)
        self._normals = torch.zeros((room, k, n, 3), device=device)
        self._space = torch.zeros((room, k, m, len(SPACE_COLUMNS)), device=device)

    def draw(self, count: int, generators: Sequence[torch.Generator]) -> None:
        """Draw `count` batches, each cloud's by its generator."""
        n, m = self._config.batch_surface, self._config.batch_space
        for i, (on, off, generator) in enumerate(zip(self._on, self._off, generators, strict=True)):
            rows = draw_rows((count, n), len(on), generator, stratified=self._config.stratified)
            points = on[rows.to(on.device, non_blocking=True)]
            rows = draw_rows((count, m), len(off), generator, stratified=self._config.stratified)
            space = off[rows.to(on.device, non_blocking=True)]
            self._x[:count, i, :n], self._normals[:count, i] = points[..., :3], points[..., 3:]
            self._x[:count, i, n:], self._space[:count, i] = space[..., :3], space[..., 3:]

    def pick(self, row: Tensor) -> Batch:
        """The batch that `row` (1,) says."""
        picked = [array.index_select(0, row)[0] for array in (self._x, self._normals, self._space)]
        return Batch(*(array[0] if self._one else array for array in picked))


def _table(pool: SpacePool, untrusted_share: float) -> Tensor:
    """Points and SPACE_COLUMNS of the samples, (p, 8)."""
    share = torch.where(pool.trusted, 1.0, untrusted_share)
    columns = [pool.signed_distance, pool.first_guess, pool.signed_distance.sign() * pool.trusted, share, pool.far]
    return torch.cat([pool.points, torch.stack([column.float() for column in columns], dim=1)], dim=1)


def draw_rows(shape: tuple[int, int], total: int, generator: torch.Generator, *, stratified: bool) -> Tensor:
    """Rows (count, n) out of `total`, which lie along a space-filling curve: one from each of n stretches of it.

    Neighbours pull alike, so that a batch without gaps and clusters has a steadier gradient than one drawn at random,
    which it is where it is not `stratified`.
    """
    if not stratified:
        return torch.randint(total, shape, generator=generator)
    n = shape[1]
    place = torch.arange(n) + torch.rand(shape, generator=generator, dtype=torch.float64)
    return (place * (total / n)).long().clamp(max=total - 1)


def _warm_target(batch: Batch) -> Tensor:
    """What the warm start regresses on (..., N): nothing on the cloud, the first guess off it."""
    guess = batch.space[..., SPACE_COLUMNS.index("first_guess")]
    return torch.cat([torch.zeros_like(batch.normals[..., 0]), guess], dim=-1)


def terms_of(given: Given, task: Task, config: FitConfig) -> dict[str, Tensor]:
    """The terms on one batch of one cloud, unweighted: what the written-out slopes are the slopes of."""
    batch, phi, gradient = given
    if gradient is None:
        return {"warm_start": (phi - _warm_target(batch)).abs().mean()}
    n = len(batch.normals)
    signed_distance, _, trusted_sign, _, far = batch.space.unbind(-1)
    return {
        "surface": surface_loss(phi[:n], task.width(config)),
        "normal": normal_loss(gradient[:n], batch.normals),
        "eikonal": eikonal_loss(gradient),
        "off_surface": signed_off_surface_loss(
            phi[n:], trusted_sign, trusted_sign != 0, alpha=config.alpha, untrusted=config.untrusted_share
        ),
        "distance": distance_loss(phi[n:], signed_distance, far != 0),
    }
