"""Texts with placeholders, which are replaced by parts of a request: `{client}`, `{request_id}`, `{id}` of a path.

Pure. What a request contains is inserted as it was sent: percent-encoded parts of a path stay encoded, and whatever
is not visible ASCII, or a backslash or a quotation mark, is encoded. So no value ends a header line or a segment.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from api_gateway.errors import BadRequest
from api_gateway.proxy.path_table import is_placeholder

PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
OF_ANY_REQUEST = frozenset({"client", "request_id"})  # names that need no template in the route's path
OF_TARGETS = frozenset({"path", "query"})  # names that redirects may use

_UNSAFE = re.compile(rb"[^\x21\x23-\x5b\x5d-\x7e]")
# Values of a path parameter that a server may read as more than one segment, or as a segment of dots.
_MISLEADING = re.compile(rb"[/\\\x00]|\A[. ]*(?:;.*)?\Z")
_MOST_DECODED = 3  # times that a parameter may be percent-encoded
# A parameter that has one reading and that is inserted as it is; other ones are looked at more closely.
_PLAIN_PARAMETER = rb"([A-Za-z0-9_~-][A-Za-z0-9_~.-]*+)"


def inserted(value: bytes) -> bytes:
    """Return a value as it is inserted."""
    if _UNSAFE.search(value) is None:
        return value
    return _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], value)


@dataclass(frozen=True, slots=True)
class ValueTemplate:
    """A text with placeholders. `parts` are pairs: text, and the name of what follows it, empty at the end."""

    parts: tuple[tuple[bytes, str], ...]

    @classmethod
    def of(cls, text: str) -> "ValueTemplate":
        """Return the template that a text describes."""
        pieces = PLACEHOLDER.split(text)
        names = [*pieces[1::2], ""]
        return cls(tuple((piece.encode(), name) for piece, name in zip(pieces[::2], names, strict=True)))

    @classmethod
    def joined(cls, pieces: "Sequence[bytes | ValueTemplate]") -> "ValueTemplate":
        """Return the template of several texts and templates, one after the other."""
        parts: list[tuple[bytes, str]] = []
        text = b""
        for piece in pieces:
            for more, name in ((piece, ""),) if isinstance(piece, bytes) else piece.parts:
                text += more
                if name:
                    parts.append((text, name))
                    text = b""
        return cls((*parts, (text, "")))

    @property
    def names(self) -> frozenset[str]:
        """The names of the placeholders."""
        return frozenset(name for _, name in self.parts if name)

    @property
    def constant(self) -> bytes | None:
        """The text, if it has no placeholders."""
        return self.parts[0][0] if len(self.parts) == 1 else None

    def filled(self, values: Mapping[str, bytes]) -> bytes:
        """Return the text with the values in place of the placeholders."""
        return b"".join([text + inserted(values[name]) if name else text for text, name in self.parts])


@lru_cache(maxsize=4096)
def _plain_paths(template: str) -> tuple[re.Pattern[bytes], tuple[str, ...]]:
    """Return the pattern of the paths whose parameters have one reading, and the names of these."""
    segments = template.split("/")
    parts = [_PLAIN_PARAMETER if is_placeholder(one) else re.escape(one.encode()) for one in segments]
    return re.compile(b"/".join(parts) + b"/*"), tuple(one[1:-1] for one in segments if is_placeholder(one))


def path_parameters(template: str, raw_path: bytes) -> dict[str, bytes]:
    """Return the segments of a path, as sent, for which a template has placeholders.

    Raises BadRequest if they are not segments for every server: the path is spelt in an unusual way.
    """
    pattern, names = _plain_paths(template)
    plain = pattern.fullmatch(raw_path)
    if plain is not None:
        return dict(zip(names, plain.groups(), strict=True))
    mine, given = template.split("/"), raw_path.rstrip(b"/").split(b"/")
    if len(mine) != len(given):
        raise BadRequest(f"The path spells {template} in a way that servers read differently.")
    found: dict[str, bytes] = {}
    for own, segment in zip(mine, given, strict=True):
        if is_placeholder(own):
            decoded = segment
            for _ in range(_MOST_DECODED):
                decoded = unquote_to_bytes(decoded)
                if _MISLEADING.search(decoded) is not None:
                    raise BadRequest(f"Servers read {{{own[1:-1]}}} of {template} differently in this path.")
            found[own[1:-1]] = segment
        elif unquote_to_bytes(segment) != own.encode():
            raise BadRequest(f"The path spells {template} in a way that servers read differently.")
    return found
