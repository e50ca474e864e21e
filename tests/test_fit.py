"""The loop: what it finds, that it repeats, and that it never ends badly in silence."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shapes import bowl, directions, even_sphere, sphere, torus

import sdfserver.fit as fit_module
from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import PRESETS, FitConfig, NetworkConfig, PoolConfig
from sdfserver.descent import Descent, draw_rows
from sdfserver.errors import DivergenceError, Stopped
from sdfserver.fit import FitProgress, FitReport, fit
from sdfserver.guard import Health, HeldOut, healths
from sdfserver.sampling import draw_samples
from sdfserver.siren import Siren
from sdfserver.stack import Adam

NETWORK = NetworkConfig(hidden=64, layers=3, omega=10.0)
SHARP = NetworkConfig(hidden=128, layers=3)
CONFIG = FitConfig(steps=200, learning_rate=2e-3, batch_surface=400, batch_space=400, pool=PoolConfig(size=5000))
CPU = torch.device("cpu")
HEALTHY = Health(loss=1.0, wrong_signs=0.0, wrong_sides=0.0, eikonal=0.1, surface=0.01)


def run(
    cloud: PointCloud, config: FitConfig = CONFIG, *, network: NetworkConfig = NETWORK, **options: object
) -> tuple[Siren, FitReport]:
    frame = Frame.around(cloud.points)
    unit = PointCloud(points=frame.to_unit(cloud.points), normals=cloud.normals)
    return fit(unit, network, config, device=CPU, **options)  # type: ignore[arg-type]


def parameters(siren: Siren) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in siren.parameters()])


def test_the_field_of_a_sphere_is_its_signed_distance() -> None:
    siren, report = run(sphere(3000))
    x = torch.rand(2000, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = x[(x.norm(dim=1) > 0.7) & (x.norm(dim=1) < 1.1)]
    with torch.no_grad():
        error = (siren(x) - (x.norm(dim=1) - 0.9)).abs()
    assert error.mean() < 0.02
    assert report.health.wrong_signs == 0
    assert report.health.surface < 0.01


def test_the_same_seed_gives_the_same_network_to_the_bit() -> None:
    first, again, other = (parameters(run(sphere(500), seed=seed)[0]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_progress_rises_to_the_last_step_and_names_the_published_losses() -> None:
    seen: list[FitProgress] = []
    run(torus(1000), replace(CONFIG, steps=110), on_progress=seen.append)
    assert [p.step for p in seen] == sorted({p.step for p in seen})
    assert seen[-1].step == seen[-1].steps == 110
    assert {"surface", "normal", "eikonal", "off_surface", "distance"} == set(seen[-1].losses)


def test_a_stop_is_heard_at_the_next_step() -> None:
    asked = iter([False] * 3 + [True])
    with pytest.raises(Stopped, match="step 3 of 200"):
        run(torus(1000), should_stop=lambda: next(asked))


def test_a_rate_that_cannot_work_is_an_error_not_a_field() -> None:
    with pytest.raises(DivergenceError, match="restart at half the learning rate"):
        run(torus(1000), replace(CONFIG, steps=100, learning_rate=0.5))


def test_a_loss_that_is_not_finite_is_an_error_not_a_field() -> None:
    with pytest.raises(DivergenceError, match="not finite"):
        run(torus(1000), replace(CONFIG, steps=100, learning_rate=1e30))


def test_normals_turned_at_random_are_an_error_not_a_field() -> None:
    cloud = sphere(2000)
    assert cloud.normals is not None
    signs = torch.randint(2, (2000, 1), generator=torch.Generator().manual_seed(0)).numpy() * 2 - 1
    with pytest.raises(DivergenceError, match="% of the normals contradict the others"):
        run(PointCloud(points=cloud.points, normals=cloud.normals * signs))


def test_normals_that_point_inward_are_named_where_a_fit_fails_and_good_ones_are_not() -> None:
    cloud = torus(1000)
    assert cloud.normals is not None
    hopeless = replace(CONFIG, steps=50, learning_rate=1e30)
    with pytest.raises(DivergenceError, match="the normals seem to point inward"):
        run(PointCloud(points=cloud.points, normals=-cloud.normals), hopeless)
    with pytest.raises(DivergenceError, match=r"not finite; try another seed or preset$"):
        run(cloud, hopeless)


def test_a_hundred_points_are_enough_for_a_sphere() -> None:
    cloud = even_sphere(100)
    siren, report = run(cloud, replace(CONFIG, learning_rate=7e-4), network=SHARP)
    assert report.restarts == ()
    assert report.omega == siren.config.omega < SHARP.omega
    x = 0.9 * torch.from_numpy(directions(1000, 1)).float()
    with torch.no_grad():
        assert siren(x).abs().max() < 0.04
        # Nothing between the surface and the border of what is searched for it.
        assert (siren(x * 1.1) > 0).all()


def test_many_points_leave_omega_alone() -> None:
    siren, _ = run(sphere(2000), replace(CONFIG, learning_rate=7e-4), network=SHARP)
    assert siren.config == SHARP


def test_a_limit_on_threads_below_what_pytorch_counts_is_kept() -> None:
    # In a process of its own: OpenMP reads the limit once, when it is loaded.
    code = """
