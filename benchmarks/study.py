#!/usr/bin/env python3
"""What reaches the reference first: optimisers, schedules, batches, losses and networks at equal seconds.

    python benchmarks/study.py --json FILE --score SCORE.py [--variants "first;soap 2e-3"] [--cases a,b]
                               [--seeds 0,1,2] [--budgets 0.25,0.5,1]
    python benchmarks/study.py --json FILE --plot PICTURE.png

Fits one network, without local ones, on one thread; then meshes it at 192^3 and measures the mean distance from and to
the reference, in the score's units. A budget is a share of the seconds of 1300 steps of the fit that the study began
with: a dearer step gets fewer of them. SCORE.py names the cases and has `load_case` and
`measure`. Results are added to FILE, and what is in it already is not run again.
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

from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import FitConfig, NetworkConfig
from sdfserver.descent import Batches, Given, Task, terms_of
from sdfserver.extract import extract
from sdfserver.field import SignedDistanceField
from sdfserver.guard import health_of
from sdfserver.sampling import Samples, draw_samples
from sdfserver.siren import Siren
from sdfserver.winding import spacing_of

RESOLUTION = 192
SAMPLES = 100_000
COLLAPSED = 0.03
"""Share of wrong signs from which on there is no surface worth measuring."""


FIRST = FitConfig(steps=1300, batch_surface=1400, batch_space=800, beta2=0.99, quadratic_noises=0.0, stratified=False)
"""The fit that the study began with, and of which the budgets are shares; its network was 128 wide."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to spend the seconds."""

    config: FitConfig = FIRST
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(hidden=128))
    cost: float = 1.0
    """Seconds of a step beside the first fit's, as measured: fewer steps are taken for it."""
    optimizer: str = "adam"
    hidden_rate: float = 0.0
    """Of Muon, for the hidden matrices."""
    schedule: str = "cosine"
    batch: tuple[float, float] = (1.0, 1.0)
    """Factors of the batch at the start and at the end; linear between."""
    surface: tuple[float, float] = (1.0, 1.0)
    """Factors of the surface and normal weights at the start and at the end; linear between."""
    jitter: float = 0.0
    """Standard deviation of what is added to the samples at the start; it falls to 0 in a third of the steps."""
    scale: float = 1.0
    """Factor of all initial weights but the last layer's."""
    finish: float = 0.0
    """Share of the seconds that is kept for Gauss-Newton steps at the end."""


QUADRATIC = replace(FIRST, quadratic_noises=1.0)
SMALLER = replace(QUADRATIC, batch_surface=840, batch_space=480)
EVEN = replace(SMALLER, stratified=True)
QUICK = replace(EVEN, beta2=0.95)


def wide(hidden: int, layers: int = 4, omega: float = 30.0) -> NetworkConfig:
    return NetworkConfig(hidden=hidden, layers=layers, omega=omega)


