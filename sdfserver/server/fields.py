"""Saved fields, evaluated with numpy: the API answers questions about a field without loading torch.

The same arithmetic as sdfserver.siren and sdfserver.local, whose symbols these are; sdf < 0 inside. World units in and
out.
"""

import itertools
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from sdfserver.server.artifacts import Artifacts

CHUNK = 8192
BLOCK = 16
"""Points of one local network that are evaluated together."""
NEGLIGIBLE = 1e-6
CACHED = 16
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Sines:
    """Sine layers and a linear one, omega multiplied in: weights (..., fan_in, fan_out) and biases (..., 1, fan_out).

    The leading dimension, if there is one, counts networks.
    """

    layers: tuple[tuple[Floats, Floats], ...]

    def value_and_gradient(self, x: Floats) -> tuple[Floats, Floats]:
        """The value (..., n, 1) and the gradient (..., n, 3) at x (..., n, 3)."""
        slopes = []
        *sine_layers, (last, offset) = self.layers
        for weight, bias in sine_layers:
            z = x @ weight + bias
            x = np.sin(z)
            slopes.append(np.cos(z))
        phi = x @ last + offset
        adjoint = np.swapaxes(last, -1, -2)
        for (weight, _), slope in zip(reversed(sine_layers), reversed(slopes), strict=True):
            adjoint = (slope * adjoint) @ np.swapaxes(weight, -1, -2)
        return phi, adjoint

    def __getitem__(self, rows: Rows) -> "_Sines":
        return _Sines(layers=tuple((weight[rows], bias[rows]) for weight, bias in self.layers))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Level:
    """Local networks on the cells of a grid: `table` (side, side, side) has the network of each cell, or -1."""

    margin: float
    table: NDArray[np.int64]
    cells: Floats
    sines: _Sines
    linear: Floats

    def value_and_gradient(self, x: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """W (n,), its gradient (n, 3), the sum of w f (n,) and its gradient (n, 3) at x (n, 3)."""
        width = np.float32(2 / len(self.table))
        half = width / 2 * np.float32(1 + self.margin)
        points, networks = self._pairs(x, width)
        centres: Floats = (self.cells[networks] + np.float32(0.5)) * width - np.float32(1)
        u: Floats = (x[points] - centres) / half
        f, g = self._in_blocks(u, networks)
        f *= half
        w, dw = self._weights(u, half)
        out = []
        for values in (w[:, None], dw, (w * f)[:, None], w[:, None] * g + f[:, None] * dw):
            total = np.zeros((len(x), values.shape[1]), np.float32)
            np.add.at(total, points, values)
            out.append(total)
        return out[0][:, 0], out[1], out[2][:, 0], out[3]

    def _pairs(self, x: Floats, width: np.float32) -> tuple[Rows, Rows]:
        t = (x + 1) / width
        home = np.floor(t)
        t -= home
        cell, beside = home.astype(np.int64), np.where(t < 0.5, -1, 1)
        in_overlap = np.abs(t - 0.5) > 0.5 - self.margin / 2
        rows, networks = [], []
        for bits in itertools.product((0, 1), repeat=3):
            some = (in_overlap | (np.array(bits) == 0)).all(axis=1).nonzero()[0]
            reached = cell[some] + beside[some] * bits
            inside = ((reached >= 0) & (reached < len(self.table))).all(axis=1)
            found = self.table[tuple(reached[inside].T)]
            rows.append(some[inside][found >= 0])
            networks.append(found[found >= 0])
        joined = np.concatenate(networks)
        order = np.argsort(joined, kind="stable")
        return np.concatenate(rows)[order], joined[order]

    def _in_blocks(self, u: Floats, networks: Rows) -> tuple[Floats, Floats]:
        each, counts = np.unique(networks, return_counts=True)
        blocks = -(-counts // BLOCK)
        shift = (np.cumsum(blocks) - blocks) * BLOCK - (np.cumsum(counts) - counts)
        places = np.arange(len(u)) + np.repeat(shift, counts)
        owners = np.repeat(each, blocks)
        packed = np.zeros((len(owners), BLOCK, 3), np.float32)
        packed.reshape(-1, 3)[places] = u
        phi, gradient = self.sines[owners].value_and_gradient(packed)
        linear = self.linear[owners]
        phi, gradient = phi + packed @ linear, gradient + np.swapaxes(linear, -1, -2)
        return phi.reshape(-1)[places], gradient.reshape(-1, 3)[places]

    def _weights(self, u: Floats, half: np.float32) -> tuple[Floats, Floats]:
        steepness = np.float32((1 + self.margin) / (2 * self.margin))
        t = np.clip((1 - np.abs(u)) * steepness, 0, 1)
        x, y, z = (t**3 * ((6 * t - 15) * t + 10)).T
        dx, dy, dz = ((30 * steepness / half) * -np.sign(u) * (t * (1 - t)) ** 2).T
        return x * y * z, np.stack([dx * y * z, x * dy * z, x * y * dz], axis=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class SavedField:
    """A field as `SignedDistanceField.save` wrote it."""

    coarse: _Sines
    levels: tuple[_Level, ...]
    center: NDArray[np.float64]
    scale: float

    def evaluate(self, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The signed distance (n,) at `points` (n, 3), and its gradient (n, 3)."""
        unit = ((points - self.center) * self.scale).astype(np.float32)
        parts = [self._value_and_gradient(unit[start : start + CHUNK]) for start in range(0, len(unit), CHUNK)]
        phi, gradient = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return phi.astype(np.float64) / self.scale, gradient.astype(np.float64)

    def _value_and_gradient(self, x: Floats) -> tuple[Floats, Floats]:
        phi, gradient = np.zeros(len(x), np.float32), np.zeros((len(x), 3), np.float32)
        rest, slope = np.ones(len(x), np.float32), np.zeros((len(x), 3), np.float32)
        rows = np.arange(len(x))
        for level in reversed(self.levels):
            total, total_slope, value, value_gradient = level.value_and_gradient(x[rows])
            r, dr = rest[rows], slope[rows]
            phi[rows] += r * value
            gradient[rows] += r[:, None] * value_gradient + value[:, None] * dr
            slope[rows] = (1 - total)[:, None] * dr - r[:, None] * total_slope
            rest[rows] = r * (1 - total)
            rows = rows[rest[rows] > NEGLIGIBLE]
        value, value_gradient = self.coarse.value_and_gradient(x[rows])
        phi[rows] += rest[rows] * value[:, 0]
        gradient[rows] += rest[rows, None] * value_gradient + value * slope[rows]
        return phi, gradient


@lru_cache(maxsize=CACHED)
def load(artifacts: Artifacts, path: Path) -> SavedField:
    """The field at `path`, which never changes. Raises FileNotFoundError."""
    with artifacts.at_hand(path) as here, safe_open(str(here), framework="numpy") as file:
        about = json.loads(file.metadata()["sdfserver"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    levels = about.get("levels", [])
    network = about["network"]
    prefix = "coarse." if levels else ""
    weights = [tensors[f"{prefix}weights.{i}"].T for i in range(network["layers"] + 1)]
    biases = [tensors[f"{prefix}biases.{i}"][None] for i in range(network["layers"] + 1)]
    return SavedField(
        coarse=_sines(weights, biases, network["omega"]),
        levels=tuple(_level(config, f"level.{i}.", tensors) for i, config in enumerate(levels)),
        center=np.array(about["frame"]["center"]),
        scale=float(about["frame"]["scale"]),
    )


def _sines(weights: list[Floats], biases: list[Floats], omega: float) -> _Sines:
    factors = [np.float32(omega)] * (len(weights) - 1) + [np.float32(1)]
    layers = zip(weights, biases, factors, strict=True)
    return _Sines(layers=tuple((weight * factor, bias * factor) for weight, bias, factor in layers))


def _level(config: dict[str, Any], prefix: str, tensors: dict[str, Floats]) -> _Level:
    count = config["layers"] + 1
    cells = tensors[f"{prefix}cells"].astype(np.int64)
    table = np.full(3 * (config["side"],), -1)
    table[tuple(cells.T)] = np.arange(len(cells))
    return _Level(
        margin=config["margin"],
        table=table,
        cells=cells.astype(np.float32),
        sines=_sines(
            [tensors[f"{prefix}sirens.weights.{i}"] for i in range(count)],
            [tensors[f"{prefix}sirens.biases.{i}"] for i in range(count)],
            config["omega"],
        ),
        linear=tensors[f"{prefix}sirens.linear"],
    )
