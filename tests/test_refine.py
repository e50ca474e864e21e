"""The second stage: where it puts cells, that it gains where there is something to gain, and that it never harms."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from shapes import rippled_sphere, sphere

import sdfserver.refine as refine_module
from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import FitConfig, LocalConfig, NetworkConfig, PoolConfig
from sdfserver.errors import Stopped
from sdfserver.fit import FitProgress, FitReport, fit
from sdfserver.local import LocalSirens, PartitionOfUnity
from sdfserver.refine import plan_cells, refine
from sdfserver.sampling import Samples, draw_samples
from sdfserver.siren import Siren

COARSE = NetworkConfig(hidden=48, layers=3, omega=10.0)
STAGE_ONE = FitConfig(steps=200, learning_rate=2e-3, batch_surface=300, batch_space=300, pool=PoolConfig(size=3000))
LOCAL = LocalConfig(points_per_cell=80, steps=80, pool=128, batch_space=16)
CPU = torch.device("cpu")


def unit(cloud: PointCloud) -> PointCloud:
    return PointCloud(points=Frame.around(cloud.points).to_unit(cloud.points), normals=cloud.normals)


def samples_of(cloud: PointCloud) -> Samples:
    return draw_samples(unit(cloud), STAGE_ONE.pool, np.random.default_rng(0))


def run(cloud: PointCloud, local: LocalConfig | None = LOCAL, **options: object) -> tuple[torch.nn.Module, FitReport]:
    return fit(unit(cloud), COARSE, STAGE_ONE, local=local, device=CPU, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clean() -> PointCloud:
    return rippled_sphere(8000)


@pytest.fixture(scope="module")
def coarse(clean: PointCloud) -> Siren:
    network, _ = run(clean, None)
    assert isinstance(network, Siren)
    return network.requires_grad_(False)


def error(network: torch.nn.Module, cloud: PointCloud) -> float:
    """Mean |phi| at points of `cloud` that no fit has seen."""
    with torch.no_grad():
        return float(network(torch.tensor(unit(cloud).points, dtype=torch.float32)).abs().mean())


def state(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in network.state_dict().values()])


def test_detail_that_the_coarse_network_cannot_show_is_added(clean: PointCloud, coarse: Siren) -> None:
    fitted, report = refine(coarse, samples_of(clean), LOCAL)
    assert isinstance(fitted, PartitionOfUnity)
    unseen = rippled_sphere(4000, seed=7)
    assert error(fitted, unseen) < 0.35 * error(coarse, unseen)
    assert report.after < 0.4 * report.before
    assert report.kept > 0.9 * report.tried


def test_local_networks_draw_no_sheets_of_their_own(clean: PointCloud, coarse: Siren) -> None:
    fitted, _ = refine(coarse, samples_of(clean), LOCAL)
    x = torch.rand((20_000, 3), generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        expected, found = coarse(x), fitted(x)
    off = expected.abs() > 0.05
    assert (expected[off] * found[off] > 0).all()


def test_normals_turn_no_faster_at_the_borders_of_cells_than_elsewhere(clean: PointCloud, coarse: Siren) -> None:
    """No seam: over a fiftieth of a cell's width the direction of the gradient changes as it does inside cells."""
    fitted, _ = refine(coarse, samples_of(clean), LOCAL)
    assert isinstance(fitted, PartitionOfUnity)
    (grid,) = {level.grid for level in fitted.levels}
    surface = torch.tensor(unit(rippled_sphere(20_000, seed=5)).points, dtype=torch.float32)

    def turns(x: torch.Tensor) -> torch.Tensor:
        step = grid.width / 50
        ahead, behind = (
            torch.nn.functional.normalize(fitted.value_and_gradient(x + torch.tensor([s * step, 0, 0]))[1], dim=1)
            for s in (0.5, -0.5)
        )
        return (ahead - behind).norm(dim=1)

    across = ((surface[:, 0] + 1) / grid.width + 0.5).frac() - 0.5  # from the nearest border, in widths
    edge = grid.margin / 2
    at_border = (across.abs() < 0.02) | ((across.abs() - edge).abs() < 0.02)
    inside = across.abs() > edge + 0.1
    for share in (0.5, 0.95, 0.99):
        assert turns(surface[at_border]).quantile(share) < 1.6 * turns(surface[inside]).quantile(share)


