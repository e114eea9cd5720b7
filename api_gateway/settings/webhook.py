"""The section `webhook`: where events such as warnings of quotas are delivered."""

import base64
import binascii
from typing import Annotated

from pydantic import Field, SecretStr, model_validator

from api_gateway.settings.secret import MAY_HOLD_PASSWORD, Secret, SecretFile
from api_gateway.settings.setting_types import Section
from api_gateway.settings.value_checks import ValueCheck

SECRET_PREFIX = "whsec_"  # noqa: S105 - what secrets of Standard Webhooks begin with


def signing_key(secret: str) -> bytes:
    """Return the key in a secret such as `whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw`. Raises ValueError."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not 24 <= len(key) <= 64:  # noqa: PLR2004 - by the specification
        raise ValueError("must be 24 to 64 random bytes in base64, optionally after whsec_")
    return key


def _secret(secret: SecretStr) -> SecretStr:
    signing_key(secret.get_secret_value())
    return secret


def _url(url: str) -> str:
    """Check the URL of a webhook. Messages quote none of it: any part may be a password."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in ("http", "https") or rest[:1] in ("", "/", ":"):
        raise ValueError("must be a URL that begins with https:// or http://")
    return url


class WebhookSection(Section):
    """The receiver of events, which are signed and repeated until it accepts them. Without `url`, none are sent."""

    url: Annotated[str, Field(max_length=2048), ValueCheck(_url), MAY_HOLD_PASSWORD] | None = Field(
        default=None, description="Where events are sent. None: nowhere."
    )
    secret: Annotated[Secret, ValueCheck(_secret)] | None = Field(
        default=None, description="With which events are signed: whsec_ and 24 to 64 random bytes in base64."
    )
    secret_file: SecretFile = None

    @model_validator(mode="after")
    def _has_secret(self) -> "WebhookSection":
        if self.url is not None and self.secret is None:
            raise ValueError("needs a secret or a secret_file, with which events are signed")
        return self
