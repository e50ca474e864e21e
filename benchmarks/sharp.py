#!/usr/bin/env python3
"""Creases: the mesh as it is, with `sharp`, and screened Poisson's, on parts with edges and on shapes without.

    python benchmarks/sharp.py --score ../shared/eval/score.py [--only NAME,NAME] [--keep FOLDER] [--json FILE]
        [--picture FILE.png]

Creases are the reference's edges whose faces turn by more than 30 degrees. Normals: the mean angle between the normals
of mesh and reference, both ways, within 0.25% and 1% of the diagonal of a crease. Crease: the mean distance from points
along creases to the mesh. dC, NC: as in compare_meshes, all over. Distances are in percent of the diagonal. Folds:
edges across which faces turn by more than 150 degrees. Needles: share of faces with less than a twentieth of the area
of an even one with such edges. Seconds: of processors, for all that comes after the fit but for measuring. Poisson is
Open3D's, at the best of depths 8, 9 and 10. `--keep` holds the fields, which then need not be fitted again.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from poisson import poisson
from scipy.spatial import cKDTree
from scripts import loaded

from sdfserver.cloud import PointCloud
from sdfserver.config import MeshConfig
from sdfserver.field import SignedDistanceField
from sdfserver.mesh import TriangleMesh, face_normals
from sdfserver.metrics import closest_on_mesh, compare_meshes, crease_points, mesh_health, sample_surface
from sdfserver.reconstruct import fit_field, mesh_field

BANDS = 0.0025, 0.01
SAMPLES = 60_000
CASES = "fandisk_50k", "fixed_top_100k", "srb_daratech"
NOISY = {"name": "fandisk_noise", "sample": "meshes/fandisk.obj", "points": 50_000, "noise": 0.001, "normal_noise": 0.1}
"""0.1% of the diagonal, and 8 degrees on the normals."""
PX, TITLE = 360, 18
VIEW = np.array([-1.0, 1.3, 1.2])


def prism(outline: NDArray[np.float64]) -> TriangleMesh:
    """The outline (n, 2), counter-clockwise and convex, from z = -0.5 to 0.5."""
    n = len(outline)
    vertices = np.concatenate([np.c_[outline, np.full(n, z)] for z in (-0.5, 0.5)])
    i, j = np.arange(n), (np.arange(n) + 1) % n
    walls = np.concatenate([np.c_[i, j, j + n], np.c_[i, j + n, i + n]])
    fan = np.c_[np.zeros(n - 2, int), np.arange(1, n - 1), np.arange(2, n)]
    return TriangleMesh(vertices=vertices, faces=np.concatenate([walls, fan[:, ::-1], fan + n]))


def shapes() -> dict[str, TriangleMesh]:
    """A cube, and a bar of which two faces meet at 30 degrees."""
    slope = math.tan(math.radians(15))
    return {
        "cube": prism(np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])),
        "wedge": prism(np.array([[0.6, 0.0], [-0.6, 1.2 * slope], [-0.6, -1.2 * slope]])),
    }


def clouds(score: Path, wanted: list[str]) -> Iterator[tuple[str, PointCloud, TriangleMesh]]:
    """Name, cloud and reference of each case."""
    script = loaded(score)
    cases = {case["name"]: case for case in json.loads((score.parent / "cases_dev.json").read_text())["cases"]}
    made = shapes()
    for name in wanted:
        if name in made:
            points, normals = sample_surface(made[name], 20_000, np.random.default_rng(0))
            yield name, PointCloud(points=points, normals=normals), made[name]
            continue
        points, normals, mesh = script.load_case(
            NOISY if name == NOISY["name"] else cases[name], score.parents[1] / "data"
        )
        cloud = PointCloud(points=np.asarray(points, np.float64), normals=np.asarray(normals, np.float64))
        yield name, cloud, TriangleMesh(vertices=np.asarray(mesh.vertices), faces=np.asarray(mesh.faces, np.int64))


def errors(mesh: TriangleMesh, reference: TriangleMesh) -> dict[str, Any]:
    """What is to be told of a mesh."""
    diagonal = float(np.linalg.norm(np.ptp(reference.vertices, axis=0)))
    creases = crease_points(reference)
    near, rng = cKDTree(creases), np.random.default_rng(0)
    angles: dict[float, list[float]] = {band: [] for band in BANDS}
    for one, other in ((mesh, reference), (reference, mesh)):
        points, normals = sample_surface(one, 2 * SAMPLES, rng)
        distance, _ = near.query(points)
        beside = distance < max(BANDS) * diagonal
        distance, points, normals = distance[beside], points[beside], normals[beside]
        there = unit(face_normals(other.vertices, other.faces)[closest_on_mesh(points, other).face])
        turn = np.degrees(np.arccos((there * normals).sum(axis=1).clip(-1, 1)))
        for band in BANDS:
            angles[band].append(float(turn[distance < band * diagonal].mean()))
    away = closest_on_mesh(creases, mesh).distance * 100 / diagonal
    whole, health = compare_meshes(mesh, reference, samples=SAMPLES), mesh_health(mesh)
    return {
        **{f"normals_{band:.2%}": sum(found) / 2 for band, found in angles.items()},
        "crease": float(away.mean()),
        "crease_95": float(np.quantile(away, 0.95)),
        "dC": whole.chamfer * 100 / diagonal,
        "dH": whole.hausdorff * 100 / diagonal,
        "NC": whole.normal_consistency,
        "watertight": health.watertight,
        "non_manifold_edges": health.non_manifold_edges,
        "genus": health.genus,
        "faces": health.faces,
        **shape_of_faces(mesh),
    }


def shape_of_faces(mesh: TriangleMesh) -> dict[str, Any]:
    """How many edges are folded, and how many faces needles."""
    area = face_normals(mesh.vertices, mesh.faces)
    sides = np.linalg.norm(mesh.vertices[np.roll(mesh.faces, -1, axis=1)] - mesh.vertices[mesh.faces], axis=2)
    even = 2 * math.sqrt(3) * np.linalg.norm(area, axis=1) / np.maximum((sides**2).sum(axis=1), 1e-300)
    halves = np.sort(np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]]), axis=1)
    order = np.lexsort(halves.T)
    halves, face = halves[order], np.tile(np.arange(len(mesh.faces)), 3)[order]
    pair = np.flatnonzero((halves[1:] == halves[:-1]).all(axis=1))
    normals = unit(area)
    folded = (normals[face[pair]] * normals[face[pair + 1]]).sum(axis=1) < math.cos(math.radians(150))
    return {"folds": int(folded.sum()), "needles": float((even < 0.05).mean())}


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors (n, 3) at length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)


def fitted(name: str, cloud: PointCloud, keep: Path | None) -> SignedDistanceField:
    """The field of the preset `standard`, or the one kept."""
    path = None if keep is None else keep / f"{name}.safetensors"
    if path is not None and path.exists():
        return SignedDistanceField.load(path)
    field = fit_field(cloud, preset="standard", device="cpu", seed=0).field
    if path is not None:
        field.save(path)
    return field


def ours(field: SignedDistanceField, cloud: PointCloud, sharp: bool) -> tuple[TriangleMesh, dict[str, Any]]:
    """A mesh of the field, and what it took."""
    start = time.process_time()
    made = mesh_field(field, cloud, MeshConfig(sharp=sharp))
    spent = time.process_time() - start
    share = made.report["seconds"]["mesh"] / sum(made.report["seconds"].values())
    return made.mesh, {"seconds": spent * share, "sharp": made.report["mesh"]["sharp"]}


def best_poisson(cloud: PointCloud, reference: TriangleMesh) -> tuple[TriangleMesh, dict[str, Any]]:
    """The one of depths 8, 9 and 10 that is nearest to the reference."""
    found = [(poisson(cloud, depth), depth) for depth in (8, 9, 10)]
    mesh, depth = min(found, key=lambda one: compare_meshes(one[0], reference, samples=50_000).chamfer)
    return mesh, {"depth": depth}


def closeup(mesh: TriangleMesh, at: NDArray[np.float64], width: float) -> Image.Image:
    """The mesh around a place, `width` across, each face in one shade."""
    import open3d as o3d

    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32))
    eye = VIEW / np.linalg.norm(VIEW)
    right = unit(np.cross([[0.0, 0.0, 1.0]], eye))[0]
    across = (np.arange(2 * PX) + 0.5) / PX - 1
    x, y = np.meshgrid(across, -across)
    start = at + width / 2 * (x[..., None] * right + y[..., None] * np.cross(eye, right)) + 20 * width * eye
    rays = np.concatenate([start, np.broadcast_to(-eye, start.shape)], axis=-1).astype(np.float32)
    hit = scene.cast_rays(o3d.core.Tensor(rays))
    normals = hit["primitive_normals"].numpy()
    light = unit(np.array([[-0.2, 0.9, 0.5]]))[0]
    shade = np.where(np.isfinite(hit["t_hit"].numpy()), 60 + 180 * (0.5 + 0.5 * normals @ light), 255)
    return Image.fromarray(shade.clip(0, 255).astype(np.uint8)).resize((PX, PX), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", type=Path, required=True)
    parser.add_argument("--only", default=",".join((*CASES, NOISY["name"], *shapes())))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="three close-ups of the first case")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print("| cloud | by | normals 0.25% | 1% | crease | dC | NC | folds | needles | seconds |\n|" + "---|" * 10)
    for name, cloud, reference in clouds(asked.score, asked.only.split(",")):
        field = fitted(name, cloud, asked.keep)
        meshes = {
            "today": ours(field, cloud, False),
            "sharp": ours(field, cloud, True),
            "Poisson": best_poisson(cloud, reference),
        }
        for who, (mesh, told) in meshes.items():
            row = {"cloud": name, "by": who, **errors(mesh, reference), **told}
            rows.append(row)
            narrow, wide = (row[f"normals_{band:.2%}"] for band in BANDS)
            print(
                f"| {name} | {who} | {narrow:.2f} | {wide:.2f} | {row['crease']:.4f} | {row['dC']:.4f} "
                f"| {row['NC']:.4f} | {row['folds']} | {row['needles']:.2%} | {row.get('seconds', math.nan):.1f} |",
                flush=True,
            )
            if asked.json:
                asked.json.write_text(json.dumps(rows, indent=1) + "\n")
        if asked.picture and len(rows) == len(meshes):
            draw(meshes, reference, asked.picture)


def draw(meshes: dict[str, tuple[TriangleMesh, dict[str, Any]]], reference: TriangleMesh, path: Path) -> None:
    """Each of the meshes from near, where a corner of the reference faces the viewer most."""
    low, high = reference.vertices.min(axis=0), reference.vertices.max(axis=0)
    creases = crease_points(reference)
    at = creases[((creases - (low + high) / 2) @ VIEW).argmax()]
    sheet = Image.new("L", (PX * len(meshes), PX + TITLE), "white")
    for column, (who, (mesh, _)) in enumerate(meshes.items()):
        sheet.paste(closeup(mesh, at, 0.08 * float(np.linalg.norm(high - low))), (column * PX, TITLE))
        ImageDraw.Draw(sheet).text((column * PX + 6, 3), who, fill="black")
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main()