import torch
from shapes import sphere
from sdfserver.fit import fit
from test_fit import CONFIG, CPU, NETWORK
torch.set_num_threads(2)
_, report = fit(sphere(1000, radius=0.9), NETWORK, CONFIG, device=CPU)
assert torch.get_num_threads() == 1
assert report.restarts == ()
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_THREAD_LIMIT": "1", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_the_fit_goes_back_to_its_last_good_state_once_and_halves_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    look, checks, rates = Descent.look, [], []

    def one_fault(self: Descent) -> list[tuple[dict[str, float], Health]]:
        checks.append(1)
        ((terms, found),) = look(self)
        return [(terms, replace(found, wrong_signs=0.5) if len(checks) == 7 else found)]

    step = Adam.step

    def recorded(self: Adam) -> None:
        rates.append(float(self._rate))
        step(self)

    monkeypatch.setattr(Descent, "look", one_fault)
    monkeypatch.setattr(Adam, "step", recorded)
    _, report = run(sphere(1000))
    assert len(report.restarts) == 1
    assert report.restarts[0].startswith("at step 175: 50.0% of the trusted signs")
    assert len(rates) == CONFIG.steps + fit_module.CHECK_EVERY  # the 25 steps after the sixth check ran twice
    again = 6 * fit_module.CHECK_EVERY
    assert rates[again + fit_module.CHECK_EVERY] == pytest.approx(rates[again] / 2)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"loss": float("nan")}, "not finite"),
        ({"eikonal": float("inf")}, "not finite"),
        ({"wrong_signs": 0.05}, "trusted signs"),
        ({"eikonal": 0.45}, None),
        ({"eikonal": 0.75}, "grad phi"),
        ({"wrong_sides": 0.5}, "wrong side"),
    ],
)
def test_the_guard_names_what_is_wrong(change: dict[str, float], fault: str | None) -> None:
    found = replace(HEALTHY, **change).fault
    assert (found is None) == (fault is None)
    assert fault is None or fault in str(found)


@pytest.mark.parametrize(("n_wrong", "healthy"), [(0, True), (2, True), (40, False)])
def test_a_few_wrong_signs_are_a_collapse_only_where_nearly_all_are_wrong(n_wrong: int, healthy: bool) -> None:
    samples = draw_samples(sphere(1000, radius=0.9), CONFIG.pool, np.random.default_rng(0))
    trusted = torch.zeros(len(samples.held_pool), dtype=torch.bool)
    trusted[samples.held_pool.trusted.nonzero()[:40, 0]] = True
    samples = replace(samples, held_pool=replace(samples.held_pool, trusted=trusted))

    held = HeldOut([samples])
    length = held.x.norm(dim=1, keepdim=True)
    phi = length[:, 0] - 0.9
    phi[trusted.nonzero()[:n_wrong, 0]] *= -1  # the pool comes first
    (health,) = healths([1.0], held.look(phi, held.x / length))
    assert (health.fault is None) == healthy


def test_an_open_surface_without_a_trusted_inside_is_fitted() -> None:
    _, report = run(bowl(2000))
    assert report.health.wrong_sides < 0.05


def test_bfloat16_for_the_first_steps_ends_close_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "computes_in_bfloat16", lambda device: False)
    exact, _ = run(sphere(2000))
    monkeypatch.setattr(fit_module, "computes_in_bfloat16", lambda device: True)
    siren, report = run(sphere(2000))
    assert report.low_precision_steps == 180
    assert all(p.dtype == torch.float32 for p in siren.parameters())
    assert not torch.equal(parameters(siren), parameters(exact))
    assert report.health.surface < 0.01


def test_paper_is_the_published_recipe() -> None:
    paper = PRESETS["paper"].fit
    assert (paper.learning_rate, paper.clip_norm, paper.alpha) == (1e-4, 1.0, 100.0)
    assert (paper.batch_surface, paper.batch_space) == (1400, 1400)
    weights = paper.weights
    assert (weights.surface, weights.normal, weights.off_surface, weights.eikonal) == (3e3, 1e2, 1e2, 5e1)
    assert weights.distance == 0
    assert {paper.rate(step) for step in (0, 1, 5000, 9999)} == {1e-4}
    assert paper.warm_start_steps == 0
    assert not paper.pool.near_share
    # No winding number is that far from one half.
    assert min(paper.pool.inside_confidence, paper.pool.outside_confidence) > 0.5


def test_the_rate_rises_then_falls() -> None:
    rates = [CONFIG.rate(step) for step in range(CONFIG.steps)]
    peak = rates.index(max(rates))
    assert peak < 10
    assert rates[0] < 0.5 * CONFIG.learning_rate
    assert rates[-1] < 0.01 * CONFIG.learning_rate
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))


def test_a_stratified_batch_leaves_no_stretch_out_and_takes_none_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows((200, 100), 1000, generator, stratified=True)
    assert (rows // 10 == torch.arange(100)).all()
    assert len(rows.unique()) == 1000
    few = draw_rows((1, 100), 7, generator, stratified=True)
    assert set(few[0].tolist()) == set(range(7))
    random = draw_rows((1, 100), 1000, generator, stratified=False)
    assert (random // 10 != torch.arange(100)).any()
