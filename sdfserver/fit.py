"""The fit: a SIREN becomes the signed distance function of an oriented cloud, and local ones refine it.

Everything in the unit frame; sdf < 0 inside; normals point outward. The formulas of the terms are in `losses`, the
second stage is in `refine`.
"""

import copy
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sdfserver.cloud import PointCloud
from sdfserver.config import FitConfig, LocalConfig, NetworkConfig
from sdfserver.descent import Descent, Task
from sdfserver.device import free_device_memory, in_halves, without_trace
from sdfserver.errors import DivergenceError, SdfServerError, Stopped
from sdfserver.guard import HOPELESS_WRONG_SIGNS, Health, health_of
from sdfserver.local import PartitionOfUnity
from sdfserver.orientation import disagreement
from sdfserver.refine import RefineReport, plan_cells, refine
from sdfserver.sampling import Samples, draw_samples
from sdfserver.siren import Siren

CHECK_EVERY, MOST_CHECKS = 25, 40
"""Steps between two looks at the fit's health, its losses and its progress; more in fits with more looks than that."""
PATIENCE = 0.7
"""Share of the steps that a fit has to come within these bounds; after them it may not leave."""
MOST_REFUSED = 0.25
"""Share of all cells that may be found worse with a local network before a coarse fit that was cut short goes on."""
SUSPECT_DISAGREEMENT = 0.05
"""Share of contradicting normals from which on they are named as what may have made a fit fail."""
ANOTHER = "try another seed or preset"
"""What is left to be said where nothing is known to be wrong."""


@dataclass(frozen=True, kw_only=True)
class FitProgress:
    """Where the fit stands."""

    step: int
    """Of the coarse network's fit; it stays at `steps` while local networks are fitted."""
    steps: int
    share: float
    """Of the whole fit, from 0 to 1."""
    losses: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """How the fit went."""

    steps: int
    warm_start_steps: int
    """Of these, steps of plain regression."""
    restarts: tuple[str, ...]
    """Why the fit went back to its last good state, if it did."""
    seconds_pool: float
    seconds_fit: float
    losses: dict[str, float]
    health: Health
    trusted_share: float
    """Share of the pool with a trusted sign."""
    noise: float
    """Estimated noise of the cloud: standard deviation along the normals, unit frame."""
    omega: float
    """The network's: the one asked for, or less for a cloud of few points."""
    low_precision_steps: int
    local: RefineReport | None
    """How the second stage went; None without one."""


