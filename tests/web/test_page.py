"""The page as people use it, in a real browser."""

import base64
import io
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from PIL import Image
from server.helpers import Process
from web.conftest import NARROW, WIDE

from sdfserver.config import PRESETS
from sdfserver.io import read_cloud, read_mesh, write_mesh, write_ply
from sdfserver.server import page as page_module

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytestmark = pytest.mark.timeout(300)
JOB_S = 120.0


def start(page: "Page", cloud: Path, *, preset: str = "draft", resolution: str = "64") -> str:
    """Choose a file and have it reconstructed; the job's id."""
    page.set_input_files("#file", cloud)
    page.get_by_label(re.compile(f"^{preset}", re.IGNORECASE)).check(force=True)
    page.get_by_label("Resolution").first.select_option(resolution)
    page.get_by_role("button", name="Reconstruct").click()
    page.wait_for_url(re.compile("#job="))
    return page.url.partition("#job=")[2]


def open_job(page: "Page", job: str) -> None:
    """Follow the link to a job that has succeeded."""
    page.locator(f"#jobs a[href='#job={job}']").click()
    wait_for_state(page, "succeeded")


def wait_for(page: "Page", expression: str, arg: object = None) -> None:
    """Wait until that is true in the page. Playwright's own way needs eval, which the page's policy forbids."""
    end = time.monotonic() + JOB_S
    while not page.evaluate(expression, arg):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(100)


def wait_for_state(page: "Page", state: str) -> None:
    wait_for(page, "state => document.querySelector('#job-state').textContent === state", state)


def picture(page: "Page") -> np.ndarray:
    """The view as it is drawn, without what lies over it."""
    page.wait_for_timeout(300)
    url = page.evaluate("document.querySelector('#view').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)


def drawn(image: np.ndarray) -> float:
    """The share of the view that is not background."""
    return float((np.abs(image - image[0, 0]).sum(axis=2) > 30).mean())


BARS = """() => {
    window.bars = new Set();
    const look = (records) => records.forEach((record) => window.bars.add(record.oldValue));
    new MutationObserver(look).observe(document.querySelector("#bar"), {attributes: true, attributeOldValue: true});
}"""
"""Keeps the values that the bar has had."""


def test_a_file_is_shown_reconstructed_looked_at_and_taken(page: "Page", server: Process, cloud: Path) -> None:
    page.set_input_files("#file", cloud)
    page.get_by_text("sparse.ply: 500 points").wait_for()
    points = picture(page)
    assert drawn(points) > 0.001
    # Not by looking again and again: on a busy machine a look takes longer than the job.
    page.evaluate(BARS)
    job = start(page, cloud)
    wait_for(page, "!['queued', 'running', ''].includes(document.querySelector('#job-state').textContent)")
    assert page.evaluate("window.bars.size") >= 3, "the bar moves"
    wait_for_state(page, "succeeded")
    page.get_by_text(re.compile(r"triangles shown$")).wait_for()
    surface = picture(page)
    assert drawn(surface) > 0.05

    box = page.locator("#view").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 400, box["y"] + 300)
    page.mouse.down()
    page.mouse.move(box["x"] + 550, box["y"] + 340, steps=5)
    page.mouse.up()
    turned = picture(page)
    assert np.abs(turned - surface).sum(axis=2).astype(bool).mean() > 0.02, "it turns"
    page.mouse.wheel(0, 600)
    assert drawn(picture(page)) < 0.8 * drawn(turned), "it goes away"

    with page.expect_download() as started:
        page.get_by_role("button", name="PLY", exact=True).click()
    assert started.value.suggested_filename == "sparse.ply"
    body = httpx.get(f"{server.url}/v1/jobs/{job}/mesh").content
    assert Path(started.value.path()).read_bytes() == body
    assert "closed, genus 0" in page.locator("#report").inner_text()


