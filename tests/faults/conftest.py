"""A service of its own for each test, on SQLite or PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.host import Host, fresh_host


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    """Nothing runs yet; whatever runs in the end is killed."""
    with fresh_host(tmp_path, getattr(request, "param", "sqlite")) as host:
        yield host
