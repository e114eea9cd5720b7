"""The section `identity`: how clients are identified."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from api_gateway.settings.jwt import JwtSection
from api_gateway.settings.setting_types import OWN_HEADER, Duration, Section
from api_gateway.settings.value_checks import ValueCheck, ValueReader

_WrittenMode = Literal["enforce", "observe", "header"]
SourceName = Literal["api_key", "jwt", "certificate", "header", "address"]


def _in_order(sources: Sequence[str]) -> Sequence[str]:
    if len(set(sources)) < len(sources):
        raise ValueError("must not name a source twice")
    if "address" in sources[:-1]:
        raise ValueError("must end with address, because every request has one")
    return sources


def _mode(value: Any) -> Any:
    """Accept `header`, the only value of earlier versions, which meant the default sources."""
    return "enforce" if value == "header" else value


class ApiKeySection(Section):
    """How API keys are accepted."""

    header: str = Field(
        default="X-API-Key",
        pattern=OWN_HEADER,
        description="The request field with the key; a bearer token and the user name of Basic are accepted too.",
    )
    outage_tolerance: Duration = Field(
        default=3600,
        ge=0,
        le=31_536_000,
        description="Seconds of an outage of the client store for which the keys that it had before are accepted.",
    )


class CertificateIdentitySection(Section):
    """How certificates of clients identify them."""

    by: Literal["common_name", "subject", "uri", "dns", "email"] = Field(
        default="common_name",
        description="The client id: of the subject, or the first alternative name of this kind.",
    )


class IdentitySection(Section):
    """How clients are identified: by the first source that applies to a request."""

    sources: Annotated[list[SourceName], Field(min_length=1), ValueCheck(_in_order)] = Field(
        default=["api_key", "header", "address"], description="Tried in this order."
    )
    header: str = Field(
        default="X-Client-ID", pattern=OWN_HEADER, description="The request field with the id of a client."
    )
    api_key: ApiKeySection = ApiKeySection.defaults()
    mode: Annotated[Literal["enforce", "observe"], ValueReader(_mode, json_schema_input_type=_WrittenMode)] = Field(
        default="enforce",
        description="observe: count and log requests that credentials_required and its like would refuse.",
    )
    jwt: JwtSection = JwtSection.defaults()
    certificate: CertificateIdentitySection = CertificateIdentitySection.defaults()