VARIANTS: dict[str, Variant] = {
    "first": Variant(),
    # What was kept, one after another.
    "quadratic below the noise": Variant(config=QUADRATIC),
    "and a smaller batch": Variant(config=SMALLER, cost=0.63),
    "and even batches": Variant(config=EVEN, cost=0.63),
    "and beta2 0.95, width 96: kept": Variant(config=QUICK, network=wide(96), cost=0.43),
    # Steps of another kind, from the first fit.
    "soap 1e-3": Variant(config=replace(FIRST, learning_rate=1e-3), optimizer="soap", cost=1.15),
    "soap 2e-3": Variant(config=replace(FIRST, learning_rate=2e-3), optimizer="soap", cost=1.15),
    "soap 4e-3": Variant(config=replace(FIRST, learning_rate=4e-3), optimizer="soap", cost=1.15),
    "muon 1e-3": Variant(optimizer="muon", hidden_rate=1e-3, cost=1.1),
    "muon 2e-3": Variant(optimizer="muon", hidden_rate=2e-3, cost=1.1),
    "muon 5e-3": Variant(optimizer="muon", hidden_rate=5e-3, cost=1.1),
    "muon 1e-2": Variant(optimizer="muon", hidden_rate=1e-2, cost=1.1),
    "gauss-newton at the end": Variant(finish=0.3),
    # Schedules and starts, from the first fit.
    "batch grows": Variant(batch=(0.4, 1.6)),
    "half batch": Variant(batch=(0.5, 0.5), cost=0.55),
    "surface weight grows": Variant(surface=(0.3, 1.7)),
    "jitter 1%": Variant(jitter=0.02),
    "jitter 2%": Variant(jitter=0.04),
    "scaled start 1.5": Variant(scale=1.5),
    "scaled start 2": Variant(scale=2.0),
    "rate 8e-4": Variant(config=replace(FIRST, learning_rate=8e-4)),
    "linear": Variant(schedule="linear"),
    "flat then down": Variant(schedule="trapezoid"),
    "warm start 0.1": Variant(config=replace(FIRST, warm_start_share=0.1)),
    "no warm start": Variant(config=replace(FIRST, warm_start_share=0.0)),
    # Around what was kept.
    "even, quadratic below 3 noises": Variant(config=replace(QUADRATIC, quadratic_noises=3.0)),
    "even, batch 0.4": Variant(config=replace(QUADRATIC, batch_surface=560, batch_space=320), cost=0.45),
    "even, beta2 0.97": Variant(config=replace(EVEN, beta2=0.97), cost=0.63),
    "even, beta2 0.95": Variant(config=replace(EVEN, beta2=0.95), cost=0.63),
    "even, beta2 0.9": Variant(config=replace(EVEN, beta2=0.9), cost=0.63),
    "even, width 96": Variant(config=EVEN, network=wide(96), cost=0.43),
    "even, width 64": Variant(config=EVEN, network=wide(64), cost=0.28),
    "even, 3 layers": Variant(config=EVEN, network=wide(128, 3), cost=0.45),
    "even, omega 20": Variant(config=EVEN, network=wide(128, 4, 20.0), cost=0.63),
    "even, omega 40": Variant(config=EVEN, network=wide(128, 4, 40.0), cost=0.63),
    "even, rate 9e-4": Variant(config=replace(EVEN, learning_rate=9e-4), cost=0.63),
    "even, rate 1.6e-3": Variant(config=replace(EVEN, learning_rate=1.6e-3), cost=0.63),
    "kept, rate 1e-3": Variant(config=replace(QUICK, learning_rate=1e-3), network=wide(96), cost=0.43),
    "kept, rate 1.5e-3": Variant(config=replace(QUICK, learning_rate=1.5e-3), network=wide(96), cost=0.43),
    "kept, rate 1.8e-3": Variant(config=replace(QUICK, learning_rate=1.8e-3), network=wide(96), cost=0.43),
    "kept, warm start 0.1": Variant(config=replace(QUICK, warm_start_share=0.1), network=wide(96), cost=0.43),
    "kept, batch 0.45": Variant(config=replace(QUICK, batch_surface=630, batch_space=360), network=wide(96), cost=0.33),
    "kept, width 80": Variant(config=QUICK, network=wide(80), cost=0.36),
    "kept, width 64": Variant(config=QUICK, network=wide(64), cost=0.28),
    "kept, 3 layers": Variant(config=QUICK, network=wide(96, 3), cost=0.32),
    "kept, 5 layers": Variant(
        config=replace(QUICK, batch_surface=700, batch_space=400), network=wide(96, 5), cost=0.46
    ),
}


KEPT = [name for name in VARIANTS if name.startswith(("quadratic", "and "))]
HIGHEST = 1.25
"""Of the errors in the picture, beside the first fit's."""


def schedule(kind: str, t: float, warm_up: float = 0.02) -> float:
    """The share of the highest rate at the share t of all steps."""
    rise = min(1.0, (t + 1e-3) / warm_up)
    if kind == "linear":
        return rise * (1 - t) + 1e-3
    if kind == "trapezoid":
        return rise * min(1.0, (1 - t) / 0.5) + 1e-3
    return rise * (0.5 * (1 + np.cos(np.pi * t)) + 1e-3)


