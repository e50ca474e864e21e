"""The terms of the fit, unweighted and named as in the literature, and their slopes.

phi (n,): the field at n samples; gradient (n, 3): its gradient there. Each term is a mean over its samples. A slope is
n times the derivative of a term with respect to phi or to the gradient, written out for the steps of a fit, which do
not need the terms themselves; it takes batches (..., n) as well.
"""

import torch
from torch import Tensor

NO_WIDTH = 1e-12
"""Width of the quadratic part of the surface term, for its slope, where there is none."""


def surface_loss(phi: Tensor, width: float = 0.0) -> Tensor:
    """Mean |phi| on the cloud (Sitzmann et al. 2020, equation 6), or with a `width` Huber's form of it (1964).

    That is phi^2 / (2 width) up to the width and |phi| - width / 2 beyond. Where the points scatter by about as much,
    their mean is a closer estimate than their median; and no step is pushed about by points that are as near as that.
    """
    size: Tensor = phi.abs()
    if width == 0:
        return size.mean()
    inner = size.clamp(max=width)
    return (inner * (size - inner / 2)).mean() / width


def surface_slope(phi: Tensor, width: Tensor) -> Tensor:
    """Of surface_loss with a `width` (..., 1); NO_WIDTH is none."""
    return torch.clamp(phi, -width, width) / width


def normal_loss(gradient: Tensor, normals: Tensor) -> Tensor:
    """Mean 1 - cos(gradient, normal) on the cloud (Sitzmann et al. 2020, equation 6); `normals` (n, 3) are unit."""
    length: Tensor = torch.linalg.vector_norm(gradient, dim=-1).clamp_min(1e-8)
    return (1 - (gradient * normals).sum(dim=-1) / length).mean()


def length_and_direction(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The length (..., n, 1) of the gradient and its direction (..., n, 3), for the two slopes that need them."""
    length = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).clamp_min(1e-8)
    return length, gradient / length


def normal_slope(length: Tensor, direction: Tensor, normals: Tensor) -> Tensor:
    """Of normal_loss."""
    return (direction * (direction * normals).sum(dim=-1, keepdim=True) - normals) / length


def eikonal_loss(gradient: Tensor) -> Tensor:
    """Mean ||gradient| - 1| (Gropp et al. 2020, in the norm of Sitzmann et al. 2020)."""
    length: Tensor = torch.linalg.vector_norm(gradient, dim=-1)
    return (length - 1).abs().mean()


def eikonal_slope(length: Tensor, direction: Tensor) -> Tensor:
    """Of eikonal_loss."""
    return direction * (length - 1).sign()


def gradient_slope(gradient: Tensor, normals: Tensor, *, eikonal: float, normal: Tensor | float) -> Tensor:
    """Of both terms on the gradient (..., N, 3), times these factors; the first of the N have `normals` (..., n, 3)."""
    n = normals.shape[-2]
    length, direction = length_and_direction(gradient)
    slope = eikonal_slope(length, direction).mul_(eikonal)
    slope[..., :n, :] += normal_slope(length[..., :n, :], direction[..., :n, :], normals) * normal
    return slope


def off_surface_loss(phi: Tensor, alpha: float) -> Tensor:
    """Mean exp(-alpha |phi|) away from the cloud (Sitzmann et al. 2020, equation 6): no zero where nothing was seen."""
    return torch.exp(-alpha * phi.abs()).mean()


def signed_off_surface_loss(phi: Tensor, sign: Tensor, trusted: Tensor, *, alpha: float, untrusted: float) -> Tensor:
    """The off-surface term where some samples know which side they are on.

    With s the trusted sign: exp(-alpha s phi) on the right side, continued linearly on the wrong one,

        exp(-alpha max(s phi, 0)) + alpha max(-s phi, 0),

    so that a wrong sign is pushed over with a constant force. Where the sign is not trusted the term is the published,
    unsigned one, weighed by `untrusted`.

    phi, sign (+1 outside, -1 inside): (n,) float; trusted: (n,) bool.
    """
    signed = torch.where(trusted, sign * phi, phi.abs())
    term = torch.exp(-alpha * signed.clamp_min(0)) + alpha * (-signed).clamp_min(0)
    return torch.where(trusted, term, untrusted * term).mean()


def signed_off_surface_slope(phi: Tensor, side: Tensor, share: Tensor, *, alpha: float) -> Tensor:
    """Of signed_off_surface_loss.

    side: the sign where it is trusted, else 0; share: 1 where it is trusted, else `untrusted`; like phi.
    """
    side = torch.where(side == 0, phi.sign(), side)
    # On the wrong side the exponent is nothing, and the slope that of the line.
    return torch.exp((side * phi).clamp_min(0).mul(-alpha)).mul(side * share).mul(-alpha)


def distance_loss(phi: Tensor, signed_distance: Tensor, known: Tensor, slack: float = 0.0) -> Tensor:
    """Mean over all samples of |phi - d| where the signed distance d to the cloud is `known` (n,) bool, else 0.

    With `slack`, of what |phi - d| exceeds that share of |d| by.
    """
    excess = (phi - signed_distance).abs() - slack * signed_distance.abs()
    return torch.where(known, excess.clamp_min(0), 0).mean()


def distance_slope(phi: Tensor, signed_distance: Tensor, known: Tensor, slack: float = 0.0) -> Tensor:
    """Of distance_loss; `known` as 1 and 0, like phi."""
    off = phi - signed_distance
    if slack:
        known = known * (off.abs() > slack * signed_distance.abs())
    return off.sign() * known
