"""A long night: many jobs in a row through one server, and many silent clients that follow a job that waits.

    python tests/faults/long_run.py --jobs 500 --json benchmarks/results/long_run.json

Memory, files, handles and threads of every process are taken down on the way, and must not grow.
"""

import argparse
import json
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.host import Host, until

from sdfserver.schemas import JobState

ROLES = ("serve", "api", "worker", "job")
WARM_SHARE = 0.2
"""Of the jobs: after so many all caches are full, and growth is counted."""


def figures(host: Host) -> dict[str, Any]:
    """What the processes hold, and the files that there are."""
    taken: dict[str, Any] = {}
    for role in ROLES:
        for process in host.processes(role):
            with process.oneshot():
                taken[role] = {
                    "rss_mib": process.memory_info().rss / 2**20,
                    "handles": process.num_fds(),
                    "connections": len(process.net_connections("tcp")),
                    "threads": process.num_threads(),
                }
    database = sum(path.stat().st_size for path in host.data.glob("sdfserver.sqlite3*"))
    return taken | {"files": len(host._files()), "database_mib": database / 2**20}


def many_jobs(host: Host, jobs: int) -> dict[str, Any]:
    """Jobs, a few waiting at any time; results go after some seconds."""
    host.serve(retention_seconds=20, gone_seconds=20, sweep_seconds=1)
    looks, states, running = [], {}, []
    began = time.monotonic()
    for i in range(jobs):
        running.append(host.submit(resolution=24))
        if len(running) == 3:
            job = running.pop(0)
            until(lambda job=job: (row := host.store.job(job)) is None or JobState(row.state).final, pause_s=0.05)
            row = host.store.job(job)
            state = "gone" if row is None else str(row.state)
            states[state] = states.get(state, 0) + 1
        if (i + 1) % max(1, jobs // 25) == 0:
            looks.append({"jobs": i + 1} | figures(host))
            sys.stderr.write(json.dumps(looks[-1]) + "\n")
    seconds = time.monotonic() - began
    warm = [look for look in looks if look["jobs"] >= WARM_SHARE * jobs]
    middle = len(warm) // 2
    growth = {
        role: {
            what: mean(look[role][what] for look in warm[middle:]) / mean(look[role][what] for look in warm[:middle])
            - 1
            for what in ("rss_mib", "handles", "threads")
        }
        for role in ROLES
    }
    growth["files"] = mean(look["files"] for look in warm[middle:]) / mean(look["files"] for look in warm[:middle]) - 1
    restarted = host.said().count("started again")
    return {
        "jobs": jobs, "states": states, "seconds": seconds, "growth": growth, "restarted": restarted, "looks": looks,
    }  # fmt: skip


def silent_clients(host: Host, clients: int) -> dict[str, Any]:
    """Clients that ask for the events of a job that waits, and then neither read nor leave."""
    for worker in host.processes("serve"):
        host.stop(worker)
    api = host.start("api")
    until(lambda: answers(host) is not None)
    job = host.submit()
    api.cpu_percent()
    before = figures(host)["api"]
    with ExitStack() as stack:
        for _ in range(clients):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", host.port), 30))
            connection.sendall(f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        until(lambda: figures(host)["api"]["connections"] >= before["connections"] + clients)
        time.sleep(2)
        api.cpu_percent()
        waits = [answers(host) for _ in range(50)]
        time.sleep(20)
        busy = api.cpu_percent()
        during = figures(host)["api"]
    until(lambda: figures(host)["api"]["connections"] <= before["connections"] + 2)
    host.client.job(job).cancel()
    return {
        "clients": clients, "before": before, "during": during, "after": figures(host)["api"], "cpu_percent": busy,
        "answer_ms": sorted(1000 * wait for wait in waits if wait)[len(waits) // 2],
    }  # fmt: skip


def answers(host: Host) -> float | None:
    """How long the API takes to say that it lives; None if it does not."""
    began = time.monotonic()
    try:
        httpx.get(f"{host.client.url}/health/live", timeout=30).raise_for_status()
    except httpx.HTTPError:
        return None
    return time.monotonic() - began


def mean(values: Any) -> float:
    """Their mean."""
    some = list(values)
    return sum(some) / len(some)


def main() -> None:
    """Run both, and write down what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sdfserver-night-") as folder:
        host = Host(Path(folder), processors=None)
        host.environment["QUICK_STEPS"] = "150"  # it is not the fits that are looked at
        try:
            found = {"jobs": many_jobs(host, options.jobs), "silent": silent_clients(host, options.clients)}
        finally:
            host.close()
    sys.stdout.write(json.dumps({"growth": found["jobs"]["growth"], "silent": found["silent"]}, indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
