"""Networks x (n, 3) -> phi (n,), interchangeable: one interface, each with the initial weights that its authors give.

SIREN is the one of the fits (`siren`). Symbols: h the activations of a layer, z = W h + b what goes into the next one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdfserver.compare.choices import Choice
from sdfserver.config import NetworkConfig
from sdfserver.siren import Siren

LEAK = 0.01
"""Slope of the leaky ReLU below zero."""
SOFTPLUS_BETA = 100.0
"""Sharpness of the softplus, as Gropp et al. 2020 have it."""
SNAKE_A = 5.0
"""At which Snake's frequencies begin: Ziyin et al. 2020 advise 5 to 50 where waves are expected."""
OCTAVES = 2
"""Frequencies of an encoding: pi, 2 pi. With four, fits of a few hundred steps end at three to four times the loss."""


class Snake(nn.Module):
    """x + sin^2(a x) / a, with an `a` to be learned for each unit (Ziyin, Hartwig, Ueda, NeurIPS 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((width,), SNAKE_A))

    def forward(self, z: Tensor) -> Tensor:
        """Of z (n, width), elementwise."""
        return z + (self.a * z).sin().square() / self.a


class SelfNormalisingSine(nn.Module):
    """sqrt(2) sin(z + pi/4) = sin z + cos z (Laang's note).

    Where z is spread evenly about 0, its square is 1 in the mean and so is its slope's, however wide z is spread: what
    is left of each, +-sin 2z, is odd. Weights that keep lengths then keep both from layer to layer.
    """

    def forward(self, z: Tensor) -> Tensor:
        """Of z, elementwise."""
        return math.sqrt(2) * (z + math.pi / 4).sin()


class Encoding(nn.Module):
    """Sines and cosines of rotated copies of the coordinates, at doubling frequencies: (n, 3) -> (n, width).

    One copy, the coordinates themselves kept beside it: Mildenhall et al. 2020 (NeRF).
    """

    frequencies: Tensor

    def __init__(self, rotations: Tensor, *, amplitude: float, keep: bool, octaves: int) -> None:
        """rotations: (r, 3, 3)."""
        super().__init__()
        axes = rotations.reshape(-1, 3)
        octave = math.pi * 2.0 ** torch.arange(octaves)
        self.register_buffer("frequencies", (octave[:, None, None] * axes).reshape(-1, 3))
        self.amplitude, self.keep = amplitude, keep
        self.width = 2 * len(self.frequencies) + (3 if keep else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Of points x (n, 3)."""
        z = x @ self.frequencies.T
        waves = [self.amplitude * z.sin(), self.amplitude * z.cos()]
        return torch.cat([x, *waves] if self.keep else waves, dim=1)


def spread_rotations() -> Tensor:
    """Five rotations (5, 3, 3) that spread the three axes as evenly as it goes: by fifths of a turn about (0, 1, g).

    In the plane two axes are turned by thirds of a right angle. In space the five cubes that fit into a dodecahedron do
    the same: g being the golden ratio, the fifteen axes are those about which an icosahedron is itself after half a
    turn. The nearest two are 36 degrees apart, and their fourth moments are the same in every direction.
    """
    golden = (1 + math.sqrt(5)) / 2
    y, z = (value / math.hypot(1, golden) for value in (1, golden))
    cross = torch.tensor([[0, -z, y], [z, 0, 0], [-y, 0, 0]], dtype=torch.float64)
    turns = [2 * math.pi * i / 5 for i in range(5)]
    # Rodrigues' formula.
    rotations = [
        torch.eye(3, dtype=torch.float64) + math.sin(t) * cross + (1 - math.cos(t)) * cross @ cross for t in turns
    ]
    return torch.stack(rotations).float()


def encoding_named(name: str, octaves: int = OCTAVES) -> Encoding | None:
    """`pe`, `rotated`, or nothing for `none`."""
    if name == "pe":
        return Encoding(torch.eye(3)[None], amplitude=1.0, keep=True, octaves=octaves)
    if name == "rotated":
        # A sine and a cosine of this amplitude have a mean square of 1, as the layers behind them expect.
        return Encoding(spread_rotations(), amplitude=math.sqrt(2), keep=False, octaves=octaves)
    return None


Initialise = Callable[[Tensor, torch.Generator | None], object]


def he(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Keeps the mean square through a ReLU (He et al., ICCV 2015), and about so through its smooth kin."""
    return nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)


def he_leaky(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """The same for a leaky ReLU."""
    return nn.init.kaiming_normal_(weight, a=LEAK, nonlinearity="leaky_relu", generator=generator)


def lecun(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Variance 1 / fan-in, which SELU needs to normalise itself (Klambauer et al., NeurIPS 2017)."""
    return nn.init.kaiming_normal_(weight, nonlinearity="linear", generator=generator)


def glorot(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """For tanh (Glorot and Bengio, AISTATS 2010)."""
    return nn.init.xavier_uniform_(weight, generator=generator)


def for_snake(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Evenly drawn, of variance 1 / fan-in over that of Snake's output for a normal z (Ziyin et al. 2020)."""
    square = SNAKE_A**2
    variance = 1 + (1 + math.exp(-8 * square) - 2 * math.exp(-4 * square)) / (8 * square)
    bound = math.sqrt(3 / weight.shape[1] / variance)
    return nn.init.uniform_(weight, -bound, bound, generator=generator)


def orthogonal(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Orthonormal rows or columns, times what keeps the mean square where a layer is wider than what it is given."""
    fan_out, fan_in = weight.shape
    return nn.init.orthogonal_(weight, gain=math.sqrt(max(1.0, fan_out / fan_in)), generator=generator)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What one network has between its layers: `make` it for a width; and how its weights begin."""

    make: Callable[[int], nn.Module]
    initialise: Initialise


KINDS: Mapping[str, Kind] = {
    "snake": Kind(make=Snake, initialise=for_snake),
    "sine": Kind(make=lambda _: SelfNormalisingSine(), initialise=orthogonal),
    "relu": Kind(make=lambda _: nn.ReLU(), initialise=he),
    "leaky": Kind(make=lambda _: nn.LeakyReLU(LEAK), initialise=he_leaky),
    "tanh": Kind(make=lambda _: nn.Tanh(), initialise=glorot),
    "softplus": Kind(make=lambda _: nn.Softplus(beta=SOFTPLUS_BETA), initialise=he),
    "swish": Kind(make=lambda _: nn.SiLU(), initialise=he),
    "elu": Kind(make=lambda _: nn.ELU(), initialise=he),
    "selu": Kind(make=lambda _: nn.SELU(), initialise=lecun),
    "gelu": Kind(make=lambda _: nn.GELU(), initialise=he),
}
"""Swish: Ramachandran et al. 2017. ELU: Clevert et al. 2016. GELU: Hendrycks and Gimpel 2016."""


class Mlp(nn.Module):
    """Layers 3 -> hidden x layers -> 1 with one kind of activation between them, behind an encoding if there is one."""

    def __init__(
        self, kind: Kind, encoding: Encoding | None, *, hidden: int, layers: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.encoding = encoding
        width = 3 if encoding is None else encoding.width
        sizes = [width] + [hidden] * layers + [1]
        linear = [nn.Linear(sizes[i], sizes[i + 1]) for i in range(layers + 1)]
        self.activations = nn.ModuleList([kind.make(hidden) for _ in range(layers)])
        for layer in linear:
            kind.initialise(layer.weight, generator)
            nn.init.zeros_(layer.bias)
        self.linear = nn.ModuleList(linear)

    def forward(self, x: Tensor) -> Tensor:
        """The value phi (n,) at x (n, 3)."""
        h = x if self.encoding is None else self.encoding(x)
        *inner, last = self.linear
        for layer, activation in zip(inner, self.activations, strict=True):
            h = activation(layer(h))
        phi: Tensor = last(h)[:, 0]
        return phi


def network_named(
    name: str,
    *,
    encoding: str = "none",
    hidden: int = 96,
    layers: int = 4,
    omega: float = 30.0,
    octaves: int = OCTAVES,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """The network called `name`, x (n, 3) -> phi (n,), of so many layers of `hidden` units, behind an `encoding`.

    `octaves` is how many frequencies the encoding has. `omega` is SIREN's, which takes no encoding, for its first layer
    is one. Raises ConfigError.
    """
    config = NetworkConfig(hidden=hidden, layers=layers, omega=omega)
    choice = Choice(name=name, encoding=encoding)
    if choice.name == "siren":
        return Siren(config, generator=generator)
    return Mlp(KINDS[name], encoding_named(encoding, octaves), hidden=hidden, layers=layers, generator=generator)


def value_and_gradient(network: nn.Module, x: Tensor, *, keep: bool = False) -> tuple[Tensor, Tensor]:
    """The value phi (n,) and its gradient (n, 3) at x (n, 3), by automatic differentiation.

    With `keep` both can be differentiated again, with respect to the network's parameters and to nothing else.
    """
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        phi = network(at)
        (gradient,) = torch.autograd.grad(phi.sum(), at, create_graph=keep)
    return (phi, gradient) if keep else (phi.detach(), gradient)


def laplacian(network: nn.Module, x: Tensor, *, axes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """The value (n,), the gradient (n, 3) and the sum (n,) of the second derivatives along the first `axes` axes.

    All can be differentiated again with respect to the network's parameters.
    """
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        phi = network(at)
        (gradient,) = torch.autograd.grad(phi.sum(), at, create_graph=True)
        total = torch.zeros_like(phi)
        for i in range(axes):
            (second,) = torch.autograd.grad(
                gradient[:, i].sum(), at, create_graph=True, allow_unused=True, materialize_grads=True
            )
            total = total + second[:, i]
    return phi, gradient, total


class NetworkField:
    """A network as a field that a surface can be extracted from (`extract.ScalarField`)."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def value(self, x: Tensor) -> Tensor:
        """The field (n,) at x (n, 3)."""
        phi: Tensor = self.network(x)
        return phi

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The field (n,) and its gradient (n, 3) at x (n, 3)."""
        return value_and_gradient(self.network, x)
