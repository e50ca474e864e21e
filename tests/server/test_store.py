"""The store: an attempt's holder alone may write; whatever the order of events, a job ends once."""

import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from sdfserver.schemas import JobKind, JobState
from sdfserver.server.store import (
    IdempotencyConflictError,
    NewJob,
    QueueFullError,
    QuotaError,
    Store,
    events,
    jobs,
    new_id,
    queue_order,
)

DIED = {"title": "T", "status": 500, "detail": "it died"}
KEEP_S = 60.0


@pytest.fixture
def store(database_url: str | None, tmp_path: Path) -> Iterator[Store]:
    """A store of its own where that is cheap, and the session's with empty tables where it is not."""
    url = f"sqlite:///{tmp_path}/store.sqlite3" if database_url is None else database_url
    store = Store(url.replace("postgresql://", "postgresql+psycopg://"))
    store.create_tables()
    yield store
    with store.engine.begin() as connection:
        ours = sa.select(jobs.c.id).where(jobs.c.owner == "a test")
        connection.execute(sa.delete(events).where(events.c.job_id.in_(ours)))
        connection.execute(sa.delete(jobs).where(jobs.c.owner == "a test"))
    store.close()


@pytest.fixture
def worker(store: Store) -> Iterator[str]:
    name = secrets.token_hex(8)
    store.register_worker(name, host="nowhere", pid=0, started=None, device="cpu")
    yield name
    store.retire(name)
    store.forget_workers([name])


def make(store: Store, *, max_queue: int = 1000, max_jobs: int = 1000, **changes: Any) -> str:
    values = {
        "id": new_id(), "owner": "a test", "kind": JobKind.RECONSTRUCTION, "name": "a.ply", "format": "ply",
        "options": {}, "preset": "draft", "resolution": 32, "priority": 0,
    } | changes  # fmt: skip
    row, _ = store.create_job(NewJob(**values), lambda *_: None, max_queue=max_queue, max_jobs=max_jobs)
    return str(row.id)


def state(store: Store, job_id: str) -> str:
    row = store.job(job_id)
    assert row is not None
    return str(row.state)


def test_a_job_that_cannot_be_enqueued_is_not_made(store: Store) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no queue")

    new = NewJob(
        id=new_id(), owner="a test", kind=JobKind.RECONSTRUCTION, name="a", format="ply", options={}, preset="draft",
        resolution=32, priority=0,
    )  # fmt: skip
    with pytest.raises(OSError, match="no queue"):
        store.create_job(new, fails, max_queue=9, max_jobs=9)
    assert store.job(new.id) is None


def test_limits_hold_however_many_come_at_once(store: Store) -> None:
    def one(_: int) -> str | None:
        try:
            return make(store, max_jobs=5)
        except QuotaError:
            return None

    with ThreadPoolExecutor(8) as pool:
        made = [job_id for job_id in pool.map(one, range(16)) if job_id]
    assert len(made) == 5
    with pytest.raises(QueueFullError):
        make(store, max_queue=5)


def test_a_key_makes_one_job_however_many_come_at_once(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: make(store, idempotency_key="once", request_hash="a"), range(16)))
    assert len(made) == 1
    with pytest.raises(IdempotencyConflictError):
        make(store, idempotency_key="once", request_hash="b")


