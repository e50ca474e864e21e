"""The parameters of one network, or of k alike side by side, in one array.

Then an optimiser's step, a copy of them or a look at their derivatives is one operation, whatever the depth, and k
networks cost a device as many launches as one.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sdfserver.local import LocalSirens
from sdfserver.siren import Siren


class Stack:
    """Tensors of parameters, each as a view of one array.

    values: (p,) all parameters; grad: (p,) their derivatives, which are by tensor in `derivatives`.
    """

    def __init__(self, tensors: Sequence[Tensor], factors: Sequence[Tensor | float]) -> None:
        """A copy of `tensors`, each of which is used times its factor."""
        self._shapes = [tensor.shape for tensor in tensors]
        ends = accumulate((math.prod(shape) for shape in self._shapes), initial=0)
        self._places = [slice(start, end) for start, end in pairwise(ends)]
        self.values = torch.cat([tensor.detach().flatten() for tensor in tensors])
        self.grad = torch.zeros_like(self.values)
        scaled = [torch.ones_like(tensor) * factor for tensor, factor in zip(tensors, factors, strict=True)]
        self._factors = torch.cat([tensor.detach().flatten() for tensor in scaled])
        self._derivatives: dict[torch.dtype, Tensor] = {self.values.dtype: self.grad}

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters as they were given."""
        return self.parted(self.values)

    def layers(self, dtype: torch.dtype) -> list[Tensor]:
        """The parameters times their factors, in `dtype`."""
        return self.parted((self.values * self._factors).to(dtype))

    def derivatives(self, dtype: torch.dtype) -> list[Tensor]:
        """Where derivatives with respect to `layers` are to be written; `collect` then makes them the parameters'."""
        if dtype not in self._derivatives:
            self._derivatives[dtype] = self._derivatives[self.values.dtype].to(dtype)
        return self.parted(self._derivatives[dtype])

    def collect(self, dtype: torch.dtype) -> None:
        """Derivatives with respect to `layers`, in `dtype`, become those with respect to the parameters."""
        torch.mul(self._derivatives[dtype], self._factors, out=self.grad)

    def parted(self, values: Tensor) -> list[Tensor]:
        """Values (p,) that belong to the parameters one by one, as views in the shapes of these."""
        return [values[place].view(shape) for place, shape in zip(self._places, self._shapes, strict=True)]


class Adam:
    """Adam (Kingma and Ba 2015) on a stack, as PyTorch's fused operation, which is private to it.

    Its own optimisers do the same, but importing what they bring takes as long as importing torch. `rate` is a tensor
    on the parameters' device, so that a recorded step can change it. moments: (p,) each.
    """

    def __init__(self, stack: Stack, rate: Tensor, beta2: float) -> None:
        self._stack, self._rate, self._beta2 = stack, rate, beta2
        self.moments = torch.zeros_like(stack.values), torch.zeros_like(stack.values)
        self._steps = torch.zeros((), device=rate.device)

    def begin(self, moments: Sequence[Tensor], steps: int) -> None:
        """Go on from the moments (p,) that there were after so many steps."""
        for own, given in zip(self.moments, moments, strict=True):
            own.copy_(given)
        self._steps.fill_(steps)

    @torch.no_grad()
    def step(self) -> None:
        """One step along the stack's derivatives."""
        self._steps += 1
        mean, square = self.moments
        torch._fused_adam_(
            [self._stack.values],
            [self._stack.grad],
            [mean],
            [square],
            [],
            [self._steps],
            lr=self._rate,
            beta1=0.9,
            beta2=self._beta2,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


def stacked(sirens: Sequence[Siren]) -> Stack:
    """One SIREN, its tensors (in, out) and (1, out), or k alike, these (k, in, out) and (k, 1, out)."""
    omega = torch.tensor([siren.config.omega for siren in sirens], device=sirens[0].biases[0].device)[:, None, None]
    weights = [torch.stack([siren.weights[i].T for siren in sirens]) for i in range(len(sirens[0].weights))]
    biases = [torch.stack([siren.biases[i][None] for siren in sirens]) for i in range(len(weights))]
    tensors = [tensor for layer in zip(weights, biases, strict=True) for tensor in layer]
    if len(sirens) == 1:
        tensors, omega = [tensor[0] for tensor in tensors], omega[0]
    return Stack(tensors, _factors(omega, len(weights)))


def stacked_locally(sirens: LocalSirens) -> Stack:
    """Local SIRENs, as they are: layers, then the linear part (k, 3, 1)."""
    layers = [tensor for layer in zip(sirens.weights, sirens.biases, strict=True) for tensor in layer]
    return Stack([*layers, sirens.linear], [*_factors(sirens.config.omega, len(sirens.weights)), 1.0])


def _factors(omega: Tensor | float, layers: int) -> list[Tensor | float]:
    """Of weights and biases in turn: omega, but in the last layer, which has no sine."""
    return [*(2 * (layers - 1) * [omega]), 1.0, 1.0]


@torch.no_grad()
def unstacked(tensors: Sequence[Tensor], siren: Siren) -> None:
    """Gives a SIREN the parameters that it has in a stack of its own."""
    for weight, parameter in zip(tensors[0::2], siren.weights, strict=True):
        parameter.copy_(weight.T)
    for bias, parameter in zip(tensors[1::2], siren.biases, strict=True):
        parameter.copy_(bias[0])


@torch.no_grad()
def unstacked_locally(stack: Stack, sirens: LocalSirens) -> None:
    """Gives local SIRENs the parameters that they have in their stack."""
    *layers, linear = stack.tensors
    for weight, parameter in zip(layers[0::2], sirens.weights, strict=True):
        parameter.copy_(weight)
    for bias, parameter in zip(layers[1::2], sirens.biases, strict=True):
        parameter.copy_(bias)
    sirens.linear.copy_(linear)
