#!/usr/bin/env python3
"""Harm a whole service in mid-job, in every way of tests/faults, and tabulate how soon the job runs again.

    python benchmarks/recovery.py [--repeat 3] [--postgres] [--hosts] [--only TEXT] [--json FILE]

Seconds are from the harm, or from the new start where everything was ended, until the store says that the next attempt
runs. All settings are the defaults but the folders and the device, which is the CPU. With --hosts also what harms
several hosts, on a PostgreSQL server that is made for it: this needs root, and network namespaces.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from faults.cluster import cluster, elsewhere
from faults.host import Host
from faults.scenarios import HOSTS_SCENARIOS, SCENARIOS
from waiting import fresh_postgres


def seconds_of(scenario: str, *, postgres: bool) -> float:
    """One run of a scenario, on a service of its own."""
    with tempfile.TemporaryDirectory() as folder, fresh_postgres() as url:
        if postgres and url is None:
            sys.exit("there is no PostgreSQL on 127.0.0.1:5432 that trusts the user postgres")
        with closing(Host(Path(folder), url if postgres else None)) as host:
            return SCENARIOS[scenario](host).seconds


def seconds_among_hosts(scenario: str) -> float:
    """The same, for a scenario of several hosts."""
    with tempfile.TemporaryDirectory() as folder, cluster() as database, elsewhere() as far:
        database.begin()
        with closing(Host(Path(folder), database.url())) as site:
            return HOSTS_SCENARIOS[scenario](site, database, far).seconds


def table(measured: dict[str, dict[str, list[float]]]) -> str:
    """The medians and the worst as Markdown: a line a scenario."""
    databases = sorted({name for by_database in measured.values() for name in by_database}, reverse=True)
    lines = [
        "| what is done | " + " | ".join(f"{name}: median (worst), s" for name in databases) + " |",
        "|---|" + "---|" * len(databases),
    ]
    for scenario, by_database in measured.items():
        found = [by_database.get(name, []) for name in databases]
        shown = [f"{statistics.median(values):.1f} ({max(values):.1f})" if values else "" for values in found]
        lines.append(f"| {scenario} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How soon a job runs again after a fault.")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each scenario")
    parser.add_argument("--postgres", action="store_true", help="on PostgreSQL as well")
    parser.add_argument("--hosts", action="store_true", help="faults of several hosts as well")
    parser.add_argument("--only", default="", help="scenarios with this text in their name")
    parser.add_argument("--json", type=Path, help="where the single figures go")
    asked = parser.parse_args()
    databases = ["SQLite", "PostgreSQL"] if asked.postgres else ["SQLite"]
    runs: list[tuple[str, str, Callable[[], float]]] = [
        (scenario, name, partial(seconds_of, scenario, postgres=name == "PostgreSQL"))
        for scenario in SCENARIOS
        for name in databases
    ]
    if asked.hosts:
        runs += [(scenario, "PostgreSQL", partial(seconds_among_hosts, scenario)) for scenario in HOSTS_SCENARIOS]
    measured: dict[str, dict[str, list[float]]] = {}
    for scenario, name, once in runs:
        if asked.only not in scenario:
            continue
        found = measured.setdefault(scenario, {})[name] = [once() for _ in range(asked.repeat)]
        print(f"{scenario}, {name}: {found}", file=sys.stderr)
        if asked.json is not None:
            asked.json.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured) if measured else f"no scenario has {asked.only!r} in its name")


if __name__ == "__main__":
    main()
