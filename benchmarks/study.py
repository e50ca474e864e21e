#!/usr/bin/env python3
"""What reaches the reference first: optimisers, schedules, batches, losses and networks at equal seconds.

    python benchmarks/study.py --score SCORE.py --json FILE [--variants "adam;soap 2e-3"] [--cases a,b] [--seeds 0,1,2]
                               [--budgets 0.25,0.5,1]

Fits the first stage alone, one network without local ones, on one thread, for shares of the number of steps of
`standard`; then meshes it at 192^3 and measures the mean distance from and to the reference, in the score's units. A
budget is a share of Adam's seconds: a dearer step gets fewer of them. SCORE.py names the cases and has `load_case` and
`closest`. Results are added to FILE, and what is in it already is not run again.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimizers import Muon, Soap, gauss_newton_step
from scripts import loaded
from torch import Tensor

from sdfserver import fit as fitting
from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import PRESETS, FitConfig, NetworkConfig
from sdfserver.extract import extract
from sdfserver.field import SignedDistanceField
from sdfserver.sampling import Samples, draw_samples
from sdfserver.siren import Siren
from sdfserver.winding import along_a_curve, spacing_of

RESOLUTION = 192
SAMPLES = 100_000
COLLAPSED = 0.03
"""Share of wrong signs from which on there is no surface worth measuring."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to spend the seconds."""

    optimizer: str = "adam"
    rate: float = 1.2e-3
    hidden_rate: float = 0.0
    """Of Muon, for the hidden matrices."""
    cost: float = 1.0
    """Seconds of a step beside Adam's at the batch of `standard`, as measured: fewer steps are taken for it."""
    schedule: str = "cosine"
    batch: tuple[float, float] = (1.0, 1.0)
    """Shares of the batch of `standard` at the start and at the end; linear between."""
    surface: tuple[float, float] = (1.0, 1.0)
    """Factors of the surface and normal weights at the start and at the end; linear between."""
    jitter: float = 0.0
    """Standard deviation of what is added to the samples at the start; it falls to 0 in a third of the steps."""
    scale: float = 1.0
    """Factor of all initial weights but the last layer's."""
    huber: float = 0.0
    """Below this many times the noise the surface term is quadratic."""
    finish: float = 0.0
    """Share of the seconds that is kept for Gauss-Newton steps at the end."""
    warm: float = 0.2
    network: NetworkConfig = field(default_factory=NetworkConfig)
    beta2: float = 0.99
    stratified: bool = False
    """Whether a batch takes one sample from each of as many stretches of a space-filling curve."""