def test_noise_gets_no_networks(coarse: Siren) -> None:
    noisy = rippled_sphere(8000, height=0.0, noise=0.02)
    network, report = run(noisy)
    assert isinstance(network, Siren)
    assert report.local is not None
    assert report.local.kept == 0
    assert report.steps == STAGE_ONE.steps


def test_what_is_worse_on_held_out_points_is_not_kept(clean: PointCloud, coarse: Siren) -> None:
    """Normals that point anywhere: the networks learn the noise, and every cell stays the coarse field's."""
    samples = samples_of(clean)
    wild = torch.randn(samples.whole_normals.shape, generator=torch.Generator().manual_seed(0))
    normals = samples.whole_normals + 2 * wild
    spoilt = replace(samples, whole_normals=normals / normals.norm(dim=1, keepdim=True))
    fitted, report = refine(coarse, spoilt, replace(LOCAL, worth=0.01))
    assert report.tried > 0
    assert report.kept == 0
    assert fitted is coarse


def test_a_network_that_is_not_finite_leaves_its_cell_to_the_coarse_field(
    clean: PointCloud, coarse: Siren, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(sirens: LocalSirens, space: torch.Tensor, target: torch.Tensor) -> None:
        begin(sirens, space, target)
        with torch.no_grad():
            sirens.linear[::2] = torch.nan

    begin: Callable[..., None] = refine_module._start_as_planes
    monkeypatch.setattr(refine_module, "_start_as_planes", start)
    fitted, report = refine(coarse, samples_of(clean), LOCAL)
    assert isinstance(fitted, PartitionOfUnity)
    assert 0.3 * report.tried < report.kept <= 0.5 * report.tried + 1
    assert torch.isfinite(state(fitted)).all()
    assert error(fitted, clean) < error(coarse, clean)


def test_the_same_seed_gives_the_same_networks_to_the_bit(clean: PointCloud) -> None:
    first, again, other = (state(run(clean, seed=seed)[0]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_progress_never_falls_and_ends_at_one(clean: PointCloud) -> None:
    seen: list[FitProgress] = []
    run(clean, on_progress=seen.append)
    shares = [progress.share for progress in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert len(set(shares)) > 5


def test_a_clean_cloud_gets_a_shorter_first_stage_and_the_rest_where_that_was_wrong(
    clean: PointCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = replace(LOCAL, clean_side=2, clean_unit=1.0)
    _, short = run(clean, eager)
    assert short.steps == STAGE_ONE.steps // 2
    monkeypatch.setattr(refine_module, "MAX_WRONG_SIGNS", -1.0)  # refuses all
    network, whole = run(clean, eager)
    assert isinstance(network, Siren)
    assert whole.steps == STAGE_ONE.steps
    assert error(network, clean) < 2 * error(run(clean, None)[0], clean)


def test_a_stop_is_heard_in_the_second_stage(clean: PointCloud, coarse: Siren) -> None:
    asked = iter([False] * 5 + [True])
    with pytest.raises(Stopped, match="local fits"):
        refine(coarse, samples_of(clean), LOCAL, should_stop=lambda: next(asked))


def test_cells_follow_the_density_of_the_points() -> None:
    rng = np.random.default_rng(0)
    even = rng.random((20_000, 3)) * 1.8 - 0.9
    even[:, 2] = 0
    spacing = torch.full((len(even),), 1.8 / np.sqrt(len(even)))
    (only,) = plan_cells(torch.tensor(even, dtype=torch.float32), spacing, LOCAL)
    assert only[0].width == pytest.approx(float(spacing[0]) * np.sqrt(80), rel=0.3)
    assert 0.81 * only[0].side ** 2 <= len(only[1]) <= only[0].side ** 2

    finer = torch.where(torch.tensor(even[:, 0] > 0), spacing / 4, spacing)
    levels = plan_cells(torch.tensor(even, dtype=torch.float32), finer, LOCAL)
    sides = [grid.side for grid, _ in levels]
    assert sides == sorted(sides)
    assert sides[-1] == 4 * sides[0]
    wide, narrow = levels[0][0].centres(levels[0][1]), levels[-1][0].centres(levels[-1][1])
    assert wide[:, 0].max() < 0.1 < narrow[:, 0].max()


def test_cells_are_wider_where_there_would_be_too_many() -> None:
    samples = samples_of(sphere(20_000))
    few = replace(LOCAL, most_cells=60)
    many, some = (sum(len(cells) for _, cells in plan_cells(samples.points, samples.spacings, c)) for c in (LOCAL, few))
    assert many > 150
    assert 20 < some < 120
