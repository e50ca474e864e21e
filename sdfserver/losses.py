"""The terms of the fit, unweighted and named as in the literature.

phi (n,): the field at n samples; gradient (n, 3): its gradient there. Each term is a mean over its samples.
"""

import torch
from torch import Tensor


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


def normal_loss(gradient: Tensor, normals: Tensor) -> Tensor:
    """Mean 1 - cos(gradient, normal) on the cloud (Sitzmann et al. 2020, equation 6); `normals` (n, 3) are unit."""
    length: Tensor = torch.linalg.vector_norm(gradient, dim=-1).clamp_min(1e-8)
    return (1 - (gradient * normals).sum(dim=-1) / length).mean()


def eikonal_loss(gradient: Tensor) -> Tensor:
    """Mean ||gradient| - 1| (Gropp et al. 2020, in the norm of Sitzmann et al. 2020)."""
    length: Tensor = torch.linalg.vector_norm(gradient, dim=-1)
    return (length - 1).abs().mean()


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


def distance_loss(phi: Tensor, signed_distance: Tensor, known: Tensor, slack: float = 0.0) -> Tensor:
    """Mean over all samples of |phi - d| where the signed distance d to the cloud is `known` (n,) bool, else 0.

    With `slack`, of what |phi - d| exceeds that share of |d| by.
    """
    excess = (phi - signed_distance).abs() - slack * signed_distance.abs()
    return torch.where(known, excess.clamp_min(0), 0).mean()
