"""The identifier that a client sends. Pure decisions on header fields; `admin.operators` has those on operators."""

from api_gateway.errors import ClientIdInvalid
from api_gateway.http1.headers import Fields, is_visible_ascii


def client_id(fields: Fields, name: bytes) -> str | None:
    """Return the identifier the client sent in header `name` (lower case), or None when it sent none.

    Raises ClientIdInvalid unless it came once and is 1 to 128 visible ASCII characters: a client that can vary the
    spelling of its name must not get a bucket for each.
    """
    found = fields.get(name)
    if not found:
        return None
    if len(found) > 1:
        raise ClientIdInvalid(f"{_spelt(name)} was sent {len(found)} times; send it once.")
    if not is_visible_ascii(found[0]):
        shown = found[0][:40].decode("latin-1").encode("unicode_escape").decode("ascii")
        raise ClientIdInvalid(
            f"{_spelt(name)} must be 1 to 128 visible ASCII characters, got {len(found[0])} bytes: '{shown}'."
        )
    return found[0].decode("ascii")


def _spelt(name: bytes) -> str:
    return "-".join("ID" if part == "id" else part.capitalize() for part in name.decode("ascii").split("-"))