Fitted = tuple[Siren | PartitionOfUnity, FitReport]
Failure = Exception
"""An SdfServerError, or that the memory did not suffice: MemoryError, torch.OutOfMemoryError."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FitJob:
    """A cloud to be fitted, in the unit frame, and who wants to know.

    `samples` are drawn from the cloud unless they are given. `on_progress` is called every few dozen steps,
    `on_network` then as well, with a copy of the network of the first stage, healthy or not; `should_stop` is asked
    before every step.
    """

    cloud_unit: PointCloud
    seed: int = 0
    samples: Samples | None = None
    on_progress: Callable[[FitProgress], None] | None = None
    on_network: Callable[[FitProgress, Siren], None] | None = None
    should_stop: Callable[[], bool] | None = None


def fit(
    cloud_unit: PointCloud,
    network: NetworkConfig,
    config: FitConfig,
    *,
    local: LocalConfig | None = None,
    device: torch.device,
    seed: int = 0,
    samples: Samples | None = None,
    on_progress: Callable[[FitProgress], None] | None = None,
    on_network: Callable[[FitProgress, Siren], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Fitted:
    """The network whose zero set is the surface of `cloud_unit`, and how the fit went.

    With `local`, a second stage puts small networks over the first where that lowers the error on points held out of
    it; for a cloud with little noise the first stage is then a shorter one. The rest is as in FitJob.

    The same seed on the same device gives the same network.

    Raises DivergenceError when the fit is out of its bounds and is so again after one restart from its last good state
    at half the rate; Stopped when `should_stop` says so.
    """
    job = FitJob(
        cloud_unit=cloud_unit,
        seed=seed,
        samples=samples,
        on_progress=on_progress,
        on_network=on_network,
        should_stop=should_stop,
    )
    (found,) = fit_together([job], network, config, local=local, device=device)
    if isinstance(found, Exception):
        raise found
    return found


def fit_together(
    jobs: Sequence[FitJob],
    network: NetworkConfig,
    config: FitConfig,
    *,
    local: LocalConfig | None = None,
    device: torch.device,
) -> list[Fitted | Failure]:
    """What `fit` gives or raises for each of several clouds, whose coarse fits go down together as one batch.

    Each network is the one that its job gives alone, but for rounding. On a device that one fit does not fill, several
    take little longer than one; where they do not fit into its memory, they go down in halves.
    """
    _keep_thread_limit()
    ended: dict[int, Fitted | Failure] = {}
    fits = {i: _fit_of(job, network, config, local, device) for i, job in enumerate(jobs)}
    answers: Answers = dict.fromkeys(fits)
    while answers:
        legs: dict[int, _Leg] = {}
        for i, answer in answers.items():
            try:
                legs[i] = fits[i].throw(answer) if isinstance(answer, Exception) else fits[i].send(answer)
            except StopIteration as end:
                ended[i] = end.value
            except SdfServerError as error:
                ended[i] = error
            except (MemoryError, torch.OutOfMemoryError) as error:
                ended[i] = without_trace(error)
                free_device_memory()
        answers = {}
        for config_of_leg in {leg.config: None for leg in legs.values()}:
            answers |= _down({i: leg for i, leg in legs.items() if leg.config == config_of_leg})
    return [ended[i] for i in range(len(jobs))]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Leg:
    """A way down for one network: all legs of one config can go together."""

    task: Task
    config: FitConfig
    on_check: Callable[[int, dict[str, float]], None]
    shown: bool
    """Whether somebody looks at the network whenever the fit is looked at."""
    should_stop: Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Descended:
    """How a leg ended: in what health, and why it went back to its last good state, if it did."""

    health: Health
    restarts: tuple[str, ...] = ()


Answers = dict[int, Any]
"""What the fits are sent: how their legs ended, or why they did not; nothing at first."""


def _fit_of(
    job: FitJob, network: NetworkConfig, config: FitConfig, local: LocalConfig | None, device: torch.device
) -> Generator[_Leg, Descended, Fitted]:
    """One fit from its samples to its report. It asks for legs of the coarse fit, and is sent how each ended."""
    start = time.perf_counter()
    samples = job.samples or draw_samples(job.cloud_unit, config.pool, np.random.default_rng(job.seed), device)
    samples = samples.to(device)
    pool_ready = time.perf_counter()
    network = replace(network, omega=config.omega_for(network.omega, samples.spacing))
    model = Siren(network, generator=torch.Generator().manual_seed(job.seed)).to(device)
    task = Task(model=model, samples=samples, generator=torch.Generator().manual_seed(job.seed))
    should_stop = job.should_stop or (lambda: False)
    legs, cells = _plan(samples, config, local)
    tell = _Teller(
        job.on_progress, job.on_network, model, expected=legs[0].steps + (local.steps_per_cell * cells if local else 0)
    )
    restarts: list[str] = []
    fitted: Siren | PartitionOfUnity = model
    refined: RefineReport | None = None
    for leg in legs:
        tell.begin(leg.steps)
        try:
            descended = yield _Leg(
                task=task, config=leg, on_check=tell.step, shown=job.on_network is not None, should_stop=should_stop
            )
        except DivergenceError as error:
            raise DivergenceError(f"{error}; {_advice(job.cloud_unit)}") from None
        health = descended.health
        restarts.extend(descended.restarts)
        if local is None:
            break
        fitted, refined = refine(model, samples, local, seed=job.seed, on_progress=tell.local, should_stop=should_stop)
        if isinstance(fitted, PartitionOfUnity):
            whole = health_of(fitted, samples, loss=health.loss)
            if whole.fault is None and whole.surface < health.surface:
                health = whole
            else:
                fitted, refined = model, replace(refined, kept=0, sides=())
        if refined.tried - refined.kept <= MOST_REFUSED * cells:
            break
    return fitted, FitReport(
        steps=tell.steps,
        warm_start_steps=sum(leg.warm_start_steps for leg in legs[: tell.legs]),
        restarts=tuple(restarts),
        seconds_pool=pool_ready - start,
        seconds_fit=time.perf_counter() - pool_ready,
        losses=tell.losses,
        health=health,
        trusted_share=float(samples.pool.trusted.float().mean()),
        noise=samples.noise.least,
        omega=network.omega,
        low_precision_steps=sum(_low_precision_steps(leg, device) for leg in legs[: tell.legs]),
        local=refined,
    )


def _plan(samples: Samples, config: FitConfig, local: LocalConfig | None) -> tuple[list[FitConfig], int]:
    """The coarse fit in one leg or two, and how many cells a second stage has.

    Where local networks can be expected to pay, the first leg is a short one, and the second is for the case that they
    do not: the network then gets the rest of its steps.
    """
    if local is None:
        return [config], 0
    leaves = plan_cells(samples.points, samples.spacings, local, of=len(samples.whole_points))
    cells = sum(len(found) for _, found in leaves)
    typical = max(leaves, key=lambda leaf: len(leaf[1]))[0].side
    if samples.noise.least > local.clean_unit or typical < local.clean_side or config.steps < 2:
        return [config], cells
    short = shortened(config, local)
    rest = replace(
        config, steps=config.steps - short.steps, learning_rate=config.learning_rate / 2, warm_start_share=0.0
    )
    return [short, rest], cells


def shortened(config: FitConfig, local: LocalConfig) -> FitConfig:
    """The coarse fit of a cloud for which local networks can be expected to do the rest."""
    return replace(config, steps=max(1, round(config.steps * local.coarse_share)))


class _Teller:
    """Tells of both stages' progress: a share of the whole that never falls, and the latest losses."""

    def __init__(
        self,
        on_progress: Callable[[FitProgress], None] | None,
        on_network: Callable[[FitProgress, Siren], None] | None,
        model: Siren,
        *,
        expected: float,
    ) -> None:
        self._on_progress, self._on_network, self._model = on_progress, on_network, model
        self._expected, self._share = expected, 0.0
        self.steps = self._before = self.legs = 0
        self.losses: dict[str, float] = {}

    def begin(self, steps: int) -> None:
        """A leg of the coarse fit begins, of so many steps."""
        self._before, self.steps, self.legs = self.steps, self.steps + steps, self.legs + 1
        self._expected = max(self._expected, 1.25 * self.steps if self.legs > 1 else 0)

    def step(self, step: int, losses: dict[str, float]) -> None:
        """The leg has come to `step`."""
        self.losses.update(losses)
        progress = self._progress(self._before + step, (self._before + step) / self._expected)
        if self._on_progress is not None:
            self._on_progress(progress)
        if self._on_network is not None:
            self._on_network(progress, copy.deepcopy(self._model))

    def local(self, share: float) -> None:
        """The second stage has come as far as `share`."""
        before = self.steps / self._expected
        progress = self._progress(self.steps, before + (1 - before) * share)
        if self._on_progress is not None:
            self._on_progress(progress)

    def _progress(self, step: int, share: float) -> FitProgress:
        self._share = max(self._share, min(1.0, share))
        return FitProgress(step=step, steps=self.steps, share=self._share, losses=dict(self.losses))


