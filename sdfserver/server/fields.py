"""Saved fields, evaluated with numpy: the API answers questions about a field without loading torch.

The same arithmetic as sdfserver.siren, whose symbols these are; sdf < 0 inside. World units in and out.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

CHUNK = 8192
CACHED = 16
Layer = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, eq=False, kw_only=True)
class SavedField:
    """A field as `SignedDistanceField.save` wrote it."""

    layers: tuple[Layer, ...]
    center: NDArray[np.float64]
    scale: float

    def evaluate(self, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The signed distance (n,) at `points` (n, 3), and its gradient (n, 3)."""
        unit = (points - self.center) * self.scale
        parts = [self._value_and_gradient(unit[start : start + CHUNK]) for start in range(0, len(unit), CHUNK)]
        phi, gradient = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return phi.astype(np.float64) / self.scale, gradient.astype(np.float64)

    def _value_and_gradient(self, unit: NDArray[np.float64]) -> Layer:
        x, slopes = unit.astype(np.float32), []
        *sine_layers, (last, offset) = self.layers
        for weight, bias in sine_layers:
            z = x @ weight.T + bias
            x = np.sin(z)
            slopes.append(np.cos(z))
        phi = (x @ last.T + offset)[:, 0]
        adjoint: NDArray[np.float32] = last
        for (weight, _), slope in zip(reversed(sine_layers), reversed(slopes), strict=True):
            adjoint = (slope * adjoint) @ weight
        return phi, adjoint


@lru_cache(maxsize=CACHED)
def load(path: Path) -> SavedField:
    """The field at `path`, which never changes. Raises FileNotFoundError."""
    with safe_open(str(path), framework="numpy") as file:
        about = json.loads(file.metadata()["sdfserver"])
        count = sum(name.startswith("weights.") for name in file.keys())  # noqa: SIM118 - not a mapping
        layers = [(file.get_tensor(f"weights.{i}"), file.get_tensor(f"biases.{i}")) for i in range(count)]
    omega = np.float32(about["network"]["omega"])
    scaled = [(weight * omega, bias * omega) for weight, bias in layers[:-1]]
    return SavedField(
        layers=(*scaled, layers[-1]), center=np.array(about["frame"]["center"]), scale=float(about["frame"]["scale"])
    )