def test_the_surface_is_seen_forming_and_the_losses_fall(page: "Page", cloud: Path) -> None:
    start(page, cloud, resolution="128")
    page.get_by_text("still forming").wait_for(timeout=1000 * JOB_S)
    assert drawn(picture(page)) > 0.02
    lines = page.locator("#losses polyline")
    wait_for_state(page, "succeeded")
    assert lines.count() >= 4
    # The longest; screen coordinates grow downwards.
    curves = [
        [float(pair.split(",")[1]) for pair in (line.get_attribute("points") or "").split()] for line in lines.all()
    ]
    assert max(map(len, curves)) >= 3
    assert any(curve[-1] > curve[0] for curve in curves if len(curve) >= 3)
    assert "surface" in (page.locator("#losses svg").get_attribute("aria-label") or "")


def test_the_ways_to_look_at_a_surface_differ(page: "Page", finished: str) -> None:
    open_job(page, finished)
    page.get_by_text(re.compile(r"triangles shown$")).wait_for()
    views = {}
    for mode in ("Shaded", "Wireframe", "Normals", "Distance"):
        page.get_by_role("radio", name=mode).check(force=True)
        views[mode] = picture(page)
    names = list(views)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert np.abs(views[one] - views[other]).sum(axis=2).astype(bool).mean() > 0.01, (one, other)
    assert page.get_by_text("distance to the nearest point").is_visible()
    page.get_by_role("radio", name="Shaded").check(force=True)
    before = picture(page)
    page.get_by_role("checkbox", name="Points").check(force=True)
    assert np.abs(picture(page) - before).any(), "they were hidden"
    page.get_by_role("checkbox", name="Points").uncheck(force=True)
    page.get_by_role("checkbox", name="Slice").check(force=True)
    page.get_by_text(re.compile("a line every")).wait_for()
    middle = picture(page)
    assert drawn(middle) > drawn(before)
    page.locator("#slice-at").fill("0.2")
    page.wait_for_timeout(1000)
    assert np.abs(picture(page) - middle).sum(axis=2).astype(bool).mean() > 0.01
    page.get_by_role("checkbox", name="Slice").uncheck(force=True)
    assert drawn(picture(page)) < drawn(middle)


def tinted(image: np.ndarray) -> set[str]:
    """Which of red and blue there is much of."""
    red, blue = image[..., 0] - image[..., 2] > 60, image[..., 2] - image[..., 0] > 60
    return {name for name, where in (("red", red), ("blue", blue)) if where.mean() > 0.0005}


def wait_until_tinted(page: "Page", wanted: set[str]) -> None:
    end = time.monotonic() + JOB_S
    while (seen := tinted(picture(page))) != wanted:
        assert time.monotonic() < end, seen


def test_the_colours_of_a_cloud_and_a_confidence_are_shown_where_there_are_any(
    page: "Page", cloud: Path, tmp_path: Path
) -> None:
    known = read_cloud(cloud)
    above = known.points[:, 2:] > np.median(known.points[:, 2])
    colors = np.where(above, [230, 20, 20], [20, 20, 230]).astype(np.uint8)
    write_ply(tmp_path / "painted.ply", known.points, normals=known.normals, colors=colors)

    def with_confidence(route: "Route") -> None:
        answer = route.fetch()
        (tmp_path / "preview.ply").write_bytes(answer.body())
        mesh = read_mesh(tmp_path / "preview.ply")
        values = np.linspace(0, 1, len(mesh.vertices))
        if mesh.colors is None:  # the surface is still forming
            route.fulfill(response=answer)
            return
        write_mesh(replace(mesh, confidence=values.astype(np.float32)), tmp_path / "more.ply")
        route.fulfill(response=answer, body=(tmp_path / "more.ply").read_bytes())

    page.set_input_files("#file", tmp_path / "painted.ply")
    page.get_by_text("painted.ply: 500 points").wait_for()
    wait_until_tinted(page, {"red", "blue"})  # the points, before they are uploaded
    page.context.route("**/preview", with_confidence)
    start(page, tmp_path / "painted.ply")
    wait_for_state(page, "succeeded")
    page.get_by_text(re.compile(r"triangles shown$")).wait_for()
    assert page.get_by_role("radio", name="Colours").is_checked(), "they are what one wants to see"
    wait_until_tinted(page, {"red", "blue"})
    page.get_by_role("radio", name="Shaded").check(force=True)
    wait_until_tinted(page, set())
    page.get_by_role("radio", name="Confidence").check(force=True)
    assert page.get_by_text("how far points support the surface").is_visible()
    assert drawn(picture(page)) > 0.05
    page.get_by_role("checkbox", name="Points").check(force=True)
    assert page.locator("#scale-end").inner_text() == "1"


