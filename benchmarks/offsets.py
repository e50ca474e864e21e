"""Offsets of fitted fields: how far they are from being as far off as asked, and what they cost.

    python benchmarks/offsets.py [--preset draft] [--json FILE.json]

Of each cloud the field is fitted once. Offsets at 1, 3, 5 and 10% of the cloud's diagonal, outward and inward, are
measured both ways against the surface phi = 0. Its closest points are found by Newton steps from points spread over it
(FieldQueries.closest), which the offset has no part in:

- from the offset: vertices and points on faces of the offset to the surface;
- to the offset: points of the surface to the offset, where that is regular beside them: what is moved from there along
  the normal by the level and two voxels has no nearer point on the surface, so that no crease is near, and the offset's
  radii of curvature are at least two voxels.

Errors are in percent of the level; those of the level set of the raw field beside them. Seconds are of the processor.
"""

import argparse
import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.config import PRESETS, MeshConfig
from sdfserver.errors import NoSurfaceError
from sdfserver.extract import extract
from sdfserver.field import SignedDistanceField
from sdfserver.io import read_cloud
from sdfserver.mesh import TriangleMesh
from sdfserver.metrics import closest_on_mesh, sample_surface
from sdfserver.reconstruct import fit_field, mesh_field

SHARES = (0.01, -0.01, 0.03, -0.03, 0.05, -0.05, 0.1, -0.1)
SAMPLES = 3000
DATA = Path(__file__).parents[1] / "data"


def ring(n: int = 20_000) -> PointCloud:
    """Points of a torus with radii 0.65 and 0.25."""
    rng = np.random.default_rng(0)
    u, v, chance = rng.random((3, 3 * n)) * [[2 * math.pi], [2 * math.pi], [1]]
    u, v = (angle[chance < (0.65 + 0.25 * np.cos(v)) / 0.9][:n] for angle in (u, v))
    normals = np.stack([np.cos(u) * np.cos(v), np.sin(u) * np.cos(v), np.sin(v)], axis=1)
    center = 0.65 * np.stack([np.cos(u), np.sin(u), np.zeros_like(u)], axis=1)
    return PointCloud(points=center + 0.25 * normals, normals=normals)


def box(n: int = 20_000) -> PointCloud:
    """Points of a box with sharp edges, 1.2 x 0.8 x 0.6."""
    rng, half = np.random.default_rng(0), np.array([0.6, 0.4, 0.3])
    areas = half.prod() / half
    axis = rng.choice(3, size=n, p=areas / areas.sum())
    normals = np.eye(3)[axis] * rng.choice([-1.0, 1.0], n)[:, None]
    points = np.where(normals != 0, normals * half, rng.uniform(-1, 1, (n, 3)) * half)
    return PointCloud(points=points, normals=normals)


def percentiles(error: NDArray[np.float64], level: float) -> dict[str, float]:
    """Of errors (n,), in percent of the level."""
    share = 100 * np.abs(error) / abs(level)
    return {"p50": float(np.median(share)), "p99": float(np.percentile(share, 99)), "max": float(share.max())}


def error(
    field: SignedDistanceField, surface: TriangleMesh, points: NDArray[np.float64], level: float
) -> dict[str, float]:
    """How far `points` (n, 3) are from being |level| off the surface, and how many are nearer to a part without points.

    Such parts of phi = 0, sheets and bubbles, are dropped from every mesh; they have no offsets.
    """
    found = field.closest(points)
    near = closest_on_mesh(found.points, surface).distance < 0.02 * abs(level)
    return percentiles(np.abs(found.distances[near]) - abs(level), level) | {"elsewhere": float(1 - near.mean())}


