"""Recording a step, played with a device that only says what it was told; and work in halves."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sdfserver.device import Captured, in_halves


class Recorder:
    """Stands for what Captured uses of torch.cuda: between begin and end, work is recorded and not done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.on = "current"
        said = self.said
        recorder = self

        class Stream:
            def __init__(self, _: object = None, name: str = "beside") -> None:
                self.name = name

            def wait_stream(self, other: "Stream") -> None:
                said.append(f"{self.name} waits for {other.name}")

        class Graph:
            def capture_begin(self, **options: str) -> None:
                assert recorder.on == "beside", "nothing can be recorded on the current stream"
                said.append("begin")

            def capture_end(self) -> None:
                said.append("end")

            def replay(self) -> None:
                assert recorder.on == "current"
                said.append("replay")

        @contextmanager
        def stream(one: Stream) -> Iterator[None]:
            before, recorder.on = recorder.on, one.name
            yield
            recorder.on = before

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(name="current"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "stream", stream)


def test_the_first_call_is_real_the_second_recorded_and_all_others_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)

    def work() -> int:
        recorder.said.append("work")
        return len(recorder.said)

    step = Captured(work, torch.device("cuda"))
    between = ["beside waits for current"], ["current waits for beside"]
    first = step()
    assert recorder.said == [*between[0], "work", *between[1]]
    recorder.said.clear()
    second = step()
    # Recorded, then replayed: it has been done once, as any other call.
    assert recorder.said == [*between[0], "begin", "work", "end", *between[1], "replay"]
    assert second != first
    recorder.said.clear()
    # What it gives is where the recorded work has put it.
    assert [step(), step()] == [second, second]
    assert recorder.said == ["replay", "replay"]


def test_a_recording_that_fails_is_ended_and_the_error_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    step = Captured(work, torch.device("cuda"))
    step()
    with pytest.raises(RuntimeError, match="not permitted"):
        step()
    assert recorder.said[-1] == "end"
    assert recorder.on == "beside" or "end" in recorder.said


def test_elsewhere_every_call_is_real() -> None:
    calls: list[int] = []
    step = Captured(lambda: calls.append(1), torch.device("cpu"))
    for _ in range(3):
        step()
    assert len(calls) == 3


def test_what_fits_is_done_at_once_and_what_does_not_in_halves() -> None:
    seen: list[list[int]] = []

    def work(items: list[int]) -> int:
        seen.append(items)
        if len(items) > 3:
            raise torch.OutOfMemoryError("no room")
        return sum(items)

    assert in_halves(work, [1, 2, 3]) == [6]
    seen.clear()
    assert sum(in_halves(work, [*range(10)])) == 45
    assert [item for items in seen if len(items) <= 3 for item in items] == [*range(10)]


def test_a_single_one_without_room_is_the_callers_to_handle() -> None:
    def work(items: list[int]) -> None:
        if 2 in items:
            raise torch.OutOfMemoryError("no room for 2")

    with pytest.raises(torch.OutOfMemoryError, match="no room for 2"):
        in_halves(work, [1, 2, 3, 4])
