"""Builds, from configuration, who may use the operator endpoints."""

import os

from api_gateway.config import GatewayConfig
from api_gateway.local_operator import LocalProcesses
from api_gateway.locality import Locality, LoopbackRule, NothingIsLocal
from api_gateway.operator_gate import Access
from api_gateway.operator_token import operator_token
from api_gateway.operators import Operator, Role, Tokens
from api_gateway.peer_process import PeerProcesses

CONFIGURED = Operator("admin", Role.OPERATE)
GENERATED = Operator("operator-token", Role.OPERATE)
NOBODY = Access(Tokens(), NothingIsLocal())


def operator_access(config: GatewayConfig, locality: Locality | None = None) -> Access:
    """Return who may use the operator endpoints; generates the token in `state_dir`. A reload calls it again.

    `locality` takes the place of the rule for programs of this machine. Where a token is configured, or `admin.local`
    is false, nothing is local.
    """
    tokens = []
    generated, configured = operator_token(config.state_dir), config.admin.token
    if generated is not None:
        tokens.append((GENERATED, generated.encode()))
    if configured is not None:
        tokens.append((CONFIGURED, configured.get_secret_value().encode()))
    if configured is not None or not config.admin.local:
        locality = NothingIsLocal()
    return Access(Tokens(tokens), locality or _local_programs(config))


def _local_programs(config: GatewayConfig) -> Locality:
    peers = PeerProcesses(os.geteuid())
    if peers.is_available:
        return LocalProcesses(peers, trusted_proxies=config.server.trusted_proxies)
    return LoopbackRule() if config.is_demo else NothingIsLocal()
