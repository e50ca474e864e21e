"""The command line: what it accepts, what it says, how it ends. The fit itself is faked but for one test at the end."""

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

import sdfserver
from sdfserver import cli
from sdfserver.cloud import PointCloud
from sdfserver.config import PRESETS
from sdfserver.errors import (
    DEBUG,
    CloudError,
    CloudFormatError,
    ConfigError,
    DeviceError,
    DivergenceError,
    ExtractionError,
    MissingDependencyError,
    OutputError,
)
from sdfserver.io import read_cloud, read_mesh
from sdfserver.mesh import TriangleMesh
from sdfserver.metrics import mesh_health
from sdfserver.reconstruct import Progress

TETRAHEDRON = TriangleMesh(
    vertices=np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    faces=np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]),
)


class Fit:
    """Stands in for reconstruct(): remembers what it was called with, and returns a tetrahedron."""

    def __init__(self) -> None:
        self.cloud: PointCloud | None = None
        self.options: dict[str, Any] = {}
        self.during: Callable[[dict[str, Any]], object] = lambda options: None
        self.volume = 1.0
        self.warnings: list[str] = []

    def __call__(self, cloud: PointCloud, **options: Any) -> SimpleNamespace:
        self.cloud, self.options = cloud, options
        self.during(options)
        report = {
            "cloud": {"points": len(cloud.points), "strays_dropped": 2},
            "mesh": {"vertices": 4, "faces": 4, "watertight": True, "components": 1, "genus": 0, "volume": self.volume},
            "input_to_mesh": {"mean": 0.00123, "max": 0.5},
            "fit": {"losses": {"eikonal": float("nan")}},
            "seconds": {"total": 1.0},
            "warnings": self.warnings,
        }
        field = SimpleNamespace(save=lambda path: Path(path).write_bytes(b"a field"))
        return SimpleNamespace(mesh=TETRAHEDRON, field=field, report=report)


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Fit:
    fake = Fit()
    monkeypatch.setattr("sdfserver.reconstruct.reconstruct", fake)
    return fake


@pytest.fixture
def knot(data: Path) -> str:
    return str(data / "knot.ply")


def one_line(text: str) -> str:
    """`text`, which must be one line of the command's."""
    assert text.count("\n") == 1
    assert text.startswith("sdfserver: ")
    assert text.endswith("\n")
    return text


