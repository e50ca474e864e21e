"""The optimisers that the study sets beside Adam: SOAP, Muon, and Gauss-Newton steps by conjugate gradients.

Written for the study, in the smallest form that is faithful to their sources; none is used by the package.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Soap(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's two Kronecker factors (Vyas et al., SOAP, ICLR 2025, algorithm 3).

    Matrices have both sides rotated; biases get plain Adam. The bases follow by one step of orthogonal iteration every
    `every` steps.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        factor_beta: float = 0.95,
        every: int = 10,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "factor_beta": factor_beta, "every": every})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                    if p.ndim == 2:
                        state["factors"] = [torch.zeros(n, n) for n in p.shape]
                state["t"] += 1
                if p.ndim == 2:
                    self._follow(p.grad, state, group)
                state["m"].lerp_(p.grad, 1 - b1)
                g, m = self._turn(p.grad, state), self._turn(state["m"], state)
                state["v"].lerp_(g * g, 1 - b2)
                scale = (1 - b2 ** state["t"]) ** 0.5 / (1 - b1 ** state["t"])
                p.sub_(self._turn_back(m / (state["v"].sqrt() + 1e-8), state), alpha=group["lr"] * scale)

    @staticmethod
    def _follow(g: Tensor, state: dict, group: dict) -> None:
        """Updates the Kronecker factors, and now and then the bases."""
        left, right = state["factors"]
        beta = group["factor_beta"] if state["t"] > 1 else 0.0
        left.lerp_(g @ g.T, 1 - beta)
        right.lerp_(g.T @ g, 1 - beta)
        if state["t"] == 1:
            state["bases"] = [torch.linalg.eigh(f)[1] for f in state["factors"]]
        elif state["t"] % group["every"] == 0:
            for i, factor in enumerate(state["factors"]):
                basis = state["bases"][i]
                order = (basis * (factor @ basis)).sum(0).argsort(descending=True)
                state["v"] = state["v"].index_select(i, order)
                state["bases"][i] = torch.linalg.qr(factor @ basis[:, order])[0]

    @staticmethod
    def _turn(x: Tensor, state: dict) -> Tensor:
        return x if "bases" not in state else state["bases"][0].T @ x @ state["bases"][1]

    @staticmethod
    def _turn_back(x: Tensor, state: dict) -> Tensor:
        return x if "bases" not in state else state["bases"][0] @ x @ state["bases"][1].T


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iterations (Jordan et al., Muon, 2024); for hidden matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                u = p.grad.lerp(m, group["momentum"])
                p.sub_(newton_schulz(u), alpha=group["lr"])


def newton_schulz(x: Tensor) -> Tensor:
    """About the nearest orthogonal matrix to x, by five iterations of the quintic of Jordan et al."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm() + 1e-12)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def gauss_newton_step(
    residuals: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor], damping: float, iterations: int
) -> tuple[dict[str, Tensor], float]:
    """The step -(J^T J + damping I)^-1 J^T r by conjugate gradients, and |r|^2 / 2 before it.

    `residuals` gives r (m,) for parameters by name; J is never formed: each iteration takes one product with it and
    one with its transpose.
    """
    r, pull = torch.func.vjp(residuals, params)
    names = list(params)

    def flat(tree: dict[str, Tensor]) -> Tensor:
        return torch.cat([tree[name].flatten() for name in names])

    def tree(vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([params[name].numel() for name in names])
        return {name: part.view_as(params[name]) for name, part in zip(names, parts, strict=True)}

    def product(vector: Tensor) -> Tensor:
        _, j_vector = torch.func.jvp(residuals, (params,), (tree(vector),))
        return flat(pull(j_vector)[0]) + damping * vector

    rest = -flat(pull(r)[0])
    x, direction, norm = torch.zeros_like(rest), rest.clone(), rest @ rest
    for _ in range(iterations):
        image = product(direction)
        length = norm / (direction @ image)
        x, rest = x + length * direction, rest - length * image
        new_norm = rest @ rest
        direction, norm = rest + (new_norm / norm) * direction, new_norm
    return tree(x), float(r @ r) / 2
