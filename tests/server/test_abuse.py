"""What strangers may try: to be slow, to be large, to guess, and to have a visitor's browser ask for them."""

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pytest
from fastapi.routing import APIRoute
from server.helpers import XYZ, Api, App, is_problem, process, running, until

from sdfserver.server import abuse, field_routes, protocol
from sdfserver.server.abuse import GUESSES, Guesses
from sdfserver.server.problems import ProblemError
from sdfserver.server.routes import router
from sdfserver.server.settings import Settings


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """A server of this machine's own, without keys."""
    with running(Settings(data_dir=tmp_path_factory.mktemp("keyless"), min_free_bytes=0)) as app:
        yield app


@contextlib.contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    where = urlsplit(url)
    with socket.create_connection((where.hostname or "", where.port or 0), 30) as connection:
        yield connection


def answer(connection: socket.socket) -> bytes:
    """All that comes until the other side hangs up."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            got += part
    return got


# Slow


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_head_that_does_not_end_in_time_ends_the_connection(
    sent: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)
    with running(Settings(data_dir=tmp_path, min_free_bytes=0), http=protocol.BoundedProtocol) as app:
        with connected(app.url) as connection:
            connection.sendall(sent)
            assert answer(connection).startswith(b"HTTP/1.1 408 ")
        with connected(app.url) as connection:  # the second request of a connection is held to it as the first was
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
            both = answer(connection)
            assert both.startswith(b"HTTP/1.1 200 ")
            assert b"\nHTTP/1.1 408 " in both


def test_a_head_may_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 5.0)
    with (
        running(Settings(data_dir=tmp_path, min_free_bytes=0), http=protocol.BoundedProtocol) as app,
        connected(app.url) as connection,
    ):
        for piece in (b"GET /health/live HT", b"TP/1.1\r\nHost: local", b"host\r\nConnection: close\r\n\r\n"):
            connection.sendall(piece)
            time.sleep(0.2)
        assert answer(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/v1/jobs?format=xyz", f"/v1/jobs/{'0' * 32}/restart"])
def test_a_body_that_stops_coming_ends_the_request(path: str, keyless: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abuse, "STALL_SECONDS", 0.5)
    with connected(keyless.url) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\nContent-Type: application/json"
        connection.sendall(head.encode() + b"\r\n\r\n" + XYZ)
        assert b"urn:sdfserver:problem:slow" in answer(connection)
    until(lambda: not list(keyless.service.artifacts.jobs.iterdir()))


def test_a_body_that_comes_by_the_byte_ends_the_request(keyless: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abuse, "SLOW_SECONDS", 0.5)
    with connected(keyless.url) as connection:
        connection.sendall(b"POST /v1/jobs?format=xyz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        connection.settimeout(0.05)
        got = b""
        for _ in range(400):
            with contextlib.suppress(TimeoutError, ConnectionError):
                connection.sendall(b"0")
                got += connection.recv(65536)
            if b"problem:slow" in got:
                break
        assert b"urn:sdfserver:problem:slow" in got
    until(lambda: not list(keyless.service.artifacts.jobs.iterdir()))


def test_many_silent_connections_keep_nobody_from_an_answer(tmp_path: Path) -> None:
    with process("api", tmp_path) as api, contextlib.ExitStack() as stack:
        for _ in range(1200):  # more than the files that a process usually may have open
            stack.enter_context(connected(api.url)).sendall(b"GET / HTTP/1.1\r\n")
        assert httpx.get(f"{api.url}/health/live").is_success
        assert api.running.poll() is None


# Large


def test_a_head_without_end_is_not_kept(tmp_path: Path) -> None:
    with process("api", tmp_path) as api, connected(api.url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        with contextlib.suppress(ConnectionError):
            for i in range(100_000):
                connection.sendall(f"X-{i}: {'a' * 1000}\r\n".encode())
        assert answer(connection)[:13] in (b"HTTP/1.1 431 ", b"")
        assert httpx.get(f"{api.url}/health/live").is_success


# Guesses


def guess(app: App, secret: str) -> httpx.Response:
    return httpx.get(f"{app.url}/v1/jobs", headers={"Authorization": f"Bearer {secret}"})


def test_guesses_at_keys_are_held_up_and_those_who_have_one_are_not(tmp_path: Path) -> None:
    with running(Settings(data_dir=tmp_path, min_free_bytes=0)) as app, Api(app) as known, Api(app) as unused:
        assert known.get("/v1/jobs").is_success
        for _ in range(3 * GUESSES):  # the same one again and again is a mistake, not a guess
            is_problem(guess(app, "an old key"), 401, "unauthorized")
        for i in range(GUESSES - 1):
            is_problem(guess(app, f"guess {i}"), 401, "unauthorized")
        held = guess(app, "one more")
        is_problem(held, 429, "guesses", "wrong API keys")
        assert 0 < int(held.headers["retry-after"]) <= abuse.GUESS_SECONDS + 1
        assert known.get("/v1/jobs").is_success
        is_problem(guess(app, unused.secret), 429, "guesses"), "whether a guess is right is not told either"
        assert app.store.revoke_key(known.key_id)
        is_problem(known.get("/v1/jobs"), 401, "unauthorized")
        is_problem(known.get("/v1/jobs"), 429, "guesses")


def test_guesses_are_forgotten_in_time_and_counted_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(1000.0, 0.001)
    monkeypatch.setattr(abuse.time, "monotonic", lambda: next(now))
    guesses = Guesses()
    for i in range(GUESSES):
        guesses.check("here", str(i))
        guesses.tried("here", str(i), right=False)
    with pytest.raises(ProblemError):
        guesses.check("here", "again")
    guesses.check("there", "again")
    now = itertools.count(1000.0 + abuse.GUESS_SECONDS + 1, 0.001)
    guesses.check("here", "again")
    guesses.tried("here", "again", right=False)
    guesses.check("here", "and again")
    for i in range(abuse.ADDRESSES + 10):
        guesses.tried(str(i), "x", right=False)
    assert len(guesses._wrong) == abuse.ADDRESSES


# Other sites, in the browser of somebody who can reach a server without keys


def test_a_page_of_another_site_makes_no_job(keyless: App) -> None:
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        for answer in (
            httpx.post(f"{keyless.url}/v1/jobs", files={"cloud": ("a.xyz", XYZ)}, headers=headers),
            httpx.post(
                f"{keyless.url}/v1/jobs?format=xyz", content=XYZ, headers=headers | {"Content-Type": "text/plain"}
            ),
            httpx.delete(f"{keyless.url}/v1/jobs/{'0' * 32}", headers=headers),
        ):
            is_problem(answer, 403, "forbidden")
    assert not keyless.store.list_jobs("")


def test_nothing_lets_another_site_read_an_answer(keyless: App) -> None:
    for method in ("GET", "OPTIONS"):
        answer = httpx.request(
            method,
            f"{keyless.url}/v1/jobs",
            headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
        )
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_name_that_leads_here_by_a_trick_is_refused(keyless: App) -> None:
    port = urlsplit(keyless.url).port
    for name in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::"):
        is_problem(httpx.get(f"{keyless.url}/v1/jobs", headers={"Host": name}), 403, "forbidden", "localhost")
    for name in ("localhost", f"localhost:{port}", "127.0.0.1", "127.8.8.8:1", f"[::1]:{port}", "sdf.localhost"):
        assert httpx.get(f"{keyless.url}/v1/jobs", headers={"Host": name}).is_success, name


def test_the_page_itself_and_programs_are_served(keyless: App) -> None:
    port = urlsplit(keyless.url).port
    for headers in (
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": keyless.url},
        {"Sec-Fetch-Site": "none"},
        {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"},
    ):
        answer = httpx.post(f"{keyless.url}/v1/jobs?format=xyz", content=XYZ, headers=headers)
        assert answer.status_code == 202, answer.text
        assert httpx.delete(f"{keyless.url}/v1/jobs/{answer.json()['id']}").is_success


def test_with_keys_or_by_choice_any_name_will_do(app: App, api: Api, tmp_path: Path) -> None:
    assert api.get("/v1/jobs", headers={"Host": "scans.example"}).is_success
    with running(Settings(data_dir=tmp_path, min_free_bytes=0, allow_public_without_keys=True)) as public:
        assert httpx.get(f"{public.url}/v1/jobs", headers={"Host": "scans.example"}).is_success


# One user and another's jobs; names and ids


def routes_of_a_job() -> list[tuple[str, str]]:
    return [
        (method, route.path)
        for route in (*router.routes, *field_routes.router.routes)
        if isinstance(route, APIRoute) and "{job_id}" in route.path
        for method in sorted(route.methods)
    ]


def test_every_route_keeps_one_keys_jobs_from_another(app: App, api: Api, other: Api, worker: str) -> None:
    job = api.submit()["id"]
    api.publish(job, worker)
    routes = routes_of_a_job()
    assert len(routes) >= 17
    for method, path in routes:
        sent = {"json": {"points": [[0.0, 0.0, 0.0]]}} if path.endswith("/sdf") else {}
        if path.endswith("/meshes"):
            sent = {"json": {}}
        is_problem(other.request(method, path.replace("{job_id}", job), **sent), 404, "not-found")
    assert other.get("/v1/jobs").json()["jobs"] == []
    assert api.get(f"/v1/jobs/{job}/mesh").is_success


@pytest.mark.parametrize(
    "trick",
    [
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/sdfserver.sqlite3",
        "....//",
        "a" * 5000,
        "0" * 31 + "/",
        "0" * 32 + "%00",
        "0" * 32 + "\u0661",
        "/etc/passwd",
        "CON",
    ],
)
def test_ids_are_ids_and_nothing_else(trick: str, api: Api) -> None:
    for method, path in routes_of_a_job():
        if method != "GET":
            continue
        for text in (trick, quote(trick, safe="")):
            answer = api.get(path.replace("{job_id}", text))
            assert answer.status_code in (404, 405), (path, answer.status_code)
            assert "root:" not in answer.text
    assert api.get(f"/web/{trick}").status_code == 404
    assert api.get(f"/v1/samples/{trick}").status_code == 404


@pytest.mark.parametrize(
    "name",
    [
        "../../../outside.xyz",
        "..\\..\\outside.xyz",
        "/etc/cron.d/outside.xyz",
        'a"; filename="b.exe".xyz',
        "a\r\nSet-Cookie: x=y\r\n\r\n<script>.xyz",
        "a%0d%0aSet-Cookie:x.xyz",
        "\u202egnp.xyz",
        "<img src=x onerror=alert(1)>.xyz",
        "$(touch outside).xyz",
        "nul\0l.xyz",
    ],
)
def test_a_name_is_no_path_and_no_header(name: str, api: Api, worker: str) -> None:
    answer = api.post("/v1/jobs", params={"name": name}, content=XYZ)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    shown = job["name"]
    assert not set(shown) & {"/", "\\", "\r", "\n", "\0", "\u202e"}
    root = api.artifacts.jobs
    assert [path.name for path in root.joinpath(job["id"]).iterdir()] == ["cloud.xyz"]
    assert not list(root.parent.parent.rglob("*outside*"))
    api.publish(job["id"], worker)
    sent = api.get(f"/v1/jobs/{job['id']}/mesh")
    assert sent.is_success
    assert "set-cookie" not in sent.headers
    disposition = sent.headers["content-disposition"]
    assert disposition.startswith("attachment; filename")
    assert "exe" not in disposition or "%22" in disposition
