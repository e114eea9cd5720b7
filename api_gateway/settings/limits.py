"""The section `limits`: further limits of requests, in addition to those of the tiers and of addresses."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Discriminator, Field, Tag, model_validator

from api_gateway.settings.setting_types import LIMIT_KEY, Cost, Identifier, Methods, Rate, Section, TierName
from api_gateway.settings.suggestions import nearest
from api_gateway.settings.value_checks import ValueCheck, ValueReader

Names = Annotated[list[str], Field(min_length=1)]
Requests = Annotated[int, Field(ge=1, le=1_000_000)]


def _by_tier(value: Any) -> Any:
    """Return the allowances by tier, also of a list of tiers, which all have that of the limit."""
    if isinstance(value, list):
        names = [str(name).upper() for name in value]
        value = dict.fromkeys(value) if all(isinstance(name, str) for name in value) else value
    else:
        names = [str(name).upper() for name in value] if isinstance(value, Mapping) else []
    if len(set(names)) < len(names):
        raise ValueError("must not name a tier twice")
    if isinstance(value, Mapping) and not value:
        raise ValueError("must name at least one tier")
    return value


def _kind_of(value: Any) -> str:
    """Return the tag of a value of `Concurrent`, which `diagnostics.place_of` leaves out."""
    return "[by tier]" if isinstance(value, Mapping) else "[number]"


Concurrent = Annotated[
    Annotated[Requests, Tag("[number]")]
    | Annotated[dict[TierName, Requests], Field(min_length=1), ValueReader(_by_tier), Tag("[by tier]")],
    Discriminator(_kind_of),
]


class LimitCandidateSection(Section):
    """Another allowance, evaluated beside the one in force: `rate` and `capacity`, `quota`, or `concurrent`."""

    rate: Annotated[Rate, Field(gt=0, le=1_000_000)] | None = Field(default=None, description="Tokens per second.")
    capacity: int | None = Field(default=None, ge=1, le=1_000_000_000, description="The maximum number of tokens.")
    quota: int | None = Field(default=None, ge=1, le=1_000_000_000_000, description="Tokens in each period.")
    concurrent: Concurrent | None = Field(
        default=None, description="Requests in flight at the same time, for all tiers of the limit or some."
    )

    @model_validator(mode="after")
    def _is_whole(self) -> "LimitCandidateSection":
        if (self.rate is None) is not (self.capacity is None):
            raise ValueError(f"needs {'rate' if self.rate is None else 'capacity'} too")
        given = [name for name in ("rate", "quota", "concurrent") if getattr(self, name) is not None]
        if len(given) != 1:
            got = ", ".join(given) or "nothing"
            raise ValueError(f"must have either rate and capacity, or quota, or concurrent, got {got}")
        return self

    def concurrent_of(self, tier: str) -> int | None:
        """Return the requests in flight of a tier; None if the tier has no such candidate."""
        return self.concurrent.get(tier) if isinstance(self.concurrent, dict) else self.concurrent


class AllowanceSection(Section):
    """The allowance of a limit: `rate` in tokens per second and `capacity` in tokens, or `quota` in tokens per period.

    Without any, see `LimitSection`.
    """

    rate: Annotated[Rate, Field(gt=0, le=1_000_000)] | None = Field(default=None, description="Tokens per second.")
    capacity: int | None = Field(default=None, ge=1, le=1_000_000_000, description="The maximum number of tokens.")
    quota: int | None = Field(default=None, ge=1, le=1_000_000_000_000, description="Tokens in each period.")
    candidate: LimitCandidateSection | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "AllowanceSection":
        if (self.rate is None) is not (self.capacity is None):
            raise ValueError(f"needs {'rate' if self.rate is None else 'capacity'} too")
        if self.quota is not None and self.rate is not None:
            raise ValueError("must have either rate and capacity, or quota; for both, write two limits")
        tried = self.candidate
        if tried is not None and tried.rate is not None and self.rate is None:
            raise ValueError(
                "a candidate with rate and capacity needs both beside it; of a quota, it has quota, and of a"
                " concurrency limit, concurrent"
            )
        if tried is not None and tried.quota is not None and self.quota is None:
            raise ValueError(f"a candidate with quota needs quota beside it, got {tried.quota}")
        return self

    @property
    def is_given(self) -> bool:
        """True if the section has an allowance."""
        return self.rate is not None or self.quota is not None

    @property
    def most(self) -> int:
        """The most that one request can cost: the capacity or the quota, 0 without an allowance."""
        return self.capacity or self.quota or 0


def _time_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # a folder's name, a path, and one that does not exist
        known = available_timezones()
        if not known:
            raise ValueError("no time zone is known: install the package tzdata") from None
        hint = nearest(name, known) or "; names are those of the IANA database, as in Europe/Berlin"
        raise ValueError(f"no such time zone{hint}") from None
    return name


def _ascending(shares: list[float]) -> list[float]:
    if len(set(shares)) < len(shares):
        raise ValueError("must not name a share twice")
    return sorted(shares)


TimeZone = Annotated[str, Field(max_length=64), ValueCheck(_time_zone)]
Shares = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(max_length=8), ValueCheck(_ascending)]
_OF_QUOTAS = ("time_zone", "starts", "carry_over", "warn_at")


def _parts(value: Any) -> Any:
    """Return the parts of a key, each once."""
    parts = [value] if isinstance(value, str) else value
    if isinstance(parts, list) and len({str(part).lower() for part in parts}) < len(parts):
        raise ValueError("must not name a part twice")
    return parts


LimitKey = Annotated[str, Field(pattern=LIMIT_KEY)]
_KeyParts = Annotated[list[LimitKey], Field(min_length=1, max_length=8)]
_ByTier = Annotated[dict[TierName, AllowanceSection | None], Field(min_length=1)]


class LimitSection(AllowanceSection):
    """A limit: its key, its allowance, and the requests that it applies to.

    `tiers` are the tiers that it applies to, as a list or with an allowance for each; a tier without one has that of
    the limit. With `period`, allowances are quotas, and the settings behind it apply. With `concurrent`, there are no
    other allowances.
    """

    name: Identifier = Field(description="The name in responses, metrics and the API.")
    key: Annotated[_KeyParts, ValueReader(_parts, json_schema_input_type=_KeyParts | LimitKey)] = Field(
        default=["client"], description="What has a bucket of its own; of a list, each combination."
    )
    tiers: Annotated[
        _ByTier | None,
        ValueReader(_by_tier, json_schema_input_type=_ByTier | Annotated[list[TierName], Field(min_length=1)] | None),
    ] = Field(default=None, description="None: all tiers.")
    routes: Names | None = Field(default=None, description="Names of routes. None: all.")
    methods: Methods | None = Field(default=None, description="None: all.")
    cost: Cost | None = Field(default=None, description="Of a request in this limit. None: the cost by its route.")
    period: Literal["hour", "day", "week", "month"] | None = Field(
        default=None, description="That quotas are for. None: the limit has rate and capacity."
    )
    time_zone: TimeZone = Field(default="UTC", description="Of the periods, as in Europe/Berlin.")
    starts: Literal["calendar", "client"] = Field(
        default="calendar", description="Whether periods are those of the calendar, or begin with the first request."
    )
    carry_over: int = Field(
        default=0, ge=0, le=1_000_000_000_000, description="Unused tokens that are added to the next period, at most."
    )
    warn_at: Shares = Field(default=[], description="Shares of the quota at which a warning is given.")
    concurrent: Concurrent | None = Field(
        default=None, description="Requests in flight at the same time, for all tiers or each; instead of tokens."
    )

    @property
    def concurrent_by_tier(self) -> dict[str, int]:
        """The requests in flight of each tier that has a number of its own."""
        return self.concurrent if isinstance(self.concurrent, dict) else {}

    @model_validator(mode="after")
    def _has_candidate_of_its_kind(self) -> "LimitSection":
        own = [section.candidate for section in (self.tiers or {}).values() if section is not None]
        if any(candidate is not None and candidate.concurrent is not None for candidate in own):
            raise ValueError("a candidate with concurrent belongs to the limit: move it out of tiers")
        tried = None if self.candidate is None else self.candidate.concurrent
        if tried is not None and self.concurrent is None:
            raise ValueError(f"a candidate with concurrent needs concurrent beside it, got {tried}")
        if isinstance(tried, dict) and not self.concurrent_by_tier:
            raise ValueError(
                "a candidate has numbers by tier if concurrent has: write one number, or both by tier,"
                f" got {self.concurrent} and {tried}"
            )
        return self

    @model_validator(mode="after")
    def _is_concurrency_alone(self) -> "LimitSection":
        if self.concurrent is None:
            return self
        sections = {"": self, **{f"tiers.{name}: ": section for name, section in (self.tiers or {}).items()}}
        for place, section in sections.items():
            for name in ("rate", "capacity", "quota"):
                if section is not None and getattr(section, name) is not None:
                    raise ValueError(
                        f"{place}a limit with concurrent has no {name}: remove it, or write two limits,"
                        f" got {getattr(section, name)}"
                    )
        for name in ("period", "cost"):
            if getattr(self, name) is not None:
                raise ValueError(f"concurrent counts requests, not tokens: remove {name}, got {getattr(self, name)}")
        return self

    @model_validator(mode="after")
    def _has_period(self) -> "LimitSection":
        sections = [self, *[section for section in (self.tiers or {}).values() if section is not None]]
        has_quota = any(section.quota is not None for section in sections)
        if has_quota and self.period is None:
            raise ValueError("a quota needs a period: hour, day, week or month")
        if self.period is not None and any(section.rate is not None for section in sections):
            raise ValueError("with a period, the allowance is a quota: remove rate and capacity, or write two limits")
        if self.period is not None and not has_quota:
            raise ValueError(f"a period needs a quota, in tokens in each {self.period}")
        fields = type(self).model_fields  # those that are set explicitly, but to their defaults, are of no importance
        alone = [name for name in _OF_QUOTAS if getattr(self, name) != fields[name].default]
        if self.period is None and alone:
            raise ValueError(f"{alone[0]} is for quotas: set quota and period too, or remove it")
        return self
