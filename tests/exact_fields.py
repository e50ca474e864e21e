"""Fields whose surface is known, in place of fitted ones."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfserver.cloud import Frame, PointCloud
from sdfserver.queries import FieldQueries

Distance = Callable[[Tensor], Tensor]
CENTER, SCALE = np.array([10.0, -20.0, 5.0]), 0.5


def ball(radius: float) -> Distance:
    return lambda x: x.norm(dim=1) - radius


def ring(major: float = 0.55, minor: float = 0.25) -> Distance:
    return lambda x: torch.hypot(torch.hypot(x[:, 0], x[:, 1]) - major, x[:, 2]) - minor


def box(*half: float) -> Distance:
    def distance(x: Tensor) -> Tensor:
        off = x.abs() - torch.tensor(half, dtype=x.dtype)
        # A root has no slope at zero.
        return (off.clamp(min=0).square().sum(dim=1) + 1e-24).sqrt() + off.amax(dim=1).clamp(max=0)

    return distance


class Field:
    """A field from a function of points (n, 3); gradients by autograd."""

    device = torch.device("cpu")

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.value = function

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            phi = self.value(x)
            (gradient,) = torch.autograd.grad(phi.sum(), x)
        return phi.detach(), gradient


class ExactField(FieldQueries):
    """`phi` in the unit frame with its derivatives by torch; `stretch` leaves its surface and makes it no distance."""

    detail = 64
    device = torch.device("cpu")

    def __init__(self, phi: Distance, stretch: float = 0.6) -> None:
        self.frame = Frame(center=CENTER, scale=SCALE)
        self._phi, self._stretch = phi, stretch

    def value(self, x: Tensor) -> Tensor:
        stretched: Tensor = self._phi(x) * (1 + self._stretch * torch.sin(3 * x[:, 0] + x[:, 1]))
        return stretched

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            phi = self.value(x)
            (gradient,) = torch.autograd.grad(phi.sum(), x)
        return phi.detach(), gradient

    @torch.enable_grad()
    def at(self, x: NDArray[np.float64], order: int) -> tuple[NDArray[np.float64], ...]:
        there = torch.tensor(x, requires_grad=True)
        phi = self.value(there)
        out = [phi]
        if order > 0:
            out += torch.autograd.grad(phi.sum(), there, create_graph=order > 1)
        if order > 1:
            slopes = [torch.autograd.grad(out[1][:, axis].sum(), there, retain_graph=True)[0] for axis in range(3)]
            out.append(torch.stack(slopes, dim=1))
        return tuple(values.detach().numpy() for values in out)


def to_unit(points: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy((points - CENTER) * SCALE)


def cloud_of(points_unit: NDArray[np.float64], normals: NDArray[np.float64]) -> PointCloud:
    return PointCloud(points=points_unit / SCALE + CENTER, normals=normals)