def test_jobs_are_cancelled_or_published_and_never_both(store: Store, worker: str) -> None:
    for _ in range(10):
        attempt = store.begin_attempt(make(store), worker, 3, DIED, KEEP_S)
        assert attempt is not None
        barrier, done = threading.Barrier(2), {}

        def cancel(attempt=attempt, barrier=barrier, done=done) -> None:
            barrier.wait()
            done["cancelled"] = store.cancel(attempt.job_id, KEEP_S)

        def publish(attempt=attempt, barrier=barrier, done=done) -> None:
            barrier.wait()
            done["published"] = store.publish(attempt, {"mesh": 1.0}, KEEP_S)

        threads = [threading.Thread(target=cancel), threading.Thread(target=publish)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(done.values()) == [False, True]
        wanted = JobState.CANCELLED if done["cancelled"] else JobState.SUCCEEDED
        assert state(store, attempt.job_id) == wanted


def test_a_worker_that_lost_its_job_changes_nothing(store: Store, worker: str) -> None:
    job_id = make(store)
    old = store.begin_attempt(job_id, worker, 3, DIED, KEEP_S)
    new = store.begin_attempt(job_id, worker, 3, DIED, KEEP_S)
    assert old is not None
    assert new is not None
    assert (old.number, new.number) == (1, 2)
    before = store.job(job_id)
    assert not store.holds(old)
    assert not store.update(old, progress=0.9)
    assert not store.publish(old, {}, KEEP_S)
    assert not store.fail(old, DIED, KEEP_S)
    assert not store.release(old)
    assert store.job(job_id) == before
    assert store.publish(new, {}, KEEP_S)


def test_a_retired_worker_begins_nothing_and_does_not_come_back(store: Store, worker: str) -> None:
    job_id = make(store)
    assert store.beat(worker)
    store.retire(worker)
    assert not store.beat(worker)
    assert store.begin_attempt(job_id, worker, 3, DIED, KEEP_S) is None
    assert state(store, job_id) == JobState.QUEUED


def test_a_job_whose_attempts_die_fails_after_three_with_the_reason(store: Store, worker: str) -> None:
    job_id = make(store)
    for _ in range(3):
        assert store.begin_attempt(job_id, worker, 3, DIED, KEEP_S) is not None
    assert store.begin_attempt(job_id, worker, 3, DIED, KEEP_S) is None
    row = store.job(job_id)
    assert row is not None
    assert (row.state, row.problem, row.attempt, row.deaths) == (JobState.FAILED, DIED, 3, 3)
    assert row.expires_at is not None


def test_a_job_that_is_given_back_loses_no_attempt(store: Store, worker: str) -> None:
    job_id = make(store)
    for _ in range(5):
        attempt = store.begin_attempt(job_id, worker, 3, DIED, KEEP_S)
        assert attempt is not None
        assert store.release(attempt)
        assert state(store, job_id) == JobState.QUEUED
    row = store.job(job_id)
    assert row is not None
    assert row.deaths == 0


def test_a_dead_workers_jobs_have_one_heir_as_long_as_it_lives(store: Store, worker: str) -> None:
    names = [secrets.token_hex(8) for _ in range(2)]
    dead, other = names
    for name in names:
        store.register_worker(name, host="nowhere", pid=0, started=None, device="cpu")
    assert store.inherit(worker) == []
    store.retire(dead)
    assert store.inherit(worker) == [dead]
    assert store.inherit(worker) == [dead], "it may have been cut off"
    assert store.inherit(other) == []
    store.retire(worker)
    assert store.inherit(worker) == [], "a dead worker inherits nothing"
    assert sorted(store.inherit(other)) == sorted([dead, worker])
    store.retire(other)
    store.forget_workers(names)


def test_one_of_many_at_once_inherits(store: Store, worker: str) -> None:
    heirs = [secrets.token_hex(8) for _ in range(6)]
    for name in heirs:
        store.register_worker(name, host="nowhere", pid=0, started=None, device="cpu")
    store.retire(worker)
    with ThreadPoolExecutor(len(heirs)) as pool:
        assert sum(worker in found for found in pool.map(store.inherit, heirs)) == 1
    for name in heirs:
        store.retire(name)
    store.forget_workers(heirs)


def test_the_queue_runs_by_priority_then_arrival(store: Store) -> None:
    made = [make(store, priority=priority) for priority in (0, -10, 10, 0, 10)]
    ours = [row.id for row in store.queue() if row.id in made]
    assert ours == [made[i] for i in (2, 4, 0, 3, 1)]
    order = [queue_order(priority, seq) for seq, priority in enumerate((0, -10, 10, 0, 10))]
    assert sorted(range(5), key=order.__getitem__) == [2, 4, 0, 3, 1]
    assert all(0 < number < 2**31 for number in (queue_order(-10, 99_999_999), queue_order(10, 0)))


def test_typical_durations_are_of_the_last_ten(store: Store, worker: str) -> None:
    for seconds in (100.0, *range(1, 11)):
        attempt = store.begin_attempt(make(store, resolution=55), worker, 3, DIED, KEEP_S)
        assert attempt is not None
        store.publish(attempt, {"mesh": float(seconds)}, KEEP_S)
    assert store.typical_seconds()[JobKind.RECONSTRUCTION, "draft", 55, "mesh"] == pytest.approx(5.5)


def test_times_are_by_the_clock_of_the_database(store: Store) -> None:
    with store.engine.connect() as connection:
        first, second = (connection.execute(sa.select(store.now)).scalar_one() for _ in range(2))
    assert 1.7e9 < first <= second < first + 60


def test_a_removed_job_keeps_its_place_and_loses_its_events(store: Store, worker: str) -> None:
    job_id = make(store)
    assert [row.number for row in store.events_after(job_id, 0)] == [1]
    store.cancel(job_id, KEEP_S)
    store.remove(job_id)
    row = store.job(job_id)
    assert row is not None
    assert row.gone_at is not None
    assert store.events_after(job_id, 0) == []
    assert store.job(job_id, "somebody else") is None
