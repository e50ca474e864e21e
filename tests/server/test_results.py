"""What a real job of a real server left: mesh, report and field as downloads, distances, another mesh."""

import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from server.helpers import Api, Served, is_problem, until

from sdfserver.field import SignedDistanceField
from sdfserver.io import read_cloud, read_mesh

NAME = "Ente \u00e4 \u9d28"


def mesh_url(served: Served, **query: Any) -> str:
    return f"{served.job['links']['mesh']}?{urllib.parse.urlencode(query)}"


def wait(served: Served, url: str) -> dict[str, Any]:
    """The job, when it has ended."""

    def ended() -> dict[str, Any] | None:
        job = served.api.get(url).raise_for_status().json()
        return None if job["state"] in ("queued", "running") else job

    return until(ended, pause_s=0.2)


def test_the_job_says_what_became_of_it(served: Served) -> None:
    job = served.job
    assert (job["progress"], job["stage"], job["problem"]) == (1, None, None)
    assert (job["eta_s"], job["queue_position"]) == (None, None)
    assert job["name"] == f"{NAME}.ply"
    assert job["attempt"] == 1
    assert job["created_at"] < job["started_at"] < job["finished_at"] < job["expires_at"]
    for name in ("mesh", "report", "field", "meshes", "sdf"):
        assert job["links"][name].startswith(job["links"]["self"])


@pytest.mark.parametrize("kind", ["ply", "glb", "obj", "stl", "off"])
def test_the_mesh_comes_in_every_format_named_after_the_upload(
    served: Served, data: Path, tmp_path: Path, kind: str
) -> None:
    answer = served.api.get(mesh_url(served, format=kind))
    assert answer.status_code == 200, answer.text
    name = re.fullmatch(r"attachment; filename\*=utf-8''(\S+)", answer.headers["content-disposition"])
    assert name is not None
    assert urllib.parse.unquote(name[1]) == f"{NAME}.{kind}"
    file = tmp_path / f"mesh.{kind}"
    file.write_bytes(answer.content)
    mesh, cloud = read_mesh(file), read_cloud(data / "sparse.ply")
    low, high = cloud.points.min(axis=0), cloud.points.max(axis=0)
    voxel = (high - low).max() / 32
    assert len(mesh.faces) > 500
    np.testing.assert_allclose(mesh.vertices.min(axis=0), low, atol=2 * voxel)
    np.testing.assert_allclose(mesh.vertices.max(axis=0), high, atol=2 * voxel)


def test_the_mesh_in_a_format_that_is_none_is_refused(served: Served) -> None:
    is_problem(served.api.get(mesh_url(served, format="doc")), 422, "invalid", "format", "'doc'", "glb")


