"""The documented interface against the running one: schemathesis makes requests of it, right ones and wrong ones."""

import subprocess
import sys
from pathlib import Path

import pytest
from server.helpers import Served

MAX_EXAMPLES = 12
"""Requests per call and phase: enough for the known kinds of mistake, few enough for every run of the tests."""
CONFIG = """
# What OpenAPI cannot say of an upload: that a file's name has to end in a format's name (415), that a form's JSON has
# to be that of JobOptions (400, 422), and which options go together (422). Everything else is checked there too.
[[operations]]
include-path = "/v1/jobs"
include-method = "POST"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "415", "422", "429"]
"""


@pytest.mark.timeout(290)
def test_schemathesis_finds_no_fault(served: Served, tmp_path: Path) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    found = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "--config-file", str(config),
            "run", f"{served.server.url}/openapi.json",
            "--header", f"Authorization: Bearer {served.secret}",
            "--checks", "all",
            "--phases", "examples,coverage,fuzzing,stateful",
            "--max-examples", str(MAX_EXAMPLES),
            "--seed", "1",
            "--request-timeout", "30",
            "--no-color",
        ],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=280,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-20_000:] + found.stderr[-2000:]
