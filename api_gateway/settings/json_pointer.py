"""JSON pointers (RFC 6901) in settings."""

import re
from typing import Annotated

from api_gateway.settings.value_checks import ValueCheck

_POINTER = re.compile(r"(?:/(?:[^~/]|~[01])*)*")


def parse_pointer(pointer: str) -> tuple[str, ...]:
    """Return the reference tokens of a JSON pointer. Raises ValueError with what is wrong with it."""
    if pointer and not pointer.startswith("/"):
        raise ValueError("a JSON pointer begins with / (RFC 6901)")
    if not _POINTER.fullmatch(pointer):
        raise ValueError("in a JSON pointer, ~ is written ~0, and / within a name ~1 (RFC 6901)")
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in pointer.split("/")[1:])


def _checked(pointer: str) -> str:
    parse_pointer(pointer)
    return pointer


JsonPointer = Annotated[str, ValueCheck(_checked)]
