"""What Prometheus is told: of requests by this process, of jobs, queue and workers by the database.

Counts of jobs are the database's, so that every API gives the same ones, and a restart begins none again.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdfserver.schemas import JobState
from sdfserver.server.liveness import living
from sdfserver.server.store import STAGE_BUCKETS, Store

_COUNTERS = {
    "jobs_submitted": ("sdfserver_jobs_submitted", "Jobs accepted"),
    "jobs_ended": ("sdfserver_jobs_ended", "Jobs that ended, by how, and failed ones by the kind of problem"),
    "recoveries": ("sdfserver_recoveries", "Jobs put back into the queue because their worker died"),
    "deaths": ("sdfserver_deaths", "Attempts that ended with the death of their process"),
    "upload_bytes": ("sdfserver_upload_bytes", "Bytes of the clouds that were accepted"),
}
_DEVICE = {
    "memory_used_bytes": ("sdfserver_gpu_memory_used_bytes", "Memory in use on a worker's GPU, by whomever"),
    "memory_bytes": ("sdfserver_gpu_memory_bytes", "Memory of a worker's GPU"),
    "busy": ("sdfserver_gpu_busy", "Share of the last moments in which a worker's GPU computed, 0 to 1"),
}


class Metrics:
    """The figures of one API process, and of the database that it shares."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "sdfserver_http_requests", "Requests answered", ["method", "route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "sdfserver_http_request_seconds", "Seconds to the first byte of an answer", ["route"],
            registry=self._registry,
        )  # fmt: skip

    def text(self, store: Store, lease_seconds: float) -> bytes:
        """All figures, in Prometheus's format."""
        shared = CollectorRegistry()
        shared.register(_Shared(store, lease_seconds))
        return generate_latest(self._registry) + generate_latest(shared)


class _Shared:
    """What the database knows."""

    def __init__(self, store: Store, lease_seconds: float) -> None:
        self._store, self._lease = store, lease_seconds

    def collect(self) -> Iterator[Metric]:
        counts = self._store.counts()
        jobs = GaugeMetricFamily("sdfserver_jobs", "Jobs by state", labels=["state"])
        for state in JobState:
            jobs.add_metric([state.value], counts.get(state.value, 0))
        yield jobs
        wait = "Seconds that the first in the queue has been waiting"
        yield GaugeMetricFamily("sdfserver_queue_age_seconds", wait, value=self._store.oldest_wait())
        workers = living(self._store, self._lease)
        yield GaugeMetricFamily("sdfserver_workers", "Workers that are alive", value=len(workers))
        for figure, (name, text) in _DEVICE.items():
            family = GaugeMetricFamily(name, text, labels=["worker", "device"])
            for worker in workers:
                if figure in (worker.figures or {}):
                    family.add_metric([worker.id, worker.device], worker.figures[figure])
            yield family
        yield from _totals(self._store.totals())


def _totals(totals: Mapping[tuple[str, str], float]) -> Iterator[Metric]:
    by_name: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for (name, labels), value in sorted(totals.items()):
        by_name[name].append((dict(label.split("=", 1) for label in labels.split(",") if label), value))
    for name, (title, text) in _COUNTERS.items():
        rows = by_name[name]
        counter = CounterMetricFamily(title, text, labels=list(rows[0][0]) if rows else [])
        for of, value in rows or [({}, 0.0)]:
            counter.add_metric(list(of.values()), value)
        yield counter
    seconds = HistogramMetricFamily(
        "sdfserver_job_stage_seconds", "Seconds that jobs waited, were fitted, and meshed", labels=["stage"]
    )
    sums = {labels["stage"]: value for labels, value in by_name["stage_sum"]}
    for stage, total in sums.items():
        seen = {labels["le"]: value for labels, value in by_name["stage_seconds"] if labels["stage"] == stage}
        buckets, below = [], 0.0
        for edge in (*map(str, STAGE_BUCKETS), "+Inf"):
            below += seen.get(edge, 0.0)
            buckets.append((edge, below))
        seconds.add_metric([stage], buckets, sum_value=total)
    yield seconds


class Measured:
    """Counts requests by route, and the seconds until their answers begin."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = asyncio.get_running_loop().time()

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The pattern, not the path: a label for every job would never end.
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(scope["method"], route, message["status"]).inc()
                self._metrics.seconds.labels(route).observe(asyncio.get_running_loop().time() - start)
            await send(message)

        await self._app(scope, receive, observed)
