"""What the package promises about itself: its dependencies, its imports, its README."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdfserver
from sdfserver.field import SignedDistanceField

HEAVY = {"torch", "numpy", "scipy", "skimage", "trimesh", "open3d", "typer", "rich"}


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def test_the_installed_version_is_the_packages() -> None:
    assert version("sdfserver") == sdfserver.__version__


def test_it_is_typed() -> None:
    assert (Path(sdfserver.__file__).parent / "py.typed").is_file()


def test_torch_is_held_to_one_tested_line(project: dict[str, Any]) -> None:
    assert "torch>=2.13,<2.14" in project["dependencies"]


def test_open3d_is_for_the_tests_alone(project: dict[str, Any]) -> None:
    assert not any("open3d" in name for name in project["dependencies"])
    assert any("open3d" in name for name in project["optional-dependencies"]["test"])


def test_the_import_is_light() -> None:
    code = f"import sys, sdfserver; sys.exit(' '.join({HEAVY} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_core_imports_without_what_is_optional() -> None:
    # A bare GPU machine has torch, numpy, scipy and scikit-image alone.
    absent = ["open3d", "trimesh", "fast_simplification", "laspy", "pye57", "typer", "rich", "safetensors", "onnx"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        "import sdfserver.io, sdfserver.normals, sdfserver.metrics, sdfserver.field, sdfserver.reconstruct; "
        "import sdfserver.saved, sdfserver.asking, sdfserver.measures; "
        "import sdfserver.export.slices, sdfserver.export.grids, sdfserver.export.network"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_module_runs_as_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sdfserver", "--version"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"sdfserver {sdfserver.__version__}\n")


@pytest.mark.parametrize("marker", ["quick start", "test"])
def test_readme_has_one_line_to_copy(readme: str, marker: str) -> None:
    (command,) = re.findall(rf"^<!-- {marker} -->\n```sh\n(.+)\n```$", readme, re.MULTILINE)
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")


@pytest.mark.parametrize("marker", ["quick start", "test"])
def test_ci_runs_the_readmes_command_word_for_word(root: Path, readme: str, marker: str) -> None:
    script = (root / ".ci" / "run").read_text(encoding="utf-8")
    (function,) = re.findall(r"^readme_command\(\) .+$", script, re.MULTILINE)
    assert re.search(rf'\$\(readme_command "?{marker}"?\)', script)
    found = subprocess.run(
        ["bash", "-c", f'{function}\nreadme_command "{marker}"'], cwd=root, capture_output=True, text=True, check=True
    )
    assert f"<!-- {marker} -->\n```sh\n{found.stdout}```\n" in readme


def test_readme_names_every_option(readme: str) -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "sdfserver", "reconstruct", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", help_text)) - {"--help", "--output"}
    assert [option for option in sorted(options) if f"`{option}" not in readme] == []


def test_readmes_python_works(
    readme: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"^```python\n(.+?)^```$", readme, re.MULTILINE | re.DOTALL)
    (tmp_path / "data").symlink_to(root / "data")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own text
    assert capsys.readouterr().out.startswith("True ")
    cloud, field = names["cloud"], names["result"].field
    distances = field.evaluate(cloud.points[:500] + 0.05 * cloud.normals[:500])
    assert np.abs(distances - 0.05).mean() < 0.005
    assert (tmp_path / "knot.glb").stat().st_size > 100_000
    again = SignedDistanceField.load(tmp_path / "knot.safetensors")
    assert np.array_equal(again.evaluate(cloud.points[:9]), field.evaluate(cloud.points[:9]))
