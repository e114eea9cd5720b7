"""Notifications of refunds: what others publish is noted once, and anything else is ignored."""

from api_gateway.limits.store_refunds import StoreRefunds, invalidation
from api_gateway.rate_limiter import Refund
from tests.cases import each

MANY_DIGITS = "1" * 5000  # more than `int` takes
KEYS = ["client:a", "limit:team:a b  c", "1 2 3 4", " ", "ä|{}"]


def refunds(name: str) -> StoreRefunds:
    return StoreRefunds(name, lambda: 10**9)


@each("key", KEYS)
def test_a_refund_of_another_process_shifts_later_charges_and_an_own_one_is_not_noted_twice(key: str) -> None:
    one, other = refunds("one"), refunds("other")
    message = f"300 5 {one.message(key, Refund(1000, 2000, 0, 0))}"  # as the store completes it: at 5000 ns
    for _ in range(2):
        assert one.read(message) == other.read(message) == key
    assert one.recent.end_of(key, 3000, 4000) == 4000
    assert other.recent.end_of(key, 3000, 4000) == 4000 - 2 * 300
    assert other.recent.end_of(key, 6000, 9000) == 9000, "charged after the refund"
    assert other.recent.end_of(key, 1000, 2000) == 2000, "the charge itself"


@each("key", KEYS)
def test_an_invalidation_names_the_bucket_and_is_no_refund(key: str) -> None:
    some = refunds("one")
    assert some.read(invalidation(key)) == key
    assert len(some.recent) == 0


@each("key", KEYS)
def test_a_reset_is_heard_of_by_others_and_is_no_refund(key: str) -> None:
    one, other = refunds("one"), refunds("other")
    message = one.reset_message(key, 7)
    assert (one.read_reset(message), other.read_reset(message)) == (None, (key, 7))
    assert other.read(message) is None, "gateways of earlier versions ignore it"
    for no_reset in (
        invalidation(key),
        f"300 5 {one.message(key, Refund(1, 2, 0, 0))}",
        "reset one 1 ",
        "reset",
        f"reset one {MANY_DIGITS} a",
    ):
        assert other.read_reset(no_reset) is None


@each("message", ["", " ", "x", "x a", "0", "300", "-3 5 one 1 2 a", "3e9 5 one 1 2 a", f"{MANY_DIGITS} 5 one 1 2 a"])
def test_what_is_no_notification_is_ignored(message: str) -> None:
    some = refunds("other")
    assert some.read(message) is None
    assert len(some.recent) == 0


@each("key", KEYS)
def test_a_refund_of_a_gateway_of_an_earlier_version_is_an_invalidation(key: str) -> None:
    """It states no charge; readings of the bucket are dropped all the same."""
    some = refunds("other")
    assert some.read(f"300 {key}") == key
    assert len(some.recent) == 0


@each("numbers", ["{} one 1 2", "5 one {} 2", "5 one 1 {}"])
def test_a_refund_with_a_number_of_too_many_digits_is_an_invalidation(numbers: str) -> None:
    some, rest = refunds("other"), f"{numbers.format(MANY_DIGITS)} a"
    assert some.read(f"300 {rest}") == rest
    assert len(some.recent) == 0


def test_repr() -> None:
    assert repr(refunds("one")) == "<StoreRefunds of 0 buckets>"
    assert repr(Refund(1, 2, 3, 4)) == "<Refund [4 ns of the charge of 1]>"
