"""The networks that are set against each other, the way they are fitted, and the page of them."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import sphere
from torch import Tensor, nn
from web.conftest import ARGUMENTS, CHROMIUM

from sdfserver.cli import main
from sdfserver.compare.choices import DEFAULT, Budget, Choice, choices_named
from sdfserver.compare.networks import (
    KINDS,
    Encoding,
    NetworkField,
    encoding_named,
    laplacian,
    network_named,
    spread_rotations,
    value_and_gradient,
)
from sdfserver.compare.page import slice_picture
from sdfserver.compare.run import Settings, compare, from_discs
from sdfserver.compare.trainer import train
from sdfserver.config import FitConfig, NetworkConfig, PoolConfig
from sdfserver.errors import ConfigError, Stopped
from sdfserver.io import write_ply
from sdfserver.sampling import Samples, draw_samples
from sdfserver.siren import Siren

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage

EVERY = choices_named(DEFAULT)
FIT = FitConfig(batch_surface=128, batch_space=128, pool=PoolConfig(size=2000))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def network(choice: Choice, *, hidden: int = 24, layers: int = 3) -> nn.Module:
    return network_named(
        choice.name, encoding=choice.encoding, hidden=hidden, layers=layers, omega=10.0, generator=generator()
    )


def points(n: int = 200) -> Tensor:
    return torch.rand((n, 3), generator=generator()) * 2 - 1


@pytest.fixture(scope="module")
def samples() -> Samples:
    return draw_samples(sphere(1000, radius=0.7), FIT.pool, np.random.default_rng(0))


def test_all_that_the_literature_sets_against_each_other_is_there() -> None:
    assert len(EVERY) == 19
    assert {choice.name for choice in EVERY} == {"siren", *KINDS}
    for choice in EVERY:
        if choice.name not in ("siren", "snake", "sine"):
            assert {c.encoding for c in EVERY if c.name == choice.name} == {"none", "pe"}


@pytest.mark.parametrize("choice", EVERY, ids=lambda choice: choice.written)
def test_each_gives_a_value_a_point_and_the_gradient_of_it(choice: Choice) -> None:
    net, x = network(choice).double(), points().double()
    phi, gradient = value_and_gradient(net, x)
    assert (phi.shape, gradient.shape) == ((200,), (200, 3))
    assert torch.isfinite(phi).all()
    assert torch.isfinite(gradient).all()
    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        slopes = torch.stack([(net(x + e) - net(x - e)) / 2e-6 for e in step], dim=1)
    # A point beside a crease sees both sides of it.
    assert ((slopes - gradient).abs().amax(dim=1) < 1e-5 * (1 + gradient.abs().amax())).float().mean() > 0.98


@pytest.mark.parametrize("choice", EVERY, ids=lambda choice: choice.written)
def test_a_loss_on_the_gradient_reaches_every_weight(choice: Choice) -> None:
    net = network(choice)
    _, gradient = value_and_gradient(net, points(), keep=True)
    gradient.square().sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in net.named_parameters():
        # What is added last moves no gradient; nor do the biases where all is made of pieces of planes.
        if "bias" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["relu", "leaky"])
def test_second_derivatives_of_planes_are_nothing(name: str) -> None:
    _, gradient, bent = laplacian(network(Choice(name=name)), points())
    assert gradient.abs().max() > 0
    assert (bent == 0).all()


@pytest.mark.parametrize("written", ["siren", "snake", "sine+rotated", "sine", "tanh", "swish", "gelu", "softplus"])
def test_second_derivatives_of_smooth_networks_are_those_of_differences(written: str) -> None:
    (choice,) = choices_named(written)
    # A softplus as sharp as ours is nearly one of planes: its bends are narrower than a difference of 1e-3.
    net, x = network(choice).double(), points(50).double()
    h = 1e-4
    with torch.no_grad():
        found = sum((net(x + e) - 2 * net(x) + net(x - e)) / h**2 for e in h * torch.eye(3, dtype=torch.float64))
    bent = laplacian(net, x)[2]
    assert isinstance(found, Tensor)
    assert bent.abs().max() > 1e-3
    torch.testing.assert_close(bent.detach(), found, rtol=1e-2, atol=1e-3 * float(found.abs().max()))


def test_siren_is_the_network_of_the_fits() -> None:
    net = network_named("siren", hidden=16, layers=2, omega=20.0, generator=generator())
    assert type(net) is Siren
    own = Siren(NetworkConfig(hidden=16, layers=2, omega=20.0), generator=generator())
    x = points()
    torch.testing.assert_close(net(x), own(x), rtol=0, atol=0)
    torch.testing.assert_close(value_and_gradient(net, x)[1], own.value_and_gradient(x)[1], rtol=1e-4, atol=1e-5)


def test_snake_is_the_identity_with_ripples_whose_frequency_is_learned() -> None:
    snake = KINDS["snake"].make(4)
    z = torch.linspace(-3, 3, 4).expand(7, 4)
    with torch.no_grad():
        dict(snake.named_parameters())["a"].copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    for j, a in enumerate((0.5, 1.0, 2.0, 4.0)):
        expected = z[:, j] + torch.sin(a * z[:, j]) ** 2 / a
        torch.testing.assert_close(snake(z)[:, j].detach(), expected)
    assert [name for name, _ in network(Choice(name="snake")).named_parameters() if name.endswith(".a")]


def test_the_self_normalising_sine_keeps_its_statistics_from_layer_to_layer() -> None:
    """What goes into a layer has mean 0 and variance 1, what comes out a mean square of 1, and so have the slopes."""
    net = network_named("sine", encoding="rotated", hidden=256, layers=8, generator=generator())
    into: list[Tensor] = []
    out: list[Tensor] = []
    slopes: list[Tensor] = []
    for activation in net.get_submodule("activations").children():

        def keep(_module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
            into.append(given[0])
            out.append(result)
            slopes.append(given[0].cos() - given[0].sin())

        activation.register_forward_hook(keep)
    with torch.no_grad():
        net(points(4000))
    assert len(into) == 8
    for z, h, slope in zip(into, out, slopes, strict=True):
        assert abs(float(z.mean())) < 0.1
        assert float(z.var()) == pytest.approx(1, abs=0.1)
        assert float(h.square().mean()) == pytest.approx(1, abs=0.1)
        assert float(slope.square().mean()) == pytest.approx(1, abs=0.1)
        # For a normal z the mean of sin z + cos z is that of the cosine.
        assert float(h.mean()) == pytest.approx(math.exp(-0.5), abs=0.1)


@pytest.mark.parametrize("name", ["selu", "relu", "leaky", "snake"])
def test_the_others_neither_fade_nor_grow_through_ten_layers(name: str) -> None:
    net = network_named(name, hidden=256, layers=10, generator=generator())
    squares: list[float] = []
    for activation in net.get_submodule("activations").children():
        activation.register_forward_hook(lambda _module, _given, h: squares.append(float(h.square().mean())))
    with torch.no_grad():
        # Three coordinates of mean square 1/3: the first layer's own statistics are those of its input.
        net(points(2000))
    assert squares[0] / 8 < squares[-1] < squares[0] * 8


def test_rotations_are_rotations() -> None:
    rotations = spread_rotations().double()
    assert rotations.shape == (5, 3, 3)
    torch.testing.assert_close(
        rotations @ rotations.mT, torch.eye(3, dtype=torch.float64).expand(5, 3, 3), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(rotations[0], torch.eye(3, dtype=torch.float64))


def test_rotated_axes_are_spread_as_evenly_as_those_of_an_icosahedron() -> None:
    axes = spread_rotations().double().reshape(15, 3)
    cosines = (axes @ axes.T).abs() - torch.eye(15, dtype=torch.float64)
    assert math.degrees(math.acos(float(cosines.max()))) == pytest.approx(36, abs=0.01)
    u = torch.nn.functional.normalize(torch.randn(500, 3, generator=generator(), dtype=torch.float64), dim=1)
    # In any direction: the second and fourth moments of a sphere.
    np.testing.assert_allclose((u @ axes.T).square().mean(dim=1), 1 / 3, atol=1e-6)
    np.testing.assert_allclose((u @ axes.T).pow(4).mean(dim=1), 1 / 5, atol=1e-6)
    single = (u @ torch.eye(3, dtype=torch.float64)).pow(4).mean(dim=1)
    # A single copy of the axes: 1/3 along one of them, 1/9 between all three.
    assert single.max() - single.min() > 0.2


def test_encodings_are_waves_of_doubling_frequency() -> None:
    x = points()
    pe, rotated = encoding_named("pe", 3), encoding_named("rotated", 3)
    assert isinstance(pe, Encoding)
    assert isinstance(rotated, Encoding)
    assert encoding_named("none") is None
    found = pe(x)
    assert found.shape == (200, pe.width) == (200, 3 + 2 * 9)
    expected = torch.cat([x, *(torch.sin(math.pi * 2**k * x) for k in range(3))], dim=1)
    torch.testing.assert_close(found[:, :12], expected, atol=1e-5, rtol=1e-4)
    assert rotated(x).shape == (200, rotated.width) == (200, 2 * 15 * 3)
    torch.testing.assert_close(rotated(x).square().mean(dim=1), torch.ones(200))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("sin", "there is no network 'sin'; use one of siren, snake"),
        ("relu+fourier", "there is no encoding 'fourier'; use one of none, pe, rotated"),
        ("siren+pe", "siren takes no encoding, but was given 'pe'"),
        ("relu,relu", "name each once"),
    ],
)
def test_other_names_are_refused(written: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        choices_named(written)


@pytest.mark.parametrize("budget", [{}, {"steps": 1, "seconds": 1.0}, {"steps": 0}, {"seconds": math.inf}])
def test_a_budget_is_of_one_kind(budget: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"steps|seconds"):
        Budget(**budget)


def test_a_fit_lowers_the_loss_and_is_the_same_again(samples: Samples) -> None:
    def once() -> tuple[list[float], Tensor]:
        net = network(Choice(name="siren"))
        trained = train(net, samples, FIT, Budget(steps=60), seed=3)
        assert trained.steps == 60
        return [look.loss for look in trained.looks], net(points())

    (losses, phi), (again, phi_again) = once(), once()
    assert losses == again
    torch.testing.assert_close(phi, phi_again, rtol=0, atol=0)
    assert losses[-1] < 0.5 * losses[0]


def test_its_steps_are_those_of_the_fit(samples: Samples) -> None:
    """One step by automatic differentiation is one step written out (`descent`)."""
    from sdfserver.descent import Descent, Task

    config = FitConfig(steps=1, batch_surface=128, batch_space=128, pool=FIT.pool, warm_start_share=0.0)
    ours, theirs = network(Choice(name="siren")), network(Choice(name="siren"))
    assert isinstance(theirs, Siren)
    train(ours, samples, config, Budget(steps=1), seed=0)
    # Batches are drawn 25 at a time, and the first of as many is taken.
    descent = Descent([Task(model=theirs, samples=samples, generator=generator())], config, most_at_once=25)
    descent.draw(25)
    descent.take()
    descent.leave()
    start = network(Choice(name="siren"))
    for mine, other, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        moved = (other - before).abs().max()
        # Adam's first step is the sign of the derivative, which rounding turns where that is next to nothing.
        same = ((mine - other).abs() < 0.01 * moved).float().mean()
        assert same > 0.99


def test_seconds_end_a_fit_as_well(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0, 1e6, 0.25))
    monkeypatch.setattr("sdfserver.compare.trainer.time.perf_counter", lambda: next(clock))
    trained = train(network(Choice(name="relu")), samples, FIT, Budget(seconds=5.0), seed=0)
    assert trained.steps == 20
    assert trained.seconds == 5


def test_a_fit_can_be_stopped(samples: Samples) -> None:
    with pytest.raises(Stopped, match="stopped at step 0"):
        train(network(Choice(name="relu")), samples, FIT, Budget(steps=5), seed=0, should_stop=lambda: True)


def test_discs_stand_for_the_surface_between_points() -> None:
    cloud = sphere(4000)
    normals = cloud.normals
    assert normals is not None
    on = sphere(300, seed=5).points
    assert from_discs(on, cloud.points, normals).max() < 0.01
    np.testing.assert_allclose(from_discs(1.5 * on, cloud.points, normals), 0.5, atol=0.02)


def test_a_slice_is_white_where_the_gradient_has_length_one() -> None:
    phi = np.tile(np.linspace(-1, 1, 4, dtype=np.float32), (4, 1))
    image = slice_picture(np.array([[1.0, 0, 2, 9]] * 4, dtype=np.float32), phi)
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, 1, 2] > image[0, 1, 0] + 50, "too flat is blue"
    assert image[0, 2].tolist() == [0, 0, 0], "the zero set is black"
    assert image[0, 3, 0] > image[0, 3, 2] + 50, "too steep is red"


def test_of_several_rates_the_better_one_is_kept() -> None:
    settings = Settings(budget=Budget(steps=40), hidden=16, layers=2, resolution=16, rates=(1e-9, 3e-3), fit=FIT)
    (result,) = compare(sphere(600), [Choice(name="siren")], settings, name="ball", device="cpu").results
    assert result.trained.rate == 3e-3


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    ball = sphere(1500)
    path = tmp_path / "ball.ply"
    write_ply(path, ball.points, normals=ball.normals)
    return path


def test_the_command_writes_a_page_a_picture_and_the_figures(
    cloud: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page"
    options = ["--networks", "siren,relu+pe", "--steps", "40", "--hidden", "24", "--layers", "2", "--resolution", "24"]
    assert main(["compare", str(cloud), *options, "--out", str(out), "--device", "cpu"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["compare.png", "index.html", "results.json"]
    shown, said = capsys.readouterr()
    assert "ball: 40 steps each, 2 x 24" in shown
    assert "relu+pe" in shown
    assert said == f"sdfserver: {out}: index.html, compare.png, results.json\n"
    figures = json.loads((out / "results.json").read_text())
    assert {result["network"] for result in figures["results"]} == {"siren", "relu+pe"}
    for result in figures["results"]:
        assert result["steps"] == 40
        assert len(result["looks"]) == 41
        assert result["seconds"] > 0
        assert result["errors"] is not None or result["why_no_surface"]
    with Image.open(out / "compare.png") as image:
        assert image.width > 900
    _opens(out / "index.html")


def _opens(page: Path) -> None:
    """The page, opened in a browser that reaches nothing else, without a fault."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium; on Debian: apt install chromium")
    faults: list[str] = []

    def heard(message: "ConsoleMessage") -> None:
        if message.type in ("error", "warning"):
            faults.append(message.text)

    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        tab = browser.new_page(viewport={"width": 1280, "height": 800}, offline=True)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", heard)
        tab.goto(page.as_uri())
        assert tab.locator("tbody tr").count() == tab.locator("figure").count() == tab.locator("path.curve").count()
        widths = tab.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
        assert len(widths) == 2 * tab.locator("figure").count()
        assert min(widths) >= 200
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert faults == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--networks", "siren,sin"], "there is no network 'sin'; use one of siren"),
        (["--steps", "5", "--seconds", "5"], "give a number of steps or of seconds, one of the two"),
        (["--steps", "0"], "steps is 0; it must be 1 to 1,000,000"),
        (["--rates", "fast"], "--rates is 'fast'; it must be numbers with commas between"),
        (["--rates", "-1"], "learning_rate is -1.0; it must be positive"),
        (["--hidden", "0"], "hidden is 0; it must be 1 to 4096"),
        (["--octaves", "0"], "octaves is 0; it must be 1 to 16"),
        (["--resolution", "4"], "resolution is 4; it must be 8 to"),
        (["--reference", "nothing.ply"], "nothing.ply does not exist; check the path"),
        (["--out", "README.md"], "README.md is a file; give a folder"),
        (["--out", "nowhere/page"], "there is no folder nowhere; create it"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    assert main(["compare", "data/sparse.ply", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_cloud_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "nothing.ply"]) == 2
    assert "nothing.ply does not exist; check the path" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_networks_find_a_ball_and_siren_is_among_the_closest() -> None:
    settings = Settings(budget=Budget(steps=300), hidden=64, layers=3, resolution=64)
    found = compare(sphere(3000), EVERY, settings, name="ball", device="cpu")
    assert len(found.results) == 19
    place = {result.choice.written: i for i, result in enumerate(found.results)}
    assert place["siren"] < 6
    for result in found.results:
        assert result.errors is not None, result.why
        assert result.errors.to_mesh < 3, result.choice.written
        looks = result.trained.looks
        assert looks[-1].loss < 0.6 * looks[0].loss, result.choice.written


def test_a_network_is_a_field_to_extract_from() -> None:
    field = NetworkField(network(Choice(name="tanh")))
    phi, gradient = field.value_and_gradient(points())
    torch.testing.assert_close(field.value(points()), phi)
    assert not phi.requires_grad
    assert not gradient.requires_grad
