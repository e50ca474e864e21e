"""What `sdfserver status` and /metrics say of queue, workers and failures; and the lines that join API and worker."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from server.helpers import Api, App

from sdfserver.schemas import JobState
from sdfserver.server import logs
from sdfserver.server.problems import problem
from sdfserver.server.status import look, text


def figure(app: App, line: str) -> float:
    """One of the figures for Prometheus."""
    found = re.search(rf"^{re.escape(line)} (\S+)$", httpx.get(f"{app.url}/metrics").text, re.MULTILINE)
    return 0.0 if found is None else float(found[1])


def fail(api: Api, job_id: str, worker: str) -> None:
    why = problem("memory", "the job needed more memory than there is").model_dump(exclude_none=True)
    assert api.store.fail(api.begin(job_id, worker), why, 3600.0)


def test_status_shows_the_queue_the_workers_and_what_failed(app: App, api: Api, worker: str) -> None:
    waits, runs, fails = (api.submit(name=f"{name}.xyz")["id"] for name in ("waits", "runs", "fails"))
    fail(api, fails, worker)
    attempt = api.begin(runs, worker)
    api.store.update(attempt, stage="fit", progress=0.25)
    api.store.beat(worker, {"memory_used_bytes": 2**31, "memory_bytes": 2**33, "busy": 0.5})
    found = look(api.store, app.service.settings.lease_seconds)
    assert found["jobs"]["queued"] >= 1
    assert found["queue_age_seconds"] > 0
    (ours,) = [one for one in found["workers"] if one["id"] == worker]
    assert [job["id"] for job in ours["jobs"]] == [runs]
    assert found["failures"][0]["id"] == fails
    shown = text(found)
    assert re.search(rf"^(workers)? +{worker}  cpu  50% busy, 2.0 of 8.0 GiB in use$", shown, re.MULTILINE)
    assert f"{runs}  fit 25%  runs.xyz" in shown
    assert re.search(rf"^failures  \d+ s ago  {fails}  memory: the job needed more memory", shown, re.MULTILINE)
    assert waits not in shown


def test_metrics_count_what_was_submitted_what_ended_and_how_long_it_took(app: App, api: Api, worker: str) -> None:
    names = [
        'sdfserver_jobs_submitted_total{kind="reconstruction",preset="draft"}',
        'sdfserver_jobs_ended_total{reason="memory",state="failed"}',
        'sdfserver_jobs_ended_total{reason="",state="succeeded"}',
        'sdfserver_job_stage_seconds_count{stage="mesh"}',
        'sdfserver_job_stage_seconds_bucket{le="5",stage="mesh"}',
        'sdfserver_job_stage_seconds_bucket{le="2",stage="mesh"}',
        'sdfserver_job_stage_seconds_sum{stage="mesh"}',
    ]
    before = [figure(app, name) for name in names]
    sent = figure(app, "sdfserver_upload_bytes_total")
    first, second = (api.submit('{"preset": "draft"}')["id"] for _ in range(2))
    fail(api, first, worker)
    api.publish(second, worker, seconds=3.0)
    assert [now - then for now, then in zip([figure(app, name) for name in names], before, strict=True)] == [
        2, 1, 1, 1, 1, 0, pytest.approx(3.0),
    ]  # fmt: skip
    assert figure(app, "sdfserver_upload_bytes_total") > sent
    # Counts stay when the jobs go.
    api.delete(f"/v1/jobs/{second}")
    assert figure(app, names[2]) == before[2] + 1


def test_metrics_show_the_queues_age_and_the_gpus(app: App, api: Api, worker: str) -> None:
    api.submit()
    assert figure(app, "sdfserver_queue_age_seconds") > 0
    api.store.beat(worker, {"memory_used_bytes": 5.0, "memory_bytes": 10.0, "busy": 0.25})
    of = f'{{device="cpu",worker="{worker}"}}'
    assert figure(app, f"sdfserver_gpu_busy{of}") == 0.25
    assert figure(app, f"sdfserver_gpu_memory_used_bytes{of}") == 5
    api.store.beat(worker)  # what is not told anew stays
    assert figure(app, f"sdfserver_gpu_memory_bytes{of}") == 10


def test_lost_jobs_are_counted(app: App, api: Api, worker: str) -> None:
    before = figure(app, "sdfserver_recoveries_total"), figure(app, "sdfserver_deaths_total")
    job = api.submit()["id"]
    api.begin(job, worker)
    api.store.lose(job, worker, 3, {}, 60.0)
    assert (figure(app, "sdfserver_recoveries_total"), figure(app, "sdfserver_deaths_total")) == (
        before[0] + 1,
        before[1] + 1,
    )


def test_a_request_has_an_id_that_its_job_keeps(api: Api) -> None:
    answer = api.send_cloud(x_request_id="from-the.client_1")
    assert answer.headers["x-request-id"] == "from-the.client_1"
    row = api.store.job(answer.json()["id"])
    assert row is not None
    assert row.request_id == "from-the.client_1"
    for bad in ("two words", "x" * 65, "line\\n", "ä"):
        given = api.get("/v1/jobs", headers={"X-Request-ID": bad.encode()}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{16}", given)


def test_json_lines_have_the_ids_of_what_they_are_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setenv(logs.FORMAT, "json")
    try:
        logs.set_up_logging()
        with logs.about(request="r1"), logs.about(job="j1", attempt=None):
            logging.getLogger("sdfserver").log(logs.STEP, "it %s", "goes on")
        try:
            raise ValueError("a mistake")
        except ValueError:
            logging.getLogger("sdfserver").exception("it failed")
    finally:
        root.handlers[:], root.level = handlers, level
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["request"], first["job"], first["level"], first["message"]) == ("r1", "j1", "step", "it goes on")
    assert "attempt" not in first
    assert second["message"].startswith("it failed: ValueError: a mistake")
    assert "job" not in second


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sdfserver", *arguments], capture_output=True, text=True, check=False)


def test_commands_migrate_and_show_a_database_and_make_none_up(tmp_path: Path) -> None:
    folder = str(tmp_path / "data")
    asked = run("status", "--data-dir", folder)
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "no service has run in" in asked.stderr
    assert not Path(folder).exists()
    assert re.fullmatch(r"sdfserver: the database is at version \d+\n", run("migrate", "--data-dir", folder).stderr)
    shown = run("status", "--data-dir", folder)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("jobs      0 waiting, 0 running; 0 succeeded, 0 failed, 0 cancelled\nworkers   none")
    found = json.loads(run("status", "--data-dir", folder, "--json").stdout)
    assert found["jobs"][JobState.QUEUED] == 0
