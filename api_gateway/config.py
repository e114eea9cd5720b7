"""The configuration: its sections, defaults and sources, and one line for every mistake.

Precedence, highest first: command line, environment (`GATEWAY_`, `__` between levels), `.env`, files, defaults.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from api_gateway.settings.addresses import AddressesSection
from api_gateway.settings.admin import AdminSection
from api_gateway.settings.clients import AddressLimitSection, ClientSection, TierSection
from api_gateway.settings.cors import CorsSection
from api_gateway.settings.deprecations import DEPRECATED, renamed, renamed_file
from api_gateway.settings.diagnostics import (
    NO_FILE,
    ConfigError,
    KeyPath,
    Sources,
    describe_errors,
    path_of_error,
    path_text,
)
from api_gateway.settings.environment import (
    broken_lines,
    ignored_variables,
    is_setting,
    read_env_file,
    read_environment,
)
from api_gateway.settings.extensions import ExtensionSection
from api_gateway.settings.history import HistorySection
from api_gateway.settings.identity import IdentitySection
from api_gateway.settings.included_files import INCLUDE, default_route, read_settings
from api_gateway.settings.limits import LimitSection
from api_gateway.settings.repair import errors_of_repaired
from api_gateway.settings.route_ownership import IncludeSection, ownership_lines
from api_gateway.settings.routes import RouteSection
from api_gateway.settings.rules import Finding, find_errors
from api_gateway.settings.secret import Unusable, noting_exposed, without_passwords
from api_gateway.settings.server import LogSection, MetricsSection, ServerSection
from api_gateway.settings.setting_types import CLIENT_ID, PATTERNS, Identifier, TierName, path_of_file
from api_gateway.settings.source_merging import merged_tiers, merged_values, with_upper_tiers
from api_gateway.settings.store import StoreSection
from api_gateway.settings.tracing import TracingSection
from api_gateway.settings.upstreams import UpstreamSection
from api_gateway.settings.usage import UsageSection
from api_gateway.settings.value_checks import ValueReader
from api_gateway.settings.webhook import WebhookSection
from api_gateway.system.state_folder import StateError, default_state_dir

ENV_PREFIX, ENV_FILE = "GATEWAY_", ".env"
CONFIG_VARIABLE = "GATEWAY_CONFIG"

_CONTRADICTION = "contradiction"

logger = logging.getLogger(__name__)

DEFAULT_TIERS: dict[str, dict[str, float]] = {
    "FREE": {"rate": 1, "capacity": 10},
    "BASIC": {"rate": 5, "capacity": 50},
    "PREMIUM": {"rate": 20, "capacity": 200},
    "ENTERPRISE": {"rate": 100, "capacity": 1000},
}


@dataclass(frozen=True, slots=True)
class _Read:
    """The sources of the configuration that is being built, highest precedence first."""

    file: Path | None = None
    values: tuple[dict[str, Any], ...] = ()


# None: `GatewayConfig` was called directly and reads the environment.
_read: ContextVar[_Read | None] = ContextVar("_read", default=None)


def _default_state_dir() -> Path | Unusable:
    try:
        return default_state_dir((_read.get() or _Read()).file, os.environ)
    except StateError as error:
        return Unusable(str(error).removeprefix("state_dir: "))


def _folder(given: Any) -> Any:
    if isinstance(given, Unusable):
        raise ValueError(given.cause)  # noqa: TRY004 - it becomes a message of the validation
    if given == "":
        raise ValueError("must name a folder")
    return Path(path_of_file(given)).expanduser() if isinstance(given, str) else given


_SHARED = "may also be in included files"  # metadata of sections
# In a file, null removes a default tier; `GatewayConfig._complete` has removed it before the validation.
_WrittenTiers = ValueReader(lambda tiers: tiers, json_schema_input_type=dict[Identifier, TierSection | None])


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, str | Mapping) else given


class GatewayConfig(BaseSettings):
    """The whole configuration. Built directly, it reads the environment but no file; see `load_config`."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        hide_input_in_errors=True,
    )

    include: Annotated[
        list[IncludeSection],
        ValueReader(_listed, json_schema_input_type=list[IncludeSection] | IncludeSection),
        Field(max_length=100),
    ] = Field(default=[], description="Files of teams: paths with wildcards, from the folder of this file.")
    server: ServerSection = ServerSection.defaults()
    store: StoreSection = StoreSection.defaults()
    state_dir: Annotated[Path, ValueReader(_folder, json_schema_input_type=Path | None)] = Field(
        default=Path(), description="None: a folder by the name of the configuration file, see `system.state_folder`."
    )
    admin: AdminSection = AdminSection.defaults()
    identity: IdentitySection = IdentitySection.defaults()
    address_limit: AddressLimitSection = AddressLimitSection.defaults()
    tiers: Annotated[dict[Identifier, TierSection], _WrittenTiers] = Field(
        default={},
        validate_default=True,
        description="Tiers by name, in any case. None removes a default tier, of which single settings may be set.",
    )
    default_tier: TierName = Field(default="FREE", description="The tier of clients that have none of their own.")
    clients: dict[Annotated[str, Field(pattern=CLIENT_ID)], ClientSection] = Field(
        default={}, description="Registered clients by id."
    )
    limits: Annotated[list[LimitSection], _SHARED] = Field(
        default=[], description="Besides those of tiers and addresses."
    )
    webhook: WebhookSection = WebhookSection.defaults()
    upstreams: Annotated[dict[Identifier, UpstreamSection], _SHARED] = Field(
        default={},
        description="Upstreams by name, each a section or the URL of its only target. {}: demo services are started.",
    )
    routes: Annotated[list[RouteSection], _SHARED] = Field(
        default=[],
        description="Which requests go to which upstream. Without any, each upstream has a route /api/NAME.",
    )
    addresses: AddressesSection = AddressesSection.defaults()
    cors: CorsSection | None = Field(default=None, description="For all routes that have no setting of their own.")
    metrics: MetricsSection = MetricsSection.defaults()
    log: LogSection = LogSection.defaults()
    usage: UsageSection = UsageSection.defaults()
    history: HistorySection = HistorySection.defaults()
    tracing: TracingSection = TracingSection.defaults()
    extensions: list[ExtensionSection] = Field(default=[], description="Code of the users of the gateway.")
    _origins: Mapping[KeyPath, str] = PrivateAttr(default={})

    def __eq__(self, other: object) -> bool:
        """Return whether the settings are the same, wherever they were set."""
        return isinstance(other, GatewayConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # sections are mappings

    @property
    def origins(self) -> Mapping[KeyPath, str]:
        """Where each value was set, by its place in lower case; see `Sources.origins`. Empty if built directly."""
        return self._origins

    def with_origins(self, origins: Mapping[KeyPath, str]) -> "GatewayConfig":
        """Return this configuration with the places where its values were set."""
        self._origins = origins
        return self

    @property
    def is_demo(self) -> bool:
        """True if neither upstreams nor routes are configured; the demo services are started then."""
        return not self.upstreams and not self.routes

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is the library's
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources, highest precedence first, with the names of tiers in upper case."""
        read = _read.get()
        values = _of_environment() if read is None else read.values
        given = [init_settings(), *values]
        return tuple(InitSettingsSource(settings_cls, with_upper_tiers(values)) for values in given)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Merge the configured tiers into the default ones; without routes, add a route for each upstream."""
        if given.get("state_dir") is None:
            given = given | {"state_dir": _default_state_dir()}
        tiers = given.get("tiers", {})
        if isinstance(tiers, Mapping):
            given = given | {"tiers": merged_tiers(DEFAULT_TIERS, tiers)}
        upstreams = given.get("upstreams")
        if isinstance(upstreams, Mapping) and not given.get("routes"):
            given = given | {"routes": list(map(default_route, upstreams))}
        return given

    @model_validator(mode="after")
    def _agree(self) -> "GatewayConfig":
        findings = list(find_errors(self))
        if findings:
            lines = "\n".join(str(finding) for finding in findings)
            raise PydanticCustomError(_CONTRADICTION, "{lines}", {"lines": lines, "findings": findings})
        return self


TEAM_SECTIONS = tuple(name for name, field in GatewayConfig.model_fields.items() if _SHARED in field.metadata)


def config_path(path: str | Path | None = None) -> Path | None:
    """Return the file to read, in YAML or TOML: `path`, else the value of `GATEWAY_CONFIG`, else None."""
    chosen = path or _variables().get(CONFIG_VARIABLE)
    return Path(chosen) if chosen else None


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration and the sources of its values."""

    config: GatewayConfig
    sources: Sources


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> GatewayConfig:
    """Read the configuration from all its sources.

    `path` is a YAML or TOML file; by default the one that `GATEWAY_CONFIG` names, if any. `overrides` has the settings
    of the command line, nested like the sections. Secret files are read. Raises ConfigError with a line for each
    mistake.
    """
    return read_config(path, overrides).config


def read_config(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    warn: Callable[[str], None] = logger.warning,
) -> LoadedConfig:
    """Do as `load_config`, and return the sources too. `warn` is called with a line for each ignored variable."""
    variables = _variables()
    environment, problems = read_environment(variables, ENV_PREFIX, GatewayConfig)
    problems += broken_lines(ENV_FILE, ENV_PREFIX)
    chosen = config_path(path)
    try:
        file = NO_FILE if chosen is None else read_settings(chosen, _exact_variables(), TEAM_SECTIONS)
    except ConfigError as error:  # without the file, the rest cannot be checked
        raise ConfigError([*error.problems, *problems]) from None
    file, deprecated, contradictions = renamed_file(file, DEPRECATED)
    current = renamed(environment, DEPRECATED)
    given = {name: text for name, text in variables.items() if text is not None}
    settings = {name: text for name, text in given.items() if is_setting(name, ENV_PREFIX, GatewayConfig)}
    sources = Sources(overrides or {}, ENV_PREFIX, settings, file)
    # A warning and not an error: platforms set such variables on their own.
    for line in ignored_variables(given, ENV_PREFIX, GatewayConfig, besides={CONFIG_VARIABLE}):
        warn(f"environment: {line}")
    deprecated += [f"{sources.origin(place)}{path_text(place)}: {message}" for place, message in current.warnings]
    for line in (*deprecated, *file.warnings):
        warn(line)
    read = _Read(file.path, (current.values, file.values))
    merged = merged_values([with_upper_tiers(dict(one)) for one in (file.values, current.values, sources.overrides)])
    contradictions += [f"{sources.origin(place)}{path_text(place)}: {message}" for place, message in current.errors]
    found = [*file.problems, *problems, *contradictions, *_emptiness(merged, sources)]
    exposed: dict[Path, int] = {}
    with noting_exposed(exposed):
        config, errors = _validated(sources.overrides, read)
    for exposed_path, mode in exposed.items():
        warn(
            f"{exposed_path}: holds a secret that every user of this machine can read (mode {mode:04o}); chmod 600 it"
        )
    found += [
        sources.without_values(path_of_error(detail), describe_errors(detail, GatewayConfig, sources, PATTERNS))
        for detail in errors
        if detail["loc"] and not file.concerns_unset(path_of_error(detail))
    ]
    if config is not None and not any("routes" in given for given in (current.values, sources.overrides)):
        found += ownership_lines(config.routes, file)
    if any(detail["loc"] for detail in errors):
        errors, wrong = errors_of_repaired(
            merged, GatewayConfig, errors, lambda values: _made(values, _Read(file.path))
        )
    else:
        wrong = []
    for finding in _findings(errors):
        if not any(finding.concerns(key_path) for key_path in (*wrong, *file.unset)):
            line = f"{sources.origin(finding.path)}{without_passwords(str(finding))}"
            found.append(sources.without_values(finding.path, line))
    if config is None or found:
        raise ConfigError(found)
    _warn_of_demo(config, file.path, warn)
    return LoadedConfig(config.with_origins(sources.origins), sources)


def _warn_of_demo(config: GatewayConfig, file: Path | None, warn: Callable[[str], None]) -> None:
    if config.is_demo and file is not None:
        warn(
            f"{file}: configures no upstream and no route, so the demo services are the upstreams; configure upstreams"
            " for services of your own"
        )


def from_values(values: Mapping[str, Any]) -> GatewayConfig:
    """Return the configuration with these values only, without other sources. Raises pydantic's ValidationError."""
    return _made(values, _Read())


def _made(values: Mapping[str, Any], read: _Read) -> GatewayConfig:
    token = _read.set(read)
    try:
        return GatewayConfig(**values)
    finally:
        _read.reset(token)


def _validated(overrides: Mapping[str, Any], read: _Read) -> tuple[GatewayConfig | None, list[ErrorDetails]]:
    """Return the configuration or the errors; the exception is not kept: it contains values such as secrets."""
    try:
        return _made(overrides, read), []
    except ValidationError as error:
        return None, error.errors()


def _findings(errors: Iterable[ErrorDetails]) -> Iterator[Finding]:
    for detail in errors:
        if detail["type"] == _CONTRADICTION:
            yield from detail["ctx"]["findings"]


def _emptiness(merged: Mapping[str, Any], sources: Sources) -> Iterator[str]:
    """Yield a line for each empty file or section that a default would silently replace."""
    if sources.file.path is not None and not sources.file.values and not merged.get("upstreams"):
        yield (
            f"{sources.file.path}: configures nothing, so the demo services would start; configure upstreams, or"
            f" start without --config and {CONFIG_VARIABLE} for the demo"
        )
    if merged.get(INCLUDE) is not None and sources.file.values.get(INCLUDE) != merged[INCLUDE]:
        yield f"{sources.origin((INCLUDE,))}{INCLUDE}: only a configuration file can include others; set it there"
    if merged.get("routes") == []:
        key_path = ("routes",)
        yield f"{sources.origin(key_path)}routes: is empty; leave it out for one route to each upstream, got []"
    if merged.get("upstreams") == {}:
        key_path = ("upstreams",)
        yield f"{sources.origin(key_path)}upstreams: is empty; leave it out for the demo services, got {{}}"


def _variables() -> dict[str, str | None]:
    return {name.upper(): value for name, value in (*read_env_file(ENV_FILE).items(), *os.environ.items())}


def _exact_variables() -> dict[str, str]:
    """Return the variables that a file may refer to, whose names are in the case that they have there."""
    given = (*read_env_file(ENV_FILE).items(), *os.environ.items())
    return {name: value for name, value in given if value is not None}


def _of_environment() -> tuple[dict[str, Any], ...]:
    """Return the values of the environment and of `.env`. Raises ConfigError."""
    values, problems = read_environment(_variables(), ENV_PREFIX, GatewayConfig)
    if problems:
        raise ConfigError(problems)
    return (values,)
