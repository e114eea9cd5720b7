"""Request ids: the value of `X-Request-ID` if it is valid, else a new id."""

import itertools
import random
from collections.abc import Sequence

from api_gateway.clients.api_keys import has_key
from api_gateway.http1.headers import Fields, is_visible_ascii

_DOTS = (b".", b"..")  # which browsers and many clients resolve in the path of /explain/{request_id}
_ID_PREFIX = f"{random.Random().getrandbits(96):024x}"  # noqa: S311 - seeded by the system; ids must differ, not be secret
_id_numbers = itertools.count(random.Random().getrandbits(24))  # noqa: S311 - as above


def given_request_id(fields: Fields) -> str | None:
    """Return the value of `X-Request-ID` if it is valid: 1 to 128 visible ASCII characters.

    An API key, and one or two dots, are not valid either.
    """
    given: Sequence[bytes] = fields.get(b"x-request-id", ())
    if len(given) != 1 or not is_visible_ascii(given[0]) or given[0] in _DOTS or has_key(given[0]):
        return None
    return given[0].decode("ascii")


def new_request_id() -> str:
    """Return a unique id of 32 or more hexadecimal digits: a random prefix of this process, and a counter."""
    return f"{_ID_PREFIX}{next(_id_numbers):08x}"
