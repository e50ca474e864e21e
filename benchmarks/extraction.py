#!/usr/bin/env python3
"""Our extraction in turn with another script's, on the same field: seconds, evaluations a vertex, peak memory.

    python benchmarks/extraction.py FIELD [--other SCRIPT.py] [--resolutions 256,512,1024] [--json FILE]

FIELD is what `sdfserver reconstruct --field` writes. SCRIPT.py has extract(field, resolution) -> (vertices, faces) for
a field that takes points (n, 3) and gives values (n,). Each runs as a process of its own, so that memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts import loaded
from torch import Tensor

from sdfserver.extract import extract
from sdfserver.field import SignedDistanceField


def one(field: Path, resolution: int, other: Path | None) -> dict[str, Any]:
    """The figures of one extraction, in this process."""
    sdf = SignedDistanceField.load(field)
    start = time.perf_counter()
    if other is None:
        surface = extract(sdf, resolution=resolution)
        vertices = len(surface.vertices_unit)
        values, gradients = surface.evaluations, surface.gradient_evaluations
    else:
        module = loaded(other)
        values = gradients = 0

        def counted(x: Tensor) -> Tensor:
            nonlocal values
            values += len(x)
            return sdf.value(x)

        start = time.perf_counter()
        vertices = len(module.extract(counted, resolution)[0])
    return {
        "resolution": resolution,
        "who": "ours" if other is None else other.stem,
        "seconds": time.perf_counter() - start,
        "vertices": vertices,
        "values_per_vertex": values / vertices,
        "gradients_per_vertex": gradients / vertices,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("field", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--resolutions", default="256,512,1024")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help="print the figures of one extraction as JSON")
    args = parser.parse_args()
    resolutions = [int(text) for text in args.resolutions.split(",")]
    if args.one:
        print(json.dumps(one(args.field, resolutions[0], args.other)))
        return 0
    rows = []
    print("| resolution | who | seconds | vertices | values, gradients a vertex | peak GB |\n" + "|---" * 6 + "|")
    for resolution in resolutions:
        for other in [None, *([args.other] if args.other else [])]:
            command = [sys.executable, __file__, str(args.field), "--one", "--resolutions", str(resolution)]
            done = subprocess.run(
                [*command, *(["--other", str(other)] if other else [])], check=True, capture_output=True, text=True
            )
            row = json.loads(done.stdout)
            rows.append(row)
            print(
                f"| {resolution} | {row['who']} | {row['seconds']:.2f} | {row['vertices']:,} | "
                f"{row['values_per_vertex']:.2f}, {row['gradients_per_vertex']:.2f} | {row['peak_gb']:.2f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
