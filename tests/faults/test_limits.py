"""What ends a job before its time: its user, its seconds, its memory. The worker goes on with the next one."""

import pytest
from faults import scenarios
from faults.databases import on_both, on_both_slowly
from faults.host import Host

from sdfserver.schemas import JobState

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.slow
@on_both
def test_cancelling_a_running_fit_frees_the_worker(host: Host) -> None:
    stopped, following = scenarios.cancelled(host).jobs
    assert host.row(stopped).state == JobState.CANCELLED
    row = host.succeeds(following)
    assert (row.attempt, row.deaths) == (1, 0)
    assert host.row(stopped).state == JobState.CANCELLED
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_job_over_its_seconds_fails_and_the_next_one_runs(host: Host) -> None:
    host.serve()
    late, good = host.submit(preset="standard", max_seconds=2), host.submit()
    row = host.fails(late, "time")
    assert "2 s" in row.problem["detail"]
    assert (row.attempt, row.deaths) == (1, 0)
    assert host.succeeds(good).attempt == 1
    host.leaves_nothing_behind()


@on_both_slowly
def test_a_job_over_its_memory_fails(host: Host) -> None:
    host.serve(max_child_bytes=256 * 2**20)  # less than torch takes
    row = host.fails(host.submit(preset="standard"), "memory")
    assert "0.2 GiB" in row.problem["detail"]
    assert (row.attempt, row.deaths) == (1, 0)
    host.leaves_nothing_behind()
