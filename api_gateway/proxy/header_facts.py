"""The facts that the gateway reads from a request's header fields; remembered, because clients repeat them.

A plain head (see `http1.fast_parser`) is looked up by the bytes of its header lines. Others are read anew.

The module is long because both readings, of lines and of fields, must agree in what they forward.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from api_gateway.clients.api_keys import has_key
from api_gateway.clients.identity import client_id
from api_gateway.errors import ClientIdInvalid
from api_gateway.http1.fast_parser import InspectedHeaders, framing_of, is_plain_value, lines_of, remove_lines
from api_gateway.http1.forwarded import (
    BY_X_FORWARDED,
    ClientAddress,
    Forwarding,
    Hop,
    client_address,
    forwarding_fields,
    replaced_fields,
)
from api_gateway.http1.headers import (
    REQUEST_TIMEOUT,
    Fields,
    Network,
    ambiguity,
    connection_options,
    fields_of,
    host_name,
    inspected_headers,
    is_visible_ascii,
    is_within,
    stripped_headers,
    without_expectation,
)
from api_gateway.http1.request_head import RequestHead
from api_gateway.http1.via import Via
from api_gateway.models import Charge, Client, ClientCertificate, CorsFields, HeaderList
from api_gateway.proxy.cors import INSPECTED, Preflight, origin_of, preflight_of
from api_gateway.proxy.edited_lines import NOTHING_EDITED, EditedLines
from api_gateway.proxy.identity_sources import HEADER_AND_ADDRESS, Claim, IdentitySources, Proof
from api_gateway.proxy.request_id import given_request_id
from api_gateway.proxy.route_conditions import NO_FIELDS, FieldValues
from api_gateway.proxy.varying_value import VaryingValue, varying_value

MAX_INSPECTED = 32  # inspected header fields of a plain head
MAX_REMEMBERED_BYTES = 4_096  # size of the largest header section that is remembered
MAX_REMEMBERED = 1_024  # entries of each cache but the following
MAX_NAMED = 16_384  # client ids with their facts, about 1 KB each
MAX_FIRST = 256  # entries of the cache of whole header sections
_MAX_HOP_DIGITS = 9  # of Max-Forwards; a longer value is ignored
NONE_KEYED: Mapping[bytes, str] = {}
NONE_CHARGED: dict[tuple[str | None, str, float], list[Charge]] = {}  # replaced when the client is determined


class HeaderFacts:
    """The meaning of the header fields of requests from one address.

    `request_id`, `length`, `keep_alive`, `expectation` and `host_field` are set on the fast path only, `dropped` and
    `added` for plain heads only. `client`, `principal` and `priority` are set for the registry version `version`, and
    `charges` for `client` and `cost`; -1 means not yet known. `stages` are what `admission`, the one that was used
    last, has to decide on such requests. `claim` is the credential that decides who the client is, None without one;
    `further` are others, which must be valid too. `credentials` are the header fields that have a credential of this
    gateway. `proof` is what the claim proved, for the registry version `version`. `keyed` are the values of header
    fields that limits count by (for `/explain`, also `:organisation` and `:claim:PATH`), `charged` the charges by
    route, method and cost. `selecting` are the header fields that the conditions of routes read. `forged` are the
    header fields that only the gateway may send to upstreams. `edited` are the header lines that a
    route has edited last. `rest` are the facts of the other header fields, and `id_field` is the one with the client
    id, if the two are read separately.
    """

    __slots__ = (
        "accepts_trailers",
        "added",
        "admission",
        "ambiguity",
        "certificate",
        "charged",
        "charges",
        "claim",
        "client",
        "client_address",
        "cors",
        "cors_route",
        "cost",
        "credentials",
        "dropped",
        "edited",
        "expectation",
        "forged",
        "forwarding",
        "further",
        "host",
        "host_field",
        "id_field",
        "is_final_recipient",
        "is_length_required",
        "is_loop",
        "is_trusted",
        "keep_alive",
        "keyed",
        "length",
        "name",
        "name_error",
        "origin",
        "owner",
        "preflight",
        "principal",
        "priority",
        "proof",
        "reported",
        "request_id",
        "rest",
        "selecting",
        "stages",
        "timeout",
        "version",
    )

    is_loop: bool  # whether the request has passed this gateway before; `ambiguity` says so in words
    is_length_required: bool  # whether the fields may contain trailers; `ambiguity` says so in words
    length: int | None  # of the body in bytes; None if it is chunked
    expectation: HeaderList  # the field `Expect: 100-continue`, empty if there is none
    keep_alive: bool
    dropped: HeaderList  # fields that are not forwarded
    added: bytes  # lines that are appended for the upstream
    host_field: bytes  # the value of `Host` as received
    id_field: tuple[bytes, bytes]  # as received
    charges: list[Charge]
    principal: str | None  # for circuit breakers and fair shares
    priority: int

    def __init__(
        self,
        owner: object,
        host: str,
        client_address: str,
        is_trusted: bool,  # noqa: FBT001 - as above
        ambiguity: str | None,
        timeout: tuple[bytes, ...],
    ) -> None:
        self.owner = owner  # the `HeaderReader` whose configuration was used
        self.host = host
        self.client_address = client_address  # behind a trusted proxy, the one that it reports
        self.is_trusted = is_trusted  # whether the connection is that of a trusted proxy
        self.forwarding = BY_X_FORWARDED
        self.reported: Hop | None = None  # the element of a forwarding field with the client's address
        self.request_id: str | None = None
        self.ambiguity = ambiguity  # why the header fields alone rule the request out
        self.timeout = timeout  # the values of X-Request-Timeout
        self.name: str | None = None  # the client id
        self.name_error: str | None = None  # why the client id is invalid
        self.version = -1
        self.cost = -1.0
        self.client: Client | None = None
        self.accepts_trailers = False  # whether the response may have some
        self.is_length_required = False
        self.is_final_recipient = False  # of an OPTIONS request, by `Max-Forwards: 0`
        self.origin: bytes | None = None  # None also if no CORS policy is configured
        self.preflight: Preflight | None = None
        self.cors: CorsFields | None = None  # of responses by `cors_route`, the route that was used last
        self.cors_route: object = None
        self.claim: Claim | None = None
        self.further: tuple[Claim, ...] = ()
        self.credentials: HeaderList = []
        self.forged: HeaderList = []
        self.proof: Proof | None = None
        self.certificate: ClientCertificate | None = None  # of the connection
        self.keyed: Mapping[bytes, str] = NONE_KEYED
        self.charged = NONE_CHARGED
        self.selecting: FieldValues = NO_FIELDS
        self.rest: HeaderFacts | None = None
        self.edited: EditedLines = NOTHING_EDITED
        self.admission: object = None  # an `Admission`
        self.stages: tuple[Any, ...] | None = None  # None: not known yet

    def __repr__(self) -> str:
        return f"<HeaderFacts of {self.name or self.client_address!r}>"

    @property
    def credential_lines(self) -> bytes:
        """The header lines of `credentials`, without the last line break."""
        return b"\r\n".join(b"%b: %b" % pair for pair in self.credentials)

    def require_length(self, cause: str) -> None:
        """Have the request refused with 411, because its fields may contain trailers; `cause` is the detail."""
        self.is_length_required, self.ambiguity = True, cause

    def copy(self) -> "HeaderFacts":
        """Return the same facts without name, credential and client."""
        other = HeaderFacts(self.owner, self.host, self.client_address, self.is_trusted, self.ambiguity, self.timeout)
        other.request_id = self.request_id
        other.is_loop, other.length, other.keep_alive = self.is_loop, self.length, self.keep_alive
        other.expectation = self.expectation
        other.dropped, other.added, other.host_field = self.dropped, self.added, self.host_field
        other.origin, other.preflight, other.forged = self.origin, self.preflight, self.forged
        other.forwarding, other.reported = self.forwarding, self.reported
        other.keyed, other.selecting = self.keyed, self.selecting
        return other


class RewrittenHeaders(NamedTuple):
    """The header lines of a plain head as received, their meaning, and the lines as sent upstream.

    These do not depend on the credential, which is verified later. `varying` is the value in which the lines differ
    from those of the request before, None if that is not known.
    """

    received: bytes
    facts: HeaderFacts
    sent: bytes
    varying: VaryingValue | None = None


class HeaderReader:
    """Finds out what header fields mean under one configuration. Its only state is caches."""

    def __init__(
        self,
        *,
        id_header: str,
        trusted_proxies: Collection[Network],
        max_body_bytes: int,
        via: Via | None = None,
        sources: IdentitySources = HEADER_AND_ADDRESS,
        reads_origin: bool = False,
        identity_fields: frozenset[bytes] = frozenset(),
        forwarding: Forwarding = BY_X_FORWARDED,
        limit_fields: frozenset[bytes] = frozenset(),
        route_fields: frozenset[bytes] = frozenset(),
    ) -> None:
        """`id_header` identifies clients; it is forwarded even if `Connection` names it. `via` names this gateway.

        Credentials of `sources` are recognised, and not forwarded on the fast path; trailers with the names of their
        fields (`never_trailing`) never are. `reads_origin`: there are CORS policies, for which the origin of requests
        and their preflights matter. `identity_fields` (lower case) are set by the gateway for upstreams and removed
        from requests. `limit_fields` (lower case) are those that limits count by, `route_fields` those on which routes
        have conditions: upstreams must receive them as they were compared, so `Connection` cannot remove them, and
        other spellings of them are removed.
        """
        self.via = via or Via()
        self._sources = sources
        self._markers = sources.markers
        self._credential_lines = InspectedHeaders(sources.fields)
        self.id_header = id_header.lower().encode()
        self.protected = frozenset({self.id_header}) | identity_fields | route_fields
        self.never_trailing = self.protected | sources.fields
        self._identity_fields = identity_fields
        self._max_body_bytes = max_body_bytes
        self.forwarding = forwarding
        self._trusted = tuple(trusted_proxies)
        self._is_trusted = lru_cache(maxsize=4096)(lambda address: is_within(address, self._trusted))
        self._reads_origin = reads_origin
        self._limit_fields = limit_fields
        self._route_fields = route_fields
        inspected = inspected_headers(self.protected) | (INSPECTED if reads_origin else frozenset()) | limit_fields
        self._inspected = InspectedHeaders(inspected)
        # False if the client id is in a header field that has another meaning too, or is not forwarded.
        self._has_own_id_header = self.id_header not in inspected_headers(frozenset()) | identity_fields
        self._remembered = lru_cache(maxsize=MAX_REMEMBERED)(self._read_by_client)
        self._anonymous = lru_cache(maxsize=MAX_REMEMBERED)(self._read_plain)
        self._named = lru_cache(maxsize=MAX_NAMED)(self._with_id)
        self._claimed = lru_cache(maxsize=MAX_REMEMBERED)(self._read_claimed)
        self._certified = lru_cache(maxsize=MAX_REMEMBERED)(self._with_certificate)
        self._first = lru_cache(maxsize=MAX_FIRST)(self._read_anew)

    def __repr__(self) -> str:
        return f"<HeaderReader [{self._remembered.cache_info().currsize} header sets remembered]>"

    def read(self, peer: str, fields: Fields, version: str) -> HeaderFacts:
        """Return the facts of a request's fields. `peer` is the address of the connection."""
        is_trusted = self.is_trusted(peer)
        client = self.address_of(peer, fields) if is_trusted else None
        cause = ambiguity(fields, version)
        is_loop = cause is None and b"via" in fields and self.via.is_in(fields[b"via"])
        facts = HeaderFacts(
            self,
            host_name(fields),
            peer if client is None else client.address,
            is_trusted,
            f"its Via contains {self.via.pseudonym}, so it has passed this gateway before" if is_loop else cause,
            tuple(fields.get(REQUEST_TIMEOUT, ())),
        )
        facts.is_loop, facts.forwarding = is_loop, self.forwarding
        if client is not None:
            facts.reported = client.hop
        if self._reads_origin:
            facts.origin, facts.preflight = origin_of(fields), preflight_of(fields)
        if self._limit_fields:
            facts.keyed = {
                name: b", ".join(fields[name]).decode("latin-1") for name in self._limit_fields if fields.get(name)
            }
        if self._route_fields:
            facts.selecting = {name: fields[name] for name in self._route_fields if name in fields}
        self._set_name(facts, fields)
        if self._markers:
            self._set_claim(facts, fields)
        if self._identity_fields:
            facts.forged = [(name, value) for name in self._identity_fields for value in fields.get(name, ())]
        return facts

    def address_of(self, peer: str, fields: Fields) -> ClientAddress:
        """Return the client's address, and which hop it came from; `peer` is the address of the connection."""
        return client_address(peer, fields, self._trusted, self.forwarding.read)

    def is_trusted(self, peer: str) -> bool:
        """Return whether the peer of a connection is a trusted proxy."""
        return bool(self._trusted) and self._is_trusted(peer)

    def read_lines(
        self, peer: str, scheme: str, lines: bytes, max_lines: int, before: RewrittenHeaders | None = None
    ) -> RewrittenHeaders | None:
        """Return the meaning of the header lines of a plain head, and the lines for the upstream.

        None if the head is not plain: the general parser must read it. `before` are the header lines of an earlier
        request of the same connection. The lines of a first request are looked up as a whole, because a client that
        opens a connection for each request repeats them.
        """
        if before is None:
            read = self._first if len(lines) <= MAX_REMEMBERED_BYTES else self._read_anew
            return read(peer, scheme, lines, max_lines)
        varying = before.varying
        if varying is not None:
            value = varying.value_in(lines, before.received)
            facts = None if value is None else self._facts_with(before.facts, varying, value)
            if value is not None and facts is not None:
                return RewrittenHeaders(lines, facts, varying.sent_with(value, before.sent), varying)
        headers = self._read_anew(peer, scheme, lines, max_lines)
        return None if headers is None else self._compared(before, headers)

    def _read_anew(self, peer: str, scheme: str, lines: bytes, max_lines: int) -> RewrittenHeaders | None:
        """Find the inspected header fields, and look up their meaning."""
        found = self._inspected.find(lines)
        if found is None or len(found) > MAX_INSPECTED or lines.count(b"\n") - 1 > max_lines:
            return None
        is_short = len(lines) <= MAX_REMEMBERED_BYTES
        if self._may_have_credential(lines):
            given = tuple(self._credential_lines.find(lines) or ())
            claimed = self._claimed if is_short else self._read_claimed
            facts = claimed(peer, scheme, tuple(found), given)
        else:
            facts = (self._remembered if is_short else self._read_plain)(peer, scheme, tuple(found))
        return (
            None if facts is None else RewrittenHeaders(lines, facts, remove_lines(lines, facts.dropped) + facts.added)
        )

    def read_head(self, peer: str, scheme: str, head: RequestHead) -> RewrittenHeaders:
        """Return the facts of a head that the general parser has read, as `read_lines` does of header lines."""
        headers = head.headers
        fields = fields_of(headers)
        facts = self.read(peer, fields, head.version)
        if head.method == "OPTIONS" and b"max-forwards" in fields:
            headers, facts.is_final_recipient = _decremented(headers, fields[b"max-forwards"][0])
        facts.length, facts.keep_alive = head.length, head.keep_alive
        is_expected = head.expects_continue and head.length != 0
        if is_expected and head.has_body_begun:
            headers, is_expected = without_expectation(headers), False
        facts.expectation = [pair for pair in headers if pair[0].lower() == b"expect"] if is_expected else []
        facts.accepts_trailers = (
            head.method != "HEAD"
            and head.version != "1.0"
            and any(
                value.lower().find(b"trailers") >= 0
                for value in fields.get(b"te", ())  # RFC 9110 section 6.5.1
            )
        )
        facts.request_id = given_request_id(fields)
        facts.host_field = fields.get(b"host", (b"",))[0]
        withheld = {name.lower() for name, _ in facts.credentials}
        facts.credentials = [pair for pair in headers if pair[0].lower() in withheld]
        dropped, added = self._rewriting(facts, fields, peer, scheme)
        dropped |= withheld
        if b"connection" in fields:
            dropped |= connection_options(fields[b"connection"]) - self.protected - {b"transfer-encoding"}
        kept = [pair for pair in headers if pair[0].lower() not in dropped]
        sent = lines_of([*kept, *added, self.via.field(head.version)])
        return RewrittenHeaders(lines_of(headers), facts, sent)

    def certified(self, headers: RewrittenHeaders, certificate: ClientCertificate) -> RewrittenHeaders:
        """Return the facts of the header lines of a plain head on a connection with a certificate."""
        return RewrittenHeaders(headers.received, self._certified(headers.facts, certificate), headers.sent)

    def certify(self, facts: HeaderFacts, certificate: ClientCertificate) -> None:
        """Complete the facts of a request by the certificate of its connection."""
        facts.certificate = certificate
        facts.claim, facts.further = self._sources.with_certificate(
            facts.claim, facts.further, certificate, has_name=facts.name is not None
        )

    def _with_certificate(self, facts: HeaderFacts, certificate: ClientCertificate) -> HeaderFacts:
        """Return the facts of header lines, which connections with and without certificates share, with one."""
        other = facts.copy()
        other.name, other.name_error = facts.name, facts.name_error
        other.claim, other.further, other.credentials = facts.claim, facts.further, facts.credentials
        self.certify(other, certificate)
        return other

    def _rewriting(
        self, facts: HeaderFacts, fields: Fields, peer: str, scheme: str
    ) -> tuple[frozenset[bytes], HeaderList]:
        """Return the names of fields that are removed from any request, and the fields that are added to this one."""
        replaced = replaced_fields(self.forwarding, facts.is_trusted)
        added = forwarding_fields(
            fields,
            peer=peer,
            scheme=scheme,
            is_trusted=facts.is_trusted,
            forwarding=self.forwarding,
            reported=facts.reported,
        )
        return stripped_headers(self.protected, replaced) | self._identity_fields, added

    def _read_by_client(self, peer: str, scheme: str, found: tuple[tuple[bytes, bytes], ...]) -> HeaderFacts | None:
        """Return the facts, with the client id read separately from the other header fields.

        Header sets that differ only in the client id share the rest, which an invented id does not repeat.
        """
        names = [pair for pair in found if pair[0].lower() == self.id_header]
        if len(names) != 1 or not self._has_own_id_header:
            return self._read_plain(peer, scheme, found)
        anonymous = self._anonymous(peer, scheme, tuple([pair for pair in found if pair != names[0]]))
        if anonymous is None:
            return None
        facts = self._named(anonymous, names[0])
        if facts is None:
            facts = anonymous.copy()
            self._set_name(facts, fields_of(names))
        return facts

    @staticmethod
    def _with_id(rest: HeaderFacts, id_field: tuple[bytes, bytes]) -> HeaderFacts | None:
        """Return the facts of header fields with a client id and others; None if the id is not valid."""
        if not is_visible_ascii(id_field[1]) or has_key(id_field[1]):
            return None
        facts = rest.copy()
        facts.name, facts.id_field, facts.rest = id_field[1].decode("ascii"), id_field, rest
        return facts

    def _compared(self, before: RewrittenHeaders, headers: RewrittenHeaders) -> RewrittenHeaders:
        """Return header lines with the value in which they differ from earlier ones, if that is all.

        The inspected fields are the same if the facts are, but for the client id if the facts share the rest.
        """
        received, facts, sent, _ = headers
        known = before.facts
        is_other_client = facts is not known
        if is_other_client and (facts.rest is None or facts.rest is not known.rest):
            return headers
        varying = varying_value(before.received, received, sent)
        if varying is None:
            return headers
        is_known = varying.name == facts.id_field[0] if is_other_client else self._is_passed_on(varying.name)
        return RewrittenHeaders(received, facts, sent, varying) if is_known else headers

    def _is_passed_on(self, name: bytes) -> bool:
        """Return whether fields of this name never mean anything to the gateway."""
        line = b"\r\n%b: 1\r\n" % name
        return not self._inspected.find(line) and not self._credential_lines.find(line)

    def _facts_with(self, facts: HeaderFacts, varying: VaryingValue, value: bytes) -> HeaderFacts | None:
        """Return the facts of header lines that differ from earlier ones in one value; None if they must be read."""
        if facts.owner is not self or self._may_have_credential(value):
            return None
        if facts.rest is not None and varying.name == facts.id_field[0]:
            return self._named(facts.rest, (varying.name, value))
        return facts if is_plain_value(value) else None

    def _may_have_credential(self, lines: bytes) -> bool:
        """Return False if header lines have no credential of this gateway."""
        for marker in self._markers:  # noqa: SIM110 - a generator takes longer
            if lines.find(marker) >= 0:
                return True
        return False

    def _read_claimed(
        self, peer: str, scheme: str, found: tuple[tuple[bytes, bytes], ...], given: tuple[tuple[bytes, bytes], ...]
    ) -> HeaderFacts | None:
        """Return the facts of header fields, some of which (`given`) may have a credential.

        Header sets that differ only in the credential share the rest, which an invented one does not repeat.
        """
        anonymous = self._remembered(peer, scheme, found)
        if anonymous is None:
            return None
        facts = anonymous.copy()
        facts.name, facts.name_error = anonymous.name, anonymous.name_error
        self._set_claim(facts, fields_of(given))
        names = {name.lower() for name, _ in facts.credentials}
        facts.credentials = [pair for pair in given if pair[0].lower() in names]
        facts.dropped = facts.dropped + facts.credentials
        return facts

    def _set_claim(self, facts: HeaderFacts, fields: Fields) -> None:
        facts.claim, facts.further = self._sources.claims(fields, has_name=facts.name is not None)
        names = frozenset[bytes]().union(
            *(claim.names for claim in (facts.claim, *facts.further) if claim is not None)
        )
        if self.id_header in names:  # its value is a credential, and no id
            facts.name = facts.name_error = None
        if names:
            facts.credentials = [(name, value) for name in sorted(names) for value in fields.get(name, ())]

    def _read_plain(self, peer: str, scheme: str, found: tuple[tuple[bytes, bytes], ...]) -> HeaderFacts | None:
        fields = fields_of(found)
        framing = framing_of(fields)
        if framing is None or framing[0] > self._max_body_bytes:
            return None
        facts = self.read(peer, fields, "1.1")
        facts.length, facts.keep_alive = framing
        facts.expectation = [pair for pair in found if pair[0].lower() == b"expect"] if b"expect" in fields else []
        facts.request_id = given_request_id(fields)
        facts.host_field = fields.get(b"host", (b"",))[0]
        dropped, added = self._rewriting(facts, fields, peer, scheme)
        facts.dropped = [pair for pair in found if pair[0].lower() in dropped]
        facts.added = b"".join([b"%b: %b\r\n" % pair for pair in (*added, self.via.field("1.1"))])
        return facts

    def _set_name(self, facts: HeaderFacts, fields: Fields) -> None:
        try:
            facts.name = client_id(fields, self.id_header)
        except ClientIdInvalid as error:
            facts.name_error = error.detail


def _decremented(headers: HeaderList, hops: bytes) -> tuple[HeaderList, bool]:
    """Return header fields with a decremented `Max-Forwards`, and whether it was 0 (RFC 9110 section 7.6.2).

    Invalid values pass.
    """
    if not hops.isdigit() or len(hops) > _MAX_HOP_DIGITS:
        return headers, False
    left = b"%d" % (int(hops) - 1)
    changed = [(name, left if name.lower() == b"max-forwards" else value) for name, value in headers]
    return changed, int(hops) == 0
