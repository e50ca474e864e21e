#!/usr/bin/env python3
"""Run a scoring script over several seeds and tabulate what comes back, case by case.

    python benchmarks/seeds.py --score SCORE.py --seeds 0,1,2,3,4 [--preset standard] [--jobs 2] [--json FILE]

SCORE.py takes --command, --no-poisson and --json FILE, and writes one row a case with dC (half the sum of the two mean
distances between mesh and reference), dH (the largest distance), NC (normal consistency), watertight and parts. With
--jobs 2, two seeds run side by side on one thread each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

COMMAND = "sdfserver reconstruct {{cloud}} -o {{mesh}} --preset {preset} --seed {seed} --quiet"
SPREAD = 1.5
"""The worst dH over the seeds may be this many times the median."""


def rows_of(score: Path, preset: str, seed: int, threads: int | None, only: str) -> list[dict[str, Any]]:
    """The rows that one seed scores."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = COMMAND.format(preset=preset, seed=seed)
        options = ["--no-poisson", "--json", str(out), "--only", only]
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        subprocess.run([sys.executable, str(score), "--command", command, *options], env=environment, check=False)
        rows = json.loads(out.read_text())
    return [{**row, "seed": seed} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: a line a case."""
    lines = [
        "| case | dC median (worst) | dH median (worst) | NC median | watertight, one part | fits |",
        "|" + "---|" * 6,
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        done = [row for row in rows if row["case"] == case and "dC" in row]
        tried = sum(row["case"] == case for row in rows)
        if not done:
            lines.append(f"| {case} | failed | | | | 0 of {tried} |")
            continue
        dc, dh, nc = ([row[key] for row in done] for key in ("dC", "dH", "NC"))
        whole = sum(row["watertight"] and row["parts"] == 1 for row in done)
        mark = "" if max(dh) <= SPREAD * statistics.median(dh) else " **wide**"
        shown_dh = f"{statistics.median(dh):.3f} ({max(dh):.3f}){mark}"
        lines.append(
            f"| {case} | {statistics.median(dc):.4f} ({max(dc):.4f}) | {shown_dh} | "
            f"{statistics.median(nc):.4f} | {whole} of {len(done)} | {len(done)} of {tried} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    threads = 1 if args.jobs > 1 else None
    with ThreadPoolExecutor(args.jobs) as pool:
        per_seed = pool.map(lambda seed: rows_of(args.score, args.preset, seed, threads, args.only), seeds)
        rows = [row for rows in per_seed for row in rows]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return 0 if all("dC" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
