"""What went wrong on the disk is noticed, and said: files that are not what they were, a database that is none."""

import base64
import contextlib
import hashlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from server.helpers import Api, App, is_problem, running

from sdfserver.client import Client
from sdfserver.errors import ServiceError
from sdfserver.server.artifacts import FIELD, MESH, SUMS, Artifacts
from sdfserver.server.settings import Settings


@pytest.fixture
def done(api: Api, worker: str) -> str:
    job = api.submit()["id"]
    api.publish(job, worker)
    return str(job)


def mesh_path(api: Api, job: str) -> Path:
    return api.artifacts.mesh(job, 1) / MESH


def test_a_result_comes_with_its_checksum(api: Api, done: str) -> None:
    for what, name in (("mesh", MESH), ("field", FIELD), ("report", "report.json"), ("picture", "picture.png")):
        answer = api.get(f"/v1/jobs/{done}/{what}")
        digest = base64.b64encode(hashlib.sha256(name.encode()).digest()).decode()
        assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
        part = api.get(f"/v1/jobs/{done}/{what}", headers={"Range": "bytes=1-2"})
        assert part.headers["repr-digest"] == f"sha-256=:{digest}:", "it is of the whole, not of the part"


@pytest.mark.parametrize("damage", [b"mesh", b"mesh.plz", b""])
def test_a_damaged_result_is_not_sent(damage: bytes, api: Api, done: str) -> None:
    mesh_path(api, done).write_bytes(damage)
    is_problem(api.get(f"/v1/jobs/{done}/mesh"), 500, "damaged", "run the job again")
    assert api.get(f"/v1/jobs/{done}/report").is_success


def test_damage_is_noticed_after_the_file_was_sent_before(api: Api, done: str) -> None:
    assert api.get(f"/v1/jobs/{done}/mesh").is_success
    mesh_path(api, done).write_bytes(b"mesh.plz")
    is_problem(api.get(f"/v1/jobs/{done}/mesh"), 500, "damaged", "SHA-256")


def test_damaged_sums_are_damage(api: Api, done: str) -> None:
    mesh_path(api, done).with_name(SUMS).write_text("{")
    is_problem(api.get(f"/v1/jobs/{done}/mesh"), 500, "damaged")


def test_results_of_before_have_no_sums_and_are_sent(api: Api, done: str) -> None:
    mesh_path(api, done).with_name(SUMS).unlink()
    answer = api.get(f"/v1/jobs/{done}/mesh")
    assert answer.is_success
    assert "repr-digest" not in answer.headers


def test_the_client_takes_no_file_that_came_damaged(
    api: Api, done: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(api.app.url, api_key=api.secret, retry_s=3.0) as client:
        job = client.job(done)
        assert job.download(tmp_path / "good.ply").read_text() == MESH
        # As a proxy does that cuts or changes what passes through it.
        times = []

        def garbled(self: httpx.Response) -> object:
            times.append(self)
            yield b"mesh.plz" if len(times) < 3 else MESH.encode()

        monkeypatch.setattr(httpx.Response, "iter_bytes", garbled)
        assert job.download(tmp_path / "mended.ply").read_text() == MESH
        assert len(times) == 3
        times.clear()
        monkeypatch.setattr(httpx.Response, "iter_bytes", lambda self: iter([b"mesh.plz"]))
        with pytest.raises(ServiceError, match="damaged"):
            job.download(tmp_path / "bad.ply")
        assert not (tmp_path / "bad.ply").exists()


# The database


def ran(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "sdfserver", *command, "--data-dir", str(folder)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a job in it."""
    folder = tmp_path_factory.mktemp("used")
    with running(Settings(data_dir=folder, min_free_bytes=0)) as app:
        files = {"cloud": ("a.xyz", b"0 0 1 0 0 1\n")}
        assert httpx.post(f"{app.url}/v1/jobs", files=files).status_code == 202
    return folder


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["api", "--port", "0"], ["worker"], ["keys", "list"]])
def test_a_database_that_is_none_stays_as_it_is_and_is_told_of(command: list[str], used: Path, tmp_path: Path) -> None:
    shutil.copytree(used, tmp_path / "data")
    database = tmp_path / "data" / "sdfserver.sqlite3"
    for garbage in (b"not a database" * 1000, database.read_bytes()[:100] + b"\xff" * 20_000):
        for path in database.parent.glob("sdfserver.sqlite3-*"):
            path.unlink()
        database.write_bytes(garbage)
        tried = ran(tmp_path / "data", *command)
        assert tried.returncode == 2, tried.stderr
        assert "the database cannot be used" in tried.stderr
        assert "restore" in tried.stderr
        assert "Traceback" not in tried.stderr
        assert database.read_bytes() == garbage
    assert [path.name for path in Artifacts(tmp_path / "data").jobs.iterdir()]


@pytest.mark.parametrize(
    "command",
    [["serve", "--port", "0"], ["api", "--port", "0"], ["worker"], ["migrate"], ["keys", "create", "me"]],
)
def test_a_database_that_is_lost_is_not_made_anew_while_there_are_files(
    command: list[str], used: Path, tmp_path: Path
) -> None:
    shutil.copytree(used, tmp_path / "data")
    database = tmp_path / "data" / "sdfserver.sqlite3"
    for path in database.parent.glob("sdfserver.sqlite3*"):
        path.unlink()
    for make in (lambda: None, database.touch):
        make()
        tried = ran(tmp_path / "data", *command)
        assert tried.returncode == 2, tried.stderr
        assert "the database knows of none: restore it from a backup" in tried.stderr
        assert "Traceback" not in tried.stderr
        assert [path.name for path in Artifacts(tmp_path / "data").jobs.iterdir()]
        with contextlib.closing(sqlite3.connect(database)) as connection:
            assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def test_a_database_damaged_while_it_is_used_is_said_to_be(tmp_path: Path) -> None:
    with running(Settings(data_dir=tmp_path, min_free_bytes=0)) as app:
        files = {"cloud": ("a.xyz", b"0 0 1 0 0 1\n")}
        assert httpx.post(f"{app.url}/v1/jobs", files=files).status_code == 202
        database = tmp_path / "sdfserver.sqlite3"
        app.store.close()
        for path in tmp_path.glob("sdfserver.sqlite3-*"):
            path.unlink()
        database.write_bytes(b"\xff" * database.stat().st_size)
        answer = httpx.get(f"{app.url}/v1/jobs")
        is_problem(answer, 503, "not-ready", "database")
        assert set(database.read_bytes()) == {0xFF}


def test_the_application_is_whole_after_all_that(app: App) -> None:
    assert httpx.get(f"{app.url}/health/live").is_success
