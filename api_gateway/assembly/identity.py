"""Builds the identity sources and rules of a configuration."""

from api_gateway.clients.identity_rules import IdentityRules
from api_gateway.config import GatewayConfig
from api_gateway.proxy.identity_sources import CredentialSource, IdentitySources
from api_gateway.proxy.jwt_source import JwtSource


def identity_rules(config: GatewayConfig) -> IdentityRules:
    """Return which client ids a credential must prove."""
    return IdentityRules(
        tiers=frozenset(name for name, tier in config.tiers.items() if tier.verified_only),
        clients={
            client_id: section.verified_only
            for client_id, section in config.clients.items()
            if section.verified_only is not None
        },
    )


def identity_sources(config: GatewayConfig, tokens: JwtSource | None) -> IdentitySources:
    """Return the sources of a configuration, in their order; `tokens` is that of JSON Web Tokens."""
    names = config.identity.sources
    credentials: dict[str, CredentialSource] = {}
    if tokens is not None:
        credentials["jwt"] = tokens
    place = names.index("header") if "header" in names else len(names)
    return IdentitySources(
        first=tuple(credentials[name] for name in names[:place] if name in credentials),
        behind=tuple(credentials[name] for name in names[place:] if name in credentials),
        accepts_header="header" in names,
        accepts_address="address" in names,
    )
