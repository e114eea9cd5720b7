"""The pages for browsers: the dashboard, the documentation of the API, and the list of pages at `/`.

Static files without data, so they need no token. They are read at the first request for one, and kept (0.4 MB).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from api_gateway.errors import NoRoute
from api_gateway.http1.headers import Fields
from api_gateway.models import HeaderList

# No inline script or style, nothing from elsewhere, in no frame. `data:` is for the icon.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
SECURITY_FIELDS: HeaderList = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
ENTRIES: Mapping[tuple[str, ...], str] = {
    ("",): "home.html",
    ("dashboard",): "dashboard.html",
    ("docs",): "docs.html",
}
FOLDER = "dashboard"  # in the package, and the first segment of the path of each file
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file as it is sent: its content, media type and entity tag (RFC 9110 section 8.8.3)."""

    body: bytes
    kind: bytes
    tag: bytes

    def response(self, fields: Fields) -> tuple[int, HeaderList, bytes]:
        """Return status, header fields and body for a request with these header fields."""
        headers = [*SECURITY_FIELDS, (b"etag", self.tag), (b"cache-control", b"no-cache")]
        if self._is_known(fields):
            return 304, headers, b""
        length = b"%d" % len(self.body)
        return 200, [*headers, (b"content-type", self.kind), (b"content-length", length)], self.body

    def _is_known(self, fields: Fields) -> bool:
        given = b",".join(fields.get(b"if-none-match", ()))
        tags = {tag.strip().removeprefix(b"W/") for tag in given.split(b",")}
        return self.tag in tags or b"*" in tags


class StaticPages:
    """The files by path. States: not read; read, after the first request."""

    def __init__(self) -> None:
        self._files: dict[str, StaticFile] | None = None

    def __repr__(self) -> str:
        return f"<StaticPages [{'not read' if self._files is None else len(self._files)}]>"

    @staticmethod
    def serves(segments: tuple[str, ...]) -> bool:
        """Return whether the path is that of a page or of a file of one, and not of an endpoint with data."""
        is_file = len(segments) > 1 and segments[0] == FOLDER and "." in segments[-1]
        return segments in ENTRIES or is_file

    @property
    def is_read(self) -> bool:
        """True once the files have been read."""
        return self._files is not None

    def read(self) -> None:
        """Read all files. Blocks."""
        self._files = _read()

    def find(self, segments: tuple[str, ...]) -> StaticFile:
        """Return a file that was read. Raises NoRoute if there is none at this path."""
        assert self._files is not None  # noqa: S101 - see the states
        name = ENTRIES.get(segments, "/".join(segments[1:]))
        if name not in self._files:
            raise NoRoute("No page has this path.")
        return self._files[name]


def _read() -> dict[str, StaticFile]:
    root = Path(str(files("api_gateway"))) / FOLDER
    found = {}
    for path in sorted(root.rglob("*")):
        if path.suffix in _TYPES:
            body = path.read_bytes()
            tag = b'"%s"' % hashlib.sha256(body).hexdigest()[:20].encode()
            found[path.relative_to(root).as_posix()] = StaticFile(body, _TYPES[path.suffix], tag)
    return found
