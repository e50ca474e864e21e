"""Every path of the service: where a job's files are, and what of them is to go.

    jobs/<id>/cloud.<format>        as it was uploaded
    jobs/<id>/fit-<attempt>/        what an attempt left of the fit: field.safetensors, cloud.npz, fit.json, and to be
                                    looked at points.ply and preview.ply, which changes as the surface forms
    jobs/<id>/mesh-<attempt>/       and of the meshing: mesh.ply, report.json, and to be looked at preview.ply and
                                    picture.png; the mesh in other formats, when asked for
    sums.json in both               size and SHA-256 of these files; sums-<format>.json that of a mesh in another

A job of kind mesh starts from the field of its parent: fit-0 has links to those files. Names from users never become
paths: <id> and <attempt> are ours, <format> is one of a list.

Here they are in a folder that all processes see. `sdfserver.server.objects` has the same in a store of objects, where
the folder is each process's own, for what it works on: `fetch`, `keep`, `at_hand` and `leave` then move files between
the two, and do nothing here.
"""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from sdfserver.errors import SdfServerError

if TYPE_CHECKING:
    from sdfserver.server.settings import Settings

FIELD, CLOUD, FIT_REPORT = "field.safetensors", "cloud.npz", "fit.json"
MESH, REPORT = "mesh.ply", "report.json"
POINTS, PREVIEW, PICTURE = "points.ply", "preview.ply", "picture.png"
SUMS = "sums.json"
FIT_FILES = (FIELD, CLOUD, FIT_REPORT, POINTS, PREVIEW, SUMS)
"""All but PREVIEW are always there: a field may have no surface at level 0."""
MESH_FILES = (MESH, REPORT, PREVIEW, PICTURE, SUMS)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A job whose files are wanted: whether it has ended, and the attempts that its results are from."""

    ended: bool
    fitted: int | None
    published: int | None

    @property
    def folders(self) -> set[str]:
        """The names of the folders of those attempts."""
        return {f"fit-{self.fitted or 0}", f"mesh-{self.published or 0}"}


class ArtifactError(SdfServerError):
    """Where the artifacts are kept does not answer, or refuses; later it may not."""


class DamagedError(Exception):
    """A file is not what it was when it was made; the message says how."""


@dataclass(frozen=True, kw_only=True)
class Sum:
    """What a file was when it was made."""

    size: int
    sha256: str
    """As hexadecimal digits."""

    @property
    def header(self) -> str:
        """As Repr-Digest has it (RFC 9530)."""
        return f"sha-256=:{base64.b64encode(bytes.fromhex(self.sha256)).decode()}:"


class Receiving(Protocol):
    """An upload under way."""

    def write(self, data: bytes, /) -> int:
        """Add bytes."""

    def finish(self) -> None:
        """Bring it to where it is safe. Without this it never was."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file of a job's, and how its bytes can be had: at `path`, or if that is None with `read` and by `link`."""

    size: int
    version: str
    """Another one where the file was replaced."""
    path: Path | None = None
    read: Callable[[int, int], Iterator[bytes]] = lambda _start, _stop: iter(())
    """The bytes from the one index up to the other, in parts."""
    link: Callable[[float], str] | None = None
    """A URL that is good for so many seconds, to anybody who has it."""


def open_artifacts(settings: "Settings") -> "Artifacts":
    """Where the settings say that the files are. Raises ConfigError."""
    if settings.artifacts_url is None:
        return Artifacts(settings.data_dir)
    from sdfserver.server.objects import ObjectArtifacts

    return ObjectArtifacts(settings.artifacts_url, settings.data_dir)


