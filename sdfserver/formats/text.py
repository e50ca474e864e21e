"""Text with one point a line (XYZ, PTS, TXT, CSV), and the tables of numbers that other formats hold."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudFormatError
from sdfserver.files import reason
from sdfserver.formats.common import Floats, byte_colors, cloud_of, named_columns, quote, unnamed_columns

MAX_LINE = 1 << 17


def plain_text(data: bytes) -> bytes:
    """The bytes of a text file with plain line ends, or CloudFormatError where it is no such thing."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise CloudFormatError("the text is UTF-16; save it as UTF-8")
    nul = data.find(b"\0")
    if nul >= 0:
        raise CloudFormatError(f"byte {nul} is NUL, so the file is not text; check its format and extension")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    start = 0
    while len(data) - start > MAX_LINE:
        end = data.rfind(b"\n", start, start + MAX_LINE + 1)
        if end < 0:
            end = data.find(b"\n", start)
            length, row = (end if end >= 0 else len(data)) - start, data.count(b"\n", 0, start) + 1
            raise CloudFormatError(f"line {row} has {length} characters; a table has one point on each line")
        start = end + 1
    return data


_BLOCK = 1 << 16


def line_blocks(data: bytes, offset: int = 0) -> Iterator[list[bytes]]:
    """The lines from `offset` on, without their ends, some at a time: as objects they take many times their bytes."""
    while offset < len(data):
        end = data.rfind(b"\n", offset, offset + _BLOCK)
        if end < 0:
            end = data.find(b"\n", offset)
        end = len(data) if end < 0 else end
        yield data[offset:end].split(b"\n")
        offset = end + 1


def number_table(
    rows: bytes | Sequence[bytes],
    *,
    columns: Sequence[int] | None = None,
    delimiter: str | None = None,
    first_line: int = 1,
) -> Floats:
    """Rows of numbers, (rows, columns); every row must have the named columns, or as many as the first.

    first_line: the number of the first line, or of the first row where rows are given one by one, for messages.
    """
    stream = io.BytesIO(rows) if isinstance(rows, bytes) else rows
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about blank lines and empty input: both are looked at here
            return np.loadtxt(
                stream,
                dtype=np.float64,
                comments=None,
                delimiter=delimiter,
                usecols=columns,
                ndmin=2,
                encoding="latin-1",
                quotechar='"' if delimiter else None,
            )
    except (ValueError, IndexError) as error:
        if isinstance(rows, bytes):
            raise _bad_row(rows.split(b"\n"), columns, delimiter, "line", first_line, error) from None
        raise _bad_row(rows, columns, delimiter, "row", first_line, error) from None


def number_tables(
    rows: bytes | Sequence[bytes],
    columns: Sequence[int],
    more: Sequence[int] | None,
    *,
    delimiter: str | None = None,
    first_line: int = 1,
) -> tuple[Floats, Floats | None]:
    """number_table of `columns`, and of `more`, which are as good as absent where a row lacks one of them."""
    if more:
        try:
            table = number_table(rows, columns=[*columns, *more], delimiter=delimiter, first_line=first_line)
            return table[:, : len(columns)], table[:, len(columns) :]
        except CloudFormatError:
            pass  # either of the others is at fault, and then is found again
    return number_table(rows, columns=columns, delimiter=delimiter, first_line=first_line), None


def _bad_row(
    lines: Sequence[bytes],
    columns: Sequence[int] | None,
    delimiter: str | None,
    counted: str,
    start: int,
    error: Exception,
) -> CloudFormatError:
    """The error that quotes the first line which is not a row of numbers; they are `counted` from `start`."""
    width: int | None = None
    for number, line in enumerate(lines, start):
        tokens = line.split(delimiter.encode() if delimiter else None)
        if not b"".join(tokens).strip():
            continue
        wanted = range(len(tokens)) if columns is None else columns
        width = len(tokens) if width is None else width
        missing = len(tokens) != width if columns is None else len(tokens) <= max(columns)
        if missing:
            need = width if columns is None else max(columns) + 1
            return CloudFormatError(
                f"{counted} {number} has {len(tokens)} values, not {need}: {quote(line)}; correct it"
            )
        bad = next((tokens[i] for i in wanted if not is_number(tokens[i].strip(b' \t"'))), None)
        if bad is not None:
            return CloudFormatError(f"{counted} {number} has {quote(bad)} where a number belongs; correct it")
    return CloudFormatError(f"its rows cannot be read as numbers ({reason(error)}); export the cloud again")


def is_number(token: bytes) -> bool:
    """Whether the token is a number, NaN and infinity included."""
    try:
        float(token)
    except ValueError:
        return False
    return b"_" not in token


_COMMENT = re.compile(rb"(?:#|//)([^\n]*)")


