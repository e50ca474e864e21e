"""The fit: a SIREN becomes the signed distance function of an oriented cloud, and local ones refine it.

Everything in the unit frame; sdf < 0 inside; normals point outward. The formulas of the terms are in `losses`, the
second stage is in `refine`.
"""

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdfserver.cloud import PointCloud
from sdfserver.config import FitConfig, LocalConfig, NetworkConfig
from sdfserver.errors import DivergenceError, Stopped
from sdfserver.local import PartitionOfUnity
from sdfserver.losses import (
    distance_loss,
    eikonal_loss,
    normal_loss,
    signed_off_surface_loss,
    surface_loss,
)
from sdfserver.orientation import disagreement
from sdfserver.refine import RefineReport, plan_cells, refine
from sdfserver.sampling import Samples, SpacePool, draw_samples
from sdfserver.siren import Siren

CHECK_EVERY, MOST_CHECKS = 25, 40
"""Steps between two looks at the fit's health, its losses and its progress; more in fits with more looks than that."""
MAX_WRONG_SIGNS = 0.01
"""Share of trusted signs that may be wrong on held-out samples: healthy fits have none, collapsed ones 0.01 to 0.12."""
FEWEST_SIGNS = 300
"""Among fewer, one or two samples on the edge of what is trusted would be taken for a collapse."""
MAX_EIKONAL = 0.7
"""Mean ||grad phi| - 1| on held-out samples: the fewer the steps, the higher a healthy fit ends (0.1 after thousands,
0.4 after a few hundred), so that only a wild field is told by this alone."""
MAX_WRONG_SIDES = 0.4
"""Share of points beside the cloud on the wrong side of phi = 0: one half where phi has one sign."""
PATIENCE = 0.7
"""Share of the steps that a fit has to come within these bounds; after them it may not leave."""
HOPELESS_WRONG_SIGNS = 0.25
"""Share of wrong trusted signs from which no fit has been seen to recover, at any time after the warm start."""
MOST_REFUSED = 0.25
"""Share of all cells that may be found worse with a local network before a coarse fit that was cut short goes on."""
SUSPECT_DISAGREEMENT = 0.05
"""Share of contradicting normals from which on they are named as what may have made a fit fail."""


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
class Health:
    """What the guard looks at, on samples that are held out of the fit."""

    loss: float
    wrong_signs: float
    """Share of the samples with a trusted sign, or of FEWEST_SIGNS if those are fewer, on which phi has the other."""
    wrong_sides: float
    """Share of the points one spacing along and against the normals on which phi has the wrong sign."""
    eikonal: float
    """Mean ||grad phi| - 1|."""
    surface: float
    """Mean |phi| / |grad phi| on held-out points of the cloud: their distance to the surface, to first order."""

    @property
    def fault(self) -> str | None:
        """What keeps this from being the state of a good fit, or None."""
        if not self.finite:
            return "the loss is not finite"
        if self.wrong_signs > MAX_WRONG_SIGNS:
            return f"{self.wrong_signs:.1%} of the trusted signs are wrong on held-out samples"
        if self.eikonal > MAX_EIKONAL:
            return f"|grad phi| is {self.eikonal:.2f} away from 1 on held-out samples"
        if self.wrong_sides > MAX_WRONG_SIDES:
            return f"{self.wrong_sides:.0%} of the points beside the cloud are on the wrong side of the surface"
        return None

    @property
    def finite(self) -> bool:
        """Whether everything is a number."""
        return all(map(math.isfinite, vars(self).values()))


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


@dataclass(eq=False)
class _State:
    """All that a fit needs to go on from a step."""

    model: Siren
    optimizer: torch.optim.Optimizer
    step: int = 0
    saved: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        self.saved = {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "step": self.step,
        }

    def restore(self) -> None:
        self.model.load_state_dict(self.saved["model"])
        self.optimizer.load_state_dict(self.saved["optimizer"])
        self.step = self.saved["step"]