def test_what_has_no_colours_offers_none(page: "Page", finished: str) -> None:
    open_job(page, finished)
    page.get_by_text(re.compile(r"triangles shown$")).wait_for()
    assert page.get_by_role("radio", name="Shaded").is_checked()
    assert page.get_by_role("radio", name="Colours").count() == 0
    page.get_by_role("radio", name="Confidence").check(force=True)
    assert page.get_by_text("how far points support the surface").is_visible()


def test_a_field_is_cut_through_and_taken(page: "Page", server: Process, finished: str) -> None:
    open_job(page, finished)
    page.get_by_text("Cut through it").click()
    view = page.locator("#cut-view")
    wait_for(page, "document.querySelector('#cut-view').naturalWidth > 0")
    says = page.locator("#cut-says")
    middle = says.inner_text()
    assert middle.startswith("z = ")
    assert "nothing" not in middle
    first = view.get_attribute("src")
    page.locator("#cut-at").fill("0.995")
    page.get_by_text("nothing there").wait_for()
    assert view.get_attribute("src") != first
    page.locator("#cut-at").fill("0.45")
    page.locator("#cut-axis").select_option("x")
    page.get_by_text(re.compile("^x = ")).wait_for()
    taken = {}
    for name, ending in {"SVG": "-slice.svg", "DXF": "-slice.dxf", "ONNX": ".onnx", "Field": ".safetensors"}.items():
        with page.expect_download() as started:
            page.get_by_role("button", name=name, exact=True).click()
        assert started.value.suggested_filename == f"sparse{ending}"
        taken[name] = Path(started.value.path()).read_bytes()
    query = {"axis": "x", "share": 0.45, "format": "svg"}
    assert taken["SVG"] == httpx.get(f"{server.url}/v1/jobs/{finished}/slice", params=query).content
    assert b"POLYLINE" in taken["DXF"]
    with page.expect_download(timeout=1000 * JOB_S) as started:
        page.get_by_role("button", name="Grid", exact=True).click()
    with np.load(Path(started.value.path())) as grid:
        assert grid["values"].shape == (128, 128, 128)


def test_a_running_job_is_cancelled_and_run_again(page: "Page", cloud: Path) -> None:
    first = start(page, cloud, preset="standard")
    wait_for_state(page, "running")
    page.locator("#cancel").click()
    wait_for_state(page, "cancelled")
    assert page.locator("#cancel").is_hidden()
    page.get_by_role("button", name="Run again").click()
    wait_for(page, "first => !location.hash.includes(first)", first)
    wait_for(page, "['queued', 'running'].includes(document.querySelector('#job-state').textContent)")
    page.locator("#cancel").click()
    wait_for_state(page, "cancelled")


def test_a_reload_in_mid_job_goes_on_with_it(page: "Page", cloud: Path) -> None:
    job = start(page, cloud, preset="standard", resolution="64")
    wait_for(page, "document.querySelectorAll('#losses polyline').length > 0")
    page.reload()
    assert page.url.endswith(job)
    wait_for(page, "document.querySelectorAll('#losses polyline').length > 0")
    assert page.locator("#job-name").inner_text() == "sparse.ply"
    page.get_by_text(re.compile(f"of {PRESETS['standard'].fit.steps}")).wait_for()
    assert drawn(picture(page)) > 0.001, "its points are there again"
    page.locator("#cancel").click()
    wait_for_state(page, "cancelled")


