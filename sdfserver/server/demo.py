"""`sdfserver demo`: the whole service at work, once, through its own client."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdfserver.errors import ServiceError

if TYPE_CHECKING:
    from sdfserver.schemas import Job, Preset

START_SECONDS = 60.0
STOP_SECONDS = 20.0


def run_demo(
    cloud: Path,
    output: Path,
    preset: "Preset",
    say: Callable[[str], None],
    on_progress: Callable[["Job"], None] | None,
) -> dict[str, Any]:
    """Start a server in a temporary folder, have it reconstruct a cloud, and stop it; the report."""
    from sdfserver.client import Client

    with (
        tempfile.TemporaryDirectory(prefix="sdfserver-demo-") as folder,
        running_server(Path(folder)) as url,
        Client(url) as client,
    ):
        say(f"a server runs on {url}, for as long as this takes")
        job = client.submit(cloud, preset=preset)
        say(f"posted {cloud.name} as job {job.id}")
        job.wait(on_progress)
        job.download(output)
        report: dict[str, Any] = job.report()
    return report


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """A server of its own on a free port, its data in `folder`; yields its URL. Raises ServiceError."""
    process = subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-m", "sdfserver", "serve", "--port", "0", "--data-dir", str(folder / "data")],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"SDFSERVER_DRAIN_SECONDS": "0"},
        start_new_session=True,
        text=True,
    )
    lines: list[str] = []
    try:
        yield _url(process, lines)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _url(process: "subprocess.Popen[str]", lines: list[str]) -> str:
    """Where the server listens, as it says itself; what it says after that is read and dropped."""
    found: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            lines.append(line)
            match = re.search(r"serving on (http://\S+)", line)
            if match:
                found.append(match[1])
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    ready.wait(START_SECONDS)
    if not found:
        raise ServiceError(f"the server did not start: {' '.join(lines)[-300:].strip() or 'it said nothing'}")
    return found[0]