VARIANTS: dict[str, Variant] = {
    "adam": Variant(),
    "adam 8e-4": Variant(rate=8e-4),
    "adam linear": Variant(schedule="linear"),
    "adam flat then down": Variant(schedule="trapezoid"),
    "adam no warm start": Variant(warm=0.0),
    "adam warm start 0.1": Variant(warm=0.1),
    "soap 1e-3": Variant(optimizer="soap", rate=1e-3, cost=1.15),
    "soap 2e-3": Variant(optimizer="soap", rate=2e-3, cost=1.15),
    "soap 4e-3": Variant(optimizer="soap", rate=4e-3, cost=1.15),
    "muon 2e-3": Variant(optimizer="muon", hidden_rate=2e-3, cost=1.1),
    "muon 5e-3": Variant(optimizer="muon", hidden_rate=5e-3, cost=1.1),
    "muon 1e-2": Variant(optimizer="muon", hidden_rate=1e-2, cost=1.1),
    "batch grows": Variant(batch=(0.4, 1.6)),
    "half batch": Variant(batch=(0.5, 0.5), cost=0.55),
    "half batch, 8e-4": Variant(batch=(0.5, 0.5), cost=0.55, rate=8e-4),
    "surface weight grows": Variant(surface=(0.3, 1.7)),
    "jitter 1%": Variant(jitter=0.02),
    "jitter 2%": Variant(jitter=0.04),
    "scaled init 1.5": Variant(scale=1.5),
    "scaled init 2": Variant(scale=2.0),
    "huber": Variant(huber=1.0),
    "huber 2": Variant(huber=2.0),
    "gauss-newton at the end": Variant(finish=0.3),
    "muon 1e-3": Variant(optimizer="muon", hidden_rate=1e-3, cost=1.1),
    "A": Variant(huber=1.0, surface=(0.3, 1.7), warm=0.1),
    "B": Variant(huber=1.0, surface=(0.3, 1.7), warm=0.1, jitter=0.02),
    "C": Variant(huber=1.0, surface=(0.3, 1.7), warm=0.1, optimizer="muon", hidden_rate=2e-3, cost=1.1),
    "D": Variant(huber=1.0, surface=(0.3, 1.7), warm=0.1, batch=(0.6, 0.6), cost=0.65),
    "E": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63),
    "F": Variant(huber=2.0, batch=(0.6, 0.6), cost=0.63),
    "G": Variant(huber=3.0),
    "H": Variant(huber=1.0, batch=(0.4, 0.4), cost=0.45),
    "I": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, warm=0.1),
    "J": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, jitter=0.01),
    "K": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, rate=9e-4),
    "L": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, stratified=True),
    "M": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, warm=0.1, jitter=0.01),
    "N": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.43, network=NetworkConfig(hidden=96)),
    "O20": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, stratified=True, network=NetworkConfig(omega=20.0)),
    "O40": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, stratified=True, network=NetworkConfig(omega=40.0)),
    "P98": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, stratified=True, beta2=0.97),
    "R16": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, stratified=True, rate=1.6e-3),
    "R9": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, stratified=True, rate=9e-4),
    "S": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, stratified=True, warm=0.1),
    "T": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.28, stratified=True, network=NetworkConfig(hidden=64)),
    "U": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.45, stratified=True, network=NetworkConfig(layers=3)),
    "V": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.43, stratified=True, network=NetworkConfig(hidden=96)),
    "W": Variant(huber=1.0, batch=(1.0, 1.0), cost=1.0, stratified=True),
    "X95": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, stratified=True, beta2=0.95),
    "X90": Variant(huber=1.0, batch=(0.6, 0.6), cost=0.63, stratified=True, beta2=0.9),
    "Y97": Variant(
        huber=1.0, batch=(0.6, 0.6), cost=0.43, stratified=True, beta2=0.97, network=NetworkConfig(hidden=96)
    ),
    "Y95": Variant(
        huber=1.0, batch=(0.6, 0.6), cost=0.43, stratified=True, beta2=0.95, network=NetworkConfig(hidden=96)
    ),
    "Z95": Variant(
        huber=1.0, batch=(0.6, 0.6), cost=0.43, stratified=True, beta2=0.95, network=NetworkConfig(hidden=96), rate=1e-3
    ),
    "Y95r": Variant(
        huber=1.0, batch=(0.6, 0.6), cost=0.43, stratified=True, beta2=0.95, network=NetworkConfig(hidden=96), rate=1.5e-3
    ),
    "Y95b": Variant(
        huber=1.0, batch=(0.45, 0.45), cost=0.33, stratified=True, beta2=0.95, network=NetworkConfig(hidden=96)
    ),
    "Y95w": Variant(
        huber=1.0, batch=(0.6, 0.6), cost=0.43, stratified=True, beta2=0.95, network=NetworkConfig(hidden=96), warm=0.1
    ),
    "96 x 4": Variant(network=NetworkConfig(hidden=96), cost=0.68),
    "64 x 4": Variant(network=NetworkConfig(hidden=64), cost=0.43),
    "128 x 3": Variant(network=NetworkConfig(layers=3), cost=0.7),
}


def schedule(kind: str, t: float, warm_up: float = 0.02) -> float:
    """The share of the highest rate at the share t of all steps."""
    rise = min(1.0, (t + 1e-3) / warm_up)
    if kind == "linear":
        return rise * (1 - t) + 1e-3
    if kind == "trapezoid":
        return rise * min(1.0, (1 - t) / 0.5) + 1e-3
    return rise * (0.5 * (1 + np.cos(np.pi * t)) + 1e-3)


uniform = fitting._draw


def stratified(n: int, total: int, generator: torch.Generator) -> Tensor:
    """One row from each of n stretches of all."""
    return ((torch.arange(n) + torch.rand(n, generator=generator)) * (total / n)).long().clamp(max=total - 1)


def sorted_along_a_curve(samples: Samples) -> Samples:
    """The same samples, neighbours in space being neighbours in order."""
    rows, space = (torch.from_numpy(along_a_curve(x.numpy())) for x in (samples.points, samples.pool.points))
    return replace(samples, points=samples.points[rows], normals=samples.normals[rows], pool=samples.pool[space])


