"""The kinds of problem that the service names, as RFC 9457 has them. `type` is stable: programs may compare it."""

from collections.abc import Mapping
from typing import Any

from sdfserver.schemas import Problem

MEDIA_TYPE = "application/problem+json"

KINDS: Mapping[str, tuple[int, str]] = {
    "malformed": (400, "The request cannot be understood"),
    "unauthorized": (401, "An API key is needed"),
    "forbidden": (403, "This may not be asked from there"),
    "not-found": (404, "There is no such thing here"),
    "method": (405, "The method is not allowed here"),
    "slow": (408, "The request came too slowly"),
    "state": (409, "The job is not in a state for that"),
    "idempotency": (409, "The Idempotency-Key was used for another request"),
    "gone": (410, "The job and its files have been removed"),
    "too-large": (413, "The upload is too large"),
    "format": (415, "The format is not known"),
    "range": (416, "The range asked for is not in the file"),
    "invalid": (422, "A value is not allowed"),
    "cloud": (422, "The cloud cannot be reconstructed as it is"),
    "options": (422, "The options cannot be met"),
    "no-surface": (422, "The field has no surface at this level"),
    "divergence": (422, "The fit did not converge"),
    "queue-full": (429, "Too many jobs are waiting"),
    "guesses": (429, "Too many wrong API keys came from there"),
    "quota": (429, "The API key has too many unfinished jobs"),
    "internal": (500, "The server made a mistake"),
    "damaged": (500, "The file is damaged"),
    "died": (500, "The job's process died again and again"),
    "memory": (500, "The job needed too much memory"),
    "time": (500, "The job took too long"),
    "missing": (501, "The server lacks a package for that"),
    "not-ready": (503, "The service is not ready"),
    "disk-full": (507, "The server's disk is full"),
}


def problem(kind: str, detail: str, **more: Any) -> Problem:
    """The problem of this kind, with a detail that quotes the value and the remedy."""
    status, title = KINDS[kind]
    return Problem(type=f"urn:sdfserver:problem:{kind}", title=title, status=status, detail=detail, **more)


class ProblemError(Exception):
    """Raised where a request ends with a problem."""

    def __init__(self, kind: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(detail)
        self.problem = problem(kind, detail, **more)
        self.headers = dict(headers or {})
