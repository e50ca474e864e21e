"""A worker: takes jobs, has each computed in a child process, and publishes what comes out.

Jobs take turns at the child; where the settings have a `batch`, small fits that wait for theirs go together.

The parent stays light. It beats, so that others know it is alive; it enforces the limits; when a job is cancelled it
asks the child to stop, then terminates it, then kills it. A child that dies costs the job one attempt and the worker
nothing. A worker that was taken for dead while it was stopped finds that out at its next beat, and ends.
"""

import errno
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path, PurePath
from typing import Any, TypeVar

import psutil
from sqlalchemy.exc import DBAPIError, OperationalError

from sdfserver.progress import Progress
from sdfserver.schemas import JobKind, JobOptions, MeshJobOptions, Problem
from sdfserver.server import child, tracing
from sdfserver.server.artifacts import POINTS, PREVIEW, ArtifactError, open_artifacts
from sdfserver.server.gpus import gpu_figures
from sdfserver.server.liveness import Sight, Watch, identity, sight
from sdfserver.server.logs import STEP, about
from sdfserver.server.problems import problem
from sdfserver.server.queue import JobQueue, take_jobs
from sdfserver.server.settings import MIB, Settings
from sdfserver.server.storage import prepare_storage, sweep
from sdfserver.server.store import Attempt, Row, Store

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_SECONDS = 0.1
"""How often a running job is looked at: whether it was cancelled, its time, its memory."""
STORE_SECONDS, STORE_SHARE = 1.0, 0.08
"""Progress reaches the store at most this often, and when it is this much more of the job, or something else than more
of the same: the writes of a job do not grow with its length."""
ASK_SECONDS, TERMINATE_SECONDS = 0.4, 0.2
"""How long a child may take to stop by itself, and then to end on SIGTERM. Together well under a second."""
STARTING_SECONDS = 120.0
"""A job's time begins when its process is there to compute, if that takes no longer than this."""
RECOVER_SECONDS = 0.25
INSIST_SECONDS = 10.0
"""How long at most between two questions to a store of artifacts that does not answer."""
FIGURES_SECONDS = 10.0
"""How often a GPU is looked at."""
GATHER_SECONDS = 0.1
"""How long a fit waits for others to go with it, where it may."""
SMALL_BYTES = 16 * MIB
"""Largest cloud file of a fit that goes together with others."""
FIT_SHARE = 0.8
"""Of a reconstruction's progress: the rest is meshing."""
MESH_PER_FIT = 0.2
"""Seconds of meshing for one of fitting, until jobs of the kind have been measured."""

_DIED = problem(
    "died", "every attempt at the job ended with the death of its process; the cloud may be to blame"
).model_dump(exclude_none=True)


class End(Enum):
    """How the child's work on an attempt ended."""

    DONE = auto()
    FAILED = auto()
    """The job has failed, and says so."""
    LOST = auto()
    """The job is not ours any more: cancelled, removed, or taken by another worker."""
    DIED = auto()
    """The child is dead, and the job may be tried again."""


@dataclass
class _Child:
    process: Any
    connection: Connection
    ready: bool = False
    works: int = 0
    """How many pieces of work it has been given."""


@dataclass
class _Held:
    """An attempt of ours, and the seconds that were computed on it."""

    attempt: Attempt
    spent: float = 0.0


class _NotOursError(Exception):
    """The job was cancelled, removed, or taken by another worker."""


_NOTHING = child.Outcome(how="stopped")


@dataclass(eq=False)
class _Turn:
    """A task that waits for the child, or had its turn: then it says how that ended."""

    row: Row
    held: _Held
    task: child.FitTask | child.MeshTask
    alone: bool
    trace: tracing.AttemptSpan
    end: End | None = None
    outcome: child.Outcome = _NOTHING
    error: BaseException | None = None

    @property
    def limit(self) -> float:
        """Seconds that its user gave it."""
        return float(self.row.options.get("max_seconds") or float("inf"))

    def goes_with(self, other: "_Turn") -> bool:
        """Whether the two can be one piece of work: small fits of one preset, on one device."""
        return self._kind is not None and self._kind == other._kind

    @property
    def _kind(self) -> tuple[str, str] | None:
        if self.alone or not isinstance(self.task, child.FitTask):
            return None
        try:
            small = self.task.cloud.stat().st_size <= SMALL_BYTES
        except OSError:
            return None
        return (self.task.options.preset, self.task.options.device) if small else None


