"""On which databases a test runs."""

import pytest

on_both = pytest.mark.parametrize("host", ["sqlite", "postgresql"], indirect=True)
on_both_slowly = pytest.mark.parametrize(
    "host", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
"""On PostgreSQL with --slow alone."""
