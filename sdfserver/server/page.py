"""The page people look at, at /: files of ours from web/, and three.js out of the installed trimesh.

The page uses /v1 alone, as anybody could. trimesh carries three.js for its own viewer, in one file with that: the
library is cut out of it, so that neither a copy is kept here nor a second toolchain is needed. Where a later trimesh
has it no more, the page says so in place of its viewer, and everything else on it works.
"""

import hashlib
import importlib.util
import zipfile
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

WEB = Path(__file__).parent / "web"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Cache-Control": "no-cache", "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
_START, _END = "/**\n * @license", "}));\n"

router = APIRouter(include_in_schema=False)


@router.get("/")
def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/web/three.js")
def three(request: Request) -> Response:
    """three.js, as a script that defines THREE."""
    script = three_js()
    if script is None:
        raise HTTPException(404, "the installed trimesh carries no three.js; install the version in pyproject.toml")
    tag = f'"{hashlib.sha256(script).hexdigest()[:16]}"'
    headers = _HEADERS | {"ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(script, media_type="text/javascript", headers=headers)


@router.get("/web/{name}")
def static(name: str) -> Response:
    """A file of the page's."""
    if name not in _names():
        raise HTTPException(404, "there is no such file")
    return _file(name)


@cache
def three_js() -> bytes | None:
    """The library, licence first; None where it is not found."""
    found = importlib.util.find_spec("trimesh")  # which does not import it: that takes a second and much memory
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / "resources" / "templates" / "viewer.zip"
        try:
            with zipfile.ZipFile(path) as archive:
                text = archive.read("viewer.html.template").decode()
            start = text.index(_START)
            return text[start : text.index(_END, start) + len(_END)].encode()
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            continue
    return None


@cache
def _names() -> frozenset[str]:
    return frozenset(path.name for path in WEB.iterdir() if path.suffix in _TYPES)


def _file(name: str) -> Response:
    path = WEB / name
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)
