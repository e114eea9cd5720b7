"""The head of a request as a value: what a parser yields, whichever parser it is."""

from api_gateway.models import HeaderList


class RequestHead:
    """The head of one request, with everything that its framing and its connection depend on.

    `target` is in origin form (path and query) or `*`; `Host` in `headers` has replaced the authority of an absolute
    form (RFC 9112 section 3.2.2). `version` is "1.0" or "1.1". `length` is that of the body in bytes, None if it is
    chunked. `keep_alive` is whether the client may send another request. `upgrade` is the requested protocol if the
    gateway supports it, otherwise empty. `expects_continue`: the client asks for 100 (Continue) before it sends the
    body. `has_body_begun`: it has not waited, as bytes of the body have come with the head.
    """

    __slots__ = (
        "expects_continue",
        "has_body_begun",
        "headers",
        "keep_alive",
        "length",
        "method",
        "target",
        "upgrade",
        "version",
    )

    def __init__(
        self, method: str, target: bytes, headers: HeaderList, version: str, length: int | None, *, keep_alive: bool
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.version = version
        self.length = length
        self.keep_alive = keep_alive
        self.expects_continue = self.has_body_begun = False
        self.upgrade = b""

    def __repr__(self) -> str:
        return f"<RequestHead {self.method} {self.target!r} [{len(self.headers)} header fields, body {self.length}]>"
