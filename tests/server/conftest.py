"""One application in a thread for all tests, on SQLite and on PostgreSQL; and one whole server with one real job."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server.helpers import PATIENCE_S, Api, App, Served, end_jobs, postgres, process, running

from sdfserver.server.settings import Settings


@pytest.fixture(scope="session", autouse=True)
def plain_environment() -> Iterator[None]:
    """Settings of whoever runs the tests do not reach them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("SDFSERVER_"):
                patch.delenv(name)
        yield


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """What the setting of that name says."""
    if request.param == "sqlite":
        yield None
    else:
        with postgres() as url:
            yield url


@pytest.fixture(scope="session")
def app(database_url: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """An application with API keys in use, so that every test has jobs of its own."""
    folder = tmp_path_factory.mktemp("data")
    with running(
        Settings(data_dir=folder, database_url=database_url, min_free_bytes=0, lease_seconds=PATIENCE_S)
    ) as app:
        yield app


@pytest.fixture
def api(app: App) -> Iterator[Api]:
    """A client whose unfinished jobs go with the test."""
    api = Api(app)
    yield api
    end_jobs(api)


@pytest.fixture
def other(app: App) -> Iterator[Api]:
    """Somebody else's client."""
    api = Api(app)
    yield api
    end_jobs(api)


@pytest.fixture
def worker(app: App) -> Iterator[str]:
    """A worker that says it is alive and does nothing."""
    name = secrets.token_hex(8)
    app.store.register_worker(name, host="nowhere", pid=0, started=None, device="cpu")
    yield name
    app.store.retire(name)
    app.store.forget_workers([name])


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Served]:
    """`sdfserver serve` after one real job: sparse.ply, followed by its events to the end."""
    folder = tmp_path_factory.mktemp("served")
    made = subprocess.run(
        [sys.executable, "-m", "sdfserver", "keys", "create", "a tester", "--data-dir", str(folder / "data")],
        capture_output=True,
        text=True,
        check=True,
    )
    secret = made.stdout.strip()
    with (
        process(
            "serve", folder, sweep_seconds=0.5, min_free_bytes=0, max_resolution=128, max_grid_resolution=48
        ) as server,
        httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {secret}"}, timeout=PATIENCE_S) as client,
    ):
        served = Served(server, client, secret)
        with (data / "sparse.ply").open("rb") as cloud:
            answer = client.post(
                "/v1/jobs",
                files={"cloud": ("Ente \u00e4 \u9d28.ply", cloud)},
                data={"options": '{"preset": "draft", "resolution": 32}'},
            )
        assert answer.status_code == 202, answer.text
        with client.stream("GET", answer.json()["links"]["events"], timeout=None) as events:
            served.stream = events.read().decode()
        served.job = client.get(answer.headers["location"]).json()
        assert served.job["state"] == "succeeded", (served.job, server.said())
        yield served
