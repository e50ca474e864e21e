"""What protects the service from who may reach it: slow senders, other sites' pages in a browser, guesses at keys."""

import asyncio
import hashlib
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Mapping
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdfserver.server.problems import ProblemError
from sdfserver.server.settings import Settings
from sdfserver.server.views import JOBS

MAX_JSON_BYTES = 16 * 2**20
"""Of any body but a cloud and points as NPZ."""
STALL_SECONDS = 30.0
"""How long a body may stop coming."""
SLOW_SECONDS, SLOW_BYTES = 60.0, 1024
"""After so long a body must have come at this many bytes a second, or it never ends."""
GUESSES, GUESS_SECONDS = 20, 60.0
"""So many different wrong keys from one address in so long are guesses."""
ADDRESSES = 10_000


class Bounded:
    """Holds bodies to MAX_JSON_BYTES, but for files, which have limits of their own; and all to a bearable pace."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whose body is watched as it comes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared, received = int(dict(scope["headers"]).get(b"content-length", b"0")), 0
        is_file = scope["path"] == JOBS or scope["path"].endswith("/sdf.npz")
        limit = None if is_file else MAX_JSON_BYTES
        began, more = time.monotonic(), True

        async def bounded() -> Message:
            nonlocal received, more
            if not more:  # whoever asks now waits for the client to hang up
                return await receive()
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"nothing of the body came for {STALL_SECONDS:g} s; send it again") from None
            more = message.get("more_body", False)
            received += len(message.get("body", b""))
            if limit is not None and max(declared, received) > limit:
                raise HTTPException(413, f"the body has more than {limit:,} bytes; send less at a time")
            taken = time.monotonic() - began
            if more and taken > SLOW_SECONDS and received < SLOW_BYTES * taken:
                raise HTTPException(408, f"the body comes at less than {SLOW_BYTES} bytes a second; send it faster")
            return message

        await self._app(scope, bounded, send)


def check_browser(settings: Settings, method: str, headers: Mapping[str, str]) -> None:
    """Raise ProblemError where a page of another site asks, in a browser that can reach a server without keys.

    A name of that site's may lead to this very address (DNS rebinding), so a server for this machine alone goes by its
    own names only. Where there are keys none of this is needed: a page has none.
    """
    if settings.allow_public_without_keys:
        return
    host = headers.get("host", "")
    if not _is_local(host):
        raise ProblemError(
            "forbidden",
            f"this server answers to localhost, not to {host[:100]!r}; to have it answer to other names, create API "
            "keys, or set SDFSERVER_ALLOW_PUBLIC_WITHOUT_KEYS=1",
        )
    if method in ("GET", "HEAD", "OPTIONS"):
        return  # no answer of ours is readable to another site
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    foreign = site not in ("same-origin", "none") if site else origin is not None and urlsplit(origin).netloc != host
    if foreign:
        raise ProblemError("forbidden", f"pages of other sites may not use this server; this one is {origin!r}"[:300])


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Guesses:
    """Counts wrong keys by the address that sent them. A key that was right goes on, whoever else guesses there."""

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, tuple[float, set[bytes]]] = OrderedDict()
        self._right: set[bytes] = set()

    def check(self, address: str, secret: str) -> None:
        """Raise ProblemError where an address that guesses sends another key."""
        since, wrong = self._wrong.get(address, (0.0, set()))
        left = since + GUESS_SECONDS - time.monotonic()
        if len(wrong) >= GUESSES and left > 0 and _hash(secret) not in self._right:
            raise ProblemError(
                "guesses",
                f"{GUESSES} wrong API keys came from your address; wait {left:.0f} s",
                headers={"Retry-After": str(int(left) + 1)},
            )

    def tried(self, address: str, secret: str, *, right: bool) -> None:
        """Take note of how a key did."""
        key = _hash(secret)
        if right:
            self._right.add(key)
            return
        self._right.discard(key)
        since, wrong = self._wrong.pop(address, (0.0, set()))
        if time.monotonic() - since > GUESS_SECONDS:
            since, wrong = time.monotonic(), set()
        wrong.add(key)
        self._wrong[address] = since, wrong
        while len(self._wrong) > ADDRESSES:
            self._wrong.popitem(last=False)


def _hash(secret: str) -> bytes:
    return hashlib.blake2b(secret.encode(), digest_size=16).digest()
