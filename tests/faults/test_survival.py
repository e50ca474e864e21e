"""Whatever is killed, every accepted job ends, once: with a right mesh or a reason; and nothing is left lying about."""

import random
import time

import pytest
from faults import scenarios
from faults.databases import on_both, on_both_slowly
from faults.host import Host, until

from sdfserver.schemas import JobState

pytestmark = pytest.mark.timeout(1800)  # a bound for what hangs, on a machine that has other work


@pytest.mark.slow  # what else is run has a job that kills its child each time
@on_both
def test_a_killed_child_costs_one_attempt(host: Host) -> None:
    (job,) = scenarios.child_killed(host).jobs
    row = host.succeeds(job)
    assert (row.attempt, row.deaths) == (2, 1)
    host.leaves_nothing_behind()


@on_both
def test_a_worker_killed_in_mid_fit_costs_one_attempt(host: Host) -> None:
    (job,) = scenarios.worker_killed_in_fit(host).jobs
    row = host.succeeds(job)
    assert (row.attempt, row.deaths) == (2, 1)
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_child_killed_while_meshing_costs_no_second_fit(host: Host) -> None:
    (job,) = scenarios.child_killed_in_mesh(host).jobs
    row = host.succeeds(job)
    assert (row.fitted, row.published, row.deaths) == (1, 2, 1)
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_worker_killed_while_meshing_costs_no_second_fit(host: Host) -> None:
    (job,) = scenarios.worker_killed_in_mesh(host).jobs
    row = host.succeeds(job)
    assert (row.fitted, row.published, row.deaths) == (1, 2, 1)
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_worker_killed_while_publishing_publishes_once(host: Host) -> None:
    *before, job = scenarios.worker_killed_publishing(host).jobs
    row = host.succeeds(job)
    assert (row.fitted, row.published) == (1, 2)
    for earlier in before:
        host.succeeds(earlier)
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_worker_killed_about_the_time_of_publishing_publishes_once(host: Host) -> None:
    host.serve()
    chance = random.Random(0)  # noqa: S311 - not a secret
    jobs = []
    for _ in range(4):
        job = host.submit()
        jobs.append(job)
        until(host.report(job).exists, pause_s=0.001)
        time.sleep(chance.random() * 0.05)
        host.kill(host.process("worker"))
        until(lambda: host.processes("worker"))
    for job in jobs:
        assert host.succeeds(job).attempt <= 2
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_killed_api_comes_back_and_its_jobs_never_noticed(host: Host) -> None:
    (job,) = scenarios.api_killed(host).jobs
    row = host.succeeds(job)
    assert (row.attempt, row.deaths) == (1, 0)
    host.leaves_nothing_behind()


@on_both_slowly
def test_all_jobs_survive_the_death_of_everything(host: Host) -> None:
    first, second = scenarios.everything_killed(host).jobs
    cut_off, waited = host.succeeds(first), host.succeeds(second)
    assert (cut_off.attempt, waited.attempt) == (2, 1)
    assert cut_off.finished_at < waited.finished_at, "who was first goes on first"
    host.leaves_nothing_behind()


@on_both_slowly
def test_a_frozen_worker_that_comes_back_changes_nothing(host: Host) -> None:
    recovery, frozen = scenarios.worker_frozen(host)
    (job,) = recovery.jobs
    host.fitting(job, 2)
    frozen.resume()
    until(lambda: frozen not in host.processes())
    row = host.succeeds(job)
    assert (row.attempt, row.published, row.deaths) == (2, 2, 1)
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_worker_frozen_until_the_job_has_ended_changes_nothing(host: Host) -> None:
    recovery, frozen = scenarios.worker_frozen(host)
    (job,) = recovery.jobs
    before = host.succeeds(job)
    frozen.resume()
    until(lambda: frozen not in host.processes())
    assert host.succeeds(job) == before
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_hanging_worker_is_replaced_by_its_supervisor(host: Host) -> None:
    host.serve()
    job = host.submit()
    host.fitting(job)
    frozen = host.process("worker")
    host.freeze(frozen)
    until(lambda: frozen not in host.processes())
    row = host.succeeds(job)
    assert (row.attempt, row.deaths) == (2, 1)
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("supervised", [True, False])
def test_a_worker_frozen_while_it_writes_stops_nobody_for_good(host: Host, supervised: bool) -> None:
    recovery, frozen = scenarios.worker_frozen_writing(host, supervised=supervised)
    (job,) = recovery.jobs
    row = host.succeeds(job)
    assert (row.attempt, row.deaths) == (2, 1)
    if frozen in host.processes():  # SQLite's lock goes with its holder alone; PostgreSQL ends the connection
        assert not supervised
        assert not host.store.sqlite
        frozen.resume()
    until(lambda: frozen not in host.processes())
    assert host.row(job) == row
    host.leaves_nothing_behind()


@on_both_slowly
def test_a_worker_that_cannot_beat_for_three_leases_is_not_dead(host: Host) -> None:
    host.serve(lease_seconds=2)
    job = host.submit()
    host.fitting(job)
    with host.writing():
        time.sleep(6)
    row = host.succeeds(job)
    assert (row.attempt, row.deaths) == (1, 0)
    host.leaves_nothing_behind()


@on_both_slowly
def test_a_new_service_follows_at_once_on_one_whose_supervisor_was_killed(host: Host) -> None:
    serving = host.serve()
    job = host.submit()
    host.fitting(job)
    host.kill(serving)
    host.serve()
    assert host.succeeds(job).deaths <= 1
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_sigterm_lets_a_running_job_finish(host: Host) -> None:
    serving = host.serve(drain_seconds=600)
    job = host.submit()
    host.fitting(job)
    host.stop(serving)
    assert not host.processes()
    assert host.row(job).state == JobState.SUCCEEDED
    host.serve()
    row = host.succeeds(job)
    assert (row.attempt, row.deaths) == (1, 0)
    host.leaves_nothing_behind()


@on_both_slowly
def test_sigterm_with_no_time_to_finish_puts_the_job_back(host: Host) -> None:
    (job,) = scenarios.drained_and_started(host).jobs
    row = host.succeeds(job)
    assert (row.attempt, row.deaths) == (2, 0)
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_second_sigterm_does_not_wait_for_the_job(host: Host) -> None:
    serving = host.serve(drain_seconds=600)
    job = host.submit(preset="standard")
    host.fitting(job)
    serving.terminate()
    until(lambda: "once more" in host.said())
    host.stop(serving)
    assert host.row(job).state == JobState.QUEUED
    host.client.close()


@on_both_slowly
def test_a_job_that_kills_its_child_each_time_fails_and_the_next_one_runs(host: Host) -> None:
    host.serve()
    poison, good = host.submit(), host.submit()
    child = None
    for attempt in (1, 2, 3):
        host.running(poison, attempt)
        child = host.child(other_than=child)
        host.kill(child)
    row = host.fails(poison, "died")
    assert (row.attempt, row.deaths) == (3, 3)
    row = host.succeeds(good)
    assert (row.attempt, row.deaths) == (1, 0)
    host.leaves_nothing_behind()


@pytest.mark.slow
@on_both
def test_a_job_that_kills_its_worker_each_time_fails_and_the_next_one_runs(host: Host) -> None:
    host.serve()
    poison, good = host.submit(), host.submit()
    for attempt in (1, 2, 3):
        host.running(poison, attempt)
        host.kill(host.process("worker"))
    row = host.fails(poison, "died")
    assert (row.attempt, row.deaths) == (3, 3)
    assert host.succeeds(good).attempt == 1
    host.leaves_nothing_behind()
