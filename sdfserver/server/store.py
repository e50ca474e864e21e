"""All SQL of the service: jobs, their events, workers, API keys. SQLite and PostgreSQL alike.

The jobs table is the truth that the API serves. Whatever a worker writes about a job it writes as the holder of an
attempt: every such update names the attempt and the worker, and changes nothing when another holds the job by then.
Clocks: seconds since 1970 by the database's clock, so that hosts whose clocks differ agree on leases.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import JSON, BigInteger, Boolean, Column, Float, Integer, MetaData, String, Table, UniqueConstraint
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import Connection, Engine

from sdfserver.schemas import JobKind, JobState
from sdfserver.server.artifacts import Kept
from sdfserver.server.migrations import migrate

_PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
"""How long, in seconds and milliseconds, PostgreSQL may stay silent before a connection is given up: without it a cut
cable would hold a query for a quarter of an hour."""
IDLE_SECONDS = 10
"""How long a transaction may rest before PostgreSQL ends it: a worker that is stopped in the middle of one holds locks
that whoever recovers its job waits for, and nobody else can end it where it is on another host."""
STAGE_BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 20, 60, 300, 1800)
"""Upper bounds, in seconds, of the buckets in which stages of jobs are counted."""
TYPICAL_OF = 10
"""A typical duration is the mean over this many of the last jobs of a kind."""
_ACTIVE = (JobState.QUEUED, JobState.RUNNING)
_SEQUENCE = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up by itself in an INTEGER key alone

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("seq", _SEQUENCE, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("owner", String(32), nullable=False),  # an API key's id, or empty
    Column("kind", String(16), nullable=False),
    Column("parent_id", String(32)),
    Column("name", String(255), nullable=False),
    Column("format", String(8), nullable=False),
    Column("options", JSON, nullable=False),
    Column("preset", String(16), nullable=False),
    Column("resolution", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("stage", String(16)),
    Column("progress", Float, nullable=False, default=0.0),
    Column("step", Integer),
    Column("steps", Integer),
    Column("losses", JSON, nullable=False, default=dict),
    Column("eta_s", Float),
    Column("attempt", Integer, nullable=False, default=0),  # how many were started
    Column("deaths", Integer, nullable=False, default=0),  # how many of them ended without a word
    Column("worker", String(64)),
    Column("fitted", Integer),  # the attempt whose folder has the field
    Column("published", Integer),  # the attempt whose folder has the mesh
    Column("preview", Integer),  # how many surfaces the attempt has shown while it forms
    Column("seconds", JSON, nullable=False, default=dict),
    Column("problem", JSON),
    Column("event", Integer, nullable=False, default=0),  # number of its last event
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("expires_at", Float),
    Column("gone_at", Float),
    Column("idempotency_key", String(255)),
    Column("request_hash", String(64)),
    Column("request_id", String(64)),  # of the HTTP request that made it, to join the logs by
    Column("traceparent", String(55)),  # of that request's span, to join the spans of its work to
    Column("step_at", Float),  # when the attempt at the step under way began
    UniqueConstraint("owner", "idempotency_key"),
    sa.Index("jobs_queue", "state", "priority", "seq"),
    sa.Index("jobs_owner", "owner", "seq"),
    sqlite_autoincrement=True,
)
events = Table(
    "job_events",
    metadata,
    Column("job_id", String(32), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("body", JSON, nullable=False),
)
workers = Table(
    "workers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", BigInteger),  # ticks from the boot: tells the process from a later one of its number
    Column("device", String(64), nullable=False),
    Column("beat_at", Float, nullable=False),
    Column("retired", Boolean, nullable=False, default=False),
    Column("heir", String(64)),  # the worker that puts a retired one's jobs back into the queue
    Column("figures", JSON),  # what its device says of itself
)
totals = Table(
    "totals",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("labels", String(255), primary_key=True),  # label=value, joined by commas
    Column("value", Float, nullable=False),
)
"""Counts that only rise: they outlive the jobs that they are of, and any process."""
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("max_jobs", Integer),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

Row = sa.Row[*tuple[Any, ...]]


class StoreError(Exception):
    """The root of what the store refuses."""


class IdempotencyConflictError(StoreError):
    """The Idempotency-Key was used before, with another request."""


class QueueFullError(StoreError):
    """No more jobs may wait; `limit` says how many may."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} jobs are waiting")
        self.limit = limit


