#!/usr/bin/env python3
"""All that a CUDA device has to show, in one run: its tests, its rates, and the seconds of steps, jobs and batches.

    python benchmarks/gpu_check.py [--json FILE] [--only SECTION,...] [--small]

Needs torch, numpy, scipy and scikit-image alone (and pytest for the section `tests`); run it from the root of a
checkout. Clouds are knotted tubes with a known surface. Sections: tests, rates, agree, steps, job, large, batch, tf32,
compiled. What is measured is written to FILE after each, and a section that fails does not end the run.

Without a CUDA device it says so and runs on the CPU, with --small in a few minutes, so that the script stays tried.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from sdfserver import bench
from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import PRESETS, NetworkConfig
from sdfserver.descent import Batches, Descent, Given, Task, terms_of
from sdfserver.extract import extract
from sdfserver.field import SignedDistanceField
from sdfserver.io import write_ply
from sdfserver.losses import eikonal_loss, surface_loss
from sdfserver.mesh import TriangleMesh
from sdfserver.reconstruct import FieldJob, fit_fields, mesh_field, reconstruct
from sdfserver.sampling import Samples, draw_samples
from sdfserver.siren import Siren

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
RADIUS = 0.28
JUDGED = 5000
"""Vertices by which a mesh is judged."""
SMALL_JOB = 20_000
"""Points of each of the clouds that are fitted together."""


# The cloud


def curve(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 3) of a trefoil knot, and its unit tangents there."""
    center = np.stack([np.sin(t) + 2 * np.sin(2 * t), np.cos(t) - 2 * np.cos(2 * t), -np.sin(3 * t)], axis=1)
    tangent = np.stack([np.cos(t) + 4 * np.cos(2 * t), -np.sin(t) + 4 * np.sin(2 * t), -3 * np.cos(3 * t)], axis=1)
    return center, tangent / np.linalg.norm(tangent, axis=1, keepdims=True)


def knot(n: int, *, seed: int = 0, radius: float = RADIUS) -> PointCloud:
    """n points on a tube of `radius` around the knot, with exact normals."""
    rng = np.random.default_rng(seed)
    center, tangent = curve(rng.random(n) * 2 * np.pi)
    v = rng.random(n) * 2 * np.pi
    u = np.cross(tangent, [0.0, 0.0, 1.0])
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    normals = np.cos(v)[:, None] * u + np.sin(v)[:, None] * np.cross(tangent, u)
    return PointCloud(points=center + radius * normals, normals=normals)


