"""The disk fills up, or takes nothing; the clock jumps; memory ends: jobs end with a reason or go on, none is lost."""

import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from faults.host import CLOUD, PATIENCE_S, Host, until

from sdfserver.schemas import JobState

pytestmark = pytest.mark.timeout(1800)
DISK_BYTES = 64 * 2**20


@contextmanager
def small_disk(where: Path) -> Iterator[None]:
    """A file system of its own, with little room; skips where none can be mounted."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(where)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=False)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with small_disk(tmp_path / "data"):
        host = Host(tmp_path, processors=1)
        try:
            yield host
        finally:
            host.close()


def fill(host: Host, room: int) -> Path:
    """Leave that many bytes."""
    filler = host.data / "filler"
    with filler.open("wb") as stream:
        block = b"\0" * 4096
        while shutil.disk_usage(host.data).free > room:
            stream.write(block)
            stream.flush()
    return filler


def post(host: Host) -> httpx.Response:
    options = {"preset": "draft", "resolution": "32"}
    with CLOUD.open("rb") as cloud:
        url = f"{host.client.url}/v1/jobs"
        return httpx.post(url, params={"name": CLOUD.name} | options, content=cloud.read(), timeout=PATIENCE_S)


KIB = 1024
FEW = [8 * KIB, 300 * KIB]
MANY = [0, 32 * KIB, 64 * KIB, 100 * KIB, 150 * KIB, 200 * KIB, 400 * KIB, 500 * KIB, 700 * KIB, 1000 * KIB, 1500 * KIB]


@pytest.mark.parametrize("room", [*FEW, *(pytest.param(room, marks=pytest.mark.slow) for room in MANY)])
def test_a_disk_that_fills_up_loses_no_job(host: Host, room: int) -> None:
    host.serve()
    first = host.submit()
    host.succeeds(first)
    filler = fill(host, room)
    answer = post(host)
    assert answer.status_code in (202, 507), answer.text
    if answer.status_code == 507:
        assert answer.json()["type"] == "urn:sdfserver:problem:disk-full"
    else:
        job = answer.json()["id"]

        def over() -> bool:
            # Where even the database takes nothing, the job waits for room.
            return JobState(host.row(job).state).final or "disk is full" in host.said()

        until(over)
    filler.unlink()
    if answer.status_code == 202:
        until(lambda: JobState(host.row(job).state).final)
        if host.row(job).state == JobState.SUCCEEDED:
            host.succeeds(job)
        else:
            host.fails(job, "disk-full")
    host.succeeds(host.submit())
    host.succeeds(first)
    host.leaves_nothing_behind()


def test_a_data_folder_that_may_only_be_read_is_told_of(host: Host) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(host.data)], check=True)
    started = host.start("serve")
    assert started.wait(60) == 2
    said = host.said()
    assert "cannot be used" in said
    assert "Traceback" not in said
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("jump", ["+3600", "-3600", "+100d"])
def test_a_clock_that_jumps_costs_no_attempt(tmp_path: Path, jump: str) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("no libfaketime")
    offset = tmp_path / "offset"
    offset.write_text("+0")
    host = Host(tmp_path, processors=1, retention_seconds=10**9)
    host.environment |= {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    try:
        host.serve(workers=2)
        host.ready(workers=2)
        job = host.submit()
        host.fitting(job)
        before = host.row(job).started_at
        offset.write_text(jump)
        row = host.succeeds(job)
        assert (row.attempt, row.deaths) == (1, 0)
        jumped = row.finished_at - before
        assert abs(jumped) > 3000, "the clock did jump"
        assert (jumped > 0) == jump.startswith("+")
        following = host.submit()
        assert host.succeeds(following).attempt == 1
        host.kill(host.processes("worker")[0], host.processes("worker")[1])
        host.succeeds(host.submit())
        host.leaves_nothing_behind()
    finally:
        host.close()


@pytest.mark.slow
def test_a_process_that_gets_no_memory_says_so(tmp_path: Path) -> None:
    host = Host(tmp_path, processors=1)
    try:
        host.serve()
        host.succeeds(host.submit())
        child = host.child()
        most = child.memory_info().vms + 2**20
        resource.prlimit(child.pid, resource.RLIMIT_AS, (most, most))
        row = host.fails(host.submit(preset="standard", resolution=256), "memory")
        assert (row.attempt, row.deaths) == (1, 0)
        assert psutil.pid_exists(child.pid)
        host.kill(child)
        host.succeeds(host.submit())
        host.leaves_nothing_behind()
    finally:
        host.close()
