"""The readers on files that are wrong: python tests/faults/fuzz_readers.py --format ply --inputs 200000 --json out.json

Each input is a valid file made wrong (mutations.py); its number and the seed say which, so that it can be made again.
A reader may give a valid cloud or a CloudError of one printable line, within 2 s of processor time and within
4 times the file's size plus a constant of memory. Anything else is a finding, and its input is saved:

crash     a signal ended the process
hang      2 s of processor time, or 20 s of any, were not enough
memory    more than 4 times the size plus `CONSTANT` was in use at a time: resident in the process, counted by
          tracemalloc (one input in 16, as it triples the time), or asked for beyond a limit on the address space
error     another exception than the reader documents
message   a refusal that is not one printable line of at most 500 characters
invalid   a cloud of other shapes or types than promised, or one that validate neither refuses nor makes right

--guided N lets atheris look for N inputs more, from those that reach new lines of the readers.
"""

import argparse
import contextlib
import io
import json
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a command

import cloud_files
import numpy as np
from faults.mutations import WORDS, any_bytes, mutated, text

from sdfserver.cloud import PointCloud, validate
from sdfserver.errors import CloudError
from sdfserver.io import MESH_FORMATS, read_cloud, read_mesh, stream_cloud, write_mesh
from sdfserver.mesh import TriangleMesh
from sdfserver.orientation import disagreement

ROOT = Path(__file__).parents[2]
CPU_S, WALL_S = 2.0, 20.0
MIB = 1 << 20
CONSTANT = {"npz": 256 * MIB, "laz": 256 * MIB, "e57": 256 * MIB}
"""A packed file may always expand to 64 MiB (formats.common.MAY_EXPAND), and 4 times that is then in use at most."""
CONSTANT_PLAIN = 16 * MIB
TRACED_ONE_IN = 16
VALIDATED_ONE_IN = 20
WORKER_INPUTS = 5000
"""After them a new process goes on: libE57 does not give back all of what it took for a file that it refuses."""
CLOUDS = ("ply", "text", "npy", "npz", "pcd", "obj", "off", "stl", "las", "laz", "e57")
KINDS = (*CLOUDS, *(f"mesh-{name}" for name in MESH_FORMATS))
EXTENSIONS = {"text": ("xyz", "xyzn", "pts", "txt", "asc", "csv")}


# What is made wrong


def seeds(kind: str, *, others: bool = True) -> list[bytes]:
    """Valid files of a format, by the project's own writers and, with `others`, by Open3D, which is slow to import."""
    name = kind.removeprefix("mesh-")
    extensions = EXTENSIONS.get(name, (name,))
    files = [*cloud_files.FILES.items(), *cloud_files.SURFACES.items(), *cloud_files.COLORED.items()]
    found = [data for file, data in files if file.rsplit(".")[-1] in extensions]
    with tempfile.TemporaryDirectory() as folder:
        found += _meshes(name, Path(folder))
        if name in ("las", "laz"):
            found += _las(name, Path(folder))
        if name == "e57":
            found += cloud_files.e57_files(Path(folder))
        if others and name in ("ply", "pcd", "text") and not kind.startswith("mesh"):
            found += _by_open3d(extensions, Path(folder))
    if name == "ply":
        found.append((ROOT / "data" / "sparse.ply").read_bytes())
    return found


def _meshes(name: str, folder: Path) -> list[bytes]:
    if name not in MESH_FORMATS:
        return []
    import trimesh

    vertices, faces = cloud_files.octahedron()
    found = []
    plain = TriangleMesh(vertices=vertices + 1000.5, faces=faces)
    whole = replace(
        plain,
        normals=vertices.astype(np.float32),
        colors=cloud_files.COLORS[:6],
        confidence=np.linspace(0, 1, 6, dtype=np.float32),
    )
    for mesh in (plain, replace(plain, normals=whole.normals), whole):
        path = folder / f"a.{name}"
        write_mesh(mesh, path)
        found.append(path.read_bytes())
    body = trimesh.creation.icosphere(subdivisions=1)
    options: list[dict[str, object]] = [{"encoding": "ascii"}, {}] if name == "ply" else [{}]
    for option in options:
        data = body.export(file_type=name, **option)
        found.append(data.encode() if isinstance(data, str) else data)
    if name == "stl":
        found.append(body.export(file_type="stl_ascii").encode())
    return found


