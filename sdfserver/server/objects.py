"""The service's files in a store of objects: S3 or what speaks like it, or a folder by the same code.

Objects have the names of the files in `sdfserver.server.artifacts`, below the URL's prefix. What a process works on is
in a folder of its own, which the next process to start removes after its end. Uploads and downloads pass through in
parts: neither memory nor disk of the API depends on their size.
"""

import fcntl
import logging
import math
import mimetypes
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, S3Store, from_url

from sdfserver.errors import ConfigError
from sdfserver.files import printable, reason
from sdfserver.server.artifacts import FIT_FILES, PREVIEW, ArtifactError, Artifacts, Found, Kept, seal
from sdfserver.server.uploads import attachment

log = logging.getLogger(__name__)

PART_BYTES = 8 * 2**20
"""Of what goes through this process; of an upload, a few at a time. S3 takes 10,000 of them."""
UPLOADED_AT_ONCE = 2
SWEEP_SECONDS = 600.0
"""How often all objects are listed, which costs money where a store is rented. Removed jobs' files go at once."""
STRAY_SECONDS = 3600.0
"""Age at which an object of no job is taken for a stray: the job of a younger one may be about to be made."""
_CLIENT: Any = {
    "connect_timeout": timedelta(seconds=5),
    "timeout": timedelta(seconds=60),
    "allow_http": True,  # where the endpoint says so
}
_RETRIES: Any = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=15),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2), "base": 2},
}


_CODE = re.compile(r"<Code>(\w+)</Code>")
_REFUSED = re.compile("status code: 40[13] ")


