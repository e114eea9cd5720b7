"""The id of a request: the one it came with if that can be used, else a new one."""

import itertools
import random
from collections.abc import Sequence

from api_gateway.http1.headers import Fields, is_visible_ascii

_ID_PREFIX = f"{random.Random().getrandbits(96):024x}"  # noqa: S311 - seeded by the system; ids must differ, not be secret
_id_numbers = itertools.count(random.Random().getrandbits(24))  # noqa: S311 - as above


def given_request_id(fields: Fields) -> str | None:
    """Return the request id that came with the request, if it can be used."""
    given: Sequence[bytes] = fields.get(b"x-request-id", ())
    return given[0].decode("ascii") if len(given) == 1 and is_visible_ascii(given[0]) else None


def new_request_id() -> str:
    """Return an id that no other request has: a random number for this process, and one that counts up."""
    return f"{_ID_PREFIX}{next(_id_numbers):08x}"
