"""What is done to a service: each scenario takes a fresh Host, harms it in mid-job, and sees the job run again.

Used by the tests, which then look at how it ends, and by benchmarks/recovery.py, which prints the seconds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from faults.host import Host, until

from sdfserver.schemas import JobState


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


def worker_frozen_writing(host: Host, *, supervised: bool, **settings: Any) -> Recovery:
    """SIGSTOP of a worker that holds SQLite's lock: nobody else can write until it is killed."""
    if supervised:
        host.serve(**settings)
        job = host.submit()
        host.fitting(job)
        first = host.process("worker")
    else:
        job, first = fitting_beside_another(host, **settings)
    host.freeze(first, writing=True)
    harmed = time.monotonic()
    return Recovery([job], host.running(job, 2) - harmed)


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


SCENARIOS: dict[str, Callable[[Host], Recovery]] = {
    "worker's child killed in mid-fit": child_killed,
    "worker's child killed while meshing": child_killed_in_mesh,
    "worker killed in mid-fit": worker_killed_in_fit,
    "worker killed while meshing": worker_killed_in_mesh,
    "worker killed while publishing": worker_killed_publishing,
    "worker frozen past its lease, beside another": lambda host: worker_frozen(host)[0],
    "everything killed, from the new start": everything_killed,
    "SIGTERM with no time to finish, from the new start": drained_and_started,
    "API killed, until it answers": api_killed,
    "running fit cancelled, until the next job runs": cancelled,
}
