"""API keys: made by a command, stored hashed, sent in a header, each for its own jobs; and who may listen where."""

import hashlib
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from server.helpers import XYZ, Api, App, Served, is_problem, postgres, running

from sdfserver.errors import ConfigError
from sdfserver.server.settings import Settings, load_settings
from sdfserver.server.store import Store, api_keys
from sdfserver.server.supervisor import check_public

GUARDED = ("/v1/jobs", "/v1/options", f"/v1/jobs/{'0' * 32}")


def run(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "sdfserver", *command, "--data-dir", str(folder)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_the_table_has_the_hash_and_nothing_of_the_key(app: App, api: Api) -> None:
    with app.store.engine.connect() as connection:
        row = connection.execute(sa.select(api_keys).where(api_keys.c.id == api.key_id)).one()
    assert row.hash == hashlib.sha256(api.secret.encode()).hexdigest()
    assert len(api.secret) > 40
    assert not any(api.secret[4:20] in str(value) for value in row)


def test_the_database_has_no_key_anywhere(served: Served) -> None:
    files = [path for path in served.server.folder.joinpath("data").iterdir() if path.is_file()]
    assert any(path.name.startswith("sdfserver.sqlite3") for path in files)
    for path in files:
        assert served.secret.encode() not in path.read_bytes()


def test_without_a_known_key_nobody_is_served(app: App, api: Api) -> None:
    basic = "Basic " + "dTpw"
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": api.secret}, {"Authorization": basic},
                    {"Authorization": f"Bearer {api.secret}x"}, {"X-API-Key": api.secret},
                    {"Cookie": f"key={api.secret}"}):  # fmt: skip
        for url in GUARDED:
            answer = httpx.get(f"{app.url}{url}", headers=headers)
            is_problem(answer, 401, "unauthorized", "Authorization: Bearer KEY")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert api.secret not in answer.text


def test_a_key_in_the_url_is_none(app: App, api: Api) -> None:
    for name in ("key", "api_key", "token", "access_token", "authorization"):
        is_problem(httpx.get(f"{app.url}/v1/jobs", params={name: api.secret}), 401, "unauthorized")


def test_nothing_is_read_from_who_has_no_key(app: App) -> None:
    before = list(app.service.artifacts.jobs.iterdir())
    is_problem(httpx.post(f"{app.url}/v1/jobs?format=xyz", content=XYZ * 1000), 401, "unauthorized")
    assert list(app.service.artifacts.jobs.iterdir()) == before


def test_a_revoked_key_is_refused_at_once(app: App) -> None:
    with Api(app) as api:
        job = api.submit()
        assert app.store.revoke_key(api.key_id)
        is_problem(api.get(job["links"]["self"]), 401, "unauthorized")
        assert not app.store.revoke_key(api.key_id)
    app.store.cancel(job["id"], 60)


def test_probes_and_pages_need_no_key(app: App) -> None:
    for url in ("/health/live", "/metrics", "/docs", "/openapi.json"):
        assert httpx.get(f"{app.url}{url}").status_code == 200


def test_the_last_key_that_is_revoked_leaves_the_door_shut(tmp_path: Path) -> None:
    with running(Settings(data_dir=tmp_path, min_free_bytes=0)) as app:
        assert httpx.get(f"{app.url}/v1/jobs").status_code == 200
        assert httpx.get(f"{app.url}/v1/jobs", headers={"Authorization": "Bearer whatever"}).status_code == 200
        key_id, _ = app.store.create_key("the only one")
        is_problem(httpx.get(f"{app.url}/v1/jobs"), 401, "unauthorized")
        app.store.revoke_key(key_id)
        is_problem(httpx.get(f"{app.url}/v1/jobs"), 401, "unauthorized")


def test_the_commands_make_list_and_revoke_keys(tmp_path: Path) -> None:
    made = run(tmp_path, "keys", "create", "Alice")
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    assert secret.startswith("sdf_")
    assert "not be shown again" in made.stderr
    assert secret not in made.stderr
    store = Store(Settings(data_dir=tmp_path).database)
    key = store.authenticate(secret)
    assert key is not None
    assert key.name == "Alice"
    listed = run(tmp_path, "keys", "list").stdout
    assert [key.id in listed, "in use" in listed, "Alice" in listed, secret in listed] == [True, True, True, False]
    assert run(tmp_path, "keys", "revoke", key.id).returncode == 0
    assert store.authenticate(secret) is None
    again = run(tmp_path, "keys", "revoke", key.id)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert key.id in again.stderr
    store.close()


def test_a_public_address_without_keys_is_refused(tmp_path: Path) -> None:
    for command in ("serve", "api"):
        tried = run(tmp_path, command, "--host", "0.0.0.0", "--port", "0")  # noqa: S104
        assert tried.returncode == 2, tried.stderr
        assert "keys create" in tried.stderr
        assert "Traceback" not in tried.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])  # noqa: S104
def test_a_public_address_needs_a_key_or_to_be_told(host: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, host=host)
    with running(Settings(data_dir=tmp_path, min_free_bytes=0)) as app:
        with pytest.raises(ConfigError, match="keys create"):
            check_public(settings, app.store)
        check_public(settings.model_copy(update={"allow_public_without_keys": True}), app.store)
        for loopback in ("127.0.0.1", "127.5.5.5", "::1", "localhost"):
            check_public(settings.model_copy(update={"host": loopback}), app.store)
        app.store.create_key("a key")
        check_public(settings, app.store)


def test_the_default_address_is_loopback() -> None:
    assert socket.gethostbyname(load_settings().host) == "127.0.0.1"


@pytest.mark.parametrize("first", [True, False])
def test_if_none_makes_no_second_key(tmp_path: Path, first: bool) -> None:
    made = run(tmp_path, "keys", "create", "first", "--if-none") if first else run(tmp_path, "keys", "create", "first")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("sdf_")
    again = run(tmp_path, "keys", "create", "second", "--if-none")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    key_id = run(tmp_path, "keys", "list").stdout.split()[0]
    run(tmp_path, "keys", "revoke", key_id)
    assert run(tmp_path, "keys", "create", "third", "--if-none").stdout == ""


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_of_several_that_make_the_first_key_one_does(tmp_path: Path, kind: str) -> None:
    with postgres() if kind == "postgresql" else nullcontext(f"sqlite:///{tmp_path}/keys.sqlite3") as url:
        stores = [Store(url.replace("postgresql://", "postgresql+psycopg://")) for _ in range(6)]
        stores[0].create_tables()
        start = threading.Barrier(len(stores))

        def create(store: Store) -> tuple[str, str] | None:
            start.wait()
            return store.create_first_key("first")

        with ThreadPoolExecutor(len(stores)) as threads:
            (made,) = filter(None, threads.map(create, stores))
        assert [row.id for row in stores[0].list_keys()] == [made[0]]
        for store in stores:
            store.close()
