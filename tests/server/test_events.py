"""Server-sent events: in order, each with its number, to the end; whoever comes back misses nothing."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from server.helpers import Api, Served, is_problem, until


@dataclass
class Event:
    kind: str
    number: int | None
    job: dict[str, Any]


def parsed(text: str) -> list[Event]:
    """The events of a stream."""
    found = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "data" in fields:
            number = int(fields["id"]) if "id" in fields else None
            found.append(Event(fields["event"], number, json.loads(fields["data"])))
    return found


@dataclass
class Stream:
    """A stream that is being read."""

    text: str = ""
    ended: bool = False
    events: Callable[[], list[Event]] = field(init=False)

    def __post_init__(self) -> None:
        self.events = lambda: parsed(self.text)


@contextmanager
def following(api: Api, job_id: str, after: int | str | None = None) -> Iterator[Stream]:
    """The job's events, as they come."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    stream = Stream()
    with (
        httpx.Client(base_url=api.base_url, headers=api.headers, timeout=60) as client,
        client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")

        def read() -> None:
            try:
                for text in answer.iter_text():
                    stream.text += text
                stream.ended = True
            except (httpx.HTTPError, httpx.StreamError):
                pass

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        yield stream


def whole(api: Api, job_id: str, after: int | str | None = None) -> list[Event]:
    """All events of a job that has ended."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    return parsed(api.get(f"/v1/jobs/{job_id}/events", headers=headers).raise_for_status().text)


def worked(api: Api, worker: str, steps: int = 5) -> str:
    """A job that went its whole way, by hand."""
    job_id = api.submit()["id"]
    attempt = api.begin(job_id, worker)
    for step in range(steps):
        assert api.store.update(attempt, stage="fit", step=step, steps=steps, progress=step / steps, eta_s=1.0 * steps)
    api.store.publish(attempt, {"mesh": 1.0}, 3600)
    return job_id


def test_events_are_numbered_and_end_with_the_job(api: Api, worker: str) -> None:
    events = whole(api, worked(api, worker))
    assert [event.number for event in events] == list(range(1, 9))
    assert [event.kind for event in events] == ["state", "state", *["progress"] * 5, "state"]
    assert [event.job["state"] for event in events] == ["queued", *["running"] * 6, "succeeded"]
    assert [event.job["step"] for event in events[2:7]] == [0, 1, 2, 3, 4]
    assert [event.job["eta_s"] for event in events[2:]] == [5.0] * 5 + [None]
    assert [event.job["links"]["mesh"] is None for event in events] == [True] * 7 + [False]


def test_whoever_comes_back_gets_the_rest_and_nothing_twice(api: Api, worker: str) -> None:
    job_id = worked(api, worker)
    everything = whole(api, job_id)
    for last in range(9):
        assert whole(api, job_id, last) == everything[last:]


def test_a_last_id_that_means_nothing_is_the_beginning_or_the_end(api: Api, worker: str) -> None:
    job_id = worked(api, worker)
    for before in ("", "x", "-1", "0"):
        assert len(whole(api, job_id, before)) == 8
    for beyond in ("9", "99999999999999999999"):
        assert whole(api, job_id, beyond) == []
    is_problem(api.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "1" * 99}), 422, "invalid")


def test_events_come_while_the_job_runs_and_the_queue_is_told(api: Api, worker: str) -> None:
    first, second = api.submit()["id"], api.submit()["id"]
    with following(api, second) as stream:
        until(lambda: [event.job["queue_position"] for event in stream.events() if event.kind == "queue"] == [2])
        api.delete(f"/v1/jobs/{first}")
        until(lambda: [event.job["queue_position"] for event in stream.events() if event.kind == "queue"] == [2, 1])
        assert all(event.number is None for event in stream.events() if event.kind == "queue")
        attempt = api.begin(second, worker)
        until(lambda: stream.events()[-1].job["state"] == "running")
        api.store.update(attempt, stage="fit", step=1, steps=2, losses={"surface": 0.5})
        until(lambda: stream.events()[-1].job["losses"] == {"surface": 0.5})
        api.post(f"/v1/jobs/{second}/cancel")
        until(lambda: stream.ended)
    assert stream.events()[-1].job["state"] == "cancelled"


def test_a_connection_that_breaks_at_any_event_misses_nothing(api: Api, worker: str) -> None:
    job_id = api.submit()["id"]
    attempt = api.begin(job_id, worker)
    done = threading.Event()

    def work() -> None:
        for step in range(30):
            api.store.update(attempt, stage="fit", step=step)
            time.sleep(0.02)
        api.store.publish(attempt, {}, 3600)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    seen: list[Event] = []
    while not (seen and seen[-1].job["state"] == "succeeded"):
        with following(api, job_id, seen[-1].number if seen else None) as stream:
            count = len(seen) % 3 + 1
            until(lambda stream=stream, count=count: len(stream.events()) >= count or stream.ended)
            seen += [event for event in stream.events() if event.number is not None]
    thread.join()
    assert [event.number for event in seen] == list(range(1, 34))
    assert [event.job["step"] for event in seen[2:-1]] == list(range(30))


def test_a_stream_ends_when_its_job_is_removed(api: Api) -> None:
    job_id = api.submit()["id"]
    with following(api, job_id) as stream:
        until(stream.events)
        api.delete(f"/v1/jobs/{job_id}")
        until(lambda: stream.ended)


@pytest.mark.parametrize("after", [None, 3])
def test_a_real_job_tells_of_its_fit_and_its_mesh(served: Served, after: int | None) -> None:
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    live = [event for event in parsed(served.stream) if event.number is not None]
    later = parsed(served.api.get(served.job["links"]["events"], headers=headers).text)
    assert later == live[after or 0 :]
    assert [event.number for event in live] == list(range(1, len(live) + 1))
    stages = list(dict.fromkeys(event.job["stage"] for event in live))
    assert stages.index("fit") < stages.index("mesh")
    progress = [event.job["progress"] for event in live]
    assert progress == sorted(progress)
    fit = [event.job for event in live if event.job["step"] and event.job["stage"] == "fit"]
    assert fit, stages
    assert all(job["losses"] for job in fit)
    assert any(job["eta_s"] is not None for job in fit)
    assert live[-1].job == served.job


def test_many_who_follow_cost_no_more_looks_than_one(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job = api.submit()["id"]
    store, looks, others = api.store, [], []
    jobs_of, row_of = store.jobs_of, store.job
    monkeypatch.setattr(store, "jobs_of", lambda ids: looks.append(list(ids)) or jobs_of(ids))
    monkeypatch.setattr(store, "job", lambda *asked: others.append(asked) or row_of(*asked))
    with ExitStack() as stack:
        streams = [stack.enter_context(following(api, job)) for _ in range(30)]
        until(lambda: all(len(stream.events()) == 2 for stream in streams))
        looks.clear()
        others.clear()
        began = time.monotonic()
        until(lambda: len(looks) >= 4)
        assert len(looks) <= 2 + (time.monotonic() - began) / 0.25
        assert set(map(tuple, looks)) == {(job,)}
        assert others == []
        store.cancel(job, 60)
        until(lambda: all(stream.ended for stream in streams))
        assert {stream.events()[-1].job["state"] for stream in streams} == {"cancelled"}
    looks.clear()
    time.sleep(1.0)
    assert looks == [], "nobody follows anything any more"
