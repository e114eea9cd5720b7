"""Tracing of exchanges: the trace that each belongs to, and which are exported."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from api_gateway.models import Exchange, HeaderList, Trace
from api_gateway.observability.trace_context import (
    FIELD_NAMES,
    RANDOM,
    SAMPLED,
    ParentContext,
    split_lines,
    split_pairs,
)

Parent = Literal["obey", "ignore", "restart"]

_RANDOM_BITS = 56  # of a trace id, at its end (W3C Trace Context Level 2)
_FIRST_RANDOM_DIGIT = 32 - _RANDOM_BITS // 4
_NEVER = 2**_RANDOM_BITS  # the threshold that no trace reaches
_SERVER_ERROR, _ERROR, _SWITCHED = 500, 400, 101
_FLAGS = ("00", "01", "02", "03")


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

    One for each configuration. Its state is the number of exchanges kept in the present second.
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
        self._random_bits = (source or random.Random()).getrandbits  # noqa: S311 - as above
        self._threshold = round((1 - sampling.ratio) * _NEVER)
        self._slow_after = math.inf if sampling.slow_after is None else sampling.slow_after
        self._second = 0
        self._kept = 0

    def __repr__(self) -> str:
        return f"<Tracer {self._sampling}>"

    def begin(self, lines: bytes) -> tuple[bytes, Trace]:
        """Return the header lines of a plain head without the trace context, and the trace of the exchange."""
        if lines.lower().find(FIELD_NAMES) < 0:
            return lines, self._new(None)
        lines, parent, state = split_lines(lines)
        return lines, self._new(None) if parent is None else self._continued(parent, state)

    def begin_parsed(self, headers: HeaderList) -> tuple[HeaderList, Trace]:
        """Do as `begin`, with header fields."""
        kept, parent, state = split_pairs(headers)
        return kept, self._new(None) if parent is None else self._continued(parent, state)

    def _continued(self, parent: ParentContext, state: bytes) -> Trace:
        policy = self._sampling.parent
        if policy == "restart":
            return self._new(parent)
        ids = f"{self._random_bits(128):032x}"
        is_sampled = bool(parent.flags & SAMPLED) if policy == "obey" else self._is_chosen(parent.trace_id)
        flags = _FLAGS[parent.flags & RANDOM | is_sampled]
        trace = Trace(parent.trace_id, ids[:16], ids[16:], parent.span_id, flags, is_sampled)
        if state:
            trace.state = state
        return trace

    def _new(self, parent: ParentContext | None) -> Trace:
        """Return a trace that begins here, with a link to the client's if it has one."""
        ids = f"{self._random_bits(256):064x}"
        trace_id = ids[:32]
        is_sampled = self._is_chosen(trace_id)
        trace = Trace(trace_id, ids[32:48], ids[48:], "", _FLAGS[RANDOM | is_sampled], is_sampled)
        if parent is not None:
            trace.link = parent.trace_id, parent.span_id
        return trace

    def _is_chosen(self, trace_id: str) -> bool:
        """Tell whether the ratio selects a trace; the same for each gateway, as only its id decides."""
        threshold = self._threshold
        return not threshold or (threshold < _NEVER and int(trace_id[_FIRST_RANDOM_DIGIT:], 16) >= threshold)

    def record(self, exchange: Exchange) -> None:
        """Export an ended exchange if it is sampled or kept."""
        trace = exchange.trace
        if trace is not None and (trace.is_sampled or self._is_kept(exchange)):
            self._export(exchange)

    def _is_kept(self, exchange: Exchange) -> bool:
        """Tell whether an exchange that is not sampled is exported: it has failed, or its response was slow.

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
