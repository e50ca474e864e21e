"""A field over HTTP: questions in JSON and as NPZ, slices, grids and ONNX; with a field made for it, and no fit."""

import io
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from balls import CENTER, SCALE, ball_field
from server.helpers import Api, App, is_problem

from sdfserver.client import Client, Job
from sdfserver.errors import ApiError, ConfigError, OutputError
from sdfserver.field import SignedDistanceField
from sdfserver.questions import MEANS
from sdfserver.server import field_routes
from sdfserver.server.artifacts import FIELD

NPZ = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def field() -> SignedDistanceField:
    return ball_field()


@pytest.fixture(scope="module")
def job(app: App, field: SignedDistanceField) -> Iterator[tuple[Api, str]]:
    """A job that has succeeded, with that field."""
    api = Api(app)
    worker = "a worker of the fields"
    app.store.register_worker(worker, host="nowhere", pid=0, started=None, device="cpu")
    job_id = api.submit()["id"]
    api.publish(job_id, worker)
    field.save(api.artifacts.fit(job_id, 1) / FIELD)
    yield api, f"/v1/jobs/{job_id}"
    app.store.retire(worker)
    app.store.forget_workers([worker])
    api.close()


@pytest.fixture
def client_job(app: App, job: tuple[Api, str]) -> Iterator[Job]:
    """The same for the client."""
    api, url = job
    with Client(app.url, api_key=api.secret, retry_s=0) as client:
        yield client.job(url.rpartition("/")[2])


def points(n: int, reach: float = 0.95, seed: int = 0) -> np.ndarray:
    return CENTER + np.random.default_rng(seed).uniform(-reach, reach, (n, 3)) / SCALE


