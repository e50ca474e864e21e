#!/usr/bin/env python3
"""Time two whole commands in turn on the same clouds, and print the ratio of each pair.

    python benchmarks/versus.py CLOUD [CLOUD ...] --other 'python prototype_fit.py {cloud} -o {mesh}'
                                [--ours 'sdfserver reconstruct {cloud} -o {mesh} --quiet'] [--runs 3] [--json FILE]

From the start of the process to its end: imports, reading, fit, mesh and writing. The two run A B A B, so that a ratio
holds while the machine's speed drifts; quote the ratio, not the seconds.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds(command: str, cloud: Path) -> float:
    """How long `command` takes on `cloud`, as a process."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = shlex.split(command.format(cloud=cloud, mesh=Path(folder) / "mesh.ply"))
        start = time.perf_counter()
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clouds", type=Path, nargs="+")
    parser.add_argument("--other", required=True)
    parser.add_argument("--ours", default="sdfserver reconstruct {cloud} -o {mesh} --quiet")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print("| cloud | ours, s | other, s | ratio: median (min to max) |\n|---|---|---|---|", flush=True)
    for cloud in args.clouds:
        pairs = [(seconds(args.ours, cloud), seconds(args.other, cloud)) for _ in range(args.runs)]
        ratios = [ours / other for ours, other in pairs]
        ours, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({"cloud": cloud.stem, "pairs": pairs, "ratio": statistics.median(ratios)})
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {cloud.stem} | {ours:.1f} | {other:.1f} | {spread} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