def test_errors_are_shown_as_the_server_says_them(page: "Page", server: Process, tmp_path: Path) -> None:
    wrong = tmp_path / "cloud.doc"
    wrong.write_bytes(b"no cloud")
    page.set_input_files("#file", wrong)
    page.get_by_role("button", name="Reconstruct").click()
    page.locator("#submit-error").get_by_text("not a known cloud format").wait_for()
    broken = tmp_path / "broken.ply"
    broken.write_bytes(b"ply\nformat ascii 1.0\nelement vertex 3\n")
    page.set_input_files("#file", broken)
    page.get_by_role("button", name="Reconstruct").click()
    wait_for_state(page, "failed")
    job = httpx.get(f"{server.url}/v1/jobs/{page.url.partition('#job=')[2]}").json()
    assert page.locator("#job-problem").inner_text() == job["problem"]["detail"]


def test_a_cloud_without_normals_is_warned_of_and_gets_them(page: "Page", server: Process, data: Path) -> None:
    page.get_by_role("button", name="bare", exact=True).click()
    page.get_by_text("This cloud has no normals").wait_for()
    page.get_by_label("Estimate them from the points").uncheck()
    page.get_by_label(re.compile("^draft", re.IGNORECASE)).check(force=True)
    page.get_by_role("button", name="Reconstruct").click()
    wait_for_state(page, "failed")
    assert "normals" in page.locator("#job-problem").inner_text()
    failed = page.url
    page.get_by_role("button", name="Estimate normals and try again").click()
    wait_for(page, "failed => location.href !== failed", failed)
    wait_for_state(page, "running")
    job = httpx.get(f"{server.url}/v1/jobs/{page.url.partition('#job=')[2]}").json()
    assert job["options"]["normals"] == "estimate"
    page.locator("#cancel").click()
    wait_for_state(page, "cancelled")


def test_options_are_those_of_the_server_each_with_a_sentence(page: "Page", server: Process) -> None:
    options = httpx.get(f"{server.url}/v1/options").json()
    page.get_by_text("More options").click()
    assert page.locator("#job-surface option").all_inner_texts() == ["auto", "closed", "open"]
    for name in ("surface", "trim", "faces", "seed", "priority", "max_seconds", "remove_outliers"):
        field = page.locator(f"#job-{name}")
        assert field.is_visible()
        assert (
            page.locator(f"#job-{name}-note").inner_text() == options["job_options"]["properties"][name]["description"]
        )
    assert page.locator("#resolution option").all_inner_texts() == ["auto (preset)", "64", "128", "256", "512"]
    page.get_by_label(re.compile("^fine", re.IGNORECASE)).check(force=True)
    assert page.locator("#resolution option").first.inner_text() == "auto (preset)"


def test_a_mesh_is_made_again_and_the_list_keeps_both(page: "Page", server: Process, finished: str) -> None:
    job = finished
    open_job(page, job)
    page.get_by_text("Mesh again, without a new fit").click()
    page.locator("#again-resolution").fill("24")
    page.locator("#again-surface").select_option("open")
    page.get_by_role("button", name="Mesh again").click()
    wait_for(page, "job => !location.hash.includes(job)", job)
    wait_for_state(page, "succeeded")
    again = page.url.partition("#job=")[2]
    made = httpx.get(f"{server.url}/v1/jobs/{again}").json()
    assert made["parent_id"] == job
    assert made["options"]["surface"] == "open"
    rows = page.locator("#jobs li")
    rows.first.locator("img").wait_for()
    assert rows.first.locator("img").evaluate("image => image.complete && image.naturalWidth > 0")
    rows.first.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Keep it").click()
    assert httpx.get(f"{server.url}/v1/jobs/{again}").status_code == 200
    rows.first.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete it").click()
    wait_for(page, "again => !document.querySelector(`#jobs a[href='#job=${again}']`)", again)
    assert httpx.get(f"{server.url}/v1/jobs/{again}").status_code == 410
    wait_for(page, "!document.querySelector('#new-panel').hidden")


