#!/usr/bin/env python3
"""A picture of our surface beside screened Poisson's of the same cloud.

    python benchmarks/beside.py CLOUD MESH -o PICTURE.png [--depth 10]

Needs Open3D.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw
from poisson import poisson

from sdfserver.io import read_cloud, read_mesh
from sdfserver.preview import picture

PX = 640


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", type=Path)
    parser.add_argument("mesh", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=10)
    asked = parser.parse_args()
    cloud = read_cloud(asked.cloud)
    ours, theirs = read_mesh(asked.mesh), poisson(cloud, asked.depth)
    titled = {"sdfserver": ours, f"screened Poisson, depth {asked.depth}": theirs}
    views = list(titled.items())
    images = [Image.fromarray(picture(mesh, PX)) for _, mesh in views]
    size = images[0].width
    sheet = Image.new("RGB", (len(views) * size, size + 20), "white")
    for i, ((name, _), image) in enumerate(zip(views, images, strict=True)):
        sheet.paste(image, (i * size, 20), image)
        ImageDraw.Draw(sheet).text((i * size + 8, 4), name, fill="black")
    sheet.save(asked.output, optimize=True)


if __name__ == "__main__":
    main()
