"""Saved fields, evaluated with numpy: for who asks a field, exports it and has no need to load torch, like the API.

The same arithmetic as sdfserver.siren and sdfserver.local, whose symbols these are; sdf < 0 inside. World units in and
out, but for `at`.
"""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import Frame
from sdfserver.errors import FieldFormatError
from sdfserver.files import printable, reason
from sdfserver.queries import FieldQueries

CHUNK = 8192
BENT_CHUNK = 2048
"""Points whose second derivatives are taken at a time."""
BLOCK = 16
"""Points of one local network that are evaluated together."""
NEGLIGIBLE = 1e-6
UNBENT = 1e-2
FORMAT, PARTITION_FORMAT = "sdfserver-field-1", "sdfserver-field-2"
"""Of a single network, and of a coarse one with levels of local ones over it."""
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sines:
    """Sine layers and a linear one, omega multiplied in: weights (..., fan_in, fan_out) and biases (..., 1, fan_out).

    The leading dimension, if there is one, counts networks.
    """

    layers: tuple[tuple[Floats, Floats], ...]

    def value(self, x: Floats) -> Floats:
        """The value (..., n, 1) at x (..., n, 3)."""
        *sine_layers, (last, offset) = self.layers
        for weight, bias in sine_layers:
            x = x @ weight
            x += bias
            np.sin(x, out=x)
        return x @ last + offset

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

    def value_gradient_and_hessian(self, x: Floats) -> tuple[Floats, Floats, Floats]:
        """The same two, and the second derivatives (..., n, 3, 3)."""
        *sine_layers, (last, offset) = self.layers
        h = x
        sines: list[NDArray[Any]] = []
        cosines: list[NDArray[Any]] = []
        jacobians: list[NDArray[Any]] = []
        for weight, bias in sine_layers:
            z = h @ weight + bias
            if jacobians:
                jacobian = (jacobians[-1] * cosines[-1][..., None, :, :]) @ weight[..., None, :, :]
            else:
                jacobian = np.broadcast_to(weight[..., :, None, :], (*z.shape[:-2], 3, *z.shape[-2:]))
            h = np.sin(z)
            sines.append(h)
            cosines.append(np.cos(z))
            jacobians.append(jacobian)
        phi = h @ last + offset
        pull = np.swapaxes(last, -1, -2)
        hessian = np.zeros((*x.shape, 3), x.dtype)
        for (weight, _), sine, cosine, jacobian in zip(
            reversed(sine_layers), reversed(sines), reversed(cosines), reversed(jacobians), strict=True
        ):
            bent = jacobian * (pull * sine)[..., None, :, :]
            for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)):
                hessian[..., i, j] -= np.einsum("...w,...w->...", bent[..., i, :, :], jacobian[..., j, :, :])
            pull = (cosine * pull) @ np.swapaxes(weight, -1, -2)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            hessian[..., j, i] = hessian[..., i, j]
        return phi, pull, hessian

    def __getitem__(self, rows: Rows) -> "Sines":
        return Sines(layers=tuple((weight[rows], bias[rows]) for weight, bias in self.layers))


