"""SIREN: an MLP with sine activations (Sitzmann et al., Implicit Neural Representations, NeurIPS 2020).

Symbols: x (n, 3) points in the unit frame; phi (n,) the value; g (n, 3) = d phi / d x.
Layer: h = sin(omega (h W + b)); the last one is linear.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sdfserver.config import NetworkConfig


class Siren(nn.Module):
    """A SIREN 3 -> hidden x layers -> 1."""

    def __init__(self, config: NetworkConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out, bound in layers_of(config):
            self.weights.append(uniform((fan_out, fan_in), bound, generator))
            self.biases.append(uniform((fan_out,), 1 / math.sqrt(fan_in), generator))

    def forward(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """The value phi (n,) at x (n, 3), computed in `dtype` if it is not that of x."""
        *sine_layers, (last, offset) = self._scaled_layers(dtype or x.dtype)
        h = x.to(last.dtype)
        for weight, bias in sine_layers:
            h = torch.addmm(bias, h, weight).sin()
        return torch.addmm(offset, h, last)[:, 0].to(x.dtype)

    def value_and_gradient(self, x: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The value phi (n,) and its gradient (n, 3) at x (n, 3), computed in `dtype` if it is not that of x."""
        layers = self._scaled_layers(dtype or x.dtype)
        phi, gradient = value_and_gradient(x.to(layers[0][0].dtype), None, layers)
        return phi.to(x.dtype), gradient.to(x.dtype)

    def _scaled_layers(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Weight (in, out) and bias (1, out) of every layer, omega multiplied in here rather than into every z."""
        omega = self.config.omega
        layers = [(weight.T, bias[None]) for weight, bias in zip(self.weights, self.biases, strict=True)]
        layers = [*((weight * omega, bias * omega) for weight, bias in layers[:-1]), layers[-1]]
        return [(weight.to(dtype), bias.to(dtype)) for weight, bias in layers]


def value_and_gradient(u: Tensor, linear: Tensor | None, layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The value (..., n) and the gradient (..., n, 3), at u (..., n, 3), of one SIREN or of k in a batch.

    layers: weights (..., in, out) and biases (..., 1, out), omega multiplied in; linear: None, or a (..., 3, 1) of a
    term a . u beside the sines. A loss on both can be differentiated with respect to the layers and to `linear`.
    """
    flat = [tensor for layer in layers for tensor in layer]
    value, gradient = _ValueAndGradient.apply(torch.is_grad_enabled(), u, linear, *flat)  # type: ignore[no-untyped-call]
    return value, gradient


class _ValueAndGradient(torch.autograd.Function):
    """Both passes written out.

    The gradient is an adjoint sweep of ordinary products, so that one backward pass differentiates a loss on it: no
    double backward. And automatic differentiation would take each sine and cosine again on the way back.

    Symbols: layer l: z_l = s_(l-1) W_l + b_l, s_l = sin z_l, c_l = cos z_l, s_0 = u; adjoints p_l = d phi / d s_l and
    a_l = d phi / d z_l = c_l p_l; the gradient is a_1 W_1^T. D stands for the loss's derivative with respect to.
    """

    @staticmethod
    def forward(ctx: Any, keep: bool, u: Tensor, linear: Tensor | None, *layers: Tensor) -> tuple[Tensor, Tensor]:
        *weights, last = layers[0::2]
        *biases, offset = layers[1::2]
        sines, cosines = [u], []
        for weight, bias in zip(weights, biases, strict=True):
            z = _affine(bias, sines[-1], weight)
            cosines.append(z.cos())
            sines = [*(sines if keep else []), z.sin_()]
        phi = _affine(offset, sines[-1], last)
        pulls, adjoints = [last.mT], []
        for i in reversed(range(len(weights))):
            adjoint = cosines[i] * pulls[-1]
            pull = adjoint @ weights[i].mT
            if keep:
                adjoints.append(adjoint)
                pulls.append(pull)
            else:
                pulls = [pull]
                del cosines[i]
        gradient = pulls.pop()
        if linear is not None:
            phi, gradient = phi + u @ linear, gradient + linear.mT
        ctx.depth, ctx.has_linear = len(weights), linear is not None
        if keep:
            ctx.save_for_backward(*weights, last, *sines, *cosines, *reversed(pulls), *reversed(adjoints))
        return phi[..., 0], gradient

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_phi, d_gradient = grads[0][..., None], grads[1]
        saved, n = list(ctx.saved_tensors), ctx.depth
        weights, last, sines = saved[:n], saved[n], saved[n + 1 : 2 * n + 2]
        cosines, pulls, adjoints = (saved[2 * n + 2 + i * n : 2 * n + 2 + (i + 1) * n] for i in range(3))
        d_linear = sines[0].mT @ d_phi + _total(d_gradient).mT if ctx.has_linear else None
        d_weights, d_cosines, d_pull = [], [], d_gradient
        for weight, cosine, pull, adjoint in zip(weights, cosines, pulls, adjoints, strict=True):
            d_weights.append(d_pull.mT @ adjoint)
            d_adjoint = d_pull @ weight
            d_cosines.append(d_adjoint * pull)
            d_pull = d_adjoint.mul_(cosine)
        d_last = _total(d_pull).mT + sines[-1].mT @ d_phi
        d_layers = [d_last, _total(d_phi)]
        d_sine = d_phi * last.mT
        for i in reversed(range(n)):
            d_z = d_sine.mul_(cosines[i]).addcmul_(d_cosines[i], sines[i + 1], value=-1)
            d_layers = [_affine(d_weights[i], sines[i].mT, d_z), _total(d_z), *d_layers]
            d_sine = d_z @ weights[i].mT if i else d_z
        return None, None, d_linear, *d_layers


def _affine(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The sum of `bias` and x W, of one network or of a batch."""
    return torch.addmm(bias, x, weight) if x.ndim == 2 else torch.baddbmm(bias, x, weight)


def _total(d: Tensor) -> Tensor:
    """The sum (..., 1, m) over the points of d (..., n, m)."""
    return d.sum(dim=-2, keepdim=True)


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
