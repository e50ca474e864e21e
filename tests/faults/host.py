"""A whole service as processes of this machine, to be hit: started, found, killed, and looked over afterwards."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import psycopg
import pytest
from waiting import QUICK, fresh_postgres, wait_until

from sdfserver.client import Client
from sdfserver.io import read_cloud, read_mesh
from sdfserver.metrics import cloud_to_mesh, mesh_health
from sdfserver.schemas import JobState
from sdfserver.server.artifacts import FIT_FILES, MESH_FILES, REPORT, Artifacts
from sdfserver.server.liveness import living
from sdfserver.server.store import Row, Store

CLOUD = Path(__file__).resolve().parents[2] / "data" / "sparse.ply"
PATIENCE_S = 600.0
"""A bound for what never comes; nothing here says how fast it should."""
until = partial(wait_until, patience_s=PATIENCE_S, pause_s=0.02)


class Host:
    """The service of one data folder, in as many processes as a test starts.

    Its processes are known by their environment, so that those whose parent was killed are found as well.
    """

    def __init__(self, folder: Path, database_url: str | None = None, **settings: Any) -> None:
        self.data = folder / "data"
        self.log = folder / "log.txt"
        self.artifacts = Artifacts(self.data)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]  # the same after a restart, for the client to find
        chosen = {"data_dir": self.data, "device": "cpu", "port": self.port, "sweep_seconds": 0.5, "min_free_bytes": 0}
        if database_url is not None:
            chosen["database_url"] = database_url
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SDFSERVER_")}
        self.environment |= _variables(chosen | settings) | {"PYTHONPATH": QUICK}
        sqlite = f"sqlite:///{self.data / 'sdfserver.sqlite3'}"
        self.database = (database_url or sqlite).replace("postgresql://", "postgresql+psycopg://")
        self.client = Client(f"http://127.0.0.1:{self.port}", timeout_s=PATIENCE_S, retry_s=PATIENCE_S)
        self._store: Store | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    # Processes

    def start(self, command: str, *, prefix: Sequence[str] = (), **settings: Any) -> psutil.Process:
        """`sdfserver COMMAND`, whether it is up yet or not; after `prefix`, which runs a command somewhere."""
        with self.log.open("ab") as stream:
            started = subprocess.Popen(
                [*prefix, sys.executable, "-m", "sdfserver", command],
                env=self.environment | _variables(settings),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
        self._started.append(started)
        return psutil.Process(started.pid)

    def serve(self, **settings: Any) -> psutil.Process:
        """`sdfserver serve`, ready to take jobs."""
        started = self.start("serve", **settings)
        self.ready()
        return started

    def ready(self, workers: int = 1) -> None:
        """Wait until the service answers, with so many workers or more."""

        def answers() -> bool:
            assert any(started.poll() is None for started in self._started), self.said()
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.client.url}/health/ready", timeout=PATIENCE_S).is_success:
                    return len(living(self.store, PATIENCE_S)) >= workers
            return False

        until(answers)

    def processes(self, role: str | None = None) -> list[psutil.Process]:
        """All that live: serve, api, worker; job (a worker's child) and tracker (of multiprocessing's)."""
        for started in self._started:
            started.poll()  # or they would stay as zombies
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                mine = process.environ().get("SDFSERVER_DATA_DIR") == str(self.data)
                if mine and process.status() != psutil.STATUS_ZOMBIE and role in (None, _role(process)):
                    found.append(process)
        return found

    def process(self, role: str) -> psutil.Process:
        """The one of that role."""
        (only,) = self.processes(role)
        return only

    def child(self, *, other_than: psutil.Process | None = None) -> psutil.Process:
        """The process that computes, once there is one."""
        found = until(lambda: [process for process in self.processes("job") if process != other_than])
        return found[0]

    def kill(self, *processes: psutil.Process) -> float:
        """SIGKILL; when that was, by the monotonic clock."""
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        at = time.monotonic()
        until(lambda: not [process for process in processes if process in self.processes()])
        return at

    def freeze(self, process: psutil.Process, *, writing: bool = False) -> None:
        """SIGSTOP; in the middle of a write, whose lock stops others as well, or not then.

        SQLite's stops all who write; PostgreSQL's those who write the same row: here all who would recover the job.
        """
        if writing and not self.store.sqlite:
            self._freeze_in_transaction(process)
            return
        while True:
            process.suspend()
            if process.status() == psutil.STATUS_STOPPED and self._unlocked(timeout_s=2.0) is not writing:
                return
            process.resume()
            time.sleep(0.003 if writing else 0.05)

    def _freeze_in_transaction(self, process: psutil.Process) -> None:
        """SIGSTOP when it has written the job's progress, and waits to write the event that goes with it."""
        with psycopg.connect(self.database.replace("+psycopg", "")) as locking:
            locking.execute("LOCK TABLE job_events IN SHARE MODE")
            waiting = "SELECT 1 FROM pg_locks WHERE relation = 'job_events'::regclass AND NOT granted"
            until(lambda: locking.execute(waiting).fetchone())
            process.suspend()
            until(lambda: process.status() == psutil.STATUS_STOPPED)

    def _unlocked(self, timeout_s: float) -> bool:
        try:
            with self.writing(timeout_s):
                return True
        except (sqlite3.OperationalError, psycopg.errors.LockNotAvailable):
            return False

    @contextmanager
    def writing(self, timeout_s: float = PATIENCE_S) -> Iterator[None]:
        """Holds SQLite's lock, or PostgreSQL's on our tables: nobody else writes meanwhile."""
        if not self.store.sqlite:
            with psycopg.connect(self.database.replace("+psycopg", "")) as locking:
                locking.execute(f"SET lock_timeout = {round(timeout_s * 1000)}")  # type: ignore[call-overload]
                locking.execute("LOCK TABLE workers, jobs IN SHARE ROW EXCLUSIVE MODE")
                yield
            return
        connection = sqlite3.connect(self.data / "sdfserver.sqlite3", timeout=timeout_s, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield
        finally:
            connection.close()

    def stop(self, process: psutil.Process) -> None:
        """SIGTERM, and wait for the end."""
        process.terminate()
        until(lambda: process not in self.processes())

    def close(self) -> None:
        """End everything, at once."""
        while living := self.processes():
            for process in living:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        for started in self._started:
            started.wait()
        self.client.close()
        if self._store is not None:
            self._store.close()

    def said(self) -> str:
        """What all of them wrote."""
        return self.log.read_text(errors="replace")

    # Jobs

    @property
    def store(self) -> Store:
        """The database, as the processes see it."""
        if self._store is None:
            self._store = Store(self.database)
        return self._store

    def submit(self, **options: Any) -> str:
        """A small job's id: some seconds of fitting, less of meshing."""
        return self.client.submit(CLOUD, **({"preset": "draft", "resolution": 32} | options)).id

    def row(self, job_id: str) -> Row:
        """The job as the store has it."""
        row = self.store.job(job_id)
        assert row is not None
        return row

    def fitting(self, job_id: str, attempt: int = 1) -> Row:
        """Wait until the job is in mid-fit."""

        def seen() -> Row | None:
            row = self.row(job_id)
            assert row.state != JobState.FAILED, row.problem
            return row if row.attempt == attempt and row.stage == "fit" and (row.step or 0) > 0 else None

        return until(seen)

    def running(self, job_id: str, attempt: int) -> float:
        """Wait until that attempt at the job runs; when that was, by the monotonic clock."""

        def seen() -> bool:
            row = self.row(job_id)
            return row.attempt >= attempt and row.state != JobState.QUEUED

        until(seen, pause_s=0.01)
        return time.monotonic()

    def report(self, job_id: str) -> Path:
        """The last file that the first attempt writes."""
        return self.artifacts.mesh(job_id, 1) / REPORT

    # What must hold in the end

    def succeeds(self, job_id: str) -> Row:
        """The job ends, with one result, which is right."""
        row = self._ended(job_id)
        assert row.state == JobState.SUCCEEDED, (row.problem, self.said())
        path = self.client.job(job_id).download(self.data.parent / f"{job_id}.ply")
        mesh, cloud = read_mesh(path), read_cloud(CLOUD)
        assert mesh_health(mesh).watertight
        size = float(np.ptp(cloud.points, axis=0).max())
        assert cloud_to_mesh(cloud, mesh).max < 0.05 * size
        assert np.all(mesh.vertices.min(axis=0) > cloud.points.min(axis=0) - 0.1 * size)
        assert np.all(mesh.vertices.max(axis=0) < cloud.points.max(axis=0) + 0.1 * size)
        return row

    def fails(self, job_id: str, kind: str) -> Row:
        """The job ends with a problem of that kind, and will be removed one day."""
        row = self._ended(job_id)
        assert row.state == JobState.FAILED
        assert row.problem["type"] == f"urn:sdfserver:problem:{kind}", row.problem
        assert row.published is None
        assert row.expires_at is not None
        return row

    def _ended(self, job_id: str) -> Row:
        until(lambda: JobState(self.row(job_id).state).final, pause_s=0.1)
        ends = [event for event in self.store.events_after(job_id, 0, 10_000) if JobState(event.body["state"]).final]
        assert len(ends) == 1, "a job ends once"
        return self.row(job_id)

    def leaves_nothing_behind(self) -> None:
        """After a sweep there are the files of results and uploads, and no others; after a stop, no process."""
        until(lambda: self._files() == self._wanted_files(), patience_s=60, pause_s=0.2)
        for process in (*self.processes("serve"), *self.processes("api"), *self.processes("worker")):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        end = time.monotonic() + 120
        while left := self.processes():
            assert time.monotonic() < end, ([_described(process) for process in left], self.said()[-2000:])
            time.sleep(0.1)

    def _files(self) -> set[Path]:
        """All files, and all empty folders."""
        return {path for path in self.artifacts.jobs.rglob("*") if not path.is_dir() or not any(path.iterdir())}

    def _wanted_files(self) -> set[Path]:
        wanted = set()
        for row in self.store.list_jobs("", limit=1000):
            wanted.add(self.artifacts.upload(row.id, row.format))
            if row.state == JobState.SUCCEEDED:
                wanted |= {self.artifacts.fit(row.id, row.fitted) / name for name in FIT_FILES}
                wanted |= {self.artifacts.mesh(row.id, row.published) / name for name in MESH_FILES}
        return wanted


@contextmanager
def fresh_host(folder: Path, database: str, **settings: Any) -> Iterator[Host]:
    """A service of its own on "sqlite" or "postgresql"; nothing runs yet, and whatever runs in the end is killed."""
    with fresh_postgres() as url:
        if database == "postgresql" and url is None:
            pytest.skip("no PostgreSQL on 127.0.0.1:5432")
        host = Host(folder, url if database == "postgresql" else None, **settings)
        try:
            yield host
        finally:
            host.close()


def _variables(settings: dict[str, Any]) -> dict[str, str]:
    return {f"SDFSERVER_{name.upper()}": str(value) for name, value in settings.items()}


def _described(process: psutil.Process) -> str:
    with suppress(psutil.Error, OSError):
        waits = Path(f"/proc/{process.pid}/wchan").read_text()
        return f"{_role(process)}, {process.status()}, in {waits or 'user code'}, {process.num_threads()} threads"
    return "ended"


def _role(process: psutil.Process) -> str:
    line = process.cmdline()
    if "sdfserver" in line:
        return line[line.index("sdfserver") + 1]
    return "job" if any("spawn_main" in word for word in line) else "tracker"
