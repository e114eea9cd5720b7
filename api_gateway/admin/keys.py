"""The endpoints at `/clients/{id}/keys`: API keys are created, listed, rotated and revoked."""

import secrets
from collections.abc import Sequence
from datetime import UTC
from typing import Any

from fastapi import APIRouter, Response

from api_gateway.admin.audit_log import AuditAction
from api_gateway.admin.context import AdminContext
from api_gateway.admin.dependencies import Audited, ClientId, Guarded
from api_gateway.admin.key_schema import (
    ClientKeys,
    KeyCreated,
    KeyRequest,
    KeyRevoked,
    KeyRotated,
    KeyTerms,
    KeyView,
    ProofChanged,
    ProofRequest,
    RotationRequest,
)
from api_gateway.admin.openapi import CLIENT_REFUSALS, PROBLEM, STORE_REFUSAL, TOKEN
from api_gateway.admin.utc_times import wall_time
from api_gateway.clients.api_keys import RANDOM_BYTES, ApiKey, digest_of, has_key, new_key, shown_id
from api_gateway.clients.key_directory import KeyNotAdded
from api_gateway.clients.records import MAX_VALID_KEYS, UNCHANGED, ClientRecord, KeyRefusal
from api_gateway.errors import Conflict, InvalidValue, NoRoute, RequestRefused

_UNKNOWN_KEY: dict[int | str, dict[str, Any]] = {
    404: {"description": "The client has no key with this id.", **PROBLEM}
}
_VALUES: dict[int | str, dict[str, Any]] = {
    422: {"description": "An error in the body, or too many keys.", **PROBLEM},
    **STORE_REFUSAL,
}

router = APIRouter(tags=["keys"], responses=CLIENT_REFUSALS, dependencies=[TOKEN])


@router.post("/clients/{client_id}/keys", summary="Create an API key", status_code=201, responses=_VALUES)
async def create_key(
    client_id: ClientId, body: KeyRequest, response: Response, context: Guarded, audit: Audited
) -> KeyCreated:
    """Create a key, and show it once. It is stored before the response, as its SHA-256.

    It is valid at once, and within a second on all gateways that share the store.
    """
    now = context.clocks.wall()
    if not context.accepts_keys:
        raise InvalidValue("identity.sources does not name api_key, so keys are not accepted; no key was created.")
    _check_routes(context, body.routes)
    if has_key(body.label.encode()):
        raise InvalidValue("body.label: must not contain an API key, because labels are shown.")
    routes = None if body.routes is None else tuple(dict.fromkeys(body.routes))
    secret, key = _new(body.label, now, _expiry(body, now), routes)
    verified_only = UNCHANGED if body.verified_only is None else body.verified_only
    before = _proof_of(context, client_id)
    try:
        async with audit.change(AuditAction.KEY_CREATED, client_id, before):
            await context.clients.keys.create(client_id, key, verified_only=verified_only)
    except KeyNotAdded as error:
        raise _too_many(error.record, "revoke one first") from error
    await audit(AuditAction.KEY_CREATED, client_id, before, {**_terms_of(key), **_proof_of(context, client_id)})
    response.headers["cache-control"] = "no-store"
    return KeyCreated(**_created(context, client_id, secret, key))


@router.get("/clients/{client_id}/keys", summary="A client's API keys")
async def client_keys(client_id: ClientId, context: Guarded) -> ClientKeys:
    """Return the client's keys, without the keys themselves: those that expired are listed for 30 days."""
    record, is_confirmed = await context.clients.record_of(client_id)
    configured = context.clients.keys.configured_of(client_id)
    uses = await context.clients.keys.last_uses([*configured, *record.keys])
    now, known = context.clocks.wall(), context.route_names
    views = [
        KeyView(
            id=key.id,
            label=key.label,
            created_at=None if is_configured else wall_time(key.created_at),
            expires_at=_time(key.expires_at),
            expired=not key.is_valid_at(now),
            last_used_at=_time(uses.get(key.digest)),
            routes=None if key.routes is None else list(key.routes),
            unknown_routes=[name for name in key.routes or () if name not in known],
            replaced_by=key.replaced_by,
            configured=is_configured,
        )
        for keys, is_configured in ((configured, True), (record.keys, False))
        for key in keys
    ]
    return ClientKeys(
        client_id=client_id,
        verified_only=context.clients.by_id(client_id).is_verified_only,
        confirmed=is_confirmed,
        keys=views,
    )


