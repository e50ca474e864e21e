"""A PostgreSQL server of the tests' own, to be stopped and started; and a network to reach it by, to be cut."""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

USER = "postgres"
"""Who runs the server where the tests are root, whom it refuses."""


class Cluster:
    """A server, and the database of it that is in use."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self._folder, self._binaries, self._database = folder, binaries, "postgres"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", USER, "--", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr

    def create(self) -> None:
        """Make it, open to everybody who can reach it, and start it."""
        data = self._folder / "data"
        self._run("initdb", "-D", str(data), "-U", USER, "-A", "trust", "--no-sync")
        with (data / "pg_hba.conf").open("a") as stream:
            stream.write("host all all 0.0.0.0/0 trust\n")
        self.start()

    def begin(self) -> None:
        """Use a new database from now on."""
        name = f"sdfserver_{secrets.token_hex(4)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        self._database = name

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=* -k {self._folder} -c fsync=off"
        log = str(self._folder / "log")
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-o", options, "-l", log, "-w", "start")

    def stop(self, mode: str) -> None:
        """Stop it: `fast` ends its connections in order, `immediate` as a crash would."""
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-m", mode, "-w", "stop")

    def url(self, address: str = "127.0.0.1") -> str:
        """The database, from where the server has that address."""
        return f"postgresql://{USER}@{address}:{self.port}/{self._database}"


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A server that runs; skips where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found += [Path(where).parent for where in map(shutil.which, ["postgres"]) if where]
    with suppress(KeyError):
        owner = pwd.getpwnam(USER) if os.geteuid() == 0 else None
        if found:
            folder = Path(tempfile.mkdtemp(prefix="sdfserver-pg-"))
            if owner is not None:
                os.chown(folder, owner.pw_uid, owner.pw_gid)
            one = Cluster(folder, found[0])
            try:
                one.create()
                yield one
            finally:
                with suppress(AssertionError):
                    one.stop("immediate")
                shutil.rmtree(folder, ignore_errors=True)
            return
    pytest.skip("PostgreSQL is not installed, or there is no user to run it")


class Elsewhere:
    """Another host, as far as network, names and processes go; it shares the disk."""

    def __init__(self) -> None:
        self._name = f"sdf{secrets.token_hex(3)}"
        self._ours, self._theirs = f"{self._name}a", f"{self._name}b"
        block = secrets.randbelow(250)
        self.address = f"10.77.{block}.1"
        """By which what runs there reaches this host."""
        self._there = f"10.77.{block}.2"

    @property
    def prefix(self) -> list[str]:
        """Before a command, it runs there: with its end all that it started ends."""
        there = ["ip", "netns", "exec", self._name]
        return [*there, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]

    def create(self) -> None:
        """Make it, and a link to it."""
        _ip("netns", "add", self._name)
        _ip("link", "add", self._ours, "type", "veth", "peer", "name", self._theirs, "netns", self._name)
        _ip("addr", "add", f"{self.address}/24", "dev", self._ours)
        _ip("link", "set", self._ours, "up")
        for command in (("addr", "add", f"{self._there}/24", "dev", self._theirs), ("link", "set", self._theirs, "up")):
            _ip("-n", self._name, *command)
        _ip("-n", self._name, "link", "set", "lo", "up")

    def cut(self) -> None:
        """From now on nothing comes through, and nobody is told."""
        _ip("link", "set", self._ours, "down")

    def mend(self) -> None:
        """As before."""
        _ip("link", "set", self._ours, "up")

    def remove(self) -> None:
        """What runs there has ended."""
        with suppress(AssertionError):
            _ip("netns", "delete", self._name)
        with suppress(AssertionError):
            _ip("link", "delete", self._ours)


@contextmanager
def elsewhere() -> Iterator[Elsewhere]:
    """Another host; skips where none can be made."""
    one = Elsewhere()
    try:
        one.create()
        subprocess.run([*one.prefix, "true"], check=True, capture_output=True)
    except (AssertionError, OSError, subprocess.CalledProcessError) as error:
        one.remove()
        pytest.skip(f"no network namespaces here: {error}")
    try:
        yield one
    finally:
        one.remove()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
