"""Builds the issuers of tokens: where their keys come from, and what their claims mean."""

import asyncio
import importlib
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from api_gateway.clients.claim_paths import ClaimPath
from api_gateway.clients.issuer_keys import IssuerKeys, KeysUnavailable, VerificationKey
from api_gateway.clients.jwt_reader import IssuerTerms
from api_gateway.clients.jwt_verifier import ClaimMeanings
from api_gateway.errors import StartupError
from api_gateway.models import Clock
from api_gateway.settings.jwt import IssuerSection
from api_gateway.transport.document_fetch import MAX_DOCUMENT_BYTES, DocumentUnavailable, fetch_document

MISSING_EXTRA = (
    "identity.sources: jwt needs the package joserfc; install it with pip install 'api-gateway[jwt]', or remove jwt"
)
Fetch = Callable[[str, ssl.SSLContext], Awaitable[bytes]]


def jose() -> Any:
    """Return the module `clients.jose`. Raises StartupError if the library is not installed."""
    try:
        return importlib.import_module("api_gateway.clients.jose")
    except ImportError as error:
        raise StartupError(MISSING_EXTRA) from error


def terms_of(name: str, section: IssuerSection) -> IssuerTerms:
    """Return what the tokens of an issuer must have."""
    return IssuerTerms(
        name,
        frozenset(section.audiences),
        frozenset(section.permitted),
        frozenset(one.lower().removeprefix("application/") for one in section.types),
        section.leeway,
        ClaimPath.of(section.audience_claim),
    )


def meanings_of(section: IssuerSection, tiers: Mapping[str, Any]) -> ClaimMeanings:
    """Return what the claims of an issuer mean. `tiers` are the configured ones."""
    return ClaimMeanings(
        ClaimPath.of(section.client_claim),
        section.client_prefix,
        None if section.tier_claim is None else ClaimPath.of(section.tier_claim),
        dict(section.tiers) or {name: name for name in tiers},
        None if section.organisation_claim is None else ClaimPath.of(section.organisation_claim),
        tuple(map(ClaimPath.of, section.scope_claims)),
    )


def keys_of(
    name: str,
    section: IssuerSection,
    *,
    clock: Clock,
    on_withdrawal: Callable[[], None] = lambda: None,
    fetch: Fetch = fetch_document,
) -> IssuerKeys:
    """Return the keys of an issuer, which are fetched later, by `IssuerKeys.run`.

    Raises StartupError if a file cannot be used, or the library is not installed.
    """
    return IssuerKeys(
        name,
        _load_of(name, section, fetch),
        clock=clock,
        refresh_interval=section.refresh_interval,
        unknown_key_interval=section.unknown_key_interval,
        stale_for=section.stale_for,
        on_withdrawal=on_withdrawal,
    )


def _load_of(name: str, section: IssuerSection, fetch: Fetch) -> Callable[[], Awaitable[Sequence[VerificationKey]]]:
    library, place = jose(), f"identity.jwt.issuers.{name}"
    try:
        if section.secret is not None:
            key = library.key_of_secret(section.secret.get_secret_value().encode(), section.permitted)
            return partial(_known, [key])
        parse = partial(library.keys_of_set, permitted=section.permitted)
        if section.jwks_file is not None:
            load = partial(_keys_of_file, section, parse)
            load()  # a mistake ends the start
            return partial(asyncio.to_thread, load)
    except (ValueError, KeysUnavailable) as error:
        setting = "secret" if section.secret is not None else "jwks_file"
        raise StartupError(f"{place}.{setting}: {error}") from None
    return _Remote(place, section, parse, fetch).keys


async def _known(keys: Sequence[VerificationKey]) -> Sequence[VerificationKey]:
    return keys


def _keys_of_file(
    section: IssuerSection, parse: Callable[[bytes], Sequence[VerificationKey]]
) -> Sequence[VerificationKey]:
    assert section.jwks_file is not None  # noqa: S101 - see the caller
    try:
        with section.jwks_file.open("rb") as file:
            return parse(file.read(MAX_DOCUMENT_BYTES))
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise KeysUnavailable(f"cannot be used: {cause}, got '{section.jwks_file}'") from error


class _Remote:
    """Keys that are fetched from their URL, which the issuer's OpenID configuration may name."""

    def __init__(
        self, place: str, section: IssuerSection, parse: Callable[[bytes], Sequence[VerificationKey]], fetch: Fetch
    ) -> None:
        self._section, self._parse, self._fetch = section, parse, fetch
        try:
            self._context = ssl.create_default_context(cafile=section.ca_file)
        except (OSError, ValueError) as error:
            raise StartupError(f"{place}.ca_file: cannot be used: {error}, got '{section.ca_file}'") from error

    async def keys(self) -> Sequence[VerificationKey]:
        """Fetch the keys. Raises KeysUnavailable."""
        url = self._section.jwks_url or await self._discover()
        document = await self._document(url)
        try:
            return await asyncio.to_thread(self._parse, document)
        except ValueError as error:
            raise KeysUnavailable(f"{url}: {error}") from error

    async def _discover(self) -> str:
        """Return the URL of the keys from the issuer's OpenID configuration (OpenID Connect Discovery 1.0)."""
        url = self._section.document_url or ""
        try:
            content = json.loads(await self._document(url))
        except (ValueError, RecursionError) as error:
            raise KeysUnavailable(f"{url}: it is no JSON") from error
        found = content if isinstance(content, dict) else {}
        if found.get("issuer") != self._section.issuer:  # section 4.3
            raise KeysUnavailable(
                f"{url}: its issuer is {str(found.get('issuer'))[:200]!r}, not the configured {self._section.issuer!r}"
            )
        named = found.get("jwks_uri")
        if not isinstance(named, str) or not self._section.permits(named):
            raise KeysUnavailable(f"{url}: its jwks_uri is not an https URL, got {str(named)[:200]!r}")
        return named

    async def _document(self, url: str) -> bytes:
        try:
            return await self._fetch(url, self._context)
        except DocumentUnavailable as error:
            raise KeysUnavailable(str(error)) from error
