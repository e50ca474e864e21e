"""SIREN: an MLP with sine activations (Sitzmann et al., Implicit Neural Representations, NeurIPS 2020).

Symbols: x (n, 3) points in the unit frame; phi (n,) the value; g (n, 3) = d phi / d x.
Layer: h = sin(omega (W h + b)); the last one is linear.
"""

import math

import torch
from torch import Tensor, nn

from sdfserver.config import NetworkConfig


class Siren(nn.Module):
    """A SIREN 3 -> hidden x layers -> 1.

    The gradient with respect to the points is an adjoint sweep written out as ordinary products, so that one
    ordinary backward pass differentiates a loss on it: no double backward.
    """

    def __init__(self, config: NetworkConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        sizes = [3] + [config.hidden] * config.layers + [1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            # Sitzmann et al. 2020, section 3.2: the first layer spans omega periods, the others keep the
            # distribution of the activations.
            bound = 1 / fan_in if i == 0 else math.sqrt(6 / fan_in) / config.omega
            self.weights.append(_uniform((fan_out, fan_in), bound, generator))
            self.biases.append(_uniform((fan_out,), 1 / math.sqrt(fan_in), generator))

    def forward(self, x: Tensor) -> Tensor:
        """phi (n,) at x (n, 3)."""
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = torch.sin(self.config.omega * torch.addmm(bias, x, weight.T))
        return torch.addmm(self.biases[-1], x, self.weights[-1].T)[:, 0]

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """phi (n,) and its gradient (n, 3) at x (n, 3)."""
        omega, slopes = self.config.omega, []
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            z = omega * torch.addmm(bias, x, weight.T)
            x = torch.sin(z)
            slopes.append(omega * torch.cos(z))
        phi = torch.addmm(self.biases[-1], x, self.weights[-1].T)[:, 0]
        adjoint = slopes[-1] * self.weights[-1]
        for weight, slope in zip(reversed(self.weights[1:-1]), reversed(slopes[:-1]), strict=True):
            adjoint = slope * (adjoint @ weight)
        return phi, adjoint @ self.weights[0]


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)
