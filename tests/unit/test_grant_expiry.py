"""Grants expire in order, and expired or replaced entries are removed."""

from hypothesis import given
from hypothesis import strategies as st

from api_gateway.clients.grant_expiry import Expiry, ExpiryQueue
from api_gateway.clients.records import ClientRecord, Grant


def granted(until: float, version: int = 1, client_id: str = "acme") -> ClientRecord:
    return ClientRecord(client_id, None, Grant("PREMIUM", until), version)


@given(st.lists(st.integers(0, 50)), st.integers(0, 50))
def test_what_is_due_is_given_out_in_order_and_only_that(moments: list[int], now: int) -> None:
    endings = ExpiryQueue(1000)
    for version, moment in enumerate(moments):
        endings.expect(granted(moment, version), lambda ending: True)
    assert [ending.until for ending in endings.due(now)] == sorted(moment for moment in moments if moment <= now)
    later = [moment for moment in moments if moment > now]
    assert (len(endings), endings.next_at) == (len(later), min(later, default=None))


def test_those_of_replaced_records_go_when_there_are_too_many() -> None:
    endings = ExpiryQueue(10)
    for version in range(100):
        endings.expect(granted(5.0, version), lambda ending, newest=version: ending.version == newest - 1)  # type: ignore[misc]  # a loop's value
    assert len(endings) <= 11


def test_those_that_count_all_stay() -> None:
    endings = ExpiryQueue(2)
    for number in range(100):
        endings.expect(granted(float(number), number, f"client-{number}"), lambda ending: True)
    assert len(endings) == 100


def test_all_may_be_replaced_at_once() -> None:
    endings = ExpiryQueue(10)
    endings.expect(granted(1.0), lambda ending: True)
    endings.replace([ClientRecord("none", "FREE", None, 3), granted(7.0, 4), granted(6.0, 5, "other")])
    assert repr(endings) == "<ExpiryQueue [2, next at 6.0]>"
    assert list(endings.due(10.0)) == [Expiry(6.0, "other", 5), Expiry(7.0, "acme", 4)]
