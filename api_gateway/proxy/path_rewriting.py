"""The path that an upstream gets instead of the one that was sent. Pure."""

from dataclasses import dataclass

from api_gateway.errors import BadRequest
from api_gateway.proxy.value_template import ValueTemplate, path_parameters


@dataclass(frozen=True, slots=True)
class PathRewriting:
    """Replaces the path of requests of one route: `prefix` in place of the route's path, or `template` as a whole.

    The query stays as it was sent. Slashes at the beginning become one: servers may read what follows two as a host.
    """

    path: str  # of the route
    prefix: bytes | None = None
    template: ValueTemplate | None = None

    def target_of(self, raw_target: bytes) -> bytes:
        """Return the target for the upstream. Raises BadRequest if the path is spelt in an unusual way."""
        raw_path, question_mark, query = raw_target.partition(b"?")
        if self.template is not None:
            path = self.template.filled(path_parameters(self.path, raw_path))
        else:
            own = b"" if self.path == "/" else self.path.encode()
            if not raw_path.startswith(own) or raw_path[len(own) : len(own) + 1] not in (b"", b"/"):
                raise BadRequest(f"The prefix {self.path} cannot be replaced: the path spells it differently.")
            path = (self.prefix or b"") + raw_path[len(own) :]
        return b"/" + path.lstrip(b"/") + question_mark + query
