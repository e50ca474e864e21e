#!/usr/bin/env python3
"""Open3D's screened Poisson reconstruction as a command, to run beside ours.

python benchmarks/poisson.py CLOUD -o MESH.ply [--depth 9]
"""

import argparse
from pathlib import Path

import numpy as np

from sdfserver.cloud import PointCloud
from sdfserver.io import read_cloud, write_mesh
from sdfserver.mesh import TriangleMesh, vertex_normals


def poisson(cloud: PointCloud, depth: int) -> TriangleMesh:
    """The surface of an oriented cloud by an octree of `depth` levels."""
    import open3d as o3d

    points = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(cloud.points))
    points.normals = o3d.utility.Vector3dVector(cloud.normals)
    mesh, _ = o3d.geometry.TriangleMesh.create_from_point_cloud_poisson(points, depth=depth)
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.triangles).astype(np.int64)
    return TriangleMesh(vertices=vertices, faces=faces, normals=vertex_normals(vertices, faces))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=9)
    asked = parser.parse_args()
    write_mesh(poisson(read_cloud(asked.cloud), asked.depth), asked.output)


if __name__ == "__main__":
    main()
