"""The application of the listener for plain HTTP: redirects to https, and responds to challenges of ACME (RFC 8555).

`Location` has the host of the request if that is a name or an address; the port is configured, and the target is as
received. The redirect is 308, which keeps method and body.
"""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from api_gateway.errors import BadRequest, GatewayError, NoRoute, problem
from api_gateway.http1.asgi import Receive, Scope, Send
from api_gateway.http1.headers import fields_of, host_name
from api_gateway.models import HeaderList

CHALLENGES = "/.well-known/acme-challenge/"
HTTPS_PORT = 443
MAX_CHALLENGE = 4096  # bytes
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,256}")  # RFC 8555 section 8.3
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?|\[[0-9a-f:.]+\]")


class HttpsRedirect:
    """Redirects every request, except those for challenges if there is a folder of them."""

    def __init__(
        self,
        port: int,
        challenges: Path | None,
        is_known: Callable[[str], bool] | None = None,
        cors_fields: Callable[[HeaderList, bytes], HeaderList] | None = None,
    ) -> None:
        """`port` is that of https. `is_known` returns whether a host may be redirected to; None permits all.

        `cors_fields` returns those of the response to a request with these fields and this target: a browser follows
        a redirect for a page of another origin only if that page may read it.
        """
        self._port = b"" if port == HTTPS_PORT else b":%d" % port
        self._challenges = challenges
        self._is_known = is_known
        self._cors_fields = cors_fields

    def __repr__(self) -> str:
        return f"<HttpsRedirect [{'challenges of ' + str(self._challenges) if self._challenges else 'no challenges'}]>"

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        if self._challenges is not None and path.startswith(CHALLENGES):
            await self._challenge(self._challenges, unquote(path.removeprefix(CHALLENGES)), scope, send)
            return
        raw_path, query = scope["raw_path"], scope["query_string"]
        target = raw_path + b"?" + query if query else raw_path
        cors = [] if self._cors_fields is None else self._cors_fields(scope["headers"], target)
        host = host_name(fields_of(scope["headers"]))
        if _HOST.fullmatch(host) is None or not (self._is_known is None or self._is_known(host.strip("[]"))):
            error = BadRequest("This port redirects to https, and the request names no host of this gateway.")
            await _refuse(error, send, cors)
            return
        place = target if raw_path.startswith(b"/") else b"/" + target[len(raw_path) :]
        location = b"https://%b%b%b" % (host.encode(), self._port, place)
        await _send(send, 308, [(b"location", location), (b"content-length", b"0"), *cors], b"")

    @staticmethod
    async def _challenge(folder: Path, token: str, scope: Scope, send: Send) -> None:
        content = None
        if scope["method"] in ("GET", "HEAD") and _TOKEN.fullmatch(token) is not None:
            content = await asyncio.to_thread(_content_of, folder / token)
        if content is None:
            await _refuse(NoRoute("There is no such challenge."), send)
            return
        headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % len(content))]
        await _send(send, 200, headers, b"" if scope["method"] == "HEAD" else content)


def _content_of(file: Path) -> bytes | None:
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_CHALLENGE)
    except OSError:
        return None


async def _refuse(error: GatewayError, send: Send, more: HeaderList | None = None) -> None:
    body = json.dumps(problem(error, instance="")).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
    await _send(send, error.status, [*headers, *(more or [])], body)


async def _send(send: Send, status: int, headers: HeaderList, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
