"""API keys: their format, and what is stored of them. Pure.

A key is `agw_`, 43 characters (0-9, A-Z, a-z) that encode 256 random bits, and 6 characters that encode their CRC-32.
The prefix lets scanners find keys that were published by mistake (`PATTERN`), and the checksum recognises a typing
error without a look-up. Only the SHA-256 digest is stored: 256 random bits can be neither guessed nor found by trying,
so a salt or a slow hash would add nothing.
"""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from api_gateway.models import KEY_PREFIX

PATTERN = r"agw_[0-9A-Za-z]{49}"
RANDOM_BYTES = 32
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BODY, _CHECKSUM = 43, 6  # characters
_MAX_SHOWN = 100  # characters of a path in a message
_KEY = re.compile(PATTERN.encode())
# Not within a longer run of characters of base64url: of 100,000 tokens with a signature of RSA, one has such letters.
_LIKE_KEY = re.compile(rb"(?<![0-9A-Za-z_.-])agw_[0-9A-Za-z]{20}")
# A key in which any characters are percent-encoded, once or several times, as in a path or query.
_ENCODED = r"(?:a|%(?:25)*+61)(?:g|%(?:25)*+67)(?:w|%(?:25)*+77)(?:_|%(?:25)*+5[Ff])"
_ENCODED += r"(?:[0-9A-Za-z]|%(?:25)*+(?:3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa])){20,}+"
_ENCODED_KEY = re.compile(_ENCODED.encode())
_BASE64_PREFIX = base64.b64encode(KEY_PREFIX.encode()).decode()[:5]  # the characters that the following ones keep
_JWT_BEGINNING = "eyJ"  # of a JSON Web Token, which begins with {"
_JWT = rf"{_JWT_BEGINNING}[0-9A-Za-z_-]{{8,}}+\.[0-9A-Za-z_-]{{8,}}+(?:\.[0-9A-Za-z_-]*+)?"
_KEY_IN_TEXT = re.compile(f"{_ENCODED}|{_BASE64_PREFIX}[0-9A-Za-z+/_-]{{20,}}|{_JWT}")
_PREFIX = KEY_PREFIX.encode()
_ID_DIGITS = 16  # of the digest: enough to tell keys apart, and too few to verify a guess of anything shorter


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is stored. Times are seconds since the epoch; `routes` None: all routes.

    `replaced_by` is the id of the key that a rotation created in its place, None if there was no rotation.
    """

    digest: str  # SHA-256, 64 hexadecimal digits
    label: str = ""
    created_at: float = 0.0
    expires_at: float | None = None
    routes: tuple[str, ...] | None = None
    replaced_by: str | None = None

    @property
    def id(self) -> str:
        """The name of the key in lists, logs and requests of operators: the beginning of its digest."""
        return key_id(self.digest)

    def is_valid_at(self, now: float) -> bool:
        """Return whether the key has not expired."""
        return self.expires_at is None or now < self.expires_at


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key, and the client that it belongs to."""

    client_id: str
    key: ApiKey


def new_key(random_bytes: bytes) -> str:
    """Return the key of 32 random bytes."""
    if len(random_bytes) != RANDOM_BYTES:
        raise ValueError(f"a key needs {RANDOM_BYTES} random bytes, got {len(random_bytes)}")
    body = _encoded(int.from_bytes(random_bytes), _BODY)
    return f"{KEY_PREFIX}{body}{_checksum(body.encode())}"


def has_key(value: bytes) -> bool:
    """Return whether a value contains what looks like a key, so that it is not shown even if it is not a valid one.

    Also if it is percent-encoded.
    """
    return (value.find(_PREFIX) >= 0 or ord("%") in value) and _ENCODED_KEY.search(value) is not None


def has_plain_key(value: bytes) -> bool:
    """Return whether a value contains what looks like a key, spelled as it was shown."""
    return _PREFIX in value and _LIKE_KEY.search(value) is not None


def without_keys(text: str) -> str:
    """Return a text without keys and JSON Web Tokens: clients and operators may put one where it does not belong.

    A key may be percent-encoded, or in base64 as in Basic credentials.
    """
    if KEY_PREFIX in text or "%" in text or _BASE64_PREFIX in text or _JWT_BEGINNING in text:
        return _KEY_IN_TEXT.sub(_omitted, text)
    return text


def quoted_path(path: str) -> str:
    """Return a path as a message shows it: without keys, with its first 100 characters, and escaped."""
    return f"{without_keys(path)[:_MAX_SHOWN]!a}"


def _omitted(found: re.Match[str]) -> str:
    """Return the text that is shown in place of a key or token."""
    return f"{_JWT_BEGINNING if found[0].startswith(_JWT_BEGINNING) else KEY_PREFIX}..."


def fault_of(key: bytes) -> str | None:
    """Return the error in the form of a key, for a message; None if it is well-formed."""
    if _KEY.fullmatch(key) is None:
        return f"it must be {KEY_PREFIX} and {_BODY + _CHECKSUM} letters and digits"
    body, checksum = key[len(KEY_PREFIX) : -_CHECKSUM], key[-_CHECKSUM:]
    return None if _checksum(body).encode() == checksum else "its checksum is wrong, so it was not copied exactly"


def digest_of(key: bytes) -> str:
    """Return the digest under which a key is stored."""
    return hashlib.sha256(key).hexdigest()


def key_id(digest: str) -> str:
    """Return the id of the key with this digest."""
    return digest[:_ID_DIGITS]


def keys_as_json(keys: Iterable[ApiKey]) -> str:
    """Return keys as a JSON object by digest, without absent members."""
    return json.dumps({key.digest: as_members(key) for key in keys}, separators=(",", ":"))


def as_members(key: ApiKey) -> dict[str, Any]:
    """Return a key as members of a JSON object, without its digest."""
    members: dict[str, Any] = {"label": key.label, "created_at": round(key.created_at, 3)}
    if key.expires_at is not None:
        members["expires_at"] = round(key.expires_at, 3)
    if key.routes is not None:
        members["routes"] = list(key.routes)
    if key.replaced_by is not None:
        members["replaced_by"] = key.replaced_by
    return members


def shown_id(identifier: str) -> str:
    """Return the id of a key as an operator gave it, for a message; a key given by mistake is not shown."""
    return "(a key instead of its id)" if identifier.startswith(KEY_PREFIX) else f"'{identifier[:64]}'"


def api_keys_of(members: Mapping[str, Any]) -> tuple[ApiKey, ...]:
    """Return the keys in a JSON object by digest, oldest first. Raises ValueError if it has another form."""
    keys = []
    for digest, one in members.items():
        try:
            key = ApiKey(
                digest,
                str(one["label"]),
                float(one["created_at"]),
                None if one.get("expires_at") is None else float(one["expires_at"]),
                None if one.get("routes") is None else tuple(map(str, one["routes"])),
                None if one.get("replaced_by") is None else str(one["replaced_by"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"key {key_id(digest)!r}: {error!r}") from None
        keys.append(key)
    return tuple(sorted(keys, key=lambda key: (key.created_at, key.digest)))


def _checksum(body: bytes) -> str:
    return _encoded(zlib.crc32(body), _CHECKSUM)


def _encoded(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
