"""Direct responses: those that a route gives in place of an upstream, static or a redirect. Pure."""

from dataclasses import dataclass

from api_gateway.http1.headers import BODILESS
from api_gateway.models import HeaderList
from api_gateway.proxy.path_table import is_placeholder
from api_gateway.proxy.value_template import ValueTemplate, path_parameters


@dataclass(frozen=True, slots=True)
class DirectResponse:
    """The response to all requests of a route. `location` is the template of a redirect, None if it is none.

    `path` is that of the route if it is a template whose placeholders the location uses, else empty. `root` is what an
    application that mounts the gateway has stripped from paths: it comes before a location without a host.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    location: ValueTemplate | None = None
    path: str = ""
    root: bytes = b""

    def fields(self, raw_target: bytes) -> HeaderList:
        """Return the header fields for a request, Content-Length included. Raises BadRequest for an unusual path."""
        headers = [*self.headers]
        if self.location is not None:
            headers.append((b"location", self._location(self.location, raw_target)))
        if self.body and not any(name.lower() == b"content-type" for name, _ in headers):
            headers.append((b"content-type", b"text/plain; charset=utf-8"))
        if self.status not in BODILESS:
            headers.append((b"content-length", b"%d" % len(self.body)))
        return headers

    def _location(self, location: ValueTemplate, raw_target: bytes) -> bytes:
        """Return where the client is sent: never to another host than the template names.

        The template begins with a scheme and a host, or with a slash and no other one. Slashes at the beginning of the
        path are merged, because two of them would begin a host.
        """
        raw_path, question_mark, query = raw_target.partition(b"?")
        values = {"path": b"/" + raw_path.lstrip(b"/\\"), "query": question_mark + query}
        if self.path and any(is_placeholder(segment) for segment in self.path.split("/")):
            values |= path_parameters(self.path, raw_path)
        found = location.filled(values)
        return self.root + found if found.startswith(b"/") else found