def _down(legs: dict[int, _Leg]) -> Answers:
    """How legs of one config ended, together, or in halves where the memory does not hold them together."""
    before = {i: leg.task.saved() for i, leg in legs.items()}

    def attempt(some: list[int]) -> Answers:
        for i in some:
            legs[i].task.restore(before[i])  # the first attempt may have come some way
        try:
            return dict(zip(some, _descend([legs[i] for i in some]), strict=True))
        except torch.OutOfMemoryError as error:
            if len(some) > 1:
                raise
            return {some[0]: without_trace(error)}

    return {i: answer for part in in_halves(attempt, list(legs)) for i, answer in part.items()}


def _descend(legs: Sequence[_Leg]) -> list[Descended | SdfServerError]:
    """Takes the networks of some legs down together, in place: how each ended, or why it did not."""
    config = legs[0].config
    device = legs[0].task.samples.points.device
    every = max(CHECK_EVERY, config.steps // MOST_CHECKS)
    descent = Descent(
        [leg.task for leg in legs],
        config,
        low_precision_steps=_low_precision_steps(config, device),
        most_at_once=min(every, config.steps),
    )
    ended = _follow(descent, legs, every)
    descent.close()
    for i, leg in enumerate(legs):
        if isinstance(fault := ended[i], _Fault):
            again = descent.alone(i, rate=0.5)
            (end,) = _follow(again, [leg], every)
            again.close()
            if isinstance(end, _Fault):
                ended[i] = DivergenceError(
                    f"the fit diverged {fault}; and after a restart at half the learning rate again {end.at(config)}"
                )
            else:
                ended[i] = replace(end, restarts=(str(fault),)) if isinstance(end, Descended) else end
    return [end for end in ended if not isinstance(end, _Fault)]


@dataclass(frozen=True)
class _Fault:
    """Where a fit was out of its bounds, with no hope of coming back within them."""

    step: int
    what: str

    def __str__(self) -> str:
        return f"at step {self.step}: {self.what}"

    def at(self, config: FitConfig) -> str:
        return f"at step {self.step} of {config.steps}: {self.what}"


def _follow(descent: Descent, legs: Sequence[_Leg], every: int) -> list[Descended | _Fault | SdfServerError]:
    """Takes the steps of a descent to their end, looking at its fits from time to time: how each ended."""
    config = descent.config
    ended: dict[int, Descended | _Fault | SdfServerError] = {}
    while descent.step < config.steps and len(ended) < len(legs):
        count = min(every - descent.step % every, config.steps - descent.step)
        descent.draw(count)
        for _ in range(count):
            for i, leg in enumerate(legs):
                if i not in ended and leg.should_stop():
                    ended[i] = Stopped(f"stopped at step {descent.step} of {config.steps}")
            if len(ended) == len(legs):
                break
            descent.take()
        else:
            _look(descent, legs, ended)
    return [ended[i] for i in range(len(legs))]


def _look(descent: Descent, legs: Sequence[_Leg], ended: dict[int, Descended | _Fault | SdfServerError]) -> None:
    """Looks at the fits that have not ended: tells of them, keeps the good ones' state, ends what is hopeless."""
    config, good = descent.config, []
    last = descent.step == config.steps
    looks = descent.look()
    if last or any(leg.shown for leg in legs):
        descent.leave()
    for i, (leg, (terms, health)) in enumerate(zip(legs, looks, strict=True)):
        if i in ended:
            continue
        leg.on_check(descent.step, terms)
        if health.fault is None:
            good.append(i)
            if last:
                ended[i] = Descended(health=health)
        elif not _may_heal(health, descent.step, config):
            ended[i] = _Fault(descent.step, health.fault)
    descent.save(good)


def _low_precision_steps(config: FitConfig, device: torch.device) -> int:
    return round(config.low_precision_share * config.steps) if computes_in_bfloat16(device) else 0


def _may_heal(health: Health, step: int, config: FitConfig) -> bool:
    """Whether a fit that is out of its bounds at `step` has reason and time to come within them."""
    if not health.finite:
        return False
    if step < config.warm_start_steps:
        return True
    return step < PATIENCE * config.steps and health.wrong_signs <= HOPELESS_WRONG_SIGNS


def _advice(cloud: PointCloud) -> str:
    """What to do about a cloud whose fit failed: the normals are named only where they show a fault."""
    normals = cloud.normals
    if normals is None:
        return "give the cloud normals"
    centred = cloud.points - cloud.points.mean(axis=0)
    heights = np.einsum("ij,ij->i", centred, normals)
    if heights.sum() < -0.5 * np.abs(heights).sum():
        return "the normals seem to point inward: turn them, or use --normals estimate"
    share = disagreement(cloud.points, normals)
    if share > SUSPECT_DISAGREEMENT:
        return f"{share:.0%} of the normals contradict the others on which side is outside: use --normals estimate"
    return ANOTHER


def _keep_thread_limit() -> None:
    """Let PyTorch count no more threads than OMP_THREAD_LIMIT grants.

    It does not look there, and where OpenMP grants fewer threads than it counts, oneDNN leaves the other threads' parts
    of a bfloat16 product as they lay in memory, without an error.
    """
    limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    if limit.isdecimal() and 0 < int(limit) < torch.get_num_threads():
        torch.set_num_threads(int(limit))


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices much faster than float32 ones.

    That takes AMX, which does so at four times the rate. The instructions of AVX-512 for bfloat16 alone are no gain to
    speak of (0.55 to 1.1 times the rate, by the make of the processor).
    """
    # A GPU waits for launches, not for arithmetic, at this size of batch.
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
