"""The log: a line an event, which says what happened and where in the code, and nothing that is not for its readers."""

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from sdfserver.errors import DEBUG
from sdfserver.files import check_writable
from sdfserver.server import logs


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """The lines that a process with this logging writes to standard error."""
    monkeypatch.delenv(DEBUG, raising=False)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.set_up_logging()
    try:
        yield lambda: stream.getvalue().splitlines()
    finally:
        root.handlers[:], root.level = handlers, level


def fail(error: Exception) -> None:
    try:
        raise error
    except type(error):
        logging.getLogger("sdfserver.somewhere").exception("job %s failed", "ab12")


def test_an_exception_is_one_line_without_its_trace(logged: Callable[[], list[str]]) -> None:
    fail(ValueError("two\nlines"))
    assert logged() == ["sdfserver: job ab12 failed: ValueError: two lines; SDFSERVER_DEBUG=1 logs the trace"]


def test_the_line_says_where_in_the_package_it_came_from(logged: Callable[[], list[str]], tmp_path: Path) -> None:
    try:
        check_writable(tmp_path)
    except Exception:
        logging.getLogger("sdfserver").exception("it failed")
    (line,) = logged()
    assert " at files.py:" in line


def test_a_file_that_fails_is_not_named(logged: Callable[[], list[str]], tmp_path: Path) -> None:
    try:
        (tmp_path / "secret").read_bytes()
    except OSError:
        logging.getLogger("sdfserver").exception("it failed")
    (line,) = logged()
    assert "FileNotFoundError: No such file or directory" in line
    assert "secret" not in line


def test_a_database_that_fails_keeps_its_statement_and_values_to_itself(logged: Callable[[], list[str]]) -> None:
    fail(OperationalError("SELECT secret", {"key": "secret"}, RuntimeError("it went away")))
    (line,) = logged()
    assert "RuntimeError: it went away" in line
    assert "secret" not in line


def test_the_engine_and_the_server_log_the_same_way(logged: Callable[[], list[str]]) -> None:
    logging.getLogger("dbos").warning("a queue is slow\n  at length")
    logging.getLogger("dbos").info("a detail")
    logging.getLogger("uvicorn.error").warning("a client is odd")
    assert logged() == ["sdfserver: a queue is slow", "sdfserver: a client is odd"]


def test_the_trace_is_there_for_who_asks(logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG, "1")
    fail(ValueError("oh no"))
    lines = logged()
    assert lines[1].startswith("Traceback")
    assert lines[-1] == "ValueError: oh no"
