"""Compression of responses, on routes that ask for it. Pure, except for the state of an encoder.

A response is compressed if its media type is listed, it is long enough, and nothing speaks against it: another coding,
`no-transform` (RFC 9111 section 5.2.2.6), a part of a representation (206), or a digest of its bytes. The coding is
the one with the highest weight in `Accept-Encoding` (RFC 9110 section 12.5.3); of equal ones, the first that is
configured. A response of unknown length is flushed with each piece, so that no event is held back.
"""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from api_gateway.http1.headers import BODILESS, Fields
from api_gateway.models import HeaderList

GZIP, ZSTD = b"gzip", b"zstd"
MOST_FREE_CONTEXTS = 4  # of Zstandard, by level: of 1.4 to 8.1 MB each
_MODES_OF_PACKAGE = "COMPRESSOBJ_FLUSH_BLOCK", "COMPRESSOBJ_FLUSH_FINISH"
_GZIP_WINDOW = 31  # of zlib: the largest, in the gzip format
_PARTIAL = 206
NOT_MODIFIED = 304
_WEIGHT = re.compile(rb"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)", re.IGNORECASE)
_DIGESTS = frozenset({b"content-digest", b"repr-digest", b"digest", b"content-md5"})
# Of a plain head: the fields other than media type and length that decide about compression, or that change the
# outcome.
_UNUSUAL = re.compile(
    rb"\r\n(?=[CcDdRrVv])(?i:content-(?:encoding|range|digest|md5)|repr-digest|digest|vary"
    rb"|cache-control: [^\r]*no-transform)"
)
_MEDIA_TYPE = re.compile(rb"\r\n(?i:content-type): ([^\r;]*)")
_LENGTH = re.compile(rb"\r\n(?i:content-length): ([0-9]*)")
_DROPPED = re.compile(rb"\r\n(?=[CcAa])(?i:content-length|accept-ranges):[^\r]*")
_STRONG_TAG = re.compile(rb"(\r\n(?i:etag): )(?!W/)")
_ACCEPTED = re.compile(rb"\r\n(?i:accept-encoding): ([^\r]*)")
_MOST_REMEMBERED = 64  # values of Accept-Encoding whose coding is remembered
VARIES = b"\r\nvary: Accept-Encoding"  # a line of a head
_REPLACED = frozenset({b"content-length", b"content-encoding", b"accept-ranges", b"etag", b"vary"})


class ContentEncoder(Protocol):
    """Compresses one response."""

    def encode(self, piece: bytes) -> bytes:
        """Return the compressed bytes that are ready after a piece, which may be none."""
        ...

    def end(self) -> bytes:
        """End the encoding; return its last bytes."""
        ...


class GzipEncoder:
    """Compresses by gzip. `flushes`: what was given is returned at once, at some cost in size."""

    def __init__(self, level: int, flushes: bool) -> None:  # noqa: FBT001 - see `NewEncoder`
        self._compressor = zlib.compressobj(level, zlib.DEFLATED, _GZIP_WINDOW)
        self._flushes = flushes

    def encode(self, piece: bytes) -> bytes:
        """See `ContentEncoder`."""
        ready = self._compressor.compress(piece)
        return ready + self._compressor.flush(zlib.Z_SYNC_FLUSH) if self._flushes and piece else ready

    def end(self) -> bytes:
        """See `ContentEncoder`."""
        return self._compressor.flush()


class ZstdEncoder:
    """Compresses by Zstandard. `flushes` as for `GzipEncoder`."""

    def __init__(self, compressor: Any, modes: tuple[int, int], flushes: bool, on_end: Callable[[], None]) -> None:  # noqa: FBT001
        """`compressor` has `compress(piece)` and `flush(mode)`: of Python 3.14, or of the package zstandard.

        `modes` are those that end a block and a frame. `on_end` is called when the frame is complete.
        """
        self._compressor = compressor
        self._block, self._frame = modes
        self._flushes = flushes
        self._on_end = on_end

    def encode(self, piece: bytes) -> bytes:
        """See `ContentEncoder`."""
        ready: bytes = self._compressor.compress(piece)
        return ready + self._compressor.flush(self._block) if self._flushes and piece else ready

    def end(self) -> bytes:
        """See `ContentEncoder`."""
        compressor, self._compressor = self._compressor, None  # another response may use it from now on
        rest: bytes = compressor.flush(self._frame)
        self._on_end()
        return rest


class ZstdContexts:
    """Makes encoders by Zstandard of one level, with the contexts that responses have released.

    To create a context takes longer than to compress a short response. Only a complete response releases its context:
    that of an aborted one still has its bytes, and is dropped.
    """

    def __init__(self, module: Any, level: int) -> None:
        """`module` is `compression.zstd` of Python 3.14, or the package zstandard."""
        self._new = partial(module.ZstdCompressor, level=level)
        self._is_standard = hasattr(module.ZstdCompressor, "FLUSH_BLOCK")
        modes = module.ZstdCompressor if self._is_standard else module
        names = ("FLUSH_BLOCK", "FLUSH_FRAME") if self._is_standard else _MODES_OF_PACKAGE
        self._modes: tuple[int, int] = (getattr(modes, names[0]), getattr(modes, names[1]))
        self._free: list[Any] = []

    def __repr__(self) -> str:
        return f"<ZstdContexts [{len(self._free)} free]>"

    def encoder(self, flushes: bool) -> ContentEncoder:  # noqa: FBT001 - see `NewEncoder`
        """Return the encoder of one response."""
        try:
            context = self._free.pop()
        except IndexError:
            context = self._new()
        compressor = context if self._is_standard else context.compressobj()
        return ZstdEncoder(compressor, self._modes, flushes, partial(self._release, context))

    def _release(self, context: Any) -> None:
        if len(self._free) < MOST_FREE_CONTEXTS:
            self._free.append(context)