def _las(name: str, folder: Path) -> list[bytes]:
    """Point formats with and without times, colours and further dimensions, in versions 1.2 and 1.4."""
    import laspy

    colors = cloud_files.COLORS.astype(np.uint16) * 256
    found = [cloud_files.las_file(folder / f"a.{name}", colors=given).read_bytes() for given in (None, colors)]
    for point_format, version in ((0, "1.2"), (3, "1.2"), (6, "1.4"), (7, "1.4"), (8, "1.4")):
        header = laspy.LasHeader(point_format=point_format, version=version)
        header.scales = [1e-3] * 3
        las = laspy.LasData(header)
        las.x, las.y, las.z = cloud_files.POINTS.T
        stream = io.BytesIO()
        las.write(stream, do_compress=name == "laz", laz_backend=laspy.LazBackend.Lazrs if name == "laz" else None)
        found.append(stream.getvalue())
    return found


def _by_open3d(extensions: tuple[str, ...], folder: Path) -> list[bytes]:
    try:
        import open3d
    except ImportError:
        return []
    body = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(cloud_files.POINTS))
    body.normals = open3d.utility.Vector3dVector(cloud_files.NORMALS)
    found = []
    for extension in extensions:
        if extension not in ("ply", "pcd", "xyz", "xyzn", "pts"):
            continue
        for options in ({}, {"write_ascii": True}, {"compressed": True}):
            path = folder / f"o.{extension}"
            open3d.io.write_point_cloud(str(path), body, **options)
            found.append(path.read_bytes())
    return found


def made(kind: str, sources: list[bytes], seed: int, number: int) -> tuple[str, bytes]:
    """The input of that number, and the extension its file gets."""
    rng = random.Random(f"{kind} {seed} {number}")  # noqa: S311 - repeatable
    extension = rng.choice(EXTENSIONS.get(kind, (kind.removeprefix("mesh-"),)))
    return extension, mutated(kind.removeprefix("mesh-"), sources, rng)


# What is looked at


