"""The cost that the content of a response states, such as the tokens that a language model has used.

Only responses of routes with `cost_from` are scanned, while they are forwarded. JSON and event streams are scanned,
also if they are compressed by gzip or deflate. For any other response, or one without a valid number, `otherwise`
applies.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from api_gateway.http1.headers import Fields
from api_gateway.proxy.event_scanner import EventScanner
from api_gateway.proxy.json_scanner import JsonScanner

MAX_CONTENT_COST = 1_000_000_000  # tokens
MAX_DECODED = 8_388_608  # bytes of a compressed response, after decompression, that are scanned
_SLICE = 16_384  # bytes that are decompressed or scanned at once
# Steps of the scanner, of some 1 µs each, that a response may take at once, and that each byte of it adds. Without a
# limit, 8 KB that decompress to 8 MiB of small values would take seconds, in which nothing else is served. Usual JSON
# and events take a tenth of a step for each byte of text.
_STEPS_AT_ONCE, _STEPS_PER_BYTE = 20_000, 0.5
_STEPS_AT_ONCE_OF_COMPRESSED, _STEPS_PER_COMPRESSED_BYTE = 50_000, 20
_WINDOW = 47  # of zlib: the largest, for gzip and zlib formats
_CODINGS = frozenset({b"gzip", b"x-gzip", b"deflate"})

# The terms, the cost that was found, and whether the response is complete.
OnCost = Callable[["ContentCost", float | None, bool], None]


@dataclass(frozen=True, slots=True)
class ContentCost:
    """Where a response states its cost.

    `path` are the tokens of a JSON pointer to a number; `per` of its units cost one token. `otherwise` is the cost in
    tokens if there is no such number, None for the cost that was reserved.
    """

    path: tuple[str, ...]
    per: float = 1.0
    otherwise: float | None = None

    def scan(self, fields: Fields, on_cost: OnCost) -> "ContentScan":
        """Begin to follow a response with these header fields; `on_cost` is called once, at its end."""
        media_type = fields.get(b"content-type", (b"",))[0].partition(b";")[0].strip().lower()
        coding = b",".join(fields.get(b"content-encoding", ())).strip().lower()
        scanner: JsonScanner | EventScanner | None = None
        if coding in (b"", b"identity") or coding in _CODINGS:
            if media_type == b"text/event-stream":
                scanner = EventScanner(self.path)
            elif media_type.endswith((b"/json", b"+json")):
                scanner = JsonScanner(self.path)
        return ContentScan(self, scanner, on_cost, is_compressed=coding in _CODINGS)

    def cost_of(self, value: float | None) -> float | None:
        """Return the cost in tokens that a number states, None if it is none."""
        if value is None or not 0 <= value / self.per <= MAX_CONTENT_COST:
            return None
        return abs(round(value / self.per, 9))  # -0 is 0


class ContentScan:
    """Follows the content of one response. States: open, and over after `end`, which counts once."""

    __slots__ = ("_cost", "_decoded", "_decompressor", "_on_cost", "_scanner", "_steps", "is_over")

    def __init__(
        self,
        cost: ContentCost,
        scanner: JsonScanner | EventScanner | None,
        on_cost: OnCost,
        *,
        is_compressed: bool,
    ) -> None:
        """`scanner` None: the response cannot be scanned."""
        self._cost = cost
        self._scanner = scanner
        self._on_cost = on_cost
        self._decompressor = zlib.decompressobj(_WINDOW) if is_compressed else None
        self._decoded = 0
        self._steps = _STEPS_AT_ONCE_OF_COMPRESSED if is_compressed else _STEPS_AT_ONCE  # that may be taken
        self.is_over = False

    def __repr__(self) -> str:
        return f"<ContentScan [{'over' if self.is_over else 'open'}] {self._scanner!r}>"

    def feed(self, piece: bytes) -> None:
        """Follow a forwarded piece."""
        if self._scanner is None:
            return
        if self._decompressor is None:
            self._feed_plain(piece)
            return
        try:
            self._feed_compressed(piece)
        except zlib.error:
            self._scanner = None

    def _feed_plain(self, piece: bytes) -> None:
        for at in range(0, len(piece), _SLICE):
            content = piece[at : at + _SLICE]
            self._steps = min(self._steps + int(len(content) * _STEPS_PER_BYTE), _STEPS_AT_ONCE)
            self._scan(content)
            if self._scanner is None:
                return

    def _scan(self, content: bytes) -> None:
        """Scan content; give up if it takes more steps than are left."""
        if self._scanner is None:
            return
        before = self._scanner.steps
        self._scanner.feed(content)
        self._steps -= self._scanner.steps - before
        if self._steps < 0:
            self._scanner = None

    def _feed_compressed(self, piece: bytes) -> None:
        self._steps = min(self._steps + len(piece) * _STEPS_PER_COMPRESSED_BYTE, _STEPS_AT_ONCE_OF_COMPRESSED)
        while piece and self._scanner is not None and self._decompressor is not None:
            content = self._decompressor.decompress(piece, _SLICE)
            self._decoded += len(content)
            if self._decoded > MAX_DECODED:
                self._scanner = None
                return
            self._scan(content)
            piece = self._decompressor.unconsumed_tail
            if self._decompressor.eof:  # another member may follow (RFC 1952)
                piece, self._decompressor = self._decompressor.unused_data, zlib.decompressobj(_WINDOW)

    def end(self, *, is_complete: bool) -> None:
        """Report the cost at the end of the response; if it or its JSON text was cut off, the last complete number."""
        if self.is_over:
            return
        self.is_over = True
        value = None
        is_complete = is_complete or (isinstance(self._scanner, EventScanner) and self._scanner.is_done)
        if self._scanner is not None:
            is_complete = is_complete and self._scanner.finish()
            value = self._scanner.value
        self._on_cost(self._cost, self._cost.cost_of(value), is_complete)
