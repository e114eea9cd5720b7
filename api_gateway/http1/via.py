"""The gateway's entry in the field `Via` (RFC 9110 section 7.6.3), by which it recognises requests that return."""

from collections.abc import Iterable

DEFAULT_PSEUDONYM = "api-gateway"


class Via:
    """The entries under one pseudonym. Immutable."""

    def __init__(self, pseudonym: str = DEFAULT_PSEUDONYM) -> None:
        """`pseudonym` is a token that stands for the gateway's host and port."""
        self.pseudonym = pseudonym
        self._name = pseudonym.encode("ascii")
        self._known = self._name.lower()
        self._fields = {version: self._field(version) for version in ("1.0", "1.1", "2")}

    def __repr__(self) -> str:
        return f"<Via {self.pseudonym}>"

    def field(self, version: str) -> tuple[bytes, bytes]:
        """Return the header field for a message that was received in this version of HTTP, such as `1.1`."""
        return self._fields.get(version) or self._field(version)

    def is_in(self, values: Iterable[bytes]) -> bool:
        """Return whether an entry in one of these values of `Via` has the pseudonym, in any letter case."""
        entries = (entry.split(None, 2) for value in values for entry in value.split(b","))
        return any(len(entry) > 1 and entry[1].lower() == self._known for entry in entries)

    def _field(self, version: str) -> tuple[bytes, bytes]:
        return b"via", b"%b %b" % (version.encode("ascii"), self._name)
