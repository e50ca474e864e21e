"""What else the literature shows a SIREN to do, each beside a ReLU network of the same size and with a figure measured.

Images are gray, (n, n), 0 to 1, on [-1, 1]^2 with pixel centres as samples; networks are those of the fits, at z = 0.
All after Sitzmann et al. 2020: an image from its values, its gradient alone or its Laplacian alone (Poisson's problem;
sections 4.1 and 4.2), two images fused by their gradients, and Helmholtz's equation (section 4.3), here in a
box with real values so that finite differences can check it.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator
from scipy.ndimage import gaussian_filter
from scipy.sparse import diags, identity, kron
from scipy.sparse.linalg import spsolve
from skimage.transform import resize
from torch import Tensor, nn

from sdfserver.compare.choices import Choice
from sdfserver.compare.networks import laplacian, network_named, value_and_gradient

Image = NDArray[np.float64]

NETWORKS = (Choice(name="siren"), Choice(name="relu"))
SIZE = 64
"""Pixels along a side."""
HIDDEN, LAYERS = 64, 3
RATE = 2e-3
WAVE_NUMBER = 6.0
"""Of Helmholtz's equation in the box of side 2: two waves across, and between two resonances (5.66 and 6.48)."""
SOURCE_WIDTH = 0.12
REFERENCE_NODES = 257


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """One network on one problem. `residual` is that of what was asked for, relative; `psnr` that of `image` in dB."""

    problem: str
    network: Choice
    steps: int
    seconds: float
    psnr: float
    residual: float
    image: Image
    truth: Image


def grid(size: int) -> Tensor:
    """Pixel centres (size^2, 3) in [-1, 1]^2, row by row from y = -1, z = 0."""
    ticks = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    return torch.stack([x.flatten(), y.flatten(), torch.zeros(size**2)], dim=1)


