#!/usr/bin/env python3
"""What it costs to show a surface while it forms: the share of a fit's seconds that goes into its previews.

    python benchmarks/previews.py [CLOUD] [--presets draft,standard]

Does what a worker's child does with each fit, writing included, and times it within the fit. The bar is 3%.
"""

import argparse
import tempfile
import time
from pathlib import Path

from sdfserver.config import PRESETS
from sdfserver.field import SignedDistanceField
from sdfserver.fit import FitProgress
from sdfserver.io import read_cloud
from sdfserver.reconstruct import fit_field
from sdfserver.server.child import Forming

KNOT = Path(__file__).resolve().parent.parent / "data" / "knot.ply"


def share_of(cloud: Path, preset: str, folder: Path) -> tuple[int, float, float]:
    """How many previews there were, their seconds, and the fit's."""
    spent, count = 0.0, 0

    def told(number: int) -> None:
        nonlocal count
        count = number

    def show(progress: FitProgress, field: SignedDistanceField) -> None:
        nonlocal spent
        start = time.perf_counter()
        forming.show(progress, field)
        spent += time.perf_counter() - start

    forming = Forming(folder, told)
    report = fit_field(read_cloud(cloud), preset=preset, on_cloud=forming.begin, on_field=show).report
    return count, spent, report["seconds"]["fit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", nargs="?", type=Path, default=KNOT)
    parser.add_argument("--presets", default="draft,standard")
    asked = parser.parse_args()
    print("| preset | steps | previews | seconds of them | of the fit | share |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for preset in asked.presets.split(","):
            count, spent, fit = share_of(asked.cloud, preset, Path(folder))
            steps = PRESETS[preset].fit.steps
            print(f"| {preset} | {steps} | {count} | {spent:.2f} | {fit:.1f} | {spent / fit:.1%} |", flush=True)


if __name__ == "__main__":
    main()