def read_text(data: bytes) -> PointCloud:
    """One point a line; a header that names the columns, a PTS count and comments (# or //) are optional."""
    data = plain_text(data)
    commented_names: list[str] | None = None
    if b"#" in data or b"//" in data:
        commented_names = _names_in_comments(data)
        data = _COMMENT.sub(b"", data)
    offset, line = _next_line(data, 0)
    count: int | None = None
    if re.fullmatch(rb"\d{1,18}", line.strip()):
        count = int(line)
        offset, line = _next_line(data, offset + len(line))
    delimiter = ";" if b";" in line else "," if b"," in line else None
    names = commented_names
    tokens = _tokens(line, delimiter)
    _refuse_decimal_commas(line, tokens, names, delimiter)
    if not all(is_number(token) for token in tokens[:3]):
        names = [_plain_name(token) for token in tokens]
        if not any(name.lower() == "x" for name in names):
            raise CloudFormatError(
                f"the line {quote(line)} is neither three numbers nor a header that names x, y and z; "
                "export the cloud as x y z nx ny nz"
            )
        offset, line = _next_line(data, offset + len(line))
        tokens = _tokens(line, delimiter)
        _refuse_decimal_commas(line, tokens, names, delimiter)
    body = data[offset:]
    if not body or body.isspace():
        raise CloudFormatError("it holds no points; export the cloud again")
    if delimiter == ";":
        body = body.replace(b",", b".")  # a semicolon separates where the comma is the decimal point
    first_line = data.count(b"\n", 0, offset) + 1
    return _text_cloud(body, tokens, names, delimiter, first_line, count)


_INTEGERS = re.compile(rb"[-+]?\d+(,\d+)?([eE][-+]?\d+)?")


def _refuse_decimal_commas(line: bytes, tokens: list[bytes], names: list[str] | None, delimiter: str | None) -> None:
    """Refuse rows such as '1,5 2,5 3,5': read as if the comma parted columns they would be another cloud.

    As it is a decimal point beside semicolons, the comma is taken for one there, and there alone.
    """
    if b"," not in line or delimiter == ";":
        return
    words = line.split()
    parted = len(words) >= 3 and all(_INTEGERS.fullmatch(word.rstrip(b",")) for word in words)
    doubled = parted and all(b"," in word[:-1] for word in words)
    between = parted and not any(word.endswith(b",") for word in words)
    unnamed = delimiter == "," and names is not None and len(tokens) == 2 * len(names)
    if doubled or between or unnamed:
        raise CloudFormatError(
            f"its numbers have decimal commas: {quote(line)}; save it with decimal points, or with semicolons between"
        )


def _text_cloud(
    body: bytes, tokens: list[bytes], names: list[str] | None, delimiter: str | None, first_line: int, count: int | None
) -> PointCloud:
    named = named_columns(names) if names is not None and len(names) <= len(tokens) else None
    more: Floats | None = None
    if named is not None:
        table, more = number_tables(body, named.shape, named.colors, delimiter=delimiter, first_line=first_line)
    else:
        numeric = next((i for i, token in enumerate(tokens) if not is_number(token)), len(tokens))
        if numeric < 3:
            raise CloudFormatError(
                f"line {first_line} has {numeric} numbers; a point needs at least x, y and z (then nx, ny, nz)"
            )
        columns = None if numeric == len(tokens) else list(range(numeric))
        table = number_table(body, columns=columns, delimiter=delimiter, first_line=first_line)
    if count is not None and count != len(table):
        raise CloudFormatError(f"the first line promises {count} points, but {len(table)} follow; export it again")
    if named is None:
        return unnamed_columns(table)
    colors = None if more is None else byte_colors([*more.T])
    return cloud_of(table[:, :3], table[:, 3:] if named.normals else None, colors)


def _next_line(data: bytes, offset: int) -> tuple[int, bytes]:
    """Offset and content of the first line from `offset` on that is not blank; empty at the end."""
    found = _NOT_BLANK.search(data, offset)
    if found is None:
        return len(data), b""
    start = max(data.rfind(b"\n", offset, found.start()) + 1, offset)
    end = data.find(b"\n", start)
    return start, data[start : len(data) if end < 0 else end]


_NOT_BLANK = re.compile(rb"\S")


def _tokens(line: bytes, delimiter: str | None) -> list[bytes]:
    if delimiter == ";":
        line = line.replace(b",", b".")
    tokens = [token.strip(b' \t"') for token in line.split(delimiter.encode() if delimiter else None)]
    while tokens and not tokens[-1]:
        tokens.pop()
    return tokens


def _plain_name(token: bytes) -> str:
    """A column's name without its unit: 'X [m]' and 'x(m)' are x."""
    return re.split(r"[\[(]", token.decode("latin-1"))[0].strip()


def _names_in_comments(data: bytes) -> list[str] | None:
    """The names in the last comment before the first row, where they name x, y and z."""
    names: list[str] | None = None
    offset = 0
    while (start := _next_line(data, offset))[1].lstrip().startswith((b"#", b"//")):
        found = [_plain_name(token) for token in re.split(rb"[,;\s]+", start[1].strip(b"#/ \t")) if token]
        if {"x", "y", "z"} <= {name.lower() for name in found}:
            names = found
        offset = start[0] + len(start[1])
    return names