class ObjectArtifacts(Artifacts):
    """The files at `url`, s3://BUCKET/PREFIX or file:///FOLDER; those in work in a folder below `root`.

    Keys, region and endpoint of S3 come from the environment, under the names that AWS gave them.
    """

    def __init__(self, url: str, root: Path) -> None:
        self._scratch = root.absolute() / "scratch"
        self._own = self._scratch / secrets.token_hex(8)
        self._lock: int | None = None
        super().__init__(self._own)
        try:
            if url.startswith("file:"):
                self._store: Any = from_url(url, mkdir=True)
            else:
                self._store = from_url(url, client_options=_CLIENT, retry_config=_RETRIES)
        except (BaseError, ValueError, OSError) as error:
            raise ConfigError(f"artifacts_url is {url!r}: {reason(error)}") from None
        self._next_sweep = 0.0
        self._showing = ThreadPoolExecutor(1, "show")

    def create(self) -> None:
        """Ask the store whether it answers, and make this process's own folder."""
        with _asking():
            obstore.list_with_delimiter(self._store, "none")
        self._clear_scratch()
        with self._locked_scratch():
            self._lock = os.open(self._own.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.jobs.mkdir(parents=True)

    def close(self) -> None:
        """Remove this process's folder."""
        self._showing.shutdown(cancel_futures=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            self._clear_scratch()

    @contextmanager
    def receiving(self, job_id: str, extension: str) -> Iterator["_ToObject"]:
        """Takes an upload, which is an object only when it is finished. An error removes it."""
        with self._new(job_id):
            yield _ToObject(self._store, self._key(self.upload(job_id, extension)))

    @contextmanager
    def linking(self, parent_id: str, fitted: int, job_id: str) -> Iterator[None]:
        """Give a job of kind mesh a copy of its parent's field. An error removes it.

        Raises FileNotFoundError when the parent's field is gone.
        """
        with self._new(job_id):
            for name in FIT_FILES:
                try:
                    self._copy(self.fit(parent_id, fitted) / name, self.fit(job_id, 0) / name)
                except FileNotFoundError:
                    if name != PREVIEW:
                        raise
            yield

    @contextmanager
    def copying(self, parent_id: str, extension: str, job_id: str) -> Iterator[None]:
        """Give a job a copy of the cloud of another. An error removes it.

        Raises FileNotFoundError when the other's cloud is gone.
        """
        with self._new(job_id):
            self._copy(self.upload(parent_id, extension), self.upload(job_id, extension))
            yield

    @contextmanager
    def _new(self, job_id: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.remove(job_id)
            raise

    def _copy(self, source: Path, target: Path) -> None:
        with _asking(may_lack=True):
            obstore.copy(self._store, self._key(source), self._key(target))

    def fetch(self, path: Path) -> None:
        """Have a file here. Raises FileNotFoundError where it is gone."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._get(path, path)

    def _get(self, path: Path, target: Path) -> None:
        found = self.find(path)
        if found is None:
            raise FileNotFoundError(path)
        coming = target.with_name(f".{target.name}.coming")
        try:
            with coming.open("wb") as stream:
                for part in found.read(0, found.size):
                    stream.write(part)
            coming.replace(target)
        finally:
            coming.unlink(missing_ok=True)

    def keep(self, folder: Path, title: str) -> None:
        """Bring the files of an attempt to where everybody finds them. `title` is the job's name, for downloads."""
        for path in sorted(folder.iterdir()):
            self._put(path, path, title)

    def show(self, folder: Path, names: Sequence[str], shown: Callable[[], None]) -> None:
        """The same for some files of an attempt that goes on, which does not wait; what cannot be shown is not."""

        def put() -> None:
            try:
                for name in names:
                    with suppress(FileNotFoundError):
                        self._put(folder / name, folder / name, "preview")
                shown()
            except ArtifactError as error:
                log.warning("a preview is not shown: %s", error)

        self._showing.submit(put)

    def discard(self, folder: Path) -> None:
        """Remove what an attempt left that came to nothing."""
        super().discard(folder)
        self._delete(self._key(folder) + "/")

    def leave(self, job_id: str) -> None:
        """The job's files are not worked on here any more."""
        super().remove(job_id)

    def holds_jobs(self) -> bool:
        """Whether there are files of any job."""
        with _asking():
            return bool(obstore.list_with_delimiter(self._store)["common_prefixes"])

    def find(self, path: Path) -> Found | None:
        """A file, if it is there."""
        key = self._key(path)
        try:
            with _asking(may_lack=True):
                meta = obstore.head(self._store, key)
        except FileNotFoundError:
            return None

        def read(start: int, stop: int) -> Iterator[bytes]:
            for begin in range(start, stop, PART_BYTES):
                with _asking(may_lack=True):
                    part = obstore.get_range(self._store, key, start=begin, end=min(begin + PART_BYTES, stop))
                yield bytes(part)

        def link(seconds: float) -> str:
            with _asking():
                return obstore.sign(self._store, "GET", key, timedelta(seconds=seconds))

        version = meta["e_tag"] or meta["last_modified"].isoformat()
        return Found(
            size=meta["size"],
            version=version.strip('W/"'),
            read=read,
            link=link if isinstance(self._store, S3Store) else None,
        )

    @contextmanager
    def at_hand(self, path: Path) -> Iterator[Path]:
        """Where the file can be read for a while. Raises FileNotFoundError."""
        with tempfile.TemporaryDirectory(dir=self._own) as folder:
            here = Path(folder, path.name)
            self._get(path, here)
            yield here

    def add(self, source: Path, path: Path, title: str) -> None:
        """Take in a file that was made from another."""
        seal(source.parent, source.name)
        for made in (source, *source.parent.glob("sums-*.json")):
            self._put(made, path.with_name(made.name), title)

    def remove(self, job_id: str) -> None:
        """Remove all files of a job: those that cannot be reached now, with the next sweep that can."""
        self.leave(job_id)
        self._delete(f"{job_id}/")

    def free_bytes(self) -> float:
        """Room for uploads: a store has always some."""
        return math.inf

    def sweep(self, kept: Callable[[Sequence[str]], Mapping[str, Kept]]) -> None:
        """Remove what no job wants; from time to time only, as it lists everything."""
        if time.monotonic() < self._next_sweep:
            return
        self._next_sweep = time.monotonic() + SWEEP_SECONDS
        self._clear_scratch()
        old = datetime.now(UTC) - timedelta(seconds=STRAY_SECONDS)
        with _asking():
            listed = [meta for some in obstore.list(self._store, chunk_size=1000) for meta in some]
        folders: dict[str, set[str]] = {}
        for meta in listed:
            job_id, _, rest = meta["path"].partition("/")
            # Nothing of another's, should the prefix be shared.
            if rest and meta["last_modified"] < old:
                folders.setdefault(job_id, set()).add(rest.partition("/")[0] if "/" in rest else "")
        wanted = kept(list(folders))
        for job_id, inside in folders.items():
            if job_id not in wanted:
                self.remove(job_id)
            elif wanted[job_id].ended:
                for folder in inside - wanted[job_id].folders - {""}:
                    self._delete(f"{job_id}/{folder}/")

    def _key(self, path: Path) -> str:
        return path.relative_to(self.jobs).as_posix()

    def _put(self, source: Path, path: Path, title: str) -> None:
        attributes = {
            "Content-Type": mimetypes.guess_type(path.name)[0] or "application/octet-stream",
            "Content-Disposition": attachment(title + path.suffix),
        }
        with source.open("rb") as stream, _asking():
            obstore.put(
                self._store,
                self._key(path),
                stream,
                attributes=None if isinstance(self._store, LocalStore) else attributes,
                max_concurrency=UPLOADED_AT_ONCE,
            )

    def _delete(self, prefix: str) -> None:
        try:
            with _asking(may_lack=True):
                found = [meta["path"] for some in obstore.list(self._store, prefix, chunk_size=1000) for meta in some]
                if found:
                    obstore.delete(self._store, found)
        except FileNotFoundError:  # somebody else removes them too
            pass
        except ArtifactError as error:
            log.warning("%s is left for a later sweep: %s", prefix, error)

    # This process's own folder

    @contextmanager
    def _locked_scratch(self) -> Iterator[None]:
        self._scratch.mkdir(parents=True, exist_ok=True)
        with (self._scratch / "lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _clear_scratch(self) -> None:
        """Remove the folders of processes that are gone: nobody holds their locks."""
        with self._locked_scratch():
            for path in self._scratch.glob("*.lock"):
                with path.open("rb") as stream, suppress(BlockingIOError):
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    path.unlink()


class _ToObject:
    """An upload into an object."""

    def __init__(self, store: Any, key: str) -> None:
        self._stream = obstore.open_writer(store, key, buffer_size=PART_BYTES, max_concurrency=UPLOADED_AT_ONCE)

    def write(self, data: bytes, /) -> int:
        with _asking():
            return self._stream.write(data)

    def finish(self) -> None:
        with _asking():
            self._stream.close()


@contextmanager
def _asking(*, may_lack: bool = False) -> Iterator[None]:
    """Turn what a store of objects raises into ArtifactError, or FileNotFoundError where it `may_lack` the object."""
    try:
        yield
    except (BaseError, OSError) as error:
        if may_lack and isinstance(error, FileNotFoundError):
            raise FileNotFoundError(_said(error)) from None
        refused = isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or _REFUSED.search(str(error))
        how = "refuses" if refused else "does not answer"
        raise ArtifactError(f"the artifact store {how}: {_said(error)}") from None


def _said(error: Exception) -> str:
    """The code that S3 answered, or else the first of what the library says."""
    text = str(error)
    found = _CODE.search(text)
    return found[1] if found else printable(text.partition("\n")[0])
