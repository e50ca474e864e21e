"""Who is alive: real processes, stopped and killed; and silences, by a clock of the test's."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from server.helpers import until

from sdfserver.server import liveness
from sdfserver.server.liveness import STALLED_LEASES, Identity, Sight, Watch, identity, living, sight
from sdfserver.server.store import Row, Store, workers

LEASE_S = 4.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/store.sqlite3")
    store.create_tables()
    yield store
    store.close()


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that does nothing."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets the looker's steady clock go on."""
    now = 100.0

    def later(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: now))
    return later


def register(store: Store, name: str, who: Identity) -> Row:
    store.register_worker(name, **vars(who), device="cpu")
    return row(store, name)


def row(store: Store, name: str) -> Row:
    (found,) = [found for found in store.workers() if found.id == name]
    return found


def names(rows: list[Row]) -> set[str]:
    return {row.id for row in rows}


def test_a_process_is_seen_to_run_to_be_stopped_and_to_be_gone(store: Store, process: subprocess.Popen[bytes]) -> None:
    worker = register(store, "it", identity(process.pid))
    assert sight(worker) is Sight.RUNS
    process.send_signal(signal.SIGSTOP)
    until(lambda: sight(worker) is Sight.STOPPED)
    process.send_signal(signal.SIGCONT)
    until(lambda: sight(worker) is Sight.RUNS)
    process.kill()
    until(lambda: sight(worker) is Sight.GONE)  # still a zombie
    process.wait()
    assert sight(worker) is Sight.GONE


def test_a_later_process_of_the_same_number_is_another(store: Store) -> None:
    me = identity()
    assert sight(register(store, "me", me)) is Sight.RUNS
    assert me.started is not None
    assert sight(register(store, "before", Identity(me.host, me.pid, me.started - 1))) is Sight.GONE


def test_a_process_of_another_host_or_container_cannot_be_seen(store: Store) -> None:
    me = identity()
    assert sight(register(store, "far", Identity("elsewhere", me.pid, me.started))) is Sight.HIDDEN


def test_a_process_that_is_gone_is_dead_at_once(store: Store, process: subprocess.Popen[bytes]) -> None:
    register(store, "it", identity(process.pid))
    watch = Watch(store, LEASE_S)
    assert watch.dead() == []
    process.kill()
    process.wait()
    assert names(watch.dead()) == {"it"}
    assert living(store, LEASE_S) == []


def test_what_cannot_be_seen_is_dead_after_a_lease_without_a_beat(store: Store, tick: Callable[[float], None]) -> None:
    register(store, "far", Identity("elsewhere", 1, 1))
    watch = Watch(store, LEASE_S)
    for _ in range(5):
        assert watch.dead() == []
        tick(0.8)
        store.beat("far")
    for _ in range(5):
        assert watch.dead() == []
        tick(0.8)
    tick(0.8)
    assert names(watch.dead()) == {"far"}
    store.beat("far")
    assert watch.dead() == []


def test_a_process_that_runs_has_longer_than_one_that_is_stopped(
    store: Store, tick: Callable[[float], None], process: subprocess.Popen[bytes]
) -> None:
    stopped = register(store, "stopped", identity(process.pid))
    process.send_signal(signal.SIGSTOP)
    until(lambda: sight(stopped) is Sight.STOPPED)
    register(store, "late", identity())
    watch = Watch(store, LEASE_S)
    died = {}
    for look in range(60):
        for name in names(watch.dead()):
            died.setdefault(name, look)
        tick(1.0)
    assert LEASE_S < died["stopped"] <= LEASE_S + 1
    assert STALLED_LEASES * LEASE_S < died["late"] <= STALLED_LEASES * LEASE_S + 1


def test_a_looker_that_slept_accuses_nobody(store: Store, tick: Callable[[float], None]) -> None:
    register(store, "far", Identity("elsewhere", 1, 1))
    watch = Watch(store, LEASE_S)
    for _ in range(3):
        assert watch.dead() == []
        tick(3600.0)
    assert watch.dead() == []


def test_a_clock_that_is_set_accuses_nobody(store: Store, tick: Callable[[float], None]) -> None:
    register(store, "far", Identity("elsewhere", 1, 1))
    watch = Watch(store, LEASE_S)
    assert watch.dead() == []
    with store.engine.begin() as connection:
        connection.execute(sa.update(workers).values(beat_at=workers.c.beat_at - 3600))
    tick(0.5)
    assert watch.dead() == []


def test_those_that_were_heard_of_live(store: Store) -> None:
    register(store, "far", Identity("elsewhere", 1, 1))
    register(store, "me", identity())
    assert names(living(store, LEASE_S)) == {"far", "me"}
    with store.engine.begin() as connection:
        connection.execute(sa.update(workers).values(beat_at=workers.c.beat_at - 3600))
    assert names(living(store, LEASE_S)) == {"me"}, "it is seen to run"
    store.retire("me")
    assert living(store, LEASE_S) == []