class Wrong(Exception):  # noqa: N818
    """A finding: its kind, and what tells it from others."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def look(kind: str, path: Path, thoroughly: bool) -> str:
    """'cloud' or 'refused', or Wrong."""
    try:
        if kind.startswith("mesh-"):
            _check_mesh(read_mesh(path))
        else:
            cloud = read_cloud(path)
            _check_cloud(cloud)
            if thoroughly:
                _check_validated(cloud)
            if kind == "ply" and thoroughly:
                _check_streamed(cloud, path)
        return "cloud"
    except CloudError as error:
        if not str(error).isprintable() or len(str(error)) > 500:
            raise Wrong("message", f"{str(error)[:100]!r}") from None
        return "refused"
    except Wrong:
        raise
    except MemoryError as error:
        raise Wrong("memory", _signature(error)) from None
    except BaseException as error:  # noqa: BLE001 - a finding, whatever it is
        raise Wrong("error", _signature(error)) from None


def _signature(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(frame.filename).name}:{frame.name}" for frame in frames if "site-packages" not in frame.filename]
    return f"{type(error).__name__} in {ours[-1] if ours else '?'}, {frames[-1].name}: {str(error)[:80]}"


def _demand(holds: object, what: str) -> None:
    if not holds:
        raise Wrong("invalid", what)


def _check_cloud(cloud: PointCloud) -> None:
    for rows in (cloud.points, cloud.normals):
        if rows is not None:
            _demand(type(rows) is np.ndarray and rows.dtype == np.float64, f"dtype {rows.dtype}")
            _demand(rows.shape == (len(cloud.points), 3) and len(rows), f"shapes {rows.shape}, {cloud.points.shape}")
            _demand(rows.flags.c_contiguous and rows.flags.writeable, "not contiguous or not writeable")
    _check_colors(cloud.colors, cloud.points)


def _check_colors(colors: np.ndarray | None, points: np.ndarray) -> None:
    if colors is not None:
        _demand(type(colors) is np.ndarray and colors.dtype == np.uint8, f"colours of type {colors.dtype}")
        _demand(colors.shape == points.shape, f"shapes {colors.shape}, {points.shape}")


def _check_validated(cloud: PointCloud) -> None:
    """What comes out of validate is finite, with unit normals and without duplicates."""
    with np.errstate(all="raise", under="ignore"):
        good = validate(cloud)
    _demand(np.isfinite(good.points).all(), "validated points that are not finite")
    _demand(good.normals is not None, "validated without normals")
    lengths = np.linalg.norm(good.normals, axis=1)  # type: ignore[arg-type]
    _demand(np.abs(lengths - 1).max() < 1e-9, "validated normals that are not unit vectors")


def _check_streamed(cloud: PointCloud, path: Path) -> None:
    points = np.concatenate([part.points for part in stream_cloud(path, rows=25)])
    same = len(points) != len(cloud.points) or np.array_equal(points, cloud.points, equal_nan=True)
    _demand(same, "streamed points that are not the points read at once")


def _check_mesh(mesh: TriangleMesh) -> None:
    _demand(mesh.vertices.shape == (len(mesh.vertices), 3) and mesh.vertices.dtype.kind == "f", "vertices")
    _demand(mesh.faces.shape == (len(mesh.faces), 3) and mesh.faces.dtype == np.int64, "faces")
    if len(mesh.faces):
        inside = mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices)
        _demand(inside, "faces that refer to no vertex")
    _demand(mesh.normals is None or mesh.normals.shape == mesh.vertices.shape, "normals")
    _check_colors(mesh.colors, mesh.vertices)
    shares = mesh.confidence
    if shares is not None:
        _demand(shares.shape == (len(mesh.vertices),) and shares.dtype == np.float32, "confidence")
        _demand(((shares >= 0) & (shares <= 1)).all(), "confidence beyond 0 to 1")


# The process that looks, and the one that watches it


COUNTS = ("number", "clouds", "refused", "resident", "traced", "cpu_s", "bytes")


class Watch:
    """Bounds of one reader call, and what it took of them."""

    def __init__(self, kind: str) -> None:
        self._constant = CONSTANT.get(kind, CONSTANT_PLAIN)
        self._clear = os.open("/proc/self/clear_refs", os.O_WRONLY)
        self._status = os.open("/proc/self/status", os.O_RDONLY)

    def _kilobytes(self, key: bytes) -> int:
        status = os.pread(self._status, 4096, 0)
        return int(status[status.index(key) + len(key) :].split(b"k", 1)[0])

    def __call__(self, counts: np.ndarray, size: int, traced: bool, read: Callable[[], str]) -> str:
        os.pwrite(self._clear, b"5", 0)  # the peak starts from what is resident now
        before = self._kilobytes(b"VmRSS:")
        room = self._kilobytes(b"VmSize:") * 1024 + self._constant + 4 * size + 16 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        if traced:
            tracemalloc.start()
        signal.setitimer(signal.ITIMER_PROF, CPU_S * (5 if traced else 1))
        signal.setitimer(signal.ITIMER_REAL, WALL_S * (5 if traced else 1))
        start = time.process_time()
        try:
            outcome = read()
        finally:
            taken = time.process_time() - start
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            peak = tracemalloc.get_traced_memory()[1] if traced else 0
            tracemalloc.stop()
        resident = 1024 * (self._kilobytes(b"VmHWM:") - before)
        counts[3], counts[4] = max(counts[3], resident), max(counts[4], peak)
        if not traced:
            counts[5] = max(counts[5], taken)
        if max(peak, resident) > 4 * size + self._constant:
            raise Wrong("memory", f"{max(peak, resident) // MIB} MiB at a time")
        return outcome


def work(kind: str, sources: list[bytes], options: argparse.Namespace, counts: np.ndarray, found: Path) -> None:
    """Look at one input after the other, from the one of the number in `counts`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics of native code print
    warnings.simplefilter("ignore" if kind.startswith("mesh-") else "error")
    shared_memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as folder:
        watch = Watch(kind)
        start = int(counts[0])
        for number in range(start, min(start + WORKER_INPUTS, options.first + options.inputs)):
            counts[0] = number
            extension, data = made(kind, sources, options.seed, number)
            counts[6] += len(data)
            path = Path(folder) / f"a.{extension}"
            path.write_bytes(data)
            thoroughly = number % VALIDATED_ONE_IN == 0
            try:
                outcome = watch(counts, len(data), number % TRACED_ONE_IN == 1, lambda: look(kind, path, thoroughly))  # noqa: B023
                counts[1 if outcome == "cloud" else 2] += 1
            except Wrong as wrong:
                with found.open("a") as stream:
                    stream.write(json.dumps([number, wrong.kind, wrong.detail]) + "\n")
        counts[0] += 1


