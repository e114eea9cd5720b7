"""Checks of the shared store: reachable, its version, memory policy, persistence, scripts, latency and clock."""

from collections.abc import Iterator

from api_gateway.config import GatewayConfig
from api_gateway.doctor.checks import Check, CheckResult, broken, doubtful, good
from api_gateway.storage.store_probe import StoreFacts, StoreUnusable, probe_store

OLDEST = (6, 2)
MAX_DIFFERENCE = 1.0  # seconds between the clocks of the store and of this machine
_ABOUT = "store.url"


def store_checks(config: GatewayConfig) -> Iterator[Check]:
    """Yield one check; without a shared store, its result says so."""
    yield Check(_ABOUT, lambda: _store(config))


async def _store(config: GatewayConfig) -> list[CheckResult]:
    store = config.store
    if not store.is_shared:
        return [good(_ABOUT, "buckets are kept in memory" if config.server.workers == 1 else "the workers share one")]
    try:
        facts = await probe_store(store.url.get_secret_value(), seconds=max(store.timeout, 1.0))
    except StoreUnusable as error:
        remedy = f"Start it or correct store.url; until then store.on_failure applies ({store.on_failure})."
        return [broken(_ABOUT, f"cannot be used: {str(error).rstrip('.')}", remedy)]
    return list(store_results(facts, decision_timeout=store.decision_timeout, keeps_clients=store.keeps_clients))


def store_results(facts: StoreFacts, *, decision_timeout: float, keeps_clients: bool) -> Iterator[CheckResult]:
    """Yield the results that follow from the facts about a store."""
    if facts.version < OLDEST:
        detail = f"{facts.server} {facts.shown_version} is too old"
        yield broken(_ABOUT, detail, "Use Redis 6.2 or newer, or Valkey.")
    else:
        yield good(_ABOUT, f"{facts.server} {facts.shown_version} responds")
    if facts.script_error is not None:
        remedy = "Allow the user of store.url the commands EVAL, EVALSHA and SCRIPT LOAD."
        yield broken("store scripts", f"are refused: {facts.script_error}", remedy)
    else:
        yield good("store scripts", "are permitted")
    if facts.evicting_policy is not None:
        detail = f"the store deletes buckets when its memory is full (maxmemory-policy {facts.evicting_policy})"
        yield doubtful("store memory", detail, "Set maxmemory-policy noeviction, and enough maxmemory.")
    else:
        yield good("store memory", "nothing is evicted")
    yield from _persistence(facts, keeps_clients=keeps_clients)
    yield from _times(facts, decision_timeout)


def _persistence(facts: StoreFacts, *, keeps_clients: bool) -> Iterator[CheckResult]:
    if facts.is_persistent:
        yield good("store persistence", "keys survive a restart of the store")
    elif keeps_clients:
        detail = "registered clients are lost when the store restarts"
        yield doubtful("store persistence", detail, "Set appendonly yes in the store, or store.clients: sqlite.")
    else:
        yield good("store persistence", "none, and only buckets are kept there")


def _times(facts: StoreFacts, decision_timeout: float) -> Iterator[CheckResult]:
    shown = f"{facts.latency * 1000:.1f} ms for a command, of {decision_timeout * 1000:g} ms (store.decision_timeout)"
    if facts.latency > decision_timeout / 2:
        remedy = "Move the store nearer, or raise store.decision_timeout; late decisions are made without it."
        level = broken if facts.latency > decision_timeout else doubtful
        yield level("store latency", shown, remedy)
    else:
        yield good("store latency", shown)
    difference = f"{abs(facts.clock_difference):.1f} s between the store and this machine"
    if abs(facts.clock_difference) > MAX_DIFFERENCE:
        yield doubtful("clocks", difference, "Synchronise both with NTP; times in logs and quotas differ until then.")
    else:
        yield good("clocks", difference)
