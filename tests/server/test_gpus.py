"""One worker for each GPU: which there are, and which worker gets which; the driver's tool is played by a script."""

import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sdfserver.server import supervisor
from sdfserver.server.gpus import gpu_figures, visible_gpus
from sdfserver.server.settings import Settings
from sdfserver.server.store import Store
from sdfserver.server.supervisor import Supervisor, gpus_of, with_workers


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with two GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '--query-gpu=uuid) printf "GPU-aa\\nGPU-bb\\n" ;;\n'
        '*) printf "GPU-aa, 0, 100, 81559, 7\\nGPU-bb, 1, 2048, 81559, [N/A]\\n" ;;\n'
        "esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tool


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == []


@pytest.mark.usefixtures("driver")
def test_all_are_seen_unless_the_environment_names_some(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus() == ["GPU-aa", "GPU-bb"]
    for said, seen in {"1": ["1"], "GPU-bb, 0": ["GPU-bb", "0"], "": [], "-1": [], "0,-1,1": ["0"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert visible_gpus() == seen


def test_a_driver_that_fails_is_none(driver: Path) -> None:
    driver.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert visible_gpus() == []


@pytest.mark.usefixtures("driver")
def test_figures_are_those_of_the_gpu_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    first = gpu_figures()
    assert first == pytest.approx({"memory_used_bytes": 100 * 2**20, "memory_bytes": 81559 * 2**20, "busy": 0.07})
    for name in ("1", "GPU-bb"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
        found = gpu_figures()
        assert found is not None
        assert (found["memory_used_bytes"], found["busy"]) == (2**31, 0.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert gpu_figures() is None


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("given", "workers"), [({}, 2), ({"workers": 5}, 5), ({"device": "cpu"}, 1), ({"device": "cuda:1"}, 1)]
)
def test_there_is_a_worker_for_each_gpu_unless_told(given: dict[str, Any], workers: int) -> None:
    assert with_workers(Settings(**given)).workers == workers


@pytest.mark.usefixtures("driver")
def test_a_device_by_name_is_left_to_its_name() -> None:
    assert gpus_of(Settings(device="cuda")) == ["GPU-aa", "GPU-bb"]
    assert gpus_of(Settings(device="cuda:0")) == gpus_of(Settings(device="cpu")) == []


@pytest.mark.usefixtures("driver")
def test_workers_share_the_gpus_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, str | None]] = []

    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> object:
        if command[0].endswith("nvidia-smi"):
            return real(command, **options)
        env = options["env"]
        started.append((command[3], env.get("CUDA_VISIBLE_DEVICES")))
        raise OSError("enough seen")

    monkeypatch.setattr(subprocess, "Popen", popen)
    settings = Settings(data_dir=tmp_path / "data", workers=3)
    settings.data_dir.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = Store(settings.database)
        for process in Supervisor(settings, listener, store)._processes:
            with pytest.raises(OSError, match="enough seen"):
                process.start()
        store.close()
    assert started == [("api", None), ("worker", "GPU-aa"), ("worker", "GPU-bb"), ("worker", "GPU-aa")]
    assert supervisor.VARIABLE == "CUDA_VISIBLE_DEVICES"
