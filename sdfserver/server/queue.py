"""The durable engine behind the jobs: DBOS, kept behind the few verbs that the service needs.

What is asked of it: a job's row and its place in the queue commit together; workers on one or several hosts take jobs
in order, one each; a job whose worker died goes on after the last step that finished. What it does not do is notice
that a worker died: the store keeps leases, and `resume` puts such jobs back.

Every worker process has an executor id of its own, so that DBOS's recovery at launch never finds anything: there is one
path of recovery, and it is the store's.
"""

import math
from collections.abc import Callable, Sequence

from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer
from sqlalchemy.engine import Connection

from sdfserver.server.store import Store

APPLICATION = "sdfserver"
VERSION = "1"
"""Of the workflow below: jobs of another version are left to workers that know it."""
QUEUE = "jobs"
WORKFLOW = "job"
POLL_SECONDS = 0.05
_BATCH = 500


class JobQueue:
    """The queue as it is seen from outside a worker."""

    def __init__(self, store: Store) -> None:
        self._client = DBOSClient(
            system_database_engine=store.engine,
            dbos_system_schema="dbos",
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
        )

    @staticmethod
    def create_tables(url: str) -> None:
        """Make the engine's tables, or bring them up to date."""
        DBOS.migrate(url)

    def enqueue(self, connection: Connection, job_id: str, order: int) -> None:
        """Put a job into the queue, in the caller's transaction. Smaller `order` runs first."""
        self._client.enqueue_in_transaction(
            connection,
            {
                "workflow_name": WORKFLOW,
                "queue_name": QUEUE,
                "workflow_id": job_id,
                "app_version": VERSION,
                "priority": order,
            },
            job_id,
        )

    def held_by(self, executors: Sequence[str]) -> list[tuple[str, str]]:
        """Jobs that these workers have taken and not finished, each with its worker."""
        if not executors:
            return []
        pending = self._client.list_workflows(
            status="PENDING", executor_id=list(executors), load_input=False, load_output=False
        )
        return [(job.workflow_id, job.executor_id or "") for job in pending]

    def resume(self, job_ids: Sequence[str]) -> None:
        """Put jobs back into the queue, in their old order; steps that finished will not run again."""
        if job_ids:
            self._client.resume_workflows(list(job_ids), queue_name=QUEUE)

    def forget(self, job_ids: Sequence[str]) -> None:
        """Remove what is known of finished jobs."""
        for start in range(0, len(job_ids), _BATCH):
            self._client.delete_workflows(list(job_ids[start : start + _BATCH]))

    def close(self) -> None:
        """Let go of the client; the store's connections are the store's."""
        self._client.destroy()


def take_jobs(
    store: Store,
    worker: str,
    *,
    at_once: int,
    fit: Callable[[str], int | None],
    mesh: Callable[[str, int], None],
) -> Callable[[float], None]:
    """Begin to take jobs as `worker`; returns what ends that, and gives the jobs under way some seconds.

    It has `at_once` jobs at a time, each in a thread of its own.

    `fit` and `mesh` are the durable steps. Whatever `fit` returns is kept, and not computed again if `mesh` is cut
    off; None ends the job.
    """
    config: DBOSConfig = {
        "name": APPLICATION,
        "system_database_engine": store.engine,
        "dbos_system_schema": "dbos",
        "serializer": DBOSPortableJSONSerializer(),
        "executor_id": worker,
        "application_version": VERSION,
        "run_migrations": False,
        "use_listen_notify": False,
        "log_level": "WARNING",  # it sets its logger's level itself
    }
    DBOS(config=config)

    # Functions of their own: DBOS writes attributes on what it decorates, which methods do not take.
    @DBOS.step(name="fit")
    def fit_step(job_id: str) -> int | None:
        return fit(job_id)

    @DBOS.step(name="mesh")
    def mesh_step(job_id: str, fitted: int) -> None:
        mesh(job_id, fitted)

    @DBOS.workflow(name=WORKFLOW)
    def job(job_id: str) -> None:
        fitted = fit_step(job_id)
        if fitted is not None:
            mesh_step(job_id, fitted)

    DBOS.listen_queues([QUEUE])
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=at_once, polling_interval_sec=POLL_SECONDS)

    def stop(seconds: float) -> None:
        DBOS.destroy(workflow_completion_timeout_sec=math.ceil(seconds))

    return stop
