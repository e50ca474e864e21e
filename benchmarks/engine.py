#!/usr/bin/env python3
"""What the engine around the fits costs: jobs a second with 1, 2 and 4 workers, and database writes a job.

    python benchmarks/engine.py [--jobs 40] [--seconds 1.0] [--workers 1,2,4] [--batch N] [--json FILE]

On a PostgreSQL of its own on 127.0.0.1:5432. The fit of a job is a sleep of so many seconds, and its mesh a ready file:
so that the workers, and not the cores, are what there is too little of. Everything else is the service as it is: API,
queue, workers and their processes, files. Writes are what PostgreSQL counts of rows inserted, updated and deleted, and
of transactions that wrote, from before the first job is posted until the last has ended, less those of an idle minute.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psycopg
from faults.host import CLOUD, Host, until
from waiting import fresh_postgres

from sdfserver.schemas import JobState
from sdfserver.server.store import Row

SLEEPING = '''
"""On the path of the server: a fit is a sleep, and a mesh is one that is ready."""
import os, shutil, sys, time
from pathlib import Path

if "multiprocessing" in " ".join(sys.orig_argv):  # a job's process
    from sdfserver.server import child

    def fit(fits, done):
        for task, reporter in fits:
            from sdfserver.progress import Progress
            steps, seconds, began = 40, float(os.environ["SLEEP_SECONDS"]), time.monotonic()
            for step in range(steps):
                reporter.show(Progress(stage="fit", fraction=step / steps, step=step, steps=steps, losses={}))
                # By the clock: forty times late, where others use the cores, would be no cost of the engine's.
                time.sleep(max(0.0, began + seconds * (step + 1) / steps - time.monotonic()))
            (task.folder / child.FIELD).touch()
            reporter.tell(done())

    def mesh(task, reporter):
        for name in (child.MESH, child.REPORT, child.PREVIEW, child.PICTURE):
            (task.folder / name).write_bytes(b"ready")

    child._fit, child._mesh = fit, mesh
'''


class Writes:
    """What a database has written."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)

    def rows(self) -> int:
        """Rows inserted, updated and deleted so far."""
        self._connection.execute("SELECT pg_stat_clear_snapshot()")
        found = self._connection.execute(
            "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del)::bigint FROM pg_stat_all_tables"
            " WHERE schemaname NOT LIKE 'pg\\_%' AND schemaname <> 'information_schema'"
        ).fetchone()
        return int(found[0] or 0) if found else 0

    def transactions(self) -> int:
        """Transactions that wrote, so far: each takes a number."""
        found = self._connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchone()
        return int(found[0]) if found else 0

    def close(self) -> None:
        """Let go of the database."""
        self._connection.close()


def _between(rows: list[Row]) -> Iterator[float]:
    """Seconds from the end of a job to the start of the next one of its worker."""
    for worker in {row.worker for row in rows}:
        turns = sorted((row.started_at, row.finished_at) for row in rows if row.worker == worker)
        yield from (later[0] - earlier[1] for earlier, later in itertools.pairwise(turns))


def run(workers: int, jobs: int, seconds: float, batch: int, folder: Path, url: str) -> dict[str, Any]:
    """So many jobs through so many workers."""
    (folder / "path").mkdir()
    (folder / "path" / "sitecustomize.py").write_text(SLEEPING)
    os.environ["SLEEP_SECONDS"] = str(seconds)
    path = os.pathsep.join([str(folder / "path"), os.environ.get("PYTHONPATH", "")])
    settings = {"workers": workers, "batch": batch, "max_queue": 10_000, "max_jobs_per_key": 10_000}
    with closing(Host(folder, url, **settings)) as host, closing(Writes(url)) as writes:
        host.environment["PYTHONPATH"] = path
        host.serve()
        host.ready(workers)
        first = host.submit()
        until(lambda: host.row(first).state == JobState.SUCCEEDED)  # torch is loaded by then, in one worker
        time.sleep(8)
        idle = writes.transactions(), writes.rows(), time.monotonic()
        time.sleep(10)
        idle_rate = [
            (now - then) / (time.monotonic() - idle[2])
            for now, then in zip((writes.transactions(), writes.rows()), idle, strict=False)
        ]
        before = writes.transactions(), writes.rows(), time.monotonic()
        posted = [host.submit(seed=i) for i in range(jobs)]
        until(
            lambda: all(host.row(job).state == JobState.SUCCEEDED for job in posted[-workers - batch :]), pause_s=0.05
        )
        until(lambda: all(host.row(job).state == JobState.SUCCEEDED for job in posted))
        took = time.monotonic() - before[2]
        time.sleep(1.5)  # PostgreSQL counts a moment later
        span = time.monotonic() - before[2]
        rows = [host.row(job) for job in posted]
        ideal = seconds * jobs / workers / batch
        return {
            "workers": workers,
            "batch": batch,
            "jobs": jobs,
            "seconds_a_fit": seconds,
            "seconds": took,
            "jobs_a_second": jobs / took,
            "share_of_ideal": ideal / took,
            "overhead_a_job": (took - ideal) * workers * batch / jobs,
            "seconds_between_jobs": statistics.mean(_between(rows)),
            "seconds_beyond_the_fit": statistics.mean(row.finished_at - row.started_at - seconds for row in rows),
            "transactions_a_job": (writes.transactions() - before[0] - idle_rate[0] * span) / jobs,
            "rows_a_job": (writes.rows() - before[1] - idle_rate[1] * span) / jobs,
            "events_a_job": sum(row.event for row in rows) / jobs,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description="What the engine around the fits costs.")
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a fit")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not CLOUD.exists():
        sys.exit(f"{CLOUD} is missing")
    found = []
    for workers in map(int, asked.workers.split(",")):
        with tempfile.TemporaryDirectory() as folder, fresh_postgres() as url:
            if url is None:
                sys.exit("there is no PostgreSQL on 127.0.0.1:5432 that trusts the user postgres")
            found.append(run(workers, asked.jobs, asked.seconds, asked.batch, Path(folder), url))
        one, first = found[-1], found[0]
        one["scaling"] = one["jobs_a_second"] / first["jobs_a_second"] / one["workers"] * first["workers"]
        print(json.dumps(one), flush=True)
        if asked.json is not None:
            asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
