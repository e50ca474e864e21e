#!/usr/bin/env python3
"""Clouds that are legal and hard: what becomes of each, beside screened Poisson.

    python benchmarks/hard_clouds.py [--presets draft,standard] [--only NAME,NAME] [--json FILE] [--picture FILE.png]

The clouds are those of tests/hard_shapes.py, whose true surface is known. dC: half the sum of the two mean distances
between mesh and truth. dH: the largest distance. Both in percent of the truth's diagonal. Normals: the angle whose
cosine is the mean of that between the normals of mesh and truth, in degrees; 180 is inside out. Seconds: of processors,
which other work disturbs less than the clock's. Poisson is Open3D's at depth 8; it needs Open3D.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from poisson import poisson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hard_shapes import HARD, HardCloud

from sdfserver.errors import SdfServerError
from sdfserver.mesh import TriangleMesh, keep_faces
from sdfserver.metrics import compare_meshes, mesh_health
from sdfserver.preview import picture
from sdfserver.reconstruct import reconstruct

PX, TITLE, PER_ROW = 200, 16, 8
CUT_OPEN = ("sphere_inward", "shell", "nested_outward", "room", "open_room")
"""What is inside of these shows when their nearer half is taken away."""


def row_of(hard: HardCloud, make: Callable[[], tuple[TriangleMesh, dict[str, Any]]]) -> tuple[dict[str, Any], Any]:
    """What is to be told of a reconstruction, and its mesh, or what it was refused with, and None."""
    start = time.process_time()
    try:
        mesh, report = make()
    except SdfServerError as error:
        return {"refused": f"{type(error).__name__}: {error}", "seconds": time.process_time() - start}, None
    seconds = time.process_time() - start
    health, far = mesh_health(mesh), compare_meshes(mesh, hard.reference, samples=30_000)
    percent = 100 / float(np.linalg.norm(np.ptp(hard.reference.vertices, axis=0)))
    row = {
        "watertight": health.watertight,
        "non_manifold_edges": health.non_manifold_edges,
        "parts": health.components,
        "genus": health.genus,
        "volume": health.volume,
        "dC": far.chamfer * percent,
        "acc": far.accuracy * percent,
        "comp": far.completeness * percent,
        "dH": far.hausdorff * percent,
        "normals": math.degrees(math.acos(min(1.0, far.normal_consistency))) if hard.sided else None,
        "seconds": seconds,
        "true_parts": hard.parts,
        "true_genus": hard.genus,
        "true_closed": hard.closed,
        **report,
    }
    return row, mesh


def ours(hard: HardCloud, preset: str) -> tuple[TriangleMesh, dict[str, Any]]:
    """Our mesh, and what the report says of it and the cloud."""
    made = reconstruct(hard.cloud, preset=preset, device="cpu", seed=0)
    report = made.report
    return made.mesh, {
        "restarts": len(report["fit"]["restarts"]),
        "trusted_share": report["fit"]["trusted_share"],
        "assumptions": report.get("assumptions"),
        "warnings": report.get("warnings"),
    }


def line(name: str, who: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    if "refused" in row:
        return f"| {name} | {who} | refused: {row['refused']} |" + " |" * 6
    normals = "" if row["normals"] is None else f"{row['normals']:.1f}"
    closed = "yes" if row["watertight"] else "no"
    return (
        f"| {name} | {who} | {closed} | {row['parts']} ({row['true_parts']}) | {row['genus']} ({row['true_genus']}) "
        f"| {row['dC']:.3f} | {row['dH']:.2f} | {normals} | {row['seconds']:.1f} |"
    )


def shown(mesh: TriangleMesh | None, name: str) -> Image.Image:
    """A picture of the mesh, or of nothing."""
    image = Image.new("RGB", (PX, PX), "white")
    if mesh is not None:
        if name in CUT_OPEN:
            centers = mesh.vertices[mesh.faces].mean(axis=1)
            low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
            mesh = keep_faces(mesh, centers[:, 1] > (low + high)[1] / 2)
        rendered = Image.fromarray(picture(mesh, PX))
        image.paste(rendered, (0, 0), rendered)
    return image


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="draft,standard")
    parser.add_argument("--only", default=",".join(HARD))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--no-poisson", action="store_true")
    asked = parser.parse_args()
    presets, names = [name for name in asked.presets.split(",") if name], asked.only.split(",")
    whos = [*presets, *([] if asked.no_poisson else ["Poisson"])]
    rows: list[dict[str, Any]] = []
    rows_of_names = -(-len(names) // PER_ROW)
    size = PX * min(len(names), PER_ROW), (PX + TITLE) * len(whos) * rows_of_names
    sheet = Image.new("RGB", size, "white")
    print("| cloud | by | closed | parts (truth) | genus (truth) | dC | dH | normals | seconds |\n|" + "---|" * 9)
    for column, name in enumerate(names):
        hard = HARD[name]()
        for at, who in enumerate(whos):
            make = (lambda: (poisson(hard.cloud, 8), {})) if who == "Poisson" else (lambda who=who: ours(hard, who))  # noqa: B023
            row, mesh = row_of(hard, make)
            rows.append({"cloud": name, "by": who, **row})
            print(line(name, who, row), flush=True)
            for warning in row.get("warnings") or ():
                print(f"    {warning}", flush=True)
            left, top = column % PER_ROW * PX, (column // PER_ROW * len(whos) + at) * (PX + TITLE)
            sheet.paste(shown(mesh, name), (left, top + TITLE))
            ImageDraw.Draw(sheet).text((left + 6, top + 2), f"{name}: {who}", fill="black")
            if asked.json:
                asked.json.write_text(json.dumps(rows, indent=1) + "\n")
            if asked.picture:
                sheet.save(asked.picture, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