def packed(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def unpacked(body: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_the_links_are_there(job: tuple[Api, str]) -> None:
    api, url = job
    links = api.get(url).json()["links"]
    assert links["sdf_npz"] == f"{url}/sdf.npz"
    for name in ("slice", "grid", "onnx"):
        assert links[name] == f"{url}/{name}"


def test_the_options_tell_the_limits(job: tuple[Api, str]) -> None:
    limits = job[0].get("/v1/options").json()["limits"]
    assert (limits["query_points"], limits["npz_query_points"], limits["grid_resolution"]) == (100_000, 1_000_000, 256)


def test_everything_can_be_asked_in_json(job: tuple[Api, str], field: SignedDistanceField) -> None:
    api, url = job
    where = points(40)
    body = {"points": where.tolist(), "what": list(MEANS)}
    answer = api.post(f"{url}/sdf", json=body).raise_for_status().json()
    size = 1 / SCALE
    np.testing.assert_allclose(answer["distances"], field.evaluate(where), atol=1e-5 * size)
    np.testing.assert_allclose(answer["gradients"], field.gradient(where), atol=1e-3)
    found = field.closest(where)
    np.testing.assert_allclose(answer["true_distances"], found.distances, atol=1e-3 * size)
    np.testing.assert_allclose(field.evaluate(np.array(answer["closest_points"])), 0, atol=1e-4 * size)
    assert answer["inside"] == field.inside(where).tolist()
    bent = field.curvature(where)
    np.testing.assert_allclose(answer["mean_curvatures"], bent.mean, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(answer["gaussian_curvatures"], bent.gaussian, rtol=1e-2, atol=1e-5)
    assert answer["hits"] is None
    error = field.distance_error
    assert answer["distance_error"]["mean"] == pytest.approx(error.mean, rel=0.01)
    assert answer["distance_error"]["p95"] == pytest.approx(error.p95, rel=0.02)
    assert answer["distance_error"]["band"] == pytest.approx(1.0)


def test_what_was_asked_before_is_answered_as_before(job: tuple[Api, str], field: SignedDistanceField) -> None:
    api, url = job
    where = points(3)
    bare = api.post(f"{url}/sdf", json={"points": where.tolist()}).json()
    np.testing.assert_allclose(bare["distances"], field.evaluate(where), atol=1e-3)
    assert bare["gradients"] is None
    both = api.post(f"{url}/sdf", json={"points": where.tolist(), "gradient": True}).json()
    assert both["distances"] == bare["distances"]
    assert len(both["gradients"]) == 3


def test_rays_hit_or_miss(job: tuple[Api, str]) -> None:
    api, url = job
    start = CENTER + np.array([[-60.0, 0, 0], [-60, 0, 0], [-60, 0, 45]])
    ways = [[2.0, 0, 0], [-1, 0, 0], [1, 0, 0]]
    body = {"origins": start.tolist(), "directions": ways}
    answer = api.post(f"{url}/sdf", json=body).raise_for_status().json()
    assert answer["hits"] == [True, False, False]
    assert answer["ray_distances"] == [pytest.approx(30, abs=1), None, None]
    np.testing.assert_allclose(answer["hit_points"][0], CENTER - [30, 0, 0], atol=1)
    np.testing.assert_allclose(answer["hit_normals"][0], [-1, 0, 0], atol=0.1)
    assert answer["hit_points"][1:] == answer["hit_normals"][1:] == [None, None]
    assert answer["distances"] is None
    near = api.post(f"{url}/sdf", json=body | {"max_distance": 20.0}).json()
    assert near["hits"] == [False, False, False]


def test_npz_answers_what_json_answers_and_more_points(job: tuple[Api, str]) -> None:
    api, url = job
    where = points(50)
    params = {"what": ["distance", "gradient", "closest", "curvature"]}
    packed_answer = api.post(f"{url}/sdf.npz", params=params, content=packed(points=where), headers=NPZ)
    assert packed_answer.status_code == 200, packed_answer.text
    assert packed_answer.headers["content-type"] == "application/x-npz"
    assert unquote(packed_answer.headers["content-disposition"]).endswith("''cloud-answers.npz")
    found = unpacked(packed_answer.content)
    answer = api.post(f"{url}/sdf", json={"points": where.tolist(), **params}).json()
    for name, array in found.items():
        if array.ndim:
            np.testing.assert_array_equal(array, np.array(answer[name], array.dtype))
    assert found["distance_error_p95"] == answer["distance_error"]["p95"]
    assert found["closest_points"].dtype == np.float64
    many = points(300_000).astype(np.float32)
    body = packed(points=many, origins=many[:10], directions=many[:10] - CENTER)
    found = unpacked(api.post(f"{url}/sdf.npz", content=body, headers=NPZ).content)
    assert len(found["distances"]) == 300_000
    assert len(found["hits"]) == 10


def test_npz_that_cannot_be_used_is_refused_before_it_takes_memory(job: tuple[Api, str]) -> None:
    api, url = job

    def send(body: bytes, **params: Any) -> Any:
        return api.post(f"{url}/sdf.npz", content=body, params=params, headers=NPZ)

    good = packed(points=points(3))
    is_problem(send(b"no archive"), 400, "malformed", "numpy.savez")
    is_problem(send(good[:-30]), 400, "malformed")
    is_problem(send(good.replace(b"NUMPY", b"NUMPI")), 400, "malformed", "header")
    is_problem(send(packed(points=np.zeros((3, 2)))), 400, "malformed", "(3, 2)", "(n, 3)")
    is_problem(send(packed(points=np.array([["a"] * 3]))), 400, "malformed", "U1")
    is_problem(send(packed(points=np.zeros((2, 3)), more=np.zeros(1))), 400, "malformed", "'more'")
    is_problem(send(packed(points=np.full((2, 3), np.nan))), 422, "invalid", "2 of 2 are not finite")
    is_problem(send(packed(points=np.full((2, 3), 1e300))), 422, "invalid", "too far")
    is_problem(send(packed(origins=np.zeros((2, 3)))), 422, "invalid", "give both")
    is_problem(send(packed(origins=np.zeros((2, 3)), directions=np.zeros((3, 3)))), 422, "invalid", "3 directions")
    is_problem(send(packed(origins=np.zeros((2, 3)), directions=np.zeros((2, 3)))), 422, "invalid", "zero length")
    is_problem(send(b"PK\5\6" + b"\0" * 18), 422, "invalid", "nothing to answer")
    is_problem(send(good, what="everything"), 422, "invalid", "'everything'")
    is_problem(send(good, max_distance="-1"), 422, "invalid", "max_distance")
    objects = io.BytesIO()
    np.savez(objects, points=np.array([[{}] * 3]), allow_pickle=True)
    is_problem(send(objects.getvalue()), 400, "malformed", "Python objects")
    # A gigabyte of nothing in a megabyte.
    bomb = io.BytesIO()
    np.savez_compressed(bomb, points=np.zeros((10_000_000, 3), np.float32))
    assert len(bomb.getvalue()) < 200_000
    is_problem(send(bomb.getvalue()), 400, "malformed", "10,000,000 rows")
    crowd = io.BytesIO()
    with zipfile.ZipFile(crowd, "w") as archive:
        for i in range(2000):
            archive.writestr(f"points{i}.npy", b"")
    is_problem(send(crowd.getvalue()), 400, "malformed", "directory")
    with api.app.changed(max_npz_query_points=2):
        is_problem(send(good), 400, "malformed", "3 rows; send 2")
        is_problem(send(packed(points=np.zeros((10_000, 3)))), 413, "too-large")

        def endless() -> Iterator[bytes]:
            yield from (bytes(1 << 16) for _ in range(100))

        is_problem(send(endless()), 413, "too-large")  # type: ignore[arg-type]


def test_the_service_answers_others_while_it_computes(
    job: tuple[Api, str], app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both places for what takes long are taken, and a third waits for one; who asks for less does not notice."""
    api, url = job
    began, go_on = threading.Semaphore(0), threading.Event()
    real = field_routes._answers

    def slow(field: Any, where: Any, what: list[str], *more: Any) -> Any:
        if "closest" in what:
            began.release()
            assert go_on.wait(60)
        return real(field, where, what, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(field_routes, "_answers", slow)
    where, results = points(2), []

    def ask(packed_too: bool) -> None:
        if packed_too:
            answer = api.post(f"{url}/sdf.npz", params={"what": "closest"}, content=packed(points=where), headers=NPZ)
        else:
            answer = api.post(f"{url}/sdf", json={"what": ["closest"], "points": where.tolist()})
        results.append(answer.status_code)

    threads = [threading.Thread(target=ask, args=[i % 2 == 0]) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert began.acquire(timeout=60)
        assert began.acquire(timeout=60)
        start = time.monotonic()
        assert api.get(url).status_code == 200
        assert api.get(f"{url}/slice", params={"resolution": 16}).status_code == 200
        assert api.post(f"{url}/sdf", json={"points": where.tolist()}).status_code == 200
        assert time.monotonic() - start < 20
        assert not began.acquire(timeout=0.5)
    finally:
        go_on.set()
        for thread in threads:
            thread.join()
    assert results == [200, 200, 200]


def test_a_slice_is_a_drawing(job: tuple[Api, str]) -> None:
    api, url = job
    answer = api.get(f"{url}/slice")
    assert answer.headers["content-type"] == "image/svg+xml"
    assert unquote(answer.headers["content-disposition"]).endswith("''cloud-slice.svg")
    assert answer.text.count(" Z") == 1
    assert "through 0, 0, 312.125" in answer.text
    dxf = api.get(f"{url}/slice", params={"format": "dxf", "axis": "x", "at": CENTER[0] + 10, "resolution": 64})
    assert dxf.text.count("POLYLINE") == 1
    shared = api.get(f"{url}/slice", params={"format": "dxf", "axis": "x", "share": 0.6, "resolution": 64})
    assert shared.text == dxf.text
    aside = api.get(f"{url}/slice", params={"normal": "1,1,0"})
    assert aside.text.count(" Z") == 1
    empty = api.get(f"{url}/slice", params={"normal": "0,0,1", "origin": "0,0,0"})
    assert empty.status_code == 200
    assert "<path" not in empty.text


def test_what_is_no_slice_or_grid_is_refused(job: tuple[Api, str]) -> None:
    api, url = job

    def refused(what: str, *said: str, **params: Any) -> None:
        is_problem(api.get(f"{url}/{what}", params=params), 422, "invalid", *said)

    refused("slice", "axis", "'w'", axis="w")
    refused("slice", "share", share=1.5)
    refused("slice", "at", at="nan")
    refused("slice", "normal", normal="1,2")
    refused("slice", "'1,2,e'", normal="1,2,e")
    refused("slice", "points somewhere", normal="0,0,0")
    refused("slice", "origin has no effect", origin="0,0,0")
    refused("slice", "resolution", resolution=100_000)
    refused("slice", "format", format="png")
    refused("grid", "256", resolution=257)
    refused("grid", "resolution is 101; for true distances take 100", resolution=101, true_distances=True)


def test_a_grid_comes_as_it_is_computed(job: tuple[Api, str], field: SignedDistanceField) -> None:
    api, url = job
    with api.stream("GET", f"{url}/grid", params={"resolution": 50}) as answer:
        assert answer.status_code == 200
        assert "content-length" not in answer.headers
        body = answer.read()
    found = unpacked(body)
    assert found["values"].shape == (50, 50, 50)
    where = found["origin"] + found["spacing"] * np.array([[10, 20, 30]])
    assert found["values"][10, 20, 30] == pytest.approx(field.evaluate(where)[0], abs=1e-3)
    true = unpacked(api.get(f"{url}/grid", params={"resolution": 8, "true_distances": True}).content)["values"]
    corner = field.distance(CENTER[None] - 1 / SCALE)
    assert true[0, 0, 0] == pytest.approx(corner[0], rel=1e-3)


def test_another_program_runs_the_network(job: tuple[Api, str], field: SignedDistanceField) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    api, url = job
    answer = api.get(f"{url}/onnx")
    assert unquote(answer.headers["content-disposition"]).endswith("''cloud.onnx")
    session = onnxruntime.InferenceSession(answer.content, providers=["CPUExecutionProvider"])
    where = points(500)
    np.testing.assert_allclose(session.run(["sdf"], {"points": where})[0], field.evaluate(where), atol=1e-3)


def test_a_package_that_is_not_there_is_named(job: tuple[Api, str], monkeypatch: pytest.MonkeyPatch) -> None:
    api, url = job
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    is_problem(api.get(f"{url}/onnx"), 501, "missing", "pip install 'sdfserver[onnx]'")


def test_jobs_of_others_and_unfinished_ones_have_no_field(api: Api, job: tuple[Api, str]) -> None:
    _, url = job
    unfinished = f"/v1/jobs/{api.submit()['id']}"
    for name in ("slice", "grid", "onnx"):
        is_problem(api.get(f"{url}/{name}"), 404, "not-found")
        is_problem(api.get(f"{unfinished}/{name}"), 409, "state")
    for where, status, kind in ((url, 404, "not-found"), (unfinished, 409, "state")):
        is_problem(api.post(f"{where}/sdf.npz", content=b"x", headers=NPZ), status, kind)


def test_a_field_that_is_damaged_or_gone_is_said_to_be(app: App, worker: str, field: SignedDistanceField) -> None:
    api = Api(app)
    job_id = api.submit()["id"]
    api.publish(job_id, worker)  # its field is a text
    is_problem(api.get(f"/v1/jobs/{job_id}/slice"), 500, "damaged", "run the job again")
    (api.artifacts.fit(job_id, 1) / FIELD).unlink()
    is_problem(api.get(f"/v1/jobs/{job_id}/slice"), 410, "gone")
    api.close()


def test_the_client_asks_any_number_of_points(
    client_job: Job, field: SignedDistanceField, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdfserver.client.QUICK_ROWS", 7)
    monkeypatch.setattr("sdfserver.client.SLOW_ROWS", 7)
    where = points(20)
    found = client_job.query(where)
    np.testing.assert_allclose(found["distances"], field.evaluate(where), atol=1e-3)
    assert found["gradients"].shape == (20, 3)
    assert 0 < found["distance_error_mean"] < found["distance_error_max"]
    closest = client_job.query(where, "closest")
    np.testing.assert_allclose(closest["true_distances"], field.distance(where), atol=0.1)
    rays = client_job.cast(where, CENTER - where, max_distance=100.0)
    assert rays["hits"].shape == (20,)
    assert np.isnan(rays["ray_distances"][~rays["hits"]]).all()
    assert client_job.query(np.empty((0, 3)))["gradients"].shape == (0, 3)
    np.testing.assert_allclose(client_job.sdf(where), found["distances"], atol=1e-3)
    with pytest.raises(ConfigError, match="cannot be asked for 'colour'"):
        client_job.query(where, "colour")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="20 origins and 1 directions"):
        client_job.cast(where, where[:1])
    with pytest.raises(ConfigError, match="20 directions are not finite"):
        client_job.cast(where, np.full((20, 3), np.inf))


def test_the_client_downloads_what_is_made(client_job: Job, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    svg = client_job.download_slice(tmp_path / "a.svg", axis="y")
    dxf = client_job.download_slice(tmp_path / "a.dxf", normal=[0, 1, 1], origin=CENTER)
    assert " Z" in svg.read_text()
    assert "POLYLINE" in dxf.read_text()
    with np.load(client_job.download_grid(tmp_path / "a.npz", resolution=5)) as grid:
        assert grid["values"].shape == (5, 5, 5)
    assert client_job.download_onnx(tmp_path / "a.onnx").stat().st_size > 10_000
    with pytest.raises(OutputError, match=r"use \.svg, \.dxf"):
        client_job.download_slice(tmp_path / "a.png")
    with pytest.raises(ApiError, match="256 at most"):
        client_job.download_grid(tmp_path / "b.npz", resolution=1000)
    assert not (tmp_path / "b.npz").exists()
