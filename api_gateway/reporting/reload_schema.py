"""The bodies of what the operator is shown of the configuration and its reloads."""

from typing import Any, Literal

from pydantic import Field

from api_gateway.models import Body


class SettingChanged(Body):
    """A setting that differs between the configuration that was in force and the one that was read."""

    setting: str = Field(description="Its path.", examples=["upstreams.users.timeouts.connect"])
    old: Any = Field(description="Null where it was not set, and of a secret.")
    new: Any = Field(description="Null where it is not set, and of a secret.")
    secret: bool = Field(description="True where the values are not shown.")
    needs_restart: bool = Field(description="True where the change takes effect with the next start only.")


class Reloaded(Body):
    """What a reload did. It is in force in every worker when this answers."""

    result: Literal["reloaded", "unchanged"]
    changes: list[SettingChanged]
    needs_restart: list[str] = Field(description="Changed settings that stay as they were until a restart.")


class ConfigurationView(Body):
    """The configuration in force."""

    status: Literal["pass", "warn"] = Field(description="warn while the last reload failed: an older one is in force.")
    loaded_at: str = Field(description="When it was read, UTC, ISO 8601.")
    errors: list[str] = Field(description="Why the newest configuration is not in force.")
