"""Builds, from configuration, who may use the operator endpoints."""

from api_gateway.config_sections import AdminSection
from api_gateway.locality import LoopbackRule, NothingIsLocal
from api_gateway.operator_gate import Access
from api_gateway.operators import Operator, Role, Tokens


def operator_access(section: AdminSection) -> Access:
    """Return who may use the operator endpoints. A reload calls it again."""
    if section.token is None:
        return Access(Tokens(), LoopbackRule())
    operator = Operator("admin", Role.OPERATE)
    return Access(Tokens([(operator, section.token.get_secret_value().encode())]), NothingIsLocal())
