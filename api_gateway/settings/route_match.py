"""Sections on conditions of a route on requests, in addition to host, path and method."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from api_gateway.http1.headers import COST, FORWARDING, HOP_BY_HOP, PROTECTED, REQUEST_TIMEOUT
from api_gateway.settings.setting_types import HEADER_NAME, Section, Shorthand
from api_gateway.settings.value_checks import ValueCheck

_MOST_HYPHENS = 8  # of a name: the gateway removes its spellings with underscores, which double with each
_UNREADABLE = (
    HOP_BY_HOP
    | PROTECTED
    | FORWARDING
    | {b"x-request-id", b"authorization", b"cookie", b"set-cookie", REQUEST_TIMEOUT, COST}
)


def _condition_field(name: str) -> str:
    if name.lower().encode() in _UNREADABLE:
        raise ValueError("cannot have a condition: a proxy changes or replaces this field, or it has credentials")
    if "_" in name:
        instead = name.replace("_", "-")
        raise ValueError(f"must be written with hyphens, as in {instead}: servers do not tell them apart")
    if name.count("-") > _MOST_HYPHENS:
        raise ValueError(f"must have at most {_MOST_HYPHENS} hyphens")
    return name


class ValueSection(Section):
    """The test of the value of a header field or query parameter. A text alone is the same as `exact`."""

    shorthand: ClassVar[Shorthand | None] = Shorthand(lambda text: {"exact": text}, {"type": "string"}, "some text")

    exact: str | None = Field(default=None, max_length=1_024, description="The whole value.")
    prefix: str | None = Field(default=None, min_length=1, max_length=1_024, description="Its beginning.")
    present: Literal[True] | None = Field(default=None, description="Any value, also an empty one.")

    @model_validator(mode="after")
    def _is_one(self) -> "ValueSection":
        given = [name for name in ("exact", "prefix", "present") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must have one of exact, prefix and present; it has {' and '.join(given) or 'none'}")
        for text in (self.exact, self.prefix):
            if text is not None and (text != text.strip() or not text.isprintable()):
                raise ValueError("must neither begin nor end with a space, nor contain control characters")
        return self


_FieldName = Annotated[str, Field(pattern=HEADER_NAME), ValueCheck(_condition_field)]
_ParameterName = Annotated[str, Field(min_length=1, max_length=128)]


class MatchSection(Section):
    """How the path of a route is compared, and its conditions on header fields and the query."""

    path: Literal["prefix", "exact", "template"] = Field(
        default="prefix", description="prefix: of whole segments; template: {name} stands for one segment."
    )
    headers: dict[_FieldName, ValueSection] = Field(default={}, description="By name; all must hold.")
    query: dict[_ParameterName, ValueSection] = Field(
        default={}, description="By name of the parameter; all must hold."
    )
