"""What is done to a service: each scenario takes a fresh Host, harms it in mid-job, and sees the job run again.

Those of several hosts take the PostgreSQL server that they share, and another host, as well.

Used by the tests, which then look at how it ends, and by benchmarks/recovery.py, which prints the seconds.
"""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from faults.cluster import Cluster, Elsewhere
from faults.host import CLOUD, Host, until

from sdfserver.client import Client
from sdfserver.schemas import JobState
from sdfserver.server.liveness import this_host


@dataclass(frozen=True)
class Recovery:
    """The jobs that were accepted, and the seconds from the harm until the first of them ran again."""

    jobs: list[str]
    seconds: float


def child_killed(host: Host) -> Recovery:
    """SIGKILL of the process that fits."""
    host.serve()
    job = host.submit()
    host.fitting(job)
    harmed = host.kill(host.child())
    return Recovery([job], host.running(job, 2) - harmed)


def worker_killed_in_fit(host: Host) -> Recovery:
    """SIGKILL of the worker in mid-fit."""
    host.serve()
    job = host.submit()
    host.fitting(job)
    harmed = host.kill(host.process("worker"))
    return Recovery([job], host.running(job, 2) - harmed)


def child_killed_in_mesh(host: Host) -> Recovery:
    """SIGKILL of the process that meshes."""
    host.serve()
    job = host.submit(resolution=256)
    child = host.child()
    until(lambda: host.row(job).fitted is not None, pause_s=0.005)
    harmed = host.kill(child)
    assert not host.report(job).exists(), "it was killed too late"
    return Recovery([job], host.running(job, 2) - harmed)


def worker_killed_in_mesh(host: Host) -> Recovery:
    """SIGKILL of the worker when the fit is done and the mesh is not."""
    host.serve()
    job = host.submit(resolution=256)
    worker = host.process("worker")
    until(lambda: host.row(job).fitted is not None, pause_s=0.005)
    harmed = host.kill(worker)
    assert not host.report(job).exists(), "it was killed too late"
    return Recovery([job], host.running(job, 2) - harmed)


def worker_killed_publishing(host: Host) -> Recovery:
    """SIGKILL of the worker when all files of the result are there and the result is not published."""
    host.serve()
    jobs: list[str] = []
    while True:
        jobs.append(host.submit())
        worker, report = host.process("worker"), host.report(jobs[-1])
        until(report.exists, pause_s=0.001)
        worker.suspend()  # to see what was hit
        missed = host.row(jobs[-1]).published is not None
        if not missed:
            harmed = host.kill(worker)
            return Recovery(jobs, host.running(jobs[-1], 2) - harmed)
        worker.resume()


def api_killed(host: Host) -> Recovery:
    """SIGKILL of the API while a job runs: the seconds until it answers."""
    host.serve()
    job = host.submit()
    host.fitting(job)
    harmed = host.kill(host.process("api"))

    def answers() -> bool:
        try:
            return httpx.get(f"{host.client.url}/v1/jobs/{job}", timeout=60).is_success
        except httpx.HTTPError:
            return False

    until(answers)
    return Recovery([job], time.monotonic() - harmed)


def everything_killed(host: Host) -> Recovery:
    """SIGKILL of all processes; the seconds are from the new start."""
    host.serve()
    jobs = [host.submit(), host.submit()]
    host.fitting(jobs[0])
    host.kill(*host.processes())
    assert not host.processes()
    started = time.monotonic()
    host.start("serve")
    return Recovery(jobs, host.running(jobs[0], 2) - started)


def fitting_beside_another(host: Host, **settings: Any) -> tuple[str, psutil.Process]:
    """A job in mid-fit, and the one of two workers that has it; nobody watches over them."""
    host.start("api", **settings)
    host.start("worker", **settings)
    host.ready()
    job = host.submit()
    host.fitting(job)
    first = host.process("worker")
    host.start("worker", **settings)
    host.ready(workers=2)
    return job, first


def worker_frozen(host: Host, **settings: Any) -> tuple[Recovery, psutil.Process]:
    """SIGSTOP of one of two workers for longer than its lease, without a supervisor; it is still frozen in the end."""
    job, first = fitting_beside_another(host, **settings)
    host.freeze(first)
    harmed = time.monotonic()
    return Recovery([job], host.running(job, 2) - harmed), first


def worker_frozen_writing(host: Host, *, supervised: bool, **settings: Any) -> tuple[Recovery, psutil.Process]:
    """SIGSTOP of a worker in mid-write: others cannot write until it is killed, or PostgreSQL has had enough of it."""
    if supervised:
        host.serve(**settings)
        job = host.submit()
        host.fitting(job)
        first = host.process("worker")
    else:
        job, first = fitting_beside_another(host, **settings)
    host.freeze(first, writing=True)
    harmed = time.monotonic()
    return Recovery([job], host.running(job, 2) - harmed), first


