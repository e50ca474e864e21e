"""`sdfserver serve`: the API and its workers as processes of one parent, which starts again what dies.

The parent holds the listening socket: while the API is being started again, connections wait rather than fail. The
others end with the parent: each watches a pipe that only the parent holds open.
"""

import contextlib
import errno
import ipaddress
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import uvicorn
from sqlalchemy.exc import SQLAlchemyError

from sdfserver.errors import ConfigError
from sdfserver.server.gpus import VARIABLE, visible_gpus
from sdfserver.server.liveness import Identity, Watch, identity
from sdfserver.server.settings import Settings
from sdfserver.server.storage import open_storage
from sdfserver.server.store import Row, Store

log = logging.getLogger(__name__)

LIFELINE = "SDFSERVER_LIFELINE"
"""The environment variable with the descriptor of the pipe that ends when the parent does."""
LOOK_SECONDS = 0.2
CALM_SECONDS, LONGEST_PAUSE = 10.0, 10.0
"""A process that lives shorter than this waits before it is started again, longer each time."""
API_GRACE_SECONDS = 5.0
PORT_SECONDS = 2.0
"""How long a taken port is waited for: the API of a supervisor that was killed takes a moment to let go of it."""


def gpus_of(settings: Settings) -> list[str]:
    """The GPUs that workers under these settings share out among them."""
    return visible_gpus() if settings.device in ("auto", "cuda") else []


def with_workers(settings: Settings) -> Settings:
    """The settings with a number of workers: unless they say one, one for each GPU, or one."""
    if settings.workers is not None:
        return settings
    return settings.model_copy(update={"workers": max(1, len(gpus_of(settings)))})


