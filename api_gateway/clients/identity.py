"""The client id in a request's header fields. Pure decisions; `admin.operators` identifies operators."""

from api_gateway.clients.api_keys import has_key
from api_gateway.errors import ClientIdInvalid
from api_gateway.http1.headers import Fields, is_visible_ascii


def client_id(fields: Fields, name: bytes) -> str | None:
    """Return the client id in header `name` (lower case); None if there is none.

    Raises ClientIdInvalid unless the header has one value of 1 to 128 visible ASCII characters: a client must not get
    several buckets by spelling its id in several ways. An API key is not a valid id, because ids are logged.
    """
    found = fields.get(name)
    if not found:
        return None
    if len(found) > 1:
        raise ClientIdInvalid(f"{_display_name(name)} was sent {len(found)} times; send it once.")
    if has_key(found[0]):
        raise ClientIdInvalid(f"{_display_name(name)} has an API key instead of a client id; send it as a credential.")
    if not is_visible_ascii(found[0]):
        shown = found[0][:40].decode("latin-1").encode("unicode_escape").decode("ascii")
        raise ClientIdInvalid(
            f"{_display_name(name)} must be 1 to 128 visible ASCII characters, got {len(found[0])} bytes: '{shown}'."
        )
    return found[0].decode("ascii")


def _display_name(name: bytes) -> str:
    return "-".join("ID" if part == "id" else part.capitalize() for part in name.decode("ascii").split("-"))
