"""Sections of the operator endpoints: tokens, roles and the listener for operators."""

from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator

from api_gateway.settings.secret import Secret, SecretFile
from api_gateway.settings.setting_types import FileMode, Identifier, Listen, Section
from api_gateway.settings.value_checks import ValueCheck

MIN_TOKEN_LENGTH = 8


def _long_enough(token: SecretStr) -> SecretStr:
    if len(token.get_secret_value()) < MIN_TOKEN_LENGTH:
        raise ValueError(f"must have at least {MIN_TOKEN_LENGTH} characters")
    return token


OperatorToken = Annotated[Secret, ValueCheck(_long_enough)]


class TokenSection(Section):
    """A named operator token. `read` permits views and metrics, `operate` also changes (tiers, modes, reload)."""

    role: Literal["read", "operate"] = Field(
        default="read", description="read: views and metrics. operate: changes too."
    )
    token: OperatorToken | None = Field(default=None, description="The token, of at least 8 characters.")
    token_file: SecretFile = None

    @model_validator(mode="after")
    def _has_token(self) -> "TokenSection":
        if self.token is None:
            raise ValueError("needs a token or a token_file")
        return self


class AdminSection(Section):
    """Access to the operator endpoints. Without a configured token, local requests need none (see `local`)."""

    token: OperatorToken | None = Field(default=None, description="A token named 'admin' with the role operate.")
    token_file: SecretFile = None
    tokens: dict[Identifier, TokenSection] = Field(
        default={}, description="Further tokens by name. Several are valid at once, so that one can be replaced."
    )
    local: bool = Field(default=True, description="Whether local requests need no token; see the docs.")
    listen: Listen | None = Field(
        default=None, description="host:port or unix:/path: a listener for the operator endpoints only."
    )
    tls: bool = Field(default=False, description="Whether that listener has the certificates of server.tls.")
    socket_mode: FileMode = Field(default=0o600, description="File permissions of that Unix socket.")
