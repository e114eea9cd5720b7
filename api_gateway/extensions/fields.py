"""Header fields as extensions see and change them: a mapping without letter case, and changes that are safe."""

import re
from collections.abc import Iterator, Mapping

from api_gateway.http1.headers import GATEWAY_HEADERS, HOP_BY_HOP, cgi_form
from api_gateway.models import HeaderList

FieldChanges = Mapping[str, str | None]
FieldChange = tuple[bytes, bytes | None]

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_VALUE = re.compile(r"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
_FRAMING = HOP_BY_HOP | {b"content-length", b"host", b"via", b"x-request-id"}
REQUEST_FIXED = _FRAMING | {b"expect", b"x-gateway-cost", b"x-request-timeout"}
RESPONSE_FIXED = _FRAMING | GATEWAY_HEADERS | {b"date", b"ratelimit", b"ratelimit-policy"}


class FieldsView(Mapping[str, str]):
    """The header fields of a message. Names have no letter case; several values of one name are joined by commas."""

    __slots__ = ("_pairs", "_values")

    def __init__(self, pairs: HeaderList) -> None:
        self._pairs = tuple(pairs)
        self._values: dict[str, str] | None = None

    def __repr__(self) -> str:
        return f"<FieldsView {', '.join(self)}>"  # values may be secret

    def __getitem__(self, name: str) -> str:
        return self._by_name()[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name())

    def __len__(self) -> int:
        return len(self._by_name())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._by_name()

    def all(self, name: str) -> list[str]:
        """Return the values of all fields with this name, in their order."""
        lower = name.lower().encode("latin-1", "replace")
        return [value.decode("latin-1") for key, value in self._pairs if key.lower() == lower]

    def changed(self, changes: list[FieldChange]) -> "FieldsView":
        """Return these fields with the changes of a hook."""
        return FieldsView(changed_pairs(list(self._pairs), changes))

    def _by_name(self) -> dict[str, str]:
        if self._values is None:
            self._values = {}
            for key, value in self._pairs:
                name, text = key.decode("latin-1").lower(), value.decode("latin-1")
                self._values[name] = f"{self._values[name]}, {text}" if name in self._values else text
        return self._values


def checked_changes(changes: FieldChanges, fixed: frozenset[bytes]) -> list[FieldChange]:
    """Return the changes as bytes. Raises ValueError that names the field, TypeError if something is not text.

    Fields in `fixed` frame the message, belong to one connection, or are the gateway's own.
    """
    if not isinstance(changes, Mapping):
        raise TypeError(f"changes of header fields must be a mapping or None, got {type(changes).__name__}")
    found: list[FieldChange] = []
    for given, value in changes.items():
        if not isinstance(given, str) or _NAME.fullmatch(given) is None:
            raise ValueError(f"{given!r} is not the name of a header field")
        name = str.__str__(given)  # the methods of a subclass are code of the extension
        if name.lower().encode() in fixed:
            raise ValueError(f"the header field {name} cannot be changed: it belongs to the connection or the gateway")
        found.append((name.encode(), None if value is None else _checked_value(name, value)))
    return found


def _checked_value(name: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise TypeError(f"the value of the header field {name} must be text or None, got {type(value).__name__}")
    if _VALUE.fullmatch(value) is None:
        raise ValueError(f"the value of the header field {name} has a line break, a control character or outer space")
    return str.__str__(value).encode("latin-1")


def changed_pairs(pairs: HeaderList, changes: list[FieldChange]) -> HeaderList:
    """Return header fields with changes: fields of a name are replaced by one at the end, or removed.

    A name stands for its spellings with underscores too, which CGI does not distinguish: a client could otherwise have
    its own value read in place of the one that is set.
    """
    names = {cgi_form(name) for name, _ in changes}
    kept = [pair for pair in pairs if cgi_form(pair[0]) not in names]
    return kept + [(name, value) for name, value in changes if value is not None]


def changed_lines(lines: bytes, changes: list[FieldChange]) -> bytes:
    """Return header lines (from the line break before to the one after them, or without the latter) with changes.

    See `changed_pairs`.
    """
    names = {cgi_form(name) for name, _ in changes}
    first, *rest = lines.split(b"\r\n")
    kept = [line for line in rest if cgi_form(line.partition(b":")[0]) not in names]
    end = [kept.pop()] if kept and not kept[-1] else []
    added = [b"%b: %b" % (name, value) for name, value in changes if value is not None]
    return b"\r\n".join([first, *kept, *added, *end])
