"""Whether a fit is healthy: what it gives on samples that were held out of it.

Everything in the unit frame; sdf < 0 inside; normals point outward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdfserver.local import PartitionOfUnity
from sdfserver.sampling import Samples
from sdfserver.siren import Siren

MAX_WRONG_SIGNS = 0.01
"""Share of trusted signs that may be wrong on held-out samples: healthy fits have none, collapsed ones 0.01 to 0.12."""
FEWEST_SIGNS = 300
"""Among fewer, one or two samples on the edge of what is trusted would be taken for a collapse."""
MAX_EIKONAL = 0.7
"""Mean ||grad phi| - 1| on held-out samples: the fewer the steps, the higher a healthy fit ends (0.1 after thousands,
0.4 after a few hundred), so that only a wild field is told by this alone."""
MAX_WRONG_SIDES = 0.4
"""Share of points beside the cloud on the wrong side of phi = 0: one half where phi has one sign."""
HOPELESS_WRONG_SIGNS = 0.25
"""Share of wrong trusted signs from which no fit has been seen to recover, at any time after the warm start."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """What the guard looks at, on samples that are held out of the fit."""

    loss: float
    wrong_signs: float
    """Share of the samples with a trusted sign, or of FEWEST_SIGNS if those are fewer, on which phi has the other."""
    wrong_sides: float
    """Share of the points one spacing along and against the normals on which phi has the wrong sign."""
    eikonal: float
    """Mean ||grad phi| - 1|."""
    surface: float
    """Mean |phi| / |grad phi| on held-out points of the cloud: their distance to the surface, to first order."""

    @property
    def fault(self) -> str | None:
        """What keeps this from being the state of a good fit, or None."""
        if not self.finite:
            return "the loss is not finite"
        if self.wrong_signs > MAX_WRONG_SIGNS:
            return f"{self.wrong_signs:.1%} of the trusted signs are wrong on held-out samples"
        if self.eikonal > MAX_EIKONAL:
            return f"|grad phi| is {self.eikonal:.2f} away from 1 on held-out samples"
        if self.wrong_sides > MAX_WRONG_SIDES:
            return f"{self.wrong_sides:.0%} of the points beside the cloud are on the wrong side of the surface"
        return None

    @property
    def finite(self) -> bool:
        """Whether everything is a number."""
        return all(map(math.isfinite, vars(self).values()))


class HeldOut:
    """What is held out of the fits of one cloud, or of k that are looked at together, as one batch of points.

    x: (m, 3), or (k, m, 3) where there are several clouds, these padded: samples of the pool, points of the cloud, and
    the points one spacing along their normals and against them.
    """

    def __init__(self, several: Sequence[Samples]) -> None:
        pool = max(len(samples.held_pool) for samples in several)
        points = max(len(samples.held_points) for samples in several)
        self._parts = [pool, points, 2 * points]
        x, trusted_sign, in_pool, in_points = [], [], [], []
        for samples in several:
            held, beside = samples.held_pool, samples.spacing * samples.held_normals
            on = samples.held_points
            sides = torch.cat([_padded(on + beside, points), _padded(on - beside, points)])
            x.append(torch.cat([_padded(held.points, pool), _padded(on, points), sides]))
            trusted_sign.append(_padded(held.signed_distance.sign() * held.trusted, pool))
            in_pool.append(_padded(torch.ones_like(held.signed_distance), pool))
            in_points.append(_padded(torch.ones_like(on[:, 0]), points))
        join = (lambda rows: rows[0]) if len(several) == 1 else torch.stack
        self.x: Tensor = join(x)
        self._sign, self._in_pool, self._in_points = join(trusted_sign), join(in_pool), join(in_points)
        self._side = self._in_points.new_tensor([1.0, -1.0]).repeat_interleave(points)

    def look(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """Health's values but the loss, in its order (..., 4), from the field's value and gradient at x."""
        pool, on, beside = torch.split(phi, self._parts, dim=-1)
        pool_gradient, on_gradient, _ = torch.split(gradient, self._parts, dim=-2)
        wrong = pool * self._sign < 0
        signs = (self._sign != 0).sum(dim=-1).clamp_min(FEWEST_SIGNS)
        in_points, in_pool = self._in_points, self._in_pool
        wrong_sides = ((beside * self._side < 0) * torch.cat([in_points, in_points], dim=-1)).sum(dim=-1)
        steepness = torch.linalg.vector_norm(on_gradient, dim=-1).clamp_min(1e-6)
        eikonal = (torch.linalg.vector_norm(pool_gradient, dim=-1) - 1).abs()
        return torch.stack(
            [
                wrong.sum(dim=-1) / signs,
                wrong_sides / (2 * in_points.sum(dim=-1)),
                (eikonal * in_pool).sum(dim=-1) / in_pool.sum(dim=-1),
                (on.abs() / steepness * in_points).sum(dim=-1) / in_points.sum(dim=-1),
            ],
            dim=-1,
        )


def healths(losses: Sequence[float], looks: Tensor) -> list[Health]:
    """Of each of k fits, from their losses and what HeldOut.look gave (k, 4)."""
    names = ("wrong_signs", "wrong_sides", "eikonal", "surface")
    # The host waits for the device here.
    rows = looks.reshape(len(losses), len(names)).tolist()
    return [Health(loss=loss, **dict(zip(names, row, strict=True))) for loss, row in zip(losses, rows, strict=True)]


@torch.no_grad()
def health_of(field: Siren | PartitionOfUnity, samples: Samples, *, loss: float) -> Health:
    """Of a field on its own."""
    held = HeldOut([samples])
    return healths([loss], held.look(*field.value_and_gradient(held.x)))[0]


def _padded(rows: Tensor, length: int) -> Tensor:
    missing = length - len(rows)
    return rows if not missing else torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))])