def measured(
    field: SignedDistanceField, cloud: PointCloud, plain: TriangleMesh, plain_s: float, share: float
) -> dict[str, Any]:
    """One offset of the field, whose surface is `plain`."""
    level = share * float(np.linalg.norm(np.ptp(cloud.points, axis=0)))
    row: dict[str, Any] = {"share": share, "level": level}
    start = time.process_time()
    try:
        meshed = mesh_field(field, cloud, MeshConfig(level_world=level))
    except NoSurfaceError as refusal:
        return row | {"refused": str(refusal)}
    seconds = time.process_time() - start
    report, rng = meshed.report["mesh"], np.random.default_rng(1)
    on_faces, _ = sample_surface(meshed.mesh, SAMPLES, rng)
    vertices = meshed.mesh.vertices[rng.integers(len(meshed.mesh.vertices), size=SAMPLES)]
    x = field.closest(cloud.points[rng.integers(len(cloud.points), size=SAMPLES)]).points
    normals = field.gradient(x)
    curvature = field.curvature(x)
    spread = np.sqrt(np.maximum(curvature.mean**2 - curvature.gaussian, 0))
    # A radius r of the surface is r + level in the offset, with the sign of its curvature 1 / r.
    growth = np.stack([1 + level * (curvature.mean + side * spread) for side in (-1, 1)])
    bent = np.abs(np.stack([curvature.mean - spread, curvature.mean + spread]) / growth).max(axis=0)
    voxel = 2 / report["resolution"] / field.frame.scale
    beyond = level + np.copysign(2 * voxel, level)
    moved = x + beyond * normals / np.linalg.norm(normals, axis=1, keepdims=True)
    own = np.abs(field.distance(moved)) > 0.999 * abs(beyond)
    regular = own & (growth > 0).all(axis=0) & (bent < 1 / (2 * voxel))
    raw = None
    with suppress(NoSurfaceError):
        surface = extract(field, resolution=64, level=level * field.frame.scale)
        some = rng.integers(len(surface.vertices_unit), size=SAMPLES)
        raw = error(field, plain, field.frame.to_world(surface.vertices_unit[some]), level)
    to_offset = closest_on_mesh(x[regular], meshed.mesh).distance - abs(level)
    return row | {
        "vertices": error(field, plain, vertices, level),
        "faces": error(field, plain, on_faces, level),
        "regular": float(regular.mean()),
        "to_offset": percentiles(to_offset, level) if regular.any() else None,
        "raw": raw,
        "told": report["offset"]["levels"][0]["error"],
        "resolution": report["resolution"],
        "watertight": report["watertight"],
        "seconds": seconds,
        "times_plain": seconds / plain_s,
    }


def main() -> int:
    """Fit, offset, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="draft")
    parser.add_argument("--clouds", default="knot,ring,box", help="which of knot, ring and box")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clouds = {"knot": lambda: read_cloud(DATA / "knot.ply"), "ring": ring, "box": box}
    rows = []
    print("| cloud | level, % | vertices: p99, max | faces: p99, max | to it: p99, max | raw: p50, max | times plain |")
    print("|---" * 7 + "|")
    for name in args.clouds.split(","):
        fitted = fit_field(clouds[name](), preset=args.preset, device="cpu")
        start = time.process_time()
        plain = mesh_field(fitted.field, fitted.cloud, MeshConfig()).mesh
        plain_s = time.process_time() - start
        for share in SHARES:
            row = {"cloud": name} | measured(fitted.field, fitted.cloud, plain, plain_s, share)
            rows.append(row)
            print(line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"preset": args.preset, "rows": rows}, indent=1) + "\n")
    return 0


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"| {row['cloud']} | {100 * row['share']:+.0f}"
    if "refused" in row:
        return f"{start} | {row['refused']} | | | | |"
    pairs = [(row["vertices"], "p99"), (row["faces"], "p99"), (row["to_offset"], "p99"), (row["raw"], "p50")]
    shown = [f"{found[key]:.2f}, {found['max']:.2f}" if found else "none" for found, key in pairs]
    return f"{start} | {' | '.join(shown)} | {row['times_plain']:.1f} |"


if __name__ == "__main__":
    sys.exit(main())