@router.post(
    "/clients/{client_id}/keys/{key_id}/rotate",
    summary="Replace an API key",
    status_code=201,
    responses={
        **_UNKNOWN_KEY,
        409: {"description": "The key has been replaced already. `detail` names the key to rotate.", **PROBLEM},
        **_VALUES,
    },
)
async def rotate_key(
    client_id: ClientId, key_id: str, body: RotationRequest, response: Response, context: Guarded, audit: Audited
) -> KeyRotated:
    """Create a key with the label and routes of another one, which stays valid for the overlap.

    Both happen in one change: at no time is neither valid. A key is replaced once, so that a request that is sent
    again creates no further key.
    """
    now = context.clocks.wall()
    record, _ = await context.clients.record_of(client_id)
    old = _stored(context, record, key_id, now)
    expires_at = _expiry(body, now)
    if expires_at is None and old.expires_at is not None:
        expires_at = now + (old.expires_at - old.created_at)
    until = round(now + body.overlap_seconds, 3)
    until = until if old.expires_at is None else min(until, old.expires_at)
    secret, key = _new(old.label, now, expires_at, old.routes)
    try:
        async with audit.change(AuditAction.KEY_ROTATED, client_id, _terms_of(old)):
            await context.clients.keys.rotate(client_id, old.digest, key, until)
    except KeyNotAdded as error:
        raise _not_rotated(error, key_id, now) from error
    after = {**_terms_of(key), "previous_expires_at": wall_time(until)}
    await audit(AuditAction.KEY_ROTATED, client_id, _terms_of(old), after)
    response.headers["cache-control"] = "no-store"
    return KeyRotated(
        **_created(context, client_id, secret, key), previous_id=old.id, previous_expires_at=wall_time(until)
    )


@router.delete(
    "/clients/{client_id}/keys/{key_id}", summary="Revoke an API key", responses={**_UNKNOWN_KEY, **STORE_REFUSAL}
)
async def revoke_key(client_id: ClientId, key_id: str, context: Guarded, audit: Audited) -> KeyRevoked:
    """Revoke a key at once, and within a second on all gateways that share the store.

    Its open streams and tunnels are ended within two seconds.
    """
    record, _ = await context.clients.record_of(client_id)
    key = _stored(context, record, key_id, None)
    before = {**_terms_of(key), **_proof_of(context, client_id)}
    async with audit.change(AuditAction.KEY_REVOKED, client_id, before):
        after = await context.clients.keys.revoke(client_id, key.digest)
    await audit(AuditAction.KEY_REVOKED, client_id, before, _proof_of(context, client_id))
    now = context.clocks.wall()
    left = sum(one.is_valid_at(now) for one in (*after.keys, *context.clients.keys.configured_of(client_id)))
    return KeyRevoked(client_id=client_id, id=key.id, label=key.label, keys_left=left)


@router.post(
    "/clients/{client_id}/verified-only", summary="Set whether a credential must prove an id", responses=_VALUES
)
async def require_proof(client_id: ClientId, body: ProofRequest, context: Guarded, audit: Audited) -> ProofChanged:
    """Set whether the client's id alone identifies the client, or only a credential does."""
    before = _proof_of(context, client_id)
    async with audit.change(AuditAction.PROOF_SET, client_id, before):
        await context.clients.keys.require_proof(client_id, verified_only=body.verified_only)
    after = _proof_of(context, client_id)
    await audit(AuditAction.PROOF_SET, client_id, before, after)
    return ProofChanged(client_id=client_id, verified_only=after["verified_only"])


def _proof_of(context: AdminContext, client_id: str) -> dict[str, bool]:
    """Return whether a credential must prove the id, for the audit log."""
    return {"verified_only": context.clients.by_id(client_id).is_verified_only}


def _terms_of(key: ApiKey) -> dict[str, object]:
    """Return the id, label, end and routes of a key, for the audit log."""
    routes = None if key.routes is None else list(key.routes)
    return {"key": key.id, "label": key.label, "expires_at": _time(key.expires_at), "routes": routes}


