"""Clouds on their way to the disk: a raw body or a multipart form, in constant memory, up to a limit."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from anyio import CapacityLimiter, to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from sdfserver.io import CLOUD_FORMATS
from sdfserver.server.artifacts import Artifacts, Receiving
from sdfserver.server.problems import ProblemError

MAX_OPTIONS_BYTES = 64 * 1024
MAX_NAME = 200
_LOOK_AT_DISK_EVERY = 16 * 2**20
_WRITE_BYTES = 2**20


def safe_name(name: str) -> str:
    """A file's name as its user gave it, without folders or characters that do not print; never a path of ours."""
    base = PurePosixPath(name.replace("\\", "/")).name
    return "".join(c for c in base if c.isprintable())[-MAX_NAME:] or "cloud"


def attachment(name: str) -> str:
    """The Content-Disposition of a download that is to be called `name`."""
    return f"attachment; filename*=utf-8''{quote(safe_name(name), safe='')}"


class Upload:
    """One cloud being received. Entered as a context; until it is left, nobody takes its folder for a stray."""

    def __init__(
        self, artifacts: Artifacts, job_id: str, *, max_bytes: int, min_free: int, threads: CapacityLimiter
    ) -> None:
        self._artifacts, self._job_id = artifacts, job_id
        self.threads = threads
        self._max_bytes, self._min_free = max_bytes, min_free
        self._stack = ExitStack()
        self._stream: Receiving | None = None
        self._hash = hashlib.sha256()
        self._bytes = self._looked_at = 0
        self.name = self.format = ""
        self.options: bytes | None = None

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, *raised: Any) -> bool | None:
        return self._stack.__exit__(*raised)

    @property
    def size(self) -> int:
        """Bytes of the cloud so far."""
        return self._bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the cloud's bytes."""
        return self._hash.hexdigest()

    def check_room(self, more: int = 0) -> None:
        """Raise ProblemError where the disk would not hold `more` bytes and what running jobs need."""
        if self._artifacts.free_bytes() - more < self._min_free:
            raise disk_full()

    def begin(self, name: str, extension: str | None = None) -> None:
        """Open the file of a cloud called `name`."""
        if self._stream is not None:
            raise ProblemError("malformed", "the form has two parts called cloud; send one cloud a job")
        self.name = safe_name(name)
        self.format = (extension or PurePosixPath(self.name).suffix[1:]).lower()
        if self.format not in CLOUD_FORMATS:
            known = ", ".join(CLOUD_FORMATS)
            raise ProblemError(
                "format", f"{self.format[:20]!r} is not a known cloud format; name the file so that it ends in {known}"
            )
        self._stream = self._stack.enter_context(self._artifacts.receiving(self._job_id, self.format))

    def write(self, data: bytes) -> None:
        """Add bytes of the cloud."""
        if self._stream is None:
            raise ProblemError("malformed", "the form has no part called cloud")
        self._bytes += len(data)
        if self._bytes > self._max_bytes:
            raise too_large(self._max_bytes)
        if self._bytes - self._looked_at >= _LOOK_AT_DISK_EVERY:
            self._looked_at = self._bytes
            self.check_room()
        self._hash.update(data)
        self._stream.write(data)

    def finish(self) -> None:
        """Bring the cloud to the disk."""
        if self._stream is None:
            raise ProblemError("malformed", "there is no cloud; send it as the part called cloud")
        if not self._bytes:
            raise ProblemError("malformed", f"{self.name} is empty; send the file's bytes")
        self._stream.finish()


def disk_full() -> ProblemError:
    """The problem of a disk that takes no more."""
    return ProblemError(
        "disk-full",
        "there is not enough room on the server's disk; delete finished jobs or try again later",
        headers={"Retry-After": "60"},
    )


def too_large(limit: int) -> ProblemError:
    """The problem of an upload over the limit."""
    return ProblemError("too-large", f"the upload has more than {limit:,} bytes; thin the cloud or use a binary format")


async def receive_raw(upload: Upload, body: AsyncIterator[bytes], *, name: str, extension: str | None) -> None:
    """The whole body is the cloud."""
    upload.begin(name, extension)
    await in_blocks(body, upload.write, upload.threads)
    await to_thread.run_sync(upload.finish, limiter=upload.threads)


async def receive_form(upload: Upload, body: AsyncIterator[bytes], *, content_type: str) -> None:
    """A multipart form: the part `cloud` is the file, the part `options` their JSON; in any order."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise ProblemError("malformed", "the Content-Type has no boundary; let your HTTP library write it")
    form = _Form(upload)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        await in_blocks(body, parser.write, upload.threads)
        parser.finalize()
    except FormParserError:
        raise ProblemError("malformed", "the form cannot be parsed; send multipart/form-data") from None
    if not form.ended:
        raise ProblemError("malformed", "the form ends too early; send all of it")
    await to_thread.run_sync(upload.finish, limiter=upload.threads)


async def in_blocks(body: AsyncIterator[bytes], write: Any, threads: CapacityLimiter) -> None:
    """Hand the body to `write` in blocks worth a thread's while."""
    waiting = bytearray()
    async for chunk in body:
        waiting += chunk
        if len(waiting) >= _WRITE_BYTES:
            await to_thread.run_sync(write, bytes(waiting), limiter=threads)
            waiting.clear()
    if waiting:
        await to_thread.run_sync(write, bytes(waiting), limiter=threads)


class _Form:
    """Sorts the parts of a form as they come."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._header = b""
        self._value = b""
        self._disposition = b""
        self._part = ""
        self._options = bytearray()
        self.ended = False

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finished,
        }

    def _begin(self) -> None:
        self._header = self._value = self._disposition = b""

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        parameters = parse_options_header(self._disposition)[1]
        self._part = _text(parameters.get(b"name", b""))
        if self._part == "cloud":
            self._upload.begin(_text(parameters.get(b"filename", b"")))
        elif self._part != "options":
            raise ProblemError(
                "malformed", f"the form has a part called {self._part[:40]!r}; only cloud and options are known"
            )

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "cloud":
            self._upload.write(data[start:end])
            return
        self._options += data[start:end]
        if len(self._options) > MAX_OPTIONS_BYTES:
            raise ProblemError("malformed", f"the options have more than {MAX_OPTIONS_BYTES:,} bytes")

    def _end(self) -> None:
        if self._part == "options":
            self._upload.options = bytes(self._options)

    def _finished(self) -> None:
        self.ended = True


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