@dataclass(frozen=True, eq=False, kw_only=True)
class Level:
    """Local networks on the cells of a grid: `table` (side, side, side) has the network of each cell, or -1."""

    margin: float
    table: NDArray[np.int64]
    cells: Floats
    sines: Sines
    linear: Floats

    def value(self, x: Floats) -> tuple[Floats, Floats]:
        """W (n,) and the sum of w f (n,) at x (n, 3)."""
        points, networks, u, half = self._local(x)
        (f,) = self._in_blocks(u, networks, order=0)
        w = self._weights(u, half)[0]
        total, value = _sums((w[:, None], (w * f * half)[:, None]), points, len(x))
        return total[:, 0], value[:, 0]

    def value_and_gradient(self, x: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """W (n,), its gradient (n, 3), the sum of w f (n,) and its gradient (n, 3) at x (n, 3)."""
        points, networks, u, half = self._local(x)
        f, g = self._in_blocks(u, networks, order=1)
        f = f * half
        w, dw, _ = self._weights(u, half)
        terms = (w[:, None], dw, (w * f)[:, None], w[:, None] * g + f[:, None] * dw)
        out = _sums(terms, points, len(x))
        return out[0][:, 0], out[1], out[2][:, 0], out[3]

    def value_gradient_and_hessian(self, x: Floats) -> tuple[Floats, ...]:
        """As `value_and_gradient`, each pair followed by its Hessian (n, 3, 3)."""
        points, networks, u, half = self._local(x)
        f, g, h = self._in_blocks(u, networks, order=2)
        f *= half
        h /= half
        w, dw, ddw = self._weights(u, half)
        bent = w[:, None, None] * h + _both_ways(g, dw) + f[:, None, None] * ddw
        terms = (
            w[:, None],
            dw,
            ddw.reshape(-1, 9),
            (w * f)[:, None],
            w[:, None] * g + f[:, None] * dw,
            bent.reshape(-1, 9),
        )
        total, slope, bend, value, gradient, hessian = _sums(terms, points, len(x))
        return total[:, 0], slope, bend.reshape(-1, 3, 3), value[:, 0], gradient, hessian.reshape(-1, 3, 3)

    def _local(self, x: Floats) -> tuple[Rows, Rows, Floats, np.float32]:
        """Pairs of rows of x (n, 3) and networks that reach them, the points as these see them, half a cell's width."""
        width = np.float32(2 / len(self.table))
        half = width / 2 * np.float32(1 + self.margin)
        points, networks = self._pairs(x, width)
        centres: Floats = (self.cells[networks] + np.float32(0.5)) * width - np.float32(1)
        return points, networks, (x[points] - centres) / half, half

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

    def _in_blocks(self, u: Floats, networks: Rows, *, order: int) -> tuple[Floats, ...]:
        each, counts = np.unique(networks, return_counts=True)
        blocks = -(-counts // BLOCK)
        shift = (np.cumsum(blocks) - blocks) * BLOCK - (np.cumsum(counts) - counts)
        places = np.arange(len(u)) + np.repeat(shift, counts)
        owners = np.repeat(each, blocks)
        packed = np.zeros((len(owners), BLOCK, 3), np.float32)
        packed.reshape(-1, 3)[places] = u
        sines, linear = self.sines[owners], self.linear[owners]
        found: list[Floats]
        if order == 0:
            found = [sines.value(packed)]
        else:
            found = [*(sines.value_and_gradient, sines.value_gradient_and_hessian)[order - 1](packed)]
            found[1] = found[1] + np.swapaxes(linear, -1, -2)
        found[0] = found[0] + packed @ linear
        shapes = ((-1,), (-1, 3), (-1, 3, 3))
        return tuple(values.reshape(shape)[places] for values, shape in zip(found, shapes, strict=False))

    def _weights(self, u: Floats, half: np.float32) -> tuple[Floats, Floats, Floats]:
        steepness = np.float32((1 + self.margin) / (2 * self.margin))
        t = np.clip((1 - np.abs(u)) * steepness, 0, 1)
        s = t**3 * ((6 * t - 15) * t + 10)
        ds = (30 * steepness / half) * -np.sign(u) * (t * (1 - t)) ** 2
        dds = (60 * (steepness / half) ** 2) * t * (1 - t) * (1 - 2 * t)
        slope, bend = np.empty_like(u), np.empty((len(u), 3, 3), np.float32)
        for i in range(3):
            j, k = (i + 1) % 3, (i + 2) % 3
            slope[:, i] = ds[:, i] * s[:, j] * s[:, k]
            bend[:, i, i] = dds[:, i] * s[:, j] * s[:, k]
            bend[:, i, j] = bend[:, j, i] = ds[:, i] * ds[:, j] * s[:, k]
        return s.prod(axis=1), slope, bend


@dataclass(frozen=True, eq=False, kw_only=True)
class SavedField(FieldQueries):
    """A field as `SignedDistanceField.save` wrote it."""

    coarse: Sines
    levels: tuple[Level, ...]
    frame: Frame

    def evaluate(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Signed distance (n,), world units, at `points` (n, 3), world units."""
        return self.at(self.frame.to_unit(points), 0)[0] / self.frame.scale

    def gradient(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Gradient (n, 3) of the signed distance at `points` (n, 3), world units; its length is about 1."""
        return self.at(self.frame.to_unit(points), 1)[1]

    def at(self, x: NDArray[np.float64], order: int) -> tuple[NDArray[np.float64], ...]:
        """At unit points x (n, 3): the value (n,), from order 1 on the gradient, for order 2 the Hessian as well."""
        size = BENT_CHUNK if order > 1 else CHUNK
        ask = [lambda x: (self._value(x),), self._value_and_gradient, self._value_gradient_and_hessian][order]
        out = tuple(np.empty((len(x), *shape)) for shape in ((), (3,), (3, 3))[: order + 1])
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            for array, values in zip(out, ask(x[part].astype(np.float32)), strict=True):
                array[part] = values
        return out

    def _value(self, x: Floats) -> Floats:
        phi, rest, rows = np.zeros(len(x), np.float32), np.ones(len(x), np.float32), np.arange(len(x))
        for level in reversed(self.levels):
            total, value = level.value(x[rows])
            phi[rows] += rest[rows] * value
            rest[rows] *= 1 - total
            rows = rows[rest[rows] > NEGLIGIBLE]
        phi[rows] += rest[rows] * self.coarse.value(x[rows])[:, 0]
        return phi

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

    def _value_gradient_and_hessian(self, x: Floats) -> tuple[Floats, ...]:
        phi, gradient = np.zeros(len(x), np.float32), np.zeros((len(x), 3), np.float32)
        hessian = np.zeros((len(x), 3, 3), np.float32)
        rest, slope, bend = np.ones(len(x), np.float32), np.zeros_like(gradient), np.zeros_like(hessian)
        rows = np.arange(len(x))

        def add(value: Floats, value_gradient: Floats, value_hessian: Floats) -> None:
            r, dr, ddr = rest[rows], slope[rows], bend[rows]
            phi[rows] += r * value
            gradient[rows] += r[:, None] * value_gradient + value[:, None] * dr
            hessian[rows] += (
                r[:, None, None] * value_hessian + _both_ways(value_gradient, dr) + value[:, None, None] * ddr
            )

        for level in reversed(self.levels):
            total, total_slope, total_bend, *values = level.value_gradient_and_hessian(x[rows])
            add(*values)
            r, dr, ddr = rest[rows], slope[rows], bend[rows]
            left = 1 - total
            bend[rows] = left[:, None, None] * ddr - _both_ways(dr, total_slope) - r[:, None, None] * total_bend
            slope[rows] = left[:, None] * dr - r[:, None] * total_slope
            rest[rows] = r * left
            rows = rows[(rest[rows] > NEGLIGIBLE) | (np.abs(bend[rows]).max(axis=(1, 2), initial=0) > UNBENT)]
        value, value_gradient, value_hessian = self.coarse.value_gradient_and_hessian(x[rows])
        add(value[:, 0], value_gradient, value_hessian)
        return phi, gradient, hessian


def _sums(terms: Iterable[Floats], rows: Rows, n: int) -> list[Floats]:
    """Each of `terms` (p, m), summed by `rows` (p,) of n."""
    out = []
    for values in terms:
        total = np.zeros((n, values.shape[1]), np.float32)
        np.add.at(total, rows, values)
        out.append(total)
    return out


def _both_ways(a: Floats, b: Floats) -> Floats:
    """a b^T + b a^T (n, 3, 3) of vectors (n, 3)."""
    outer = a[:, :, None] * b[:, None, :]
    both: Floats = outer + np.swapaxes(outer, 1, 2)
    return both


def read_field(path: str | Path) -> SavedField:
    """The field that `SignedDistanceField.save` wrote to `path`.

    Raises FileNotFoundError where there is no file, FieldFormatError when it is not one of a field.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads((file.metadata() or {})["sdfserver"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if about["format"] not in (FORMAT, PARTITION_FORMAT):
            raise ValueError(f"its format is {about['format']!r}; this version reads {FORMAT} and {PARTITION_FORMAT}")
        return _field(about, tensors)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        shown = printable(str(path))
        raise FieldFormatError(f"{shown} is not a field saved by sdfserver: {reason(error)}") from error


def _field(about: dict[str, Any], tensors: dict[str, Floats]) -> SavedField:
    levels = about.get("levels", [])
    network = about["network"]
    prefix = "coarse." if levels else ""
    weights = [tensors[f"{prefix}weights.{i}"].T for i in range(network["layers"] + 1)]
    biases = [tensors[f"{prefix}biases.{i}"][None] for i in range(network["layers"] + 1)]
    return SavedField(
        coarse=_sines(weights, biases, network["omega"]),
        levels=tuple(_level(config, f"level.{i}.", tensors) for i, config in enumerate(levels)),
        frame=Frame(center=np.array(about["frame"]["center"], np.float64), scale=float(about["frame"]["scale"])),
    )


def _sines(weights: list[Floats], biases: list[Floats], omega: float) -> Sines:
    factors = [np.float32(omega)] * (len(weights) - 1) + [np.float32(1)]
    layers = zip(weights, biases, factors, strict=True)
    return Sines(layers=tuple((weight * factor, bias * factor) for weight, bias, factor in layers))


def _level(config: dict[str, Any], prefix: str, tensors: dict[str, Floats]) -> Level:
    count = config["layers"] + 1
    cells = tensors[f"{prefix}cells"].astype(np.int64)
    table = np.full(3 * (config["side"],), -1)
    table[tuple(cells.T)] = np.arange(len(cells))
    return Level(
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
