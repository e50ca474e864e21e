"""What is there to be looked at: previews, points and pictures of jobs, the bundled clouds; and a job done again."""

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree
from server.helpers import Api, Served, is_problem, until

from sdfserver.io import read_cloud, read_mesh, write_ply
from sdfserver.samples import samples
from sdfserver.server.artifacts import POINTS, PREVIEW


def test_a_finished_job_has_a_light_mesh_with_distances_points_and_a_picture(
    served: Served, data: Path, tmp_path: Path
) -> None:
    links, cloud = served.job["links"], read_cloud(data / "sparse.ply")
    for name, file in (("preview", "preview.ply"), ("points", "points.ply")):
        answer = served.api.get(links[name])
        assert answer.status_code == 200, answer.text
        (tmp_path / file).write_bytes(answer.content)
        assert served.api.get(links[name], headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    mesh = read_mesh(tmp_path / "preview.ply")
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), np.ptp(cloud.points, axis=0), rtol=0.1)
    assert b"property float distance" in (tmp_path / "preview.ply").read_bytes()
    shown = read_cloud(tmp_path / "points.ply")
    np.testing.assert_allclose(shown.points, cloud.points, atol=1e-6)
    assert shown.normals is not None
    answer = served.api.get(links["picture"])
    assert answer.headers["content-type"] == "image/png"
    assert np.asarray(Image.open(io.BytesIO(answer.content)))[..., 3].mean() > 20


def test_the_surface_is_shown_while_it_forms(served: Served, data: Path, tmp_path: Path) -> None:
    with (data / "sparse.ply").open("rb") as cloud:
        job = served.api.post("/v1/jobs?preset=draft&resolution=32&name=a.ply", content=cloud.read()).json()
    url = job["links"]["self"]
    assert job["links"]["preview"] is job["links"]["points"] is None
    is_problem(served.api.get(f"{url}/preview"), 409, "state", "preview")
    is_problem(served.api.get(f"{url}/points"), 409, "state", "points")
    seen: dict[int, bytes] = {}

    def ended() -> bool:
        now = served.api.get(url).json()
        if now["state"] == "running" and now["preview"]:
            answer = served.api.get(now["links"]["preview"])
            if answer.status_code == 200:
                seen[now["preview"]] = answer.content
                tag = answer.headers["etag"]
                assert served.api.get(f"{url}/preview", headers={"If-None-Match": tag}).status_code in (200, 304)
                assert served.api.get(f"{url}/points").status_code == 200
        return now["state"] not in ("queued", "running")

    until(ended)
    assert served.api.get(url).json()["state"] == "succeeded"
    assert len(set(seen.values())) >= 2, "it changes as it forms"
    for number, body in seen.items():
        path = tmp_path / f"{number}.ply"
        path.write_bytes(body)
        assert len(read_mesh(path).faces) > 100
    assert b"distance" not in next(iter(seen.values()))
    assert b"distance" in served.api.get(f"{url}/preview").content


def test_a_job_keeps_the_colours_of_its_cloud_in_all_that_it_makes(served: Served, data: Path, tmp_path: Path) -> None:
    cloud = read_cloud(data / "sparse.ply")
    colors = np.where(cloud.points[:, 2:] > np.median(cloud.points[:, 2]), [230, 20, 30], [10, 40, 220]).astype(
        np.uint8
    )
    write_ply(tmp_path / "painted.ply", cloud.points, normals=cloud.normals, colors=colors)
    body = (tmp_path / "painted.ply").read_bytes()
    first = served.api.post("/v1/jobs?preset=draft&resolution=32&name=painted.ply", content=body).json()

    def ended(job: dict) -> dict:
        until(lambda: served.api.get(job["links"]["self"]).json()["state"] not in ("queued", "running"))
        job = served.api.get(job["links"]["self"]).json()
        assert job["state"] == "succeeded", job
        return job

    def fetched(job: dict, name: str, file: str) -> Path:
        answer = served.api.get(f"{job['links']['self']}/{name}").raise_for_status()
        (tmp_path / file).write_bytes(answer.content)
        return tmp_path / file

    first = ended(first)
    second = ended(served.api.post(f"{first['links']['self']}/meshes", json={"resolution": 24, "faces": 500}).json())
    for job in (first, second):
        mesh = read_mesh(fetched(job, "mesh", "mesh.ply"))
        shown = read_mesh(fetched(job, "preview", "preview.ply"))
        near = cKDTree(cloud.points).query(mesh.vertices)[1]
        assert mesh.colors is not None
        same = (np.abs(mesh.colors.astype(int) - colors[near]) <= 60).all(axis=1)
        assert same.mean() > 0.85, "beside the border all of them"
        np.testing.assert_array_equal(shown.colors, mesh.colors)
        for format_ in ("glb", "obj", "off"):
            other = read_mesh(fetched(job, f"mesh?format={format_}", f"mesh.{format_}"))
            np.testing.assert_array_equal(other.colors, mesh.colors)
    points = read_cloud(fetched(first, "points", "points.ply"))
    np.testing.assert_array_equal(points.colors, colors)


