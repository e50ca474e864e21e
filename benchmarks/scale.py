#!/usr/bin/env python3
"""Seconds and memory against the number of points: large clouds, in memory and by tiles.

    python benchmarks/scale.py [--cases terrain:1e6:tiles,room:1e6:memory] [--preset NAME] [--json FILE] [--plot FILE]

Makes each cloud, runs the whole command on it in a process of its own, and takes that process's peak memory. terrain is
a height field of ten octaves, open at its sides; room is a furnished room, seen from inside; ripples a sphere with
ripples of two lengths. A case is a shape, a number of points, and whether it is fitted in memory or by tiles. The plot
needs matplotlib.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdfserver.io import write_ply

Array = NDArray[np.float64]
CASES = "ripples:1e5:memory,ripples:1e6:memory,terrain:1e6:memory,terrain:1e6:tiles,room:1e6:tiles,terrain:1e7:tiles"


def terrain(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """A square of 1000 m with hills of 60 m and ever smaller ones."""
    xy, height, slope = rng.random((n, 2)) * 1000, np.zeros(n), np.zeros((n, 2))
    waves = np.random.default_rng(1)
    for octave in range(10):
        for _ in range(3):
            direction = waves.normal(size=2)
            direction *= 2 * np.pi * 2**octave / 1000 / np.linalg.norm(direction)
            amplitude, phase = 30 / 2.1**octave, waves.random() * 2 * np.pi
            angle = xy @ direction + phase
            height += amplitude * np.sin(angle)
            slope += amplitude * np.cos(angle)[:, None] * direction
    return np.column_stack([xy, height]), _unit(np.column_stack([-slope, np.ones(n)]))


def room(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """A room of 6 x 4 x 3 m with a table, a cupboard and a lamp; normals face the room.

    Where furniture stands on the floor, neither it nor the floor has points.
    """
    boxes = [
        ((0, 0, 0), (6, 4, 3), -1.0),
        ((2, 1.5, 0.7), (3.6, 2.5, 0.76), 1.0),
        ((5.3, 0.4, 0.0), (5.9, 2.0, 2.1), 1.0),
    ]
    boxes += [((x, y, 0.0), (x + 0.06, y + 0.06, 0.7), 1.0) for x in (2.05, 3.49) for y in (1.55, 2.39)]
    faces = []
    for low, high, sign in boxes:
        size = np.subtract(high, low)
        for axis in range(3):
            for end in (0, 1):
                if sign > 0 and axis == 2 and end == low[2] == 0:
                    continue
                area = np.delete(size, axis).prod()
                faces.append((area, np.array(low, float), size, axis, end, sign))
    areas = np.array([face[0] for face in faces] + [4 * np.pi * 0.2**2])
    counts = rng.multinomial(n, areas / areas.sum())
    points, normals = [], []
    for count, (_, low, size, axis, end, sign) in zip(counts, faces, strict=False):
        x = rng.random((count, 3))
        x[:, axis] = end
        normal = np.zeros((count, 3))
        normal[:, axis] = sign * (2 * end - 1)
        points.append(low + x * size)
        normals.append(normal)
    d = _unit(rng.normal(size=(counts[-1], 3)))
    points.append([1.0, 1.0, 2.3] + 0.2 * d)
    normals.append(d)
    x, normal = np.concatenate(points), np.concatenate(normals)
    standing = [(low[:2], high[:2]) for low, high, sign in boxes if sign > 0 and low[2] == 0]
    covered = np.any([((x[:, :2] > low) & (x[:, :2] < high)).all(axis=1) for low, high in standing], axis=0)
    seen = ~(covered & (x[:, 2] == 0))
    return x[seen], normal[seen]


def ripples(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """A unit sphere with ripples of two lengths."""
    d = _unit(rng.normal(size=(n, 3)))
    radius, slope = np.ones((n, 1)), np.zeros((n, 3))
    for height, waves in ((0.02, 15.0), (0.003, 90.0)):
        sines, cosines = np.sin(waves * d), np.cos(waves * d)
        radius += height * sines.prod(axis=1, keepdims=True)
        others = np.stack([sines[:, 1] * sines[:, 2], sines[:, 0] * sines[:, 2], sines[:, 0] * sines[:, 1]], axis=1)
        slope += height * waves * cosines * others
    slope -= (slope * d).sum(axis=1, keepdims=True) * d
    return radius * d, _unit(radius * d - slope)


SHAPES: dict[str, Callable[[int, np.random.Generator], tuple[Array, Array]]] = {
    "terrain": terrain,
    "room": room,
    "ripples": ripples,
}


def _unit(x: Array) -> Array:
    unit: Array = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit


def measured(case: str, preset: str, folder: Path) -> dict[str, object]:
    """One whole command: seconds, peak memory, and what its report says."""
    shape, count, how = case.split(":")
    cloud, mesh, report = (folder / name for name in ("cloud.ply", "mesh.ply", "report.json"))
    points, normals = SHAPES[shape](int(float(count)), np.random.default_rng(0))
    write_ply(cloud, points, normals=normals)
    size = float(np.linalg.norm(np.ptp(points, axis=0)))
    del points, normals
    command = [sys.executable, "-m", "sdfserver", "reconstruct", str(cloud), "-o", str(mesh), "--report", str(report)]
    command += ["--preset", preset, "--quiet", *(["--work-dir", str(folder / "work")] if how == "tiles" else [])]
    start = time.perf_counter()
    code = f"import resource, subprocess, sys; subprocess.run({command!r}, check=True)"
    code += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    seconds = time.perf_counter() - start
    told = json.loads(report.read_text())
    local = told["fit"]["local"] or {}
    return {
        "case": case,
        "points": int(float(count)),
        "seconds": seconds,
        "peak_gb": peak * (1024 if sys.platform != "darwin" else 1) / 1e9,
        "cells": local.get("cells_kept"),
        "tiles": told["fit"].get("tiles"),
        "resolution": told["mesh"]["resolution"],
        "watertight": told["mesh"]["watertight"],
        "mean_percent": 100 * told["input_to_mesh"]["mean"] / size,
        "stages": told["seconds"],
    }


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Seconds and memory against points, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for axis, key, name in zip(axes, ("seconds", "peak_gb"), ("seconds", "peak memory, GB"), strict=True):
        for how, marker in (("memory", "o"), ("tiles", "s")):
            some = [row for row in rows if str(row["case"]).endswith(how)]
            axis.loglog([row["points"] for row in some], [row[key] for row in some], marker, label=f"in {how}")
            for row in some:
                axis.annotate(str(row["case"]).split(":")[0], (row["points"], row[key]), fontsize=7, xytext=(4, 4),
                              textcoords="offset points")  # fmt: skip
        axis.set_xlabel("points")
        axis.set_ylabel(name)
        axis.grid(True, which="both", alpha=0.25)
    axes[0].legend(["in memory", "by tiles"])
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--json", type=Path, help="also write all rows here; rows that are there of other cases stay")
    parser.add_argument("--plot", type=Path, help="plot the rows, those of the JSON file included")
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json and asked.json.exists() else []
    print(
        "| case | seconds | peak GB | tiles | cells | resolution | mean distance, % | watertight |\n" + "|---" * 8 + "|"
    )
    for case in filter(None, asked.cases.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            row = measured(case, asked.preset, Path(folder))
        print(
            f"| {case} | {row['seconds']:.0f} | {row['peak_gb']:.2f} | {row['tiles'] or ''} | {row['cells']} "
            f"| {row['resolution']} | {row['mean_percent']:.4f} | {'yes' if row['watertight'] else 'open'} |",
            flush=True,
        )
        rows = [other for other in rows if other["case"] != case] + [row]
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    if asked.plot:
        plot(rows, asked.plot)


if __name__ == "__main__":
    main()
