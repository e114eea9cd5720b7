"""The thread that exports traces: a bounded queue, batches, repetition with back-off, a last delivery at the end."""

import logging
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from api_gateway.models import Clock, Exchange
from api_gateway.observability.trace_sender import Delivery

logger = logging.getLogger(__name__)

# The results of the export of spans. `queue_full`: too many waited; `failed`: given up after `MAX_DELIVERIES`, or at
# the end of the process; `rejected`: refused by the collector.
EXPORTED = "exported"
RESULTS = (EXPORTED, "queue_full", "failed", "rejected")
EXPORT_BATCH = 256  # exchanges in a request
EXPORT_INTERVAL = 1.0  # seconds after which a smaller batch is sent
MAX_DELIVERIES = 6  # of one batch
FIRST_EXPORT_DELAY, MAX_EXPORT_DELAY = 1.0, 30.0  # seconds between them
FLUSH_TIMEOUT = 5.0  # seconds for the last deliveries at the end of the process
_PAUSE = 0.0005  # seconds in which the event loop can go on while a batch is encoded


class Encoder(Protocol):
    """Encodes exchanges, see `trace_encoding.SpanEncoder`."""

    def request(self, exchanges: list[Exchange], offset: float, pause: Callable[[], object]) -> tuple[bytes, int]:
        """Return the body of a request, and the number of its spans."""
        ...


class Sender(Protocol):
    """Sends requests, see `trace_sender.OtlpSender`."""

    place: str

    def send(self, body: bytes, within: float | None) -> Delivery:
        """Send a request within so many seconds."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class TraceExporter:
    """Exports exchanges from a thread, from `start` to `close`. `counts` are spans by result, see `RESULTS`.

    `add` belongs to the event loop, the rest to the thread: each result has one writer. `change` takes effect with the
    next batch.
    """

    def __init__(
        self,
        encoder: Encoder,
        sender: Sender,
        counts: Counter[str],
        *,
        max_queue: int,
        on_batch: Callable[[list[Exchange], float], object] | None = None,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
        source: random.Random | None = None,
    ) -> None:
        """`max_queue` is the number of exchanges that can wait.

        `on_batch` is called in the thread before exchanges are sent, with them and the difference of the wall clock to
        the monotonic clock, in seconds.
        """
        self._encoder = encoder
        self._sender = sender
        self._counts = counts
        self._max_queue = max_queue
        self._on_batch = on_batch
        self._clock = clock
        self._wall_clock = wall_clock
        self._source = source or random.Random()  # noqa: S311 - spreads deliveries, guards nothing
        self._queue: deque[Exchange] = deque()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._ends_at = float("inf")  # on the system's monotonic clock
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="trace export", daemon=True)

    def __repr__(self) -> str:
        return f"<TraceExporter to {self._sender.place} [{len(self._queue)} waiting]>"

    def __len__(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        """Start the thread that exports; called once."""
        self._thread.start()

    def change(self, encoder: Encoder, sender: Sender, max_queue: int) -> None:
        """Use this encoder and sender from the next batch on."""
        self._encoder, self._max_queue = encoder, max_queue
        self._sender = sender

    def add(self, exchange: Exchange) -> None:
        """Queue an ended exchange, or count its spans as dropped if too many wait. Does not block."""
        waiting = len(self._queue)
        if waiting >= self._max_queue:
            self._counts["queue_full"] += _spans(exchange)
            return
        self._queue.append(exchange)
        if waiting == EXPORT_BATCH - 1:
            self._wake.set()

    def close(self, within: float = FLUSH_TIMEOUT) -> None:
        """Deliver what waits, and end the thread, within so many seconds. Blocks; idempotent."""
        if not self._closing.is_set():
            self._ends_at = time.monotonic() + within
            self._closing.set()
            self._wake.set()
        if self._thread.is_alive():
            self._thread.join(within + 1.0)

    def _run(self) -> None:
        sender = self._sender
        while not self._closing.is_set():
            self._wake.wait(EXPORT_INTERVAL)
            self._wake.clear()
            while self._queue:
                if sender is not self._sender:
                    sender.close()
                    sender = self._sender
                batch = [self._queue.popleft() for _ in range(min(EXPORT_BATCH, len(self._queue)))]
                try:
                    self._deliver(batch, sender)
                except Exception:  # a defect, which must not end the thread
                    self._counts["failed"] += sum(map(_spans, batch))
                    logger.exception("tracing: spans could not be exported")
        sender.close()

    def _deliver(self, batch: list[Exchange], sender: Sender) -> None:
        """Encode a batch and send it until it is accepted, refused or given up."""
        offset = self._wall_clock() - self._clock()
        if self._on_batch is not None:
            self._on_batch(batch, offset)
        body, spans = self._encoder.request(batch, offset, _yield)
        delay = FIRST_EXPORT_DELAY
        for number in range(1, MAX_DELIVERIES + 1):
            left = self._ends_at - time.monotonic()
            if left <= 0:
                break
            delivery = sender.send(body, left)
            if delivery.result == "accepted":
                self._on_accepted(sender, spans, delivery)
                return
            if delivery.result == "refused":
                self._counts["rejected"] += spans
                self._report(sender, f"are refused: {delivery.detail}")
                return
            self._report(sender, f"cannot be delivered: {delivery.detail}")
            if number == MAX_DELIVERIES or self._closing.is_set():
                break
            wait = delay * self._source.uniform(0.5, 1.0) if delivery.retry_after is None else delivery.retry_after
            self._closing.wait(min(wait, MAX_EXPORT_DELAY))
            delay = min(delay * 2, MAX_EXPORT_DELAY)
        self._counts["failed"] += spans

    def _on_accepted(self, sender: Sender, spans: int, delivery: Delivery) -> None:
        rejected = min(spans, delivery.rejected)
        self._counts["exported"] += spans - rejected
        if rejected:
            self._counts["rejected"] += rejected
            self._report(sender, f"are rejected in part: {delivery.detail}")
        elif self._is_failing:
            self._is_failing = False
            logger.info("tracing: spans are delivered to %s again", sender.place)

    def _report(self, sender: Sender, what: str) -> None:
        """Log the first of several failures."""
        if not self._is_failing:
            self._is_failing = True
            logger.warning("tracing: spans %s (collector %s)", what, sender.place)


def _spans(exchange: Exchange) -> int:
    return 1 + (0 if exchange.trace is None else len(exchange.trace.attempts()))


def _yield() -> None:
    """Let the event loop have the interpreter, for which a thread may wait 5 ms otherwise."""
    time.sleep(_PAUSE)
