"""How the service stands, as the database knows: for `sdfserver status`."""

from collections import defaultdict
from typing import Any

from sdfserver.schemas import JobState
from sdfserver.server.liveness import living
from sdfserver.server.store import Store

FAILURES = 5


def look(store: Store, lease_seconds: float) -> dict[str, Any]:
    """Jobs by state, the queue's age, workers and what they do, and the last failures, as plain data."""
    counts = store.counts()
    running: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in store.running():
        about = {name: getattr(row, name) for name in ("id", "name", "stage", "progress", "attempt")}
        running[row.worker].append(about)
    return {
        "jobs": {state.value: counts.get(state.value, 0) for state in JobState},
        "queue_age_seconds": store.oldest_wait(),
        "workers": [
            {
                "id": worker.id,
                "device": worker.device,
                "silent_seconds": worker.silence,
                "figures": worker.figures,
                "jobs": running[worker.id],
            }
            for worker in living(store, lease_seconds)
        ],
        "failures": [
            {
                "id": row.id,
                "name": row.name,
                "seconds_ago": row.ago,
                "problem": (row.problem or {}).get("type", "").rpartition(":")[2],
                "detail": (row.problem or {}).get("detail", ""),
            }
            for row in store.last_failures(FAILURES)
        ],
    }


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    jobs = found["jobs"]
    waiting = f" (the first for {_duration(found['queue_age_seconds'])})" if jobs["queued"] else ""
    ended = ", ".join(f"{jobs[state]} {state}" for state in ("succeeded", "failed", "cancelled"))
    lines = [f"jobs      {jobs['queued']} waiting{waiting}, {jobs['running']} running; {ended}"]
    for i, worker in enumerate(found["workers"]):
        lines.append(f"{'workers' if not i else '':<10}{worker['id']}  {worker['device']}{_figures(worker['figures'])}")
        lines += [
            f"{'':12}{job['id']}  {job['stage'] or 'begins'} {job['progress']:.0%}  {job['name']}"
            + (f"  (attempt {job['attempt']})" if job["attempt"] > 1 else "")
            for job in worker["jobs"]
        ]
    if not found["workers"]:
        lines.append("workers   none; start one with 'sdfserver serve' or 'sdfserver worker'")
    for i, job in enumerate(found["failures"]):
        heading = "failures" if not i else ""
        lines.append(
            f"{heading:<10}{_duration(job['seconds_ago'])} ago  {job['id']}  {job['problem']}: {job['detail']}"
        )
    return "\n".join(lines)


def _figures(figures: dict[str, float] | None) -> str:
    if not figures:
        return ""
    used, total = (figures[name] / 2**30 for name in ("memory_used_bytes", "memory_bytes"))
    return f"  {figures['busy']:.0%} busy, {used:.1f} of {total:.1f} GiB in use"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
