#!/usr/bin/env python3
"""Clouds of open surfaces: what is left of them, beside screened Poisson as it comes and trimmed by its density.

    python benchmarks/open_surfaces.py [--preset NAME] [--data FOLDER] [--only NAME,NAME] [--json FILE] [--picture FILE]

dC: half the sum of the two mean distances between mesh and truth. dH: the largest distance. Rim: the mean distance of
the mesh's borders from those of the truth. All in percent of the truth's diagonal. Poisson is Open3D's at the best of
depths 8, 9 and 10; trimmed, its vertices of low density are removed, as people do, at the best of five shares. Both are
chosen by dC, with the truth at hand, which people do not have. FOLDER has the bust; without it, it is left out.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import hard_shapes as hard
from make import terrain
from shapes import bowl, torus

from sdfserver.cloud import PointCloud
from sdfserver.config import PRESETS, MeshConfig
from sdfserver.io import read_cloud, read_mesh
from sdfserver.mesh import TriangleMesh, keep_faces, vertex_normals
from sdfserver.metrics import border_points, compare_meshes, mesh_health
from sdfserver.preview import picture
from sdfserver.reconstruct import fit_field, mesh_field
from sdfserver.sampling import normals_of

TERRAIN = Path(__file__).resolve().parent.parent / "data" / "terrain.ply"
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True, kw_only=True)
class Open:
    """A cloud and the open surface that it is of."""

    name: str
    cloud: PointCloud
    truth: TriangleMesh


def cases(data: Path | None) -> Iterator[Open]:
    """The clouds, from plain to difficult."""
    yield Open(name="bowl", cloud=bowl(10_000), truth=_half(hard.sphere_mesh(), 2))
    whole = torus(20_000)
    keep = whole.points[:, 0] < 0
    half = PointCloud(points=whole.points[keep], normals=normals_of(whole)[keep])
    yield Open(name="half ring", cloud=half, truth=_half(hard.torus_mesh(), 0))
    for name in ("plane", "open_room", "moebius"):
        found = getattr(hard, name)()
        yield Open(name=name.replace("_", " "), cloud=found.cloud, truth=found.reference)
    x, y = np.meshgrid(np.linspace(0, 120, 600), np.linspace(0, 80, 400), indexing="ij")
    ground = hard.grid_mesh(np.stack([x, y, -terrain(x, y, np.zeros_like(x))], axis=-1))
    offset = np.array([431_200.0, 5_312_600.0, 640.0])
    yield Open(
        name="terrain",
        cloud=read_cloud(TERRAIN),
        truth=TriangleMesh(vertices=ground.vertices + offset, faces=ground.faces),
    )
    if data is not None:
        bust = read_mesh(data / "meshes" / "demosthenes-low-res.obj")
        yield Open(name="bust", cloud=_sampled(bust, 50_000, noise=0.001), truth=bust)


def _half(mesh: TriangleMesh, axis: int) -> TriangleMesh:
    return keep_faces(mesh, mesh.vertices[mesh.faces][:, :, axis].mean(axis=1) < 0)


def _sampled(mesh: TriangleMesh, n: int, *, noise: float) -> PointCloud:
    cloud, rng = hard.sampled(mesh, n, seed=7), np.random.default_rng(7)
    diagonal = float(np.linalg.norm(np.ptp(mesh.vertices, axis=0)))
    return PointCloud(points=cloud.points + noise * diagonal * rng.normal(size=(n, 3)), normals=cloud.normals)


def measured(mesh: TriangleMesh, truth: TriangleMesh) -> dict[str, Any]:
    """How far `mesh` is from the truth, in percent of the truth's diagonal."""
    percent = 100 / float(np.linalg.norm(np.ptp(truth.vertices, axis=0)))
    far, health = compare_meshes(mesh, truth, samples=50_000), mesh_health(mesh)
    rims = [border_points(mesh), border_points(truth)]
    rim = float(cKDTree(rims[1]).query(rims[0])[0].mean()) * percent if len(rims[0]) and len(rims[1]) else None
    return {
        "dC": far.chamfer * percent,
        "dH": far.hausdorff * percent,
        "NC": far.normal_consistency,
        "rim": rim,
        "parts": health.components,
        "non_manifold_edges": health.non_manifold_edges,
        "watertight": health.watertight,
    }


def poisson_meshes(cloud: PointCloud) -> tuple[list[TriangleMesh], list[TriangleMesh]]:
    """Poisson's surfaces as they come, and each without its vertices of lowest density."""
    import open3d as o3d

    points = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(cloud.points - cloud.points.mean(axis=0)))
    points.normals = o3d.utility.Vector3dVector(cloud.normals)
    plain, trimmed = [], []
    for depth in (8, 9, 10):
        made, density = o3d.geometry.TriangleMesh.create_from_point_cloud_poisson(points, depth=depth, n_threads=1)
        vertices = np.asarray(made.vertices) + cloud.points.mean(axis=0)
        faces = np.asarray(made.triangles).astype(np.int64)
        mesh = TriangleMesh(vertices=vertices, faces=faces, normals=vertex_normals(vertices, faces))
        plain.append(mesh)
        for share in SHARES:
            dense = np.asarray(density) >= np.quantile(density, share)
            trimmed.append(keep_faces(mesh, dense[faces].all(axis=1)))
    return plain, trimmed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="standard", choices=[*PRESETS])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    only = set(filter(None, asked.only.split(",")))
    rows: list[dict[str, Any]] = []
    pictures = []
    for case in cases(asked.data):
        if only and case.name not in only:
            continue
        start = time.process_time()
        fitted = fit_field(case.cloud, preset=asked.preset, device="cpu")
        meshes = {}
        for kind in ("auto", "closed"):
            made = mesh_field(fitted.field, fitted.cloud, MeshConfig(surface=kind))
            meshes[f"ours, {kind}"] = made.mesh
            if kind == "auto":
                print(f"{case.name}: {made.report['surface']['why']}; {time.process_time() - start:.0f} s", flush=True)
        plain, trimmed = poisson_meshes(case.cloud)
        found = {name: measured(mesh, case.truth) for name, mesh in meshes.items()}
        for name, several in (("Poisson", plain), ("Poisson, trimmed", trimmed)):
            scores = [measured(mesh, case.truth) for mesh in several if len(mesh.faces)]
            found[name] = min(scores, key=lambda score: score["dC"])
        for name, row in found.items():
            rows.append({"case": case.name, "who": name, **row})
            rim = "-" if row["rim"] is None else f"{row['rim']:.3f}"
            print(
                f"  {name:17s} dC {row['dC']:7.4f}  dH {row['dH']:7.3f}  NC {row['NC']:.4f}  rim {rim}  "
                f"parts {row['parts']}",
                flush=True,
            )
        pictures.append(np.concatenate([picture(mesh, 240) for mesh in meshes.values()], axis=0))
    if asked.json:
        asked.json.write_text(json.dumps({"preset": asked.preset, "rows": rows}, indent=1) + "\n")
    if asked.picture and pictures:
        sheet = Image.fromarray(np.concatenate(pictures, axis=1))
        paper = Image.new("RGBA", sheet.size, "white")
        paper.alpha_composite(sheet)
        paper.convert("RGB").quantize(64).save(asked.picture, optimize=True)


if __name__ == "__main__":
    main()
