"""The response bodies on the configuration and its reloads."""

from typing import Any, Literal

from pydantic import Field

from api_gateway.models import Body


class SettingChanged(Body):
    """A setting that differs between the previous configuration and the new one."""

    setting: str = Field(description="Path of the setting.", examples=["upstreams.users.timeouts.connect"])
    old: Any = Field(description="Previous value; null if it was not set or is secret.")
    new: Any = Field(description="New value; null if it is not set or is secret.")
    secret: bool = Field(description="True if the values are secret and not shown.")
    needs_restart: bool = Field(description="True if the change takes effect only after a restart.")


class Reloaded(Body):
    """The result of a reload, which is complete in every worker."""

    result: Literal["reloaded", "unchanged"]
    changes: list[SettingChanged]
    needs_restart: list[str] = Field(description="Changed settings whose previous value is used until a restart.")


class ConfigurationView(Body):
    """The member `configuration` of /health: when it was read, and the errors of the last reload."""

    status: Literal["pass", "warn"] = Field(
        description="`warn` if the last reload failed: the previous configuration is in force."
    )
    loaded_at: str = Field(description="When the configuration in force was read, UTC, ISO 8601.")
    errors: list[str] = Field(description="Errors of the last reload if it failed.")


class ReloadView(Body):
    """One of the last reloads."""

    at: str = Field(description="UTC, ISO 8601.")
    origin: str = Field(description="Who or what requested it.")
    result: Literal["success", "invalid", "failed", "unavailable"]
    changes: list[SettingChanged]
    errors: list[str] = Field(description="Why the former configuration stayed in force.")
    omitted: int = Field(description="Further changes and errors, which are not kept.")


class SettingInForce(Body):
    """A setting in force."""

    setting: str = Field(description="Path of the setting.", examples=["upstreams.users.targets[0].url"])
    value: Any = Field(description="null if it is not set or is secret.")
    secret: bool = Field(description="True if there is a value that is secret and not shown.")
    default: bool = Field(description="True if the value is the default.")
    origin: str | None = Field(
        description="Where it was set: a file and line, an environment variable, or the command line; null if nowhere."
    )


class ConfigurationInForce(Body):
    """The configuration in force, and the last reloads."""

    loaded_at: str = Field(description="When the configuration in force was read, UTC, ISO 8601.")
    errors: list[str] = Field(description="Errors of the last reload if it failed.")
    settings: list[SettingInForce]
    reloads: list[ReloadView] = Field(description="The last ten, newest first, since the start.")
