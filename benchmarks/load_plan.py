#!/usr/bin/env python3
"""How many workers hold a load: jobs arrive at random, and 95 of 100 begin within so many seconds.

    python benchmarks/load_plan.py [--seconds 1.5,25] [--rates 1,10,100] [--wait 10] [--writes 20] [--json FILE]

Simulates one queue that is served in order by workers alike: arrivals are a Poisson process, service times are spread
about their mean by a quarter (log-normal), as those of one preset on clouds of all sizes are. SECONDS are of a job from
its start to its end on one worker, measured by `sdfserver bench` or benchmarks/gpu_check.py. Each figure is over 20,000
jobs after 2,000 that fill the queue. The least number of workers is found by bisection, and rounded up to what is
enough when one of them is lost.

What saturates first is told from the other side: with WRITES transactions a job, each rate is so many commits a second
for the one database.
"""

import argparse
import heapq
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

JOBS, FIRST = 20_000, 2_000
SPREAD = 0.25


def waits(rate: float, seconds: float, workers: int, *, seed: int = 0) -> np.ndarray:
    """How long each job waits (JOBS,), in seconds."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, JOBS + FIRST))
    sigma = math.sqrt(math.log(1 + SPREAD**2))
    services = seconds * rng.lognormal(-(sigma**2) / 2, sigma, JOBS + FIRST)
    free = [0.0] * workers
    waited = np.empty(JOBS + FIRST)
    for i, (arrival, service) in enumerate(zip(arrivals.tolist(), services.tolist(), strict=True)):
        start = max(arrival, free[0])
        heapq.heapreplace(free, start + service)
        waited[i] = start - arrival
    return waited[FIRST:]


def least(rate: float, seconds: float, wait: float) -> tuple[int, float]:
    """The least number of workers with which 95 of 100 jobs wait no longer, and how long they then wait."""
    low = math.floor(rate * seconds) + 1  # with fewer the queue grows without end
    high = 2 * low + 4
    while low < high:
        middle = (low + high) // 2
        if float(np.quantile(waits(rate, seconds, middle), 0.95)) <= wait:
            high = middle
        else:
            low = middle + 1
    return low, float(np.quantile(waits(rate, seconds, low), 0.95))


def main() -> int:
    parser = argparse.ArgumentParser(description="How many workers hold a load.")
    parser.add_argument("--seconds", default="1.5,25", help="of a job on one worker")
    parser.add_argument("--rates", default="1,10,100", help="jobs a second")
    parser.add_argument("--wait", type=float, default=10.0, help="seconds that 95 of 100 may wait at most")
    parser.add_argument("--writes", type=float, default=20.0, help="transactions that a job writes")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found: list[dict[str, Any]] = []
    print("| seconds a job | jobs a second | workers | p95 wait, s | busy | with one lost | commits a second |")
    print("|---|---|---|---|---|---|---|")
    for seconds in map(float, asked.seconds.split(",")):
        for rate in map(float, asked.rates.split(",")):
            workers, p95 = least(rate, seconds, asked.wait)
            row = {
                "seconds": seconds,
                "rate": rate,
                "workers": workers,
                "p95_wait": p95,
                "busy": rate * seconds / workers,
                "with_one_lost": workers + 1,
                "commits_a_second": rate * asked.writes,
            }
            found.append(row)
            print(
                f"| {seconds:g} | {rate:g} | {workers} | {p95:.1f} | {row['busy']:.0%} | {workers + 1} | "
                f"{row['commits_a_second']:.0f} |",
                flush=True,
            )
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
