"""Conditions of routes on header fields and query parameters. Pure.

Servers differ in how they read a field or parameter that occurs more than once, or whose name is spelt differently. A
condition is therefore decided for each reading. Where the readings disagree, the request is refused: a client that
could choose the reading could choose the cheaper route.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote_to_bytes

from api_gateway.errors import BadRequest

FieldValues = Mapping[bytes, Sequence[bytes]]  # the values of each field that a condition reads (lower case), in order

_ENCODED = re.compile(rb"[+%]")
NO_FIELDS: FieldValues = {}
MAX_PARAMETERS = 256  # of a query that a condition reads; some servers ignore those beyond a limit of their own


class RouteCondition(Protocol):
    """A condition of a route on a request, in addition to host, path and method."""

    def holds(self, query: bytes, fields: FieldValues) -> bool:
        """Return whether a request has it. Raises BadRequest if servers may read the request differently."""
        ...


@dataclass(frozen=True, slots=True)
class ValueTest:
    """The test of a value: it equals `exact`, or begins with `prefix`; if both are None, it need only be present."""

    exact: bytes | None = None
    prefix: bytes | None = None

    def __str__(self) -> str:
        if self.exact is not None:
            return f"= {self.exact.decode('utf-8', 'replace')!r}"
        if self.prefix is not None:
            return f"begins with {self.prefix.decode('utf-8', 'replace')!r}"
        return "is present"

    def accepts(self, value: bytes | None) -> bool:
        """Return whether a value passes; None: there is none."""
        if value is None:
            return False
        if self.exact is not None:
            return value == self.exact
        return self.prefix is None or value.startswith(self.prefix)


@dataclass(frozen=True, slots=True)
class FieldCondition:
    """A condition on a header field; `name` in lower case. Values are compared without surrounding white space.

    Some servers join several lines of a field, others take the first or the last one.
    """

    name: bytes
    test: ValueTest

    def __str__(self) -> str:
        return f"header {self.name.decode()} {self.test}"

    def holds(self, _query: bytes, fields: FieldValues) -> bool:
        """See `RouteCondition`."""
        values = fields.get(self.name)
        if not values:
            return False
        accepts = self.test.accepts
        found = accepts(values[0])
        if len(values) > 1:
            for value in (*values[1:], b", ".join(values), b",".join(values)):
                if accepts(value) is not found:
                    raise BadRequest(
                        f"The request is ambiguous: its route depends on {self.name.decode()}, which was sent"
                        f" {len(values)} times with different values."
                    )
        return found


@dataclass(frozen=True, slots=True)
class QueryCondition:
    """A condition on a query parameter, with name and value decoded (`+` is a space).

    Readings that servers disagree about: a parameter that occurs more than once; `;` between parameters; names in
    another letter case (ASP.NET), with brackets (PHP, Rails), or with `.` and blanks for `_` (PHP); `+` kept as it is;
    escapes decoded once more.
    """

    name: bytes
    test: ValueTest

    def __str__(self) -> str:
        return f"query {self.name.decode('utf-8', 'replace')} {self.test}"

    def holds(self, query: bytes, _fields: FieldValues) -> bool:
        """See `RouteCondition`."""
        if not query:
            return False
        if query.count(b"&") + query.count(b";") >= MAX_PARAMETERS:
            raise BadRequest(
                f"The request is ambiguous: its route depends on a query parameter, and it has more than"
                f" {MAX_PARAMETERS}."
            )
        accepts = self.test.accepts
        found = {accepts(value) for value in self._readings(query)}
        if len(found) > 1:
            raise BadRequest(
                "The request is ambiguous: its route depends on the query parameter"
                f" {self.name.decode('utf-8', 'replace')!r}, which servers may read differently."
            )
        return found.pop()

    def _readings(self, query: bytes) -> list[bytes | None]:
        """Return all values as which servers may read the parameter; None: it is absent."""
        exact: list[bytes | None] = []
        doubtful: list[bytes | None] = []
        for pair in query.split(b"&"):
            name, _, value = pair.partition(b"=")
            if _decoded(name) == self.name:
                exact.append(_decoded(value))
                if value.find(b"+") >= 0 or value.find(b"%25") >= 0:
                    doubtful += [unquote_to_bytes(value), _decoded(_decoded(value))]
            elif self._is_like(name):
                doubtful.append(_decoded(value))
        if query.find(b";") >= 0:
            for pair in query.replace(b";", b"&").split(b"&"):
                name, _, value = pair.partition(b"=")
                if self._is_like(name):
                    doubtful.append(_decoded(value))
        return [*(exact or [None]), *doubtful]

    def _is_like(self, name: bytes) -> bool:
        """Return whether some server may take `name`, as it was sent, for the parameter."""
        return _folded(_decoded(_decoded(name))) == _folded(self.name)


def _decoded(text: bytes) -> bytes:
    """Return a name or value of a query, decoded once (HTML standard, application/x-www-form-urlencoded)."""
    return unquote_to_bytes(text.replace(b"+", b" ")) if _ENCODED.search(text) else text


def _folded(name: bytes) -> bytes:
    """Return one form for all names that some servers take for one."""
    return name.partition(b"[")[0].partition(b"\0")[0].strip().lower().replace(b".", b"_").replace(b" ", b"_")


def meets(conditions: Sequence[RouteCondition], query: bytes, fields: FieldValues) -> bool:
    """Return whether a request meets all conditions. Raises BadRequest if it is ambiguous whether it does."""
    for condition in conditions:  # noqa: SIM110 - a generator takes longer
        if not condition.holds(query, fields):
            return False
    return True