class Worker:
    """One worker process. `run` returns when it was told to stop."""

    def __init__(self, settings: Settings, *, threads: int | None = None) -> None:
        self._settings = settings
        self._store = Store(settings.database)
        self._artifacts = open_artifacts(settings)
        self._threads = threads or max(1, _processors() // max(1, settings.workers or 1))
        self._id = f"{socket.gethostname()[:40]}-{secrets.token_hex(6)}"
        self._child: _Child | None = None
        self._held: dict[str, _Held] = {}
        self._waiting: list[_Turn] = []
        self._turns = threading.Lock()
        self._draining = threading.Event()
        self._leaving = threading.Event()
        self._beginning = threading.Lock()
        self._figures: dict[str, float] | None = None
        self._busy: set[str] = set()
        self._idle = threading.Event()
        self._idle.set()

    def stop(self) -> None:
        """Finish the job under way, if that takes no longer than the settings allow, and end; asked again, end now."""
        if self._draining.is_set():
            self._idle.set()
        self._draining.set()

    def run(self) -> None:
        """Take jobs until told to stop."""
        # First: the child loads torch while this process connects.
        self._child = self._spawn()
        prepare_storage(self._settings, self._store, self._artifacts)
        queue = JobQueue(self._store)
        self._store.register_worker(self._id, **vars(identity()), device=self._settings.device)
        watch = Watch(self._store, self._settings.lease_seconds)
        # Before this worker takes any: a job that was cut off goes before those that wait.
        self._recover(queue, watch)
        others = self._keep_measuring, lambda: self._keep_recovering(queue, watch), lambda: self._sweep(queue)
        for target in (self._beat, *others):
            threading.Thread(target=target, daemon=True).start()
        stop_taking = take_jobs(self._store, self._id, at_once=self._settings.batch, fit=self._fit, mesh=self._mesh)
        log.info("worker %s takes jobs", self._id)
        while not self._draining.wait(1.0):
            pass
        self._drain(stop_taking)

    def _drain(self, stop_taking: Callable[[float], None]) -> None:
        """End in order: the job under way is finished, or goes back into the queue."""
        seconds = self._settings.drain_seconds
        threading.Thread(target=stop_taking, args=(seconds,), daemon=True).start()
        self._idle.wait(seconds)
        with self._beginning:  # after this no attempt begins
            self._leaving.set()
            held = list(self._held.values())
        for one in held:
            if self._store.release(one.attempt):
                log.info("job %s goes back into the queue", one.attempt.job_id)
        self._kill()
        self._store.retire(self._id)

    # The steps of a job, in a thread of the queue's

    def _fit(self, job_id: str) -> int | None:
        """Fit the job's cloud; the number of the attempt whose folder has the field, 0 where it came with the job."""
        self._begun(job_id)
        fitted = self._steadily(job_id, self._fitted)
        if fitted is None:
            self._ended(job_id)
        return fitted

    def _mesh(self, job_id: str, fitted: int) -> None:
        """Mesh the field that the attempt `fitted` left, and publish."""
        self._begun(job_id)
        try:
            self._steadily(job_id, lambda row: self._meshed(row, fitted))
        finally:
            self._ended(job_id)

    def _begun(self, job_id: str) -> None:
        with self._beginning:
            self._busy.add(job_id)
            self._idle.clear()

    def _ended(self, job_id: str) -> None:
        with self._beginning:
            self._busy.discard(job_id)
            self._held.pop(job_id, None)
            self._artifacts.leave(job_id)
            if not self._busy:
                self._idle.set()

    def _steadily(self, job_id: str, step: Callable[[Row], T | None]) -> T | None:
        """What `step` makes of the job, whatever happens to the database or goes wrong in this process.

        A step that raised would be taken for finished by the queue, and the job would never end.
        """
        while True:
            try:
                row = self._store.job(job_id)
                if row is None:
                    return None
                with about(job=job_id, request=row.request_id):
                    return step(row)
            except DBAPIError:
                log.exception("the database does not answer; job %s begins again when it does", job_id)
                self._give_back(job_id)
            except _NotOursError:
                return None
            except Exception as error:
                log.exception("job %s failed in the worker", job_id)
                if job_id in self._held:
                    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                    why = ("disk-full", child.DISK_FULL) if full else ("internal", child.INTERNAL)
                    self._fail(self._held[job_id].attempt, problem(*why))
                return None

    def _give_back(self, job_id: str) -> None:
        """Put the job back as soon as the database answers: what happened is no fault of the job's."""
        while True:
            time.sleep(self._settings.beat_seconds)
            try:
                if job_id in self._held:
                    self._store.release(self._held[job_id].attempt)
                    del self._held[job_id]
                return
            except DBAPIError:
                continue

    def _fail(self, attempt: Attempt, why: Problem) -> None:
        self._store.fail(attempt, why.model_dump(exclude_none=True), self._settings.retention_seconds)

    def _fitted(self, row: Row) -> int | None:
        job_id = row.id
        if row.kind == JobKind.MESH:
            return 0
        if row.fitted is not None:  # finished before, but cut off before the queue was told
            return int(row.fitted)
        options = JobOptions(**row.options)

        def task(attempt: Attempt) -> child.FitTask:
            cloud = self._artifacts.upload(job_id, row.format)
            self._insist(attempt, lambda: self._artifacts.fetch(cloud))
            return child.FitTask(
                cloud=cloud,
                name=row.name,
                folder=self._artifacts.fit(job_id, attempt.number),
                job_id=job_id,
                request_id=row.request_id,
                options=options,
                max_points=self._settings.max_points,
                device=self._settings.device,
            )

        def done(attempt: Attempt, outcome: child.Outcome) -> bool:
            return self._store.update(
                attempt, fitted=attempt.number, seconds={"fit": outcome.seconds}, progress=FIT_SHARE, stage="mesh"
            )

        attempt = self._work(row, task, done)
        return None if attempt is None else attempt.number

    def _meshed(self, row: Row, fitted: int) -> None:
        job_id = row.id
        options = JobOptions(**row.options) if row.kind == JobKind.RECONSTRUCTION else MeshJobOptions(**row.options)

        def task(attempt: Attempt) -> child.MeshTask:
            folder = self._artifacts.fit(job_id, fitted)
            for name in child.MeshTask.needs:
                self._insist(attempt, partial(self._artifacts.fetch, folder / name))
            return child.MeshTask(
                field_folder=folder,
                folder=self._artifacts.mesh(job_id, attempt.number),
                job_id=job_id,
                request_id=row.request_id,
                options=options,
                preset=row.preset,
                device=self._settings.device,
                max_resolution=self._settings.max_resolution,
            )

        def done(attempt: Attempt, outcome: child.Outcome) -> bool:
            return self._store.publish(attempt, {"mesh": outcome.seconds}, self._settings.retention_seconds)

        self._work(row, task, done)

    def _work(
        self,
        row: Row,
        task: Callable[[Attempt], child.FitTask | child.MeshTask],
        done: Callable[[Attempt, child.Outcome], bool],
    ) -> Attempt | None:
        """Attempts at a step until one is done; None when there will be none."""
        alone = bool(row.deaths)
        while True:
            held = self._begin(row.id)
            if held is None:
                return None
            asked = task(held.attempt)
            asked.folder.mkdir(parents=True, exist_ok=True)
            log.log(STEP, "attempt %d, %s: begins", held.attempt.number, asked.step)
            trace = tracing.attempt(row, held.attempt, asked.step)
            end, outcome = self._take_turn(_Turn(row=row, held=held, task=asked, alone=alone, trace=trace))
            log.log(STEP, "attempt %d, %s: %s", held.attempt.number, asked.step, end.name.lower())
            if end is End.DONE:
                try:
                    keep = partial(self._artifacts.keep, asked.folder, PurePath(row.name).stem)
                    self._insist(held.attempt, keep)
                except _NotOursError:
                    trace.end("lost")
                    raise
                if done(held.attempt, outcome):
                    trace.end("done")
                    return held.attempt
            if end is End.FAILED:
                self._fail(held.attempt, problem(outcome.problem, outcome.detail))
            self._stay_if_leaving()
            trace.end("lost" if end is End.DONE else end.name.lower(), outcome.problem)
            self._artifacts.discard(asked.folder)
            with self._beginning:
                self._held.pop(row.id, None)
            if end is not End.DIED:
                return None
            alone = True  # it may have been this one's fault

    def _insist(self, attempt: Attempt, act: Callable[[], None]) -> None:
        """Do something with the artifacts, again and again while they cannot be reached and the attempt is ours.

        What was computed is not lost for that. Raises _NotOursError when it was in vain.
        """
        pause = self._settings.beat_seconds
        while True:
            try:
                return act()
            except ArtifactError as error:
                log.error("%s; it is asked again in %.1f s", error, pause)
            time.sleep(pause)
            pause = min(2 * pause, INSIST_SECONDS)
            if not self._store.holds(attempt):
                self._stay_if_leaving()
                raise _NotOursError

    def _begin(self, job_id: str) -> _Held | None:
        """The attempt that the step before has begun, or a new one."""
        with self._beginning:
            self._stay_if_leaving()
            held = self._held.get(job_id)
            if held is None or not self._store.holds(held.attempt):
                attempt = self._store.begin_attempt(
                    job_id,
                    self._id,
                    self._settings.max_attempts,
                    _DIED,
                    self._settings.retention_seconds,
                )
                if attempt is None:
                    self._held.pop(job_id, None)
                    return None
                held = self._held[job_id] = _Held(attempt)
            return held

    def _stay_if_leaving(self) -> None:
        """Never return once the job is back in the queue: the queue would take the step for finished."""
        if self._leaving.is_set():
            threading.Event().wait()  # the process ends in a moment

    def _take_turn(self, turn: _Turn) -> tuple[End, child.Outcome]:
        """Wait for the child to be free, and have it do the task, if nobody else's turn has taken it along."""
        self._waiting.append(turn)
        if self._settings.batch > 1 and turn.goes_with(turn):
            time.sleep(GATHER_SECONDS)
        with self._turns:
            self._stay_if_leaving()
            if turn.end is None and turn.error is None:
                company = [other for other in self._waiting if other is not turn and turn.goes_with(other)]
                some = [turn, *company[: self._settings.batch - 1]]
                for one in some:
                    self._waiting.remove(one)
                try:
                    self._compute(some)
                except BaseException as error:  # noqa: BLE001 - raised below, in each job's thread
                    self._kill()  # it may be in the middle of the work
                    for one in some:
                        one.error = error if one.end is None else None
        if turn.error is not None:
            raise turn.error
        return turn.end or End.DIED, turn.outcome

    def _compute(self, turns: list[_Turn]) -> None:
        """Have the child do some tasks, and watch over them: each turn then says how it ended."""
        running = self._child = self._living_child()
        running.works += 1
        work = child.Work(running.works, tuple(turn.task for turn in turns))
        if len(turns) > 1:
            log.info("fitted together: jobs %s", ", ".join(turn.row.id for turn in turns))
        typical = self._store.typical_seconds()
        watched = {i: _Watched(turn, typical) for i, turn in enumerate(turns)}
        started = time.monotonic()
        looked_at = 0.0
        try:
            if running.ready:
                running.connection.send(work)
            while watched:
                if running.connection.poll(LOOK_SECONDS):
                    message = running.connection.recv()
                    if message == child.READY:
                        running.ready = True
                        started = time.monotonic()  # they had to wait for the process, not to compute
                        running.connection.send(work)
                    elif message.number == work.number and message.index in watched:
                        self._hear(watched, message)
                now = time.monotonic()
                if now - looked_at >= LOOK_SECONDS:
                    looked_at = now
                    self._look(running, work.number, watched, now - started)
        except (EOFError, ConnectionError, OSError):
            if not self._leaving.is_set():  # then it was us
                for one in watched.values():
                    attempt = one.turn.held.attempt
                    log.warning("the process of job %s died in attempt %d", attempt.job_id, attempt.number)
            self._kill()
            for one in watched.values():
                one.turn.end = End.DIED
        for turn in turns:
            turn.held.spent += time.monotonic() - started

    def _hear(self, watched: dict[int, "_Watched"], message: child.Told) -> None:
        one = watched[message.index]
        if isinstance(message.what, child.Outcome):
            one.turn.end = End.DONE if message.what.how == "done" else End.FAILED
            one.turn.outcome = message.what
            del watched[message.index]
        elif isinstance(message.what, child.Previewed):
            names, number = ((PREVIEW,), message.what.number) if message.what.number else ((POINTS,), None)
            shown = partial(setattr, one.standing, "preview", number)
            self._artifacts.show(one.turn.task.folder, names, shown)
        else:
            one.latest = message.what
            one.turn.trace.stage(message.what.stage)
            one.standing.see(message.what)

    def _look(self, running: _Child, number: int, watched: dict[int, "_Watched"], seconds: float) -> None:
        """Whether the jobs under way are still ours, within their time, and within the memory; tells the store."""
        for i, one in list(watched.items()):
            turn = one.turn
            limit = min(turn.limit, self._settings.max_job_seconds)
            if not self._store.holds(turn.held.attempt):
                turn.end = End.LOST
            elif turn.held.spent + seconds > (limit if running.ready else max(limit, STARTING_SECONDS)):
                detail = f"the job ran for more than {limit:g} s; take a quicker preset or a coarser resolution"
                turn.end, turn.outcome = End.FAILED, child.Outcome(how="failed", problem="time", detail=detail)
            else:
                one.tell(self._store)
                continue
            del watched[i]
            if running.ready and watched:
                running.connection.send(child.Stop(number, i))  # the others go on
            elif turn.end is End.LOST:
                self._stop_child(running, number, i)
            else:
                self._kill()
        if watched and self._memory(running) > self._settings.max_child_bytes:
            self._kill()
            room = self._settings.max_child_bytes / 2**30
            detail = f"the job's process took more than {room:.1f} GiB; thin the cloud or mesh it coarser"
            for one in watched.values():
                # Of several nobody knows whose fault it was: each is tried again alone.
                one.turn.end = End.DIED if len(watched) > 1 else End.FAILED
                one.turn.outcome = child.Outcome(how="failed", problem="memory", detail=detail)
            watched.clear()

    # The child

    def _spawn(self) -> _Child:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=child.main, args=(theirs, self._threads), daemon=True)
        process.start()
        theirs.close()
        return _Child(process=process, connection=ours)

    def _living_child(self) -> _Child:
        if self._child is None or not self._child.process.is_alive():
            self._kill()
            self._child = self._spawn()
        return self._child

    def _stop_child(self, running: _Child, number: int, index: int) -> None:
        """Ask the child to stop, then terminate it, then kill it; it is used again if it stopped by itself."""
        if not running.ready:
            return  # it has not been given anything yet
        running.connection.send(child.Stop(number, index))
        deadline = time.monotonic() + ASK_SECONDS
        while (left := deadline - time.monotonic()) > 0 and running.connection.poll(left):
            message = running.connection.recv()
            if isinstance(message, child.Told) and message.index == index and isinstance(message.what, child.Outcome):
                return
        self._kill()

    def _kill(self) -> None:
        """End the child, whatever it does."""
        gone, self._child = self._child, None
        if gone is None:
            return
        gone.process.terminate()
        gone.process.join(TERMINATE_SECONDS)
        if gone.process.is_alive():
            gone.process.kill()
            gone.process.join()
        gone.connection.close()

    @staticmethod
    def _memory(running: _Child) -> int:
        try:
            return int(psutil.Process(running.process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    # What goes on beside the jobs

    def _beat(self) -> None:
        """Say that this worker is alive; end the process when it has been taken for dead."""
        while True:
            try:
                figures, self._figures = self._figures, None
                alive = self._store.beat(self._id, figures)
                if alive:
                    self._show_beat()
            except Exception:
                log.exception("the database does not answer")
                alive = True  # the lease runs on by the database's own clock
            if not alive and not self._draining.is_set():
                log.warning("worker %s was taken for dead, and ends", self._id)
                self._abandon()
            time.sleep(self._settings.beat_seconds)

    def _show_beat(self) -> None:
        """Touch the file at which a health check looks."""
        if (path := self._settings.beat_file) is not None:
            try:
                path.touch()
            except OSError as error:
                log.error("beat_file %s cannot be touched: %s", path, error.strerror)

    def _keep_measuring(self) -> None:
        """Look at the GPU from time to time: the next beat tells the store."""
        while (figures := gpu_figures()) is not None:
            self._figures = figures
            time.sleep(FIGURES_SECONDS)

    def _abandon(self) -> None:
        """End at once: the job is another's by now, and what is left here of it will be swept."""
        self._kill()
        os._exit(1)

    def _keep_recovering(self, queue: JobQueue, watch: Watch) -> None:
        while True:
            try:
                self._recover(queue, watch)
            except Exception:
                log.exception("recovery failed; it is tried again")
            time.sleep(RECOVER_SECONDS)

    def _recover(self, queue: JobQueue, watch: Watch) -> None:
        """Retire workers that are dead, and put their jobs back into the queue."""
        for row in watch.dead():
            try:
                self._store.retire(row.id)
            except OperationalError:
                # Stopped in the middle of a write, it keeps everybody from writing, and nobody watches over it.
                if sight(row) is Sight.STOPPED:
                    log.warning("worker %s holds the database, does not answer, and is killed", row.id)
                    os.kill(row.pid, signal.SIGKILL)
                raise
        dead = self._store.inherit(self._id)
        held = queue.held_by(dead)
        for job_id, worker in held:
            # In this order: cut off in between, it is found again and done again.
            queue.resume([job_id])
            lost = self._store.lose(
                job_id, worker, self._settings.max_attempts, _DIED, self._settings.retention_seconds
            )
            if lost is not None:
                tracing.lost(lost)
        if dead and not held:
            self._store.forget_workers(dead)

    def _sweep(self, queue: JobQueue) -> None:
        """Remove what has had its time."""
        while True:
            try:
                sweep(self._settings, self._store, queue, self._artifacts)
            except Exception:
                log.exception("sweeping failed; it is tried again")
            time.sleep(self._settings.sweep_seconds)


class _Standing:
    """What the store is told of a job's progress; the ETA is from the speed that this very job has shown."""

    def __init__(
        self, row: Row, task: child.FitTask | child.MeshTask, typical: dict[tuple[str, str, int, str], float]
    ) -> None:
        self._whole = row.kind == JobKind.RECONSTRUCTION
        self._fits = isinstance(task, child.FitTask)
        self._mesh_seconds = typical.get((row.kind, row.preset, row.resolution, "mesh"))
        self._first: tuple[float, int] | None = None
        self._eta: float | None = None
        self.preview: int | None = None if self._fits else row.preview

    def see(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.step is None or progress.steps is None:
            self._eta = None if self._fits else progress.eta_s
        elif self._first is None:
            self._first = now, progress.step
        elif progress.step > self._first[1]:
            per_step = (now - self._first[0]) / (progress.step - self._first[1])
            mesh = self._mesh_seconds
            mesh = per_step * progress.steps * MESH_PER_FIT if mesh is None else mesh
            self._eta = (progress.steps - progress.step) * per_step + mesh

    def columns(self, progress: Progress) -> dict[str, Any]:
        fraction = progress.fraction
        if self._whole:
            fraction = FIT_SHARE * fraction if self._fits else FIT_SHARE + (1 - FIT_SHARE) * fraction
        columns: dict[str, Any] = {"stage": progress.stage, "progress": fraction, "eta_s": self._eta}
        columns["preview"] = self.preview
        if progress.step is not None:
            losses = {name: float(value) for name, value in progress.losses.items()}
            columns |= {"step": progress.step, "steps": progress.steps, "losses": losses}
        return columns


class _Watched:
    """A turn under way, and what the store is to be told of it."""

    def __init__(self, turn: _Turn, typical: dict[tuple[str, str, int, str], float]) -> None:
        self.turn, self.standing = turn, _Standing(turn.row, turn.task, typical)
        self.latest: Progress | None = None
        self._stored_at = 0.0
        self._stored: dict[str, Any] = {}

    def tell(self, store: Store) -> None:
        """Tell the store of the latest progress, if it is time to."""
        now = time.monotonic()
        if self.latest is None or now - self._stored_at < STORE_SECONDS:
            return
        columns = self.standing.columns(self.latest)
        # Of steps the first is news.
        news = any(columns[name] != self._stored.get(name) for name in ("stage", "preview")) or (
            columns.keys() != self._stored.keys()
        )
        if news or columns["progress"] >= self._stored["progress"] + STORE_SHARE:
            store.update(self.turn.held.attempt, **columns)
            self._stored_at, self._stored = now, columns
        self.latest = None


def _processors() -> int:
    """How many cores this process may use, by its affinity and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroups of version 2, or a quota of "max"
        return cores


def main(settings: Settings) -> None:
    """Run a worker until SIGTERM or SIGINT."""
    tracing.set_up("worker")
    worker = Worker(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()
    tracing.shut_down()
    os._exit(0)  # threads of the queue's would hold the process up
