"""The decision of a rate limiter alone: microseconds for known clients, and bytes per client.

`python -m benchmarks.limiter` compares the gateway's limiter with `limits`, throttled-py and pyrate-limiter (on PyPI),
and with a minimal one: a tuple for each client in a dict. All keep their buckets in memory, read a clock for each
decision, and never refuse here.

`--limits` measures what a request costs instead that is charged to 1, 2, 3 and 5 limits, to one and a calendar quota,
and to one with a slot of a concurrency limit: the decision (with the return of the slot), and its header fields.
`--against FOLDER` alternates with the same measurement of another working tree, such as that of an earlier commit;
limits that it does not have are left out.

`--clients 1000000` gives that many clients buckets of three limits, or two of these and a calendar quota: bytes of
resident memory for each client, and the time of its first decision and of later ones, in random order.
"""

import argparse
import gc
import importlib
import os
import random
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.periods import Calendar
from api_gateway.limits.quota_limiter import QuotaLimiter
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.models import Charge, Quota
from api_gateway.rate_limiter import MemoryLimiter, RateLimiter

TOKENS, SECONDS = 1_000_000, 3600  # a quota that is neither used up nor expires during the measurement
DECISIONS = 50_000
WARM_CLIENTS = 100
CLIENTS = 100_000
LIMIT_COUNTS = (1, 2, 3, 5)
WITH_QUOTA = -1  # instead of a number of limits: one, and a calendar quota
WITH_SLOT = "1 and a slot"

Decide = Callable[[str], bool]


@dataclass(frozen=True)
class Contestant:
    """A limiter: its name, and a function that builds a new one; raises ImportError without the library."""

    name: str
    build: Callable[[], Decide]


@dataclass(frozen=True)
class Figures:
    """Microseconds per decision for each round; bytes per client."""

    microseconds: list[float]
    bytes_a_client: float


def ours() -> Decide:
    """Return `MemoryLimiter.decide`, with the charge built for each decision as the gateway does."""
    quota = Quota.per_second("all", TOKENS / SECONDS, TOKENS)
    limiter, cost_ns, clock = MemoryLimiter([quota]), quota.cost_ns(1), time.monotonic_ns
    return lambda client: limiter.decide((Charge(client, quota, cost_ns),), clock()).allowed


def bare_dict() -> Decide:
    """Return a token bucket of floats, without details of refusals, limits of memory or expiry."""
    buckets: dict[str, tuple[float, float]] = {}
    clock = time.monotonic

    def decide(client: str) -> bool:
        now = clock()
        tokens, at = buckets.get(client, (TOKENS, now))
        tokens = min(TOKENS, tokens + (now - at) * TOKENS / SECONDS)
        if tokens < 1:
            return False
        buckets[client] = (tokens - 1, now)
        return True

    return decide


def limits_of(strategy: str) -> Callable[[], Decide]:
    """Return a builder of a limiter of `limits` with one of its strategies."""

    def build() -> Decide:
        limits = importlib.import_module("limits")
        storage = importlib.import_module("limits.storage").MemoryStorage()
        limiter = getattr(importlib.import_module("limits.strategies"), strategy)(storage)
        item = limits.RateLimitItemPerHour(TOKENS)
        return lambda client: bool(limiter.hit(item, client))

    return build


def throttled_py() -> Decide:
    """Return throttled-py's GCRA, with a store that is large enough for all clients."""
    throttled = importlib.import_module("throttled")
    quota = throttled.rate_limiter.per_hour(TOKENS, burst=TOKENS)
    store = throttled.MemoryStore(options={"MAX_SIZE": 2 * CLIENTS})
    limiter = throttled.Throttled(using=throttled.RateLimiterType.GCRA.value, quota=quota, store=store)
    return lambda client: not limiter.limit(client).limited


