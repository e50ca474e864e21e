"""Recording a step, played with a device that only says what it was told; and work in halves."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sdfserver import device
from sdfserver.device import Captured, in_halves, sums


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
                if name == "beside":
                    said.append("a stream")

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
            try:
                yield
            finally:
                recorder.on = before

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(name="current"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(device, "_local", threading.local())


def test_the_first_call_is_real_the_second_recorded_and_all_others_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)

    done: list[int] = []

    def work() -> int:
        recorder.said.append("work")
        done.append(1)
        return len(done)

    step = Captured(work, torch.device("cuda"))
    between = ["beside waits for current"], ["current waits for beside"]
    first = step()
    assert recorder.said == ["a stream", *between[0], "work", *between[1]]
    recorder.said.clear()
    second = step()
    # Recorded, then replayed: it has been done once, as any other call.
    assert recorder.said == [*between[0], "begin", "work", "end", *between[1], "replay"]
    assert (first, second) == (1, 2)
    recorder.said.clear()
    # What it gives is where the recorded work has put it.
    assert [step(), step()] == [second, second]
    assert recorder.said == ["replay", "replay"]


def test_where_memory_runs_out_while_it_records_it_records_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")

    step = Captured(work, torch.device("cuda"))
    for _ in range(3):
        step()
    assert [said for said in recorder.said if "wait" not in said][1:] == [
        "begin",
        "end",
        "begin",
        "end",
        "replay",
        "replay",
    ]
    assert len(calls) == 3
    assert gc.isenabled()


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
    assert [said for said in recorder.said if "wait" not in said] == ["a stream", "begin", "end"]
    assert recorder.on == "current"
    assert gc.isenabled()


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


@pytest.mark.parametrize("ascending", [True, False])
def test_sums_are_the_same_by_either_way_of_adding(monkeypatch: pytest.MonkeyPatch, ascending: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    owner = torch.randint(0, 50, (1000,), generator=generator)
    owner = owner.sort().values if ascending else owner
    owner[owner == 7] = 8  # one that owns nothing
    values = torch.randn((1000, 3), generator=generator)
    expected = sums(values, owner, 52)

    class OnDevice(torch.Tensor):
        """A tensor that says it is on a device."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    found = sums(values.as_subclass(OnDevice), owner, 52, ascending=ascending)
    assert torch.allclose(found.as_subclass(torch.Tensor), expected, atol=1e-5)
    assert (expected[7] == 0).all()
    assert (expected[50:] == 0).all()
