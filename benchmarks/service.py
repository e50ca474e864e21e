#!/usr/bin/env python3
"""Load on the service: what a submission costs, and how it answers while a fit runs and many upload at once.

    python benchmarks/service.py [--uploads 200] [--finish] [--json FILE]

Starts `sdfserver serve` in a temporary folder and measures, in this order: how long an idle server takes from accepting
a job to starting it (by the job's own times); how long GET /v1/jobs/{id} takes while a fit runs, before, during and
after as many uploads of small clouds at once; whether each of those is there once; and the memory of the API's process.
With --finish it waits until all of them have ended, which takes minutes.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

KNOT = Path(__file__).resolve().parent.parent / "data" / "knot.ply"
BARS = {"get_p95_ms": 50.0, "claim_p95_ms": 100.0}
WATCHERS = 4
PAUSE_S = 0.05


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, int]]:
    """`sdfserver serve`: its URL and its process."""
    limits = {"SDFSERVER_MAX_JOBS_PER_KEY": "100000", "SDFSERVER_MAX_QUEUE": "100000", "SDFSERVER_DRAIN_SECONDS": "0"}
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdfserver", "serve", "--port", "0", "--data-dir", str(folder / "data")],
            env=os.environ | limits,
            stderr=stream,
            stdin=subprocess.DEVNULL,
        )
    try:
        end = time.monotonic() + 120
        while True:
            found = re.search(r"serving on (http://\S+)", log.read_text())
            if found and _ready(found[1]):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start: {log.read_text()}")
            time.sleep(0.2)
        yield found[1], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=60).is_success
    except httpx.HTTPError:
        return False


def api_of(pid: int) -> psutil.Process:
    """The API among the supervisor's processes."""
    return next(child for child in psutil.Process(pid).children() if "api" in child.cmdline())