def error(mesh: TriangleMesh) -> float:
    """Mean distance of the vertices, or some of them, from the tube, as a share of its diagonal."""
    some = mesh.vertices[:: max(1, len(mesh.vertices) // JUDGED)]
    near, _ = cKDTree(curve(np.linspace(0, 2 * np.pi, 20_000))[0]).query(some, workers=-1)
    diagonal = np.linalg.norm(np.ptp(mesh.vertices, axis=0))
    return float(np.abs(near - RADIUS).mean() / diagonal)


# Clocks


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of `work`, the device's queue included."""
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


@contextmanager
def tensor_cores() -> Any:
    """float32 products by TF32 while this is open."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


# Sections: each takes the arguments and gives figures


def tests(_: argparse.Namespace) -> dict[str, Any]:
    # Not what the project's own environment has: plugins, versions, and no warnings.
    plain = {"addopts": "--import-mode=importlib", "minversion": "7", "filterwarnings": "default"}
    options = [word for name, value in plain.items() for word in ("-o", f"{name}={value}")]
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "tests/test_gpu.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    return {"exit_code": done.returncode, "summary": (done.stdout.strip().splitlines() or [""])[-1]}


def rates(_: argparse.Namespace) -> dict[str, Any]:
    found = bench.measured_rates(DEVICE)
    print(bench.rates_text(found))
    figures = asdict(found)
    if CUDA:
        with tensor_cores():
            figures["tf32"] = bench.measured_rates(DEVICE).float32
        print(f"TF32 {figures['tf32'] / 1e9:.0f} GFLOP/s")
    return figures


def agree(args: argparse.Namespace) -> dict[str, Any]:
    """From exact to loose: one step's gradients; the mesh of one network; the errors of two whole fits."""
    a, b = step_gradient(torch.device("cpu")), step_gradient(DEVICE)
    figures: dict[str, Any] = {"step_gradient_relative_error": float((a - b).norm() / a.norm())}
    cloud = knot(args.points)
    jobs = {device: reconstruct(cloud, device=device) for device in dict.fromkeys(("cpu", str(DEVICE)))}
    figures["error"] = {device: error(job.mesh) for device, job in jobs.items()}
    figures["input_to_mesh"] = {device: job.report["input_to_mesh"]["mean"] for device, job in jobs.items()}
    ours = jobs[str(DEVICE)].field
    with tempfile.TemporaryDirectory() as folder:
        ours.save(f"{folder}/field.safetensors")
        moved = SignedDistanceField.load(f"{folder}/field.safetensors", device="cpu")
    here, there = extract(ours, resolution=256), extract(moved, resolution=256)
    figures["same_field_faces"] = [len(here.faces), len(there.faces)]
    figures["same_field_mesh_gap_voxels"] = 128 * max(
        float(cKDTree(x).query(y)[0].max())
        for x, y in ((here.vertices_unit, there.vertices_unit), (there.vertices_unit, here.vertices_unit))
    )
    print(json.dumps(figures, indent=1))
    return figures


def step_gradient(device: torch.device) -> Tensor:
    """The gradient of a loss with the field's gradient in it, on a fixed batch."""
    siren = Siren(NetworkConfig(), generator=torch.Generator().manual_seed(0)).to(device)
    x = (torch.rand(2800, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(device)
    phi, gradient = siren.value_and_gradient(x)
    (surface_loss(phi) + eikonal_loss(gradient)).backward()
    return torch.cat([p.grad.flatten() for p in siren.parameters() if p.grad is not None]).cpu()


def unit_samples(n: int) -> Samples:
    cloud = knot(n)
    unit = PointCloud(points=Frame.around(cloud.points).to_unit(cloud.points), normals=cloud.normals)
    return draw_samples(unit, PRESETS["standard"].fit.pool, np.random.default_rng(0), DEVICE)


def tasks(samples: Samples, count: int) -> list[Task]:
    network = PRESETS["standard"].network
    return [
        Task(
            model=Siren(network, generator=torch.Generator().manual_seed(i)).to(DEVICE),
            samples=samples,
            generator=torch.Generator().manual_seed(i),
        )
        for i in range(count)
    ]


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of `standard` for one network and for several; recorded, as it comes, and as published."""
    samples, preset = unit_samples(min(args.points, 50_000)), PRESETS["standard"]
    config = replace(preset.fit, warm_start_share=0.0)
    flops = bench.step_flops(preset.network, config.batch_surface + config.batch_space)
    peak = bench.measured_rates(DEVICE).float32
    figures: dict[str, Any] = {"flops": flops, "float32": peak, "together": {}}
    for count in args.together:
        descent = Descent(tasks(samples, count), config, most_at_once=args.steps)
        descent.draw(args.steps)
        for _ in range(3):
            descent.take()
        seconds = timed(lambda descent=descent: [descent.take() for _ in range(args.steps - 3)])[0] / (args.steps - 3)
        looks = timed(descent.look)[0], timed(descent.look)[0], timed(descent.look)[0]
        floor = count * flops / peak
        figures["together"][count] = {"seconds": seconds, "floor": floor, "share": floor / seconds, "look": looks[-1]}
        print(
            f"{count:3} networks: {seconds * 1e3:.3f} ms a step, {seconds * 1e3 / count:.3f} a network; "
            f"{floor / seconds:.0%} of the float32 floor; a look {looks[-1] * 1e3:.2f} ms",
            flush=True,
        )
    one = Descent(tasks(samples, 1), config, most_at_once=args.steps)
    one.draw(args.steps)
    figures["unrecorded"] = per_step(lambda: one._take(False, False), args.steps - 2)
    figures["autograd"] = per_step(plain_step(samples, config), args.steps - 2)
    figures["published, our sizes"] = per_step(published_step(samples, preset.network, 840, 480), args.steps - 2)
    figures["published"] = per_step(published_step(samples, NetworkConfig(hidden=256), 1400, 1400), args.steps - 2)
    ours = figures["together"][args.together[0]]["seconds"]
    for name in ("unrecorded", "autograd", "published, our sizes", "published"):
        print(f"{name}: {figures[name] * 1e3:.3f} ms a step, {figures[name] / ours:.1f} times the recorded one")
    return figures


def per_step(step: Callable[[], Any], count: int) -> float:
    step()
    return timed(lambda: [step() for _ in range(count)])[0] / count


def plain_step(samples: Samples, config: Any) -> Callable[[], None]:
    """The reference: our terms and our value and gradient, differentiated automatically, optimised tensor by tensor."""
    (task,) = tasks(samples, 1)
    batches = Batches([samples], config, 1)
    batches.draw(1, [task.generator])
    batch = batches.pick(torch.zeros(1, dtype=torch.int64, device=DEVICE))
    optimizer = torch.optim.Adam(task.model.parameters(), lr=config.learning_rate)

    def step() -> None:
        optimizer.zero_grad()
        given = Given(batch, *task.model.value_and_gradient(batch.x))
        task.weights(config).total(terms_of(given, task, config)).backward()
        optimizer.step()

    return step


class Published(nn.Module):
    """A SIREN as it is usually written (Sitzmann et al. 2020)."""

    def __init__(self, network: NetworkConfig) -> None:
        super().__init__()
        sizes = [3] + [network.hidden] * network.layers + [1]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))
        self.omega = network.omega

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(self.omega * layer(x))
        return self.layers[-1](x)


def published_step(samples: Samples, network: NetworkConfig, n: int, m: int, *, compiled: bool = False) -> Any:
    """A step of the published recipe: the gradient by automatic differentiation, and that differentiated again."""
    model = Published(network).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def losses(x: Tensor, normals: Tensor) -> Tensor:
        x = x.requires_grad_()
        phi = model(x)
        (gradient,) = torch.autograd.grad(phi, x, torch.ones_like(phi), create_graph=True)
        surface = phi[:n].abs().mean() * 3e3
        normal = (1 - nn.functional.cosine_similarity(gradient[:n], normals, dim=-1)).mean() * 1e2
        off = torch.exp(-1e2 * phi[n:].abs()).mean() * 1e2
        return surface + normal + off + (gradient.norm(dim=-1) - 1).abs().mean() * 5e1

    run = torch.compile(losses, mode="reduce-overhead") if compiled else losses

    def step() -> None:
        rows = torch.randint(len(samples.points), (n,), generator=generator, device=DEVICE)
        space = torch.rand((m, 3), generator=generator, device=DEVICE) * 2 - 1
        optimizer.zero_grad()
        run(torch.cat([samples.points[rows], space]), samples.normals[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


COLD = """
import sys, time
start = time.perf_counter()
sys.path.insert(0, {root!r})
from sdfserver.io import read_cloud, write_mesh
from sdfserver.reconstruct import reconstruct
loaded = time.perf_counter()
write_mesh(reconstruct(read_cloud({cloud!r}), device={device!r}).mesh, {mesh!r})
print(loaded - start, time.perf_counter() - loaded)
"""


def job(args: argparse.Namespace) -> dict[str, Any]:
    """`standard` from file to file: in a new process, and in one that has done it before, stage by stage."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "knot.ply"
        cloud = knot(args.points)
        write_ply(path, cloud.points, normals=cloud.normals)
        script = COLD.format(root=str(ROOT), cloud=str(path), device=str(DEVICE), mesh=f"{folder}/mesh.ply")
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        cold = time.perf_counter() - begin
        imports, rest = map(float, done.stdout.split()[-2:])
        print(f"cold: {cold:.2f} s the whole process, {imports:.2f} of them imports, {rest:.2f} from file to file")
        found = bench.measured_rates(DEVICE)
        runs = [bench.run(path, "standard", found, seed=0, device=str(DEVICE)) for _ in range(args.runs + 1)]
        warm = min(runs[1:], key=lambda run: run.seconds)
        print(bench.run_text(warm))
        draft = [bench.run(path, "draft", found, seed=0, device=str(DEVICE)) for _ in range(2)][-1]
        print(bench.run_text(draft))
    return {
        "points": args.points,
        "cold": cold,
        "cold_imports": imports,
        "warm": [run.seconds for run in runs[1:]],
        "stages": [asdict(stage) for stage in warm.stages],
        "steps": warm.steps,
        "draft": draft.seconds,
    }


def large(args: argparse.Namespace) -> dict[str, Any]:
    """The mesh at 512^3, and a large cloud."""
    first = reconstruct(knot(args.points), device=str(DEVICE))
    figures: dict[str, Any] = {}
    for resolution in args.resolutions:
        extract(first.field, resolution=resolution)
        seconds, surface = timed(lambda resolution=resolution: extract(first.field, resolution=resolution))
        figures[f"extract_{resolution}"] = seconds
        print(f"{resolution}^3: {seconds:.3f} s, {len(surface.faces):,} faces", flush=True)
    cloud = knot(args.many)
    reconstruct(cloud, device=str(DEVICE))
    seconds, result = timed(lambda: reconstruct(cloud, device=str(DEVICE)))
    figures |= {
        "points": args.many,
        "seconds": seconds,
        "stages": result.report["seconds"],
        "error": error(result.mesh),
    }
    print(f"{args.many:,} points: {seconds:.2f} s {result.report['seconds']}, error {figures['error']:.1e}")
    return figures


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """Shapes an hour against how many are fitted together, meshes included, with `draft` and with `standard`."""
    figures: dict[str, Any] = {}
    for preset in ("draft", "standard"):
        rows = figures[preset] = {}
        for count in args.together:
            clouds = [knot(SMALL_JOB, seed=i) for i in range(count)]

            def shapes(clouds: list[PointCloud] = clouds, preset: str = preset) -> list[TriangleMesh]:
                jobs = [FieldJob(cloud=cloud, seed=i) for i, cloud in enumerate(clouds)]
                meshes = []
                for fitted in fit_fields(jobs, preset=preset, device=str(DEVICE)):
                    if isinstance(fitted, Exception):
                        raise fitted
                    meshes.append(mesh_field(fitted.field, fitted.cloud, PRESETS[preset].mesh).mesh)
                return meshes

            if count == args.together[0]:
                shapes()
            seconds, meshes = timed(shapes)
            errors = [error(mesh) for mesh in meshes]
            rows[count] = {
                "seconds": seconds,
                "shapes_an_hour": 3600 * count / seconds,
                "error": float(np.mean(errors)),
            }
            ratio = rows[count]["shapes_an_hour"] / rows[args.together[0]]["shapes_an_hour"]
            print(
                f"{preset}, {count:3} together: {seconds:.2f} s, {rows[count]['shapes_an_hour']:,.0f} shapes an hour, "
                f"{ratio:.2f} times one by one, error {rows[count]['error']:.1e}",
                flush=True,
            )
    return figures


def tf32(args: argparse.Namespace) -> dict[str, Any]:
    """What TF32 would do to errors and seconds; the product does not use it."""
    cloud, figures = knot(args.points), {}
    for seed in range(2):
        figures[f"float32, seed {seed}"] = seconds_and_error(cloud, seed)
        with tensor_cores():
            figures[f"tf32, seed {seed}"] = seconds_and_error(cloud, seed)
    print(json.dumps(figures, indent=1))
    return figures


def seconds_and_error(cloud: PointCloud, seed: int) -> dict[str, float]:
    seconds, result = timed(lambda: reconstruct(cloud, device=str(DEVICE), seed=seed))
    return {"seconds": seconds, "fit": result.report["seconds"]["fit"], "error": error(result.mesh)}


def compiled(args: argparse.Namespace) -> dict[str, Any]:
    """The published step through torch.compile in its mode for few launches: what it takes to compile, and a step."""
    samples = unit_samples(20_000)
    step = published_step(samples, PRESETS["standard"].network, 840, 480, compiled=True)
    try:
        seconds, _ = timed(lambda: [step() for _ in range(3)])
    except Exception as error:  # noqa: BLE001 - that it cannot is a result: PyTorch 2.13 says so of double backward
        print(f"it cannot be compiled: {error}")
        return {"error": str(error).splitlines()[0]}
    figures = {"compiling": seconds, "step": per_step(step, args.steps)}
    print(f"compiled in {seconds:.1f} s; {figures['step'] * 1e3:.3f} ms a step")
    return figures


SECTIONS = {f.__name__: f for f in (tests, rates, agree, steps, job, large, batch, tf32, compiled)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--small", action="store_true", help="little of everything")
    args = parser.parse_args()
    small = args.small
    args.points, args.many = (5000, 20_000) if small else (100_000, 1_000_000)
    args.steps, args.runs = (20, 1) if small else (400, 3)
    args.together = [1, 2] if small else [1, 2, 4, 8, 16, 32]
    args.resolutions = [64] if small else [256, 512, 1024]
    name = torch.cuda.get_device_name() if CUDA else "no CUDA device: this is the CPU"
    print(f"torch {torch.__version__}, {name}", flush=True)
    figures: dict[str, Any] = {"torch": torch.__version__, "device": name}
    failed = []
    for section in args.only.split(","):
        print(f"\n== {section}", flush=True)
        if section in ("tf32", "compiled") and not CUDA:
            print("nothing to be seen without a CUDA device")
            continue
        try:
            seconds, figures[section] = timed(lambda section=section: SECTIONS[section](args))
            print(f"({seconds:.0f} s)", flush=True)
        except Exception:  # noqa: BLE001 - a section's fault must not cost the others' figures
            failed.append(section)
            traceback.print_exc()
        if CUDA:
            figures.setdefault("peak_memory_mb", {})[section] = torch.cuda.max_memory_allocated() / 1e6
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
    found = figures.get("agree", {})
    apart = found.get("step_gradient_relative_error", 0) > 1e-4 or found.get("same_field_mesh_gap_voxels", 0) > 0.5
    if failed or apart or figures.get("tests", {}).get("exit_code"):
        print(f"\nNOT WELL: {', '.join(failed) or 'the device and the CPU differ, or a test failed'}")
        return 1
    print("\nall is well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
