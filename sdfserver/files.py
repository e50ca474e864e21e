"""Files that are given and files that are written, whatever is in them; light, for the client as for the core.

Messages are one line, quote the path and say what to do. A file appears only when it is complete.
"""

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sdfserver.errors import CloudError, CloudFormatError, OutputError

MESH_FORMATS = ("ply", "obj", "stl", "glb", "off")
"""The extensions, without their dot, in which meshes are written."""


def printable(text: str) -> str:
    """The text on one line: names may hold anything."""
    return text if text.isprintable() else repr(text)[1:-1]


def reason(error: BaseException) -> str:
    """What an exception of the system or of a library says, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "an object", text)
    return printable(" ".join(text.split())[:200]) or type(error).__name__


def open_cloud(path: str | os.PathLike[str]) -> BinaryIO:
    """The bytes of a cloud's file, as a stream.

    Raises CloudError where the file cannot be opened, CloudFormatError where it is empty.
    """
    path = Path(path)
    shown = printable(str(path))
    try:
        if path.is_dir():
            raise CloudError(f"{shown} is a folder; give a file")
        if not path.exists():
            raise CloudError(f"{shown} does not exist; check the path")
        if not path.is_file():
            raise CloudError(f"{shown} is not an ordinary file; save the cloud to a file first")
        stream = path.open("rb")
        if stream.peek(1):
            return stream
        stream.close()
    except (OSError, ValueError) as error:
        raise CloudError(f"{shown} cannot be read: {reason(error)}") from None
    raise CloudFormatError(f"{printable(path.name)}: the file is empty; export the cloud again")


def check_writable(path: str | os.PathLike[str], formats: Sequence[str] = MESH_FORMATS) -> None:
    """Raise OutputError now if a file could not be written at `path` later; leaves nothing behind.

    formats: the extensions that are allowed, without their dot.
    """
    path = Path(path)
    shown = printable(str(path))
    try:
        if path.is_dir():
            raise OutputError(f"{shown} is a folder; give a file name in it")
        known_extension(path, formats)
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise OutputError(f"{shown} cannot be written: there is no folder {printable(str(path.parent))}; create it")
        if path.exists() and not os.access(path, os.W_OK):
            raise OutputError(f"{shown} cannot be written: it exists and is read-only; choose another name")
        probe = folder / _temporary_name(path)
        probe.open("xb").close()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise OutputError(f"{shown} cannot be written: {reason(error)}") from None


def known_extension(path: Path, formats: Sequence[str] = MESH_FORMATS) -> str:
    """The extension of `path` without its dot, in small letters. Raises OutputError unless it is one of `formats`."""
    extension = path.suffix[1:].lower()
    if extension not in formats:
        known = ", ".join(f".{name}" for name in formats)
        raise OutputError(f"{printable(str(path))}: '{printable(path.suffix)}' is not a known format; use {known}")
    return extension


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file at `path` when it is complete, and is removed when it is not.

    Raises OutputError where the file cannot be written.
    """
    path = Path(path)
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise OutputError(f"{printable(str(path))} is a folder; give a file name in it")
        temporary = target.with_name(_temporary_name(path))
        stream = temporary.open("x+b")
        try:
            with stream:
                yield stream
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise OutputError(f"{printable(str(path))} cannot be written: {reason(error)}") from None


def _temporary_name(path: Path) -> str:
    return f".{path.name[:100]}.{secrets.token_hex(6)}.tmp"
