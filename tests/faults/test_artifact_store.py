"""The store of clouds and meshes is lost for a while, or one of those who use it: no job is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.host import Host, fresh_host, until
from s3 import S3

from sdfserver.schemas import JobState

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def host(request: pytest.FixtureRequest, s3: S3, tmp_path: Path) -> Iterator[Host]:
    """A service whose artifacts are in S3; nothing runs yet."""
    with fresh_host(tmp_path, request.param, processors=1, artifacts_url=f"s3://{s3.bucket()}/files") as host:
        host.environment |= s3.environment
        yield host


def works_on_nothing(host: Host) -> None:
    until(lambda: not [path for path in host.data.glob("scratch/*/jobs/*") if any(path.iterdir())], patience_s=60)


def test_a_store_lost_in_mid_fit_costs_nothing_that_was_computed(host: Host, s3: S3) -> None:
    host.serve()
    job = host.submit()
    host.fitting(job)
    s3.stop()
    try:
        until(lambda: "does not answer" in host.said() and "it is asked again" in host.said())
        assert host.row(job).state == JobState.RUNNING
        assert host.row(job).fitted is None
    finally:
        s3.start()
    row = host.succeeds(job)
    assert (row.attempt, row.deaths, row.fitted, row.published) == (1, 0, 1, 1)
    works_on_nothing(host)


def test_a_job_that_waits_for_the_store_can_be_cancelled(host: Host, s3: S3) -> None:
    host.serve()
    job = host.submit()
    host.fitting(job)
    s3.stop()
    try:
        until(lambda: "it is asked again" in host.said())
        host.client.job(job).cancel()
        assert host.row(job).state == JobState.CANCELLED
        works_on_nothing(host)
    finally:
        s3.start()
    host.succeeds(host.submit())


@pytest.mark.slow
def test_another_worker_meshes_what_a_dead_one_fitted(host: Host) -> None:
    host.serve(workers=2)
    host.ready(workers=2)
    job = host.submit(resolution=256)
    until(lambda: host.row(job).fitted is not None and host.row(job).stage != "fit")
    worker = host.row(job).worker
    pids = [row.pid for row in host.store.workers() if row.id == worker]
    host.kill(*(process for process in host.processes("worker") if process.pid in pids))
    row = host.succeeds(job)
    assert (row.fitted, row.published) == (1, 2)
    works_on_nothing(host)
