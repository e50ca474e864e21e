#!/usr/bin/env python3
"""Compare the reconstruction on a CUDA device with the CPU's, and print the seconds of each stage.

    python benchmarks/gpu_check.py [--preset standard] [--points 100000] [--json FILE]

Needs torch, numpy, scipy and scikit-image alone; run it from the root of a checkout. The cloud is a knotted tube with
a known surface. Without a CUDA device it says so and compares the CPU with itself, so that the script stays tried.

Three comparisons, from exact to loose: one step's gradients on the same batch; the mesh of the same network; and two
whole fits, which draw different random numbers on different devices and so agree only as two seeds do.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from scipy.spatial import cKDTree

from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import PRESETS, NetworkConfig
from sdfserver.extract import extract
from sdfserver.field import SignedDistanceField
from sdfserver.losses import eikonal_loss, surface_loss
from sdfserver.reconstruct import Reconstruction, reconstruct
from sdfserver.siren import Siren


def knot(n: int, *, seed: int = 0, radius: float = 0.28) -> PointCloud:
    """n points on a tube of `radius` around a trefoil knot, with exact normals."""
    rng = np.random.default_rng(seed)
    t, v = rng.random(n) * 2 * np.pi, rng.random(n) * 2 * np.pi
    center = np.stack([np.sin(t) + 2 * np.sin(2 * t), np.cos(t) - 2 * np.cos(2 * t), -np.sin(3 * t)], axis=1)
    tangent = np.stack([np.cos(t) + 4 * np.cos(2 * t), -np.sin(t) + 4 * np.sin(2 * t), -3 * np.cos(3 * t)], axis=1)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    u = np.cross(tangent, [0.0, 0.0, 1.0])
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    normals = np.cos(v)[:, None] * u + np.sin(v)[:, None] * np.cross(tangent, u)
    return PointCloud(points=center + radius * normals, normals=normals)


def synchronised(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of `work`, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def step_gradient(device: torch.device) -> torch.Tensor:
    """The gradient of a loss with the field's gradient in it, on a fixed batch."""
    siren = Siren(NetworkConfig(), generator=torch.Generator().manual_seed(0)).to(device)
    x = (torch.rand(2800, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(device)
    phi, gradient = siren.value_and_gradient(x)
    (surface_loss(phi) + eikonal_loss(gradient)).backward()
    return torch.cat([p.grad.flatten() for p in siren.parameters() if p.grad is not None]).cpu()


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance from a point of `a` to the nearest of `b`, or back."""
    return float(max(cKDTree(b).query(a)[0].max(), cKDTree(a).query(b)[0].max()))


def whole_job(cloud: PointCloud, preset: str, device: str) -> tuple[float, Reconstruction]:
    return synchronised(torch.device(device), lambda: reconstruct(cloud, preset=preset, device=device))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="standard", choices=PRESETS)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    found = torch.cuda.is_available()
    other = torch.device("cuda" if found else "cpu")
    name = torch.cuda.get_device_name() if found else "no CUDA device: the CPU is compared with itself"
    print(f"torch {torch.__version__}, {name}", flush=True)
    figures: dict[str, Any] = {"torch": torch.__version__, "device": name, "preset": args.preset}

    a, b = step_gradient(torch.device("cpu")), step_gradient(other)
    figures["step_gradient_relative_error"] = float((a - b).norm() / a.norm())
    print(f"one step's gradient: relative difference {figures['step_gradient_relative_error']:.1e}")

    cloud = knot(args.points)
    diagonal = float(np.linalg.norm(np.ptp(cloud.points, axis=0)))
    if found:
        reconstruct(cloud, device="cuda", preset="draft")  # the first use of a device loads its libraries
    jobs: dict[str, Reconstruction] = {}
    for device in dict.fromkeys(("cpu", str(other))):
        seconds, job = whole_job(cloud, args.preset, device)
        jobs[device] = job
        figures[device] = {"seconds": {"job": seconds, **job.report["seconds"]}, **job.report["input_to_mesh"]}
        stages = "  ".join(f"{stage} {s:.2f} s" for stage, s in job.report["seconds"].items())
        print(f"{device}: {stages}; cloud to mesh mean {job.report['input_to_mesh']['mean']:.2e}", flush=True)

    first, last = jobs["cpu"], jobs[str(other)]
    moved = SignedDistanceField(
        Siren(last.field.network.config).to("cpu"), Frame(center=last.field.frame.center, scale=last.field.frame.scale)
    )
    moved.network.load_state_dict(last.field.network.state_dict())
    resolution = PRESETS[args.preset].mesh.resolution
    seconds, here = synchronised(other, lambda: extract(last.field, resolution=resolution))
    there = extract(moved, resolution=resolution)
    figures["extract_seconds"] = seconds
    figures["same_field_mesh_gap_voxels"] = gap(here.vertices_unit, there.vertices_unit) * resolution / 2
    figures["same_field_faces"] = [len(here.faces), len(there.faces)]
    print(
        f"the same network meshed on both: {len(here.faces)} and {len(there.faces)} faces, "
        f"at most {figures['same_field_mesh_gap_voxels']:.1e} voxels apart; {seconds:.2f} s on {other}"
    )

    figures["two_fits_gap_of_diagonal"] = gap(first.mesh.vertices, last.mesh.vertices) / diagonal
    print(f"two fits: meshes at most {figures['two_fits_gap_of_diagonal']:.2%} of the diagonal apart")
    if found:
        figures["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
        print(f"peak GPU memory {figures['peak_gpu_memory_mb']:.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    agree = figures["step_gradient_relative_error"] < 1e-4 and figures["same_field_mesh_gap_voxels"] < 0.5
    print("agree" if agree else "DISAGREE")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
