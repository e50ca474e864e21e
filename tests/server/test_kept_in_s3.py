"""A whole service whose clouds and meshes are in S3: what its users see is the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest
from s3 import S3
from server.helpers import PATIENCE_S, Process, is_problem, process, until

from sdfserver.client import Client
from sdfserver.io import read_cloud, read_mesh
from sdfserver.metrics import mesh_health
from sdfserver.server.artifacts import FIT_FILES, MESH_FILES

OPTIONS: dict[str, Any] = {"preset": "draft", "resolution": 32}


@pytest.fixture(scope="module")
def bucket(s3: S3) -> str:
    return s3.bucket()


@pytest.fixture(scope="module")
def server(s3: S3, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        with process("serve", folder, artifacts_url=f"s3://{bucket}/the/files", sweep_seconds=0.5) as server:
            yield server


@pytest.fixture
def client(server: Process) -> Iterator[Client]:
    with Client(server.url, timeout_s=PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="module")
def job(server: Process, data: Path) -> dict[str, Any]:
    """One that has succeeded, and whose preview was seen while it ran."""
    seen = []
    with (
        Client(server.url, timeout_s=PATIENCE_S) as client,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as api,
    ):
        job = client.submit(data / "sparse.ply", **OPTIONS)
        previews: set[str] = set()

        def ended() -> bool:
            answer = api.get(f"/v1/jobs/{job.id}/preview")
            if answer.is_success:
                previews.add(answer.headers["etag"])
                again = api.get(f"/v1/jobs/{job.id}/preview", headers={"If-None-Match": answer.headers["etag"]})
                seen.append(again.status_code)
            return job.refresh().state == "succeeded"

        until(ended)
        assert api.get(f"/v1/jobs/{job.id}/points").is_success
        assert len(previews) >= 2, "that of the end, and one before"
        assert 304 in seen
        return api.get(f"/v1/jobs/{job.id}").json()


def objects(s3: S3, bucket: str, job_id: str) -> set[str]:
    prefix = f"the/files/{job_id}/"
    found = [meta["path"] for some in obstore.list(s3.store(bucket), prefix) for meta in some]
    return {path.removeprefix(prefix) for path in found}


def test_everything_of_a_job_is_in_the_bucket_and_nothing_else_anywhere(
    s3: S3, bucket: str, server: Process, job: dict[str, Any]
) -> None:
    wanted = {"cloud.ply"} | {f"fit-1/{name}" for name in FIT_FILES} | {f"mesh-1/{name}" for name in MESH_FILES}
    assert objects(s3, bucket, job["id"]) == wanted
    data = server.folder / "data"
    until(lambda: not [path for path in data.glob("scratch/*/jobs/*") if any(path.iterdir())])
    assert not (data / "jobs").exists()


def test_results_are_downloaded_in_every_format(client: Client, job: dict[str, Any], tmp_path: Path) -> None:
    ours = client.job(job["id"])
    ply, *others = (
        mesh_health(read_mesh(ours.download(tmp_path / f"mesh.{ending}")))
        for ending in ("ply", "obj", "stl", "glb", "off")
    )
    assert ply.watertight
    assert {other.faces for other in others} == {ply.faces}
    assert ours.report()["mesh"]["watertight"]
    assert ours.download_field(tmp_path / "field.safetensors").stat().st_size > 10_000


def test_a_part_of_a_result_is_what_range_asks_for(server: Process, job: dict[str, Any]) -> None:
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as api:
        url = f"/v1/jobs/{job['id']}/mesh"
        whole = api.get(url)
        size = len(whole.content)
        assert whole.headers["content-length"] == str(size)
        assert whole.headers["content-disposition"] == "attachment; filename*=utf-8''sparse.ply"
        for asked, part in (
            ("bytes=0-9", slice(0, 10)),
            ("bytes=100-", slice(100, None)),
            ("bytes=-7", slice(-7, None)),
            (f"bytes=5-{10 * size}", slice(5, None)),
        ):
            answer = api.get(url, headers={"Range": asked, "If-Range": whole.headers["etag"]})
            assert (answer.status_code, answer.content) == (206, whole.content[part])
            start, stop, _ = part.indices(size)
            assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
        for asked in ("bytes=3-2", "lines=1-2", "bytes=0-1, 5-6"):
            answer = api.get(url, headers={"Range": asked})
            assert (answer.status_code, answer.content) == (200, whole.content)
        assert api.get(url, headers={"Range": "bytes=0-9", "If-Range": '"another"'}).status_code == 200
        is_problem(api.get(url, headers={"Range": f"bytes={size}-"}), 416, "range")
        assert api.get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304


def test_fields_answer_and_are_meshed_again(client: Client, job: dict[str, Any], data: Path) -> None:
    ours = client.job(job["id"])
    points = read_cloud(data / "sparse.ply").points
    assert abs(ours.sdf(points[:50])).max() < 0.05 * abs(points).max()
    finer = ours.mesh(resolution=40)
    assert finer.wait().report()["mesh"]["watertight"]
    ours.restart(seed=1).cancel()


def test_a_job_that_is_deleted_leaves_nothing_in_the_bucket(
    s3: S3, bucket: str, client: Client, server: Process, data: Path
) -> None:
    job = client.submit(data / "sparse.ply", **OPTIONS)
    until(lambda: objects(s3, bucket, job.id) >= {"cloud.ply", "fit-1/points.ply"})
    job.delete()
    until(lambda: not objects(s3, bucket, job.id))
    is_problem(httpx.get(f"{server.url}/v1/jobs/{job.id}/mesh"), 410, "gone")


def test_downloads_are_sent_to_the_bucket_where_the_settings_say_so(
    s3: S3, bucket: str, server: Process, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    shared = {
        "database_url": f"sqlite:///{server.folder}/data/sdfserver.sqlite3",
        "artifacts_url": f"s3://{bucket}/the/files",
        "presigned_seconds": 60,
    }
    with process("api", tmp_path / "api", **shared) as api, Client(api.url, timeout_s=PATIENCE_S) as client:
        url = f"{api.url}/v1/jobs/{job['id']}"
        answer = httpx.get(f"{url}/mesh")
        assert answer.status_code == 307
        assert answer.headers["location"].startswith(f"{s3.url}/{bucket}/the/files/{job['id']}/mesh-1/mesh.ply?")
        # A page's script could not follow.
        assert httpx.get(f"{url}/mesh", headers={"Sec-Fetch-Mode": "cors"}).status_code == 200
        for what in ("report", "picture", "preview", "points"):
            assert httpx.get(f"{url}/{what}").status_code == 200
        ours = client.job(job["id"])
        through = httpx.get(f"{server.url}/v1/jobs/{job['id']}/mesh").content
        assert ours.download(tmp_path / "mesh.ply").read_bytes() == through
        assert mesh_health(read_mesh(ours.download(tmp_path / "mesh.obj"))).watertight


def test_a_store_that_is_lost_is_said_to_be(s3: S3, server: Process, job: dict[str, Any], data: Path) -> None:
    s3.stop()
    try:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as api, (data / "sparse.ply").open("rb") as cloud:
            is_problem(api.post("/v1/jobs", files={"cloud": cloud}), 503, "not-ready", "store of clouds and meshes")
            is_problem(api.get(f"/v1/jobs/{job['id']}/mesh"), 503, "not-ready", "store of clouds and meshes")
            assert api.get(f"/v1/jobs/{job['id']}").is_success
    finally:
        s3.start()
    assert httpx.get(f"{server.url}/v1/jobs/{job['id']}/mesh", timeout=PATIENCE_S).is_success