def photograph(name: str, size: int = SIZE) -> Image:
    """One of scikit-image's photographs, made small and smooth enough for differences to be derivatives."""
    from skimage import data

    image = np.asarray(getattr(data, name)(), dtype=np.float64)
    image = image.mean(axis=-1) if image.ndim == 3 else image
    side = min(image.shape)
    top, left = ((length - side) // 2 for length in image.shape)
    small = gaussian_filter(resize(image[top : top + side, left : left + side], (size, size), anti_aliasing=True), 0.7)
    low, high = small.min(), small.max()
    scaled: Image = (small - low) / (high - low)
    return scaled


def gradient_of(image: Image) -> Tensor:
    """Its gradient (n^2, 2) on [-1, 1]^2 by central differences: along x, along y."""
    dy, dx = np.gradient(image, 2 / len(image))
    return torch.tensor(np.stack([dx.ravel(), dy.ravel()], axis=1), dtype=torch.float32)


def laplacian_of(image: Image) -> Tensor:
    """Its Laplacian (n^2,) on [-1, 1]^2, by differences of the gradient."""
    dy, dx = np.gradient(image, 2 / len(image))
    total = np.gradient(dx, 2 / len(image), axis=1) + np.gradient(dy, 2 / len(image), axis=0)
    return torch.tensor(total.ravel(), dtype=torch.float32)


def psnr(found: Image, truth: Image, *, up_to: str = "") -> float:
    """Peak signal to noise ratio in dB, the peak being the range of the truth.

    up_to: "level" or "line": of the constant, or of the plane a + b x + c y, that brings `found` closest. Derivatives
    do not know it: a gradient leaves the constant open, a Laplacian all that is harmonic, of which this is the least.
    """
    columns = [np.ones(truth.size)]
    if up_to == "line":
        columns += list(grid(len(truth)).numpy()[:, :2].T.astype(np.float64))
    if up_to:
        basis = np.stack(columns, axis=1)
        off = np.linalg.lstsq(basis, (truth - found).ravel(), rcond=None)[0]
        found = found + (basis @ off).reshape(truth.shape)
    return float(10 * math.log10(np.ptp(truth) ** 2 / max(float(((found - truth) ** 2).mean()), 1e-300)))


Loss = Callable[[nn.Module, torch.Generator], Tensor]
"""Of a network; what is drawn at random for it is drawn by the generator."""


def descend(network: nn.Module, loss: Loss, steps: int, generator: torch.Generator) -> float:
    """Adam, its rate falling as half a cosine; the seconds that it took."""
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network, generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What a network is asked for: a loss, relative and squared, and the truth that it does not see."""

    name: str
    loss: Loss
    truth: Image
    up_to: str = ""
    """As `psnr`."""
    omega: float = 30.0
    """Of the SIREN. Second derivatives grow as its square, and a few samples tell little of waves between them."""
    shaped: Callable[[nn.Module], nn.Module] = lambda network: network
    """What is made of the network for what is known beforehand."""

    def solve(self, choice: Choice, steps: int, seed: int) -> Piece:
        """By one network."""
        network = self.shaped(
            network_named(
                choice.name,
                encoding=choice.encoding,
                hidden=HIDDEN,
                layers=LAYERS,
                omega=self.omega,
                generator=torch.Generator().manual_seed(seed),
            )
        )
        generator = torch.Generator().manual_seed(seed)
        seconds = descend(network, self.loss, steps, generator)
        with torch.no_grad():
            image = network(grid(len(self.truth))).double().numpy().reshape(self.truth.shape)
        return Piece(
            problem=self.name,
            network=choice,
            steps=steps,
            seconds=seconds,
            psnr=psnr(image, self.truth, up_to=self.up_to),
            residual=math.sqrt(float(self.loss(network, generator).detach())),
            image=image,
            truth=self.truth,
        )


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """The squared error over the wanted's mean square."""
    total: Tensor = (found - wanted).square().mean() / wanted.square().mean()
    return total


def by_values(image: Image) -> Problem:
    """The image from its pixels."""
    x, wanted = grid(len(image)), torch.tensor(image.ravel(), dtype=torch.float32)
    return Problem(name="values", loss=lambda network, _: _relative(network(x), wanted), truth=image)


def by_gradients(image: Image, *, name: str = "gradients", wanted: Tensor | None = None) -> Problem:
    """The image from its gradient alone, or from the `wanted` one (n^2, 2)."""
    x, slope = grid(len(image)), gradient_of(image) if wanted is None else wanted

    def loss(network: nn.Module, _: torch.Generator) -> Tensor:
        return _relative(value_and_gradient(network, x, keep=True)[1][:, :2], slope)

    return Problem(name=name, loss=loss, truth=image, up_to="level")


def by_laplacian(image: Image) -> Problem:
    """The image from its Laplacian alone."""
    x, wanted = grid(len(image)), laplacian_of(image)
    return Problem(
        name="Laplacian",
        loss=lambda network, _: _relative(laplacian(network, x, axes=2)[2], wanted),
        truth=image,
        up_to="line",
        omega=15.0,
    )


def fused(first: Image, second: Image) -> Problem:
    """Two images by the mean of their gradients (Perez et al., Poisson image editing, 2003), which their mean has."""
    wanted = (gradient_of(first) + gradient_of(second)) / 2
    return by_gradients((first + second) / 2, name="fusion", wanted=wanted)


def source(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the waves come from: a Gaussian off the middle."""
    bump: NDArray[np.float64] = np.exp(-((x - 0.2) ** 2 + (y + 0.3) ** 2) / (2 * SOURCE_WIDTH**2))
    return bump


def helmholtz_by_differences(nodes: int = REFERENCE_NODES) -> NDArray[np.float64]:
    """Helmholtz's u (nodes, nodes) on [-1, 1]^2 by central differences, rows along y: zero on the border."""
    h, inner = 2 / (nodes - 1), nodes - 2
    ticks = np.linspace(-1, 1, nodes)[1:-1]
    second = diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(inner, inner)) / h**2
    one = identity(inner)
    matrix = kron(second, one) + kron(one, second) + WAVE_NUMBER**2 * identity(inner**2)
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    u = np.zeros((nodes, nodes))
    u[1:-1, 1:-1] = spsolve(matrix.tocsc(), -_SOURCE_SCALE * source(x, y).ravel()).reshape(inner, inner)
    return u


_SOURCE_SCALE = 100.0
"""So that u is of the order of one."""


class ZeroOnTheBorder(nn.Module):
    """(1 - x^2) (1 - y^2) times a network: zero on the box's border, whatever the network is (Lagaris et al. 1998)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """The value (n,) at x (n, 3)."""
        total: Tensor = (1 - x[:, :2] ** 2).prod(dim=1) * self.network(x)
        return total


def helmholtz(size: int = SIZE) -> Problem:
    """Laplacian u + k^2 u = -f in the box, u = 0 on its border: the equation alone, without a value inside."""
    h = 2 / size

    def loss(network: nn.Module, generator: torch.Generator) -> Tensor:
        # Somewhere else in every pixel each time: between fixed points the waves could do as they like.
        x = grid(size)
        x[:, :2] += h * (torch.rand((len(x), 2), generator=generator) - 0.5)
        at = x.double().numpy()
        wanted = torch.tensor(-_SOURCE_SCALE * source(at[:, 0], at[:, 1]), dtype=torch.float32)
        u, _, bent = laplacian(network, x, axes=2)
        return _relative(bent + WAVE_NUMBER**2 * u, wanted)

    u = helmholtz_by_differences()
    ticks_of = np.linspace(-1, 1, len(u))
    at_pixels = grid(size).double().numpy()[:, [1, 0]]
    truth = RegularGridInterpolator((ticks_of, ticks_of), u, method="cubic")(at_pixels).reshape(size, size)
    return Problem(name="Helmholtz", loss=loss, truth=truth, omega=10.0, shaped=ZeroOnTheBorder)


def problems(size: int = SIZE) -> list[Problem]:
    """All of them."""
    first, second = photograph("camera", size), photograph("astronaut", size)
    return [by_values(first), by_gradients(first), by_laplacian(first), fused(first, second), helmholtz(size)]


def gallery(
    some: Sequence[Problem], steps: int, *, seed: int = 0, on_piece: Callable[[Piece], None] | None = None
) -> list[Piece]:
    """Each problem solved by each network, in so many steps."""
    pieces = []
    for problem in some:
        for choice in NETWORKS:
            pieces.append(problem.solve(choice, steps, seed))
            if on_piece is not None:
                on_piece(pieces[-1])
    return pieces


def figures_of(pieces: Sequence[Piece]) -> dict[str, Any]:
    """As plain data."""
    return {
        "size": SIZE,
        "network": {"hidden": HIDDEN, "layers": LAYERS},
        "pieces": [
            {
                "problem": piece.problem,
                "network": piece.network.written,
                "steps": piece.steps,
                "seconds": piece.seconds,
                "psnr_db": piece.psnr,
                "relative_residual": piece.residual,
            }
            for piece in pieces
        ],
    }


def write_sheet(pieces: Sequence[Piece], path: Path) -> None:
    """Write a picture of all: a row for each problem, the truth first."""
    from PIL import Image as Picture
    from PIL import ImageDraw, ImageFont

    from sdfserver.files import replacing

    px, gap, head = 192, 12, 22
    rows = list(dict.fromkeys(piece.problem for piece in pieces))
    columns = 1 + max(sum(piece.problem == row for piece in pieces) for row in rows)
    sheet = Picture.new("RGB", (columns * (px + gap) + gap, len(rows) * (px + head + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, row in enumerate(rows):
        some = [piece for piece in pieces if piece.problem == row]
        truth = some[0].truth
        titled = [(f"{row}: truth", truth)]
        titled += [
            (f"{p.network.title}: {p.psnr:.1f} dB, residual {p.residual:.2g}", p.image - p.image.mean() + truth.mean())
            for p in some
        ]
        for j, (title, image) in enumerate(titled):
            x, y = gap + j * (px + gap), gap + i * (px + head + gap)
            pen.text((x, y), title, "black", font)
            gray = np.clip((image - truth.min()) / np.ptp(truth), 0, 1) * 255
            shown = Picture.fromarray(gray.round().astype(np.uint8)).resize((px, px), Picture.Resampling.NEAREST)
            sheet.paste(shown, (x, y + head))
    with replacing(path) as stream:
        sheet.save(stream, "PNG", optimize=True)


def table_text(pieces: Sequence[Piece]) -> str:
    """A table for a terminal."""
    lines = [f"{'problem':12}{'network':10}{'PSNR dB':>9}{'residual':>10}{'steps':>7}{'seconds':>9}"]
    lines += [
        f"{p.problem:12}{p.network.written:10}{p.psnr:9.1f}{p.residual:10.4f}{p.steps:7d}{p.seconds:9.1f}"
        for p in pieces
    ]
    return "\n".join(lines)