def pyrate_limiter() -> Decide:
    """Return pyrate-limiter's GCRA, with a bucket for each client as in its manual."""
    pyrate: Any = importlib.import_module("pyrate_limiter")
    rates, clock = [pyrate.Rate(TOKENS, pyrate.Duration.HOUR)], pyrate.MonotonicClock()
    buckets: dict[str, Any] = {}

    class ByClient(pyrate.BucketFactory):  # type: ignore[misc]  # the library may be missing
        def wrap_item(self, name: str, weight: int = 1) -> Any:
            return pyrate.RateItem(name, clock.now(), weight=weight)

        def get(self, item: Any) -> Any:
            bucket = buckets.get(item.name)
            if bucket is None:
                bucket = buckets[item.name] = pyrate.StateBucket(rates, pyrate.GCRA())
            return bucket

    limiter = pyrate.Limiter(ByClient())
    return lambda client: bool(limiter.try_acquire(client, blocking=False))


CONTESTANTS = (
    Contestant("this gateway, MemoryLimiter.decide", ours),
    Contestant("bare dict", bare_dict),
    Contestant("limits, fixed window", limits_of("FixedWindowRateLimiter")),
    Contestant("limits, sliding window counter", limits_of("SlidingWindowCounterRateLimiter")),
    Contestant("throttled-py, GCRA", throttled_py),
    Contestant("pyrate-limiter, GCRA", pyrate_limiter),
)


