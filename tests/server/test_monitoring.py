"""Alert rules and dashboard: promtool's own checks, and that every figure they ask for is one that is told."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from server.helpers import Api, App

HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    """Where they are."""
    return root / "docker" / "monitoring"


@pytest.mark.parametrize(
    "command", ["check rules alerts.yml", "test rules alerts_test.yml", "check config prometheus.yml"]
)
def test_promtool_finds_nothing_wrong(folder: Path, command: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(["promtool", *command.split()], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_figure_that_is_asked_for_is_told(folder: Path, app: App, api: Api, worker: str) -> None:
    api.publish(api.submit()["id"], worker)
    api.store.beat(worker, {"memory_used_bytes": 1.0, "memory_bytes": 2.0, "busy": 0.5})
    told = set(re.findall(r"^(sdfserver_\w+)", httpx.get(f"{app.url}/metrics").text, re.MULTILINE))
    dashboard = json.loads((folder / "dashboard.json").read_text())
    panels = dashboard["panels"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    asked += (folder / "alerts.yml").read_text()
    wanted = set(re.findall(r"\bsdfserver_\w+", asked))
    assert len(wanted) > 12
    assert wanted <= told
    # And nothing is told that nobody looks at.
    assert {HISTOGRAM.sub("", name) for name in told if not name.endswith("_created")} <= {
        HISTOGRAM.sub("", name) for name in wanted
    }
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
