"""Tracing of exchanges: begins or continues the trace of each, and selects those that are exported."""

import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from api_gateway.models import SPAN_ID, TRACE_ID, Exchange, Trace
from api_gateway.observability.trace_context import RANDOM, SAMPLED, ParentContext

Parent = Literal["obey", "ignore", "restart"]

_RANDOM_BITS = 56  # of a trace id, at its end (W3C Trace Context Level 2)
_RANDOM_LENGTH = _RANDOM_BITS // 4  # digits
# Places in `Trace.fields`. Numbers, because compiled code takes a slice object for an index of bytes.
_RANDOM_START, _RANDOM_END = int(TRACE_ID.stop - _RANDOM_LENGTH), int(TRACE_ID.stop)
_SPAN_START, _SPAN_END = int(SPAN_ID.start), int(SPAN_ID.stop)
_NEVER = 2**_RANDOM_BITS  # the threshold that no trace reaches
_SERVER_ERROR, _ERROR, _SWITCHED = 500, 400, 101
_FLAGS = (b"00", b"01", b"02", b"03")
_TRACEPARENT = b"\r\ntraceparent: 00-%b-%b-%b"
_BLOCK = 64  # traces that are made at once
_IDS = struct.Struct("32s16s" * _BLOCK)  # the digits of each trace, and of the span of its first attempt
_NEW_FIELDS = b",".join([_TRACEPARENT % (b"%b", b"%b", b"02")] * _BLOCK)  # random, and not sampled


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which exchanges are exported.

    `ratio` is the share of traces, by their id. `parent` is what the client's decision means: `obey`: it decides;
    `ignore`: the ratio decides, in the client's trace; `restart`: the ratio decides, in a trace of its own. Besides,
    exchanges with an error, and those whose response took `slow_after` seconds, are exported, `max_kept` in a second.
    """

    ratio: float = 1.0
    parent: Parent = "obey"
    keep_errors: bool = True
    slow_after: float | None = None
    max_kept: int = 100


class Tracer:
    """Begins the trace of each exchange, and passes on those that are exported when they have ended.

    One for each configuration. Its state is the next traces that begin here, and the number of exchanges kept in the
    current second.
    """

    def __init__(
        self,
        sampling: Sampling,
        export: Callable[[Exchange], object],
        source: random.Random | None = None,
    ) -> None:
        """`export` must not block. `source` is that of ids, which differ and are not secret."""
        self._sampling = sampling
        self._export = export
        self._random_bytes = (source or random.Random()).randbytes  # noqa: S311 - as above
        threshold = round((1 - sampling.ratio) * _NEVER)
        self._threshold = b"%014x" % threshold if threshold < _NEVER else b"never"  # which is above all digits
        self._slow_after = math.inf if sampling.slow_after is None else sampling.slow_after
        self._new: list[Trace] = []
        self._second = 0
        self._kept = 0

    def __repr__(self) -> str:
        return f"<Tracer {self._sampling}>"

    def begin(self, parent: ParentContext | None, state: bytes) -> Trace:
        """Return the trace of an exchange, given what the client has sent (see `trace_context.split_lines`)."""
        if not self._new:
            self._make_traces()
        trace = self._new.pop()
        if parent is not None:
            if self._sampling.parent == "restart":
                trace.link = parent.trace_id, parent.span_id
            else:
                self._continue(trace, parent, state)
        return trace

    def _continue(self, trace: Trace, parent: ParentContext, state: bytes) -> None:
        """Begin the gateway's span in the client's trace: sampled as the client says (`obey`), or by the ratio."""
        trace_id = parent.trace_id.encode()
        if self._sampling.parent == "obey":
            is_sampled = bool(parent.flags & SAMPLED)
        else:
            is_sampled = trace_id[-_RANDOM_LENGTH:] >= self._threshold
        fields = _TRACEPARENT % (
            trace_id,
            trace.fields[_SPAN_START:_SPAN_END],
            _FLAGS[parent.flags & RANDOM | is_sampled],
        )
        trace.fields = fields + b"\r\ntracestate: %b" % state if state else fields
        trace.is_sampled, trace.parent_id, trace.state = is_sampled, parent.span_id, state

    def _make_traces(self) -> None:
        """Make the next traces that begin here, because making several at once costs less.

        The ratio selects a trace by its id alone, so each gateway selects the same ones. Digits compare as numbers do.
        """
        threshold, digits = self._threshold, self._random_bytes(_IDS.size // 2).hex().encode()
        new = self._new
        for fields in (_NEW_FIELDS % _IDS.unpack(digits)).split(b","):
            trace = Trace()
            if fields[_RANDOM_START:_RANDOM_END] >= threshold:
                trace.fields, trace.is_sampled = fields[:-1] + b"3", True
            else:
                trace.fields = fields
            new.append(trace)

    def record(self, exchange: Exchange) -> None:
        """Export an ended exchange if it is sampled or kept."""
        trace = exchange.trace
        if trace is None:
            return
        if not trace.is_sampled:
            if (
                exchange.reason is None
                and exchange.status < _SERVER_ERROR
                and exchange.finished - exchange.started < self._slow_after
            ):
                return  # `_is_kept`, inlined for nearly all
            if not self._is_kept(exchange):
                return
        self._export(exchange)

    def _is_kept(self, exchange: Exchange) -> bool:
        """Return whether an exchange that is not sampled is exported: it has failed, or its response was slow.

        The time of a response is that to its head: streams and tunnels may last long.
        """
        status, end, head_at = exchange.status, exchange.finished, exchange.head_at
        if status < _SERVER_ERROR and exchange.reason is None:
            is_failed = False
        else:
            is_failed = self._sampling.keep_errors and (status >= _SERVER_ERROR or status < _ERROR)
        if not is_failed:
            took = (end if head_at is None else head_at) - exchange.started
            if took < self._slow_after or status == _SWITCHED:
                return False
        second = int(end)
        if second != self._second:
            self._second, self._kept = second, 0
        self._kept += 1
        return self._kept <= self._sampling.max_kept