class QuotaError(QueueFullError):
    """The owner has as many unfinished jobs as it may."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be: what its row holds when it is made."""

    id: str
    owner: str
    kind: JobKind
    name: str
    format: str
    options: dict[str, Any]
    preset: str
    resolution: int
    priority: int
    parent_id: str | None = None
    idempotency_key: str | None = None
    request_hash: str | None = None
    request_id: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The right to work on a job: only its holder's updates count."""

    job_id: str
    number: int
    worker: str


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """Who is asking. The empty id is anybody, where no keys are in use."""

    id: str = ""
    name: str = ""
    max_jobs: int | None = None


def new_id() -> str:
    """An identifier that cannot be guessed."""
    return secrets.token_hex(16)


class Store:
    """The database. `engine` begins every transaction as a writer; reads go through another that never waits."""

    def __init__(self, url: str) -> None:
        self.sqlite = sa.make_url(url).get_backend_name() == "sqlite"
        if self.sqlite:
            self.engine = _sqlite_engine(url, "BEGIN IMMEDIATE")
            self._reader = _sqlite_engine(url, "BEGIN")
            self.now: sa.ColumnElement[float] = sa.literal_column("(julianday('now') - 2440587.5) * 86400.0", sa.Float)
        else:
            self.engine = self._reader = sa.create_engine(
                url, pool_size=10, max_overflow=20, pool_pre_ping=True, connect_args=_PATIENCE
            )
            sa.event.listen(self.engine, "connect", _limit_idleness)
            self.now = sa.literal_column("extract(epoch from clock_timestamp())::float8", sa.Float)

    def create_tables(self, when_new: Callable[[], None] = lambda: None) -> tuple[str | None, str]:
        """Make what is missing, or bring it up to date; several processes may do so at once. Versions before and after.

        `when_new` is called first where there is nothing yet, and may raise. Raises ConfigError where the database is a
        later sdfserver's.
        """
        return migrate(self.engine, when_new)

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()
        self._reader.dispose()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._reader.connect() as connection:
            yield connection

    def check(self) -> None:
        """Raise where the database does not answer."""
        with self._read() as connection:
            connection.execute(sa.select(sa.func.count()).select_from(jobs).where(jobs.c.seq < 0))

    # Jobs

    def create_job(
        self,
        new: NewJob,
        enqueue: Callable[[Connection, str, int], None],
        *,
        max_queue: int,
        max_jobs: int,
        upload_bytes: int = 0,
    ) -> tuple[Row, bool]:
        """The row of a new job, enqueued in the same transaction, or of the one made by the same request before.

        The second value says which. Raises IdempotencyConflictError, QueueFullError, QuotaError.
        """
        with self.engine.begin() as connection:
            if not self.sqlite:
                # Serialises the limits and the key; SQLite's writers are serial as they are.
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7345294)"))
            if new.idempotency_key is not None:
                earlier = connection.execute(
                    sa.select(jobs).where(jobs.c.owner == new.owner, jobs.c.idempotency_key == new.idempotency_key)
                ).first()
                if earlier is not None:
                    if earlier.request_hash != new.request_hash:
                        raise IdempotencyConflictError
                    return earlier, True
            count = sa.select(sa.func.count()).select_from(jobs)
            if connection.execute(count.where(jobs.c.state == JobState.QUEUED)).scalar_one() >= max_queue:
                raise QueueFullError(max_queue)
            if (
                connection.execute(count.where(jobs.c.state.in_(_ACTIVE), jobs.c.owner == new.owner)).scalar_one()
                >= max_jobs
            ):
                raise QuotaError(max_jobs)
            values = vars(new) | {"state": JobState.QUEUED, "created_at": self.now}
            seq = connection.execute(sa.insert(jobs).values(**values).returning(jobs.c.seq)).scalar_one()
            enqueue(connection, new.id, queue_order(new.priority, seq))
            self._event(connection, new.id)
            added = {("jobs_submitted", f"kind={new.kind},preset={new.preset}"): 1.0}
            self._add(connection, added | ({("upload_bytes", ""): float(upload_bytes)} if upload_bytes else {}))
            return connection.execute(sa.select(jobs).where(jobs.c.seq == seq)).one(), False

    def job(self, job_id: str, owner: str | None = None) -> Row | None:
        """The row of a job; with an owner, only if it is that owner's."""
        query = sa.select(jobs).where(jobs.c.id == job_id)
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        with self._read() as connection:
            return connection.execute(query).first()

    def jobs_of(self, ids: Sequence[str]) -> Sequence[Row]:
        """The rows of some jobs, whosever they are."""
        with self._read() as connection:
            return connection.execute(sa.select(jobs).where(jobs.c.id.in_(ids))).all()

    def list_jobs(
        self, owner: str, *, state: JobState | None = None, before: int | None = None, limit: int = 50
    ) -> Sequence[Row]:
        """The owner's jobs, newest first, older than the one numbered `before`."""
        query = sa.select(jobs).where(jobs.c.owner == owner, jobs.c.gone_at.is_(None))
        if state is not None:
            query = query.where(jobs.c.state == state)
        if before is not None:
            query = query.where(jobs.c.seq < before)
        with self._read() as connection:
            return connection.execute(query.order_by(jobs.c.seq.desc()).limit(limit)).all()

    def queue(self) -> Sequence[Row]:
        """Who runs and who waits, in the order of their turn: id, state, kind, preset, resolution, eta_s."""
        query = (
            sa.select(jobs.c.id, jobs.c.state, jobs.c.kind, jobs.c.preset, jobs.c.resolution, jobs.c.eta_s)
            .where(jobs.c.state.in_(_ACTIVE))
            .order_by((jobs.c.state == JobState.QUEUED), jobs.c.priority.desc(), jobs.c.seq)
        )
        with self._read() as connection:
            return connection.execute(query).all()

    def typical_seconds(self) -> dict[tuple[str, str, int, str], float]:
        """Mean seconds of the last finished jobs, by kind, preset, resolution, and stage ("fit", "mesh")."""
        query = (
            sa.select(jobs.c.kind, jobs.c.preset, jobs.c.resolution, jobs.c.seconds)
            .where(jobs.c.state == JobState.SUCCEEDED)
            .order_by(jobs.c.seq.desc())
            .limit(20 * TYPICAL_OF)
        )
        seen: dict[tuple[str, str, int, str], list[float]] = {}
        with self._read() as connection:
            for kind, preset, resolution, seconds in connection.execute(query):
                for stage, value in (seconds or {}).items():
                    seen.setdefault((kind, preset, resolution, stage), []).append(value)
        return {key: sum(values[:TYPICAL_OF]) / len(values[:TYPICAL_OF]) for key, values in seen.items()}

    def events_after(self, job_id: str, number: int, limit: int = 200) -> Sequence[Row]:
        """The job's events after the one numbered `number`, oldest first."""
        query = (
            sa.select(events)
            .where(events.c.job_id == job_id, events.c.number > number)
            .order_by(events.c.number)
            .limit(limit)
        )
        with self._read() as connection:
            return connection.execute(query).all()

    def totals(self) -> dict[tuple[str, str], float]:
        """All counts that only rise, by name and labels."""
        with self._read() as connection:
            return {(row.name, row.labels): row.value for row in connection.execute(sa.select(totals))}

    def oldest_wait(self) -> float:
        """Seconds that the first of those who wait has been waiting; 0 where nobody does."""
        query = sa.select(self.now - sa.func.min(jobs.c.created_at)).where(jobs.c.state == JobState.QUEUED)
        with self._read() as connection:
            return max(0.0, connection.execute(query).scalar() or 0.0)

    def last_failures(self, limit: int) -> Sequence[Row]:
        """The jobs that failed last, latest first: id, name, problem, `ago` in seconds."""
        ago = (self.now - jobs.c.finished_at).label("ago")
        query = (
            sa.select(jobs.c.id, jobs.c.name, jobs.c.problem, ago)
            .where(jobs.c.state == JobState.FAILED, jobs.c.gone_at.is_(None))
            .order_by(jobs.c.finished_at.desc())
            .limit(limit)
        )
        with self._read() as connection:
            return connection.execute(query).all()

    def running(self) -> Sequence[Row]:
        """The jobs under way: id, worker, stage, progress, attempt, name."""
        columns = (jobs.c.id, jobs.c.worker, jobs.c.stage, jobs.c.progress, jobs.c.attempt, jobs.c.name)
        with self._read() as connection:
            return connection.execute(sa.select(*columns).where(jobs.c.state == JobState.RUNNING)).all()

    def counts(self) -> dict[str, int]:
        """How many jobs there are in each state."""
        query = sa.select(jobs.c.state, sa.func.count()).where(jobs.c.gone_at.is_(None)).group_by(jobs.c.state)
        with self._read() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def cancel(self, job_id: str, expires_in: float) -> bool:
        """End an unfinished job; its worker sees that within a moment. False if it had ended."""
        with self.engine.begin() as connection:
            return self._finish(connection, jobs.c.id == job_id, JobState.CANCELLED, expires_in)

    def remove(self, job_id: str) -> None:
        """Make a job gone: what is left of it is a tombstone."""
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(jobs).where(jobs.c.id == job_id, jobs.c.gone_at.is_(None)).values(gone_at=self.now)
            )
            connection.execute(sa.delete(events).where(events.c.job_id == job_id))

    def expire(self, gone_seconds: float) -> tuple[list[str], list[str]]:
        """Jobs whose time has come to go, made tombstones; and tombstones that were old enough to go, deleted."""
        with self.engine.begin() as connection:
            over = (
                connection.execute(
                    sa.update(jobs)
                    .where(jobs.c.gone_at.is_(None), jobs.c.expires_at < self.now)
                    .values(gone_at=self.now)
                    .returning(jobs.c.id)
                )
                .scalars()
                .all()
            )
            connection.execute(sa.delete(events).where(events.c.job_id.in_(over)))
            old = (
                connection.execute(
                    sa.delete(jobs)
                    .where(jobs.c.gone_at < self.now - gone_seconds, jobs.c.state.notin_(_ACTIVE))
                    .returning(jobs.c.id)
                )
                .scalars()
                .all()
            )
        return list(over), list(old)

    def kept(self, ids: Sequence[str]) -> dict[str, Kept]:
        """Those of the jobs `ids` whose files are wanted, and how much of each."""
        query = sa.select(jobs.c.id, jobs.c.state, jobs.c.fitted, jobs.c.published).where(
            jobs.c.id.in_(ids), jobs.c.gone_at.is_(None)
        )
        with self._read() as connection:
            return {
                row.id: Kept(
                    ended=JobState(row.state).final,
                    fitted=row.fitted if row.state == JobState.SUCCEEDED else None,
                    published=row.published,
                )
                for row in connection.execute(query)
            }

    # A worker's side of a job

    def begin_attempt(
        self, job_id: str, worker: str, max_attempts: int, died: Mapping[str, Any], expires_in: float
    ) -> Attempt | None:
        """The right to work on a job, or None when there is nothing to do: it has ended, or this worker is retired.

        A job that is found running was left by a process that died. After `max_attempts` such deaths it fails with the
        problem `died`.
        """
        with self.engine.begin() as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id).with_for_update()).first()
            if row is None or row.state not in _ACTIVE or not self._alive(connection, worker):
                return None
            if row.state == JobState.RUNNING and not self._may_restart(connection, row, max_attempts, died, expires_in):
                return None
            attempt = Attempt(job_id=job_id, number=row.attempt + 1, worker=worker)
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id)
                .values(
                    state=JobState.RUNNING,
                    attempt=attempt.number,
                    worker=worker,
                    stage="prepare" if row.fitted is None and row.kind == JobKind.RECONSTRUCTION else "mesh",
                    progress=0.0 if row.fitted is None else row.progress,
                    preview=None if row.fitted is None else row.preview,
                    step=None,
                    steps=None,
                    eta_s=None,
                    step_at=self.now,
                    started_at=sa.func.coalesce(jobs.c.started_at, self.now),
                )
            )
            self._event(connection, job_id)
            return attempt

    def holds(self, attempt: Attempt) -> bool:
        """Whether the attempt is still the job's."""
        with self._read() as connection:
            return connection.execute(sa.select(jobs.c.seq).where(_held(attempt))).first() is not None

    def update(self, attempt: Attempt, **values: Any) -> bool:
        """Change columns of a job that the attempt holds. False, and nothing changed, if it does not."""
        if "fitted" in values:  # with that the next step begins
            values |= {"step_at": self.now}
        with self.engine.begin() as connection:
            changed = connection.execute(sa.update(jobs).where(_held(attempt)).values(**values)).rowcount == 1
            if changed:
                self._event(connection, attempt.job_id, kind="progress")
            return changed

    def publish(self, attempt: Attempt, seconds: Mapping[str, float], expires_in: float) -> bool:
        """End the job with the attempt's mesh. False if the attempt does not hold it any more."""
        with self.engine.begin() as connection:
            row = connection.execute(sa.select(jobs.c.seconds).where(_held(attempt)).with_for_update()).first()
            return row is not None and self._finish(
                connection,
                _held(attempt),
                JobState.SUCCEEDED,
                expires_in,
                published=attempt.number,
                progress=1.0,
                seconds={**(row.seconds or {}), **seconds},
            )

    def fail(self, attempt: Attempt, problem: Mapping[str, Any], expires_in: float) -> bool:
        """End the job with a reason. False if the attempt does not hold it any more."""
        with self.engine.begin() as connection:
            return self._finish(connection, _held(attempt), JobState.FAILED, expires_in, problem=dict(problem))

    def release(self, attempt: Attempt) -> bool:
        """Put the job back into the queue, with no harm to its count of deaths."""
        with self.engine.begin() as connection:
            changed = connection.execute(
                sa.update(jobs).where(_held(attempt)).values(state=JobState.QUEUED, worker=None, stage=None, eta_s=None)
            ).rowcount
            if changed:
                self._event(connection, attempt.job_id)
            return changed == 1

    def lose(
        self, job_id: str, dead_worker: str, max_attempts: int, died: Mapping[str, Any], expires_in: float
    ) -> Row | None:
        """Put the job of a dead worker back into the queue, or fail it after `max_attempts` deaths.

        The job as it was; None if it was not that worker's any more.
        """
        with self.engine.begin() as connection:
            row = connection.execute(
                sa.select(jobs)
                .where(jobs.c.id == job_id, jobs.c.worker == dead_worker, jobs.c.state == JobState.RUNNING)
                .with_for_update()
            ).first()
            if row is not None and self._may_restart(connection, row, max_attempts, died, expires_in):
                connection.execute(
                    sa.update(jobs)
                    .where(jobs.c.id == job_id)
                    .values(state=JobState.QUEUED, worker=None, stage=None, eta_s=None)
                )
                self._event(connection, job_id)
                self._add(connection, {("recoveries", ""): 1.0})
            return row

    # Workers

    def register_worker(self, worker: str, *, host: str, pid: int, started: int | None, device: str) -> None:
        """Add a worker; its id has never been used before."""
        with self.engine.begin() as connection:
            connection.execute(
                sa.insert(workers).values(
                    id=worker, host=host, pid=pid, started=started, device=device, beat_at=self.now
                )
            )

    def beat(self, worker: str, figures: Mapping[str, float] | None = None) -> bool:
        """Say that the worker is alive, and what its device says, if that is known. False if it was taken for dead."""
        values = {"beat_at": self.now} | ({} if figures is None else {"figures": dict(figures)})
        with self.engine.begin() as connection:
            alive = workers.c.id == worker, workers.c.retired.is_(False)
            return connection.execute(sa.update(workers).where(*alive).values(**values)).rowcount == 1

    def retire(self, worker: str) -> None:
        """Take a worker for dead, for good."""
        with self.engine.begin() as connection:
            connection.execute(sa.update(workers).where(workers.c.id == worker).values(retired=True))

    def workers(self) -> Sequence[Row]:
        """The workers that have not been taken for dead; `silence` is the seconds since the last beat of each."""
        silence = (self.now - workers.c.beat_at).label("silence")
        with self._read() as connection:
            return connection.execute(sa.select(workers, silence).where(workers.c.retired.is_(False))).all()

    def inherit(self, worker: str) -> list[str]:
        """The retired workers whose jobs are for `worker`, and nobody else while it lives, to put back into the queue.

        If two did that for one job, the second could take it away from whoever runs it by then.
        """
        with self._read() as connection:
            if connection.execute(sa.select(workers.c.id).where(workers.c.retired.is_(True))).first() is None:
                return []
        alive = workers.alias()
        living = sa.select(alive.c.id).where(alive.c.retired.is_(False))
        with self.engine.begin() as connection:
            if not self._alive(connection, worker):
                return []
            connection.execute(
                sa.update(workers)
                .where(workers.c.retired.is_(True), workers.c.heir.is_(None) | workers.c.heir.notin_(living))
                .values(heir=worker)
            )
            mine = workers.c.retired.is_(True), workers.c.heir == worker
            return list(connection.execute(sa.select(workers.c.id).where(*mine)).scalars())

    def forget_workers(self, ids: Sequence[str]) -> None:
        """Remove workers that are dead and have nothing left to recover."""
        with self.engine.begin() as connection:
            connection.execute(sa.delete(workers).where(workers.c.id.in_(ids), workers.c.retired.is_(True)))

    # API keys

    def create_key(self, name: str, max_jobs: int | None = None) -> tuple[str, str]:
        """A new API key's id and its secret, which is not stored: only its hash is."""
        with self.engine.begin() as connection:
            return self._add_key(connection, name, max_jobs)

    def create_first_key(self, name: str, max_jobs: int | None = None) -> tuple[str, str] | None:
        """A new API key, or None where one was made before: of several who ask at once, one gets it."""
        with self.engine.begin() as connection:
            if not self.sqlite:  # whose writers are serial as they are
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7345295)"))
            if connection.execute(sa.select(api_keys.c.id)).first() is not None:
                return None
            return self._add_key(connection, name, max_jobs)

    def _add_key(self, connection: Connection, name: str, max_jobs: int | None) -> tuple[str, str]:
        key_id, secret = secrets.token_hex(4), f"sdf_{secrets.token_urlsafe(32)}"
        connection.execute(
            sa.insert(api_keys).values(id=key_id, name=name, hash=_hash(secret), max_jobs=max_jobs, created_at=self.now)
        )
        return key_id, secret

    def revoke_key(self, key_id: str) -> bool:
        """End a key's use. False if there is none of that id in use."""
        with self.engine.begin() as connection:
            live = api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None)
            return connection.execute(sa.update(api_keys).where(*live).values(revoked_at=self.now)).rowcount == 1

    def list_keys(self) -> Sequence[Row]:
        """All keys that were ever made, oldest first."""
        with self._read() as connection:
            return connection.execute(sa.select(api_keys).order_by(api_keys.c.created_at)).all()

    def authenticate(self, secret: str | None) -> ApiKey | None:
        """Whose key `secret` is; anybody's where no key was ever made; None if it is nobody's."""
        rows = self.list_keys()
        if not rows:
            return ApiKey()
        given, found = _hash(secret or ""), None
        for row in rows:  # all of them, each in constant time
            if secrets.compare_digest(row.hash, given) and row.revoked_at is None:
                found = row
        return None if found is None else ApiKey(id=found.id, name=found.name, max_jobs=found.max_jobs)

    # Within a transaction

    def _alive(self, connection: Connection, worker: str) -> bool:
        alive = workers.c.id == worker, workers.c.retired.is_(False)
        return connection.execute(sa.select(workers.c.id).where(*alive)).first() is not None

    def _may_restart(
        self, connection: Connection, row: Row, max_attempts: int, died: Mapping[str, Any], expires_in: float
    ) -> bool:
        """Count a death of the job's process: whether it may be started again; if not, it has failed."""
        connection.execute(sa.update(jobs).where(jobs.c.seq == row.seq).values(deaths=row.deaths + 1))
        self._add(connection, {("deaths", ""): 1.0})
        if row.deaths + 1 < max_attempts:
            return True
        self._finish(connection, jobs.c.seq == row.seq, JobState.FAILED, expires_in, problem=dict(died))
        return False

    def _finish(
        self,
        connection: Connection,
        where: sa.ColumnElement[bool],
        state: JobState,
        expires_in: float,
        **values: Any,
    ) -> bool:
        row = connection.execute(
            sa.update(jobs)
            .where(where, jobs.c.state.in_(_ACTIVE))
            .values(
                state=state, finished_at=self.now, eta_s=None, stage=None, expires_at=self.now + expires_in, **values
            )
            .returning(jobs.c.id, jobs.c.problem, jobs.c.seconds, jobs.c.created_at, jobs.c.started_at)
        ).first()
        if row is None:
            return False
        self._event(connection, row.id)
        reason = (row.problem or {}).get("type", "").rpartition(":")[2]
        added = {("jobs_ended", f"state={state},reason={reason}"): 1.0}
        seconds = dict(row.seconds or {}) if state == JobState.SUCCEEDED else {}
        if row.started_at is not None:
            seconds["wait"] = max(0.0, row.started_at - row.created_at)
        for stage, value in seconds.items():
            bucket = next((str(edge) for edge in STAGE_BUCKETS if value <= edge), "+Inf")
            added |= {("stage_seconds", f"stage={stage},le={bucket}"): 1.0, ("stage_sum", f"stage={stage}"): value}
        self._add(connection, added)
        return True

    def _add(self, connection: Connection, added: Mapping[tuple[str, str], float]) -> None:
        """Add to the totals, in an order that is everybody's: so none waits for one that waits for it."""
        insert = sqlite_insert if self.sqlite else postgresql_insert
        for (name, labels), value in sorted(added.items()):
            statement = insert(totals).values(name=name, labels=labels, value=value)
            raised = {"value": totals.c.value + statement.excluded.value}
            connection.execute(statement.on_conflict_do_update(index_elements=["name", "labels"], set_=raised))

    def _event(self, connection: Connection, job_id: str, kind: str = "state") -> None:
        """Add the job as it now stands to its events."""
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(event=jobs.c.event + 1))
        row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()
        body = {name: row._mapping[name] for name in EVENT_COLUMNS}
        connection.execute(sa.insert(events).values(job_id=job_id, number=row.event, kind=kind, body=body))


