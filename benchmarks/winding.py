#!/usr/bin/env python3
"""The winding number by the octree beside the full sum, on the samples of a fit: its errors, its signs, its seconds.

    python benchmarks/winding.py CLOUD [CLOUD ...] [--full 3000]

A sign is wrong where the two lie on different sides of 1/2; the full sum, in float64, takes so many of the samples.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sdfserver.cloud import Frame
from sdfserver.config import PoolConfig
from sdfserver.io import read_cloud
from sdfserver.neighbours import neighbours_of
from sdfserver.sampling import normals_of, pool_positions
from sdfserver.winding import DipoleTree, blurred_distance, point_areas, winding_number


def full_sum(
    queries: NDArray[np.float64], points: NDArray[np.float64], vectors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Every point's share at every query: Barill et al. 2018, equation 5."""
    sums = []
    for some in np.array_split(queries, max(1, len(queries) // 32)):
        offsets = points[None] - some[:, None]
        distances = np.linalg.norm(offsets, axis=-1)
        sums.append(((offsets * vectors).sum(-1) / (4 * np.pi * distances**3)).sum(1))
    return np.concatenate(sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clouds", type=Path, nargs="+")
    parser.add_argument("--full", type=int, default=3000)
    args = parser.parse_args()
    heads = ("cloud", "points", "terms a sample", "signs wrong", "clear of it", "error: mean, largest", "times faster")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    for path in args.clouds:
        cloud = read_cloud(path)
        points = Frame.around(cloud.points, margin=0.0).to_unit(cloud.points)
        rng, nearest = np.random.default_rng(0), neighbours_of(points, "cpu")
        areas = point_areas(points, nearest)
        pool = pool_positions(points, PoolConfig(), rng)
        start = time.perf_counter()
        tree = DipoleTree(points, normals_of(cloud), areas)
        ours = winding_number(torch.tensor(pool, dtype=torch.float32), tree).numpy()
        seconds = time.perf_counter() - start
        some = rng.permutation(len(pool))[: args.full]
        start = time.perf_counter()
        full = full_sum(pool[some], points, areas[:, None] * normals_of(cloud))
        full_seconds = (time.perf_counter() - start) * len(pool) / len(some)
        clear = nearest.query(pool[some], 1)[0][:, 0] > blurred_distance(areas)
        wrong = (ours[some] > 0.5) != (full > 0.5)
        error = np.abs(ours[some] - full)[clear]
        print(
            f"| {path.stem} | {len(points)} | {tree.terms / len(pool):.0f} | {wrong.mean():.2%} | "
            f"{wrong[clear].mean():.2%} | {error.mean():.3f}, {error.max():.3f} | {full_seconds / seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
