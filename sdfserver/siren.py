"""SIREN: an MLP with sine activations (Sitzmann et al., Implicit Neural Representations, NeurIPS 2020).

Symbols: x (n, 3) points in the unit frame; phi (n,) the value; g (n, 3) = d phi / d x.
Layer: h = sin(omega (h W + b)); the last one is linear.
"""

import math
from collections.abc import Iterator, Sequence
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

    def value_gradient_and_hessian(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value phi (n,), its gradient (n, 3) and its second derivatives (n, 3, 3) at x (n, 3)."""
        return value_gradient_and_hessian(x, None, self._scaled_layers(x.dtype))

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


@torch.no_grad()
def value_gradient_and_hessian(
    u: Tensor, linear: Tensor | None, layers: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The value (..., n), the gradient (..., n, 3) and the Hessian (..., n, 3, 3) at u (..., n, 3).

    Arguments as for value_and_gradient; there is no way back. With the symbols of Tape and J_l = d z_l / d u, carried
    up beside the values, the Hessian is the sum over the sine layers of J_l^T diag(-p_l sin z_l) J_l: a bend of a layer
    counts as far as the layers above it pass it on.
    """
    *sine_layers, (last, offset) = layers
    count, h = u.shape[-2], u
    sines: list[Tensor] = []
    cosines: list[Tensor] = []
    jacobians: list[Tensor] = []
    for weight, bias in sine_layers:
        z = _affine(bias, h, weight)
        h, cosine = z.sin(), z.cos()
        if jacobians:
            through = jacobians[-1] * cosines[-1][..., None, :, :]
            jacobian = (through.flatten(-3, -2) @ weight).view(*z.shape[:-2], 3, count, z.shape[-1])
        else:
            jacobian = weight[..., :, None, :].expand(*z.shape[:-2], 3, count, z.shape[-1])
        sines.append(h)
        cosines.append(cosine)
        jacobians.append(jacobian)
    phi, pull = _affine(offset, h, last), last.mT
    hessian = u.new_zeros((*u.shape, 3))
    for (weight, _), sine, cosine, jacobian in zip(
        reversed(sine_layers), reversed(sines), reversed(cosines), reversed(jacobians), strict=True
    ):
        bent = jacobian * (pull * sine)[..., None, :, :]
        for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)):
            hessian[..., i, j] -= (bent[..., i, :, :] * jacobian[..., j, :, :]).sum(dim=-1)
        pull = (cosine * pull) @ weight.mT
    for i, j in ((0, 1), (0, 2), (1, 2)):
        hessian[..., j, i] = hessian[..., i, j]
    if linear is not None:
        phi, pull = phi + u @ linear, pull + linear.mT
    return phi[..., 0], pull, hessian


class _ValueAndGradient(torch.autograd.Function):
    """`there` and `back` for automatic differentiation, which would take each sine and cosine again on the way back."""

    @staticmethod
    def forward(ctx: Any, keep: bool, u: Tensor, linear: Tensor | None, *layers: Tensor) -> tuple[Tensor, Tensor]:
        phi, gradient, tape = there(u, linear, layers, keep=keep)
        ctx.depth, ctx.has_linear = len(layers) // 2 - 1, linear is not None
        ctx.save_for_backward(*tape.tensors)
        return phi, gradient

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_layers = back(Tape(ctx.saved_tensors, ctx.depth), *grads, linear=ctx.has_linear)
        d_linear = d_layers.pop() if ctx.has_linear else None
        return None, None, d_linear, *d_layers


class Tape:
    """What the way through a network of `depth` sine layers leaves for the way back.

    Symbols: layer l: z_l = s_(l-1) W_l + b_l, s_l = sin z_l, c_l = cos z_l, s_0 = u; adjoints p_l = d phi / d s_l and
    a_l = d phi / d z_l = c_l p_l; the gradient is a_1 W_1^T.
    """

    def __init__(self, tensors: Sequence[Tensor], depth: int) -> None:
        self.tensors = tensors
        self.weights, self.last, self.sines = tensors[:depth], tensors[depth], tensors[depth + 1 : 2 * depth + 2]
        rest = tensors[2 * depth + 2 :]
        self.cosines, self.pulls, self.adjoints = (rest[i * depth : (i + 1) * depth] for i in range(3))


