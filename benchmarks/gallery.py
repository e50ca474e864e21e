#!/usr/bin/env python3
"""What else a SIREN can do, each beside a ReLU network: images by values, gradients and Laplacian, fusion, Helmholtz.

    python benchmarks/gallery.py --json FIGURES.json --picture SHEET.png [--steps 800] [--seed 0]

PSNR is that of the image or of the waves, residual the relative error of what the network was asked for.
"""

import argparse
import json
from pathlib import Path

from sdfserver.compare.gallery import figures_of, gallery, problems, table_text, write_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    pieces = gallery(
        problems(), asked.steps, seed=asked.seed, on_piece=lambda piece: print(table_text([piece]).splitlines()[1])
    )
    asked.json.write_text(json.dumps(figures_of(pieces), indent=1) + "\n")
    write_sheet(pieces, asked.picture)


if __name__ == "__main__":
    main()
