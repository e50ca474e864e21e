"""What `sdfserver bench` counts and prints; no time is asserted."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from sdfserver import bench
from sdfserver.bench import (
    PARTS,
    Rates,
    evaluation_flops,
    measured_rates,
    preset_work,
    products,
    run,
    run_command,
    step_flops,
)
from sdfserver.cli import main
from sdfserver.config import PRESETS, MeshConfig, NetworkConfig, Preset
from sdfserver.errors import CommandError, DivergenceError
from sdfserver.io import read_cloud
from sdfserver.samples import sample
from sdfserver.siren import Siren


def counted(network: NetworkConfig, samples: int, *, gradient: bool) -> int:
    """The operations that PyTorch itself counts in a step."""
    from torch.utils.flop_counter import FlopCounterMode

    siren, x = Siren(network), torch.rand(samples, 3)
    with FlopCounterMode(display=False) as counter:
        if gradient:
            phi, slope = siren.value_and_gradient(x)
            (phi.sum() + slope.sum()).backward()  # type: ignore[no-untyped-call]
        else:
            siren(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("gradient", [True, False])
def test_the_operations_of_a_step_are_those_that_pytorch_counts(gradient: bool) -> None:
    network = NetworkConfig(hidden=64, layers=3)
    ours = step_flops(network, 100, gradient=gradient)
    # The first layer passes nothing back to the points, and the last one has no adjoint product.
    assert counted(network, 100, gradient=gradient) == pytest.approx(ours, rel=0.05)


def test_an_evaluation_takes_one_pass_and_its_gradient_another() -> None:
    network = NetworkConfig(hidden=10, layers=2)
    assert products(network) == 30 + 100 + 10
    assert evaluation_flops(network, 7, 0) == 2 * 140 * 7
    assert evaluation_flops(network, 0, 7) == 2 * 2 * 140 * 7


def test_the_published_recipe_has_the_most_to_do() -> None:
    flops = {name: preset_work(preset)[0] for name, preset in PRESETS.items()}
    assert flops["draft"] < flops["standard"] < flops["fine"] < flops["paper"]


def test_rates_are_those_of_this_machine() -> None:
    rates = measured_rates(torch.device("cpu"), seconds=0.01)
    assert isinstance(rates, Rates)
    assert rates.device == "cpu"
    assert min(rates.float32, rates.bfloat16, rates.copy) > 1e6


COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"


def test_a_failing_command_is_named_with_its_last_words(tmp_path: Path) -> None:
    broken = f"{sys.executable} -c 'raise SystemExit(\"no licence\")' {{cloud}} {{mesh}}"
    with pytest.raises(CommandError, match=r"other failed with exit code 1 on knot\.ply: no licence"):
        run_command("other", broken, sample("knot"))
    with pytest.raises(CommandError, match="other cannot be started: No such file or directory"):
        run_command("other", f"{tmp_path}/nothing {{cloud}} {{mesh}}", sample("knot"))


def test_bench_measures_stages_errors_and_another_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(PRESETS["draft"], fit=replace(PRESETS["draft"].fit, steps=150), mesh=MeshConfig(resolution=64))
    monkeypatch.setitem(cast(dict[str, Preset], PRESETS), "draft", short)
    mesh, figures = tmp_path / "truth.ply", tmp_path / "figures.json"
    assert main(["reconstruct", str(sample("bracket")), "-o", str(mesh), "--preset", "draft", "--quiet"]) == 0
    copy = f"{sys.executable} -c '{COPY}' {mesh} {{mesh}} {{cloud}}"
    monkeypatch.setattr("sdfserver.bench.own_command", lambda *_, **__: copy)
    options = ["--preset", "draft", "--reference", str(mesh), "--beside", f"copy={copy}", "--json", str(figures)]
    assert main(["bench", str(sample("bracket")), *options]) == 0
    found = json.loads(figures.read_text())
    (run,) = found["runs"]
    stages = {stage["name"]: stage for stage in run["stages"]}
    assert run["steps"] == 150
    assert run["distances"]["chamfer"] < 1e-5
    assert run["seconds"] == pytest.approx(sum(s["seconds"] for s in stages.values() if s["name"] not in PARTS))
    for name in ("read", "winding number", "k-d trees", "coarse fit", "mesh", "write"):
        assert 0 < stages[name]["floor"] < stages[name]["seconds"], name
    assert [(one["name"], one["distances"]["chamfer"] < 1e-9) for one in found["commands"]] == [
        ("draft", True),
        ("copy", True),
    ]
    shown = capsys.readouterr().out
    assert "GFLOP/s" in shown
    assert "winding number" in shown


@pytest.fixture
def tiny_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published recipe with a small network and mesh, and no judge of the shape that it has after some steps."""
    tiny = replace(PRESETS["paper"], network=NetworkConfig(hidden=32, layers=2), mesh=MeshConfig(resolution=32))
    monkeypatch.setitem(cast(dict[str, Preset], PRESETS), "paper", tiny)
    monkeypatch.setattr("sdfserver.guard.MAX_WRONG_SIDES", 1.0)


@pytest.mark.usefixtures("tiny_paper")
def test_the_published_recipe_gets_the_steps_that_fit_into_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdfserver.bench._seconds_a_step", lambda *_: 0.01)
    rates = Rates(device="cpu", threads=1, float32=1e9, bfloat16=1e9, copy=1e9)
    assert run(sample("knot"), "paper", rates, seed=0, device="cpu", budget_s=0.301).steps == 30


@pytest.mark.usefixtures("tiny_paper")
def test_the_seconds_of_a_step_are_told_by_some_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdfserver.bench.TRIAL_STEPS", 3)
    settings = {"preset": "paper", "device": "cpu", "seed": 0}
    start = time.perf_counter()
    seconds = bench._seconds_a_step(read_cloud(sample("knot")), settings)
    assert 0 < 3 * seconds < time.perf_counter() - start


def test_a_preset_that_finds_no_surface_does_not_end_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise DivergenceError("the fit diverged")

    monkeypatch.setattr("sdfserver.bench.reconstruct", refused)
    figures = tmp_path / "figures.json"
    assert main(["bench", "--preset", "draft", "--preset", "standard", "--json", str(figures)]) == 0
    assert "knot, standard: no surface; the fit diverged" in capsys.readouterr().out
    assert json.loads(figures.read_text())["runs"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "best"], "there is no preset 'best'; use one of draft, standard, fine, paper"),
        (["--beside", "poisson"], "--beside is 'poisson'; it must be NAME=COMMAND, with {cloud} and {mesh}"),
        (["a.ply", "b.ply", "--reference", "c.ply"], "--reference is the surface of one cloud"),
        (["nothing.ply"], "nothing.ply does not exist; check the path"),
        (["--reference", "README.md"], "the reference README.md cannot be read as a mesh"),
        (["--reference", "data/knot.ply"], "the reference data/knot.ply cannot be read as a mesh"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
