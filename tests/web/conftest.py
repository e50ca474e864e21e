"""A real browser on a real server. Skipped where there is no Chromium, or no Playwright to drive it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from server.helpers import Process, process

from sdfserver.client import Client

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",  # root's browser would not start
    "--use-angle=swiftshader",  # WebGL without a GPU
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """Chromium, without a window."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium; on Debian: apt install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """`sdfserver serve`."""
    with process("serve", tmp_path_factory.mktemp("page"), min_free_bytes=0, max_resolution=512) as server:
        yield server


@pytest.fixture(scope="session")
def finished(server: Process, data: Path) -> str:
    """The id of a job that has succeeded."""
    with Client(server.url) as client:
        return client.submit(data / "sparse.ply", preset="draft", resolution=64).wait().id


@pytest.fixture
def width() -> dict[str, int]:
    """How large the window is."""
    return WIDE


@pytest.fixture
def page(browser: "Browser", server: Process, width: dict[str, int]) -> "Iterator[Page]":
    """The page, in a window of its own that reaches this server alone; a fault in its scripts fails the test."""
    context = browser.new_context(viewport=width, accept_downloads=True)  # type: ignore[arg-type]
    context.set_default_timeout(60_000)
    faults: list[str] = []
    elsewhere: list[str] = []

    def allow(route: Any) -> None:
        if route.request.url.startswith((server.url, "blob:", "data:")):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    context.route("**/*", allow)
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    page.goto(server.url)
    yield page
    context.close()
    assert faults == []
    assert elsewhere == [], "the page must work without any other server"


@pytest.fixture
def cloud(data: Path) -> Path:
    """A small cloud with normals."""
    return data / "sparse.ply"
