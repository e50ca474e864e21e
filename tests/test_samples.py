"""The bundled clouds can be had by name, from a checkout as from an installed package."""

import tomllib
from pathlib import Path

import pytest

from sdfserver.errors import CloudError
from sdfserver.io import read_cloud
from sdfserver.samples import SUMMARIES, sample, samples


def test_every_cloud_of_the_data_folder_is_a_sample(root: Path) -> None:
    assert {f"{name}.ply" for name in samples()} == {path.name for path in (root / "data").glob("*.ply")}
    assert set(SUMMARIES) == set(samples())


def test_a_sample_is_a_cloud() -> None:
    assert len(read_cloud(sample("knot")).points) > 5000


def test_an_unknown_sample_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CloudError, match="knot"):
        sample("teapot")


def test_the_wheel_carries_every_sample(root: Path) -> None:
    build = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"] == {f"data/{name}.ply": f"sdfserver/samples/{name}.ply" for name in samples()}