def test_what_the_client_has_is_not_sent_again(served: Served) -> None:
    tags, links = set(), served.job["links"]
    for url in (mesh_url(served), mesh_url(served, format="obj"), links["report"], links["field"]):
        tag = served.api.get(url).headers["etag"]
        tags.add(tag)
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            answer = served.api.get(url, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
        assert served.api.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    assert len(tags) == 4


def test_a_download_goes_on_where_it_broke_off(served: Served) -> None:
    url = mesh_url(served)
    whole = served.api.get(url)
    body, tag = whole.content, whole.headers["etag"]
    size = len(body)
    assert whole.headers["accept-ranges"] == "bytes"
    for asked, part in {
        "bytes=0-99": body[:100],
        "bytes=100-": body[100:],
        "bytes=-100": body[-100:],
        f"bytes={size - 1}-{size + 5}": body[-1:],
    }.items():
        for headers in ({"Range": asked}, {"Range": asked, "If-Range": tag}):
            answer = served.api.get(url, headers=headers)
            assert (answer.status_code, answer.content) == (206, part)
            assert answer.headers["content-range"].endswith(f"/{size}")
            assert answer.headers["etag"] == tag
    other = served.api.get(url, headers={"Range": "bytes=100-", "If-Range": '"other"'})
    assert (other.status_code, other.content) == (200, body)


def test_a_range_that_is_not_there_is_a_problem_and_one_that_is_none_is_ignored(served: Served) -> None:
    url = mesh_url(served)
    body = served.api.get(url).content
    answer = served.api.get(url, headers={"Range": f"bytes={len(body)}-"})
    is_problem(answer, 416, "range", str(len(body)))
    assert answer.headers["content-range"] == f"bytes */{len(body)}"
    for nonsense in ("lines=1-2", "bytes=x", "bytes=", "bytes", "bytes=9-3"):
        answer = served.api.get(url, headers={"Range": nonsense})
        assert (answer.status_code, answer.content) == (200, body)


def test_the_report_has_the_figures(served: Served) -> None:
    answer = served.api.get(served.job["links"]["report"])
    report = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert urllib.parse.unquote(answer.headers["content-disposition"]).endswith(f"{NAME}.json")
    assert report["cloud"]["points"] == 500
    assert report["mesh"]["faces"] > 500
    assert report["input_to_mesh"]["mean"] > 0
    assert report["seconds"]["total"] > 0
    assert "/" not in json.dumps(report).replace("1/", "")


@pytest.fixture(scope="module")
def fitted(served: Served, tmp_path_factory: pytest.TempPathFactory) -> SignedDistanceField:
    """The field as it is downloaded."""
    answer = served.api.get(served.job["links"]["field"])
    assert urllib.parse.unquote(answer.headers["content-disposition"]).endswith(f"{NAME}.safetensors")
    path = tmp_path_factory.mktemp("field") / "field.safetensors"
    path.write_bytes(answer.content)
    return SignedDistanceField.load(path, device="cpu")


def test_distances_and_gradients_are_those_of_the_field(
    served: Served, fitted: SignedDistanceField, data: Path
) -> None:
    cloud = read_cloud(data / "sparse.ply")
    low, high = cloud.points.min(axis=0), cloud.points.max(axis=0)
    points = low + (high - low) * np.random.default_rng(0).uniform(-0.2, 1.2, (9000, 3))
    url = served.job["links"]["sdf"]
    answer = served.api.post(url, json={"points": points.tolist(), "gradient": True}).raise_for_status().json()
    size = (high - low).max()
    np.testing.assert_allclose(answer["distances"], fitted.evaluate(points), rtol=0, atol=1e-5 * size)
    np.testing.assert_allclose(answer["gradients"], fitted.gradient(points), rtol=0, atol=2e-4)
    bare = served.api.post(url, json={"points": points[:1].tolist()}).json()
    assert bare["gradients"] is None
    assert bare["distances"][0] == pytest.approx(answer["distances"][0], abs=1e-6 * size)
    outside = (high + size).tolist()
    assert served.api.post(url, json={"points": [outside]}).json()["distances"][0] > 0


def test_points_must_be_points(served: Served) -> None:
    url, json_type = served.job["links"]["sdf"], {"Content-Type": "application/json"}
    is_problem(served.api.post(url, json={"points": []}), 422, "invalid", "points")
    is_problem(served.api.post(url, json={"points": [[0, 0]]}), 422, "invalid", "points.0")
    is_problem(served.api.post(url, json={"points": [[0, 0, "up"]]}), 422, "invalid", "points.0.2", "'up'")
    is_problem(served.api.post(url, json={"points": [[0, 0, 1e300]]}), 422, "invalid", "too far")
    is_problem(served.api.post(url, json={"points": [[0, 0, 0]] * 100_001}), 422, "invalid", "100000")
    is_problem(served.api.post(url, json={"points": [[0, 0, 0]], "sign": 1}), 422, "invalid", "sign")
    is_problem(served.api.post(url, content=b'{"points": [[NaN, 0, 0]]}', headers=json_type), 422, "invalid", "points")
    is_problem(served.api.post(url, content=b'{"points": [[0, 0', headers=json_type), 400, "malformed", "JSON")
    is_problem(served.api.post(url, content=b" " * 17 * 2**20, headers=json_type), 413, "too-large")


def test_another_mesh_is_made_without_another_fit(served: Served) -> None:
    answer = served.api.post(served.job["links"]["meshes"], json={"resolution": 24, "level": 0.02, "shell": 0.15})
    assert answer.status_code == 202, answer.text
    child = wait(served, answer.headers["location"])
    assert child["state"] == "succeeded", child
    assert (child["kind"], child["links"]["parent"]) == ("mesh", served.job["links"]["self"])
    report, parent = (served.api.get(job["links"]["report"]).json() for job in (child, served.job))
    assert report["mesh"]["faces"] < parent["mesh"]["faces"]
    assert report["mesh"]["offset"]["shell"]["thinnest"] == pytest.approx(0.15, rel=0.25)
    assert 0 < report["mesh"]["volume"] < parent["mesh"]["volume"]
    assert 0 < report["mesh"]["volume_tolerance"] < 0.2 * report["mesh"]["volume"]
    same = [served.api.get(job["links"]["field"]).content for job in (child, served.job)]
    assert same[0] == same[1]
    points = {"points": [[0.1, 0.2, 0.3]]}
    both = [served.api.post(job["links"]["sdf"], json=points).json() for job in (child, served.job)]
    assert both[0] == both[1]
    assert served.api.delete(child["links"]["self"]).status_code == 204
    assert served.api.get(served.job["links"]["mesh"]).status_code == 200


def test_an_automatic_resolution_stays_within_the_server_s(served: Served) -> None:
    """The server's limit is 128, the field's detail 256."""
    answer = served.api.post(served.job["links"]["meshes"], json={})
    assert answer.status_code == 202, answer.text
    child = wait(served, answer.headers["location"])
    assert served.api.get(child["links"]["report"]).json()["mesh"]["resolution"] == 128
    assert served.api.delete(child["links"]["self"]).status_code == 204


def test_a_level_outside_the_field_fails_with_the_reason(served: Served) -> None:
    answer = served.api.post(served.job["links"]["meshes"], json={"resolution": 16, "level": 1e6})
    child = wait(served, answer.headers["location"])
    assert (child["state"], child["problem"]["status"]) == ("failed", 422)
    assert child["problem"]["type"] == "urn:sdfserver:problem:no-surface"
    assert "level 1e+06" in child["problem"]["detail"]


def test_a_cloud_that_is_none_fails_with_the_reason_under_its_own_name(served: Served) -> None:
    files = {"cloud": ("../../my cloud.ply", b"no cloud at all"), "options": (None, '{"resolution": 32}')}
    answer = served.api.post("/v1/jobs", files=files)
    job = wait(served, answer.headers["location"])
    assert (job["state"], job["problem"]["status"]) == ("failed", 422)
    assert "my cloud.ply" in job["problem"]["detail"]
    assert str(served.server.folder) not in json.dumps(job)
    is_problem(served.api.get(f"/v1/jobs/{job['id']}/mesh"), 409, "state", "failed")


def test_the_time_that_is_left_is_told_once_it_has_been_measured(served: Served, data: Path) -> None:
    """A job like the one before, behind another of its kind: its place and its time are told while it waits."""
    options = {"options": '{"preset": "draft", "resolution": 32}'}
    posts = []
    for _ in range(2):
        with (data / "sparse.ply").open("rb") as cloud:
            posts.append(served.api.post("/v1/jobs", files={"cloud": ("a.ply", cloud)}, data=options).json())
    first, second = (post["links"]["self"] for post in posts)
    until(lambda: served.api.get(first).json()["state"] == "running")

    def told() -> dict[str, Any] | None:
        job = served.api.get(second).json()
        return job if job["eta_s"] is not None and job["queue_position"] == 1 else None

    waiting = until(told)
    assert waiting["state"] == "queued"
    assert waiting["eta_s"] > 0
    for url in (second, first):
        assert served.api.post(f"{url}/cancel").json()["state"] == "cancelled"


def test_the_log_has_no_key_no_trace_and_no_paths(served: Served) -> None:
    said = served.server.said()
    assert served.secret not in said
    assert "Traceback" not in said
    started, *more = said.strip().splitlines()
    assert "serving on" in started  # the one line that says where the data are, to whoever started it
    assert str(served.server.folder) not in "\n".join(more)


def test_the_bodies_have_no_paths(served: Served) -> None:
    for url in ("/v1/jobs", served.job["links"]["self"], served.job["links"]["report"], "/v1/options", "/metrics"):
        text = served.api.get(url).text
        assert str(served.server.folder) not in text
        assert served.secret not in text


def test_a_field_is_not_read_from_elsewhere(api: Api) -> None:
    answer: httpx.Response = api.post(f"/v1/jobs/{'0' * 32}/sdf", json={"points": [[0, 0, 0]]})
    is_problem(answer, 404, "not-found")
