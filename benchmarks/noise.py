#!/usr/bin/env python3
"""Clouds with noise, beside screened Poisson at its best depth, chosen with the truth at hand.

    python benchmarks/noise.py [--preset standard] [--data FOLDER] [--only NAMES] [--levels 0.5,1] [--json FILE]

Points of known surfaces, moved by normally distributed noise of 0.1, 0.25, 0.5 and 1% of the diagonal along each axis,
their normals by about 11 degrees along each of two. dC: half the sum of the two mean distances between mesh and truth,
in percent of its diagonal; NC: the mean cosine between the normals. Noise found: what the report says of the cloud, in
percent of the diagonal. Poisson is Open3D's at depths 5 to 10. FOLDER has the meshes but for ring and ripples.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from poisson import poisson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import hard_shapes as hard

from sdfserver.cloud import PointCloud
from sdfserver.config import PRESETS
from sdfserver.io import read_mesh
from sdfserver.mesh import TriangleMesh
from sdfserver.metrics import compare_meshes
from sdfserver.reconstruct import reconstruct
from sdfserver.sampling import normals_of

NOISES = (0.1, 0.25, 0.5, 1.0)
NORMAL_NOISE = 0.2
DEPTHS = range(5, 11)
MESHES = {"nefertiti": "nefertiti-lowres.obj", "fandisk": "fandisk.obj", "scorpion": "scorpion_low_resolution.obj"}


def truths(data: Path | None) -> Iterator[tuple[str, TriangleMesh]]:
    """The surfaces by name."""
    yield "ring", hard.torus_mesh()
    yield "ripples", _rippled()
    for name, file in MESHES.items() if data is not None else ():
        yield name, read_mesh(Path(str(data)) / "meshes" / file)


def _rippled() -> TriangleMesh:
    """The surface of `rippled_sphere`."""
    ball = hard.sphere_mesh()
    radius = 1 + 0.03 * np.sin(12.0 * ball.vertices).prod(axis=1, keepdims=True)
    return TriangleMesh(vertices=ball.vertices * radius, faces=ball.faces)


def noisy(truth: TriangleMesh, points: int, noise: float) -> PointCloud:
    """Points of `truth`, moved by `noise` percent of its diagonal."""
    cloud, rng = hard.sampled(truth, points, seed=7), np.random.default_rng(7)
    diagonal = float(np.linalg.norm(np.ptp(truth.vertices, axis=0)))
    normals = normals_of(cloud) + NORMAL_NOISE * rng.normal(size=(points, 3))
    return PointCloud(
        points=cloud.points + noise / 100 * diagonal * rng.normal(size=(points, 3)),
        normals=normals / np.linalg.norm(normals, axis=1, keepdims=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="standard", choices=[*PRESETS])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--levels", default=",".join(map(str, NOISES)), help="noise, in percent")
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    only = set(filter(None, asked.only.split(",")))
    rows: list[dict[str, Any]] = []
    for name, truth in truths(asked.data):
        if only and name not in only:
            continue
        percent = 100 / float(np.linalg.norm(np.ptp(truth.vertices, axis=0)))
        for noise in map(float, asked.levels.split(",")):
            cloud, start = noisy(truth, asked.points, noise), time.process_time()
            made = reconstruct(cloud, preset=asked.preset, device="cpu")
            seconds = time.process_time() - start
            ours = compare_meshes(made.mesh, truth, samples=50_000)
            theirs = {depth: compare_meshes(poisson(cloud, depth), truth, samples=50_000) for depth in DEPTHS}
            depth = min(theirs, key=lambda depth: theirs[depth].chamfer)
            row = {
                "case": name,
                "points": asked.points,
                "noise": noise,
                "noise_found": made.report["fit"]["noise"] * percent,
                "dC": ours.chamfer * percent,
                "NC": ours.normal_consistency,
                "watertight": made.report["mesh"]["watertight"],
                "parts": made.report["mesh"]["components"],
                "poisson_depth": depth,
                "poisson_dC": theirs[depth].chamfer * percent,
                "poisson_NC": theirs[depth].normal_consistency,
                "poisson_best_NC": max(score.normal_consistency for score in theirs.values()),
            }
            rows.append(row)
            print(
                f"{name:10s} noise {noise:4.2f}% (found {row['noise_found']:.2f})  ours dC {row['dC']:.4f} NC "
                f"{row['NC']:.4f}  Poisson at depth {depth} dC {row['poisson_dC']:.4f} NC {row['poisson_NC']:.4f}  "
                f"{seconds:.0f} s",
                flush=True,
            )
            if asked.json:
                asked.json.write_text(json.dumps({"preset": asked.preset, "rows": rows}, indent=1) + "\n")
    won = sum(row["dC"] < row["poisson_dC"] for row in rows)
    print(f"closer to the truth than the best Poisson: {won} of {len(rows)}")


if __name__ == "__main__":
    main()
