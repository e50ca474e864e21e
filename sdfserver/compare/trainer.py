"""One way to fit any network: the samples, the terms and the weights of the fits (`fit`), by automatic differentiation.

Everything in the unit frame; sdf < 0 inside; normals point outward. No guard and no second attempt: a network that goes
wrong is to be seen going wrong.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from sdfserver.compare.choices import Budget
from sdfserver.compare.networks import value_and_gradient
from sdfserver.config import FitConfig
from sdfserver.descent import Batch, Batches, Given, Task, terms_of
from sdfserver.errors import Stopped
from sdfserver.guard import Health, HeldOut, healths
from sdfserver.sampling import Samples
from sdfserver.siren import Siren

LOOKS = 40
"""How often a fit is looked at."""
DRAWN = 25
"""Batches that are drawn at a time."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a fit had come to: its weighted loss, and the distance of the surface, on what is held out of it."""

    step: int
    seconds: float
    loss: float
    surface: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a fit went. `health` is on held-out samples; `diverged` where the loss ceased to be a number."""

    steps: int
    seconds: float
    processor_seconds: float
    """Of this process, over all its threads: what is left of the seconds where a machine has other work to do."""
    rate: float
    looks: tuple[Look, ...]
    health: Health
    diverged: bool


def train(
    network: nn.Module,
    samples: Samples,
    config: FitConfig,
    budget: Budget,
    *,
    seed: int,
    on_look: Callable[[float, Look], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Trained:
    """Fit the network, in place, to the samples; the same seed draws the same batches for any network.

    The schedule of the rate, and the warm start, go by the share of the budget that is spent: `config.steps` is how
    finely. Seconds are those of the steps alone, without the looks. `on_look` is told that share as well.

    Raises Stopped when `should_stop` says so.
    """
    # What these ask a task for is its samples.
    task = Task(model=cast(Siren, network), samples=samples, generator=torch.Generator().manual_seed(seed))
    if budget.steps is not None:
        config = replace(config, steps=budget.steps)
    network.requires_grad_(True).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=(0.9, config.beta2))
    judge = _Judge(network, task, config)
    batches = Batches([samples], config, DRAWN)
    device, weights = samples.points.device, task.weights(config)
    looks = [judge.look(0, 0.0)]
    step, seconds, busy, next_look, diverged = 0, 0.0, 0.0, 1, False
    while not diverged and (share := budget.share(step, seconds)) < 1:
        if should_stop is not None and should_stop():
            raise Stopped(f"stopped at step {step}")
        start, busy_before = time.perf_counter(), time.process_time()
        if step % DRAWN == 0:
            batches.draw(DRAWN, [task.generator])
        batch = batches.pick(torch.tensor([step % DRAWN], device=device))
        tick = min(config.steps - 1, int(share * config.steps + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = config.rate(tick)
        optimizer.zero_grad()
        loss = weights.total(terms_of(_given(network, batch, warm=tick < config.warm_start_steps), task, config))
        loss.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        step += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # seconds are the result here
        seconds += time.perf_counter() - start
        busy += time.process_time() - busy_before
        share = budget.share(step, seconds)
        if share * LOOKS >= next_look or share >= 1:
            next_look = int(share * LOOKS) + 1
            looks.append(judge.look(step, seconds))
            diverged = not math.isfinite(looks[-1].loss)
            if on_look is not None:
                on_look(min(1.0, share), looks[-1])
    return Trained(
        steps=step,
        seconds=seconds,
        processor_seconds=busy,
        rate=config.learning_rate,
        looks=tuple(looks),
        health=judge.health(looks[-1].loss),
        diverged=diverged,
    )


def _given(network: nn.Module, batch: Batch, *, warm: bool) -> Given:
    if warm:
        return Given(batch, network(batch.x), None)
    return Given(batch, *value_and_gradient(network, batch.x, keep=True))


class _Judge:
    """Looks at a network on what is held out of its fit: always the same samples."""

    def __init__(self, network: nn.Module, task: Task, config: FitConfig) -> None:
        self._network, self._task, self._config = network, task, config
        samples = task.samples
        held = replace(samples, points=samples.held_points, normals=samples.held_normals, pool=samples.held_pool)
        batches = Batches([held], config, 1)
        batches.draw(1, [torch.Generator().manual_seed(0)])
        self._batch = batches.pick(torch.zeros(1, dtype=torch.int64, device=samples.points.device))
        self._held = HeldOut([samples])

    def look(self, step: int, seconds: float) -> Look:
        phi, gradient = value_and_gradient(self._network, self._batch.x)
        terms = terms_of(Given(self._batch, phi, gradient), self._task, self._config)
        loss = float(self._task.weights(self._config).total(terms))
        return Look(step=step, seconds=seconds, loss=loss, surface=self.health(loss).surface)

    def health(self, loss: float) -> Health:
        return healths([loss], self._held.look(*value_and_gradient(self._network, self._held.x)))[0]
