"""Several hosts on one PostgreSQL: workers and APIs that come and go, a host that is lost, a database that restarts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import scenarios
from faults.cluster import Cluster, Elsewhere, cluster, elsewhere
from faults.host import Host, until

from sdfserver.schemas import JobState

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
LOST_SECONDS = 15.0


@pytest.fixture(scope="module")
def database() -> Iterator[Cluster]:
    """A PostgreSQL server of this module's."""
    with cluster() as one:
        yield one


@pytest.fixture
def site(database: Cluster, tmp_path: Path) -> Iterator[Host]:
    """A service on it, of which nothing runs yet."""
    database.begin()
    host = Host(tmp_path, database.url())
    try:
        yield host
    finally:
        host.close()


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Elsewhere]:
    """Another host."""
    with elsewhere() as one:
        yield one


def test_two_apis_and_four_workers_lose_nothing_when_one_of_each_is_killed(site: Host) -> None:
    posted = scenarios.one_of_each_killed(site, 8).jobs
    (left,) = site.processes("api")
    # What the other one took, this one knows.
    assert site.client.job(posted[-1]).status.state in (JobState.QUEUED, JobState.RUNNING)
    rows = [site.succeeds(job) for job in posted]
    assert [row.attempt for row in rows] == [2, *[1] * 7]
    assert len({row.worker for row in rows}) >= 3
    assert left.is_running()
    site.leaves_nothing_behind()


def test_a_host_that_is_lost_for_good_costs_an_attempt_and_some_seconds(
    site: Host, database: Cluster, far: Elsewhere
) -> None:
    recovery = scenarios.host_lost(site, database, far)
    assert recovery.seconds < LOST_SECONDS
    assert site.succeeds(recovery.jobs[0]).attempt == 2
    site.leaves_nothing_behind()


def test_a_worker_that_is_cut_off_publishes_nothing_when_it_comes_back(
    site: Host, database: Cluster, far: Elsewhere
) -> None:
    recovery, zombie = scenarios.network_cut(site, database, far)
    assert recovery.seconds < LOST_SECONDS
    (job,) = recovery.jobs
    row = site.succeeds(job)
    assert (row.attempt, row.published) == (2, 2)
    far.mend()
    until(lambda: not zombie.is_running() or zombie.status() == "zombie")
    assert "was taken for dead, and ends" in site.said()
    # Neither the result nor who made it has changed.
    assert site.succeeds(job)._mapping == row._mapping
    site.leaves_nothing_behind()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_database_that_restarts_in_mid_job_costs_no_job(site: Host, database: Cluster, mode: str) -> None:
    rows = [site.succeeds(job) for job in scenarios.database_restarted(site, database, mode).jobs]
    assert all(row.deaths == 0 for row in rows)  # it was no fault of theirs
    site.leaves_nothing_behind()