def microseconds(decide: Decide, decisions: int = DECISIONS) -> float:
    """Return the time of a decision for known clients in turn. Raises RuntimeError if one is refused."""
    clients = [f"client-{number}" for number in range(WARM_CLIENTS)]
    passed = [decide(client) for client in clients]
    turns = max(1, decisions // WARM_CLIENTS)
    began = time.perf_counter()
    for _ in range(turns):
        for client in clients:
            decide(client)
    elapsed = time.perf_counter() - began
    passed += [decide(client) for client in clients]
    if not all(passed):
        raise RuntimeError("a client was refused, and a refusal takes a different time")
    return elapsed / (turns * WARM_CLIENTS) * 1e6


def bytes_a_client(build: Callable[[], Decide], clients: int = CLIENTS) -> float:
    """Return the bytes that a limiter allocates for each new client, its stored name included."""
    decide = build()
    decide("first")
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(clients):
            decide(f"client-{number}")
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / clients
    finally:
        tracemalloc.stop()


def measure(contestants: Sequence[Contestant], rounds: int) -> Iterator[tuple[str, Figures]]:
    """Measure the time of all in turn, then the memory of each."""
    timed: dict[str, list[float]] = {one.name: [] for one in contestants}
    for _ in range(rounds):
        for one in contestants:
            timed[one.name].append(microseconds(one.build()))
    for one in contestants:
        yield one.name, Figures(timed[one.name], bytes_a_client(one.build))


def table(found: Sequence[tuple[str, Figures]]) -> str:
    """Return a Markdown table of medians."""
    lines = ["| | µs/decision | least to most | bytes/client |", "|---|---:|---:|---:|"]
    for name, figures in found:
        times = figures.microseconds
        spread = f"{min(times):.2f} to {max(times):.2f}"
        lines.append(f"| {name} | {statistics.median(times):.2f} | {spread} | {figures.bytes_a_client:,.0f} |")
    return "\n".join(lines) + "\n"


def installed() -> Iterator[Contestant]:
    """Return the limiters whose library is installed, and print the others."""
    for one in CONTESTANTS:
        try:
            one.build()
        except ModuleNotFoundError as missing:
            sys.stderr.write(f"{one.name} is skipped: {missing}; see `python -m benchmarks.limiter --help`\n")
        else:
            yield one


def seconds_of_limits(count: int, decisions: int = DECISIONS) -> tuple[float, float]:
    """Return the microseconds of a decision on so many limits, and of the decision with its header fields.

    The charges are remembered with the header set, as in the gateway.
    """
    quotas = [Quota.per_second(f"limit-{number}", TOKENS / SECONDS, TOKENS) for number in range(max(count, 1))]
    limiter: RateLimiter = MemoryLimiter(quotas)
    if count == WITH_QUOTA:
        limiter = QuotaLimiter(MemoryLimiter(quotas), PeriodCounters(CLIENTS), wall_clock=time.time)
        quotas.append(PeriodQuota.of("monthly", TOKENS, Calendar("month", ZoneInfo("UTC"))))
    fields, clock = RateLimitHeaders(), time.monotonic_ns
    requests = [
        [Charge(f"{quota.name}:client-{number}", quota, quota.cost_ns(1)) for quota in quotas]
        for number in range(WARM_CLIENTS)
    ]
    lines: Callable[..., bytes] = fields.lines
    with_charges = len(signature(lines).parameters) > 1  # an earlier version names one limit only
    turns = max(1, decisions // WARM_CLIENTS)
    began = time.perf_counter()
    for _ in range(turns):
        for charges in requests:
            limiter.decide(charges, clock())
    between = time.perf_counter()
    for _ in range(turns):
        for charges in requests:
            decision = limiter.decide(charges, clock())
            assert decision is not None  # noqa: S101 - in memory
            lines(decision, charges) if with_charges else lines(decision)
    ended = time.perf_counter()
    last = [limiter.decide(charges, clock()) for charges in requests]
    if not all(decision is not None and decision.allowed for decision in last):
        raise RuntimeError("a client was refused, and a refusal takes a different time")
    made = turns * WARM_CLIENTS / 1e6
    return (between - began) / made, (ended - between) / made


@dataclass(frozen=True)
class ManyClients:
    """What clients of several limits cost: bytes of resident memory each, and microseconds of CPU for a decision."""

    bytes_a_client: float
    first: float
    later: float


def many_clients(clients: int, *, has_quota: bool) -> ManyClients:
    """Give clients their buckets of three limits, of which one is a calendar quota if `has_quota`."""
    quotas: list[Quota] = [Quota.per_second(f"limit-{number}", TOKENS / SECONDS, TOKENS) for number in range(3)]
    limiter: RateLimiter = MemoryLimiter(quotas, bucket_limit=4 * clients)
    if has_quota:
        quotas[2] = PeriodQuota.of("monthly", TOKENS, Calendar("month", ZoneInfo("UTC")))
        memory = MemoryLimiter(quotas[:2], bucket_limit=4 * clients)
        limiter = QuotaLimiter(memory, PeriodCounters(clients), wall_clock=time.time)
    costs, clock = [quota.cost_ns(1) for quota in quotas], time.monotonic_ns

    def decide(numbers: Iterable[int]) -> float:
        began = time.process_time()
        for number in numbers:
            charges = [
                Charge(f"{quota.name}:client-{number}", quota, cost) for quota, cost in zip(quotas, costs, strict=True)
            ]
            limiter.decide(charges, clock())
        return (time.process_time() - began) / clients * 1e6

    order = list(range(clients))
    random.Random(1).shuffle(order)  # noqa: S311 - not used for security
    gc.collect()
    before = resident_bytes()
    first = decide(range(clients))
    gc.collect()
    return ManyClients((resident_bytes() - before) / clients, first, decide(order))


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_clients(clients: int) -> str:
    """Return a Markdown table, each row measured in a process of its own."""
    lines = [f"| {clients:,} clients | bytes/client | µs, first decision | µs, later ones |", "|---|---:|---:|---:|"]
    for name, option in (("three limits", "0"), ("two limits and a quota", "1")):
        command = [sys.executable, "-m", "benchmarks.limiter", "--weigh", option, "--clients", str(clients)]
        made = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - this file
        figures = ManyClients(*map(float, made.stdout.split()))
        lines.append(f"| {name} | {figures.bytes_a_client:,.0f} | {figures.first:.2f} | {figures.later:.2f} |")
    return "\n".join(lines) + "\n"


def seconds_of_slots(decisions: int = DECISIONS) -> tuple[float, float]:
    """Return the same of a decision on one limit and the slot of a concurrency limit, which is returned at once."""
    concurrency = importlib.import_module("api_gateway.limits.concurrency")
    fields = importlib.import_module("api_gateway.limits.concurrency_headers").ConcurrencyHeaders()
    models = importlib.import_module("api_gateway.models")
    quota = Quota.per_second("limit-0", TOKENS / SECONDS, TOKENS)
    many = concurrency.ConcurrencyQuota.of("many", 1000, "many")
    limiter, slots, clock = MemoryLimiter([quota]), concurrency.LocalSlots(Counter()), time.monotonic_ns
    requests = [
        (
            concurrency.SlottedCharges(
                [Charge(f"limit-0:{number}", quota, quota.cost_ns(1))],
                (models.ConcurrencySlot(f"limit:many:{number}", many),),
            ),
            models.Exchange("", "GET", "/api", "192.0.2.7", 0.0),
        )
        for number in range(WARM_CLIENTS)
    ]
    for charges, _ in requests:  # one more request of each client is in flight
        slots.take(models.Exchange("", "GET", "/api", "192.0.2.7", 0.0), charges.slots)
    turns = max(1, decisions // WARM_CLIENTS)
    began = time.perf_counter()
    for _ in range(turns):
        for charges, exchange in requests:
            now_ns = clock()
            slots.refusal(charges.slots, now_ns)
            limiter.decide(charges, now_ns)
            slots.take(exchange, charges.slots)
            slots.release(exchange)
    between = time.perf_counter()
    for _ in range(turns):
        for charges, exchange in requests:
            now_ns = clock()
            slots.refusal(charges.slots, now_ns)
            decision = limiter.decide(charges, now_ns)
            slots.take(exchange, charges.slots)
            slots.release(exchange)
            fields.lines(decision, charges)
    ended = time.perf_counter()
    made = turns * WARM_CLIENTS / 1e6
    return (between - began) / made, (ended - between) / made


def measure_limits(trees: Sequence[str], rounds: int) -> str:
    """Return a Markdown table of medians by number of limits for each working tree, measured in turn."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for tree in trees:
            for count in (*map(str, LIMIT_COUNTS), str(WITH_QUOTA), WITH_SLOT):
                command = [sys.executable, __file__, "--one", count]
                made = subprocess.run(  # noqa: S603 - this file
                    command, env={**os.environ, "PYTHONPATH": tree}, check=True, capture_output=True, text=True
                )
                if made.stdout:  # nothing, if the tree does not have such limits
                    decision, whole = map(float, made.stdout.split())
                    found.setdefault((tree, count), []).append((decision, whole))
    lines = ["| working tree | limits | µs/decision | µs/decision and header fields |", "|---|---:|---:|---:|"]
    for (tree, count), figures in found.items():
        decision, whole = (statistics.median(one) for one in zip(*figures, strict=True))
        name = "1 and a quota" if count == str(WITH_QUOTA) else count
        lines.append(f"| {tree} | {name} | {decision:.2f} | {whole:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limiter",
        description="The rate limiter's decision, compared with limits, throttled-py and pyrate-limiter (PyPI).",
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--limits", action="store_true", help="a decision on several limits, see above")
    parser.add_argument("--against", metavar="FOLDER", help="with --limits: another working tree to alternate with")
    parser.add_argument("--clients", type=int, help="memory and time of so many clients with three limits")
    parser.add_argument("--one", metavar="COUNT", help=argparse.SUPPRESS)
    parser.add_argument("--weigh", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        with suppress(ModuleNotFoundError):
            measured = seconds_of_slots() if options.one == WITH_SLOT else seconds_of_limits(int(options.one))
            sys.stdout.write("{} {}\n".format(*measured))
        return 0
    if options.weigh is not None:
        found = many_clients(options.clients, has_quota=bool(options.weigh))
        sys.stdout.write(f"{found.bytes_a_client} {found.first} {found.later}\n")
        return 0
    if options.clients is not None:
        sys.stdout.write(measure_clients(options.clients))
        return 0
    if options.limits:
        own = str(Path(__file__).resolve().parents[1])
        sys.stdout.write(measure_limits([own, *([options.against] if options.against else [])], options.rounds))
        return 0
    sys.stdout.write(table(list(measure(list(installed()), options.rounds))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
