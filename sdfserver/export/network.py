"""The network as ONNX, for programs that have neither torch nor this package.

One graph, points in and values out, both in world units: `points` (n, 3) float64; `sdf` (n,) and `gradient` (n, 3)
float32; sdf < 0 inside. The frame is part of it: the centre is subtracted in double precision, so that map coordinates
keep their digits, and the rest is the arithmetic of sdfserver.saved, whose symbols these are.

A partition of unity becomes a graph as well: of each of the eight cells that a point may lie in, a table tells the
network, if it has one, and the weights of that network are gathered for the point. That takes memory: some 10 kB a
point. Ask for 10,000 points at a time, or fewer.
"""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.errors import ConfigError, MissingDependencyError
from sdfserver.saved import Level, SavedField, Sines

OPSET, IR_VERSION = 17, 8
"""Of 2022, which every runtime of today reads."""
SMALL = 1024
MAX_BYTES = 1 << 30
"""Of weights: a file of the format holds two gigabytes at most."""


def to_onnx(field: SavedField) -> bytes:
    """The field as an ONNX file.

    Raises MissingDependencyError without the package onnx, ConfigError where the networks are too large for the format.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError:
        raise MissingDependencyError("writing ONNX needs onnx: pip install 'sdfserver[onnx]'") from None
    graph = _Graph()
    size = sum(array.nbytes for array in _weights(field))
    if size > MAX_BYTES:
        raise ConfigError(
            f"the field's networks have {size:,} bytes, and an ONNX file holds {MAX_BYTES:,}; take the safetensors file"
        )
    center, scale = graph.constant(field.frame.center), graph.constant(np.float64(field.frame.scale))
    x = graph.cast(graph("Mul", graph("Sub", "points", center), scale), np.float32)
    phi, gradient = _sines(graph, x, field.coarse.layers)
    for level in field.levels:
        phi, gradient = _over(graph, x, level, phi, gradient)
    column = graph("Div", phi, graph.constant(np.float32(field.frame.scale)))
    graph("Reshape", column, graph.constant(np.array([-1])), out="sdf")
    graph("Identity", gradient, out="gradient")
    model = helper.make_model(
        helper.make_graph(
            graph.nodes(helper),
            "signed distance field",
            [helper.make_tensor_value_info("points", TensorProto.DOUBLE, ["n", 3])],
            [
                helper.make_tensor_value_info("sdf", TensorProto.FLOAT, ["n"]),
                helper.make_tensor_value_info("gradient", TensorProto.FLOAT, ["n", 3]),
            ],
            [onnx.numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="sdfserver",
        doc_string="points (n, 3), world units -> sdf (n,), negative inside, and its gradient (n, 3)",
    )
    onnx.checker.check_model(model)
    written: bytes = model.SerializeToString(deterministic=True)
    return written


def onnx_difference(model: bytes, field: SavedField, *, samples: int = 4096, batch: int = 1024) -> tuple[float, float]:
    """How far an ONNX file's values, in world units, and gradients are at most from the field's, at random points.

    The points are spread over the cube that the field was fitted in. Raises MissingDependencyError without onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError("running ONNX needs onnxruntime: pip install onnxruntime") from None
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    points = field.frame.to_world(np.random.default_rng(0).uniform(-1, 1, (samples, 3)))
    worst = np.zeros(2)
    for start in range(0, samples, batch):
        part = points[start : start + batch]
        sdf, gradient = session.run(["sdf", "gradient"], {"points": part})
        off = np.abs(sdf - field.evaluate(part)).max(), np.abs(gradient - field.gradient(part)).max()
        worst = np.maximum(worst, off)
    return float(worst[0]), float(worst[1])