EVENT_COLUMNS = (
    "state",
    "stage",
    "progress",
    "step",
    "steps",
    "losses",
    "eta_s",
    "attempt",
    "problem",
    "started_at",
    "finished_at",
    "expires_at",
    "published",
    "fitted",
    "preview",
)
"""What of a job changes while it runs, and is kept in each of its events."""


def queue_order(priority: int, seq: int) -> int:
    """A number that rises with a job's turn: by priority, then by arrival; below 2^31."""
    return 1 + (10 - priority) * 100_000_000 + seq % 100_000_000


def _held(attempt: Attempt) -> sa.ColumnElement[bool]:
    return sa.and_(
        jobs.c.id == attempt.job_id,
        jobs.c.attempt == attempt.number,
        jobs.c.worker == attempt.worker,
        jobs.c.state == JobState.RUNNING,
    )


def _hash(secret: str) -> str:
    # The secrets are 256 random bits: a slow hash would add nothing.
    return hashlib.sha256(secret.encode()).hexdigest()


def _limit_idleness(connection: Any, _record: Any) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")
    connection.commit()


def _sqlite_engine(url: str, begin: str) -> Engine:
    engine = sa.create_engine(url, pool_size=10, max_overflow=30)

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin as `begin` says, not when the driver sees fit
        for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine
