"""The fields of jobs, kept in memory while they are asked."""

from functools import lru_cache
from pathlib import Path

from sdfserver.saved import SavedField, read_field
from sdfserver.server.artifacts import Artifacts

CACHED = 16


@lru_cache(maxsize=CACHED)
def load(artifacts: Artifacts, path: Path) -> SavedField:
    """The field at `path`, which never changes. Raises FileNotFoundError."""
    with artifacts.at_hand(path) as here:
        return read_field(here)