class _Graph:
    """Nodes and constants as they are added; calling it adds a node, and gives the name of what comes out."""

    def __init__(self) -> None:
        self.constants: dict[str, NDArray[Any]] = {}
        self._named: dict[Any, str] = {}
        self._nodes: list[tuple[str, tuple[str, ...], str, dict[str, Any]]] = []

    def __call__(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"v{len(self._nodes)}"
        self._nodes.append((op, inputs, name, attributes))
        return name

    def nodes(self, helper: Any) -> list[Any]:
        """As the package has them."""
        return [helper.make_node(op, inputs, [out], **attributes) for op, inputs, out, attributes in self._nodes]

    def constant(self, value: Any) -> str:
        """An array that is part of the file, once however often it is used."""
        array = np.asarray(value)
        # The large ones are the field's own, which outlives the graph.
        key = id(array) if array.nbytes > SMALL else (array.dtype.str, array.shape, array.tobytes())
        if key not in self._named:
            self._named[key] = f"c{len(self.constants)}"
            self.constants[self._named[key]] = array if array.ndim == 0 else np.ascontiguousarray(array)
        return self._named[key]

    def cast(self, value: str, dtype: type) -> str:
        """The same numbers as another type."""
        from onnx import helper

        return self("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def all(self, truths: str) -> str:
        """Whether all of each row of truths (n, m) are true, (n,)."""
        least = self("ReduceMin", self.cast(truths, np.int32), axes=[1], keepdims=0)
        return self.cast(least, np.bool_)

    def column(self, rows: str, i: int) -> str:
        """Column i (n, 1) of rows (n, m)."""
        return self("Gather", rows, self.constant(np.array([i])), axis=1)

    def total(self, values: list[str]) -> str:
        """The sum of several values."""
        return self("Sum", *values)


def _weights(field: SavedField) -> list[NDArray[Any]]:
    networks: list[Sines] = [field.coarse, *(level.sines for level in field.levels)]
    tables = [table for level in field.levels for table in (level.table, level.cells, level.linear)]
    return [array for sines in networks for layer in sines.layers for array in layer] + tables


def _sines(graph: _Graph, x: str, layers: Any, networks: str | None = None) -> tuple[str, str]:
    """The value (..., 1) and the gradient (..., 3) at x (..., 3): of one network, or of `networks` (p,) of many."""

    def held(array: NDArray[Any]) -> str:
        name = graph.constant(array)
        return name if networks is None else graph("Gather", name, networks, axis=0)

    swapped = [1, 0] if networks is None else [0, 2, 1]
    *sine_layers, (last, offset) = [(held(weight), held(bias)) for weight, bias in layers]
    slopes, h = [], x
    for weight, bias in sine_layers:
        z = graph("Add", graph("MatMul", h, weight), bias)
        h = graph("Sin", z)
        slopes.append(graph("Cos", z))
    phi = graph("Add", graph("MatMul", h, last), offset)
    adjoint = graph("Transpose", last, perm=swapped)
    for (weight, _), slope in zip(reversed(sine_layers), reversed(slopes), strict=True):
        adjoint = graph("MatMul", graph("Mul", slope, adjoint), graph("Transpose", weight, perm=swapped))
    return phi, adjoint


def _over(graph: _Graph, x: str, level: Level, phi: str, gradient: str) -> tuple[str, str]:
    """The level over the field phi (n, 1) and its gradient (n, 3): (1 - W) phi + sum of w f, and its gradient."""
    one, n_by_8 = graph.constant(np.float32(1)), graph.constant(np.array([8]))
    shape = graph("Concat", graph("Shape", x, end=1), n_by_8, axis=0)
    nothing = graph("ConstantOfShape", shape, value=_zero())
    total = graph.total([graph("ScatterND", nothing, *_of_cells(graph, x, level, bits)) for bits in _BITS])
    weight, value = graph.column(total, 0), graph.column(total, 4)
    slope, value_gradient = (graph("Gather", total, graph.constant(np.arange(i, i + 3)), axis=1) for i in (1, 5))
    left = graph("Sub", one, weight)
    below = graph("Sub", graph("Mul", left, gradient), graph("Mul", phi, slope))
    return graph("Add", graph("Mul", left, phi), value), graph("Add", below, value_gradient)


_BITS = list(itertools.product((0, 1), repeat=3))


def _of_cells(graph: _Graph, x: str, level: Level, bits: tuple[int, ...]) -> tuple[str, str]:
    """What the cells at home (bits 0) or beside it (1), along each axis, add at the points that they reach.

    Rows (p, 1) of x, and w, its gradient, w f and the gradient of that (p, 8).
    """
    side = len(level.table)
    width = np.float32(2 / side)
    half = width / 2 * np.float32(1 + level.margin)
    number = graph.constant
    t = graph("Div", graph("Add", x, number(np.float32(1))), number(width))
    home = graph("Floor", t)
    t = graph("Sub", t, home)
    middle = number(np.float32(0.5))
    beside = graph("Where", graph("Less", t, middle), number(np.int64(-1)), number(np.int64(1)))
    off_middle = graph("Abs", graph("Sub", t, middle))
    in_overlap = graph("Greater", off_middle, number(np.float32(0.5 - level.margin / 2)))
    reached = graph("Add", graph.cast(home, np.int64), graph("Mul", beside, number(np.array(bits, np.int64))))
    last_cell = number(np.int64(side - 1))
    within = graph("Clip", reached, number(np.int64(0)), last_cell)
    place = graph("Mul", within, number(np.array([side**2, side, 1], np.int64)))
    network = graph(
        "Gather",
        graph("Reshape", number(level.table), number(np.array([-1]))),
        graph("ReduceSum", place, number(np.array([1])), keepdims=0),
    )
    there = graph.all(graph("Equal", reached, within))
    overlaps = graph.all(graph("Or", in_overlap, number(np.array(bits) == 0)))
    has_one = graph("GreaterOrEqual", network, number(np.int64(0)))
    rows = graph("Transpose", graph("NonZero", graph("And", graph("And", there, overlaps), has_one)), perm=[1, 0])
    flat = graph("Reshape", rows, number(np.array([-1])))
    network = graph("Gather", network, flat)
    cell = graph("Gather", number(level.cells), network, axis=0)
    centre = graph("Sub", graph("Mul", graph("Add", cell, middle), number(width)), number(np.float32(1)))
    u = graph("Div", graph("Sub", graph("Gather", x, flat, axis=0), centre), number(half))
    alone = graph("Unsqueeze", u, number(np.array([1])))
    f, g = _sines(graph, alone, level.sines.layers, network)
    linear = graph("Gather", number(level.linear), network, axis=0)
    f = graph("Add", f, graph("MatMul", alone, linear))
    g = graph("Add", g, graph("Transpose", linear, perm=[0, 2, 1]))
    f = graph("Mul", graph("Reshape", f, number(np.array([-1, 1]))), number(half))
    g = graph("Reshape", g, number(np.array([-1, 3])))
    w, dw = _ramps(graph, u, level.margin, half)
    wf = graph("Add", graph("Mul", w, g), graph("Mul", f, dw))
    return rows, graph("Concat", w, dw, graph("Mul", w, f), wf, axis=1)


def _ramps(graph: _Graph, u: str, margin: float, half: np.float32) -> tuple[str, str]:
    """The weight (p, 1) of a cell at u (p, 3), and its gradient (p, 3)."""
    number = graph.constant
    steepness = np.float32((1 + margin) / (2 * margin))
    one = number(np.float32(1))
    t = graph("Mul", graph("Sub", one, graph("Abs", u)), number(steepness))
    t = graph("Clip", t, number(np.float32(0)), one)
    # 6 t^2 - 15 t + 10, and t^2 (1 - t)^2
    inner = graph("Sub", graph("Mul", t, number(np.float32(6))), number(np.float32(15)))
    inner = graph("Add", graph("Mul", t, inner), number(np.float32(10)))
    cube = graph("Mul", t, graph("Mul", t, t))
    s = graph("Mul", cube, inner)
    bump = graph("Mul", t, graph("Sub", one, t))
    ds = graph("Mul", graph("Mul", bump, bump), graph("Mul", graph("Sign", u), number(-30 * steepness / half)))
    each, slopes = [graph.column(s, i) for i in range(3)], [graph.column(ds, i) for i in range(3)]
    gradient = []
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        gradient.append(graph("Mul", slopes[i], graph("Mul", each[j], each[k])))
    return graph("Mul", each[0], graph("Mul", each[1], each[2])), graph("Concat", *gradient, axis=1)


def _zero() -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.zeros(1, np.float32))