def cloud(seed: int, points: int = 300) -> bytes:
    """A small sphere, as XYZ with normals; no two are alike."""
    normals = np.random.default_rng(seed).normal(size=(points, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return "".join(f"{x:.6f} {y:.6f} {z:.6f} {x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in normals).encode()


async def submit(client: httpx.AsyncClient, seed: int, **query: Any) -> dict[str, Any]:
    """Post the cloud of that seed."""
    answer = await client.post(
        "/v1/jobs",
        files={"cloud": (f"sphere-{seed}.xyz", cloud(seed))},
        data={"options": json.dumps({"preset": "draft", "resolution": 24} | query)},
        headers={"Idempotency-Key": f"sphere-{seed}"},
    )
    answer.raise_for_status()
    job: dict[str, Any] = answer.json()
    return job


async def running(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """The job, once it runs."""
    while True:
        job: dict[str, Any] = (await client.get(url)).json()
        if job["state"] != "queued":
            return job
        await asyncio.sleep(PAUSE_S)


async def claims(client: httpx.AsyncClient, count: int) -> list[float]:
    """Seconds from accepted to started, each on an idle queue; after one job that warms the worker up."""
    first = (await submit(client, 2_000_000))["links"]["self"]
    while (await client.get(first)).json()["step"] is None:
        await asyncio.sleep(PAUSE_S)
    await client.post(f"{first}/cancel")
    await asyncio.sleep(2.0)
    seconds = []
    for seed in range(count):
        job = await submit(client, 1_000_000 + seed)
        started = await running(client, job["links"]["self"])
        times = [datetime.fromisoformat(started[name]).timestamp() for name in ("created_at", "started_at")]
        seconds.append(times[1] - times[0])
        await client.post(job["links"]["cancel"])
        await asyncio.sleep(2.0)  # its process stops, and is ready again
    return seconds


class Watch:
    """GETs of one job by a process of its own, WATCHERS at once; their latencies by what went on meanwhile."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--watch", url], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        self._phases: list[tuple[float, str]] = []

    def now(self, phase: str) -> None:
        self._phases.append((time.monotonic(), phase))

    def end(self) -> dict[str, list[float]]:
        """Milliseconds of each GET, by the phase that it began in."""
        self._process.terminate()
        found: dict[str, list[float]] = {}
        for line in self._process.communicate()[0].splitlines():
            began, seconds = map(float, line.split())
            phases = [phase for start, phase in self._phases if start <= began]
            if phases:
                found.setdefault(phases[-1], []).append(1000 * seconds)
        return found


def watch(url: str) -> None:
    """The process of Watch: prints when each GET began and how long it took."""

    def ask() -> None:
        with httpx.Client(timeout=600) as client:
            while True:
                began = time.monotonic()
                client.get(url).raise_for_status()
                lines.append(f"{began} {time.monotonic() - began}")
                time.sleep(PAUSE_S)

    def stop(*_: object) -> None:
        print("\n".join(lines), flush=True)
        os._exit(0)

    lines: list[str] = []
    signal.signal(signal.SIGTERM, stop)
    for _ in range(WATCHERS):
        threading.Thread(target=ask, daemon=True).start()
    while True:
        time.sleep(1.0)


async def listed(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """All jobs, page by page."""
    jobs: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await client.get("/v1/jobs", params={"limit": 100} | cursor)).raise_for_status().json()
        jobs += page["jobs"]
        if page["next"] is None:
            return jobs
        cursor = {"cursor": page["next"]}


async def measure(url: str, pid: int, uploads: int, *, finish: bool) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        claimed = await claims(client, 20)
        fit = await client.post(
            "/v1/jobs?preset=fine&priority=10", params={"name": "knot.ply"}, content=KNOT.read_bytes()
        )
        long_job = (await running(client, fit.raise_for_status().json()["links"]["self"]))["links"]["self"]
        api = api_of(pid)
        watching = Watch(f"{url}{long_job}")
        await asyncio.sleep(3.0)
        watching.now("a fit runs")
        await asyncio.sleep(10.0)
        memory = {"before": api.memory_info().rss}
        watching.now(f"{uploads} upload at once")
        start = time.perf_counter()
        taken = await asyncio.gather(*(submit(client, seed) for seed in range(uploads)))
        seconds = time.perf_counter() - start
        memory["after the uploads"] = api.memory_info().rss
        watching.now(f"{uploads} wait")
        await asyncio.sleep(10.0)
        latencies = watching.end()
        again = await asyncio.gather(*(submit(client, seed) for seed in range(uploads)))
        memory["after the same once more"] = api.memory_info().rss
        state = (await client.get(long_job)).json()["state"]
        jobs = [job for job in await listed(client) if re.fullmatch(r"sphere-\d{1,6}\.xyz", job["name"])]
        names = Counter(job["name"] for job in jobs)
        result: dict[str, Any] = {
            "uploads": uploads,
            "uploads_s": seconds,
            "lost": uploads - len(names),
            "doubled": sum(count - 1 for count in names.values()),
            "same_job_when_repeated": [job["id"] for job in taken] == [job["id"] for job in again],
            "fit_was": state,
            "claim_ms": [1000 * value for value in claimed],
            "get_ms": latencies,
            "api_rss_mib": {name: value / 2**20 for name, value in memory.items()},
        }
        if finish:
            await client.post(f"{long_job}/cancel")
            while any(job["state"] in ("queued", "running") for job in await listed(client)):
                await asyncio.sleep(5.0)
            result["ended"] = Counter(job["state"] for job in await listed(client) if job["name"] in names)
            result["api_rss_mib"]["in the end"] = api.memory_info().rss / 2**20
        return result


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def table(result: dict[str, Any]) -> str:
    rows = [
        ("uploads lost, doubled", f"{result['lost']}, {result['doubled']} of {result['uploads']}", "0, 0"),
        ("all of them taken in", f"{result['uploads_s']:.1f} s", ""),
        ("repeated with their keys: the same jobs", "yes" if result["same_job_when_repeated"] else "no", "yes"),
        *(
            (
                f"GET of a job, {phase}: median, p95, max",
                f"{statistics.median(ms):.1f}, {p95(ms):.1f}, {max(ms):.0f} ms",
                f"p95 {BARS['get_p95_ms']:.0f} ms",
            )
            for phase, ms in result["get_ms"].items()
        ),
        (
            "accepted to started, idle: median, p95",
            f"{statistics.median(result['claim_ms']):.0f}, {p95(result['claim_ms']):.0f} ms",
            f"{BARS['claim_p95_ms']:.0f} ms",
        ),
        *((f"memory of the API {when}", f"{mib:.0f} MiB", "") for when, mib in result["api_rss_mib"].items()),
        *((f"ended {state}", str(count), "") for state, count in result.get("ended", {}).items()),
    ]
    return "\n".join(["| what | measured | bar |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--finish", action="store_true", help="wait until all jobs have ended")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--watch", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watch:
        watch(args.watch)
    load = os.getloadavg()[0]
    if load > 0.5 * (os.cpu_count() or 1):
        print(f"warning: the machine is busy already (load {load:.1f}); the figures are contended", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (url, pid):
        result = asyncio.run(measure(url, pid, args.uploads, finish=args.finish))
    result["load_before"] = load
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    slow = max(p95(ms) for ms in result["get_ms"].values()) > BARS["get_p95_ms"]
    late = p95(result["claim_ms"]) > BARS["claim_p95_ms"]
    return int(bool(result["lost"] or result["doubled"] or slow or late))


if __name__ == "__main__":
    sys.exit(main())
