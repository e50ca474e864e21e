"""What a job's process makes of errors that only a device has: full, for a while or for good, or gone."""

import logging
import os
from pathlib import Path

import pytest
import torch

from sdfserver.schemas import JobOptions
from sdfserver.server import child

TASK = child.FitTask(
    cloud=Path("cloud.ply"),
    name="mine.ply",
    folder=Path("folder"),
    job_id="j",
    request_id=None,
    options=JobOptions(),
    max_points=10,
    device="cpu",
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "ROOM_SECONDS", (0.001, 0.001))


def test_a_job_waits_for_room_on_a_device_that_another_has(caplog: pytest.LogCaptureFixture) -> None:
    left = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nMore advice"), None]

    def work() -> str:
        error = left.pop(0)
        if error is not None:
            raise error
        return "done"

    assert child._when_there_is_room(work) == "done"
    assert "CUDA out of memory. Tried to allocate 2 GiB" in caplog.text
    assert "More advice" not in caplog.text


def test_a_job_that_never_finds_room_fails_with_the_reason() -> None:
    tries = []

    def work() -> None:
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    outcome = child._outcome(TASK, lambda: child._when_there_is_room(work))
    assert outcome is not None
    assert (outcome.how, outcome.problem, len(tries)) == ("failed", "memory", 4)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronous"),
    ],
)
def test_a_lost_device_ends_the_process_and_not_the_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        assert code == 1
        raise Ended

    monkeypatch.setattr(os, "_exit", end)

    def work() -> None:
        raise error

    with caplog.at_level(logging.ERROR), pytest.raises(Ended):
        child._outcome(TASK, work)
    assert "the device is lost" in caplog.text


def test_an_error_of_our_own_is_told_and_ends_the_job_alone(caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        raise RuntimeError("a mistake")

    outcome = child._outcome(TASK, work)
    assert outcome is not None
    assert (outcome.how, outcome.problem) == ("failed", "internal")
    assert "a mistake" in caplog.text


@pytest.mark.parametrize(
    ("said", "here"),
    [
        ("use --normals estimate", "use normals=estimate"),
        ("use --remove-outliers", "use remove_outliers=true"),
        ("--surface open cuts away", "surface=open cuts away"),
        ("as --surface says", "as surface says"),
        ("raise --resolution", "raise resolution"),
    ],
)
def test_options_are_called_what_they_are_called_in_the_interface(said: str, here: str) -> None:
    assert child._in_our_words(said, TASK) == here


def test_sharp_edges_asked_for_are_those_of_the_mesh() -> None:
    assert child.mesh_config(JobOptions(sharp=True), "standard", 512).sharp
    assert not child.mesh_config(JobOptions(), "standard", 512).sharp
