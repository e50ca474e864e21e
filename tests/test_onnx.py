"""The network as ONNX: what another program computes from the file is the field."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_field import UTM, near, refined_field, small_field

from sdfserver.cloud import Frame
from sdfserver.config import LocalNetworkConfig, NetworkConfig
from sdfserver.errors import ConfigError, MissingDependencyError
from sdfserver.export import network
from sdfserver.export.network import onnx_difference, to_onnx
from sdfserver.field import SignedDistanceField
from sdfserver.local import CellGrid, LocalLevel, LocalSirens, PartitionOfUnity
from sdfserver.saved import SavedField, read_field
from sdfserver.siren import Siren


def saved(field: SignedDistanceField, folder: Path) -> SavedField:
    field.save(folder / "f.safetensors")
    return read_field(folder / "f.safetensors")


@pytest.mark.parametrize("make", [small_field, refined_field])
def test_another_runtime_gets_the_fields_values_and_gradients(
    make: Callable[[], SignedDistanceField], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    field = make()
    model = to_onnx(saved(field, tmp_path))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    # Beyond the cube as well, and none at all.
    outside = UTM + np.random.default_rng(1).uniform(-150, 150, (200, 3))
    for points in (near(2000), outside, near(1), np.empty((0, 3))):
        sdf, gradient = session.run(None, {"points": points})
        assert (sdf.dtype, sdf.shape, gradient.shape) == (np.float32, (len(points),), (len(points), 3))
        expected, slope = field.evaluate(points), field.gradient(points)
        np.testing.assert_allclose(sdf, expected, atol=2e-5 * max(1, np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(gradient, slope, atol=2e-4 * max(1, np.abs(slope).max(initial=0)))


@pytest.mark.parametrize("make", [small_field, refined_field])
def test_the_check_sees_another_field(make: Callable[[], SignedDistanceField], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    field = make()
    model = to_onnx(saved(field, tmp_path))
    value, slope = onnx_difference(model, read_field(tmp_path / "f.safetensors"))
    assert value < 1e-3
    assert slope < 1e-3
    # The same network, moved by a thousandth of the cube's half side.
    field.frame = type(field.frame)(center=UTM + np.array([0.1, 0, 0]), scale=0.01)
    value, _ = onnx_difference(model, saved(field, tmp_path))
    assert value > 0.01


def test_the_file_is_the_same_every_time_and_says_what_it_is(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    field = saved(refined_field(), tmp_path)
    model = onnx.load_from_string(to_onnx(field))
    assert to_onnx(field) == model.SerializeToString(deterministic=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert [value.name for value in model.graph.output] == ["sdf", "gradient"]
    assert "negative inside" in model.doc_string


def test_weights_are_in_the_file_once(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    config = LocalNetworkConfig(side=5)
    cells = CellGrid(5, config.margin).cells(torch.arange(125))
    coarse = Siren(NetworkConfig(hidden=16, layers=2))
    level = LocalLevel(cells, LocalSirens(len(cells), config))
    field = SignedDistanceField(PartitionOfUnity(coarse, [level]), Frame(center=UTM, scale=0.01))
    model = to_onnx(saved(field, tmp_path))
    assert len(model) < 1.1 * (tmp_path / "f.safetensors").stat().st_size + 50_000


def test_what_is_too_large_for_the_format_and_a_missing_package_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = saved(small_field(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "onnx", None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'sdfserver\[onnx\]'"):
            to_onnx(field)
    pytest.importorskip("onnx")
    monkeypatch.setattr(network, "MAX_BYTES", 100)
    with pytest.raises(ConfigError, match="take the safetensors file"):
        to_onnx(field)
