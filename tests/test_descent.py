"""The steps of the coarse fit: what is written out against automatic differentiation, and several fits against one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from shapes import bowl, sphere, torus

from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import FitConfig, NetworkConfig, PoolConfig
from sdfserver.descent import Batches, Descent, Given, Task, terms_of
from sdfserver.errors import DivergenceError, SdfServerError, Stopped
from sdfserver.fit import FitJob, FitReport, fit, fit_together
from sdfserver.guard import HeldOut
from sdfserver.local import PartitionOfUnity
from sdfserver.sampling import draw_samples
from sdfserver.siren import Siren

NETWORK = NetworkConfig(hidden=32, layers=3, omega=10.0)
CONFIG = FitConfig(steps=100, batch_surface=120, batch_space=80, pool=PoolConfig(size=2000))
CPU = torch.device("cpu")


def unit(cloud: PointCloud) -> PointCloud:
    return PointCloud(points=Frame.around(cloud.points).to_unit(cloud.points), normals=cloud.normals)


def task(cloud: PointCloud, config: FitConfig = CONFIG, seed: int = 0, omega: float = 10.0) -> Task:
    samples = draw_samples(unit(cloud), config.pool, np.random.default_rng(seed))
    model = Siren(replace(NETWORK, omega=omega), generator=torch.Generator().manual_seed(seed))
    return Task(model=model, samples=samples, generator=torch.Generator().manual_seed(seed))


def parameters(network: Siren | PartitionOfUnity) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def descended(tasks: list[Task], config: FitConfig, steps: int) -> Descent:
    descent = Descent(tasks, config, most_at_once=steps)
    descent.draw(steps)
    for _ in range(steps):
        descent.take()
    descent.leave()
    return descent


def by_autograd(task: Task, config: FitConfig, steps: int) -> None:
    """The same steps, as slow as they are plain: the terms of `losses`, differentiated automatically."""
    batches = Batches([task.samples], config, steps)
    batches.draw(steps, [task.generator])
    model = task.model
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, config.beta2))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = config.rate(step)
        batch = batches.pick(torch.tensor([step]))
        if step < config.warm_start_steps:
            given = Given(batch, model(batch.x), None)
        else:
            given = Given(batch, *model.value_and_gradient(batch.x))
        optimizer.zero_grad()
        task.weights(config).total(terms_of(given, task, config)).backward()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"warm_start_share": 0.0, "quadratic_noises": 0.0},
        {"warm_start_share": 0.02, "clip_norm": 1.0},
        {"warm_start_share": 0.0, "untrusted_share": 1.0, "alpha": 30.0},
    ],
)
def test_steps_are_those_of_automatic_differentiation(change: dict[str, float]) -> None:
    config = replace(CONFIG, **change)
    # An open surface has samples whose sign is not trusted; noise makes the surface term quadratic near the points.
    cloud = bowl(800)
    noisy = PointCloud(
        points=cloud.points + np.random.default_rng(0).normal(scale=0.01, size=cloud.points.shape),
        normals=cloud.normals,
    )
    ours, plain = task(noisy, config), task(noisy, config)
    before = parameters(plain.model)
    steps = 6
    descended([ours], config, steps)
    by_autograd(plain, config, steps)
    moved = (parameters(plain.model) - before).norm()
    assert moved > 0.01
    assert (parameters(ours.model) - parameters(plain.model)).norm() < 2e-3 * moved


def test_steps_of_several_fits_together_are_those_of_each_alone() -> None:
    clouds = [sphere(300), torus(900), bowl(500)]

    def tasks() -> list[Task]:
        return [task(cloud, seed=i, omega=8.0 + i) for i, cloud in enumerate(clouds)]

    # Few enough for rounding not to grow: a sign that flips at phi = 0 is a whole step of Adam's.
    config, steps = replace(CONFIG, steps=40), 12
    together, alone = tasks(), tasks()
    before = [parameters(one.model) for one in alone]
    looks = descended(together, config, steps).look()
    for i, one in enumerate(alone):
        ((terms, health),) = descended([one], config, steps).look()
        assert looks[i][0] == pytest.approx(terms, rel=1e-3, abs=1e-5)
        assert vars(looks[i][1]) == pytest.approx(vars(health), rel=1e-3, abs=2e-3)
        moved = (parameters(one.model) - before[i]).norm()
        assert (parameters(together[i].model) - parameters(one.model)).norm() < 2e-3 * moved


def test_a_fit_that_goes_back_alone_goes_on_from_where_it_was_saved() -> None:
    config = replace(CONFIG, steps=60)
    tasks = [task(sphere(300)), task(torus(300))]
    descent = Descent(tasks, config, most_at_once=20)
    for saved in (True, False):
        descent.draw(20)
        for _ in range(20):
            descent.take()
        if saved:
            descent.save([1])
            descent.leave()
            kept = parameters(tasks[1].model)
    again = descent.alone(1, rate=0.5)
    assert again.step == 20
    assert torch.equal(parameters(tasks[1].model), kept)
    again.draw(20)
    again.take()
    again.leave()
    first = (parameters(tasks[1].model) - kept).abs().max()
    # Half the rate, and the moments of before: no first step of Adam's, which has the rate's size everywhere.
    assert 0 < first < config.rate(20)


@pytest.fixture(scope="module")
def fits() -> list[tuple[Siren | PartitionOfUnity, FitReport] | SdfServerError]:
    stop = iter([False] * 30 + [True] * 1000)
    hopeless = sphere(600)
    turned = np.random.default_rng(0).integers(0, 2, (600, 1)) * 2 - 1
    assert hopeless.normals is not None
    jobs = [
        FitJob(cloud_unit=unit(sphere(600)), seed=0),
        FitJob(cloud_unit=unit(torus(600)), should_stop=lambda: next(stop)),
        FitJob(cloud_unit=unit(PointCloud(points=hopeless.points, normals=hopeless.normals * turned))),
        FitJob(cloud_unit=unit(torus(800)), seed=3),
    ]
    return fit_together(jobs, NETWORK, replace(CONFIG, learning_rate=2e-3), device=CPU)


def test_each_of_several_jobs_ends_as_it_would_alone(
    fits: list[tuple[Siren | PartitionOfUnity, FitReport] | SdfServerError],
) -> None:
    config = replace(CONFIG, learning_rate=2e-3)
    for found, cloud, seed in ((fits[0], sphere(600), 0), (fits[3], torus(800), 3)):
        assert not isinstance(found, Exception)
        _, alone = fit(unit(cloud), NETWORK, config, device=CPU, seed=seed)
        assert found[1].health.surface == pytest.approx(alone.health.surface, rel=0.05)
        assert found[1].losses == pytest.approx(alone.losses, rel=0.05)


def test_a_job_that_is_stopped_or_fails_takes_none_of_the_others_with_it(
    fits: list[tuple[Siren | PartitionOfUnity, FitReport] | SdfServerError],
) -> None:
    assert isinstance(fits[1], Stopped)
    assert "step 30 of 100" in str(fits[1])
    assert isinstance(fits[2], DivergenceError)


def test_fits_that_the_memory_does_not_hold_together_go_down_in_halves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clouds = [sphere(300), torus(300), bowl(300), sphere(500), torus(500)]
    jobs = [FitJob(cloud_unit=unit(cloud), seed=i) for i, cloud in enumerate(clouds)]
    expected = fit_together(jobs, NETWORK, CONFIG, device=CPU)
    sizes = []
    take = Descent.take

    def crowded(self: Descent) -> None:
        if self.step == 30:
            sizes.append(len(self.tasks))
            if len(self.tasks) > 2:
                raise torch.OutOfMemoryError("no room for 5")
        take(self)

    monkeypatch.setattr(Descent, "take", crowded)
    found = fit_together(jobs, NETWORK, CONFIG, device=CPU)
    assert sizes == [5, 2, 3, 1, 2]
    assert "5 at a time are more than the device's memory holds; 2 are tried" in caplog.text
    for now, then in zip(found, expected, strict=True):
        assert not isinstance(now, Exception)
        assert not isinstance(then, Exception)
        # From the same beginning, with the same batches: nothing of the first attempt is left.
        assert now[1].losses == pytest.approx(then[1].losses, rel=0.05)
        assert now[1].health.surface == pytest.approx(then[1].health.surface, rel=0.05)


def test_a_single_fit_that_the_memory_does_not_hold_fails_and_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take = Descent.take

    def crowded(self: Descent) -> None:
        if any(len(task.samples.points) > 400 for task in self.tasks):
            raise torch.OutOfMemoryError("no room")
        take(self)

    monkeypatch.setattr(Descent, "take", crowded)
    jobs = [FitJob(cloud_unit=unit(sphere(n))) for n in (300, 600, 350)]
    found = fit_together(jobs, NETWORK, CONFIG, device=CPU)
    # All that could not be parted from it fail with it, and no more.
    assert isinstance(found[0], tuple)
    assert isinstance(found[1], torch.OutOfMemoryError)
    assert isinstance(found[2], tuple)


def test_what_is_held_out_of_clouds_of_different_sizes_is_looked_at_as_for_each_alone() -> None:
    several = [task(sphere(200)).samples, task(torus(3000)).samples]
    together = HeldOut(several)
    assert together.x.ndim == 3

    def field(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x * torch.tensor([1.0, -0.5, 0.3])).sum(dim=-1).sin(), x.cos()

    looks = together.look(*field(together.x))
    for samples, row in zip(several, looks, strict=True):
        held = HeldOut([samples])
        assert torch.allclose(held.look(*field(held.x)), row, atol=1e-6)
