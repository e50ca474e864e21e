"""What is around the jobs: problems, probes, figures, documentation that needs no network, and what is not imported."""

import json
import logging
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import psutil
import pytest
from server.helpers import Api, App, Served, is_problem, until
from sqlalchemy.exc import OperationalError

from sdfserver.schemas import JobOptions, MeshJobOptions, SdfRequest
from sdfserver.server.problems import KINDS


def test_what_is_not_there_is_a_problem_too(api: Api) -> None:
    for url in ("/nothing", "/v1", "/v1/jobs/a/b/c", "/v2/jobs", "/health", "/static-offline-docs/../app.py"):
        is_problem(api.get(url), 404, "not-found")
    assert api.get("/nothing").json()["instance"] == "/nothing"


def test_a_method_that_is_not_allowed_is_a_problem_and_says_which_are(api: Api) -> None:
    job = f"/v1/jobs/{'0' * 32}"
    for method, url, allowed in (
        ("PUT", "/v1/jobs", {"GET", "POST"}),
        ("PATCH", job, {"GET", "DELETE"}),
        ("GET", f"{job}/cancel", {"POST"}),
        ("POST", "/health/live", {"GET"}),
    ):
        answer = api.request(method, url)
        is_problem(answer, 405, "method", method)
        assert set(re.split(r",\s*", answer.headers["allow"])) >= allowed


def test_every_kind_of_problem_has_a_name_and_a_status_of_its_kind() -> None:
    for kind, (status, title) in KINDS.items():
        assert re.fullmatch("[a-z-]+", kind)
        assert 400 <= status < 600
        assert title[0].isupper()


def test_a_mistake_of_the_servers_tells_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{api.secret} in /tmp/secret.py")

    monkeypatch.setattr(type(api.store), "list_jobs", fails)
    answer = api.get("/v1/jobs")
    is_problem(answer, 500, "internal")
    assert "secret" not in answer.text
    assert api.secret not in answer.text
    monkeypatch.undo()
    assert api.get("/v1/jobs").status_code == 200