@pytest.mark.parametrize("width", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_or_hard_to_read(page: "Page", width: dict[str, int], scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.get_by_role("button", name="knot", exact=True).click()
    page.get_by_text("knot.ply: 10,000 points").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width["width"]
    faint = page.evaluate(
        """() => {
          const light = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
              .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const behind = (element) => {
            for (; element; element = element.parentElement) {
              const color = getComputedStyle(element).backgroundColor;
              if (!/, 0\\)$/.test(color)) return color;
            }
            return "rgb(255, 255, 255)";
          };
          return [...document.querySelectorAll("aside *, header *")]
            .filter((e) => e.checkVisibility() && !e.closest(":disabled")
              && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
            .map((e) => {
              const pair = [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => b - a);
              return [e.textContent.trim().slice(0, 30), (pair[0] + 0.05) / (pair[1] + 0.05)];
            })
            .filter(([, contrast]) => contrast < 4.5);
        }"""
    )
    assert faint == [], "WCAG 2.2 asks for a contrast of 4.5"


def test_everything_has_a_name_and_the_keyboard_reaches_it(page: "Page") -> None:
    page.get_by_text("More options").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, a, canvas, progress")]
          .filter((e) => e.checkVisibility())
          .filter((e) => !e.labels?.length && !e.getAttribute("aria-labelledby"))
          .filter((e) => !e.ariaLabel && !e.textContent.trim())
          .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    page.get_by_role("button", name="knot", exact=True).focus()
    page.keyboard.press("Enter")
    page.get_by_text("knot.ply: 10,000 points").wait_for()
    before = picture(page)
    page.locator("#view").focus()
    page.keyboard.press("ArrowLeft")
    assert np.abs(picture(page) - before).any()
    page.keyboard.press("Home")
    np.testing.assert_array_equal(picture(page), before)
    reached = set()
    page.locator("#view").focus()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"show-points", "turn-up", "reset-view", "file", "resolution", "device", "start"} <= reached


def test_where_keys_are_in_use_the_page_asks_for_one(page: "Page", server: Process, cloud: Path) -> None:
    """Simulated by an answer of the server's: this one asks for none."""
    key = "Bearer sdf_secret"

    def guard(route: object) -> None:
        request = route.request  # type: ignore[attr-defined]
        if request.headers.get("authorization") == key:
            route.continue_()  # type: ignore[attr-defined]
        else:
            route.fulfill(  # type: ignore[attr-defined]
                status=401, content_type="application/problem+json", body='{"status": 401, "detail": "a key is needed"}'
            )

    page.route("**/v1/**", guard)
    page.reload()
    page.get_by_label("Key", exact=True).fill("sdf_secret")
    page.get_by_role("button", name="Use it").click()
    page.get_by_role("button", name="knot", exact=True).wait_for()
    assert page.locator("#key-form").is_hidden()
    start(page, cloud, preset="standard")
    wait_for_state(page, "running")
    page.locator("#cancel").click()
    wait_for_state(page, "cancelled")


def test_without_three_js_all_but_the_view_works(page: "Page", finished: str) -> None:
    page.route("**/three.js", lambda route: route.fulfill(status=404, body=""))
    page.reload()
    page.get_by_text("The viewer is not available").wait_for()
    open_job(page, finished)
    with page.expect_download() as started:
        page.get_by_role("button", name="GLB", exact=True).click()
    assert Path(started.value.path()).read_bytes()[:4] == b"glTF"


# What serves it


def test_the_installed_trimesh_carries_three_js() -> None:
    script = page_module.three_js()
    assert script is not None
    assert script.startswith(b"/**\n * @license\n * Copyright")
    assert b"WebGLRenderer" in script
    assert b"B64GLTF" not in script, "the library alone, without trimesh's own page"


def test_only_the_pages_own_files_are_served(server: Process) -> None:
    for name in ("main.js", "style.css", "three.js", "icon.svg"):
        answer = httpx.get(f"{server.url}/web/{name}")
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        tag = answer.headers["etag"]
        assert tag
    for name in ("../page.py", "%2e%2e%2fpage.py", "page.py", "main.js/x", ""):
        assert httpx.get(f"{server.url}/web/{name}").status_code in (404, 405)


def test_the_page_names_no_other_server(root: Path) -> None:
    for path in (root / "sdfserver" / "server" / "web").iterdir():
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text(encoding="utf-8"))
        assert [url for url in found if "www.w3.org" not in url] == [], path
