"""The image and its services: what their files promise, and clouds reconstructed by what they build.

Where a Docker engine answers, the image is built and run. Where none does, the Dockerfile's own instructions are
carried out in a fresh Debian root, in namespaces that leave no mount behind, and the container is played by a chroot.
So are those of the interface and of the workers, each alone, with a PostgreSQL between them.
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
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from s3 import s3_server
from waiting import POSTGRES, fresh_postgres

SCRIPTS = ["entrypoint.sh", "healthcheck.sh", "install.sh", "lock.sh"]
UID = 10001
START_SECONDS, STOP_SECONDS, JOB_SECONDS = 180, 60, 1800
BIND = re.compile(r"--mount=type=bind,source=(\S+),target=(\S+) ")


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
    def stages(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """The name of each stage, and its instructions."""
        found: list[tuple[str, list[tuple[str, str]]]] = []
        for name, rest in self.instructions:
            if name == "FROM":
                found.append((rest.partition(" AS ")[2], []))
            elif found:
                found[-1][1].append((name, rest))
        return found

    @property
    def copied(self) -> list[str]:
        """The files and folders that the image takes from the repository."""
        copied = [rest.split()[:-1] for rest in self.all("COPY") if not rest.startswith("--from=")]
        mounted = [BIND.match(rest)[1] for rest in self.all("RUN") if BIND.match(rest)]  # type: ignore[index]
        return [*(source for sources in copied for source in sources), *mounted]

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


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint")
def test_hadolint_finds_nothing(docker: Path) -> None:
    result = subprocess.run(["hadolint", docker / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_the_image_takes_its_steps_from_the_scripts(dockerfile: Dockerfile) -> None:
    (name, build), (_, last) = dockerfile.stages
    steps = [rest for instruction, rest in build if instruction == "RUN"]
    assert steps == [f"docker/install.sh {step}" for step in ("tools", "dependencies", "package")]
    (run,) = (rest for instruction, rest in last if instruction == "RUN")
    assert BIND.sub("", run) == f"{BIND.match(run)[2]} system"  # type: ignore[index]
    (built, scripts) = (rest for instruction, rest in last if instruction == "COPY")
    assert built == f"--from={name} /opt/sdfserver /opt/sdfserver"
    *_, folder = scripts.split()
    assert dockerfile.command == ["/usr/bin/tini", "--", f"{folder}entrypoint.sh", "serve"]
    assert dockerfile.health_command == [f"{folder}healthcheck.sh"]


def test_install_names_the_steps_it_has(docker: Path) -> None:
    result = subprocess.run([docker / "install.sh", "paint"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "install.sh: there is no step 'paint'; there are tools, dependencies, package and system\n"


def test_the_image_runs_as_a_user_of_its_own(dockerfile: Dockerfile, docker: Path) -> None:
    assert dockerfile.last("USER") == f"{UID}:{UID}"
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


# The lock files


@dataclass
class Locked:
    """An entry of a lock file."""

    version: Version
    marker: str
    hashes: int
    via: set[str]
    """Those that asked for it; pyproject.toml's own are "sdfserver"."""