def test_it_writes_the_mesh_the_field_and_the_report(
    fit: Fit, knot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh, field, report = tmp_path / "a.ply", tmp_path / "a.safetensors", tmp_path / "a.json"
    assert cli.main(["reconstruct", knot, "-o", str(mesh), "--field", str(field), "--report", str(report)]) == 0
    assert np.array_equal(read_mesh(mesh).faces, TETRAHEDRON.faces)
    assert field.read_bytes() == b"a field"
    assert json.loads(report.read_text())["cloud"] == {"points": 10_000, "strays_dropped": 2, "outliers_removed": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.ply", "a.safetensors"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "4 faces, watertight, genus 0; the points lie 0.00123 from it" in one_line(err)
    assert "2 far strays left out" in err
    assert "hollow" not in err


def test_a_hollow_is_called_one(fit: Fit, knot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit.volume = -1.0
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply")]) == 0
    assert "; a hollow seen from inside, for the normals face it; " in one_line(capsys.readouterr().err)


def test_warnings_are_lines_of_their_own_and_quiet_silences_them(
    fit: Fit, knot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit.warnings = ["thin: 94% of the points lie on walls", "open_surface: the surface is open"]
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[1:] == [f"sdfserver: warning: {warning}" for warning in fit.warnings]
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "b.ply"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_the_cloud_arrives_as_the_file_has_it(fit: Fit, knot: str, tmp_path: Path) -> None:
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply")]) == 0
    expected = read_cloud(knot)
    assert np.array_equal(fit.cloud.points, expected.points)
    assert np.array_equal(fit.cloud.normals, expected.normals)


def test_defaults_are_those_of_the_standard_preset(fit: Fit, knot: str, tmp_path: Path) -> None:
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply")]) == 0
    assert fit.options["preset"] == "standard"
    assert fit.options["device"] == "auto"
    assert fit.options["seed"] == 0
    assert fit.options["mesh"] == PRESETS["standard"].mesh


def test_every_option_reaches_the_fit(fit: Fit, knot: str, tmp_path: Path) -> None:
    options = (
        "--preset fine --device cpu --seed 7 --resolution 64 --level -0.5 --trim 0.25 --min-component 0.1 --faces 9"
    )
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.obj"), *options.split()]) == 0
    assert {name: fit.options[name] for name in ("preset", "device", "seed")} == {
        "preset": "fine",
        "device": "cpu",
        "seed": 7,
    }
    mesh = fit.options["mesh"]
    assert (mesh.resolution, mesh.level_world, mesh.trim_distance_world) == (64, -0.5, 0.25)
    assert (mesh.min_component_share, mesh.target_faces) == (0.1, 9)


def test_a_shell_reaches_the_fit(fit: Fit, knot: str, tmp_path: Path) -> None:
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.stl"), "--level", "1", "--shell", "0.5"]) == 0
    assert (fit.options["mesh"].level_world, fit.options["mesh"].shell_world) == (1, 0.5)


def test_sharp_edges_can_be_asked_for(fit: Fit, knot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply"), "--sharp"]) == 0
    assert fit.options["mesh"].sharp
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply"), "--sharp", "--level", "0.1"]) == 2
    assert "sharp needs level 0" in capsys.readouterr().err


def test_an_automatic_resolution_can_be_asked_for(fit: Fit, knot: str, tmp_path: Path) -> None:
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply"), "--resolution", "auto"]) == 0
    assert fit.options["mesh"].resolution == "auto"


def test_a_work_dir_has_the_cloud_fitted_by_tiles(
    fit: Fit, knot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiles(path: Path, folder: Path, **options: Any) -> SimpleNamespace:
        assert (path, folder) == (Path(knot), tmp_path / "work")
        return fit(read_cloud(path), **options)

    monkeypatch.setattr("sdfserver.tiles.reconstruct_tiles", tiles)
    command = ["reconstruct", knot, "-o", str(tmp_path / "a.ply"), "--work-dir", str(tmp_path / "work"), "--seed", "3"]
    assert cli.main(command) == 0
    assert fit.options["seed"] == 3
    assert (tmp_path / "a.ply").exists()


@pytest.mark.parametrize("extension", ["ply", "obj", "stl", "glb", "off"])
def test_the_extension_decides_the_format(fit: Fit, knot: str, tmp_path: Path, extension: str) -> None:
    mesh = tmp_path / f"mesh.{extension}"
    assert cli.main(["reconstruct", knot, "-o", str(mesh)]) == 0
    assert len(read_mesh(mesh).faces) == 4


def test_the_presets_on_offer_are_those_that_exist() -> None:
    assert get_args(cli.Preset) == tuple(PRESETS)


def test_quiet_prints_nothing(fit: Fit, knot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_infinities_are_null_in_the_report(fit: Fit, knot: str, tmp_path: Path) -> None:
    report = tmp_path / "a.json"
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply"), "--report", str(report)]) == 0
    assert json.loads(report.read_text())["fit"]["losses"]["eikonal"] is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_stage_steps_losses_and_time_left(
    fit: Fit, knot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    progress = Progress(stage="fit", fraction=0.5, step=120, steps=700, losses={"eikonal": 0.123}, eta_s=75.0)
    fit.during = lambda options: options["on_progress"](progress)
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply")]) == 0
    for shown in ("fit", "50%", "step 120/700", "eikonal 0.12", "1:15 left"):
        assert shown in terminal.getvalue()


def test_without_a_terminal_there_is_no_bar(fit: Fit, knot: str, tmp_path: Path) -> None:
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply")]) == 0
    assert fit.options["on_progress"] is None


def test_the_viewpoint_reaches_the_estimate(
    fit: Fit, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def estimate(cloud: PointCloud, *, viewpoint: Any) -> PointCloud:
        seen.append(viewpoint)
        return PointCloud(points=cloud.points, normals=np.ones_like(cloud.points))

    monkeypatch.setattr("sdfserver.normals.estimate_normals", estimate)
    call = ["reconstruct", str(data / "bare.ply"), "-o", str(tmp_path / "a.ply"), "--normals", "estimate"]
    assert cli.main([*call, "--viewpoint", "-1,2.5,3e2"]) == 0
    assert cli.main(call) == 0
    assert seen[0].tolist() == [-1, 2.5, 300]
    assert seen[1] is None
    assert fit.cloud.normals is not None


def test_outliers_are_removed_and_counted(
    fit: Fit, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = read_cloud(data / "knot.ply")
    far = tmp_path / "far.xyz"
    rows = np.hstack([points.points, points.normals])
    np.savetxt(far, np.vstack([rows, [[1.2, 1.2, 1.2, 0, 0, 1]]]))
    assert cli.main(["reconstruct", str(far), "-o", str(tmp_path / "a.ply"), "--remove-outliers"]) == 0
    removed = 10_001 - len(fit.cloud.points)
    assert removed > 0
    assert fit.cloud.points.min(axis=1).max() < 1.2
    assert f"{removed:,} outliers removed" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a command is missing"),
        (["nonsense"], "no such command 'nonsense'"),
        (["reconstruct"], "missing argument 'CLOUD'"),
        (["reconstruct", "{knot}"], "missing option '--output'"),
        (["reconstruct", "{knot}", "-o", "{out}", "--bogus"], "no such option: --bogus"),
        (["reconstruct", "{knot}", "more", "-o", "{out}"], "unexpected extra argument"),
        (["reconstruct", "{knot}", "-o", "{out}", "--preset", "best"], "'best' is not one of 'draft'"),
        (["reconstruct", "{knot}", "-o", "{out}", "--device", "tpu"], "'tpu' is not one of 'auto'"),
        (["reconstruct", "{knot}", "-o", "{out}", "--seed", "-1"], "--seed"),
        (["reconstruct", "{knot}", "-o", "{out}", "--seed", "9223372036854775808"], "below 2^63"),
        (["reconstruct", "{knot}", "-o", "{out}", "--seed", "one"], "--seed"),
        (["reconstruct", "{knot}", "-o", "{out}", "--resolution", "4"], "resolution is 4; it must be 8 to"),
        (["reconstruct", "{knot}", "-o", "{out}", "--resolution", "fine"], "'fine' is neither a whole number nor auto"),
        (["reconstruct", "{knot}", "-o", "{out}", "--work-dir", "w", "--remove-outliers"], "--work-dir"),
        (["reconstruct", "{knot}", "-o", "{out}", "--level", "nan"], "level is nan"),
        (["reconstruct", "{knot}", "-o", "{out}", "--trim", "0"], "trim distance is 0.0"),
        (["reconstruct", "{knot}", "-o", "{out}", "--shell", "-1"], "shell is -1.0; it must be a positive thickness"),
        (
            ["reconstruct", "{knot}", "-o", "{out}", "--shell", "1", "--trim", "2"],
            "a shell of 1.0 is closed, and a trim",
        ),
        (["reconstruct", "{knot}", "-o", "{out}", "--min-component", "2"], "2.0; it must be 0 to 1"),
        (["reconstruct", "{knot}", "-o", "{out}", "--faces", "3"], "3; it must be at least 4"),
        (["reconstruct", "{knot}", "-o", "{out}", "--viewpoint", "1,2,3"], "--normals estimate"),
        (["reconstruct", "{knot}", "-o", "{out}", "--normals", "estimate", "--viewpoint", "1,2"], "'1,2'; it must be"),
        (["reconstruct", "{knot}", "-o", "{out}", "--normals", "estimate", "--viewpoint", "1,2,inf"], "must be finite"),
        (["reconstruct", "{knot}", "-o", "{folder}/mesh.doc"], "'.doc' is not a known format"),
        (["reconstruct", "{knot}", "-o", "{folder}/none/mesh.ply"], "there is no folder"),
        (["reconstruct", "{knot}", "-o", "{folder}"], "is a folder"),
        (["reconstruct", "{knot}", "-o", "{knot}"], "is the cloud already"),
        (["reconstruct", "{knot}", "-o", "{out}", "--report", "{folder}/report.txt"], "use .json"),
        (["reconstruct", "{knot}", "-o", "{out}", "--field", "{folder}/field.pt"], "use .safetensors"),
        (["reconstruct", "{folder}/none.ply", "-o", "{out}"], "does not exist"),
        (["reconstruct", "{folder}/empty.ply", "-o", "{out}"], "empty"),
        (["reconstruct", "{folder}/short.xyz", "-o", "{out}", "--remove-outliers"], "at least 50 are needed"),
    ],
)
def test_mistakes_cost_one_line_and_exit_2(
    fit: Fit, knot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (tmp_path / "empty.ply").touch()
    (tmp_path / "short.xyz").write_text("0 0 0 0 0 1\n1 0 0 0 0 1\n")
    before = sorted(tmp_path.iterdir())
    places = {"knot": knot, "out": str(tmp_path / "mesh.ply"), "folder": str(tmp_path)}
    assert cli.main([argument.format(**places) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in one_line(err)
    assert fit.cloud is None
    assert sorted(tmp_path.iterdir()) == before


def test_no_two_results_share_a_file(
    fit: Fit, knot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sdfserver.files.check_writable", lambda path, formats=(): None)
    same = str(tmp_path / "same")
    assert cli.main(["reconstruct", knot, "-o", same, "--report", same]) == 2
    assert "is the mesh already; give the report another name" in one_line(capsys.readouterr().err)


def test_a_cloud_without_normals_is_told_what_to_do(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reconstruct", str(data / "bare.ply"), "-o", str(tmp_path / "a.ply")]) == 2
    assert "--normals estimate" in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CloudError, 2),
        (CloudFormatError, 2),
        (ConfigError, 2),
        (DeviceError, 2),
        (MissingDependencyError, 2),
        (OutputError, 2),
        (DivergenceError, 1),
        (ExtractionError, 1),
    ],
)
def test_errors_of_the_fit_are_one_line(
    fit: Fit,
    knot: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: type[Exception],
    code: int,
) -> None:
    def fail(options: dict[str, Any]) -> None:
        raise error("what is wrong\nand what to do")

    fit.during = fail
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply")]) == code
    assert one_line(capsys.readouterr().err) == "sdfserver: error: what is wrong and what to do\n"
    assert list(tmp_path.iterdir()) == []


def test_the_unexpected_is_one_line_too(
    fit: Fit, knot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(options: dict[str, Any]) -> None:
        raise ZeroDivisionError("oh\nno")

    fit.during = fail
    arguments = ["reconstruct", knot, "-o", str(tmp_path / "a.ply")]
    monkeypatch.delenv(DEBUG, raising=False)
    assert cli.main(arguments) == 1
    assert "unexpected ZeroDivisionError: oh no (set SDFSERVER_DEBUG=1" in one_line(capsys.readouterr().err)
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(arguments)


def test_an_interrupt_is_one_line_and_exit_130(
    fit: Fit, knot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(options: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    fit.during = interrupt
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply")]) == 130
    assert one_line(capsys.readouterr().err) == "sdfserver: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_other_packages_warnings_are_not_shown(
    fit: Fit, knot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DEBUG, raising=False)
    fit.during = lambda options: warnings.warn("for developers", UserWarning, stacklevel=1)
    assert cli.main(["reconstruct", knot, "-o", str(tmp_path / "a.ply"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr() == (f"sdfserver {sdfserver.__version__}\n", "")


def test_help_names_every_option_of_the_contract(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["reconstruct", "--help"]) == 0
    text = capsys.readouterr().out
    fixed = "--preset --device --resolution --seed --report --field --quiet -o"
    ours = "--normals --viewpoint --remove-outliers --level --shell --trim --min-component --faces"
    assert [option for option in f"{fixed} {ours}".split() if option not in text] == []


def test_help_does_not_load_the_heavy_libraries() -> None:
    code = (
        "import sys; from sdfserver.cli import main; main(['reconstruct', '--help']); "
        "sys.exit(' '.join({'torch', 'numpy', 'scipy', 'skimage', 'trimesh', 'open3d'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_mistake_is_found_without_loading_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from sdfserver.cli import main; "
        f"code = main(['reconstruct', {str(tmp_path / 'none.ply')!r}, '-o', {str(tmp_path / 'a.ply')!r}]); "
        "sys.exit('torch is loaded' if 'torch' in sys.modules else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "does not exist" in one_line(result.stderr)


def test_a_real_cloud_becomes_a_closed_mesh_without_the_optional_packages(data: Path, tmp_path: Path) -> None:
    optional = ["open3d", "trimesh", "fast_simplification", "laspy", "pye57"]
    mesh, report = tmp_path / "duck.ply", tmp_path / "duck.json"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({optional})); from sdfserver.cli import main; "
        f"sys.exit(main(['reconstruct', {str(data / 'sparse.ply')!r}, '-o', {str(mesh)!r}, '--preset', 'draft', "
        f"'--resolution', '64', '--report', {str(report)!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "watertight, genus 0" in one_line(result.stderr)
    health = mesh_health(read_mesh(mesh))
    assert (health.watertight, health.components, health.genus) == (True, 1, 0)
    assert json.loads(report.read_text())["input_to_mesh"]["mean"] < 0.01
