"""Rows of the store as the answers of the interface."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock
from typing import Any

from sdfserver.schemas import Job, JobKind, JobState, Links, Problem
from sdfserver.server.liveness import living
from sdfserver.server.store import EVENT_COLUMNS, Row, Store

JOBS = "/v1/jobs"
QUEUE_SECONDS = 0.5
"""The queue is looked at this often at most, however many ask."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Places in the queue, and seconds to the end where they can be told, by job."""

    positions: Mapping[str, int] = field(default_factory=dict)
    etas: Mapping[str, float] = field(default_factory=dict)

    def place(self, job_id: str) -> tuple[int | None, float | None]:
        """Those of a job; None where it does not wait."""
        return self.positions.get(job_id), self.etas.get(job_id)


class QueueView:
    """Whose turn is when: positions in the queue and, where durations have been measured, seconds to the end."""

    def __init__(self, store: Store, lease_seconds: float) -> None:
        self._store, self._lease = store, lease_seconds
        self._lock = Lock()
        self._seen_at = float("-inf")
        self._turns = Turns()

    def turns(self, *jobs: Row) -> Turns:
        """The queue as it was a moment ago; as it is, where one of `jobs` waits that had not come by then."""
        with self._lock:
            unseen = any(job.state == JobState.QUEUED and job.id not in self._turns.positions for job in jobs)
            if unseen or time.monotonic() - self._seen_at > QUEUE_SECONDS:
                self._turns = self._look()
                self._seen_at = time.monotonic()
            return self._turns

    def _look(self) -> Turns:
        positions: dict[str, int] = {}
        etas: dict[str, float] = {}
        queue = self._store.queue()
        if not queue:
            return Turns()
        typical = self._store.typical_seconds()
        workers = len(living(self._store, self._lease))
        free_at, known = [0.0] * max(1, workers), workers > 0
        for row in queue:
            first = min(range(len(free_at)), key=free_at.__getitem__)
            if row.state == JobState.RUNNING:
                if row.eta_s is not None:
                    free_at[first] += row.eta_s
                else:
                    known = False
                continue
            positions[row.id] = len(positions) + 1
            stages = ["fit", "mesh"] if row.kind == JobKind.RECONSTRUCTION else ["mesh"]
            seconds = [typical.get((row.kind, row.preset, row.resolution, stage)) for stage in stages]
            known = known and None not in seconds
            if known:
                free_at[first] += sum(value for value in seconds if value is not None)
                etas[row.id] = free_at[first]
        return Turns(positions=positions, etas=etas)


def job_view(row: Row, turns: Turns, event: Mapping[str, Any] | None = None) -> Job:
    """A job as it stands, or as it stood at one of its events: whose turn it was then is not known."""
    now = {name: row._mapping[name] for name in EVENT_COLUMNS} | dict(event or {})
    state, path = JobState(now["state"]), f"{JOBS}/{row.id}"
    done = state is JobState.SUCCEEDED
    queued = state is JobState.QUEUED and event is None
    return Job(
        id=row.id,
        kind=JobKind(row.kind),
        parent_id=row.parent_id,
        name=row.name,
        state=state,
        stage=now["stage"],
        progress=min(1.0, max(0.0, now["progress"])),
        step=now["step"],
        steps=now["steps"],
        losses=now["losses"] or {},
        preview=now["preview"],
        eta_s=turns.etas.get(row.id) if queued else now["eta_s"],
        queue_position=turns.positions.get(row.id) if queued else None,
        priority=row.priority,
        attempt=now["attempt"],
        options=row.options,
        created_at=_time(row.created_at),
        started_at=_maybe_time(now["started_at"]),
        finished_at=_maybe_time(now["finished_at"]),
        expires_at=_maybe_time(now["expires_at"]),
        problem=None if now["problem"] is None else Problem(**now["problem"]),
        links=Links(
            self=path,
            events=f"{path}/events",
            cancel=f"{path}/cancel",
            mesh=f"{path}/mesh" if done else None,
            preview=f"{path}/preview" if done or (now["preview"] and not state.final) else None,
            points=f"{path}/points" if done or now["stage"] not in (None, "prepare") else None,
            picture=f"{path}/picture" if done else None,
            report=f"{path}/report" if done else None,
            field=f"{path}/field" if done else None,
            meshes=f"{path}/meshes" if done else None,
            sdf=f"{path}/sdf" if done else None,
            sdf_npz=f"{path}/sdf.npz" if done else None,
            slice=f"{path}/slice" if done else None,
            grid=f"{path}/grid" if done else None,
            onnx=f"{path}/onnx" if done else None,
            restart=f"{path}/restart",
            parent=f"{JOBS}/{row.parent_id}" if row.parent_id else None,
        ),
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _maybe_time(seconds: float | None) -> datetime | None:
    return None if seconds is None else _time(seconds)
