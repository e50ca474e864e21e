"""Every path of the service: where a job's files are, and what of them is to go.

    jobs/<id>/cloud.<format>        as it was uploaded
    jobs/<id>/fit-<attempt>/        what an attempt left of the fit: field.safetensors, cloud.npz, fit.json, and to be
                                    looked at points.ply and preview.ply, which changes as the surface forms
    jobs/<id>/mesh-<attempt>/       and of the meshing: mesh.ply, report.json, and to be looked at preview.ply and
                                    picture.png; the mesh in other formats, when asked for

A job of kind mesh starts from the field of its parent: fit-0 has links to those files. Names from users never become
paths: <id> and <attempt> are ours, <format> is one of a list.

Here they are in a folder that all processes see. `sdfserver.server.objects` has the same in a store of objects, where
the folder is each process's own, for what it works on: `fetch`, `keep`, `at_hand` and `leave` then move files between
the two, and do nothing here.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from sdfserver.errors import SdfServerError

if TYPE_CHECKING:
    from sdfserver.server.settings import Settings

FIELD, CLOUD, FIT_REPORT = "field.safetensors", "cloud.npz", "fit.json"
MESH, REPORT = "mesh.ply", "report.json"
POINTS, PREVIEW, PICTURE = "points.ply", "preview.ply", "picture.png"
FIT_FILES = (FIELD, CLOUD, FIT_REPORT, POINTS, PREVIEW)
"""All but PREVIEW are always there: a field may have no surface at level 0."""
MESH_FILES = (MESH, REPORT, PREVIEW, PICTURE)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A job whose files are wanted: whether it has ended, and the attempts that its results are from."""

    ended: bool
    fitted: int | None
    published: int | None


class ArtifactError(SdfServerError):
    """Where the artifacts are kept does not answer, or refuses; later it may not."""


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

    def add(self, source: Path, path: Path, title: str) -> None:
        """Take in a file that was made from another: `source` lies beside that one, as `at_hand` gave it."""

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
                keep = {self.fit(job_id, wanted[job_id].fitted or 0), self.mesh(job_id, wanted[job_id].published or 0)}
                for folder in self.jobs.joinpath(job_id).iterdir():
                    if folder.is_dir() and folder not in keep:
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


def sync(folder: Path) -> None:
    """Bring the files of a folder, and their names, to the disk."""
    for path in (*folder.iterdir(), folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
