"""Jobs as the interface shows them: submitted once, listed, waited for, cancelled, removed; each to its owner alone."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from server.helpers import XYZ, Api, is_problem, until

from sdfserver.server.artifacts import FIT_FILES
from sdfserver.server.queue import JobQueue
from sdfserver.server.storage import sweep

NOBODY = "0" * 32
CALLS = (
    ("GET", ""),
    ("GET", "/events"),
    ("POST", "/cancel"),
    ("GET", "/mesh"),
    ("GET", "/report"),
    ("GET", "/field"),
    ("POST", "/meshes"),
    ("POST", "/sdf"),
    ("DELETE", ""),
)


def call(client: httpx.Client, method: str, job_id: str, rest: str) -> httpx.Response:
    """One of CALLS, with a body where it takes one."""
    body: dict[str, Any] = {"/meshes": {"json": {}}, "/sdf": {"json": {"points": [[0, 0, 0]]}}}.get(rest, {})
    return client.request(method, f"/v1/jobs/{job_id}{rest}", **body)


def jobs_of(page: httpx.Response) -> list[str]:
    return [job["id"] for job in page.raise_for_status().json()["jobs"]]


# Idempotency


def test_the_same_key_and_body_give_the_same_job(api: Api) -> None:
    first = api.send_cloud(options='{"seed": 1}', Idempotency_Key="once")
    again = api.send_cloud(options='{"seed": 1, "preset": "standard"}', Idempotency_Key="once")
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert (first.headers.get("idempotent-replayed"), again.headers["idempotent-replayed"]) == (None, "true")
    assert len(jobs_of(api.get("/v1/jobs"))) == 1
    raw = api.post("/v1/jobs?format=xyz&seed=1", content=XYZ, headers={"Idempotency-Key": "once"})
    assert raw.json()["id"] == first.json()["id"]


def test_the_same_key_with_another_body_is_refused_and_leaves_nothing(api: Api) -> None:
    first = api.submit(Idempotency_Key="once")
    before = api.folders()
    is_problem(api.send_cloud(XYZ + b"0 1 1 0 0 1\n", Idempotency_Key="once"), 409, "idempotency", "'once'")
    is_problem(api.send_cloud(options='{"seed": 2}', Idempotency_Key="once"), 409, "idempotency")
    assert api.folders() == before
    assert jobs_of(api.get("/v1/jobs")) == [first["id"]]


def test_a_key_is_its_owners_alone(api: Api, other: Api) -> None:
    assert api.submit(Idempotency_Key="once")["id"] != other.submit(Idempotency_Key="once")["id"]


def test_the_same_request_many_times_at_once_makes_one_job(api: Api) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: api.submit(Idempotency_Key="at-once")["id"], range(16)))
    assert len(set(jobs)) == 1
    assert jobs_of(api.get("/v1/jobs")) == jobs[:1]
    folders = [name for name in api.folders() if api.store.job(name) is None]
    assert folders == []


def test_a_key_whose_job_is_removed_says_so(api: Api) -> None:
    job = api.submit(Idempotency_Key="once")
    api.delete(job["links"]["self"])
    is_problem(api.send_cloud(Idempotency_Key="once"), 410, "gone", "new key")


def test_a_key_must_be_printable_and_short(api: Api) -> None:
    for key in ("", "a b", "x" * 256, "a\u00e9"):
        answer = api.post("/v1/jobs?format=xyz", content=XYZ, headers={"Idempotency-Key": key.encode("latin-1")})
        is_problem(answer, 422, "invalid", "dempotency")


# Lists


def test_pages_have_no_gaps_and_no_doubles_while_jobs_are_added(api: Api) -> None:
    there = [api.submit()["id"] for _ in range(9)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        answer = api.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {}))
        seen += jobs_of(answer)
        cursor = answer.json()["next"]
        if cursor is None:
            break
        api.submit()
    assert seen == there[::-1]


def test_a_page_that_just_fits_is_the_last(api: Api) -> None:
    for _ in range(2):
        api.submit()
    page = api.get("/v1/jobs?limit=2").json()
    assert (len(page["jobs"]), page["next"]) == (2, None)


def test_lists_are_filtered_by_state(api: Api, worker: str) -> None:
    queued, running, done, cancelled, failed = (api.submit()["id"] for _ in range(5))
    api.begin(running, worker)
    api.publish(done, worker)
    api.post(f"/v1/jobs/{cancelled}/cancel")
    assert api.store.fail(api.begin(failed, worker), {"title": "T", "status": 422, "detail": "d"}, 60)
    for state, job_id in {"queued": queued, "running": running, "succeeded": done, "cancelled": cancelled,
                          "failed": failed}.items():  # fmt: skip
        assert jobs_of(api.get(f"/v1/jobs?state={state}")) == [job_id]
    assert len(jobs_of(api.get("/v1/jobs"))) == 5


def test_a_page_must_be_asked_for_properly(api: Api) -> None:
    bad = ("limit=0", "limit=201", "limit=x", "state=asleep", "cursor=nonsense", "cursor=%C3%A9", f"cursor={'M' * 39}")
    for query in bad:
        name, value = query.split("=")
        said = () if "%" in value or len(value) > 20 else (name, value)
        is_problem(api.get(f"/v1/jobs?{query}"), 422, "invalid", *said)


# Whose jobs


def test_anothers_job_is_as_if_it_were_not_there(api: Api, other: Api) -> None:
    job_id = api.submit()["id"]
    for method, rest in CALLS:
        foreign, none = call(other, method, job_id, rest), call(other, method, NOBODY, rest)
        is_problem(foreign, 404, "not-found", job_id)
        assert foreign.text.replace(job_id, NOBODY) == none.text
    assert api.job(job_id)["state"] == "queued"
    assert other.get("/v1/jobs").json()["jobs"] == []


def test_an_id_of_any_shape_is_not_found(api: Api) -> None:
    for job_id in ("%00", "a%00b", "%FF", "-1", "..%2F..%2Fetc", "x" * 5000, "%F0%9F%A6%86", "'%20OR%201=1--"):
        for method, rest in CALLS:
            is_problem(call(api, method, job_id, rest), 404, "not-found")


# Turns


def test_a_place_in_the_queue_is_told_at_once(api: Api) -> None:
    places = [api.submit()["queue_position"] for _ in range(4)]
    assert places == [1, 2, 3, 4]


def test_places_follow_priority_then_arrival(api: Api, worker: str) -> None:
    jobs = [api.submit(f'{{"priority": {priority}}}')["id"] for priority in (0, 0, 5, -3, 5)]
    running = api.submit('{"priority": -10}')["id"]
    api.begin(running, worker)
    until(lambda: api.job(running)["queue_position"] is None)
    until(lambda: [api.job(job_id)["queue_position"] for job_id in jobs] == [3, 4, 1, 5, 2])


def test_the_time_to_the_end_is_null_until_it_has_been_measured(api: Api, worker: str) -> None:
    wanted = '{"preset": "draft", "resolution": %d}'
    first = api.submit(wanted % 77)
    assert first["eta_s"] is None
    api.publish(first["id"], worker, seconds=4.0)
    second, third, unknown, behind = (api.submit(wanted % resolution)["id"] for resolution in (77, 77, 78, 77))
    until(lambda: [api.job(job_id)["eta_s"] for job_id in (second, third, unknown, behind)] == [8, 16, None, None])


def test_the_time_to_the_end_counts_what_runs_and_who_works(api: Api, worker: str) -> None:
    wanted = '{"preset": "draft", "resolution": 79}'
    api.publish(api.submit(wanted)["id"], worker, seconds=1.0)
    attempt = api.begin(api.submit(wanted)["id"], worker)
    waiting = api.submit(wanted)["id"]
    until(lambda: api.job(waiting)["eta_s"] is None)  # what runs has not said how long it takes
    assert api.store.update(attempt, eta_s=5.0)
    until(lambda: api.job(waiting)["eta_s"] == 7)
    assert api.job(attempt.job_id)["eta_s"] == 5


def test_without_a_worker_nobody_knows_when(api: Api, worker: str) -> None:
    wanted = '{"preset": "draft", "resolution": 80}'
    api.publish(api.submit(wanted)["id"], worker)
    waiting = api.submit(wanted)["id"]
    until(lambda: api.job(waiting)["eta_s"] == 2)
    api.store.retire(worker)
    until(lambda: api.job(waiting)["eta_s"] is None)
    assert api.job(waiting)["queue_position"] == 1


# Limits


def test_a_full_queue_says_when_to_come_again(api: Api, other: Api) -> None:
    other.submit()
    before = api.folders()
    with api.app.changed(max_queue=1):
        answer = api.send_cloud()
        is_problem(answer, 429, "queue-full", "1 jobs are waiting")
    assert int(answer.headers["retry-after"]) > 0
    assert api.folders() == before


def test_a_quota_is_each_keys_own(api: Api) -> None:
    small = Api(api.app, max_jobs=2)
    first = small.submit()
    small.submit()
    answer = small.send_cloud()
    is_problem(answer, 429, "quota", "2 of your jobs")
    assert int(answer.headers["retry-after"]) > 0
    api.submit()
    small.post(first["links"]["cancel"])
    small.close()
    with api.app.changed(max_jobs_per_key=1):
        is_problem(api.send_cloud(), 429, "quota", "1 of your jobs")


# Ends


def test_a_queued_job_is_cancelled_once_and_for_all(api: Api) -> None:
    job = api.submit()
    for _ in range(2):
        ended = api.post(job["links"]["cancel"])
        assert (ended.status_code, ended.json()["state"]) == (200, "cancelled")
    assert ended.json()["finished_at"] is not None
    assert ended.json()["expires_at"] is not None
    assert ended.json()["queue_position"] is None
    assert api.store.begin_attempt(job["id"], "w", 3, {}, 60.0) is None


def test_a_running_job_is_taken_from_its_worker(api: Api, worker: str) -> None:
    attempt = api.begin(api.submit()["id"], worker)
    assert api.post(f"/v1/jobs/{attempt.job_id}/cancel").json()["state"] == "cancelled"
    assert not api.store.holds(attempt)
    assert not api.store.publish(attempt, {}, 60)
    assert api.job(attempt.job_id)["state"] == "cancelled"


def test_what_has_ended_cannot_be_cancelled(api: Api, worker: str) -> None:
    job_id = api.submit()["id"]
    api.publish(job_id, worker)
    is_problem(api.post(f"/v1/jobs/{job_id}/cancel"), 409, "state", "succeeded")
    assert api.job(job_id)["state"] == "succeeded"


def test_there_are_no_results_until_it_has_succeeded(api: Api, worker: str) -> None:
    queued, running, cancelled = (api.submit()["id"] for _ in range(3))
    api.begin(running, worker)
    api.post(f"/v1/jobs/{cancelled}/cancel")
    for state, job_id in {"queued": queued, "running": running, "cancelled": cancelled}.items():
        links = api.job(job_id)["links"]
        assert {links[name] for name in ("mesh", "report", "field", "meshes", "sdf")} == {None}
        for method, rest in CALLS[3:8]:
            is_problem(call(api, method, job_id, rest), 409, "state", state)


def test_a_removed_job_is_gone_with_its_files(api: Api, worker: str) -> None:
    queued, running, done = (api.submit()["id"] for _ in range(3))
    attempt = api.begin(running, worker)
    api.publish(done, worker)
    for job_id in (queued, running, done):
        answer = api.delete(f"/v1/jobs/{job_id}")
        assert (answer.status_code, answer.content) == (204, b"")
        assert not api.artifacts.jobs.joinpath(job_id).exists()
        for method, rest in CALLS:
            is_problem(call(api, method, job_id, rest), 410, "gone", job_id)
    assert not api.store.holds(attempt)
    assert jobs_of(api.get("/v1/jobs")) == []


def test_the_time_of_a_finished_job_comes(api: Api, worker: str) -> None:
    kept, over = (api.submit()["id"] for _ in range(2))
    api.publish(kept, worker, keep_s=3600.0)
    api.publish(over, worker, keep_s=-1.0)
    service = api.app.service

    def swept(gone_seconds: float) -> None:
        settings = service.settings.model_copy(update={"gone_seconds": gone_seconds})
        sweep(settings, service.store, service.queue, service.artifacts)

    swept(3600.0)
    is_problem(api.get(f"/v1/jobs/{over}/mesh"), 410, "gone")
    assert not api.artifacts.jobs.joinpath(over).exists()
    assert api.job(kept)["state"] == "succeeded"
    assert api.get(f"/v1/jobs/{kept}/mesh").content == b"mesh.ply"
    swept(0.0)
    is_problem(api.get(f"/v1/jobs/{over}"), 404, "not-found")
    assert api.job(kept)["state"] == "succeeded"
    assert jobs_of(api.get("/v1/jobs")) == [kept]


def test_jobs_that_died_go_in_their_time_too(api: Api, worker: str) -> None:
    job_id = api.submit()["id"]
    for _ in range(3):
        api.store.begin_attempt(job_id, worker, 3, {"title": "T", "status": 500, "detail": "d"}, 60.0)
    api.store.begin_attempt(job_id, worker, 3, {"title": "T", "status": 500, "detail": "d"}, 60.0)
    job = api.job(job_id)
    assert job["state"] == "failed"
    assert job["expires_at"] is not None


def test_another_mesh_is_a_child_with_files_of_its_own(api: Api, worker: str) -> None:
    parent = api.submit(name="duck.xyz")["id"]
    api.publish(parent, worker)
    answer = api.post(f"/v1/jobs/{parent}/meshes", json={"resolution": 48, "level": 0.1, "faces": 500})
    child = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, child["links"]["self"])
    assert (child["kind"], child["parent_id"], child["name"]) == ("mesh", parent, "duck.xyz")
    assert child["links"]["parent"] == f"/v1/jobs/{parent}"
    assert (child["options"]["resolution"], child["options"]["level"], child["options"]["faces"]) == (48, 0.1, 500)
    api.delete(f"/v1/jobs/{parent}")
    folder = api.artifacts.fit(child["id"], 0)
    assert {path.name for path in folder.iterdir()} == set(FIT_FILES)
    assert api.job(child["id"])["state"] == "queued"


def test_another_mesh_is_asked_for_once(api: Api, worker: str) -> None:
    parent = api.submit()["id"]
    api.publish(parent, worker)

    def ask(resolution: int) -> httpx.Response:
        headers = {"Idempotency-Key": "once-more"}
        return api.post(f"/v1/jobs/{parent}/meshes", json={"resolution": resolution}, headers=headers)

    first, again = ask(32), ask(32)
    assert first.json()["id"] == again.json()["id"]
    is_problem(ask(33), 409, "idempotency")
    folders = [name for name in api.folders() if api.store.job(name) is None]
    assert folders == []


def test_another_mesh_has_its_limits(api: Api, worker: str) -> None:
    parent = api.submit()["id"]
    api.publish(parent, worker)
    ask = f"/v1/jobs/{parent}/meshes"
    is_problem(api.post(ask, json={"resolution": 5}), 422, "invalid", "resolution", "5")
    is_problem(api.post(ask, json={"resolution": 2000}), 422, "invalid", "2000", "1024")
    is_problem(api.post(ask, json={"preset": "fine"}), 422, "invalid", "preset")
    is_problem(api.post(ask, json=[]), 422, "invalid")
    json = {"Content-Type": "application/json"}
    is_problem(api.post(ask, content=b'{"level": ', headers=json), 400, "malformed", "JSON")
    is_problem(api.post(ask, content=b" " * 20_000_000, headers=json), 413, "too-large")
    with api.app.changed(min_free_bytes=2**60):
        answer = api.post(ask, json={})
        is_problem(answer, 507, "disk-full")
        assert int(answer.headers["retry-after"]) > 0
    with api.app.changed(max_jobs_per_key=1):
        api.submit()
        is_problem(api.post(ask, json={}), 429, "quota")


def test_the_files_of_a_removed_parent_give_no_child(api: Api, worker: str) -> None:
    parent = api.submit()["id"]
    api.publish(parent, worker)
    api.artifacts.remove(parent)
    for method, rest in CALLS[3:8]:
        is_problem(call(api, method, parent, rest), 410, "gone")
    assert api.artifacts.jobs.joinpath(parent).exists() is False


def test_the_queue_and_the_row_are_made_together(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("the queue is out of order")

    before = api.folders()
    monkeypatch.setattr(JobQueue, "enqueue", fails)
    is_problem(api.send_cloud(), 500, "internal")
    assert api.get("/v1/jobs").json()["jobs"] == []
    assert api.folders() == before
