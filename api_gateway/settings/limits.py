"""The section `limits`: further limits of requests, besides those of the tiers and of addresses."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from api_gateway.settings.clients import CandidateSection
from api_gateway.settings.setting_types import LIMIT_KEY, Cost, Identifier, Methods, Section, TierName

Names = Annotated[list[str], Field(min_length=1)]


class AllowanceSection(Section):
    """What a limit allows: `rate` in tokens per second, `capacity` in tokens; without both, see `LimitSection`."""

    rate: float | None = Field(default=None, gt=0, le=1_000_000)
    capacity: int | None = Field(default=None, ge=1, le=1_000_000_000)
    candidate: CandidateSection | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "AllowanceSection":
        if (self.rate is None) is not (self.capacity is None):
            raise ValueError(f"needs {'rate' if self.rate is None else 'capacity'} too")
        if self.candidate is not None and self.rate is None:
            raise ValueError("a candidate needs rate and capacity beside it")
        return self

    @property
    def is_given(self) -> bool:
        """True if the section has an allowance."""
        return self.rate is not None


def _parts(value: Any) -> Any:
    """Return the parts of a key, each once."""
    parts = [value] if isinstance(value, str) else value
    if isinstance(parts, list) and len({str(part).lower() for part in parts}) < len(parts):
        raise ValueError("must not name a part twice")
    return parts


def _by_tier(value: Any) -> Any:
    """Return the allowances by tier, also of a list of tiers, which all have that of the limit."""
    if isinstance(value, list):
        names = [str(name).upper() for name in value]
        value = dict.fromkeys(value) if all(isinstance(name, str) for name in value) else value
    else:
        names = [str(name).upper() for name in value] if isinstance(value, Mapping) else []
    if len(set(names)) < len(names):
        raise ValueError("must not name a tier twice")
    return value


class LimitSection(AllowanceSection):
    """A limit: whom it counts by, what it allows, and the requests that it applies to.

    `tiers` are the tiers that it applies to, as a list or with an allowance for each; a tier without one has that of
    the limit.
    """

    name: Identifier
    key: Annotated[
        list[Annotated[str, Field(pattern=LIMIT_KEY)]], BeforeValidator(_parts), Field(min_length=1, max_length=8)
    ] = Field(default=["client"], description="What has a bucket of its own; of a list, each combination.")
    tiers: Annotated[
        dict[TierName, AllowanceSection | None] | None, BeforeValidator(_by_tier), Field(min_length=1)
    ] = Field(default=None, description="None: all tiers.")
    routes: Names | None = Field(default=None, description="Names of routes. None: all.")
    methods: Methods | None = Field(default=None, description="None: all.")
    cost: Cost | None = Field(default=None, description="Of a request in this limit. None: the cost by its route.")