def locked(path: Path) -> dict[str, list[Locked]]:
    """The entries of a lock file, by name: several where platforms or Pythons differ."""
    found: dict[str, list[Locked]] = {}
    text = re.sub(r"\A(#.*\n)*", "", path.read_text(encoding="utf-8"))
    for block in re.split(r"\n(?=\S)", text.strip()):
        head, *rest = block.splitlines()
        entry = re.fullmatch(r"([a-z0-9-]+)==([^ ]+)(?: ; (.+?))? \\", head)
        assert entry is not None, head
        hashes = [line for line in rest if re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line)]
        about = [line.strip(" #") for line in rest if line not in hashes]
        via = {each.removeprefix("via").strip().removesuffix(" (pyproject.toml)") for each in about} - {""}
        found.setdefault(entry[1], []).append(Locked(Version(entry[2]), entry[3] or "", len(hashes), via))
    return found


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    with (root / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def check_locked(requirements: Sequence[str], entries: Mapping[str, Sequence[Locked]]) -> None:
    for requirement in map(Requirement, requirements):
        entry = entries.get(canonicalize_name(requirement.name))
        assert entry, f"{requirement} is not locked: run docker/lock.sh"
        for one in entry:
            assert one.version in requirement.specifier, f"{requirement}, locked is {one.version}: run docker/lock.sh"


def test_the_lock_file_has_what_pyproject_asks_for_and_nothing_else(docker: Path, project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["las"], *extras["e57"], *extras["onnx"], *extras["trace"]]
    entries = locked(docker / "requirements.lock")
    check_locked(wanted, entries)
    direct = {name for name, entry in entries.items() if any("sdfserver" in one.via for one in entry)}
    assert direct == {canonicalize_name(Requirement(one).name) for one in wanted}, "run docker/lock.sh"
    assert {asker for entry in entries.values() for one in entry for asker in one.via} <= {"sdfserver", *entries}


def test_what_builds_the_package_is_locked(docker: Path, project: dict[str, Any]) -> None:
    check_locked(project["build-system"]["requires"], locked(docker / "build.lock"))


@pytest.mark.parametrize("name", ["requirements.lock", "build.lock"])
def test_a_lock_file_has_hashes_and_the_command_that_makes_it_and_no_places(docker: Path, name: str) -> None:
    text = (docker / name).read_text(encoding="utf-8")
    assert "docker/lock.sh" in text.splitlines()[1]
    assert all(one.hashes for entry in locked(docker / name).values() for one in entry)
    assert re.findall(r"\S*(?:://|index-url|find-links|\.whl)\S*", text) == []


def test_what_comes_with_a_build_of_torch_is_set_apart_from_the_rest(docker: Path, tmp_path: Path) -> None:
    (function,) = re.findall(r"^locked\(\) \{$.*?^\}$", (docker / "install.sh").read_text(), re.MULTILINE | re.DOTALL)
    parts = {}
    for which in ("torch", "others"):
        written = tmp_path / which
        written.write_bytes(subprocess.check_output(["bash", "-c", f"{function}\nlocked {which}"], cwd=docker.parent))
        parts[which] = locked(written)
    assert parts["torch"].keys() | parts["others"].keys() == locked(docker / "requirements.lock").keys()
    assert not parts["torch"].keys() & parts["others"].keys()
    (torch,) = parts["torch"]["torch"]  # one version, whatever the build
    assert torch.marker == ""
    # No other build lacks what anybody but torch needs, and no build brings what another one's part already has.
    for name, (one, *_) in parts["torch"].items():
        assert one.via <= parts["torch"].keys() | {"sdfserver"}, name
    for name, (one, *_) in parts["others"].items():
        assert not one.via <= parts["torch"].keys() - {"torch"}, name


@pytest.mark.skipif(shutil.which("uv") is None, reason="no uv")
def test_the_lock_files_are_what_their_command_makes(root: Path, docker: Path, tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    for path in (root / "pyproject.toml", *docker.glob("*.lock"), docker / "lock.sh"):
        shutil.copy(path, tmp_path / path.relative_to(root))
    made = subprocess.run([tmp_path / "docker/lock.sh"], capture_output=True, text=True, check=False)
    if made.returncode and re.search(r"(?i)connect|dns|timed out|request failed|fetch", made.stderr):
        pytest.skip(f"no package index: {made.stderr.strip()[-200:]}")
    assert made.returncode == 0, made.stderr
    for path in docker.glob("*.lock"):
        again = locked(tmp_path / "docker" / path.name)
        for entry in (again, now := locked(path)):
            for one in (one for each in entry.values() for one in each):
                one.hashes = 0  # more files of a version may have come since
        assert again == now, "run docker/lock.sh"


# The services


Compose = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def compose(docker: Path, tmp_path: Path) -> Compose:
    """The real client, in a copy of the folder whose .env is made by README's command."""
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        client = ["docker", "compose"]
    elif shutil.which("docker-compose"):
        client = ["docker-compose"]
    else:
        pytest.skip("no docker compose")
    if "version 1." in subprocess.run([*client, "version"], capture_output=True, text=True, check=False).stdout:
        pytest.skip("docker compose is older than the format")
    folder = shutil.copytree(
        docker, tmp_path / "docker", ignore=shutil.ignore_patterns(".env", "compose.override.yaml")
    )
    (command,) = re.findall(r"^cp env.example .*$", (docker / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    subprocess.run(["bash", "-c", command], cwd=folder, check=True)
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}

    def run(*command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*client, *command], cwd=folder, env=env | variables, capture_output=True, text=True, check=False
        )

    return run


def services(compose: Compose, *options: str, **variables: str) -> dict[str, Any]:
    """The services as the client has understood them."""
    done = compose(*options, "config", "--format", "json", **variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


ON_CPU = ("-f", "compose.yaml", "-f", "compose.cpu.yaml")
ON_HOSTS = ("-f", "compose.yaml", "-f", "compose.hosts.yaml")


@pytest.mark.parametrize("options", [(), ("--profile", "s3"), ON_CPU, ON_HOSTS, (*ON_HOSTS, "--profile", "s3")])
def test_the_client_finds_the_services_valid(compose: Compose, options: tuple[str, ...]) -> None:
    done = compose(*options, "config", "-q", ADDRESS="192.0.2.10")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_nothing_starts_without_a_password(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "docker/.env").write_text("", encoding="utf-8")
    done = compose("config", "-q")
    assert done.returncode != 0
    assert "POSTGRES_PASSWORD" in done.stderr


def test_the_database_opens_to_no_address_by_default(compose: Compose) -> None:
    assert [name for name, service in services(compose, "--profile", "s3").items() if "ports" in service] == ["api"]
    assert compose(*ON_HOSTS, "config", "-q").returncode != 0
    opened = services(compose, *ON_HOSTS, "--profile", "s3", ADDRESS="192.0.2.10")
    for name in ("postgres", "s3"):
        assert [port["host_ip"] for port in opened[name]["ports"]] == ["192.0.2.10"]


def test_every_service_is_confined(compose: Compose) -> None:
    found = services(compose, "--profile", "s3")
    assert set(found) == {"api", "worker", "postgres", "s3"}
    assert "s3" not in services(compose)
    for service in found.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "/tmp" in service["tmpfs"]  # noqa: S108 - the container's
        assert not service.get("privileged")


def test_interface_and_worker_wait_for_a_healthy_database(
    compose: Compose, dockerfile: Dockerfile, tmp_path: Path
) -> None:
    env = tmp_path / "docker/.env"
    assert env.stat().st_mode & 0o777 == 0o600
    (password,) = re.findall(r"^POSTGRES_PASSWORD=(\w{48})$", env.read_text(encoding="utf-8"), re.MULTILINE)
    found = services(compose, "--profile", "s3")
    for name in ("api", "worker"):
        service = found[name]
        assert service["command"] == [name]
        assert {on: wait["condition"] for on, wait in service["depends_on"].items()} == {
            "postgres": "service_healthy",
            "s3": "service_healthy",
        }
        assert service["environment"]["SDFSERVER_DATABASE_URL"] == "postgresql://sdfserver@postgres/sdfserver"
        assert service["environment"]["PGPASSWORD"] == password
        assert [(volume["source"], volume["target"]) for volume in service["volumes"]] == [
            ("data", dockerfile.last("VOLUME"))
        ]
        assert set(service["build"]["args"]) <= set(dockerfile.args)
        assert "healthcheck" not in service  # the image's own knows both
    for name in ("postgres", "s3"):
        assert found[name]["healthcheck"]["test"][0] == "CMD"
    assert found["postgres"]["environment"]["POSTGRES_PASSWORD"] == password
    assert re.fullmatch(r"postgres:\d+", found["postgres"]["image"])


def test_a_worker_has_one_gpu_and_the_time_to_drain(compose: Compose) -> None:
    worker = services(compose, GPU="3")["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["device_ids"], device["capabilities"]) == ("nvidia", ["3"], ["gpu"])
    assert worker["environment"]["SDFSERVER_DRAIN_SECONDS"] == "30"
    assert worker["stop_grace_period"] == "40s"


@pytest.mark.parametrize("said_in_env", [False, True])
def test_without_a_gpu_none_is_asked_for(compose: Compose, tmp_path: Path, said_in_env: bool) -> None:
    if said_in_env:
        with (tmp_path / "docker/.env").open("a", encoding="utf-8") as env:
            env.write("COMPOSE_FILE=compose.yaml:compose.cpu.yaml\n")
    found = services(compose, *(() if said_in_env else ON_CPU))
    assert "deploy" not in found["worker"]
    for name in ("api", "worker"):
        assert found[name]["image"] == "sdfserver:cpu"
        assert found[name]["build"]["args"]["DEVICE"] == "cpu"
        assert found[name]["build"]["dockerfile"] == "docker/Dockerfile"


def test_what_env_has_reaches_interface_and_worker(compose: Compose, tmp_path: Path) -> None:
    example = (tmp_path / "docker/env.example").read_text(encoding="utf-8")
    filled = re.sub(r"(?m)^#([A-Z][A-Z_]*=)", r"\1", example)
    assert filled.count("\nAWS_") == 4
    (tmp_path / "docker/.env").write_text(re.sub(r"(?m)=$", "=made-up", filled), encoding="utf-8")
    found = services(compose, "--profile", "s3")
    for name in ("api", "worker"):
        env = found[name]["environment"]
        assert env["SDFSERVER_ARTIFACTS_URL"] == "s3://sdfserver/jobs"
        assert env["AWS_ENDPOINT_URL"] == "http://s3:7070"
        assert env["SDFSERVER_DATABASE_URL"].startswith("postgresql://sdfserver@192.0.2.10/")
    (port,) = found["api"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "8000", 8000)
    keys = found["s3"]["environment"]
    assert (keys["ROOT_ACCESS_KEY"], keys["ROOT_SECRET_KEY"]) == ("made-up", "made-up")
    # The bucket is a folder, and the prefix is in it.
    assert [volume["target"] for volume in found["s3"]["volumes"]] == ["/buckets/sdfserver"]


def test_readme_s_second_gpu_is_the_second(compose: Compose, docker: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (docker / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "docker/compose.override.yaml").write_text(block, encoding="utf-8")
    found = services(compose)
    for name, gpu in (("worker", "0"), ("worker-1", "1")):
        (device,) = found[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == [gpu]
        assert found[name]["read_only"] is True


def test_no_file_has_a_password_in_it(docker: Path) -> None:
    for path in (*docker.glob("compose*.yaml"), docker / "env.example"):
        for name, value in re.findall(r"(?m)^[ #]*(\w*(?:PASSWORD|SECRET|ACCESS_KEY)\w*)[:=] ?(.*)$", path.read_text()):
            assert re.fullmatch(r"(\$\{[A-Z_]+(-|:\?.*)\})?", value), (path.name, name)


# The entrypoint, with a stand-in for sdfserver that writes down how it was called


@pytest.fixture
def enter(docker: Path, tmp_path: Path) -> Callable[..., tuple[int, list[str], str]]:
    """Runs entrypoint.sh: its exit code, the calls of sdfserver, and standard error."""
    calls = tmp_path / "calls"
    stand_in = tmp_path / "sdfserver"
    stand_in.write_text(
        f"""#!/bin/sh
echo "$*" >>{calls}
[ "$*" != "keys create first --if-none" ] || {{ echo $SECRET; exit $CREATING; }}
[ "$1" != worker ] || echo "beats in $SDFSERVER_BEAT_FILE" >&2
""",
        encoding="utf-8",
    )
    stand_in.chmod(0o755)

    def run(*command: str, secret: str = "", creating: int = 0, **env: str) -> tuple[int, list[str], str]:
        calls.write_text("", encoding="utf-8")
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            [docker / "entrypoint.sh", *command],
            env={"PATH": path, "SECRET": secret, "CREATING": str(creating), "SDFSERVER_HOST": "0.0.0.0"} | env,  # noqa: S104
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stdout == ""
        return result.returncode, calls.read_text(encoding="utf-8").splitlines(), result.stderr

    return run


@pytest.mark.parametrize("command", ["serve", "api", "serve --workers 2"])
def test_the_first_start_makes_a_key_and_prints_it(enter: Callable[..., Any], command: str) -> None:
    calls = ["keys create first --if-none", command]
    assert enter(*command.split(), secret="a-secret") == (0, calls, "a-secret\n")  # noqa: S106 - the test's


@pytest.mark.parametrize("yes", ["1", "true", "True", "yes", "on"])
def test_no_key_is_made_where_none_is_wanted(enter: Callable[..., Any], yes: str) -> None:
    assert enter("serve", SDFSERVER_ALLOW_PUBLIC_WITHOUT_KEYS=yes) == (0, ["serve"], "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_no_key_is_made_where_only_this_machine_can_call(enter: Callable[..., Any], host: str) -> None:
    assert enter("serve", SDFSERVER_HOST=host) == (0, ["serve"], "")


@pytest.mark.parametrize("command", ["keys create me", "status", "serve --help", "--version"])
def test_other_commands_are_only_passed_on(enter: Callable[..., Any], command: str) -> None:
    assert enter(*command.split()) == (0, [command], "")


def test_without_a_database_nothing_is_served(enter: Callable[..., Any]) -> None:
    assert enter("serve", creating=2) == (2, ["keys create first --if-none"], "\n")


def test_a_worker_makes_no_key_and_shows_its_beats(enter: Callable[..., Any]) -> None:
    assert enter("worker") == (0, ["worker"], "beats in /tmp/sdfserver-beat\n")
    assert enter("worker", SDFSERVER_BEAT_FILE="/a/file") == (0, ["worker"], "beats in /a/file\n")


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
def answering(answers: Mapping[str, tuple[int, str]]) -> Iterator[int]:
    """A server that answers so by path; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.get(self.path, (404, "nothing here"))
            self.send_response(status)
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


def check_health(docker: Path, *what: str, **env: str | Path | int) -> tuple[int, str]:
    env = {"PATH": os.environ["PATH"], "SDFSERVER_HOST": "0.0.0.0"} | {name: str(v) for name, v in env.items()}  # noqa: S104
    result = subprocess.run([docker / "healthcheck.sh", *what], env=env, capture_output=True, text=True, check=False)  # type: ignore[type-var]
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])  # noqa: S104 - not bound
def test_healthy_is_who_is_ready(docker: Path, host: str) -> None:
    with answering({"/health/ready": (200, "ready\n")}) as port:
        assert check_health(docker, SDFSERVER_PORT=port, SDFSERVER_HOST=host) == (0, "ready\n")


NO_WORKER = {"/health/ready": (503, "no worker is running"), "/metrics": (200, "sdfserver_jobs 0\n")}


def test_unhealthy_is_who_has_no_worker(docker: Path) -> None:
    with answering(NO_WORKER) as port:
        assert check_health(docker, SDFSERVER_PORT=port) == (1, "no worker is running\n")


def test_an_interface_alone_needs_its_database_only(docker: Path) -> None:
    with answering(NO_WORKER) as port:
        assert check_health(docker, "api", SDFSERVER_PORT=port) == (0, "the API and its database answer\n")
    with answering({"/metrics": (503, "the database does not answer")}) as port:
        assert check_health(docker, "api", SDFSERVER_PORT=port) == (1, "the database does not answer\n")


@pytest.mark.parametrize("what", ["serve", "api"])
def test_unhealthy_is_who_does_not_answer(docker: Path, what: str) -> None:
    port = free_port()
    code, said = check_health(docker, what, SDFSERVER_PORT=port)
    assert code == 1
    assert said.startswith(f"127.0.0.1:{port}: ")
    assert said.count("\n") == 1


def test_a_worker_is_healthy_while_its_beats_arrive(docker: Path, tmp_path: Path) -> None:
    beat = tmp_path / "beat"

    def healthy() -> bool:
        return check_health(docker, "worker", SDFSERVER_BEAT_FILE=beat)[0] == 0

    code, said = check_health(docker, "worker", SDFSERVER_BEAT_FILE=beat)
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("the worker has not yet begun: ")
    settings = {"SDFSERVER_DATA_DIR": str(tmp_path / "data"), "SDFSERVER_BEAT_FILE": str(beat)}
    with subprocess.Popen([sys.executable, "-m", "sdfserver", "worker"], env=os.environ | settings) as worker:
        try:
            wait_for(healthy, START_SECONDS, lambda: worker.poll() is None)
            first = beat.stat().st_mtime
            wait_for(lambda: beat.stat().st_mtime > first, START_SECONDS)
            worker.send_signal(signal.SIGSTOP)
            wait_for(lambda: not healthy(), START_SECONDS)
            worker.send_signal(signal.SIGCONT)
            wait_for(healthy, START_SECONDS)
        finally:
            worker.send_signal(signal.SIGCONT)
            worker.terminate()


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
    mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmp "$root/tmp"
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
        self.stages: dict[str, Path] = {}
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
        """Carry out the Dockerfile, each stage in a copy of the base, and the last one in the base itself."""
        args = {name: value for name, value in self.dockerfile.args.items() if value is not None} | build_args
        base, last = self.folder, len(self.dockerfile.stages) - 1
        for i, (stage, instructions) in enumerate(self.dockerfile.stages):
            self.workdir = "/"
            self.folder = base if i == last else self.stages.setdefault(stage, base.with_name(f"stage-{stage}"))
            if i != last:
                subprocess.run(["cp", "-a", "--reflink=auto", base, self.folder], check=True)
            for name, rest in instructions:
                self._carry_out(name, rest, source, args)

    def _carry_out(self, name: str, rest: str, source: Path, args: Mapping[str, str]) -> None:
        if name == "WORKDIR":
            self.workdir = rest
            self.inside(rest).mkdir(parents=True, exist_ok=True)
        elif name == "COPY" and rest.startswith("--from="):
            stage, built, target = rest.removeprefix("--from=").split()
            shutil.copytree(self.stages[stage] / built.lstrip("/"), self.inside(target), symlinks=True)
        elif name == "COPY":
            *sources, target = rest.split()
            self._copy([source / each for each in sources], self.inside(target))
        elif name == "RUN":
            bound = BIND.match(rest)
            if bound:
                self._copy([source / bound[1]], self.inside(bound[2]).parent)
            env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | args
            started = time.monotonic()
            with self.running(["/bin/sh", "-c", BIND.sub("", rest)], env) as process:
                output, _ = process.communicate()
            if bound:
                shutil.rmtree(self.inside(bound[2]).parent)
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
        """A command in the root, first process of its own; with a volume as the image's user, and otherwise as root."""
        shared = sorted(set(self._shared))
        for folder in shared:
            self.inside(str(folder)).mkdir(parents=True, exist_ok=True)
        whole = [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", MOUNTED, "sh"),
            *(str(self.folder), str(volume or ""), " ".join(map(str, shared)), "chroot", str(self.folder)),
            *(self._confined if volume else ()),
            *("/usr/bin/env", "-i", f"--chdir={self.workdir}"),
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

    @property
    def _confined(self) -> list[str]:
        """The image's user, and what --cap-drop ALL and --security-opt no-new-privileges take away."""
        user, _, group = self.dockerfile.last("USER").partition(":")
        whose = [f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        return ["/usr/bin/setpriv", *whose, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]

    def container(self, volume: Path, log: Path, *command: str, **env: str) -> Any:
        """What `docker run --read-only --tmpfs /tmp --cap-drop ALL -v volume:/data IMAGE command` starts."""
        entrypoint = json.loads(self.dockerfile.last("ENTRYPOINT"))
        whole = [*entrypoint, *command] if command else self.dockerfile.command
        return self.running(whole, self.dockerfile.env | env, volume=volume, log=log)

    def execute(
        self, process: "subprocess.Popen[str]", command: Sequence[str], **env: str
    ) -> "subprocess.CompletedProcess[str]":
        """What `docker exec` runs in a container, in whose namespaces it is."""
        variables = (f"{name}={value}" for name, value in (self.dockerfile.env | env).items())
        (first,) = children_of(process)
        return subprocess.run(
            [
                *("nsenter", "--target", str(first), "--mount", "--pid", "--root", "--wd"),
                *(*self._confined, "/usr/bin/env", "-i", *variables, *command),
            ],
            capture_output=True,
            text=True,
            check=False,
        )

    def healthy(self, process: "subprocess.Popen[str]", **env: str) -> bool:
        """Whether the health check succeeds."""
        return (
            bool(children_of(process)) and not self.execute(process, self.dockerfile.health_command, **env).returncode
        )


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
    missing = [name for name in ("apt-get", "dpkg-deb", "unshare", "nsenter", "chroot") if shutil.which(name) is None]
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
def test_the_last_stage_has_what_it_runs_on_and_nothing_else(debian_root: DebianRoot, docker: Path) -> None:
    root = debian_root.folder
    for command in ("cc", "gcc", "g++", "c++", "clang", "as", "ld", "make", "pip", "pip3", "hatchling"):
        for folder in ("usr/bin", "usr/local/bin", "opt/sdfserver/bin"):
            assert not os.path.lexists(root / folder / command), f"{folder}/{command}"
    for unused in ("include", "test", "share/cmake"):
        assert not list(root.glob(f"opt/sdfserver/lib/python3*/site-packages/torch/{unused}")), unused
    packages = {path.name.lower() for path in root.glob("opt/sdfserver/lib/python3*/site-packages/*")}
    assert {"torch", "sdfserver", "dbos"} <= packages
    assert not {"pip", "hatchling"} & packages
    for empty in ("usr/src", "mnt", "root/.cache", "var/lib/apt/lists"):
        assert not list((root / empty).glob("*")), empty
    assert not list(root.glob("var/cache/apt/archives/*.deb"))
    # What was installed is what is locked.
    with debian_root.running(["/opt/sdfserver/bin/python", "-c", INSTALLED], debian_root.dockerfile.env) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    installed = json.loads(output)
    entries = locked(docker / "requirements.lock")
    assert len(installed) > 50
    assert "sdfserver" in installed
    for name, version in installed.items():
        if name != "sdfserver":
            assert Version(version).public in {one.version.public for one in entries[canonicalize_name(name)]}, name
    for folder in (root, root / "opt/sdfserver"):
        sys.stdout.write(subprocess.run(["du", "-sBM", folder], capture_output=True, text=True, check=True).stdout)


INSTALLED = """
import json
import sysconfig
from importlib.metadata import distributions
print(json.dumps({each.name: each.version for each in distributions(path=[sysconfig.get_path("purelib")])}))
"""


def new_volume(path: Path) -> Path:
    """An empty volume, as Docker hands one to the image's user."""
    path.mkdir(mode=0o700)
    os.chown(path, UID, UID)
    return path


def user_of(process: "subprocess.Popen[str]") -> dict[str, str]:
    """What the kernel says of a container's first process."""
    (first,) = children_of(process)
    lines = Path(f"/proc/{first}/status").read_text(encoding="ascii").splitlines()
    return {name: " ".join(rest.split()) for name, _, rest in (line.partition(":") for line in lines)}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_debian_root_serves_a_cloud_without_an_engine(debian_root: DebianRoot, data: Path, tmp_path: Path) -> None:
    if engine_answers():
        pytest.skip("a Docker engine answers, and runs the image itself")
    volume, log, port = new_volume(tmp_path / "volume"), tmp_path / "log", free_port()
    env, url = {"SDFSERVER_PORT": str(port)}, f"http://127.0.0.1:{port}"

    def serve_until_stopped(meanwhile: Callable[[], None]) -> None:
        with debian_root.container(volume, log, **env) as process:
            wait_for(lambda: debian_root.healthy(process, **env), START_SECONDS, lambda: process.poll() is None)
            about = user_of(process)
            assert about["Uid"] == " ".join([str(UID)] * 4)
            assert (int(about["CapBnd"], 16), about["NoNewPrivs"]) == (0, "1")
            refused = debian_root.execute(process, ["/usr/bin/touch", "/opt/sdfserver/a-file"])
            assert "Read-only file system" in refused.stderr
            meanwhile()
            (first,) = children_of(process)
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


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kept_in", ["a shared volume", "s3"])
def test_interface_and_worker_are_containers_of_their_own(
    debian_root: DebianRoot, data: Path, tmp_path: Path, kept_in: str
) -> None:
    """Two interfaces that start at once on an empty PostgreSQL, and a worker that is killed in the midst of a job."""
    logs = {name: tmp_path / f"{name}.log" for name in ("api-1", "api-2", "worker-1", "worker-2")}
    ports = [free_port(), free_port()]
    url, other_url = (f"http://127.0.0.1:{port}" for port in ports)

    with ExitStack() as stack:
        database = stack.enter_context(fresh_postgres())
        if database is None:
            pytest.skip(f"no PostgreSQL at {POSTGRES}")

        settings = {"SDFSERVER_DATABASE_URL": database}
        if kept_in == "s3":
            s3 = stack.enter_context(s3_server())
            settings |= s3.environment | {"SDFSERVER_ARTIFACTS_URL": f"s3://{s3.bucket()}/jobs"}
            volumes = {name: new_volume(tmp_path / f"volume-of-{name}") for name in logs}
        else:
            volumes = dict.fromkeys(logs, new_volume(tmp_path / "volume"))

        def start(name: str, **env: str) -> "subprocess.Popen[str]":
            command = name.partition("-")[0]
            process: subprocess.Popen[str] = stack.enter_context(
                debian_root.container(volumes[name], logs[name], command, **settings, **env)
            )
            return process

        def wait_until_healthy(process: "subprocess.Popen[str]", **env: str) -> None:
            wait_for(lambda: debian_root.healthy(process, **env), START_SECONDS, lambda: process.poll() is None)

        stack.callback(lambda: [sys.stdout.write(f"{log}\n{log.read_text()}") for log in logs.values() if log.exists()])
        interfaces = [start(f"api-{i + 1}", SDFSERVER_PORT=str(port)) for i, port in enumerate(ports)]
        for process, port in zip(interfaces, ports, strict=True):
            wait_until_healthy(process, SDFSERVER_PORT=str(port))
        key = the_key(logs["api-1"].read_text() + logs["api-2"].read_text())  # one of them has made it
        assert ask(f"{url}/health/ready")[0] == 503

        worker = start("worker-1")
        assert not debian_root.healthy(worker)
        wait_until_healthy(worker)
        assert ask(f"{other_url}/health/ready")[0] == 200
        assert user_of(worker)["Uid"] == " ".join([str(UID)] * 4)

        body = (data / "knot.ply").read_bytes()
        status, answer = ask(f"{url}/v1/jobs?preset=standard&resolution=64&name=knot.ply", key, body)
        assert status == 202, answer
        where = f"/v1/jobs/{json.loads(answer)['id']}"

        def job() -> dict[str, Any]:
            status, answer = ask(f"{other_url}{where}", key)
            assert status == 200, answer
            found: dict[str, Any] = json.loads(answer)
            assert found["state"] in ("queued", "running", "succeeded"), found
            return found

        def midst() -> bool:
            now = job()
            assert now["state"] != "succeeded", "it was too fast to be killed"
            return bool(now["state"] == "running" and now["progress"] > 0)

        wait_for(midst, JOB_SECONDS)
        (first,) = children_of(worker)
        os.kill(first, signal.SIGKILL)
        worker.wait(STOP_SECONDS)
        assert job()["state"] != "succeeded"

        again = start("worker-2")
        wait_for(lambda: job()["state"] == "succeeded", JOB_SECONDS, lambda: again.poll() is None)
        assert job()["attempt"] == 2
        status, mesh = ask(f"{other_url}{where}/mesh?format=ply", key)
        assert status == 200, mesh
        (tmp_path / "mesh.ply").write_bytes(mesh)
        check_mesh(tmp_path / "mesh.ply")

        listed = debian_root.execute(interfaces[0], ["/opt/sdfserver/bin/sdfserver", "keys", "list"], **settings)
        assert re.fullmatch(r"\w+  in use   first\n", listed.stdout), listed
        for process in (again, *interfaces):
            (first,) = children_of(process)
            os.kill(first, signal.SIGTERM)
        assert again.wait(STOP_SECONDS) == 0
        for process in interfaces:  # which end in order, and then by the signal that they were sent
            assert process.wait(STOP_SECONDS) in (0, 128 + signal.SIGTERM)
    for log in logs.values():
        assert "Traceback" not in log.read_text(encoding="utf-8"), log
