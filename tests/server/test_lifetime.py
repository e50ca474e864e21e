"""A whole job's life on a server of its own with PostgreSQL: done, expired, forgotten; nothing stays on the disk."""

from pathlib import Path

import httpx
from server.helpers import PATIENCE_S, is_problem, postgres, process, until


def test_a_job_is_done_then_gone_then_forgotten(tmp_path: Path, data: Path) -> None:
    with (
        postgres() as url,
        process(
            "serve",
            tmp_path,
            database_url=url,
            min_free_bytes=0,
            retention_seconds=4,
            gone_seconds=2,
            sweep_seconds=0.5,
        ) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client,
        (data / "sparse.ply").open("rb") as cloud,
    ):
        options = {"options": '{"preset": "draft", "resolution": 16}'}
        job = client.post("/v1/jobs", files={"cloud": cloud}, data=options).raise_for_status().json()
        where = job["links"]["self"]
        with client.stream("GET", job["links"]["events"], timeout=None) as events:
            assert '"state":"succeeded"' in events.read().decode()
        assert client.get(f"{where}/mesh").content.startswith(b"ply\n")
        until(lambda: client.get(where).status_code == 410)
        is_problem(client.get(f"{where}/mesh"), 410, "gone")
        until(lambda: not list(tmp_path.joinpath("data", "jobs").iterdir()))
        until(lambda: client.get(where).status_code == 404)
        assert client.get("/v1/jobs").json()["jobs"] == []