NewEncoder = Callable[[bool], ContentEncoder]  # the argument: whether it flushes each piece
Coding = tuple[bytes, NewEncoder]


@dataclass(frozen=True, slots=True)
class Compression:
    """The terms of compression: `codings` are in the order of preference, `types` in lower case.

    A type may end with `/*`. `minimum` is in bytes; responses of unknown length are taken to be long enough.
    """

    codings: tuple[Coding, ...]
    types: frozenset[bytes]
    minimum: int
    _known: dict[tuple[bytes, ...], Coding | None] = field(init=False, repr=False, compare=False, default_factory=dict)

    def concerns(self, status: int, fields: Fields) -> bool:
        """Return whether a response may be compressed, for a client that accepts it."""
        if status in BODILESS or status == _PARTIAL or b"content-range" in fields or not _DIGESTS.isdisjoint(fields):
            return False
        if any(value.strip().lower() != b"identity" for value in fields.get(b"content-encoding", ())):
            return False
        if any(value.lower().find(b"no-transform") >= 0 for value in fields.get(b"cache-control", ())):
            return False
        lengths = fields.get(b"content-length")
        if lengths and lengths[0].isdigit() and int(lengths[0]) < self.minimum:
            return False
        return self._lists(fields.get(b"content-type", (b"",))[0].partition(b";")[0])

    def concerns_plain(self, status: int, head: bytes) -> bool | None:
        """Tell the same of a plain head by its lines; None if its fields have to be looked at, see `concerns`."""
        if status in BODILESS or status == _PARTIAL or _UNUSUAL.search(head) is not None:
            return None
        length, media_type = _LENGTH.search(head), _MEDIA_TYPE.search(head)
        if length is not None and int(length[1]) < self.minimum:
            return False
        return media_type is not None and self._lists(media_type[1])

    def _lists(self, media_type: bytes) -> bool:
        media_type = media_type.strip().lower()
        return media_type in self.types or media_type.partition(b"/")[0] + b"/*" in self.types

    def plain_head(self, head: bytes, coding: bytes) -> bytes:
        """Return a plain head that it concerns, compressed by `coding`; see `headers`."""
        return b"%b%b\r\ncontent-encoding: %b" % (
            _STRONG_TAG.sub(rb"\1W/", _DROPPED.sub(b"", head)),
            VARIES,
            coding,
        )

    def revalidated(self, headers: HeaderList, *, is_accepted: bool) -> HeaderList:
        """Return the header fields of a 304. `is_accepted`: the client accepts compression.

        Its stored response then has the weak tag, so the 304 must have it too (RFC 9111 section 4.3.4).
        """
        return self.headers([_weak(pair) for pair in headers] if is_accepted else headers, None)

    def coding_for(self, lines: bytes) -> Coding | None:
        """Return the coding for a request by its header lines. Clients repeat themselves, so it is remembered."""
        accepted = tuple(_ACCEPTED.findall(lines))
        if accepted not in self._known:
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[accepted] = self.coding(accepted)
        return self._known[accepted]

    def coding(self, accepted: Sequence[bytes]) -> Coding | None:
        """Return the coding for the values of `Accept-Encoding`, None for the response as it is."""
        weights = weights_of(accepted)
        best, found = 0.0, None
        for name, new in self.codings:
            weight = weights.get(name, weights.get(b"x-" + name, weights.get(b"*", 0.0)))
            if weight > best:
                best, found = weight, (name, new)
        return None if found is None or best < weights.get(b"identity", 0.0) else found

    def headers(self, headers: HeaderList, coding: bytes | None) -> HeaderList:
        """Return the header fields of a response that it concerns, compressed by `coding` or, if None, as it is.

        An entity tag becomes a weak one, because the bytes differ (RFC 9110 section 8.8.1).
        """
        vary = [value for name, value in headers if name.lower() == b"vary"]
        is_varied = any(
            one.strip().lower() in (b"*", b"accept-encoding") for value in vary for one in value.split(b",")
        )
        if coding is None:
            return headers if is_varied else [*headers, (b"vary", b"Accept-Encoding")]
        kept = [pair for pair in headers if pair[0].lower() not in _REPLACED]
        for name, value in headers:
            if name.lower() == b"etag":
                kept.append(_weak((name, value)))
            elif name.lower() == b"vary":
                kept.append((name, value))
        if not is_varied:
            kept.append((b"vary", b"Accept-Encoding"))
        return [*kept, (b"content-encoding", coding)]


def _weak(field: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """Return a header field, with a weak tag if it is an entity tag."""
    name, value = field
    return (name, b"W/" + value) if name.lower() == b"etag" and not value.startswith(b"W/") else field


def weights_of(accepted: Sequence[bytes]) -> Mapping[bytes, float]:
    """Return the weight of each coding in `Accept-Encoding`; an element that is not valid counts as 0."""
    found: dict[bytes, float] = {}
    for element in b",".join(accepted).split(b","):
        name, *parameters = [part.strip() for part in element.split(b";")]
        weight = 1.0
        for parameter in parameters:
            valid = _WEIGHT.fullmatch(parameter)
            weight = float(valid[1]) if valid is not None else 0.0
        if name:
            found[name.lower()] = weight
    return found