def test_a_database_that_does_not_answer_is_503(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OperationalError("SELECT secret", {"key": api.secret}, Exception("it went away"))

    monkeypatch.setattr(type(api.store), "list_jobs", fails)
    monkeypatch.setattr(type(api.store), "check", fails)
    with caplog.at_level(logging.DEBUG):
        for url in ("/v1/jobs", "/health/ready"):
            answer = api.get(url)
            is_problem(answer, 503, "not-ready", "database")
            assert int(answer.headers["retry-after"]) > 0
    assert "it went away" in caplog.text
    assert api.secret not in caplog.text
    assert "Traceback" not in caplog.text


def test_the_log_of_ordinary_use_has_no_paths_keys_or_traces(
    api: Api, other: Api, worker: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        job = api.submit(name="../../etc/passwd.xyz")
        api.publish(job["id"], worker)
        other.get(job["links"]["self"])
        api.send_cloud(name="a.doc")
        api.get("/nothing", headers={"Authorization": f"Bearer {api.secret}x"})
        api.get(f"/v1/jobs/{job['id']}/mesh?format=obj")  # its mesh is no mesh: the conversion fails
        api.delete(job["links"]["self"])
    for secret in (api.secret, other.secret, str(api.artifacts.jobs), "Traceback", "passwd"):
        assert secret not in caplog.text


# Probes and figures


def test_probes_answer(app: App, api: Api, worker: str) -> None:
    assert httpx.get(f"{app.url}/health/live").text == "live\n"
    assert httpx.get(f"{app.url}/health/ready").text == "ready\n"
    app.store.retire(worker)
    is_problem(httpx.get(f"{app.url}/health/ready"), 503, "not-ready", "worker")
    assert httpx.get(f"{app.url}/health/live").status_code == 200


def test_metrics_count_requests_by_route_and_jobs_by_state(app: App, api: Api, worker: str) -> None:
    def figure(line: str) -> float:
        found = re.search(rf"^{re.escape(line)} (\S+)$", httpx.get(f"{app.url}/metrics").text, re.MULTILINE)
        return 0.0 if found is None else float(found[1])

    asked = 'sdfserver_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="200"}'
    queued, workers = 'sdfserver_jobs{state="queued"}', "sdfserver_workers"
    before = [figure(name) for name in (asked, queued)]
    job = api.submit()
    for _ in range(3):
        api.get(job["links"]["self"])
    assert [figure(name) for name in (asked, queued)] == [before[0] + 3, before[1] + 1]
    assert figure(workers) >= 1
    text = httpx.get(f"{app.url}/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    assert job["id"] not in text.text


def test_a_worker_makes_a_server_ready(served: Served) -> None:
    assert served.api.get("/health/ready").status_code == 200
    assert 'sdfserver_jobs{state="succeeded"}' in served.api.get("/metrics").text


def test_options_say_what_may_be_asked_for(api: Api, worker: str) -> None:
    options = api.get("/v1/options").json()
    assert set(options["presets"]) == {"draft", "standard", "fine", "paper"}
    assert options["devices"] == ["cpu"]
    assert options["limits"]["resolution"] == 1024
    assert {"ply", "xyz", "npz"} <= set(options["cloud_formats"])
    assert options["mesh_formats"] == ["ply", "glb", "obj", "stl", "off"]
    assert options["job_options"] == JobOptions.model_json_schema()
    assert options["mesh_options"] == MeshJobOptions.model_json_schema()
    with api.app.changed(max_steps=500, max_upload_bytes=123):
        fewer = api.get("/v1/options").json()
    assert "paper" not in fewer["presets"]
    assert fewer["limits"]["upload_bytes"] == 123


# Documentation


class _Assets(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_documentation_loads_everything_from_this_server(app: App) -> None:
    page = httpx.get(f"{app.url}/docs")
    assert page.status_code == 200
    assets = _Assets()
    assets.feed(page.text)
    assert len(assets.found) >= 3
    quoted = re.findall(r"url: *'([^']+)'", page.text)
    assert quoted == ["/openapi.json"]
    for url in assets.found + quoted:
        whole = urljoin(f"{app.url}/docs", url)
        assert urlsplit(whole).netloc == urlsplit(app.url).netloc
        answer = httpx.get(whole)
        assert answer.status_code == 200
        assert len(answer.content) > 500
        if whole.endswith(".css"):
            assert not re.search(rb"@import|url\(['\"]?https?:", answer.content)
    assert "cdn" not in page.text.lower()
    assert not re.search(r"//(?!localhost)[a-z.]+\.(com|net|org|io)", page.text)


def test_every_call_is_documented_with_what_it_answers(app: App) -> None:
    paths = httpx.get(f"{app.url}/openapi.json").json()["paths"]
    calls = {(method.upper(), path) for path, item in paths.items() for method in item}
    one = "/v1/jobs/{job_id}"
    assert calls >= {
        ("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", one), ("GET", f"{one}/events"), ("POST", f"{one}/cancel"),
        ("DELETE", one), ("GET", f"{one}/mesh"), ("GET", f"{one}/report"), ("GET", f"{one}/field"),
        ("POST", f"{one}/meshes"), ("POST", f"{one}/sdf"), ("GET", "/v1/options"), ("GET", "/health/live"),
        ("GET", "/health/ready"), ("GET", "/metrics"),
    }  # fmt: skip
    for path, item in paths.items():
        for call in item.values():
            assert call.get("description"), path
            for status, answer in call["responses"].items():
                if status.isdecimal() and int(status) >= 400:
                    assert "application/problem+json" in answer["content"], (path, status)


def test_the_examples_of_the_documentation_work_when_pasted(app: App, api: Api, worker: str) -> None:
    whole = httpx.get(f"{app.url}/openapi.json").json()
    schemas = whole["components"]["schemas"]
    body = whole["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
    (options,) = body["multipart/form-data"]["schema"]["properties"]["options"]["examples"]
    cloud = body["application/octet-stream"]["example"]
    assert api.send_cloud(cloud.encode(), "cloud.xyz", options=options).status_code == 202
    assert api.post("/v1/jobs?format=xyz", content=cloud.encode()).status_code == 202
    for name, model in (("MeshJobOptions", MeshJobOptions), ("SdfRequest", SdfRequest)):
        for example in schemas[name]["examples"]:
            model.model_validate(example)
    job_id = api.submit()["id"]
    api.publish(job_id, worker)
    for example in schemas["MeshJobOptions"]["examples"]:
        assert api.post(f"/v1/jobs/{job_id}/meshes", json=example).status_code == 202


def test_the_example_cloud_is_one(served: Served) -> None:
    whole = served.api.get("/openapi.json").json()
    cloud = whole["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/octet-stream"]["example"]
    answer = served.api.post("/v1/jobs?format=xyz&preset=draft&resolution=16", content=cloud)
    assert answer.status_code == 202
    url = answer.headers["location"]
    job = until(lambda: (job := served.api.get(url).json())["state"] not in ("queued", "running") and job)
    assert job["state"] == "succeeded", job["problem"]


# What is not imported


def test_the_interface_and_the_client_import_no_torch() -> None:
    code = (
        "import sys, json, sdfserver.server.app, sdfserver.server.routes, sdfserver.client; "
        "print(json.dumps(sorted({'torch', 'skimage', 'trimesh', 'open3d'} & set(sys.modules))))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(shown.stdout) == []


def test_in_a_running_service_torch_is_in_what_computes_alone(served: Served) -> None:
    supervisor = psutil.Process(served.server.running.pid)
    if not hasattr(supervisor, "memory_maps"):
        pytest.skip("no maps of memory here")
    lines = {process: process.cmdline() for process in (supervisor, *supervisor.children(recursive=True))}
    for role in ("serve", "api", "worker"):
        (process,) = [process for process, line in lines.items() if line[1:4] == ["-m", "sdfserver", role]]
        assert not has_torch(process)
    # The last of them: the process of its jobs is the worker's child.
    (job,) = [child for child in process.children() if any("spawn_main" in word for word in lines[child])]
    assert has_torch(job)


def has_torch(process: psutil.Process) -> bool:
    return any("libtorch" in part.path for part in process.memory_maps())