_NO_TAPE = Tape([torch.empty(0)], 0)


def there(u: Tensor, linear: Tensor | None, layers: Sequence[Tensor], *, keep: bool) -> tuple[Tensor, Tensor, Tape]:
    """Value (..., n), gradient (..., n, 3), and the tape if it is to be kept; as value_and_gradient, the layers flat.

    The gradient is an adjoint sweep of ordinary products, so that one way back differentiates a loss on it: no double
    backward.
    """
    weights = layers[0:-2:2]
    phi, sines, cosines = _up(u, layers, keep=keep)
    pulls, adjoints = [layers[-2].mT], []
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
    if not keep:
        return phi[..., 0], gradient, _NO_TAPE
    kept = [*weights, layers[-2], *sines, *cosines, *reversed(pulls), *reversed(adjoints)]
    return phi[..., 0], gradient, Tape(kept, len(weights))


def there_by_value(u: Tensor, layers: Sequence[Tensor]) -> tuple[Tensor, Tape]:
    """The value (..., n) and the tape, without the gradient."""
    phi, sines, cosines = _up(u, layers, keep=True)
    return phi[..., 0], Tape([*layers[0:-2:2], layers[-2], *sines, *cosines], len(cosines))


def _up(u: Tensor, layers: Sequence[Tensor], *, keep: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    sines, cosines = [u], []
    for weight, bias in zip(layers[0:-2:2], layers[1:-2:2], strict=True):
        z = _affine(bias, sines[-1], weight)
        cosines.append(z.cos())
        sines = [*(sines if keep else []), z.sin_()]
    return _affine(layers[-1], sines[-1], layers[-2]), sines, cosines


def back(
    tape: Tape,
    d_phi: Tensor,
    d_gradient: Tensor | None = None,
    *,
    linear: bool = False,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The loss's derivatives with respect to the layers, flat, and to `linear`, from those to phi and to the gradient.

    d stands for the loss's derivative with respect to. They are written into `out` where it is given.
    """
    n = len(tape.weights)
    into: Sequence[Tensor | None] = [None] * (2 * n + 3) if out is None else out
    d_phi, d_pull = d_phi[..., None], d_gradient
    through_weights: list[Tensor | None] = [None] * (n + 1)
    through_cosines: list[Tensor | None] = [None] * n
    if d_pull is not None:
        for i in range(n):
            through_weights[i] = d_pull.mT @ tape.adjoints[i]
            d_adjoint = d_pull @ tape.weights[i]
            through_cosines[i] = d_adjoint * tape.pulls[i]
            d_pull = d_adjoint.mul_(tape.cosines[i])
        through_weights[n] = _total(d_pull).mT
    d_layers = [_product(tape.sines[-1].mT, d_phi, through_weights[n], into[2 * n]), _total(d_phi, into[2 * n + 1])]
    d_sine = d_phi * tape.last.mT
    for i in reversed(range(n)):
        d_z = d_sine.mul_(tape.cosines[i])
        if (d_cosine := through_cosines[i]) is not None:
            d_z.addcmul_(d_cosine, tape.sines[i + 1], value=-1)
        d_weight = _product(tape.sines[i].mT, d_z, through_weights[i], into[2 * i])
        d_layers = [d_weight, _total(d_z, into[2 * i + 1]), *d_layers]
        d_sine = d_z @ tape.weights[i].mT if i else d_z
    if linear and d_gradient is not None:
        d_layers.append(_product(tape.sines[0].mT, d_phi, _total(d_gradient).mT, into[2 * n + 2]))
    return d_layers


def _affine(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The sum of `bias` and x W, of one network or of a batch."""
    return torch.addmm(bias, x, weight) if x.ndim == 2 else torch.baddbmm(bias, x, weight)


def _product(a: Tensor, b: Tensor, more: Tensor | None, out: Tensor | None) -> Tensor:
    """a b + more, of one network or of a batch."""
    if more is None:
        return torch.matmul(a, b, out=out)
    return torch.addmm(more, a, b, out=out) if a.ndim == 2 else torch.baddbmm(more, a, b, out=out)


def _total(d: Tensor, out: Tensor | None = None) -> Tensor:
    """The sum (..., 1, m) over the points of d (..., n, m)."""
    return torch.sum(d, dim=-2, keepdim=True, out=out)


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
