"""Several hosts on one PostgreSQL: workers and APIs that come and go, a host that is lost, a database that restarts."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from faults.cluster import Cluster, Elsewhere, cluster, elsewhere
from faults.host import CLOUD, Host, until

from sdfserver.client import Client
from sdfserver.schemas import JobState
from sdfserver.server.liveness import this_host

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
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    first, second = site.start("api"), site.start("api", port=port)
    started = [site.start("worker") for _ in range(4)]
    site.ready(workers=4)
    with Client(f"http://127.0.0.1:{port}", timeout_s=60, retry_s=60) as other:
        posted = [site.submit(seed=i) for i in range(4)]
        posted += [other.submit(CLOUD, preset="draft", resolution=32, seed=i).id for i in range(4)]
        until(lambda: any(site.row(job).stage == "fit" for job in posted))
        site.kill(started[0], second)
        # What the second took, the first knows.
        assert site.client.job(posted[-1]).status.state in (JobState.QUEUED, JobState.RUNNING)
        rows = [site.succeeds(job) for job in posted]
    assert all(row.attempt <= 2 for row in rows)
    assert len({row.worker for row in rows}) >= 3
    assert first.is_running()
    site.leaves_nothing_behind()


def test_a_host_that_is_lost_for_good_costs_an_attempt_and_some_seconds(
    site: Host, database: Cluster, far: Elsewhere
) -> None:
    site.start("api")
    lost = site.start("worker", prefix=far.prefix, database_url=database.url(far.address))
    site.ready()
    job = site.submit()
    site.fitting(job)
    assert {row.host for row in site.store.workers()} != {this_host()}
    site.start("worker")
    site.ready(workers=2)
    far.cut()
    lost.kill()  # nobody on this host can see that
    lost_at = time.monotonic()
    assert site.running(job, 2) - lost_at < LOST_SECONDS
    assert site.succeeds(job).attempt == 2
    site.leaves_nothing_behind()


def test_a_worker_that_is_cut_off_publishes_nothing_when_it_comes_back(
    site: Host, database: Cluster, far: Elsewhere
) -> None:
    site.start("api")
    zombie = site.start("worker", prefix=far.prefix, database_url=database.url(far.address))
    site.ready()
    job = site.submit()
    site.fitting(job)
    site.start("worker")
    site.ready(workers=2)
    far.cut()
    cut_at = time.monotonic()
    assert site.running(job, 2) - cut_at < LOST_SECONDS
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
    site.start("api")
    site.start("worker")
    site.ready()
    posted = [site.submit(seed=i) for i in range(2)]
    site.fitting(posted[0])
    database.stop(mode)
    answer = httpx.get(f"{site.client.url}/v1/jobs/{posted[0]}", timeout=60)
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:sdfserver:problem:not-ready")
    time.sleep(3)
    database.start()

    def answers() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{site.client.url}/v1/jobs/{posted[0]}", timeout=60).is_success
        return False

    until(answers)
    rows = [site.succeeds(job) for job in posted]
    assert all(row.deaths == 0 for row in rows)  # it was no fault of theirs
    site.leaves_nothing_behind()
