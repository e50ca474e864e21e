"""Clouds as they come in: forms and raw bodies, up to a limit, in constant memory, under any name."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from server.helpers import XYZ, Api, is_problem, process, until

from sdfserver.server.uploads import MAX_NAME, safe_name

MIB = 2**20
LIMIT_S = 30.0


def stored(api: Api, job_id: str) -> list[Path]:
    """The files of a job."""
    return sorted(path for path in api.artifacts.jobs.joinpath(job_id).rglob("*") if path.is_file())


def test_a_form_is_taken_as_it_was_sent(api: Api) -> None:
    answer = api.send_cloud(options='{"preset": "draft", "resolution": 40, "level": 0.5}')
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, job["links"]["self"])
    assert (job["state"], job["kind"], job["name"]) == ("queued", "reconstruction", "cloud.xyz")
    assert (job["options"]["preset"], job["options"]["resolution"], job["options"]["level"]) == ("draft", 40, 0.5)
    (cloud,) = stored(api, job["id"])
    assert (cloud.name, cloud.read_bytes()) == ("cloud.xyz", XYZ)
    assert api.job(job["id"]) == job


def test_a_raw_body_is_taken_with_options_of_the_query(api: Api) -> None:
    answer = api.post(
        "/v1/jobs", params={"name": "a.XYZ", "preset": "fine", "viewpoint": [1, 2, 3], "normals": "estimate"},
        content=XYZ,
    )  # fmt: skip
    job = answer.json()
    assert answer.status_code == 202, job
    assert (job["name"], job["options"]["preset"], job["options"]["viewpoint"]) == ("a.XYZ", "fine", [1, 2, 3])
    assert [path.read_bytes() for path in stored(api, job["id"])] == [XYZ]


def test_the_format_of_a_raw_body_may_be_said_alone(api: Api) -> None:
    job = api.post("/v1/jobs?format=xyz", content=XYZ).json()
    assert (job["name"], job["options"]["preset"]) == ("cloud.xyz", "standard")


def test_the_options_may_come_before_the_cloud_or_after(api: Api) -> None:
    cloud, options = ("cloud", ("a.xyz", XYZ)), ("options", (None, '{"seed": 7}'))
    for files in ([cloud, options], [options, cloud]):
        assert api.post("/v1/jobs", files=files).json()["options"]["seed"] == 7


def test_an_unknown_format_is_refused(api: Api) -> None:
    for name in ("cloud.doc", "cloud", ".ply", "cloud.xyz.exe", "cloud.../", "ply"):
        is_problem(api.send_cloud(name=name), 415, "format", "ply")
        is_problem(api.post("/v1/jobs", params={"name": name}, content=XYZ), 415, "format", "ply")
    is_problem(api.post("/v1/jobs", params={"format": "doc"}, content=XYZ), 415, "format", "'doc'")


FORM = {"Content-Type": "multipart/form-data; boundary=X"}
PART = b'--X\r\nContent-Disposition: form-data; name="cloud"; filename="a.xyz"\r\n\r\n0 0 0 0 0 1\n\r\n'


OPTIONS = b'--X\r\nContent-Disposition: form-data; name="options"\r\n\r\n'
MALFORMED = [
    ({"Content-Type": "multipart/form-data"}, PART + b"--X--\r\n", "boundary"),
    (FORM, b"", "form"),
    (FORM, b"no form at all", "cannot be parsed"),
    (FORM, PART, "too early"),
    (FORM, PART[:-8], "too early"),
    (FORM, b"--X--\r\n", "cloud"),
    (FORM, PART + PART + b"--X--\r\n", "two parts called cloud"),
    (FORM, PART.replace(b'"cloud"', b'"file"') + b"--X--\r\n", "'file'"),
    (FORM, PART.replace(b"0 0 0 0 0 1\n", b"") + b"--X--\r\n", "empty"),
    (FORM, b"--X\r\nContent-Disposition\r\n\r\nx\r\n--X--\r\n", ""),
    (FORM, b"--X\r\n\r\nx\r\n--X--\r\n", "only cloud and options"),
    (FORM, PART + OPTIONS + b'{"seed": \r\n--X--\r\n', "JSON"),
    (FORM, PART + OPTIONS + b" " * 70_000 + b"{}\r\n--X--\r\n", "65,536"),
    (FORM, b"--X\r\n" + b"A: " + b"b" * 200_000, ""),
]  # fmt: skip


def test_a_malformed_form_is_refused_and_leaves_nothing(api: Api) -> None:
    before = api.folders()
    for headers, body, said in MALFORMED:
        is_problem(api.post("/v1/jobs", content=body, headers=headers), 400, "malformed", said)
        assert api.folders() == before
    assert api.get("/v1/jobs").json()["jobs"] == []


def test_an_empty_raw_body_is_refused(api: Api) -> None:
    is_problem(api.post("/v1/jobs?format=ply", content=b""), 400, "malformed", "empty")


OUT_OF_RANGE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"resolution": 7}, ("resolution", "7")),
    ({"resolution": 4097}, ("resolution", "4097")),
    ({"preset": "best"}, ("preset", "best", "draft")),
    ({"level": "deep"}, ("level", "deep")),
    ({"trim": -0.5}, ("trim", "-0.5")),
    ({"shell": 0}, ("shell", "0")),
    ({"shell": 2, "trim": 0.5}, ("shell makes a closed wall, which trim would cut open",)),
    ({"min_component": 1.5}, ("min_component", "1.5")),
    ({"faces": 3}, ("faces", "3")),
    ({"sharp": True, "level": 0.5}, ("sharp", "level is 0.5")),
    ({"priority": 11}, ("priority", "11")),
    ({"seed": -4}, ("seed", "-4")),
    ({"max_seconds": 0}, ("max_seconds", "0")),
    ({"device": "tpu"}, ("device", "tpu")),
    ({"viewpoint": [0, 0, 1]}, ("viewpoint", "normals=estimate")),
    ({"viewpoint": [0, 1], "normals": "estimate"}, ("viewpoint", "3 items")),
    ({"colour": "red"}, ("colour", "red")),
]


def test_options_out_of_range_are_refused_with_their_value(api: Api) -> None:
    for options, said in OUT_OF_RANGE:
        is_problem(api.send_cloud(options=json.dumps(options)), 422, "invalid", *said)
        query = {"format": "xyz", **options}
        is_problem(api.post("/v1/jobs", params=query, content=XYZ), 422, "invalid", *said)


def test_options_beyond_this_server_are_refused_with_its_limit(api: Api) -> None:
    is_problem(api.send_cloud(options='{"resolution": 2000}'), 422, "invalid", "2000", "1024")
    with api.app.changed(max_steps=500):
        is_problem(api.send_cloud(options='{"preset": "paper"}'), 422, "invalid", "paper", "500")


# Limits


def test_an_upload_over_the_limit_is_refused_before_it_is_read_if_it_says_so(api: Api) -> None:
    with api.app.changed(max_upload_bytes=1000):
        is_problem(api.post("/v1/jobs?format=xyz", content=b"1" * 1001), 413, "too-large", "1,000")
        is_problem(api.send_cloud(b"1" * 1001), 413, "too-large", "1,000")
        assert api.post("/v1/jobs?format=xyz", content=b"1" * 1000).status_code == 202
        assert api.send_cloud(b"1" * 1000).status_code == 202


@pytest.mark.parametrize("form", [False, True])
@pytest.mark.parametrize("declared", [False, True])
def test_the_limit_is_answered_while_the_client_is_still_sending(api: Api, form: bool, declared: bool) -> None:
    host, port = urlsplit(api.app.url).netloc.split(":")
    length = "Content-Length: 1000000000" if declared else "Transfer-Encoding: chunked"
    kind = "multipart/form-data; boundary=X" if form else "application/octet-stream"
    head = (
        f"POST /v1/jobs?format=xyz HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {api.secret}\r\n"
        f"Content-Type: {kind}\r\n{length}\r\n\r\n"
    )
    block = b"1 " * 32768
    with api.app.changed(max_upload_bytes=4 * MIB), socket.create_connection((host, int(port)), LIMIT_S) as connection:
        connection.sendall(head.encode())
        body = PART if form else b""
        connection.sendall(body if declared or not body else b"%x\r\n%s\r\n" % (len(body), body))
        stop = threading.Event()

        def send() -> None:
            while not stop.wait(0.001):
                try:
                    connection.sendall(block if declared else b"%x\r\n%s\r\n" % (len(block), block))
                except OSError:
                    return

        sender = threading.Thread(target=send)
        sender.start()
        try:
            received = b""
            while b"}" not in received:
                data = connection.recv(65536)
                assert data, received
                received += data
        finally:
            stop.set()
            connection.shutdown(socket.SHUT_WR)
            sender.join(LIMIT_S)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"urn:sdfserver:problem:too-large" in received


def test_a_client_that_goes_in_mid_upload_leaves_nothing(api: Api) -> None:
    before = api.folders()
    host, port = urlsplit(api.app.url).netloc.split(":")
    head = (
        f"POST /v1/jobs?format=xyz HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {api.secret}\r\n"
        "Content-Length: 1000000000\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), LIMIT_S) as connection:
        connection.sendall(head.encode() + b"1" * 2 * MIB)
        until(lambda: api.folders() - before)
    until(lambda: api.folders() == before)
    assert api.get("/v1/jobs").json()["jobs"] == []


def test_a_full_disk_refuses_uploads_and_says_when_to_come_again(api: Api) -> None:
    with api.app.changed(min_free_bytes=2**60):
        answer = api.send_cloud()
        is_problem(answer, 507, "disk-full", "room")
        assert int(answer.headers["retry-after"]) > 0
    assert api.get("/v1/jobs").json()["jobs"] == []
    assert api.send_cloud().status_code == 202


# Names


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd.ply", "passwd.ply"),
        ("/etc/passwd.ply", "passwd.ply"),
        ("..\\..\\windows\\system.ply", "system.ply"),
        ("C:\\clouds\\a.ply", "a.ply"),
        ("a\x00b\x1b[31m\r\nX: y.ply", "ab[31mX: y.ply"),
        ("invoice\u202eylp.exe.ply", "invoiceylp.exe.ply"),
        ("\u00e4\u9d28 \U0001f986.ply", "\u00e4\u9d28 \U0001f986.ply"),
        ("", "cloud"),
        (".", "cloud"),
        ("/", "cloud"),
    ],
)
def test_a_name_never_is_a_path(given: str, kept: str) -> None:
    assert safe_name(given) == kept


def test_a_long_name_keeps_its_ending() -> None:
    assert safe_name("x" * 5000 + ".ply") == "x" * (MAX_NAME - 4) + ".ply"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd.ply", "/etc/passwd.ply", "\u00e4\u9d28 \U0001f986.ply", "a;b=c.ply"]
)
def test_files_stay_in_the_folder_of_their_job_whatever_they_are_called(api: Api, name: str) -> None:
    for answer in (api.send_cloud(name=name), api.post("/v1/jobs", params={"name": name}, content=XYZ)):
        job = answer.json()
        assert job["name"] == name.split("/")[-1]
        assert [path.name for path in stored(api, job["id"])] == ["cloud.ply"]


# Memory


def blocks(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield bytes(MIB)


def grown(folder: Path, mebibytes: int) -> float:
    """By how many MiB an API grows while it takes a raw upload and a form of that size."""
    with (
        process("api", folder, min_free_bytes=0, max_upload_bytes=mebibytes * MIB) as server,
        httpx.Client(base_url=server.url, timeout=600.0) as client,
    ):
        watched, stop = psutil.Process(server.running.pid), threading.Event()
        assert client.post("/v1/jobs?format=xyz", content=XYZ).status_code == 202
        assert client.post("/v1/jobs", files={"cloud": ("a.xyz", XYZ)}).status_code == 202
        before = peak = watched.memory_info().rss

        def watch() -> None:
            nonlocal peak
            while not stop.wait(0.02):
                peak = max(peak, watched.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            answer = client.post("/v1/jobs?format=ply", content=blocks(mebibytes))
            assert answer.status_code == 202, answer.text
            client.delete(answer.json()["links"]["self"])

            def form() -> Iterator[bytes]:
                yield PART.partition(b"0 0")[0]
                yield from blocks(mebibytes)
                yield b"\r\n--X--\r\n"

            answer = client.post("/v1/jobs", content=form(), headers=FORM)
            assert answer.status_code == 202, answer.text
            client.delete(answer.json()["links"]["self"])
        finally:
            stop.set()
            watcher.join()
    return (peak - before) / MIB


def test_an_upload_of_200_mb_takes_no_memory(tmp_path: Path) -> None:
    assert grown(tmp_path, 200) < 64


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_upload_of_2_gb_takes_no_memory(tmp_path: Path) -> None:
    assert grown(tmp_path, 2048) < 64