def _too_many(record: ClientRecord, remedy: str) -> InvalidValue:
    return InvalidValue(f"Client '{record.id}' has {MAX_VALID_KEYS} valid keys, which is the limit; {remedy}.")


def _not_rotated(error: KeyNotAdded, key_id: str, now: float) -> RequestRefused:
    """Return the error of a rotation that another request was faster than, or that would leave too many keys."""
    if error.refusal is KeyRefusal.TOO_MANY:
        return _too_many(error.record, "revoke one first, or send overlap_seconds: 0")
    replaced = next((key for key in error.record.keys if key.id == key_id), None)
    return _no_key(error.record.id, key_id) if replaced is None else _replaced(error.record, replaced, now)


def _replaced(record: ClientRecord, key: ApiKey, now: float) -> Conflict:
    """Return the error of a rotation of a key that has been replaced, with what to do if its successor was lost."""
    by_id = {one.id: one for one in record.keys}
    last = key
    while last.replaced_by is not None and (successor := by_id.pop(last.replaced_by, None)) is not None:
        last = successor
    remedy = "create a new key"
    if last is not key and last.replaced_by is None and last.is_valid_at(now):
        remedy = f"rotate key '{last.id}' with overlap_seconds: 0 if the new key was lost"
    return Conflict(f"Key '{key.id}' has been replaced by key '{key.replaced_by}'; {remedy}.")


def _new(label: str, now: float, expires_at: float | None, routes: tuple[str, ...] | None) -> tuple[str, ApiKey]:
    secret = new_key(secrets.token_bytes(RANDOM_BYTES))
    ends = None if expires_at is None else round(expires_at, 3)
    return secret, ApiKey(digest_of(secret.encode()), label, round(now, 3), ends, routes)


def _created(context: AdminContext, client_id: str, secret: str, key: ApiKey) -> dict[str, object]:
    return {
        "client_id": client_id,
        "key": secret,
        "id": key.id,
        "label": key.label,
        "expires_at": _time(key.expires_at),
        "routes": None if key.routes is None else list(key.routes),
        "verified_only": context.clients.by_id(client_id).is_verified_only,
    }


def _stored(context: AdminContext, record: ClientRecord, key_id: str, now: float | None) -> ApiKey:
    """Return the key with this id; with `now` only if it can be rotated. Raises NoRoute, InvalidValue and Conflict."""
    for key in record.keys:
        if key.id == key_id:
            if now is not None and key.replaced_by is not None:
                raise _replaced(record, key, now)
            if now is not None and not key.is_valid_at(now):
                raise InvalidValue(f"Key '{key_id}' has expired; create a new one.")
            return key
    if any(key.id == key_id for key in context.clients.keys.configured_of(record.id)):
        raise InvalidValue(f"Key '{key_id}' is set in the configuration; change it there.")
    raise _no_key(record.id, key_id)


def _no_key(client_id: str, key_id: str) -> NoRoute:
    return NoRoute(f"Client '{client_id}' has no key {shown_id(key_id)}; GET /clients/{client_id}/keys lists them.")


def _expiry(body: KeyTerms, now: float) -> float | None:
    """Return when a new key expires, in seconds since the epoch. Raises InvalidValue."""
    if body.expires_at is not None and body.expires_in_seconds is not None:
        raise InvalidValue("body: must have expires_at or expires_in_seconds, got both.")
    if body.expires_in_seconds is not None:
        return now + body.expires_in_seconds
    if body.expires_at is None:
        return None
    at = body.expires_at.astimezone(UTC).timestamp()
    if at <= now:
        given = body.expires_at.isoformat()
        raise InvalidValue(f"body.expires_at: must be in the future, got '{given}'; the time is {wall_time(now)}.")
    return at


def _check_routes(context: AdminContext, routes: Sequence[str] | None) -> None:
    """Raise InvalidValue if a route does not exist."""
    known = context.route_names
    for name in routes or ():
        if name not in known:
            raise InvalidValue(f"body.routes: there is no route '{name}'; the routes are {', '.join(known)}.")


def _time(at: float | None) -> str | None:
    return None if at is None else wall_time(at)
