"""The file with the ids that must be proved: it follows the store, and decides at a start without the store."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from api_gateway.assembly.identity import identity_rules
from api_gateway.clients import kept_proofs
from api_gateway.clients.api_keys import ApiKey, digest_of, new_key
from api_gateway.clients.identity_rules import IdentityRules
from api_gateway.clients.kept_proofs import PROOFS_FILE, PROOFS_VERSION, InvalidProofFile, ProofFile
from api_gateway.clients.records import UNCHANGED, Change
from api_gateway.clients.redis_store import RedisClientStore
from api_gateway.clients.registry import ClientRegistry
from api_gateway.settings.store_url import StoreUrl
from api_gateway.storage.redis_session import StoreSession
from tests.cases import each
from tests.kit import _config, case, in_front_of, soon
from tests.store_kit import CALM, StoreServer
from tests.unit.test_client_registry import TIERS, HeldStore, following

BASIC_ONLY = IdentityRules(tiers=frozenset({"BASIC"}))
BOTH = IdentityRules(tiers=frozenset({"BASIC", "PREMIUM"}))
UNPROVABLE = IdentityRules(can_prove=False)
FAILED = "verified_only.json cannot be written, so a start without the client store would use its former content"
GOOD = {"version": PROOFS_VERSION, "store": "here", "tiers": [], "ids": ["acme"]}


def key(number: int) -> ApiKey:
    return ApiKey(digest_of(new_key(number.to_bytes(32)).encode()))


def kept(file: ProofFile) -> set[str] | None:
    """Return the ids in the file, None if it says that they are too many."""
    ids = file.read().ids
    return None if ids is None else set(ids)


async def kept_soon(file: ProofFile, ids: set[str] | None) -> None:
    def is_kept() -> bool:
        try:
            return kept(file) == ids
        except InvalidProofFile:
            return False

    await soon(is_kept, f"{ids} are kept")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProofFile:
    monkeypatch.setattr(kept_proofs, "_WRITE_INTERVAL", 0.01)
    return ProofFile(tmp_path, "here")


async def test_it_follows_the_store(file: ProofFile, store_server: StoreServer) -> None:
    """Whether all clients fit into memory, or most are looked up."""

    def opened() -> RedisClientStore:
        return RedisClientStore(StoreSession(store_server.url, timeout=CALM))

    for others in (0, 12):
        store_server.restart_empty()
        async with following(opened()) as elsewhere:
            for number in range(others):
                await elsewhere.set_tier(f"other-{number}", "BASIC")
            await elsewhere.keys.create("before", key(1), verified_only=UNCHANGED)
            with case(others):
                async with following(opened(), limit=5, proof_file=file) as registry:
                    await check_that_it_follows(file, registry, elsewhere)


async def check_that_it_follows(file: ProofFile, registry: ClientRegistry, elsewhere: ClientRegistry) -> None:
    await kept_soon(file, {"before"})
    await registry.keys.create("here", key(2), verified_only=UNCHANGED)
    await elsewhere.keys.create("elsewhere", key(3), verified_only=UNCHANGED)
    await elsewhere.keys.create("open", key(4), verified_only=False)
    await kept_soon(file, {"before", "here", "elsewhere"})
    await elsewhere.keys.require_proof("before", verified_only=False)
    await elsewhere.delete("here")
    await elsewhere.keys.revoke("elsewhere", key(3).digest)  # the id is not free again
    await kept_soon(file, {"elsewhere"})
    for number in range(6):
        await elsewhere.keys.require_proof(f"proved-{number}", verified_only=True)
    await kept_soon(file, None)  # more than are held in memory


async def test_the_end_writes_what_has_changed_last(file: ProofFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_proofs, "_WRITE_INTERVAL", 3600.0)
    async with following(HeldStore(), proof_file=file) as registry:
        await kept_soon(file, set())
        await registry.keys.create("acme", key(1), verified_only=UNCHANGED)
        assert kept(file) == set()
    assert kept(file) == {"acme"}
    assert [one.name for one in file.path.parent.iterdir()] == [PROOFS_FILE], "no draft is left"


async def test_changes_while_many_records_are_read_are_known(file: ProofFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_proofs, "_READ_BATCH", 10)
    store, count = HeldStore(), 1_000
    for number in range(count):
        await store.write(f"client-{number}", Change(tier="BASIC", verified_only=number % 2 == 0))
    expected = {f"client-{number}" for number in range(0, count, 2)}
    async with following(store, proof_file=file, limit=count + 10) as registry:
        for number in (1, count - 1):
            await registry.keys.require_proof(f"client-{number}", verified_only=True)
        for number in (0, count - 2):
            await registry.keys.require_proof(f"client-{number}", verified_only=False)
        await registry.keys.require_proof("new", verified_only=True)
        with pytest.raises(InvalidProofFile):
            file.read()  # the records have not all been read
        expected = (expected | {"client-1", f"client-{count - 1}", "new"}) - {"client-0", f"client-{count - 2}"}
        await kept_soon(file, expected)
        registry.change_tiers(TIERS, "FREE", {}, BASIC_ONLY)
        await registry.delete("client-3")
        registry.change_tiers(TIERS, "FREE", {}, BOTH)
        await kept_soon(file, {f"client-{number}" for number in range(count)} - {"client-3"} | {"new"})
        assert file.read().tiers == BOTH.tiers


async def test_tiers_that_require_a_credential_are_kept_with_their_clients(file: ProofFile) -> None:
    """If a tier requires it since, the ids of its clients are not known without the store."""
    store = HeldStore()
    await store.write("basic", Change(tier="BASIC"))
    await store.write("premium", Change(tier="PREMIUM"))
    async with following(store, proof_file=file, rules=BASIC_ONLY) as registry:
        await kept_soon(file, {"basic"})
        registry.change_tiers(TIERS, "FREE", {}, BOTH)
        await kept_soon(file, {"basic", "premium"})
        registry.change_tiers(TIERS, "FREE", {}, BASIC_ONLY)
        await kept_soon(file, {"basic"})
    store.failure = OSError("not up yet")
    async with following(store, proof_file=file, rules=BASIC_ONLY) as registry:
        for rules, refused, doubtful in (
            (BASIC_ONLY, {"basic"}, set[str]()),
            (BOTH, {"basic", "premium", "free"}, {"basic", "premium", "free"}),
            (UNPROVABLE, {"basic"}, set[str]()),
        ):
            registry.change_tiers(TIERS, "FREE", {}, rules)
            assert claims(registry, "basic", "premium", "free") == (refused, doubtful)


def claims(registry: ClientRegistry, *ids: str) -> tuple[set[str], set[str]]:
    """Return which ids need a credential, and of which of them that is only assumed."""
    found = {name: registry.try_get(name) for name in ids}
    refused = {name for name, client in found.items() if client is not None and client.is_verified_only}
    return refused, {name for name in refused if registry.is_doubtful(name)}


CONTENTS: dict[str, tuple[bytes | None, str]] = {
    "first start ever": (None, "does not exist yet"),
    "empty": (b"", "cannot be read: Expecting value"),
    "cut off": (json.dumps(GOOD).encode()[:-9], "cannot be read: "),
    "no text": (b"\xff\xfe\x00", "cannot be read: "),
    "nested too deeply": (b"[" * 1_000_000, "cannot be read: "),
    "another kind of JSON": (b"[]", "must have an object"),
    "of a newer gateway": (json.dumps(GOOD | {"version": 2}).encode(), "must have version 1, got 2"),
    "a version that is no number": (json.dumps(GOOD | {"version": True}).encode(), "must have version 1, got True"),
    "of another store": (json.dumps(GOOD | {"store": "there"}).encode(), "is of another store, 'there'"),
    "without ids": (json.dumps(GOOD | {"ids": {"acme": 1}}).encode(), "must have lists of names"),
    "ids that are no text": (json.dumps(GOOD | {"ids": ["acme", 7]}).encode(), "must have lists of names"),
    "without tiers": (json.dumps(GOOD | {"tiers": None}).encode(), "must have lists of names"),
    "too many ids": (json.dumps(GOOD | {"ids": None}).encode(), PROOFS_FILE),
}


async def test_a_start_without_the_store_admits_no_bare_id_unless_the_file_is_sound(
    file: ProofFile, caplog: pytest.LogCaptureFixture
) -> None:
    """Once the store is read, the file is replaced."""
    for name, (content, cause) in CONTENTS.items():
        with case(name):
            caplog.clear()
            store = HeldStore()
            await store.write("late", Change(verified_only=True))
            store.failure = OSError("not up yet")
            file.path.unlink(missing_ok=True)
            if content is not None:
                file.path.write_bytes(content)
            async with following(store, {"configured": "BASIC"}, proof_file=file) as registry:
                assert claims(registry, "acme", "configured") == ({"acme", "configured"},) * 2
                assert (await registry.inspect("acme")).client.is_verified_only
                (line,) = [one for one in caplog.messages if "it is not known which ids need a credential" in one]
                assert cause in line
                store.failure = None
                await soon(lambda: registry.store_error is None, "the store is found")
                assert claims(registry, "acme", "configured", "late") == ({"late"}, set())
                await kept_soon(file, {"late"})


async def test_without_a_source_that_proves_ids_none_is_refused(file: ProofFile) -> None:
    store = HeldStore()
    store.failure = OSError("not up yet")
    async with following(store, proof_file=file, rules=UNPROVABLE) as registry:
        assert claims(registry, "acme") == (set(), set())
        registry.change_tiers(TIERS, "FREE", {}, IdentityRules())
        assert claims(registry, "acme") == ({"acme"}, {"acme"})


@each("sources", [["api_key", "header", "address"], ["header", "address"], ["certificate", "address"]])
def test_what_can_prove_an_id_is_that_of_the_configuration(sources: list[str], tmp_path: Path) -> None:
    config = _config(in_front_of("http://127.0.0.1:9") | {"identity": {"sources": sources}}, tmp_path)
    assert identity_rules(config).can_prove is (sources != ["header", "address"])


@each(
    ("url", "place"),
    [
        ("redis://user:secret@b:1/2", "b:1//2"),
        ("redis+sentinel://:secret@b:1,a/main/3", "a:26379,b:1/main/3"),
        ("unix:///run/store.sock", "/run/store.sock//0"),
    ],
)
def test_the_name_of_a_store_has_no_secret(url: str, place: str) -> None:
    assert StoreUrl.parse(url).place == place


async def test_an_old_file_knows_what_was_known_when_it_was_written(file: ProofFile) -> None:
    """As the documentation states; what has changed since is known as soon as the store is available."""
    store = HeldStore()
    async with following(store, proof_file=file) as registry:
        await registry.keys.create("acme", key(1), verified_only=UNCHANGED)
        await registry.keys.create("gone", key(2), verified_only=UNCHANGED)
    await store.write("since", Change(verified_only=True))
    await store.write("gone", Change(verified_only=False))
    store.failure = OSError("not up yet")
    async with following(store, proof_file=file) as registry:
        assert claims(registry, "acme", "gone", "since", "free") == ({"acme", "gone"}, set())
        store.failure = None
        await soon(lambda: registry.store_error is None, "the store is found")
        assert claims(registry, "acme", "gone", "since", "free") == ({"acme", "since"}, set())
        await kept_soon(file, {"acme", "since"})


async def test_what_could_not_be_written_is_said_once_and_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for interval in ("_WRITE_INTERVAL", "_RETRY_INTERVAL"):
        monkeypatch.setattr(kept_proofs, interval, 0.01)
    place = tmp_path / "folder"
    place.touch()
    file, attempts = ProofFile(place, "here"), 0
    write = file.write

    def counted(ids: Sequence[str] | None, tiers: Iterable[str]) -> None:
        nonlocal attempts
        attempts += 1
        write(ids, tiers)

    monkeypatch.setattr(file, "write", counted)
    async with following(HeldStore(), proof_file=file) as registry:
        await registry.keys.create("acme", key(1), verified_only=UNCHANGED)
        await soon(lambda: attempts > 3, "it is tried again")
        assert registry.proofs_error is not None
        place.unlink()
        await kept_soon(file, {"acme"})
        await soon(lambda: registry.proofs_error is None, "it is stored")
        place.rename(tmp_path / "moved")
        place.touch()
        await registry.keys.create("last", key(2), verified_only=UNCHANGED)
    assert [one.split(":")[0] for one in caplog.messages].count(FAILED) == 2, "the second failure is another one"
