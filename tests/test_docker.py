"""The image: what its files promise, and a cloud reconstructed by what they build.

Where a Docker engine answers, the image is built and run. Where none does, the Dockerfile's own instructions are
carried out in a fresh Debian root, in namespaces that leave no mount behind, and the container is played by a chroot.
"""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = ["entrypoint.sh", "healthcheck.sh", "install.sh"]
UID = 10001
START_SECONDS, STOP_SECONDS, JOB_SECONDS = 180, 60, 1800


@dataclass
class Dockerfile:
    """A Dockerfile as far as ours goes: its instructions in order, and where they end up."""

    instructions: list[tuple[str, str]]
    args: dict[str, str | None] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Dockerfile":
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        text = "\n".join(lines).replace("\\\n", " ")
        pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
        found = cls([(name, " ".join(rest.split())) for name, rest in pairs])
        for name, rest in found.instructions:
            if name == "ARG":
                arg, _, default = rest.partition("=")
                found.args[arg] = default.strip('"') if "=" in rest else None
            elif name == "ENV":
                found.env |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        return found

    def all(self, name: str) -> list[str]:
        return [rest for instruction, rest in self.instructions if instruction == name]

    def last(self, name: str) -> str:
        return self.all(name)[-1]

    @property
    def copied(self) -> list[str]:
        """The files and folders that COPY takes."""
        return [source for rest in self.all("COPY") for source in rest.split()[:-1]]

    @property
    def command(self) -> list[str]:
        """What a container runs."""
        return [*json.loads(self.last("ENTRYPOINT")), *json.loads(self.last("CMD"))]

    @property
    def health_command(self) -> list[str]:
        found: list[str] = json.loads(self.last("HEALTHCHECK").partition("CMD ")[2])
        return found


@pytest.fixture(scope="module")
def docker(root: Path) -> Path:
    return root / "docker"


@pytest.fixture(scope="module")
def dockerfile(docker: Path) -> Dockerfile:
    return Dockerfile.read(docker / "Dockerfile")