def fit(
    cloud_unit: PointCloud,
    network: NetworkConfig,
    config: FitConfig,
    *,
    local: LocalConfig | None = None,
    samples: Samples | None = None,
    device: torch.device,
    seed: int = 0,
    on_progress: Callable[[FitProgress], None] | None = None,
    on_network: Callable[[FitProgress, Siren], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[Siren | PartitionOfUnity, FitReport]:
    """The network whose zero set is the surface of `cloud_unit`, and how the fit went.

    With `local`, a second stage puts small networks over the first where that lowers the error on points held out of
    it; for a cloud with little noise the first stage is then a shorter one. `samples` are drawn from the cloud unless
    they are given.

    The same seed on the same device gives the same network. `on_progress` is called every few dozen steps, `on_network`
    then as well, with a copy of the network of the first stage, healthy or not; `should_stop` before every step.

    Raises DivergenceError when the fit is out of its bounds and is so again after one restart from its last good state
    at half the rate; Stopped when `should_stop` says so.
    """
    _keep_thread_limit()
    start = time.perf_counter()
    samples = (samples or draw_samples(cloud_unit, config.pool, np.random.default_rng(seed))).to(device)
    pool_ready = time.perf_counter()
    network = replace(network, omega=config.omega_for(network.omega, samples.spacing))
    model = Siren(network, generator=torch.Generator().manual_seed(seed)).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    legs, cells = _plan(samples, config, local)
    tell = _Teller(
        on_progress, on_network, model, expected=legs[0].steps + (local.steps_per_cell * cells if local else 0)
    )
    restarts: list[str] = []
    fitted: Siren | PartitionOfUnity = model
    refined: RefineReport | None = None
    for leg in legs:
        tell.begin(leg.steps)
        try:
            health, back = _descend(
                model, samples, leg, generator=generator, on_check=tell.step, should_stop=should_stop
            )
        except DivergenceError as error:
            raise DivergenceError(f"{error}; {_advice(cloud_unit)}") from None
        restarts.extend(back)
        if local is None:
            break
        fitted, refined = refine(model, samples, local, seed=seed, on_progress=tell.local, should_stop=should_stop)
        if isinstance(fitted, PartitionOfUnity):
            whole = _health(fitted, samples, loss=health.loss)
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


def _descend(
    model: Siren,
    samples: Samples,
    config: FitConfig,
    *,
    generator: torch.Generator,
    on_check: Callable[[int, dict[str, float]], None],
    should_stop: Callable[[], bool] | None,
) -> tuple[Health, tuple[str, ...]]:
    """Fits `model` in place; returns its health at the end, and why it went back, if it did.

    `on_check` gets the step and the losses whenever the fit is looked at. Raises as `fit` does.
    """
    device = samples.points.device
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)
    low_precision_steps = _low_precision_steps(config, device)
    weights = config.weights_for(samples.noise.by_quadrics)
    state = _State(model, optimizer)
    restarts: list[str] = []
    check_every = max(CHECK_EVERY, config.steps // MOST_CHECKS)
    state.save()
    while state.step < config.steps:
        if should_stop is not None and should_stop():
            raise Stopped(f"stopped at step {state.step} of {config.steps}")
        for group in optimizer.param_groups:
            group["lr"] = config.rate(state.step) * 0.5 ** len(restarts)
        dtype = torch.bfloat16 if state.step < low_precision_steps else None
        terms = _terms(model, samples, config, generator, warm=state.step < config.warm_start_steps, dtype=dtype)
        loss = weights.total(terms)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        state.step += 1
        if state.step % check_every and state.step != config.steps:
            continue
        # The only place where the host waits for the device.
        health = _health(model, samples, loss=float(loss.detach()))
        on_check(state.step, {name: float(term.detach()) for name, term in terms.items()})
        if health.fault is None:
            state.save()
        elif _may_heal(health, state.step, config):
            continue
        elif not restarts:
            restarts.append(f"at step {state.step}: {health.fault}")
            state.restore()
        else:
            raise DivergenceError(
                f"the fit diverged {restarts[0]}; and after a restart at half the learning rate again "
                f"at step {state.step} of {config.steps}: {health.fault}"
            )
    return health, tuple(restarts)


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
    return "try another seed or preset"


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


def _terms(
    model: Siren,
    samples: Samples,
    config: FitConfig,
    generator: torch.Generator,
    *,
    warm: bool,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The loss terms of one step on a fresh batch, phi in `dtype`; `warm` is the regression that comes first."""
    n = config.batch_surface
    rows = _draw(n, len(samples.points), config, generator)
    points, normals = samples.points[rows], samples.normals[rows]
    space = samples.pool[_draw(config.batch_space, len(samples.pool), config, generator)]
    x = torch.cat([points, space.points])
    if warm:
        phi = model(x, dtype=dtype)
        target = torch.cat([torch.zeros_like(phi[:n]), space.first_guess])
        return {"warm_start": (phi - target).abs().mean()}
    phi, gradient = model.value_and_gradient(x, dtype=dtype)
    return {
        "surface": surface_loss(phi[:n], config.quadratic_noises * samples.noise.least),
        "normal": normal_loss(gradient[:n], normals),
        "eikonal": eikonal_loss(gradient),
        "off_surface": signed_off_surface_loss(
            phi[n:], space.signed_distance.sign(), space.trusted, alpha=config.alpha, untrusted=config.untrusted_share
        ),
        "distance": distance_loss(phi[n:], space.signed_distance, space.far),
    }


def _draw(n: int, total: int, config: FitConfig, generator: torch.Generator) -> Tensor:
    """A batch of `n` rows out of `total`, which lie along a space-filling curve: one from each of n stretches of it.

    Neighbours pull alike, so that a batch without gaps and clusters has a steadier gradient than one drawn at random.
    """
    device = generator.device
    if not config.stratified:
        return torch.randint(total, (n,), generator=generator, device=device)
    place = torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    return (place * (total / n)).long().clamp(max=total - 1)


@torch.no_grad()
def _health(model: Siren | PartitionOfUnity, samples: Samples, *, loss: float) -> Health:
    held: SpacePool = samples.held_pool
    phi, gradient = model.value_and_gradient(held.points)
    wrong = (phi * held.signed_distance < 0) & held.trusted
    points, normals = samples.held_points, samples.held_normals
    on, on_gradient = model.value_and_gradient(points)
    beside = [model(points + side * samples.spacing * normals) * side < 0 for side in (1, -1)]
    return Health(
        loss=loss,
        wrong_signs=float(wrong.sum() / held.trusted.sum().clamp_min(FEWEST_SIGNS)),
        wrong_sides=float(torch.cat(beside).float().mean()),
        eikonal=float(eikonal_loss(gradient)),
        surface=float((on.abs() / on_gradient.norm(dim=-1).clamp_min(1e-6)).mean()),
    )
