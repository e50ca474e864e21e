"""The documented interface against the running one: schemathesis makes requests of it, right ones and wrong ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from server.helpers import Served, until

from sdfserver.server.settings import Settings
from sdfserver.server.store import Store, jobs

CONFIG = """
[checks]
# Jobs that one request removed are gone (410) for the next, be that right or wrong otherwise.
positive_data_acceptance.expected-statuses = ["2xx", "3xx", "401", "403", "404", "409", "410", "429", "5xx"]
negative_data_rejection.expected-statuses = [
    "400", "401", "403", "404", "405", "406", "409", "410", "413", "415", "422", "428", "429", "5xx"
]

# What OpenAPI cannot say of an upload: that a file's name has to end in a format's name (415), that a form's JSON has
# to be that of JobOptions (400, 422), and which options go together (422). All other checks are made there too.
[[operations]]
include-name = "POST /v1/jobs"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "409", "410", "415", "422", "429"]

# Nor the limits of one server, which GET /v1/options tells, how far from a cloud its field goes, or what makes a plane
# (422); nor what an NPZ is (400).
[[operations]]
include-name = [
    "POST /v1/jobs/{job_id}/meshes", "POST /v1/jobs/{job_id}/restart", "POST /v1/jobs/{job_id}/sdf",
    "POST /v1/jobs/{job_id}/sdf.npz", "GET /v1/jobs/{job_id}/slice", "GET /v1/jobs/{job_id}/grid",
]
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "409", "410", "422", "429"]
"""


@pytest.mark.timeout(290)
@pytest.mark.parametrize("examples", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_schemathesis_finds_no_fault(served: Served, tmp_path: Path, examples: int) -> None:
    """With so many requests per call and phase."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    store = Store(Settings(data_dir=served.server.folder / "data").database)
    key_id, secret = store.create_key("schemathesis", 5)
    # Two jobs with results, for it to use and to remove; in the hands of a key that has nothing else.
    for _ in range(2):
        child = served.api.post(served.job["links"]["meshes"], json={"resolution": 16}).json()
        until(lambda child=child: served.api.get(child["links"]["self"]).json()["state"] == "succeeded", pause_s=0.2)
        with store.engine.begin() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == child["id"]).values(owner=key_id))
    try:
        found = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")),
                "--config-file", str(config),
                "run", f"{served.server.url}/openapi.json",
                "--header", f"Authorization: Bearer {secret}",
                "--checks", "all",
                "--phases", "examples,coverage,fuzzing,stateful",
                "--max-examples", str(examples),
                "--seed", "1",
                "--request-timeout", "30",
                "--no-color",
                "--continue-on-failure",
            ],
            capture_output=True, text=True, check=False, cwd=tmp_path, timeout=270,
        )  # fmt: skip
    finally:
        for row in store.list_jobs(key_id, limit=10_000):
            store.cancel(row.id, 60.0)
        store.close()
    assert found.returncode == 0, found.stdout[-20_000:] + found.stderr[-2000:]
    assert "Tested: 25" in found.stdout
    made = re.search(r"(\d+) generated, (\d+) passed", found.stdout)
    assert made is not None, found.stdout[-2000:]
    assert int(made[2]) > 500
