"""sdfserver field: what it writes, what it says, and what it refuses before it reads anything."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from balls import CENTER, RADIUS, ball_field

from sdfserver import cli
from sdfserver.io import write_ply


@pytest.fixture(scope="module")
def ball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("field") / "ball.safetensors"
    ball_field().save(path)
    return path


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six points halfway between the ball's middle and its surface, with normals that point away from its middle."""
    path = tmp_path_factory.mktemp("points") / "points.ply"
    ways = np.concatenate([np.eye(3), -np.eye(3)])
    write_ply(path, CENTER + RADIUS / 2 * ways, normals=ways)
    return path


def run(*arguments: object) -> int:
    return cli.main(["field", *map(str, arguments)])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_info_tells_networks_frame_error_area_and_volume(ball: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", ball, "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["layers"], about["units"], about["local_networks"]) == (2, 256, [])
    assert about["center"] == CENTER.tolist()
    # The field is a ball to within some percent; the tolerances are those of the meshes.
    assert about["volume"] == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.03)
    assert about["area"] == pytest.approx(4 * np.pi * RADIUS**2, rel=0.03)
    assert about["volume_tolerance"] < 0.002 * about["volume"]
    assert abs(about["area"] / about["volume"] - 3 / RADIUS) < 0.02 * 3 / RADIUS
    np.testing.assert_allclose(about["low"], CENTER - RADIUS, atol=0.02 * RADIUS)
    assert 0 < about["distance_error"]["mean"] < 0.2
    assert run("info", ball) == 0
    text = capsys.readouterr().out
    assert "network         2 layers of 256 sines\n" in text
    assert "within 1 of the surface" in text


def test_query_answers_as_npz_and_as_csv(
    ball: Path, points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.npz"
    assert run("query", ball, points, "-o", out, "--what", "distance,closest,curvature,inside") == 0
    assert "6 points; within 1 of the surface the field is off from a distance by" in said(capsys)
    with np.load(out) as found:
        np.testing.assert_allclose(found["true_distances"], -RADIUS / 2, rtol=0.03)
        np.testing.assert_allclose(found["distances"], ball_field().evaluate(found["points"]), atol=1e-3)
        assert found["inside"].all()
        assert found["closest_points"].shape == (6, 3)
        assert found["distance_error_samples"] > 100
    assert run("query", ball, points, "--quiet") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["x", "y", "z", "distances", "gradients_x", "gradients_y", "gradients_z"]
    assert float(rows[0]["x"]) == pytest.approx(CENTER[0] + RADIUS / 2, abs=1e-3)
    assert float(rows[0]["gradients_x"]) == pytest.approx(1, abs=0.2)


def test_rays_go_along_the_normals(
    ball: Path, points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("query", ball, points, "--rays", "-o", tmp_path / "a.csv") == 0
    assert "6 rays" in said(capsys)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    for row in rows:
        assert row["hits"] == "1"
        assert float(row["ray_distances"]) == pytest.approx(RADIUS / 2, rel=0.03)
    assert run("query", ball, points, "--rays", "--max-distance", "5", "-q") == 0
    assert "0,nan,nan" in capsys.readouterr().out


def test_a_slice_is_written_and_told_of(ball: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("slice", ball, "-o", tmp_path / "a.svg", "--axis", "x", "--at", CENTER[0] + 5) == 0
    assert "1 outline, closed," in said(capsys)
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert run("slice", ball, "-o", tmp_path / "a.dxf", "--normal", "1,1,1", "--resolution", "64") == 0
    assert "POLYLINE" in (tmp_path / "a.dxf").read_text()


def test_a_grid_is_written(ball: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = np.array([10.0, 5, 5])
    box = ",".join(map(str, [*(CENTER - half), *(CENTER + half)]))
    assert run("grid", ball, "-o", tmp_path / "a.npz", "--resolution", "21", "--box", box, "--true-distances") == 0
    assert "21 x 11 x 11 values" in said(capsys)
    with np.load(tmp_path / "a.npz") as found:
        assert found["spacing"] == 1.0
        assert found["values"][10, 5, 5] == pytest.approx(-RADIUS, rel=0.03)


def test_onnx_is_written_and_compared(ball: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    assert run("onnx", ball, "-o", tmp_path / "a.onnx") == 0
    text = said(capsys)
    assert (tmp_path / "a.onnx").stat().st_size > 10_000
    if "not compared" not in text:
        assert "gives the field's values to within" in text


def test_onnx_that_computes_something_else_is_not_written(
    ball: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setattr("sdfserver.export.network.onnx_difference", lambda *_: (0.1, 0.0))
    assert run("onnx", ball, "-o", tmp_path / "a.onnx") == 1
    assert "values up to 0.1 off the field's" in said(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "none.safetensors"], "none.safetensors does not exist; check the path"),
        (["info", "POINTS"], "is not a field saved by sdfserver"),
        (["query", "BALL", "none.ply"], "none.ply does not exist"),
        (["query", "BALL", "POINTS", "--what", "colour"], "--what has 'colour'; use some of distance,"),
        (["query", "BALL", "POINTS", "--max-distance", "3"], "--max-distance is 3; it must be above 0, and --rays"),
        (["query", "BALL", "POINTS", "-o", "a.txt"], "use .npz, .csv"),
        (["query", "BALL", "BARE", "--rays"], "the points have no normals"),
        (["slice", "BALL", "-o", "a.png"], "use .svg, .dxf"),
        (["slice", "BALL", "-o", "a.svg", "--at", "9"], "the plane does not meet the surface"),
        (["slice", "BALL", "-o", "a.svg", "--at", "9", "--normal", "0,0,1"], "--normal takes the place of"),
        (["slice", "BALL", "-o", "a.svg", "--origin", "0,0,1"], "--origin has no effect without --normal"),
        (["slice", "BALL", "-o", "a.svg", "--normal", "0,0"], "--normal is '0,0'; it must be 3 numbers"),
        (["slice", "BALL", "-o", "a.svg", "--resolution", "1"], "resolution of a slice is 1"),
        (["grid", "BALL", "-o", "a.npz", "--box", "0,0,0"], "--box is '0,0,0'; it must be 6 numbers"),
        (["grid", "BALL", "-o", "a.npz", "--box", "0,0,0,1,1,1"], "beyond the cube that the field was fitted in"),
        (["grid", "BALL", "-o", "a.npz", "--resolution", "1"], "resolution of a grid is 1"),
        (["grid", "BALL", "-o", "none/a.npz"], "there is no folder"),
        (["onnx", "BALL", "-o", "a.safetensors"], "use .onnx"),
    ],
)
def test_mistakes_are_one_line_with_the_value(
    arguments: list[str],
    words: str,
    ball: Path,
    points: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"BALL": ball, "POINTS": points, "BARE": data / "bare.ply"}
    assert run(*(places.get(word, word) for word in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_asking_and_exporting_load_no_torch(ball: Path, points: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from sdfserver.cli import main; "
        f"code = main(['field', 'query', {str(ball)!r}, {str(points)!r}, '-o', {str(tmp_path / 'a.npz')!r}]) "
        f"or main(['field', 'slice', {str(ball)!r}, '-o', {str(tmp_path / 'a.svg')!r}]); "
        "sys.exit('torch is loaded' if 'torch' in sys.modules else code)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
