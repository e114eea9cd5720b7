"""Builds the identity sources and rules of a configuration."""

from api_gateway.clients.api_keys import ApiKey, KnownKey
from api_gateway.clients.identity_rules import IdentityRules
from api_gateway.clients.key_directory import KeyDirectory
from api_gateway.config import GatewayConfig
from api_gateway.models import Clock
from api_gateway.proxy.api_key_source import ApiKeySource
from api_gateway.proxy.certificate_source import CertificateSource
from api_gateway.proxy.identity_sources import Claim, CredentialSource, IdentitySources
from api_gateway.proxy.jwt_source import JwtSource
from api_gateway.settings.credential_rules import can_prove_ids

_SHOWN = 10  # client ids


def identity_rules(config: GatewayConfig) -> IdentityRules:
    """Return which client ids a credential must prove."""
    return IdentityRules(
        tiers=frozenset(name for name, tier in config.tiers.items() if tier.verified_only),
        clients={
            client_id: section.verified_only
            for client_id, section in config.clients.items()
            if section.verified_only is not None
        },
        keys={
            key.digest: KnownKey(
                client_id,
                ApiKey(
                    key.digest,
                    label,
                    expires_at=None if key.expires_at is None else key.expires_at.timestamp(),
                    routes=None if key.routes is None else tuple(key.routes),
                ),
            )
            for client_id, section in config.clients.items()
            for label, key in section.keys.items()
        },
        can_prove=can_prove_ids(config),
    )


def claimable_ids(config: GatewayConfig) -> list[str]:
    """Return the configured clients whose id anyone can claim by sending it."""
    if "header" not in config.identity.sources:
        return []
    rules = identity_rules(config)
    keyed = rules.keyed_clients
    return [
        client_id
        for client_id, section in config.clients.items()
        if not rules.is_verified_only(
            client_id, section.tier or config.default_tier, stored=None, has_keys=client_id in keyed
        )
        or config.identity.mode == "observe"
    ]


def claim_notice(config: GatewayConfig) -> str | None:
    """Return a line on the configured clients whose id anyone can claim; None if there are none."""
    names = claimable_ids(config)
    if not names:
        return None
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return (
        f"Anyone who sends {config.identity.header} can claim {len(names)} of {len(config.clients)} configured"
        f" clients: {shown}"
    )


def adopted_claim(claim: Claim, config: GatewayConfig, tokens: JwtSource | None) -> Claim | None:
    """Return the claim under this configuration for one made under an earlier one; None if it is no longer accepted.

    `tokens` is the source of JSON Web Tokens now. Everything else about a key or token is verified as for a new
    request.
    """
    source = claim.source
    if source.name not in config.identity.sources:
        return None
    if isinstance(source, CertificateSource):
        return claim if source.by == config.identity.certificate.by else None
    if isinstance(source, JwtSource) and source is not tokens:
        return None if tokens is None else tokens.adopted(claim)
    return claim


def identity_sources(
    config: GatewayConfig, keys: KeyDirectory, tokens: JwtSource | None, wall_clock: Clock
) -> IdentitySources:
    """Return the sources of a configuration, in their order; `tokens` is that of JSON Web Tokens."""
    names = config.identity.sources
    credentials: dict[str, CredentialSource] = {"api_key": ApiKeySource(keys, config.identity.api_key.header)}
    if tokens is not None:
        credentials["jwt"] = tokens
    certificates = None
    if "certificate" in names:
        certificates = credentials["certificate"] = CertificateSource(config.identity.certificate.by, wall_clock)
    place = names.index("header") if "header" in names else len(names)
    return IdentitySources(
        first=tuple(credentials[name] for name in names[:place] if name in credentials),
        behind=tuple(credentials[name] for name in names[place:] if name in credentials),
        accepts_header="header" in names,
        accepts_address="address" in names,
        connection=certificates,
    )