def check_public(settings: Settings, store: Store) -> None:
    """Raise ConfigError where anybody could use the server from outside and nobody said so."""
    if settings.allow_public_without_keys or is_loopback(settings.host) or store.list_keys():
        return
    raise ConfigError(
        f"host is {settings.host!r}, and no API keys are in use: anybody could use the server; create one with "
        "'sdfserver keys create NAME', or set SDFSERVER_ALLOW_PUBLIC_WITHOUT_KEYS=1"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(settings: Settings) -> socket.socket:
    """A socket that listens where the settings say. Raises ConfigError."""
    deadline = time.monotonic() + PORT_SECONDS
    while True:
        listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
            listener.listen(2048)
            return listener
        except (OSError, UnicodeError) as error:
            listener.close()
            if getattr(error, "errno", None) == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            reason = getattr(error, "strerror", None) or str(error)
            message = f"cannot listen on {settings.host}:{settings.port}: {reason}; take another --port"
            raise ConfigError(message) from None


def url_of(listener: socket.socket) -> str:
    """Where a client finds the server."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound, but replaced
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_api(settings: Settings, listener: socket.socket) -> None:
    """Serve HTTP on a socket that listens, until SIGTERM or SIGINT."""
    from sdfserver.server.app import create_app
    from sdfserver.server.protocol import BoundedProtocol

    raise_file_limit()
    config = uvicorn.Config(
        create_app(settings),
        http=BoundedProtocol,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(API_GRACE_SECONDS) - 2,
    )
    uvicorn.Server(config).run(sockets=[listener])


def raise_file_limit() -> None:
    """Let this process have as many connections as the system allows: the usual 1024 are soon taken."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def watch_parent() -> None:
    """End this process, in order, when the supervisor that started it is gone."""
    descriptor = os.environ.get(LIFELINE)
    if descriptor is None:
        return

    def wait() -> None:
        os.read(int(descriptor), 1)  # blocks until the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@dataclass
class _Process:
    """One that is kept running."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    running: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    failures: int = 0
    registered: bool = False


class Supervisor:
    """Keeps an API and workers running until told to stop."""

    def __init__(self, settings: Settings, listener: socket.socket, store: Store) -> None:
        self._settings, self._listener, self._store = settings, listener, store
        self._watch = Watch(store, settings.lease_seconds)
        self._lifeline, self._our_end = os.pipe()
        # The socket is for the API alone: a worker that outlived a killed supervisor would keep the port taken.
        fd = listener.fileno()
        self._processes = [_Process(name="api", start=lambda: self._spawn("api", "--fd", str(fd), pass_fd=fd))]
        gpus = gpus_of(settings)
        for i in range(settings.workers or 0):
            gpu = {VARIABLE: gpus[i % len(gpus)]} if gpus else {}
            self._processes.append(
                _Process(name=f"worker {i + 1}", start=partial(self._spawn, "worker", variables=gpu))
            )
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End everything in order; asked again, without waiting for jobs."""
        if self._stopping.is_set():
            for process in self._processes:
                if process.running is not None and process.running.poll() is None:
                    process.running.terminate()
        self._stopping.set()

    def run(self) -> None:
        """Start everything, start again what dies, and return when told to stop."""
        for process in self._processes:
            self._start(process)
        while not self._stopping.wait(LOOK_SECONDS):
            try:
                for process in self._processes:
                    self._look(process)
                self._kill_hanging()
            except Exception:
                log.exception("the supervisor could not look after its processes; it tries again")
        self._end()

    def _spawn(
        self, *command: str, pass_fd: int | None = None, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        settings = self._settings.model_dump(mode="json", exclude_none=True)
        environment = {f"SDFSERVER_{name.upper()}": str(value) for name, value in settings.items()}
        return subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-m", "sdfserver", *command],
            env=os.environ | environment | dict(variables or {}) | {LIFELINE: str(self._lifeline)},
            pass_fds=[self._lifeline] if pass_fd is None else [self._lifeline, pass_fd],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is the supervisor's, who ends them in order
        )

    def _start(self, process: _Process) -> None:
        process.running, process.started_at, process.registered = process.start(), time.monotonic(), False

    def _look(self, process: _Process) -> None:
        now = time.monotonic()
        if process.running is None:
            if now >= process.start_at:
                self._start(process)
        elif (code := process.running.poll()) is not None:
            log.warning("%s ended with code %s, and is started again", process.name, code)
            process.failures = 0 if now - process.started_at > CALM_SECONDS else process.failures + 1
            # The first time at once: a job waits for its worker.
            pause = 0.0 if process.failures <= 1 else min(LONGEST_PAUSE, 2.0 ** (process.failures - 2))
            process.running, process.start_at = None, now + pause
            self._look(process)

    def _kill_hanging(self) -> None:
        """Retire the workers that are dead, and kill those of ours that hang."""
        for row in self._watch.dead():
            for process in self._processes:
                # First: it may have been stopped in the middle of a write, and nobody else could write.
                if process.running is not None and identity(process.running.pid) == _identity_of(row):
                    self._kill(process)
            self._store.retire(row.id)
        alive = [_identity_of(row) for row in self._store.workers()]
        for process in self._processes:
            if process.running is not None and identity(process.running.pid) in alive:
                process.registered = True
            elif process.registered:  # somebody else has taken it for dead
                self._kill(process)

    @staticmethod
    def _kill(process: _Process) -> None:
        if process.running is not None and process.running.poll() is None:
            log.warning("%s does not answer, and is killed", process.name)
            process.running.kill()
            process.running.wait()

    def _end(self) -> None:
        if self._settings.drain_seconds and self._settings.workers:
            wait = f"a job under way has {self._settings.drain_seconds:g} s to finish"
            log.info("stopping; %s; once more, and it goes back into the queue at once", wait)
        # The API first: what it accepts now would wait until the next start.
        api, *workers = [process.running for process in self._processes]
        for running in (*workers, api):
            if running is not None:
                running.terminate()
        deadline = time.monotonic() + self._settings.drain_seconds + API_GRACE_SECONDS
        for running in (api, *workers):
            if running is not None:
                try:
                    running.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    running.kill()
                    running.wait()
        with contextlib.suppress(SQLAlchemyError):  # the next to look will see it as well
            for row in self._watch.dead():
                self._store.retire(row.id)


def serve(settings: Settings, on_listening: Callable[[str], None]) -> None:
    """Run the API and its workers until SIGTERM or SIGINT. Raises ConfigError where that cannot begin."""
    settings = with_workers(settings.model_copy(update={"data_dir": settings.data_dir.absolute()}))
    store = open_storage(settings)
    check_public(settings, store)
    listener = listen(settings)
    supervisor = Supervisor(settings, listener, store)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    on_listening(url_of(listener))
    supervisor.run()


def _identity_of(row: Row) -> Identity:
    return Identity(host=row.host, pid=row.pid, started=row.started)
