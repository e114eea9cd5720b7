"""The bodies of the endpoints at `/clients/{id}/keys`."""

from typing import Annotated

from pydantic import AfterValidator, Field

from api_gateway.admin.request_schema import RequestBody, one_line
from api_gateway.models import Body, Instant

_TEN_YEARS = 315_576_000
_Seconds = Annotated[float, Field(gt=0, le=_TEN_YEARS)]


_Label = Annotated[str, Field(max_length=200), AfterValidator(one_line)]


class KeyTerms(RequestBody):
    """When a new key expires: at a time, after a time, or never."""

    expires_at: Instant | None = Field(
        default=None, description="ISO 8601 with UTC offset.", examples=["2027-12-01T00:00:00Z"]
    )
    expires_in_seconds: _Seconds | None = None


class KeyRequest(KeyTerms):
    """The body of POST /clients/{id}/keys."""

    label: _Label = Field(
        default="", description="A name for the key, such as its user or purpose.", examples=["laptop"]
    )
    routes: Annotated[list[str], Field(min_length=1, max_length=100)] | None = Field(
        default=None, description="Names of the routes that the key is valid for; null: all."
    )
    verified_only: bool | None = Field(
        default=None,
        description="Whether a credential must prove the client's id from now on. null: true with the first key, and"
        " else as it was.",
    )


class RotationRequest(KeyTerms):
    """The body of POST /clients/{id}/keys/{key}/rotate.

    Without an expiry, the new key lives as long as the old one. A key is rotated once; then its successor is.
    """

    overlap_seconds: float = Field(
        default=86_400, ge=0, le=_TEN_YEARS, description="How long the old key stays valid; not beyond its expiry."
    )


class ProofRequest(RequestBody):
    """The body of POST /clients/{id}/verified-only."""

    verified_only: bool | None = Field(
        description="Whether a credential must prove the client's id; null: as configured, else if it has keys."
    )


class KeyView(Body):
    """A key, without the key itself."""

    id: str = Field(description="Name of the key in lists, logs and requests: the beginning of its SHA-256.")
    label: str
    created_at: str | None = Field(description="UTC, ISO 8601; null for a key of the configuration.")
    expires_at: str | None = Field(description="UTC, ISO 8601; null: never.")
    expired: bool
    last_used_at: str | None = Field(
        description="UTC, ISO 8601, to the minute, up to a minute late; null: not used, or not known."
    )
    routes: list[str] | None
    unknown_routes: list[str] = Field(
        description="Names in `routes` that no route has: the key is valid for none of them."
    )
    replaced_by: str | None = Field(description="Id of the key that a rotation created in its place; null: none.")
    configured: bool = Field(description="True for a key of the configuration, which this API cannot change.")


class ClientKeys(Body):
    """The keys of a client, oldest first."""

    client_id: str
    verified_only: bool = Field(description="Whether a credential must prove the client's id.")
    confirmed: bool = Field(description="False if the client store is unavailable, see `GET /clients/{id}`.")
    keys: list[KeyView]


class KeyCreated(Body):
    """A new key. This is the only response that contains it."""

    client_id: str
    key: str = Field(description="The key. It cannot be shown again.")
    id: str
    label: str
    expires_at: str | None
    routes: list[str] | None
    verified_only: bool


class KeyRotated(KeyCreated):
    """A new key, and the one that it replaces."""

    previous_id: str
    previous_expires_at: str = Field(description="UTC, ISO 8601: until then both keys are valid.")


class KeyRevoked(Body):
    """The response to a revocation: the key's id, and the number of valid keys left."""

    client_id: str
    id: str
    label: str
    keys_left: int = Field(description="Number of valid keys that the client still has.")


class ProofChanged(Body):
    """Whether a credential must prove a client's id, from now on."""

    client_id: str
    verified_only: bool
