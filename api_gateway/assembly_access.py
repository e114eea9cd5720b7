"""Builds, from configuration, who may use the operator endpoints."""

from api_gateway.config import GatewayConfig
from api_gateway.locality import LoopbackRule, NothingIsLocal
from api_gateway.operator_gate import Access
from api_gateway.operators import Operator, Role, Tokens


def operator_access(config: GatewayConfig) -> Access:
    """Return who may use the operator endpoints. A reload calls it again and gives the result to the gate."""
    section = config.admin
    tokens = [(Operator("admin", Role.OPERATE), section.token)] if section.token is not None else []
    tokens += [
        (Operator(name, Role(one.role)), one.token) for name, one in section.tokens.items() if one.token is not None
    ]
    return Access(
        Tokens((operator, token.get_secret_value().encode()) for operator, token in tokens),
        NothingIsLocal() if tokens else LoopbackRule(),
        config.server.trusted_proxies,
    )
