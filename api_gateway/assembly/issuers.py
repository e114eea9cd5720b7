"""Builds the issuers of tokens: where their keys come from, what their claims mean, and the tasks that fetch keys."""

import asyncio
import importlib
import json
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from api_gateway.clients.claim_paths import ClaimPath
from api_gateway.clients.issuer_keys import IssuerKeys, KeysUnavailable, VerificationKey
from api_gateway.clients.jwt_reader import IssuerTerms, TokenReader
from api_gateway.clients.jwt_verifier import ClaimMeanings, Issuer, JwtVerifier
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Clock
from api_gateway.proxy.jwt_source import JwtSource
from api_gateway.settings.jwt import IssuerSection, JwtSection
from api_gateway.system.clocks import Clocks
from api_gateway.system.x509 import verifying_context
from api_gateway.transport.document_fetch import MAX_DOCUMENT_BYTES, DocumentUnavailable, fetch_document, shown_url

MISSING_EXTRA = (
    "identity.sources: jwt needs the package joserfc; install it with pip install 'api-gateway[jwt]', or remove jwt"
)
Fetch = Callable[[str, ssl.SSLContext], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class _Basis:
    """The settings that a source of tokens is built from."""

    section: JwtSection
    tiers: tuple[str, ...]
    kept: tuple[str, ...]  # the paths of claims that routes require, and limits count by

    @classmethod
    def of(cls, config: GatewayConfig) -> "_Basis":
        required = [path for route in config.routes if route.require is not None for path in route.require.claims]
        parts = [part.partition(":") for limit in config.limits for part in limit.key]
        counted = [path for kind, _, path in parts if kind == "claim"]
        return cls(config.identity.jwt, tuple(config.tiers), tuple(dict.fromkeys([*required, *counted])))


class Issuers:
    """Builds sources of tokens, and runs the tasks that fetch the keys of the issuers in use."""

    def __init__(
        self, clocks: Clocks, on_withdrawal: Callable[[], None], on_fetch: Callable[[str, bool], None]
    ) -> None:
        """`on_withdrawal` is called when a key is no longer valid.

        `on_fetch` is called after each fetch with the name of the issuer, and whether it succeeded.
        """
        self._clocks = clocks
        self._on_withdrawal, self._on_fetch = on_withdrawal, on_fetch
        self._tasks: dict[IssuerKeys, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Issuers [{len(self._tasks)} in use]>"

    def plan(self, config: GatewayConfig, before: JwtSource | None) -> JwtSource | None:
        """Return the source of tokens of a configuration, None if tokens are not a source. Blocks.

        It is `before` if nothing has changed; otherwise issuers that have not changed keep their keys. Raises
        StartupError.
        """
        if "jwt" not in config.identity.sources:
            return None
        basis = _Basis.of(config)
        if before is not None and before.basis == basis:
            return before
        issuers, keys = {}, {}
        for name, section in basis.section.issuers.items():
            keys[name] = _unchanged(before, name, section) or keys_of(
                name,
                section,
                clock=self._clocks.monotonic,
                on_withdrawal=self._on_withdrawal,
                on_fetch=partial(self._on_fetch, name),
            )
            issuers[name] = Issuer(terms_of(name, section), meanings_of(section, basis.tiers), keys[name])
        by_claim = {section.issuer: issuers[name].terms for name, section in basis.section.issuers.items()}
        return JwtSource(
            TokenReader(by_claim, max_bytes=basis.section.max_token_bytes),
            JwtVerifier(
                issuers, max_remembered=basis.section.max_remembered, kept=[ClaimPath.of(path) for path in basis.kept]
            ),
            keys,
            wall_clock=self._clocks.wall,
            clock_ns=self._clocks.monotonic_ns,
            is_forwarded=basis.section.forward,
            identity_fields=frozenset(name for issuer in issuers.values() for name, _ in issuer.meanings.fields),
            basis=basis,
        )

    def follow(self, source: JwtSource | None) -> None:
        """Fetch the keys of a source from now on, and no others."""
        used = [] if source is None else list(source.keys.values())
        for keys in [keys for keys in self._tasks if keys not in used]:
            task = self._tasks.pop(keys)
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        for keys in used:
            if keys not in self._tasks:
                self._tasks[keys] = asyncio.create_task(keys.run(), name=f"issuer {keys.name}")

    async def close(self) -> None:
        """End all tasks."""
        await cancel_and_wait(*self._tasks.values(), *self._ending)


def _unchanged(before: JwtSource | None, name: str, section: IssuerSection) -> IssuerKeys | None:
    """Return the keys of an issuer before a reload if its section is the same."""
    basis = None if before is None else before.basis
    if before is None or not isinstance(basis, _Basis) or basis.section.issuers.get(name) != section:
        return None
    return before.keys[name]


def jose() -> Any:
    """Return the module `clients.jose`. Raises StartupError if the library is not installed."""
    try:
        return importlib.import_module("api_gateway.clients.jose")
    except ImportError as error:
        raise StartupError(MISSING_EXTRA) from error


def terms_of(name: str, section: IssuerSection) -> IssuerTerms:
    """Return the requirements for the tokens of an issuer."""
    return IssuerTerms(
        name,
        frozenset(section.audiences),
        frozenset(section.permitted),
        frozenset(one.lower().removeprefix("application/") for one in section.types),
        section.leeway,
        ClaimPath.of(section.audience_claim),
        section.accept_bound,
    )


def meanings_of(section: IssuerSection, tiers: Iterable[str]) -> ClaimMeanings:
    """Return the meanings of an issuer's claims. `tiers` are the configured ones."""
    return ClaimMeanings(
        ClaimPath.of(section.client_claim),
        section.client_prefix,
        None if section.tier_claim is None else ClaimPath.of(section.tier_claim),
        dict(section.tiers) or {name: name for name in tiers},
        None if section.organisation_claim is None else ClaimPath.of(section.organisation_claim),
        tuple(map(ClaimPath.of, section.scope_claims)),
        tuple((name.lower().encode(), ClaimPath.of(path)) for name, path in section.headers.items()),
    )


def keys_of(
    name: str,
    section: IssuerSection,
    *,
    clock: Clock,
    on_withdrawal: Callable[[], None] = lambda: None,
    on_fetch: Callable[[bool], None] = lambda _succeeded: None,
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
        on_fetch=on_fetch,
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
            self._context = verifying_context(section.ca_file)
        except (OSError, ValueError) as error:
            raise StartupError(f"{place}.ca_file: cannot be used: {error}, got '{section.ca_file}'") from error

    async def keys(self) -> Sequence[VerificationKey]:
        """Fetch the keys. Raises KeysUnavailable."""
        url = self._section.jwks_url or await self._discover()
        document = await self._document(url)
        try:
            return await asyncio.to_thread(self._parse, document)
        except ValueError as error:
            raise KeysUnavailable(f"{shown_url(url)}: {error}") from error

    async def _discover(self) -> str:
        """Return the URL of the keys from the issuer's OpenID configuration (OpenID Connect Discovery 1.0)."""
        url = self._section.document_url or ""
        try:
            content = json.loads(await self._document(url))
        except (ValueError, RecursionError) as error:
            raise KeysUnavailable(f"{shown_url(url)}: it is no JSON") from error
        found = content if isinstance(content, dict) else {}
        if found.get("issuer") != self._section.issuer:  # section 4.3
            issuer = str(found.get("issuer"))[:200]
            raise KeysUnavailable(
                f"{shown_url(url)}: its issuer is {issuer!r}, not the configured {self._section.issuer!r}"
            )
        named = found.get("jwks_uri")
        if not isinstance(named, str) or not self._permits(named, url):
            raise KeysUnavailable(f"{shown_url(url)}: its jwks_uri is not an https URL, got {shown_url(str(named))!r}")
        return named

    def _permits(self, named: str, by: str) -> bool:
        """Return whether keys may be fetched from a URL that the document at `by` names.

        A document of another machine must not have services of this one fetched, so loopback is not an exception
        there.
        """
        is_secure = not self._section.allow_http and by.startswith("https:")
        return self._section.permits(named) and not (is_secure and not named.startswith("https:"))

    async def _document(self, url: str) -> bytes:
        try:
            return await self._fetch(url, self._context)
        except DocumentUnavailable as error:
            raise KeysUnavailable(str(error)) from error