def test_a_preview_is_told_of_by_events(served: Served) -> None:
    numbers = [line for line in served.stream.splitlines() if line.startswith("data:") and '"preview":' in line]
    assert any('"preview":null' in line for line in numbers)
    # Which of them is a matter of time: progress is told once a second at most.
    assert any(re.search(r'"preview":[1-9]', line) for line in numbers)


def test_a_mesh_of_a_mesh_shows_its_parents_points(api: Api, worker: str) -> None:
    parent = api.submit()
    api.publish(parent["id"], worker)
    child = api.post(f"{parent['links']['self']}/meshes", json={"resolution": 32}).json()
    assert api.get(f"{child['links']['self']}/points").text == POINTS
    is_problem(api.get(f"{child['links']['self']}/preview"), 409, "state")
    api.publish(child["id"], worker)
    assert api.get(api.job(child["id"])["links"]["preview"]).text == PREVIEW


def test_a_failed_job_has_nothing_to_show_and_says_so(api: Api, worker: str) -> None:
    job = api.submit()
    attempt = api.begin(job["id"], worker)
    api.store.fail(attempt, {"type": "about:blank", "title": "no", "status": 422, "detail": "no"}, 3600.0)
    links = api.job(job["id"])["links"]
    assert links["preview"] is links["points"] is links["picture"] is None
    for name in ("preview", "points", "picture"):
        is_problem(api.get(f"/v1/jobs/{job['id']}/{name}"), 409, "state", "failed")


# Again


def test_a_job_is_done_again_with_other_options_and_no_other_upload(api: Api) -> None:
    job = api.submit('{"preset": "draft", "seed": 3, "priority": 2}', name="shape.xyz")
    again = api.post(job["links"]["restart"], json={"seed": 4, "normals": "estimate"})
    assert again.status_code == 202, again.text
    other = again.json()
    assert (other["id"], again.headers["location"]) != (job["id"], job["links"]["self"])
    assert other["options"] == job["options"] | {"seed": 4, "normals": "estimate"}
    assert (other["name"], other["kind"], other["priority"]) == ("shape.xyz", "reconstruction", 2)
    api.delete(job["links"]["self"])
    assert api.artifacts.upload(other["id"], "xyz").stat().st_size > 0
    same = api.post(other["links"]["restart"])
    assert same.json()["options"] == other["options"]


def test_a_job_is_done_again_whatever_became_of_it(api: Api, worker: str) -> None:
    job = api.submit()
    api.post(job["links"]["cancel"])
    assert api.post(job["links"]["restart"]).status_code == 202
    done = api.submit()
    api.publish(done["id"], worker)
    assert api.post(done["links"]["restart"]).status_code == 202
    child = api.post(f"{done['links']['self']}/meshes", json={"resolution": 32}).json()
    again = api.post(child["links"]["restart"], json={"resolution": 40}).json()
    assert (again["kind"], again["parent_id"]) == ("mesh", done["id"])
    assert again["options"]["resolution"] == 40
    assert api.get(f"{again['links']['self']}/points").text == POINTS


def test_a_job_is_not_done_again_with_options_that_it_has_not(api: Api, worker: str) -> None:
    job = api.submit()
    is_problem(api.post(job["links"]["restart"], json={"colour": "red"}), 422, "invalid", "colour")
    is_problem(api.post(job["links"]["restart"], json={"resolution": "64"}), 422, "invalid", "resolution")
    is_problem(api.post(job["links"]["restart"], json={"viewpoint": [0, 0, 1]}), 422, "invalid", "viewpoint")
    api.publish(job["id"], worker)
    child = api.post(f"{job['links']['self']}/meshes", json={"resolution": 32}).json()
    is_problem(api.post(child["links"]["restart"], json={"seed": 1}), 422, "invalid", "seed")
    api.delete(job["links"]["self"])
    is_problem(api.post(job["links"]["restart"]), 410, "gone")


def test_a_restart_is_asked_for_once(api: Api) -> None:
    job = api.submit()
    headers = {"Idempotency-Key": "again"}
    first, second = (api.post(job["links"]["restart"], headers=headers) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["idempotent-replayed"] == "true"
    is_problem(api.post(job["links"]["restart"], json={"seed": 9}, headers=headers), 409, "idempotency")
    assert api.folders() >= {job["id"], first.json()["id"]}


# The bundled clouds


def test_the_bundled_clouds_can_be_had(api: Api) -> None:
    listed = api.get("/v1/samples").raise_for_status().json()["samples"]
    assert {sample["name"] for sample in listed} == set(samples())
    for sample in listed:
        assert sample["summary"]
        body = api.get(sample["link"]).raise_for_status().content
        assert len(body) == sample["bytes"]
        assert body == samples()[sample["name"]].read_bytes()
    is_problem(api.get("/v1/samples/teapot"), 404, "not-found", "teapot", "knot")
    is_problem(api.get("/v1/samples/..%2Fconftest"), 404, "not-found")
