"""What tests of the running service share: quick fits, waiting for what will come, a PostgreSQL of their own."""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

QUICK = os.pathsep.join(str(path) for path in (Path(__file__).parent / "quick", Path(__file__).parents[1]))
"""A server's PYTHONPATH: it makes a draft a matter of seconds, and the server that of this checkout."""
POSTGRES = "postgresql://postgres@127.0.0.1:5432"


def wait_until(found: Callable[[], Any], *, patience_s: float, pause_s: float) -> Any:
    """What `found` returns as soon as that is true."""
    end = time.monotonic() + patience_s
    while not (value := found()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(pause_s)
    return value


@contextmanager
def fresh_postgres() -> Iterator[str | None]:
    """The URL of an empty database, which goes in the end; None where no server can be reached."""
    name = f"sdfserver_test_{secrets.token_hex(4)}"
    try:
        connection = psycopg.connect(f"{POSTGRES}/postgres", autocommit=True, connect_timeout=3)
    except psycopg.OperationalError:
        yield None
        return
    with connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        try:
            yield f"{POSTGRES}/{name}"
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[call-overload]
