#!/usr/bin/env python3
"""A picture of error against seconds, from what `sdfserver bench --reference --beside --json` wrote.

    python benchmarks/curve.py FIGURES.json [FIGURES.json ...] -o PICTURE.png

Each program is a point, at the median of its runs; those whose names begin alike, but for a number, are joined. `paper`
is drawn from the runs in one process, with the seconds that it was given. Needs Matplotlib.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

OURS = "sdfserver"


def points(figures: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """By the name of a curve: labels, seconds and mean distances of its points, by rising seconds."""
    found: dict[str, list[tuple[str, float, float]]] = {}
    names = dict.fromkeys(command["name"] for command in figures["commands"])
    ours = {run["preset"] for run in figures["runs"]}
    for name in names:
        rows = [command for command in figures["commands"] if command["name"] == name]
        seconds = statistics.median(row["seconds"] for row in rows)
        curve = OURS if name in ours else re.sub(r"\s\d+$", "", name)
        found.setdefault(curve, []).append((name, seconds, rows[0]["distances"]["chamfer"]))
    for run in figures["runs"]:
        if run["preset"] == "paper":
            label = f"{run['steps']} steps"
            found.setdefault("paper", []).append((label, run["seconds"], run["distances"]["chamfer"]))
    return {name: sorted(rows, key=lambda row: row[1]) for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    sheet, axes = plt.subplots(1, len(args.figures), figsize=(5 * len(args.figures), 4), squeeze=False)
    for axis, path in zip(axes[0], args.figures, strict=True):
        figures = json.loads(path.read_text())
        for name, rows in points(figures).items():
            labels, seconds, errors = zip(*rows, strict=True)
            axis.plot(seconds, errors, "o-", label=name, linewidth=2.5 if name == OURS else 1)
            for i, (label, x, y) in enumerate(zip(labels, seconds, errors, strict=True)):
                offset = (4, 4 if i % 2 else -10)
                axis.annotate(label, (x, y), xytext=offset, textcoords="offset points", fontsize=7)
        axis.set(xscale="log", title=figures["runs"][0]["cloud"], xlabel="seconds from file to mesh")
        axis.set_xlim(right=2.5 * axis.get_xlim()[1])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(visible=True, which="both", alpha=0.25)
    axes[0][0].set_ylabel("mean distance to and from the reference")
    axes[0][0].legend()
    sheet.tight_layout()
    sheet.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
