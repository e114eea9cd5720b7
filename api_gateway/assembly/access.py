"""Builds the access rules of the operator endpoints from the configuration."""

import os
from collections.abc import Iterator

from api_gateway.admin.gate import Access
from api_gateway.admin.local_operator import LocalProcesses
from api_gateway.admin.locality import Locality, LoopbackRule, NothingIsLocal
from api_gateway.admin.operator_token import operator_token
from api_gateway.admin.operators import Operator, Role, Tokens
from api_gateway.assembly.forwarding import forwarding_of
from api_gateway.assembly.routes import cors_of
from api_gateway.config import GatewayConfig
from api_gateway.settings.admin import AdminSection
from api_gateway.system.peer_process import PeerProcesses

GENERATED_TOKEN_OPERATOR = Operator("operator-token", Role.OPERATE)
NO_ACCESS = Access(Tokens(), NothingIsLocal())


def operator_access(config: GatewayConfig, locality: Locality | None = None) -> Access:
    """Return the access rules of the operator endpoints. Called again at each reload, whose result goes to the gate.

    Generates the token in `state_dir` if there is none yet. `locality` replaces the rule for local requests. If a
    token is configured, or `admin.local` is false, no request is local. Blocks.
    """
    configured, generated = list(_configured(config.admin)), operator_token(config.state_dir)
    if configured or not config.admin.local:
        locality = NothingIsLocal()
    return Access(
        Tokens([*configured, *([(GENERATED_TOKEN_OPERATOR, generated.encode())] if generated is not None else [])]),
        locality or _local_programs(config),
        config.server.trusted_proxies,
        forwarding_of(config.server.forwarded).read,
        cors_of(config.cors),
    )


def _configured(section: AdminSection) -> Iterator[tuple[Operator, bytes]]:
    if section.token is not None:
        yield Operator("admin", Role.OPERATE), section.token.get_secret_value().encode()
    for name, one in section.tokens.items():
        if one.token is not None:
            yield Operator(name, Role(one.role)), one.token.get_secret_value().encode()


def _local_programs(config: GatewayConfig) -> Locality:
    peers = PeerProcesses(os.geteuid())
    if peers.is_available:
        return LocalProcesses(peers, trusted_proxies=config.server.trusted_proxies)
    return LoopbackRule() if config.is_demo else NothingIsLocal()
