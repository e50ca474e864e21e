"""Small jobs that a worker fits together: each ends as it would alone, whatever happens to the others."""

from contextlib import suppress

import httpx
import pytest
from faults.databases import on_both, on_both_slowly
from faults.host import CLOUD, Host, until

from sdfserver.io import read_cloud, read_mesh
from sdfserver.metrics import cloud_to_mesh
from sdfserver.schemas import JobState

pytestmark = pytest.mark.timeout(1800)


def fitted_together(host: Host, count: int, **options: object) -> list[str]:
    """Jobs that wait before there is a worker, and one that then takes them all."""
    host.start("api")

    def answers() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{host.client.url}/health/live").is_success
        return False

    until(answers)
    jobs = [host.submit(seed=i, **options) for i in range(count)]
    host.start("worker", batch=count)
    for job in jobs:
        host.fitting(job)
    (line,) = [line for line in host.said().splitlines() if "fitted together" in line]
    assert all(job in line for job in jobs)
    return jobs


@on_both_slowly
def test_jobs_that_wait_are_fitted_together_and_each_is_as_good_as_alone(host: Host) -> None:
    jobs = fitted_together(host, 2)
    alone = host.submit(seed=0)
    rows = [host.succeeds(job) for job in (*jobs, alone)]
    assert [row.attempt for row in rows] == [1, 1, 1]
    cloud = read_cloud(CLOUD)
    first, last = (
        cloud_to_mesh(cloud, read_mesh(host.client.job(job).download(host.data.parent / f"{job}.ply"))).mean
        for job in (jobs[0], alone)
    )
    assert first == pytest.approx(last, rel=0.2)
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_one_that_is_cancelled_does_not_disturb_the_others(host: Host) -> None:
    jobs = fitted_together(host, 3)
    host.client.job(jobs[1]).cancel()
    assert [host.succeeds(job).attempt for job in (jobs[0], jobs[2])] == [1, 1]
    assert host.row(jobs[1]).state == JobState.CANCELLED
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_killed_child_costs_each_of_them_an_attempt_and_then_they_go_alone(host: Host) -> None:
    jobs = fitted_together(host, 2)
    host.kill(host.child())
    rows = [host.succeeds(job) for job in jobs]
    assert [(row.attempt, row.deaths) for row in rows] == [(2, 1), (2, 1)]
    assert host.said().count("fitted together") == 1
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_one_that_takes_too_long_fails_alone(host: Host) -> None:
    jobs = fitted_together(host, 2)
    slow = host.submit(preset="fine", max_seconds=5)
    host.fails(slow, "time")
    for job in jobs:
        host.succeeds(job)


@pytest.mark.slow
@on_both
def test_a_worker_that_is_told_to_end_gives_all_of_them_back(host: Host) -> None:
    jobs = fitted_together(host, 2, preset="standard")
    (worker,) = host.processes("worker")
    worker.terminate()
    worker.terminate()
    until(lambda: not host.processes("worker"))
    assert {host.row(job).state for job in jobs} == {JobState.QUEUED}
    host.start("worker")
    for job in jobs:
        assert host.succeeds(job).deaths == 0
    host.leaves_nothing_behind()
