"""Seconds and peak memory of reading large, sound files: python benchmarks/reading.py --points 400000

Each file is read in a process of its own; memory is what was resident at most beyond what was before, and is compared
with the file's size and with that of the cloud as float64.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cloud_files import binary_ply, e57_of, npy, npz, ply_header, vertex

from sdfserver.io import write_mesh
from sdfserver.mesh import TriangleMesh

_READ = """
import json, os, sys, time
import laspy, lazrs, pye57
from sdfserver.io import read_cloud
def kib(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")
before, start = kib("VmRSS"), time.process_time()
cloud = read_cloud(sys.argv[1])
seconds = time.process_time() - start
own = cloud.points.nbytes + (0 if cloud.normals is None else cloud.normals.nbytes)
peak, size = 1024 * (kib("VmHWM") - before), os.path.getsize(sys.argv[1])
mib = 1 << 20
print(json.dumps({"file_mib": round(size / mib, 1), "cloud_mib": round(own / mib, 1), "peak_mib": round(peak / mib, 1),
                  "times_file": round(peak / size, 2), "cpu_s": round(seconds, 2)}))
"""


def files(n: int, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of files of n points, or of a surface of about as many vertices."""
    points = np.random.default_rng(0).normal(size=(n, 3))
    both = np.hstack([points, points / np.linalg.norm(points, axis=1, keepdims=True)])
    six, three = "%.6f %.6f %.6f %.6f %.6f %.6f\n", "%.4f %.4f %.4f\n"
    yield "binary.ply", binary_ply("<", "float", both)
    yield "text.ply", ply_header("ascii", *vertex("double", "x y z nx ny nz", n)) + _rows(six, both)
    yield "points.xyz", _rows(three, points)
    yield "digits.xyz", _rows("%d %d %d\n", np.abs(points))
    yield "names.csv", b"x,y,z,nx,ny,nz\n" + _rows(six.replace(" ", ","), both)
    yield "float32.npy", npy(both.astype(np.float32))
    yield "float32.npz", npz(points=points.astype(np.float32), normals=both[:, 3:].astype(np.float32))
    head = b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH %d\nHEIGHT 1\nPOINTS %d\nDATA " % (n, n)
    yield "binary.pcd", head + b"binary\n" + points.astype("<f4").tobytes()
    yield "text.pcd", head + b"ascii\n" + _rows(three, points)
    yield from _surfaces(n, folder)
    yield from _scans(points, folder)


def _rows(row: str, table: np.ndarray) -> bytes:
    return (row * len(table) % tuple(table.reshape(-1).tolist())).encode()


def _surfaces(n: int, folder: Path) -> Iterator[tuple[str, bytes]]:
    side = int(n**0.5)
    i, j = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    vertices = np.stack([i, j, 3 * np.sin(i / 9)], axis=-1).reshape(-1, 3)
    a = (i * side + j)[:-1, :-1].reshape(-1)
    faces = np.concatenate([np.stack([a, a + side, a + 1], 1), np.stack([a + 1, a + side, a + side + 1], 1)])
    for name, normals in (("faces.ply", False), ("faces.off", False), ("faces.stl", False), ("faces.obj", False),
                          ("normals.obj", True)):  # fmt: skip
        directions = np.ones_like(vertices, dtype=np.float32) if normals else None
        write_mesh(TriangleMesh(vertices=vertices, faces=faces, normals=directions), folder / name)
        yield name, (folder / name).read_bytes()
    listed = [*vertex("float", "x y z", len(vertices)), f"element face {len(faces)}"]
    listed.append("property list uchar int vertex_indices")
    yield (
        "textfaces.ply",
        ply_header("ascii", *listed) + _rows("%.6g %.6g %.6g\n", vertices) + _rows("3 %d %d %d\n", faces),
    )
    uneven = b"".join(
        struct.pack("<B4i", 4, *row, row[0]) if k % 2 else struct.pack("<B3i", 3, *row)
        for k, row in enumerate(faces.tolist())
    )
    yield "uneven.ply", ply_header("binary_little_endian", *listed) + vertices.astype("<f4").tobytes() + uneven


def _scans(points: np.ndarray, folder: Path) -> Iterator[tuple[str, bytes]]:
    import laspy
    import pye57

    for name in ("points.las", "points.laz"):
        las = laspy.LasData(laspy.LasHeader(point_format=3, version="1.2"))
        las.header.scales = [1e-3] * 3
        las.x, las.y, las.z = points.T
        las.write(str(folder / name))
        yield name, (folder / name).read_bytes()
    layout = [
        (f"cartesian{axis}", lambda image: pye57.libe57.FloatNode(image, 0.0, pye57.libe57.E57_SINGLE), column)
        for axis, column in zip("XYZ", points.T, strict=True)
    ]
    yield "float32.e57", e57_of(folder / "whole.e57", layout, len(points))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=400_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files(options.points, Path(folder)):
            path = Path(folder) / f"read_{name}"
            path.write_bytes(data)
            fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, "-c", _READ, str(path)], env=fixed, check=True, capture_output=True, text=True
            )
            results[name] = json.loads(done.stdout)
            path.unlink()
            print(name, results[name], flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