def between(ends: tuple[float, float], t: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * t


class Fit:
    """One fit of a variant, on `samples`."""

    def __init__(self, samples: Samples, variant: Variant, seed: int) -> None:
        self.samples, self.variant, self.config = samples, variant, variant.config
        config = variant.config
        network = replace(variant.network, omega=config.omega_for(variant.network.omega, samples.spacing))
        self.model = Siren(network, generator=torch.Generator().manual_seed(seed))
        self.generator = torch.Generator().manual_seed(seed)
        self.batches: dict[tuple[int, int], Batches] = {}
        self.base = config.weights_for(samples.noise.by_quadrics)
        with torch.no_grad():
            for weight in list(self.model.weights)[:-1]:
                weight *= variant.scale

    def run(self, steps: int) -> None:
        variant, config = self.variant, self.config
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
        betas, rate = (0.9, self.config.beta2), self.config.learning_rate
        if variant.optimizer == "soap":
            return [Soap(parameters, rate, betas=betas)]
        if variant.optimizer == "muon":
            hidden = list(self.model.weights)[1:-1]
            others = [p for p in parameters if not any(p is h for h in hidden)]
            return [Muon(hidden, variant.hidden_rate), torch.optim.Adam(others, lr=rate, betas=betas)]
        return [torch.optim.Adam(parameters, lr=rate, betas=betas)]

    def terms(self, config: FitConfig, t: float) -> dict[str, Tensor]:
        sigma = self.variant.jitter * max(0.0, 1 - 3 * t)
        model: Any = Jittered(self.model, sigma, self.generator) if sigma else self.model
        key = config.batch_surface, config.batch_space
        if key not in self.batches:
            self.batches[key] = Batches([self.samples], config, 1)
        self.batches[key].draw(1, [self.generator])
        batch = self.batches[key].pick(torch.tensor([0]))
        warm = t < config.warm_start_share
        given = Given(batch, model(batch.x), None) if warm else Given(batch, *model.value_and_gradient(batch.x))
        return terms_of(given, Task(self.model, self.samples, self.generator), config)

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


class Jittered:
    """A network that is asked beside the points that it is given."""

    def __init__(self, model: Siren, sigma: float, generator: torch.Generator) -> None:
        self.model, self.sigma, self.generator = model, sigma, generator

    def _moved(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn(x.shape, generator=self.generator)

    def __call__(self, x: Tensor, **_: object) -> Tensor:
        return self.model.forward(self._moved(x))

    def value_and_gradient(self, x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        return self.model.value_and_gradient(self._moved(x))


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
    score.N_SAMPLES = SAMPLES
    found = score.measure(mesh, reference, unit)
    return {name: float(found[name]) for name in ("dC", "dH")}


def relative(rows: list[dict[str, Any]]) -> dict[tuple[str, float], tuple[float, dict[str, float], int]]:
    """By variant and budget: the geometric mean, over cases, of the error beside the first fit's at half its steps; the
    mean error by case; and how many fits collapsed."""
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in rows:
        cases = found.setdefault((row["variant"], row["budget"]), {})
        cases.setdefault(row["case"], []).append(row.get("dC", np.nan))
    means = {
        key: {case: float(np.nanmean(errors)) for case, errors in cases.items() if np.isfinite(errors).any()}
        for key, cases in found.items()
    }
    first = means[("first", 0.5)]
    return {
        key: (
            float(np.exp(np.mean([np.log(errors[case] / first[case]) for case in errors if case in first]))),
            errors,
            sum(int(np.isnan(each).sum()) for each in found[key].values()),
        )
        for key, errors in means.items()
        if any(case in first for case in errors)
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: a line for a variant and budget, the mean over seeds for each case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = ["| variant | share of the seconds | beside the first at half | " + " | ".join(cases) + " | collapsed |"]
    lines.append("|---" * (len(cases) + 4) + "|")
    for (variant, budget), (mean, errors, collapsed) in relative(rows).items():
        cells = " | ".join(f"{errors[case]:.4f}" if case in errors else "" for case in cases)
        lines.append(f"| {variant} | {budget:g} | {mean:.3f} | {cells} | {collapsed or ''} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error beside the first fit's against the share of its seconds, a line a variant."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[tuple[float, float]]] = {}
    for (variant, budget), (mean, _, _) in relative(rows).items():
        curves.setdefault(variant, []).append((budget, mean))
    sheet, axis = pyplot.subplots(figsize=(10, 7))
    named = {"first": "black", **dict.fromkeys(KEPT, "tab:blue"), KEPT[-1]: "tab:red"}
    for variant, points in curves.items():
        x, y = zip(*sorted(points), strict=True)
        colour = named.get(variant, "0.7")
        axis.plot(x, y, "o-", color=colour, linewidth=2 if variant in named else 0.8, markersize=3)
        if y[-1] < HIGHEST:
            axis.annotate(
                variant, (x[-1], y[-1]), xytext=(5, -2), textcoords="offset points", fontsize=6.5, color="0.3"
            )
    axis.set(xscale="log", xlim=(0.23, 1.6), ylim=(0.82, HIGHEST))
    axis.set(xlabel="share of the first fit's seconds", ylabel="error beside the first fit's at half its seconds")
    axis.set_xticks([0.25, 0.5, 1], ["1/4", "1/2", "1"])
    axis.minorticks_off()
    axis.grid(visible=True, alpha=0.25)
    sheet.tight_layout()
    sheet.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--variants", default=";".join(VARIANTS))
    parser.add_argument("--cases", default="")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budgets", default="0.25,0.5,1")
    parser.add_argument("--plot", type=Path, help="draw what FILE holds here; without --score nothing else is done")
    args = parser.parse_args()
    if args.score is not None:
        study(args)
    rows = json.loads(args.json.read_text())
    print(table(rows))
    if args.plot is not None:
        plot(rows, args.plot)
    return 0


def study(args: argparse.Namespace) -> None:
    """Runs what FILE does not hold yet."""
    torch.set_num_threads(1)
    score = loaded(args.score)
    cases = json.loads((args.score.parent / "cases_dev.json").read_text())["cases"]
    wanted = set(filter(None, args.cases.split(",")))
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    done = {(row["case"], row["variant"], row["budget"], row["seed"]) for row in rows}
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
                    samples = samples or draw_samples(cloud, FIRST.pool, np.random.default_rng(seed))
                    variant = VARIANTS[name]
                    steps = round(budget * FIRST.steps / variant.cost)
                    one = Fit(samples, variant, seed)
                    start = time.process_time()
                    one.run(steps)
                    seconds = time.process_time() - start
                    row = {
                        "case": case["name"], "variant": name, "budget": budget, "seed": seed,
                        "steps": steps, "seconds": seconds,
                    }  # fmt: skip
                    health = health_of(one.model, samples, loss=0.0)
                    row["wrong_signs"], row["held_out"] = health.wrong_signs, health.surface
                    if health.wrong_signs < COLLAPSED:
                        row |= measured(one.model, frame, reference, unit, score)
                    rows.append(row)
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")
                    print(*row.values(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