# What the files promise


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_parse(docker: Path, name: str) -> None:
    script = docker / name
    assert script.stat().st_mode & 0o111 == 0o111
    interpreter = re.match(r"#!(?:/usr/bin/env )?(\S+)", script.read_text(encoding="utf-8"))
    assert interpreter is not None
    result = subprocess.run([interpreter[1], "-n", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing(docker: Path) -> None:
    result = subprocess.run(["shellcheck", *(docker / name for name in SCRIPTS)], capture_output=True, check=False)
    assert (result.returncode, result.stdout.decode()) == (0, "")


def test_the_image_takes_its_steps_from_the_scripts(dockerfile: Dockerfile) -> None:
    steps = ["system", "dependencies", "package"]
    assert dockerfile.all("RUN") == [f"docker/install.sh {step}" for step in steps]
    source = dockerfile.all("WORKDIR")[0]
    assert dockerfile.command == ["/usr/bin/tini", "--", f"{source}/docker/entrypoint.sh", "serve"]
    assert dockerfile.health_command == [f"{source}/docker/healthcheck.sh"]


def test_install_names_the_steps_it_has(docker: Path) -> None:
    result = subprocess.run([docker / "install.sh", "paint"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "install.sh: there is no step 'paint'; there are system, dependencies and package\n"


def test_the_image_runs_as_a_user_of_its_own(dockerfile: Dockerfile, docker: Path) -> None:
    assert dockerfile.last("USER") == "sdfserver"
    names = [name for name, _ in dockerfile.instructions]
    assert "RUN" not in names[names.index("USER") :]
    assert f"useradd --uid {UID} " in (docker / "install.sh").read_text(encoding="utf-8")


def test_the_image_keeps_its_data_in_a_volume_and_opens_its_port(dockerfile: Dockerfile) -> None:
    assert dockerfile.last("VOLUME") == dockerfile.env["SDFSERVER_DATA_DIR"] == "/data"
    assert dockerfile.last("EXPOSE") == dockerfile.env["SDFSERVER_PORT"]


def test_a_worker_gives_up_its_job_before_docker_stop_kills(dockerfile: Dockerfile) -> None:
    assert float(dockerfile.env["SDFSERVER_DRAIN_SECONDS"]) <= 5  # of the ten that docker waits


def test_the_image_is_for_a_gpu_unless_told_otherwise(dockerfile: Dockerfile) -> None:
    assert dockerfile.args["DEVICE"] == "cuda"
    assert {"TORCH_INDEX", "PIP_INDEX_URL", "PIP_FIND_LINKS"} <= set(dockerfile.args)


def test_what_is_copied_is_there_and_not_ignored(dockerfile: Dockerfile, root: Path) -> None:
    rules = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in rules
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    assert dockerfile.copied
    for source in dockerfile.copied:
        assert (root / source).exists()
        assert any(Path(source).match(rule) for rule in let_in), f"{source} is not let in by .dockerignore"


def test_all_names_of_settings_and_arguments_are_real(dockerfile: Dockerfile, docker: Path) -> None:
    from sdfserver.server.settings import Settings

    settings = {f"SDFSERVER_{name.upper()}" for name in Settings.model_fields}
    for path in filter(Path.is_file, docker.rglob("*")):
        assert set(re.findall(r"SDFSERVER_[A-Z_]+", path.read_text(encoding="utf-8"))) <= settings, path
    readme = (docker / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"--build-arg (\w+)=", readme)) <= set(dockerfile.args)
    assert [arg for arg in dockerfile.args if f"{arg}=" not in readme and f"`{arg}`" not in readme] == []


def test_compose_serves_on_a_gpu_with_a_volume(dockerfile: Dockerfile, docker: Path) -> None:
    yaml = pytest.importorskip("yaml")
    service = yaml.safe_load((docker / "docker-compose.yml").read_text(encoding="utf-8"))["services"]["sdfserver"]
    build = service["build"]
    assert (docker / build["context"] / build["dockerfile"]).resolve() == docker / "Dockerfile"
    assert set(build["args"]) <= set(dockerfile.args)
    assert service["volumes"] == [f"data:{dockerfile.last('VOLUME')}"]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]  # noqa: S108 - the container's
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


# The entrypoint, with a stand-in for sdfserver that writes down how it was called


@pytest.fixture
def enter(docker: Path, tmp_path: Path) -> Callable[..., tuple[int, list[str], str]]:
    """Runs entrypoint.sh: its exit code, the calls of sdfserver, and standard error."""
    calls = tmp_path / "calls"
    stand_in = tmp_path / "sdfserver"
    stand_in.write_text(
        f"""#!/bin/sh
echo "$*" >>{calls}
[ "$*" != "keys list" ] || {{ printf '%s' "$KEYS"; exit "$LISTING"; }}
[ "$*" != "keys create first" ] || echo a-secret
[ "$1" != "$PPID_OF" ] || echo "$PPID"
""",
        encoding="utf-8",
    )
    stand_in.chmod(0o755)

    def run(*command: str, keys: str = "", listing: int = 0, **env: str) -> tuple[int, list[str], str]:
        calls.write_text("", encoding="utf-8")
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            [docker / "entrypoint.sh", *command],
            env={"PATH": path, "KEYS": keys, "LISTING": str(listing), "PPID_OF": "", "SDFSERVER_HOST": "0.0.0.0"} | env,  # noqa: S104
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stdout == ""
        return result.returncode, calls.read_text(encoding="utf-8").splitlines(), result.stderr

    return run


def test_the_first_start_makes_a_key_and_prints_it(enter: Callable[..., Any]) -> None:
    assert enter("serve") == (0, ["keys list", "keys create first", "serve"], "a-secret\n")


def test_later_starts_make_none(enter: Callable[..., Any]) -> None:
    assert enter("serve", "--workers", "2", keys="1f  in use  me\n") == (0, ["keys list", "serve --workers 2"], "")


@pytest.mark.parametrize("yes", ["1", "true", "True", "yes", "on"])
def test_no_key_is_made_where_none_is_wanted(enter: Callable[..., Any], yes: str) -> None:
    assert enter("serve", SDFSERVER_ALLOW_PUBLIC_WITHOUT_KEYS=yes) == (0, ["serve"], "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_no_key_is_made_where_only_this_machine_can_call(enter: Callable[..., Any], host: str) -> None:
    assert enter("serve", SDFSERVER_HOST=host) == (0, ["serve"], "")


@pytest.mark.parametrize("command", ["keys create me", "worker", "serve --help", "--version"])
def test_other_commands_are_only_passed_on(enter: Callable[..., Any], command: str) -> None:
    assert enter(*command.split()) == (0, [command], "")


def test_without_a_database_nothing_is_served(enter: Callable[..., Any]) -> None:
    assert enter("serve", listing=2) == (2, ["keys list"], "")


def test_the_entrypoint_leaves_no_shell_between(docker: Path, tmp_path: Path) -> None:
    (tmp_path / "sdfserver").write_text("#!/bin/sh\necho $$\n", encoding="utf-8")
    (tmp_path / "sdfserver").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        [docker / "entrypoint.sh", "worker"], env={"PATH": path}, stdout=subprocess.PIPE, text=True
    ) as process:
        out, _ = process.communicate(timeout=10)
    assert out == f"{process.pid}\n"


# The health check


@contextmanager
def answering(status: int, text: str) -> Iterator[int]:
    """A server that answers everything so; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def check_health(docker: Path, port: int, host: str = "0.0.0.0") -> tuple[int, str]:  # noqa: S104 - not bound
    env = {"PATH": os.environ["PATH"], "SDFSERVER_HOST": host, "SDFSERVER_PORT": str(port)}
    result = subprocess.run([docker / "healthcheck.sh"], env=env, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])  # noqa: S104 - not bound
def test_healthy_is_who_is_ready(docker: Path, host: str) -> None:
    with answering(200, "ready\n") as port:
        assert check_health(docker, port, host) == (0, "ready\n")


def test_unhealthy_is_who_has_no_worker(docker: Path) -> None:
    with answering(503, "no worker is running") as port:
        assert check_health(docker, port) == (1, "no worker is running\n")


def test_unhealthy_is_who_does_not_answer(docker: Path) -> None:
    port = free_port()
    code, said = check_health(docker, port)
    assert code == 1
    assert said.startswith(f"127.0.0.1:{port}: ")
    assert said.count("\n") == 1


# A cloud through the whole of it


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(url: str, key: str | None = None, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of an answer; no proxy stands before this machine itself."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    if body is not None:
        headers["Content-Type"] = "application/octet-stream"
    request = urllib.request.Request(url, data=body, headers=headers)  # noqa: S310 - ours
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def wait_for(what: Callable[[], Any], seconds: float, still: Callable[[], bool] = lambda: True) -> Any:
    """What `what` returns once that is true. Fails when it takes too long, or when `still` is not."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert still(), "it ended by itself"
        assert time.monotonic() < deadline, f"it took longer than {seconds} s"
        time.sleep(0.5)
    return found


def reconstruct_sparse(url: str, key: str, data: Path, mesh: Path) -> str:
    """Post a cloud, follow its job, download its mesh; the job's id."""
    assert ask(f"{url}/v1/jobs")[0] == 401
    body = (data / "sparse.ply").read_bytes()
    status, answer = ask(f"{url}/v1/jobs?preset=draft&resolution=32&name=sparse.ply", key, body)
    assert status == 202, answer
    job = json.loads(answer)["id"]

    def final() -> dict[str, Any] | None:
        status, answer = ask(f"{url}/v1/jobs/{job}", key)
        assert status == 200, answer
        found: dict[str, Any] = json.loads(answer)
        return None if found["state"] in ("queued", "running") else found

    found = wait_for(final, JOB_SECONDS)
    assert found["state"] == "succeeded", found
    status, answer = ask(f"{url}/v1/jobs/{job}/mesh?format=ply", key)
    assert status == 200, answer
    mesh.write_bytes(answer)
    return str(job)


def check_mesh(path: Path) -> None:
    trimesh = pytest.importorskip("trimesh")
    mesh = trimesh.load_mesh(path)
    assert mesh.is_watertight
    assert len(mesh.faces) > 100


def the_key(log: str) -> str:
    (key,) = re.findall(r"^sdf_\S+$", log, re.MULTILINE)
    return str(key)


def engine_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=60).returncode == 0


def run_docker(*command: str) -> str:
    result = subprocess.run(["docker", *command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return (result.stdout + result.stderr).strip()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_serves_a_cloud(root: Path, data: Path, tmp_path: Path) -> None:
    if not engine_answers():
        pytest.skip("no Docker engine")
    name = f"sdfserver-test-{os.getpid()}"
    options = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "-v", f"{name}:/data"]  # noqa: S108 - the container's
    run_docker("build", "-f", str(root / "docker/Dockerfile"), "-t", name, "--build-arg", "DEVICE=cpu", str(root))
    try:
        run_docker("run", "-d", "--name", name, "-p", "127.0.0.1::8000", *options, name)

        def state(what: str) -> str:
            return run_docker("inspect", "--format", f"{{{{.State.{what}}}}}", name)

        wait_for(lambda: state("Health.Status") == "healthy", START_SECONDS, lambda: state("Running") == "true")
        url = f"http://{run_docker('port', name, '8000').splitlines()[0]}"
        reconstruct_sparse(url, the_key(run_docker("logs", name)), data, tmp_path / "mesh.ply")
        assert run_docker("exec", name, "id", "-u") == str(UID)
        run_docker("stop", name)
        assert state("ExitCode") == "0"
    finally:
        for command in (["rm", "-f", name], ["volume", "rm", "-f", name], ["rmi", "-f", name]):
            subprocess.run(["docker", *command], capture_output=True, check=False)
    check_mesh(tmp_path / "mesh.ply")


MOUNTED = """
set -eu
root=$1 volume=$2 shared=$3
shift 3
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
for folder in $shared; do
    mount --bind "$folder" "$root$folder"
    mount -o remount,ro,bind "$root$folder"
done
if [ -n "$volume" ]; then
    mount -o remount,ro,bind "$root"
    mount -t tmpfs -o mode=1777,noexec tmp "$root/tmp"
    mount --bind "$volume" "$root/data"
fi
exec "$@"
"""
"""Run by a shell in namespaces of its own: with a volume, the root is read-only, like docker run --read-only."""


class DebianRoot:
    """A fresh Debian in a folder, in which a Dockerfile is carried out, and its container run."""

    def __init__(self, folder: Path, dockerfile: Dockerfile) -> None:
        self.folder, self.dockerfile = folder, dockerfile
        self.workdir = "/"
        self._shared: list[Path] = []

    @property
    def suite(self) -> str:
        """Debian's release, as the Dockerfile's base names it."""
        return re.fullmatch(r"debian:(\w+)-slim", self.dockerfile.args["BASE"] or "")[1]  # type: ignore[index]

    def bootstrap(self, tools: Path) -> None:
        """Fetch the base. Skips the test where that cannot be done here."""
        program = unpacked_debootstrap(tools)
        self.folder.mkdir()
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", program, "--variant=minbase"]
        env = os.environ | {"DEBOOTSTRAP_DIR": str(tools / "usr/share/debootstrap")}
        result = subprocess.run(
            [*command, self.suite, self.folder], capture_output=True, text=True, check=False, env=env
        )
        if result.returncode != 0:
            pytest.skip(f"debootstrap failed: {(result.stdout + result.stderr).strip()[-300:]}")

    def lend_the_machines_registries(self) -> None:
        """Let apt and pip find in the root what they find here. take_back() ends that."""
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", self.folder / "etc" / name)
        apt = Path("/etc/apt")
        if f"VERSION_CODENAME={self.suite}\n" in Path("/etc/os-release").read_text(encoding="utf-8"):
            (self.folder / "etc/apt/sources.list").unlink(missing_ok=True)
            for path in (*apt.glob("sources.list"), *apt.glob("sources.list.d/*.sources"), *apt.glob("*.d/*.list"),
                         *apt.glob("keyrings/*"), *apt.glob("auth.conf.d/*")):  # fmt: skip
                shutil.copy(path, self.folder / path.relative_to("/"))
        for path in apt.glob("apt.conf.d/*"):
            if "Acquire::" in path.read_text(encoding="utf-8"):
                shutil.copy(path, self.folder / path.relative_to("/"))
        pip = configparser.RawConfigParser()
        pip["global"] = {}
        for name, value in pip_settings().items():
            words = [self._lend(word) for word in value.split()]
            pip["global"][name] = "\n".join(words)
        with (self.folder / "etc/pip.conf").open("w", encoding="utf-8") as file:
            pip.write(file)

    def _lend(self, word: str) -> str:
        """What a setting's word is to be in the root: folders are shared there, files copied."""
        path = Path(word.removeprefix("file://"))
        if not path.is_absolute() or not path.exists():
            return word
        if path.is_file():
            copy = self.folder / "etc" / f"lent-{path.name}"
            shutil.copy(path, copy)
            return f"/etc/{copy.name}"
        # The files of an index lie beside it.
        self._shared.append(path.parent if word.startswith("file://") and path.parent != Path("/") else path)
        return word

    def take_back(self) -> None:
        """Remove what was lent."""
        self._shared = []
        for path in (self.folder / "etc/pip.conf", *self.folder.glob("etc/lent-*")):
            path.unlink()

    def build(self, source: Path, **build_args: str) -> None:
        """Carry out the Dockerfile."""
        args = {name: value for name, value in self.dockerfile.args.items() if value is not None} | build_args
        for name, rest in self.dockerfile.instructions:
            if name == "WORKDIR":
                self.workdir = rest
                self.inside(rest).mkdir(parents=True, exist_ok=True)
            elif name == "COPY":
                *sources, target = rest.split()
                self._copy([source / each for each in sources], self.inside(target))
            elif name == "RUN":
                env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | args
                started = time.monotonic()
                with self.running(["/bin/sh", "-c", rest], env) as process:
                    output, _ = process.communicate()
                assert process.returncode == 0, output[-3000:]
                sys.stdout.write(f"{output}\n{rest}: {time.monotonic() - started:.0f} s\n")

    def inside(self, path: str) -> Path:
        """Where a path of the root is here."""
        return self.folder / str(Path(self.workdir, path)).lstrip("/")

    @staticmethod
    def _copy(sources: Sequence[Path], target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for source in sources:
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)

    @contextmanager
    def running(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        volume: Path | None = None,
        log: Path | None = None,
    ) -> Iterator["subprocess.Popen[str]"]:
        """A command in the root, first process of its own; with a volume as the image's user and otherwise as root."""
        shared = sorted(set(self._shared))
        for folder in shared:
            self.inside(str(folder)).mkdir(parents=True, exist_ok=True)
        user = self.dockerfile.last("USER") if volume else "root"
        whole = [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", MOUNTED, "sh"),
            *(str(self.folder), str(volume or ""), " ".join(map(str, shared))),
            *("chroot", f"--userspec={user}:{user}", str(self.folder), "/usr/bin/env", "-i", f"--chdir={self.workdir}"),
            *(f"{name}={value}" for name, value in env.items()),
            *command,
        ]
        with log.open("a", encoding="utf-8") if log else tempfile.TemporaryFile("w+") as sink:
            out = sink if log else subprocess.PIPE
            with subprocess.Popen(whole, stdout=out, stderr=subprocess.STDOUT, text=True) as process:
                try:
                    yield process
                finally:
                    if process.poll() is None:
                        # All that runs in there ends with its first process; --kill-child is for our own violent end,
                        # and forgotten by the kernel as soon as a process takes another user.
                        for child in children_of(process):
                            os.kill(child, signal.SIGKILL)
                        process.kill()

    def container(self, volume: Path, log: Path, **env: str) -> Any:
        """What `docker run --read-only --tmpfs /tmp -v volume:/data` starts."""
        return self.running(self.dockerfile.command, self.dockerfile.env | env, volume=volume, log=log)

    def healthy(self, volume: Path, **env: str) -> bool:
        """Whether the health check succeeds."""
        with self.running(self.dockerfile.health_command, self.dockerfile.env | env, volume=volume) as process:
            process.communicate()
        return process.returncode == 0


def unpacked_debootstrap(folder: Path) -> Path:
    """debootstrap, without installing it. Skips the test where there is none."""
    folder.mkdir()
    folder.chmod(0o755)
    for command in ("apt-get download debootstrap", "apt-get update", "apt-get download debootstrap"):
        subprocess.run(command.split(), cwd=folder, capture_output=True, check=False)
        if found := list(folder.glob("debootstrap_*.deb")):
            subprocess.run(["dpkg-deb", "-x", found[0], folder], check=True)
            return folder / "usr/sbin/debootstrap"
    pytest.skip("apt has no debootstrap")


def pip_settings() -> dict[str, str]:
    """Where pip looks on this machine, from its files and the environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE)
    wanted = ("cert", "find-links", "index-url", "extra-index-url", "trusted-host", "proxy")
    return {name: value for name, value in found if name in wanted}


def children_of(process: "subprocess.Popen[str]") -> list[int]:
    """The first process of the namespace that unshare has made, if it has."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
    return [int(child) for child in children.split()]


@pytest.fixture(scope="module")
def debian_root(root: Path, dockerfile: Dockerfile) -> Iterator[DebianRoot]:
    """A Debian root in which the Dockerfile has been carried out, for the processor."""
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("a Debian root takes root")
    missing = [name for name in ("apt-get", "dpkg-deb", "unshare", "chroot") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces may be made here")
    with tempfile.TemporaryDirectory(prefix="sdfserver-debian-") as folder:
        Path(folder).chmod(0o755)
        debian = DebianRoot(Path(folder, "root"), dockerfile)
        debian.bootstrap(Path(folder, "tools"))
        debian.lend_the_machines_registries()
        at_hand = {"find-links", "index-url", "extra-index-url"} & set(pip_settings())
        debian.build(root, DEVICE="cpu", **({"TORCH_INDEX": "pip"} if at_hand else {}))
        debian.take_back()
        yield debian
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
    assert folder not in mounts


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_debian_root_serves_a_cloud_without_an_engine(debian_root: DebianRoot, data: Path, tmp_path: Path) -> None:
    if engine_answers():
        pytest.skip("a Docker engine answers, and runs the image itself")
    volume, log, port = tmp_path / "volume", tmp_path / "log", free_port()
    volume.mkdir(mode=0o700)
    os.chown(volume, UID, UID)  # as Docker does with a new volume
    env, url = {"SDFSERVER_PORT": str(port)}, f"http://127.0.0.1:{port}"

    def serve_until_stopped(meanwhile: Callable[[], None]) -> None:
        with debian_root.container(volume, log, **env) as process:
            wait_for(lambda: debian_root.healthy(volume, **env), START_SECONDS, lambda: process.poll() is None)
            (first,) = children_of(process)
            status = Path(f"/proc/{first}/status").read_text(encoding="ascii")
            assert re.search(rf"^Uid:\t{UID}\t{UID}\t", status, re.MULTILINE)
            meanwhile()
            os.kill(first, signal.SIGTERM)
            assert process.wait(STOP_SECONDS) == 0

    jobs: list[str] = []
    try:
        serve_until_stopped(
            lambda: jobs.append(
                reconstruct_sparse(url, the_key(log.read_text(encoding="utf-8")), data, tmp_path / "mesh.ply")
            )
        )
        check_mesh(tmp_path / "mesh.ply")

        def the_volume_has_it_all() -> None:
            key = the_key(log.read_text(encoding="utf-8"))  # there is still only one
            assert ask(f"{url}/v1/jobs/{jobs[0]}/mesh?format=ply", key) == (200, (tmp_path / "mesh.ply").read_bytes())

        serve_until_stopped(the_volume_has_it_all)
    finally:
        sys.stdout.write(log.read_text(encoding="utf-8"))
    assert "Traceback" not in log.read_text(encoding="utf-8")
