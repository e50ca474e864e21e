"""The log of the service's processes, on standard error: a line an event, without traces, paths of ours or keys."""

import logging
import os
import sys
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from sdfserver.errors import DEBUG
from sdfserver.files import reason


def set_up_logging() -> None:
    """Log as the service does, in this process, whoever logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "sqlalchemy", "dbos"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The engine would add a handler of its own, were there none.
    logging.getLogger("dbos").addHandler(logging.NullHandler())


class _Lines(logging.Formatter):
    """One line for each record: of an exception, what it says and where in this package it came from."""

    def format(self, record: logging.LogRecord) -> str:
        if os.environ.get(DEBUG):
            return f"sdfserver: {super().format(record)}"
        message = record.getMessage().partition("\n")[0]
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            message = f"{message}: {_what(error)}{_where(error)}; {DEBUG}=1 logs the trace"
        return f"sdfserver: {message}"


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
