"""Jobs that are followed: looked at together, a few times a second, however many streams of events follow them."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from sdfserver.server.store import Row, Store
from sdfserver.server.views import QueueView, Turns

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""How often."""


@dataclass(frozen=True, eq=False)
class Sighting:
    """A job as it was seen, None where it is gone, and the queue with it."""

    row: Row | None
    turns: Turns

    def tells_as_much_as(self, other: "Sighting") -> bool:
        """Whether there is nothing new."""
        if self.row is None or other.row is None:
            return self.row is other.row
        job = self.row.id
        return (self.row.event, self.row.gone_at) == (other.row.event, other.row.gone_at) and (
            self.turns.place(job) == other.turns.place(job)
        )


@dataclass(eq=False)
class Followed:
    """A job, and who waits for news of it."""

    streams: int = 0
    seen: Sighting | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def news(self, since: Sighting | None) -> Sighting:
        """The job as it was seen last, as soon as there is more to tell than `since`."""
        while self.seen is None or self.seen is since:
            await self.changed.wait()
        return self.seen


class Lookout:
    """Looks at the jobs that somebody follows, and at nothing while nobody does."""

    def __init__(self, store: Store, view: QueueView) -> None:
        self._store, self._view = store, view
        self._followed: dict[str, Followed] = {}
        self._due = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def follow(self, job_id: str) -> AsyncIterator[Followed]:
        """Follow a job; it is looked at at once."""
        followed = self._followed.setdefault(job_id, Followed())
        followed.streams += 1
        self._due.set()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_out())
        try:
            yield followed
        finally:
            followed.streams -= 1
            if not followed.streams:
                del self._followed[job_id]

    async def _look_out(self) -> None:
        while self._followed:
            self._due.clear()
            try:
                await self._look()
            except Exception:
                log.exception("the jobs that are followed could not be looked at; it is tried again")
            try:
                await asyncio.wait_for(self._due.wait(), LOOK_SECONDS)
            except TimeoutError:
                continue

    async def _look(self) -> None:
        ids = list(self._followed)
        rows = {row.id: row for row in await run_in_threadpool(self._store.jobs_of, ids)}
        turns = await run_in_threadpool(self._view.turns, *rows.values())
        for job_id in ids:
            followed = self._followed.get(job_id)
            if followed is None:
                continue
            sighting = Sighting(rows.get(job_id), turns)
            if followed.seen is None or not sighting.tells_as_much_as(followed.seen):
                followed.seen = sighting
                followed.changed.set()  # those who wait now; whoever comes to wait later has seen this
                followed.changed.clear()
