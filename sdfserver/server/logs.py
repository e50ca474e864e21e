"""The log of the service's processes, on standard error: a line an event, without traces, paths of ours or keys.

For people, or with SDFSERVER_LOG_FORMAT=json for programs: objects with the ids of the request and of the job that a
line is about, which join the lines of API, worker and job's process. Then what goes well is told, too (STEP).
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from sdfserver.errors import DEBUG
from sdfserver.files import reason

FORMAT = "SDFSERVER_LOG_FORMAT"
STEP = 15
"""The level of lines that tell how a job gets on: below INFO."""
logging.addLevelName(STEP, "STEP")

_ids: ContextVar[dict[str, str]] = ContextVar("_ids", default={})  # noqa: B039 - it is never changed, but replaced


@contextmanager
def about(**ids: str | None) -> Iterator[None]:
    """While this is open, lines of this thread or task are about these: request, job, attempt."""
    token = _ids.set(_ids.get() | {name: value for name, value in ids.items() if value})
    try:
        yield
    finally:
        _ids.reset(token)


def subject(name: str) -> str | None:
    """The id of what lines are about at the moment, if they are about one of that kind."""
    return _ids.get().get(name)


def set_up_logging() -> None:
    """Log as the service does, in this process, whoever logs."""
    as_json = os.environ.get(FORMAT) == "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Objects() if as_json else _Lines())
    logging.basicConfig(level=STEP if as_json else logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "sqlalchemy", "dbos", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The engine would add a handler of its own, were there none.
    logging.getLogger("dbos").addHandler(logging.NullHandler())


class _Lines(logging.Formatter):
    """One line for each record: of an exception, what it says and where in this package it came from."""

    def format(self, record: logging.LogRecord) -> str:
        if os.environ.get(DEBUG):
            return f"sdfserver: {super().format(record)}"
        return f"sdfserver: {self._message(record)}"

    @staticmethod
    def _message(record: logging.LogRecord) -> str:
        message = record.getMessage().partition("\n")[0]
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            message = f"{message}: {_what(error)}{_where(error)}; {DEBUG}=1 logs the trace"
        return message


class _Objects(_Lines):
    """A JSON object for each record."""

    def format(self, record: logging.LogRecord) -> str:
        body = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": record.process,
            **_ids.get(),
            "message": self._message(record),
        }
        if os.environ.get(DEBUG) and record.exc_info:
            body["trace"] = self.formatException(record.exc_info)
        return json.dumps(body)


def _what(error: BaseException) -> str:
    said = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return f"{type(said).__name__}: {reason(said)}"


def _where(error: BaseException) -> str:
    package = Path(__file__).resolve().parents[1]
    trace, found = error.__traceback__, ""
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(package):
            found = f" at {file.relative_to(package)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
