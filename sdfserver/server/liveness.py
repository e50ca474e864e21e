"""Who is alive: a worker is known by its beats and, where it can be seen, by what the system says of its process.

- A process that is gone is dead at once.
- One that is stopped, or cannot be seen from here, is taken for dead after a lease without a beat.
- One that is there and not stopped has STALLED_LEASES: on a busy machine it is late far more often than it hangs.

Silence is what the looker has lived through itself, by its own steady clock and in looks close to each other. So a
clock that jumps, a machine that slept or a container that was paused accuses nobody.
"""

import os
import socket
import time
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path

import psutil

from sdfserver.server.store import Row, Store

STALLED_LEASES = 10
"""Leases without a beat after which a process that seems to run is taken for dead: it hangs."""
LONGEST_LOOK_SECONDS = 1.0
"""What one look adds to a silence at most."""


class Sight(Enum):
    """What can be seen of a worker's process from here."""

    RUNS = auto()
    STOPPED = auto()
    GONE = auto()
    HIDDEN = auto()
    """It is on another host, or in another container."""


@dataclass(frozen=True)
class Identity:
    """A process, told apart from every other one: also from a later one of its number."""

    host: str
    pid: int
    started: int | None
    """Ticks from the boot until it started; None where the system does not tell."""


def identity(pid: int | None = None) -> Identity:
    """That of the process `pid` of this host, or of this process."""
    pid = os.getpid() if pid is None else pid
    return Identity(host=this_host(), pid=pid, started=_started(pid))


@cache
def this_host() -> str:
    """A name shared by exactly those processes that can see each other: of one host, boot and process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:  # not Linux
        return socket.gethostname()
    return f"{socket.gethostname()} {boot} {namespace}"


def sight(worker: Row) -> Sight:
    """What can be seen of a worker's process."""
    if worker.host != this_host():
        return Sight.HIDDEN
    try:
        status = psutil.Process(worker.pid).status()
    except psutil.NoSuchProcess:
        return Sight.GONE
    except psutil.AccessDenied:
        return Sight.RUNS
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) or worker.started != _started(worker.pid):
        return Sight.GONE
    return Sight.STOPPED if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else Sight.RUNS


def living(store: Store, lease_seconds: float) -> list[Row]:
    """The workers that are there to take jobs, as far as one look can tell."""
    rows = [(row, sight(row)) for row in store.workers()]
    return [
        row
        for row, seen in rows
        if seen is Sight.RUNS or (seen is not Sight.GONE and row.silence < STALLED_LEASES * lease_seconds)
    ]


@dataclass
class _Silence:
    beat_at: float
    seconds: float = 0.0


class Watch:
    """Looks at the workers again and again, and tells who is dead."""

    def __init__(self, store: Store, lease_seconds: float) -> None:
        self._store, self._lease = store, lease_seconds
        self._silences: dict[str, _Silence] = {}
        self._looked_at: float | None = None

    def dead(self) -> list[Row]:
        """The workers that are dead and not yet retired. To be asked several times a second."""
        rows = self._store.workers()
        now = time.monotonic()
        passed = 0.0 if self._looked_at is None else min(now - self._looked_at, LONGEST_LOOK_SECONDS)
        self._looked_at = now
        before, self._silences = self._silences, {}
        for row in rows:
            silence = before.get(row.id)
            if silence is None or silence.beat_at != row.beat_at:
                silence = _Silence(row.beat_at)
            else:
                silence.seconds += passed
            self._silences[row.id] = silence
        return [row for row in rows if self._is_dead(row)]

    def _is_dead(self, row: Row) -> bool:
        seen = sight(row)
        leases = STALLED_LEASES if seen is Sight.RUNS else 1
        return seen is Sight.GONE or self._silences[row.id].seconds > leases * self._lease


def _started(pid: int) -> int | None:
    # Not psutil's create_time, which moves when the clock is set.
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        return int(after_name.split()[19])  # field 22 of proc(5); the first after the name is field 3
    except (OSError, ValueError, IndexError):
        return None
