"""A flood of wrong keys: memory is bounded, and the store is asked no more often than the address limit admits."""

import itertools

from api_gateway.clients.api_keys import ApiKey, digest_of, new_key
from api_gateway.clients.records import Change, KeyChange
from api_gateway.clients.registry import ClientRegistry
from api_gateway.errors import CredentialsInvalid, RateLimited
from api_gateway.models import Charge, Quota
from api_gateway.proxy.admission import Admission, Wait
from api_gateway.proxy.api_key_source import ApiKeySource
from api_gateway.proxy.credential_stages import CredentialStage
from api_gateway.proxy.header_facts import MAX_REMEMBERED, HeaderReader
from api_gateway.proxy.identity_sources import IdentitySources
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.resilience.priorities import SINGLE_PRIORITY
from tests.unit.test_client_registry import HeldStore, following

ADDRESS = Quota.per_second("address", 1, 20)
HEAD = b"\r\nhost: gw.test\r\nx-api-key: %b\r\n"
VALID = new_key(b"\1" * 32).encode()


def wrong_key(number: int) -> bytes:
    return new_key(number.to_bytes(32)).encode()


class Attacked:
    """The stage and the reader of a gateway with a registry."""

    def __init__(self, registry: ClientRegistry) -> None:
        source = ApiKeySource(registry.keys, "X-API-Key")
        self.reader = HeaderReader(
            id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=0, sources=IdentitySources(first=(source,))
        )
        self.admission = Admission(
            [
                CredentialStage(
                    clients=registry,
                    priorities=SINGLE_PRIORITY,
                    limiter=MemoryLimiter([ADDRESS]),
                    charges_of_address=lambda peer: [Charge(f"peer:{peer}", ADDRESS, ADDRESS.cost_ns(1))],
                )
            ]
        )

    async def outcome(self, key: bytes, peer: str = "192.0.2.7") -> object:
        """Return the error for a request with a key; None if it is admitted."""
        rewritten = self.reader.read_lines(peer, "http", HEAD % key, 100)
        assert rewritten is not None
        plan = self.admission.plan(rewritten.facts, "GET", "/api", b"/api", 0)
        result = self.admission.decide(plan)
        while isinstance(result, Wait):
            result = self.admission.resume(plan, result, await result.reply(), 0)
        return result


async def registry_with_keys(store: HeldStore, count: int) -> None:
    await store.write("acme", Change(keys=KeyChange(add=ApiKey(digest_of(VALID)))))
    for number in range(count):
        await store.write(f"client-{number}", Change(keys=KeyChange(add=ApiKey(f"{number:064x}"))))


async def test_the_store_is_asked_no_more_often_than_the_address_may_ask() -> None:
    """Even without a filter of keys, and whoever else has a key is not affected."""
    store = HeldStore()
    await registry_with_keys(store, 60)
    async with following(store, limit=50, deadline=10.0) as registry:
        attacked = Attacked(registry)
        store.questions.clear()
        outcomes = [await attacked.outcome(wrong_key(number)) for number in range(500)]
        assert all(isinstance(one, CredentialsInvalid) for one in outcomes[:20])
        assert all(isinstance(one, RateLimited) for one in outcomes[20:])
        assert len(outcomes) == 500
        assert sum(map(len, store.questions)) <= 20
        assert await attacked.outcome(VALID, "198.51.100.1") is None
        assert await attacked.outcome(VALID) is None, "from the same address, now that it is known"


async def test_a_filter_of_keys_spares_the_store() -> None:
    store = HeldStore()
    store.tells_ids = True
    await registry_with_keys(store, 60)
    async with following(store, limit=50, deadline=10.0) as registry:
        attacked = Attacked(registry)
        store.questions.clear()
        for number, peer in zip(range(400), itertools.cycle(f"192.0.2.{last}" for last in range(100)), strict=False):
            assert isinstance(await attacked.outcome(wrong_key(number), peer), CredentialsInvalid)
        assert sum(map(len, store.questions)) <= 20, "few are mistaken for keys that exist"


async def test_what_is_remembered_of_wrong_keys_is_bounded() -> None:
    """A million wrong keys a minute, scaled to a few thousand: every table has reached its limit by then."""
    async with following(HeldStore(), limit=50) as registry:
        attacked = Attacked(registry)
        for number in range(3 * MAX_REMEMBERED):
            await attacked.outcome(wrong_key(number))
        sizes = [
            table.cache_info().currsize
            for table in (attacked.reader._claimed, attacked.reader._remembered, attacked.reader._anonymous)
        ]
        assert sizes == [MAX_REMEMBERED, 1, 0]
        assert len(registry._cache) == 0
        assert not registry.keys._uses
