#!/usr/bin/env python3
"""A picture of our surface beside screened Poisson's of the same cloud, and of a part of both from nearby.

    python benchmarks/beside.py CLOUD MESH -o PICTURE.png [--depth 10] [--around X,Y,Z,R]

The part is what lies within R of a point, as shares of the box: 0.5,0.5,0.8,0.2 is around the top's middle. Needs
Open3D.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdfserver.cloud import PointCloud
from sdfserver.io import read_cloud, read_mesh
from sdfserver.mesh import TriangleMesh, keep_faces, vertex_normals
from sdfserver.preview import picture

PX = 420


def poisson(cloud: PointCloud, depth: int) -> TriangleMesh:
    """Open3D's screened Poisson reconstruction."""
    import open3d as o3d

    points = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(cloud.points))
    points.normals = o3d.utility.Vector3dVector(cloud.normals)
    mesh, _ = o3d.geometry.TriangleMesh.create_from_point_cloud_poisson(points, depth=depth)
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.triangles).astype(np.int64)
    return TriangleMesh(vertices=vertices, faces=faces, normals=vertex_normals(vertices, faces))


def part(mesh: TriangleMesh, cloud: PointCloud, around: tuple[float, ...]) -> TriangleMesh:
    """What of `mesh` lies within a ball, given by shares of the cloud's box."""
    low, extent = cloud.points.min(axis=0), np.ptp(cloud.points, axis=0)
    middle, radius = low + np.array(around[:3]) * extent, around[3] * extent.max()
    near = np.linalg.norm(mesh.vertices - middle, axis=1) < radius
    return keep_faces(mesh, near[mesh.faces].all(axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", type=Path)
    parser.add_argument("mesh", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--around", type=lambda text: tuple(map(float, text.split(","))), default=(0.5, 0.5, 0.8, 0.25))
    asked = parser.parse_args()
    cloud = read_cloud(asked.cloud)
    ours, theirs = read_mesh(asked.mesh), poisson(cloud, asked.depth)
    titled = {"sdfserver": ours, f"screened Poisson, depth {asked.depth}": theirs}
    views = list(titled.items())
    views += [(f"{name}: a part", part(mesh, cloud, asked.around)) for name, mesh in titled.items()]
    images = [Image.fromarray(picture(mesh, PX)) for _, mesh in views]
    size = images[0].width
    sheet = Image.new("RGB", (len(views) * size, size + 20), "white")
    for i, ((name, _), image) in enumerate(zip(views, images, strict=True)):
        sheet.paste(image, (i * size, 20), image)
        ImageDraw.Draw(sheet).text((i * size + 8, 4), name, fill="black")
    sheet.save(asked.output, optimize=True)


if __name__ == "__main__":
    main()
