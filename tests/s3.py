"""An S3 of the tests' own: OpenStack Swift with its s3api, which checks signatures as Amazon does.

Three servers keep accounts, containers and objects on a disk of this machine, a fourth answers; memcached is the cache
without which the fourth does not start.
"""

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store
from waiting import wait_until

USER, SECRET = "test:tester", "testing"
_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/disks
mount_check = false
fallocate_reserve = 0
disable_fallocate = true
log_address = {folder}/no-syslog
"""
_STORAGE = """
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
_PROXY = """
[pipeline:main]
pipeline = catch_errors cache s3api tempauth bulk slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{cache}
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
auth_pipeline_check = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
"""


class S3:
    """The servers, to be stopped and started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = dict(zip(("object", "container", "account", "proxy", "cache"), _free_ports(5), strict=True))
        self._running: list[subprocess.Popen[bytes]] = []
        self.url = f"http://127.0.0.1:{self._ports['proxy']}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client finds it by."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def configure(self) -> None:
        """Write what the servers read."""
        (self._folder / "disks" / "d1").mkdir(parents=True)
        (self._folder / "swift.conf").write_text(
            f"[swift-hash]\nswift_hash_path_suffix = {secrets.token_hex(8)}\n"
            "[storage-policy:0]\nname = one\ndefault = 1\n"
        )
        ring = [sys.executable, str(Path(sys.executable).with_name("swift-ring-builder"))]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        for name, port in self._ports.items():
            conf = _CONF.format(port=port, folder=self._folder, user=user)
            conf += _PROXY.format(cache=self._ports["cache"]) if name == "proxy" else _STORAGE.format(name=name)
            (self._folder / f"{name}.conf").write_text(conf)
        for name in ("object", "container", "account"):
            builder = str(self._folder / f"{name}.builder")
            for step in (
                ["create", "1", "1", "0"],
                ["add", f"r1z1-127.0.0.1:{self._ports[name]}/d1", "1"],
                ["rebalance"],
            ):
                done = subprocess.run([*ring, builder, *step], capture_output=True, text=True, check=False)
                assert done.returncode in (0, 1), done.stdout + done.stderr  # 1 is a warning: a single disk

    def start(self) -> None:
        """Start them, and wait until they answer."""
        launcher = str(Path(__file__).with_name("swift_server.py"))
        commands = [["memcached", "-u", "nobody", "-l", "127.0.0.1", "-p", str(self._ports["cache"]), "-m", "16"]]
        for name in ("object", "container", "account", "proxy"):
            conf = [str(self._folder / file) for file in ("swift.conf", f"{name}.conf")]
            commands.append([sys.executable, "-W", "ignore", launcher, conf[0], f"{name}-server", conf[1]])
        with (self._folder / "log").open("ab") as log:
            self._running = [
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) for command in commands
            ]
        for port in self._ports.values():
            wait_until(lambda port=port: _answers(port), patience_s=60, pause_s=0.1)  # type: ignore[misc]

    def stop(self) -> None:
        """Kill them; what they keep stays."""
        for process in self._running:
            process.kill()
        for process in self._running:
            process.wait()
        self._running = []

    def bucket(self) -> str:
        """The name of a new bucket."""
        name = f"bucket-{secrets.token_hex(4)}"
        url = obstore.sign(self.store(name), "PUT", "", timedelta(seconds=60))
        request = urllib.request.Request(url, method="PUT", data=b"")  # noqa: S310 - ours
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            assert answer.status == 200
        return name

    def store(self, bucket: str, secret: str = SECRET) -> S3Store:
        """A client."""
        return S3Store(
            bucket,
            endpoint=self.url,
            region="us-east-1",
            access_key_id=USER,
            secret_access_key=secret,
            client_options={"allow_http": True},
        )


@contextmanager
def s3_server() -> Iterator[S3]:
    """One that runs; skips where Swift or memcached is not installed."""
    if importlib.util.find_spec("swift") is None or shutil.which("memcached") is None:
        pytest.skip("no Swift, or no memcached")
    # The servers name their files in attributes that not every file system has: not always that of /tmp.
    with tempfile.TemporaryDirectory(prefix="sdfserver-s3-") as name:
        folder = Path(name)
        try:
            os.setxattr(folder, "user.sdfserver", b"1")
        except OSError:
            pytest.skip(f"the file system of {folder} keeps no extended attributes")
        server = S3(folder)
        try:
            server.configure()
            server.start()
            yield server
        finally:
            server.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
