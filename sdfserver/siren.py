"""SIREN: an MLP with sine activations (Sitzmann et al., Implicit Neural Representations, NeurIPS 2020).

Symbols: x (n, 3) points in the unit frame; phi (n,) the value; g (n, 3) = d phi / d x.
Layer: h = sin(omega (W h + b)); the last one is linear.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

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
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out, bound in layers_of(config):
            self.weights.append(uniform((fan_out, fan_in), bound, generator))
            self.biases.append(uniform((fan_out,), 1 / math.sqrt(fan_in), generator))

    def forward(self, x: Tensor) -> Tensor:
        """The value phi (n,) at x (n, 3)."""
        *sine_layers, (last, offset) = self._scaled_layers()
        for weight, bias in sine_layers:
            x = torch.sin(torch.addmm(bias, x, weight.T))
        return torch.addmm(offset, x, last.T)[:, 0]

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value phi (n,) and its gradient (n, 3) at x (n, 3)."""
        *sine_layers, (last, offset) = self._scaled_layers()
        slopes = []
        for weight, bias in sine_layers:
            z = torch.addmm(bias, x, weight.T)
            x = torch.sin(z)
            slopes.append(torch.cos(z))
        phi = torch.addmm(offset, x, last.T)[:, 0]
        adjoint = last
        for (weight, _), slope in zip(reversed(sine_layers), reversed(slopes), strict=True):
            adjoint = (slope * adjoint) @ weight
        return phi, adjoint

    def _scaled_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every layer, omega multiplied in once here rather than into every activation."""
        omega = self.config.omega
        layers = [(weight * omega, bias * omega) for weight, bias in zip(self.weights, self.biases, strict=True)]
        return [*layers[:-1], (self.weights[-1], self.biases[-1])]


def layers_of(config: NetworkConfig) -> Iterator[tuple[int, int, float]]:
    """Of each layer: how wide it is before and after, and the bound of its initial weights.

    Sitzmann et al. 2020, section 3.2: the first layer spans omega periods, the others keep the distribution of the
    activations.
    """
    sizes = [3] + [config.hidden] * config.layers + [1]
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        yield fan_in, fan_out, 1 / fan_in if i == 0 else math.sqrt(6 / fan_in) / config.omega


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator | None) -> nn.Parameter:
    """A parameter, evenly drawn between -bound and bound."""
    return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)