def between(ends: tuple[float, float], t: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * t


class Fit:
    """One fit of a variant, on `samples`."""

    def __init__(self, samples: Samples, variant: Variant, config: FitConfig, seed: int) -> None:
        self.samples, self.variant, self.config = samples, variant, config
        network = replace(variant.network, omega=config.omega_for(variant.network.omega, samples.spacing))
        self.model = Siren(network, generator=torch.Generator().manual_seed(seed))
        self.generator = torch.Generator().manual_seed(seed)
        self.base = config.weights_for(samples.noise.by_quadrics)
        with torch.no_grad():
            for weight in list(self.model.weights)[:-1]:
                weight *= variant.scale

    def run(self, steps: int) -> None:
        variant, config = self.variant, self.config
        fitting._draw = stratified if variant.stratified else uniform
        if variant.stratified:
            self.samples = sorted_along_a_curve(self.samples)
        optimizers = self.optimizers()
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        last = round(steps * (1 - variant.finish))
        for step in range(last):
            t = step / last
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * schedule(variant.schedule, t)
            share = between(variant.batch, t)
            now = replace(
                config,
                batch_surface=round(config.batch_surface * share),
                batch_space=round(config.batch_space * share),
            )
            terms = self.terms(now, t)
            weights = self.base.for_noise(between(variant.surface, t))
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            weights.total(terms).backward()
            for optimizer in optimizers:
                optimizer.step()
        if variant.finish:
            self.finish(round(steps * variant.finish))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        variant, parameters = self.variant, list(self.model.parameters())
        betas = (0.9, variant.beta2)
        if variant.optimizer == "soap":
            return [Soap(parameters, variant.rate, betas=betas)]
        if variant.optimizer == "muon":
            hidden = list(self.model.weights)[1:-1]
            others = [p for p in parameters if not any(p is h for h in hidden)]
            return [Muon(hidden, variant.hidden_rate), torch.optim.Adam(others, lr=variant.rate, betas=betas)]
        return [torch.optim.Adam(parameters, lr=variant.rate, betas=betas)]

    def terms(self, config: FitConfig, t: float) -> dict[str, Tensor]:
        variant = self.variant
        warm = t < variant.warm
        model: Any = self.model
        sigma = variant.jitter * max(0.0, 1 - 3 * t)
        if sigma or variant.huber:
            model = Seen(self.model, sigma, self.generator)
        terms = fitting._terms(model, self.samples, config, self.generator, warm=warm, dtype=None)
        if variant.huber and not warm:
            terms["surface"] = huber(model.phi[: config.batch_surface], variant.huber * self.samples.noise.least)
        return terms

    def finish(self, steps: int, iterations: int = 10) -> None:
        """Gauss-Newton on a batch each, of a smooth form of the terms; each takes about as long as 40 steps of Adam."""
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        config, damping = self.config, 1e-2
        for _ in range(max(1, round(steps / 40))):
            rows = torch.randint(len(self.samples.points), (config.batch_surface,), generator=self.generator)
            space = self.samples.pool[
                torch.randint(len(self.samples.pool), (config.batch_space,), generator=self.generator)
            ]
            residuals = smooth_residuals(self.model, self.samples, self.base, rows, space)
            step, before = gauss_newton_step(residuals, params, damping, iterations)
            moved = {name: params[name] + step[name] for name in params}
            r = residuals(moved)
            if float(r @ r) / 2 < before:
                params, damping = moved, max(1e-6, damping / 3)
            else:
                damping *= 10
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(params[name])


class Seen:
    """A network that is asked at jittered points, and keeps what it answered."""

    def __init__(self, model: Siren, sigma: float, generator: torch.Generator) -> None:
        self.model, self.sigma, self.generator = model, sigma, generator

    def _moved(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn(x.shape, generator=self.generator) if self.sigma else x

    def __call__(self, x: Tensor, **_: object) -> Tensor:
        return self.model(self._moved(x))

    def value_and_gradient(self, x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        self.phi, gradient = self.model.value_and_gradient(self._moved(x))
        return self.phi, gradient


def huber(phi: Tensor, width: float) -> Tensor:
    size = phi.abs()
    return torch.where(size < width, phi * phi / (2 * width), size - width / 2).mean()


def smooth_residuals(
    model: Siren, samples: Samples, weights: Any, rows: Tensor, space: Any
) -> Callable[[dict[str, Tensor]], Tensor]:
    """Residuals whose squares are the terms near a good fit; |phi| becomes phi^2 over twice the noise."""
    points, normals, n = samples.points[rows], samples.normals[rows], len(rows)
    x = torch.cat([points, space.points])
    width = max(samples.noise.least, 5e-4)
    parts = [
        (weights.surface / 2 / n / width) ** 0.5,
        (weights.normal / 2 / n) ** 0.5,
        (weights.eikonal / len(x) / 0.1) ** 0.5,
        (weights.distance / len(space) / 0.02) ** 0.5,
    ]
    omega = model.config.omega

    def residuals(params: dict[str, Tensor]) -> Tensor:
        depth = len(params) // 2
        s, cosines = x, []
        for i in range(depth - 1):
            z = omega * torch.addmm(params[f"biases.{i}"], s, params[f"weights.{i}"].T)
            s = z.sin()
            cosines.append(omega * z.cos())
        phi = torch.addmm(params[f"biases.{depth - 1}"], s, params[f"weights.{depth - 1}"].T)[:, 0]
        adjoint = cosines[-1] * params[f"weights.{depth - 1}"]
        for i in reversed(range(1, depth - 1)):
            adjoint = cosines[i - 1] * (adjoint @ params[f"weights.{i}"])
        gradient = adjoint @ params["weights.0"]
        length = (gradient * gradient).sum(1).clamp_min(1e-12).sqrt()
        aligned = gradient[:n] / length[:n, None] - normals
        off = torch.where(space.far, phi[n:] - space.signed_distance, 0)
        return torch.cat([parts[0] * phi[:n], parts[1] * aligned.flatten(), parts[2] * (length - 1), parts[3] * off])

    return residuals


def measured(model: Siren, frame: Frame, reference: Any, unit: float, score: Any) -> dict[str, float]:
    """Mean distances between the mesh of `model` and the reference, both ways and their mean."""
    import trimesh

    surface = extract(SignedDistanceField(model, frame), resolution=RESOLUTION)
    vertices = frame.to_world(surface.vertices_unit)
    mesh = trimesh.Trimesh(vertices, surface.faces, process=False)
    on_mesh, _ = trimesh.sample.sample_surface(mesh, SAMPLES, seed=1)
    on_reference, _ = trimesh.sample.sample_surface(reference, SAMPLES, seed=2)
    to_reference, _ = score.closest(reference.vertices, reference.faces, on_mesh)
    to_mesh, _ = score.closest(mesh.vertices, mesh.faces, on_reference)
    return {
        "dC": float(to_reference.mean() + to_mesh.mean()) / 2 / unit,
        "dH": float(max(to_reference.max(), to_mesh.max())) / unit,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--variants", default=";".join(VARIANTS))
    parser.add_argument("--cases", default="")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budgets", default="0.25,0.5,1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    score = loaded(args.score)
    cases = json.loads((args.score.parent / "cases_dev.json").read_text())["cases"]
    wanted = set(filter(None, args.cases.split(",")))
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    done = {(row["case"], row["variant"], row["budget"], row["seed"]) for row in rows}
    config = PRESETS["standard"].fit
    for case in cases:
        if wanted and case["name"] not in wanted:
            continue
        points, normals, reference = score.load_case(case, args.score.parent.parent / "data")
        unit = 1.0 if case["name"].startswith("srb_") else float(np.linalg.norm(reference.extents)) / 100
        frame = Frame.around(points, margin=spacing_of(points))
        cloud = PointCloud(points=frame.to_unit(points), normals=normals)
        for seed in map(int, args.seeds.split(",")):
            samples = None
            for name in args.variants.split(";"):
                for budget in map(float, args.budgets.split(",")):
                    if (case["name"], name, budget, seed) in done:
                        continue
                    samples = samples or draw_samples(cloud, config.pool, np.random.default_rng(seed))
                    variant = VARIANTS[name]
                    steps = round(budget * config.steps / variant.cost)
                    one = Fit(samples, variant, config, seed)
                    start = time.process_time()
                    one.run(steps)
                    seconds = time.process_time() - start
                    row = {
                        "case": case["name"], "variant": name, "budget": budget, "seed": seed,
                        "steps": steps, "seconds": seconds,
                    }  # fmt: skip
                    health = fitting._health(one.model, samples, loss=0.0)
                    row["wrong_signs"], row["held_out"] = health.wrong_signs, health.surface
                    if health.wrong_signs < COLLAPSED:
                        row |= measured(one.model, frame, reference, unit, score)
                    rows.append(row)
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")
                    print(*row.values(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
