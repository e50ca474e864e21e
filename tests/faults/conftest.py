"""A service of its own for each test, on SQLite or PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.host import Host
from waiting import fresh_postgres


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    """Nothing runs yet; whatever runs in the end is killed."""
    with fresh_postgres() as url:
        database = getattr(request, "param", "sqlite")
        if database == "postgresql" and url is None:
            pytest.skip("no PostgreSQL on 127.0.0.1:5432")
        host = Host(tmp_path, url if database == "postgresql" else None)
        try:
            yield host
        finally:
            host.close()