class Artifacts:
    """The folder of the service's files.

    Where they are in a store of objects, most methods raise ArtifactError when it does not answer.
    """

    def __init__(self, root: Path) -> None:
        self.jobs = root.absolute() / "jobs"

    def create(self) -> None:
        """Make the folder; raise where the files could not be kept."""
        self.jobs.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """Give back what only this process needs."""

    def upload(self, job_id: str, extension: str) -> Path:
        """The cloud as it was uploaded."""
        return self.jobs / job_id / f"cloud.{extension}"

    def fit(self, job_id: str, attempt: int) -> Path:
        """The folder of an attempt's fit."""
        return self.jobs / job_id / f"fit-{attempt}"

    def mesh(self, job_id: str, attempt: int) -> Path:
        """The folder of an attempt's meshing."""
        return self.jobs / job_id / f"mesh-{attempt}"

    @contextmanager
    def receiving(self, job_id: str, extension: str) -> Iterator[Receiving]:
        """Takes an upload. Until it is left the job's folder is not taken for a stray, row or no row.

        An error removes the folder.
        """
        path = self.upload(job_id, extension)
        path.parent.mkdir()
        try:
            with path.open("xb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                yield _ToFile(stream)
        except BaseException:
            self.remove(job_id)
            raise

    @contextmanager
    def linking(self, parent_id: str, fitted: int, job_id: str) -> Iterator[None]:
        """Give a job of kind mesh the field of its parent. While it is open the folder is not taken for a stray.

        An error removes the folder. Raises FileNotFoundError when the parent's field is gone.
        """
        source, target = self.fit(parent_id, fitted), self.fit(job_id, 0)
        with self._locking(job_id):
            target.mkdir()
            for name in FIT_FILES:
                if name != PREVIEW or source.joinpath(name).exists():
                    target.joinpath(name).hardlink_to(source / name)
            sync(target)
            yield

    @contextmanager
    def copying(self, parent_id: str, extension: str, job_id: str) -> Iterator[None]:
        """Give a job the cloud of another. While it is open the folder is not taken for a stray.

        An error removes the folder. Raises FileNotFoundError when the other's cloud is gone.
        """
        with self._locking(job_id):
            self.upload(job_id, extension).hardlink_to(self.upload(parent_id, extension))
            sync(self.jobs / job_id)
            yield

    @contextmanager
    def _locking(self, job_id: str) -> Iterator[None]:
        """A folder for a job whose files are already here."""
        with self.receiving(job_id, "lock"):
            yield
        self.upload(job_id, "lock").unlink(missing_ok=True)

    # Files of jobs, for those who work on them and those who ask for them

    def fetch(self, path: Path) -> None:
        """Have a file here. Raises FileNotFoundError where it is gone."""

    def keep(self, folder: Path, title: str) -> None:
        """Bring the files of an attempt to where everybody finds them. `title` is the job's name, for downloads."""

    def show(self, folder: Path, names: Sequence[str], shown: Callable[[], None]) -> None:  # noqa: ARG002
        """The same for some files of an attempt that goes on; `shown` is called when, and if, they are there."""
        shown()

    def discard(self, folder: Path) -> None:
        """Remove what an attempt left that came to nothing."""
        shutil.rmtree(folder, ignore_errors=True)

    def leave(self, job_id: str) -> None:
        """The job's files are not worked on here any more."""

    def sum_of(self, path: Path) -> Sum | None:
        """What a file of an attempt that is over was when it was made; None where nobody wrote it down."""
        return _sums(self, path.parent, _sums_of(path.name)).get(path.name)

    def check(self, path: Path, found: Found) -> Sum | None:
        """What the file was when it was made. Raises DamagedError if it is not that any more.

        A file of this host is read for it when it is asked for first; a store of objects looks after its bytes itself.
        """
        made = self.sum_of(path)
        if made is not None:
            if found.size != made.size:
                raise DamagedError(f"it has {found.size:,} bytes instead of {made.size:,}")
            if found.path is not None and _sha256_of(found.path, found.version) != made.sha256:
                raise DamagedError("its SHA-256 is another")
        return made

    def holds_jobs(self) -> bool:
        """Whether there are files of any job."""
        return self.jobs.is_dir() and any(self.jobs.iterdir())

    def find(self, path: Path) -> Found | None:
        """A file, if it is there."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        return Found(size=status.st_size, version=str(status.st_mtime_ns), path=path)

    @contextmanager
    def at_hand(self, path: Path) -> Iterator[Path]:
        """Where the file can be read for a while. Raises FileNotFoundError."""
        yield path

    def add(self, source: Path, path: Path, title: str) -> None:  # noqa: ARG002
        """Take in a file that was made from another: `source` lies beside that one, as `at_hand` gave it."""
        seal(source.parent, source.name)

    def remove(self, job_id: str) -> None:
        """Remove all files of a job."""
        shutil.rmtree(self.jobs / job_id, ignore_errors=True)

    def free_bytes(self) -> float:
        """Room for uploads."""
        return shutil.disk_usage(self.jobs).free

    def sweep(self, kept: Callable[[Sequence[str]], Mapping[str, Kept]]) -> None:
        """Remove folders that no job wants any more, and what other attempts left of jobs that have ended.

        `kept` tells which of some job ids are wanted, and how much of each.
        """
        # Listed before the store is asked: a folder made after that is not looked at.
        ids = [entry.name for entry in os.scandir(self.jobs) if entry.is_dir()]
        wanted = kept(ids)
        for job_id in ids:
            if job_id not in wanted:
                if not self._receiving(job_id):
                    self.remove(job_id)
            elif wanted[job_id].ended:
                for folder in self.jobs.joinpath(job_id).iterdir():
                    if folder.is_dir() and folder.name not in wanted[job_id].folders:
                        shutil.rmtree(folder, ignore_errors=True)

    def _receiving(self, job_id: str) -> bool:
        """Whether some process is writing an upload into the job's folder."""
        for path in self.jobs.joinpath(job_id).glob("cloud.*"):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
        return False


class _ToFile:
    """An upload into a file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: bytes, /) -> int:
        return self._stream.write(data)

    def finish(self) -> None:
        self._stream.flush()
        sync(Path(self._stream.name).parent)


def seal(folder: Path, *names: str) -> None:
    """Write down what the files of a folder are, or those named; and bring all of it to the disk."""
    paths = [folder / name for name in names] or [path for path in sorted(folder.iterdir()) if path.name != SUMS]
    sums = {}
    for path in paths:
        sums[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    (folder / (_sums_of(names[0]) if names else SUMS)).write_text(json.dumps(sums, indent=1) + "\n")
    sync(folder)


def _sums_of(name: str) -> str:
    """The file in which the sum of another is."""
    return SUMS if name in (*FIT_FILES, *MESH_FILES) else f"sums-{name.rpartition('.')[2]}.json"


@lru_cache(maxsize=256)
def _sums(artifacts: Artifacts, folder: Path, name: str) -> Mapping[str, Sum]:
    found = artifacts.find(folder / name)
    if found is None:
        return {}
    text = found.path.read_bytes() if found.path else b"".join(found.read(0, found.size))
    try:
        return {name: Sum(**said) for name, said in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise DamagedError("what was written down of it is damaged itself") from None


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, _version: str) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(folder: Path) -> None:
    """Bring the files of a folder, and their names, to the disk."""
    for path in (*folder.iterdir(), folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