def drained_and_started(host: Host) -> Recovery:
    """SIGTERM that leaves no time to finish, and a new start; the seconds are from that."""
    serving = host.serve(drain_seconds=0)
    job = host.submit()
    host.fitting(job)
    host.stop(serving)
    assert not host.processes()
    assert host.row(job).state == JobState.QUEUED
    started = time.monotonic()
    host.start("serve")
    return Recovery([job], host.running(job, 2) - started)


def cancelled(host: Host) -> Recovery:
    """Cancelling a running fit: the seconds until the worker has begun the next job."""
    host.serve()
    jobs = [host.submit(), host.submit()]
    host.fitting(jobs[0])
    harmed = time.monotonic()
    host.client.job(jobs[0]).cancel()
    return Recovery(jobs, host.running(jobs[1], 1) - harmed)


# Several hosts


def fitting_elsewhere(site: Host, database: Cluster, far: Elsewhere) -> tuple[str, psutil.Process]:
    """A job in mid-fit on another host, and what runs the worker there; a worker of this host has nothing to do."""
    site.start("api")
    there = site.start("worker", prefix=far.prefix, database_url=database.url(far.address))
    site.ready()
    job = site.submit()
    site.fitting(job)
    assert {row.host for row in site.store.workers()} != {this_host()}
    site.start("worker")
    site.ready(workers=2)
    return job, there


def host_lost(site: Host, database: Cluster, far: Elsewhere) -> Recovery:
    """The host that runs the job is gone, without a word."""
    job, there = fitting_elsewhere(site, database, far)
    far.cut()
    there.kill()  # nobody on this host can see that
    harmed = time.monotonic()
    return Recovery([job], site.running(job, 2) - harmed)


def network_cut(site: Host, database: Cluster, far: Elsewhere) -> tuple[Recovery, psutil.Process]:
    """The host that runs the job is cut off, and goes on with it."""
    job, there = fitting_elsewhere(site, database, far)
    far.cut()
    harmed = time.monotonic()
    return Recovery([job], site.running(job, 2) - harmed), there


def database_restarted(site: Host, database: Cluster, mode: str) -> Recovery:
    """PostgreSQL stops in mid-job, in order ("fast") or as in a crash ("immediate"); the seconds are from its start."""
    site.start("api")
    site.start("worker")
    site.ready()
    jobs = [site.submit(seed=i) for i in range(2)]
    site.fitting(jobs[0])
    database.stop(mode)
    answer = httpx.get(f"{site.client.url}/v1/jobs/{jobs[0]}", timeout=60)
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:sdfserver:problem:not-ready")
    time.sleep(3)
    database.start()
    started = time.monotonic()
    seconds = site.running(jobs[0], 2) - started

    def answers() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{site.client.url}/v1/jobs/{jobs[0]}", timeout=60).is_success
        return False

    until(answers)
    return Recovery(jobs, seconds)


def one_of_each_killed(site: Host, jobs: int) -> Recovery:
    """Two APIs and four workers, and SIGKILL of an API and of a worker that has a job: the seconds until that runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    site.start("api")
    second = site.start("api", port=port)
    for _ in range(4):
        site.start("worker")
    site.ready(workers=4)
    with Client(f"http://127.0.0.1:{port}", timeout_s=60, retry_s=60) as other:
        posted = [site.submit(seed=i) for i in range(jobs // 2)]
        posted += [other.submit(CLOUD, preset="draft", resolution=32, seed=i).id for i in range(jobs - len(posted))]
    hit = site.fitting(posted[0]).worker
    (worker,) = [psutil.Process(row.pid) for row in site.store.workers() if row.id == hit]
    harmed = site.kill(worker, second)
    return Recovery(posted, site.running(posted[0], 2) - harmed)


HOSTS_SCENARIOS: dict[str, Callable[[Host, Cluster, Elsewhere], Recovery]] = {
    "host with the job lost for good, beside another": host_lost,
    "host with the job cut off, beside another": lambda site, database, far: network_cut(site, database, far)[0],
    "database stopped in order, from its new start": lambda site, database, _: database_restarted(
        site, database, "fast"
    ),
    "database crashed, from its new start": lambda site, database, _: database_restarted(site, database, "immediate"),
    "one of two APIs and one of four workers killed": lambda site, *_: one_of_each_killed(site, 3),
}
SCENARIOS: dict[str, Callable[[Host], Recovery]] = {
    "worker's child killed in mid-fit": child_killed,
    "worker's child killed while meshing": child_killed_in_mesh,
    "worker killed in mid-fit": worker_killed_in_fit,
    "worker killed while meshing": worker_killed_in_mesh,
    "worker killed while publishing": worker_killed_publishing,
    "worker frozen past its lease, beside another": lambda host: worker_frozen(host)[0],
    "worker frozen in mid-write, beside another": lambda host: worker_frozen_writing(host, supervised=False)[0],
    "everything killed, from the new start": everything_killed,
    "SIGTERM with no time to finish, from the new start": drained_and_started,
    "API killed, until it answers": api_killed,
    "running fit cancelled, until the next job runs": cancelled,
}