def fuzz(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """The figures of one format."""
    sources = seeds(kind)
    # What is imported late is imported now, and counts for no input.
    disagreement(cloud_files.POINTS, cloud_files.NORMALS)
    extension = "." + EXTENSIONS.get(kind, (kind.removeprefix("mesh-"),))[0]
    for data in sources:
        with tempfile.NamedTemporaryFile(suffix=extension) as file, contextlib.suppress(Wrong):
            Path(file.name).write_bytes(data)
            look(kind, Path(file.name), thoroughly=True)
    counts = np.frombuffer(mmap.mmap(-1, 8 * len(COUNTS)), np.float64)
    counts[0] = options.first
    end, start = options.first + options.inputs, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found"
        found.touch()
        while counts[0] < end:
            child = os.fork()
            if not child:
                try:
                    work(kind, sources, options, counts, found)
                except BaseException:  # noqa: BLE001 - said by the exit status
                    traceback.print_exc(file=sys.stdout)
                    os._exit(1)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if ended > 0:
                raise SystemExit(f"{kind}: the fuzzer itself failed at input {int(counts[0])}")
            if ended < 0:
                name = signal.Signals(-ended).name
                what = "hang" if name in ("SIGPROF", "SIGALRM") else "crash"
                with found.open("a") as stream:
                    stream.write(json.dumps([int(counts[0]), what, name]) + "\n")
                counts[0] += 1
        findings = [json.loads(line) for line in found.read_text().splitlines()]
    seconds = time.monotonic() - start
    return {
        "format": kind,
        "inputs": options.inputs,
        "seed": options.seed,
        "seed_files": len(sources),
        "clouds": int(counts[1]),
        "refused": int(counts[2]),
        "findings": dict(Counter(what for _, what, _ in findings)),
        "largest_peak_mib": round(max(counts[3], counts[4]) / MIB, 1),
        "longest_cpu_s": round(float(counts[5]), 2),
        "mean_bytes": round(float(counts[6]) / options.inputs),
        "seconds": round(seconds),
        "inputs_per_s": round(options.inputs / seconds),
        "first_of_each": _first_of_each(kind, sources, findings, options),
    }


def _first_of_each(kind: str, sources: list[bytes], findings: list[list], options: argparse.Namespace) -> list[dict]:
    """One of the findings of each kind; its input is saved."""
    first: dict[tuple[str, str], dict] = {}
    for number, what, detail in findings:
        shown = "" if what in ("memory", "hang") else "".join(c for c in detail if not c.isdigit())[:70]
        if (what, shown) in first:
            first[what, shown]["count"] += 1
            continue
        extension, data = made(kind, sources, options.seed, number)
        options.save.mkdir(parents=True, exist_ok=True)
        path = options.save / f"{kind}_{options.seed}_{number}_{what}.{extension}"
        path.write_bytes(data)
        first[what, shown] = {"number": number, "kind": what, "detail": detail, "bytes": len(data), "count": 1}
    return list(first.values())


# Guided by what is reached


def guided(kind: str, options: argparse.Namespace) -> None:
    """atheris' own search, with this file's mutations beside its own; ends the process, at the first finding if any."""
    import atheris

    global read_cloud, read_mesh, stream_cloud
    with atheris.instrument_imports(include=["sdfserver.formats", "sdfserver.io"]):
        for name in [name for name in sys.modules if name.startswith(("sdfserver.formats", "sdfserver.io"))]:
            del sys.modules[name]
        from sdfserver.io import read_cloud, read_mesh, stream_cloud
    sources = seeds(kind)
    folder = Path(tempfile.mkdtemp())
    for i, data in enumerate(sources):
        (folder / f"seed{i}").write_bytes(data)
    extension = EXTENSIONS.get(kind, (kind.removeprefix("mesh-"),))[0]
    path = folder.parent / f"{folder.name}.{extension}"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        look(kind, path, thoroughly=False)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)  # noqa: S311
        match rng.randrange(4):
            case 0:
                changed = atheris.Mutate(data, max_size)
            case 1:
                changed = any_bytes(data, rng, sources)
            case 2:
                changed = text(data, rng, WORDS.get(kind.removeprefix("mesh-"), []))
            case _:
                changed = mutated(kind.removeprefix("mesh-"), [data], rng)
        return bytes(changed[:max_size])

    limits = [f"-runs={options.guided}", "-timeout=10", "-max_len=20000", "-rss_limit_mb=3000", "-verbosity=0"]
    prefix = f"-artifact_prefix={options.save}/guided_{kind}_"
    atheris.Setup([sys.argv[0], *limits, f"-seed={options.seed + 1}", prefix, str(folder)], one, custom_mutator=mutate)
    atheris.Fuzz()


def guided_apart(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """The same in a process of its own."""
    options.save.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    child = os.fork()
    if not child:
        guided(kind, options)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"inputs": options.guided, "found": status != 0, "seconds": round(time.monotonic() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", nargs="+", choices=(*KINDS, "all"), default=["all"])
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the figures; those of other formats in it stay")
    parser.add_argument("--save", type=Path, default=Path("findings"), help="folder for inputs of findings")
    parser.add_argument("--guided", type=int, default=0, metavar="N", help="N further inputs, looked for by atheris")
    options = parser.parse_args()
    failed = False
    for kind in KINDS if "all" in options.format else options.format:
        figures = fuzz(kind, options)
        failed |= bool(figures["findings"])
        if options.guided:
            figures["guided"] = guided_apart(kind, options)
            failed |= bool(figures["guided"]["found"])  # type: ignore[index]
        print(json.dumps(figures, indent=1), flush=True)  # noqa: T201
        if options.json:
            known = json.loads(options.json.read_text()) if options.json.exists() else {}
            options.json.write_text(json.dumps(known | {kind: figures}, indent=1, sort_keys=True) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # Fixed, so that what was freed goes back to the system and what is resident is what is in use.
        fixed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | fixed)  # noqa: S606 - itself
    main()
