"""The section of an extension: what it is, its options, and how its hooks are called."""

from typing import Annotated, Any, Literal

from pydantic import Field

from api_gateway.settings.setting_types import Identifier, Seconds, Section
from api_gateway.settings.value_checks import ValueCheck

FailurePolicy = Literal["refuse", "ignore"]
HookName = Literal["identify", "cost", "on_request", "on_response"]


def _use(use: str) -> str:
    place, colon, name = use.rpartition(":")
    if not use or (colon and not (place and name)):
        raise ValueError("must be module:object, path/to/file.py:object, or the name of an entry point")
    return use


class ExtensionHookSection(Section):
    """How one hook is called; null: as the other hooks of the extension."""

    budget: Seconds | None = Field(default=None, description="Seconds for each call.")
    on_error: FailurePolicy | None = Field(default=None, description="What follows a failure.")
    on_timeout: FailurePolicy | None = Field(
        default=None, description="What follows if a coroutine exceeds its budget."
    )


class ExtensionSection(Section):
    """An extension. Extensions are called in the order of their list, for responses in the reverse order."""

    name: Identifier = Field(description="The name in messages and metrics.")
    use: Annotated[str, Field(max_length=4096), ValueCheck(_use)] = Field(
        description="The factory: module:object, path/to/file.py:object, or the name of an entry point."
    )
    options: dict[str, Any] = Field(default={}, description="Passed to the factory.")
    budget: Seconds = Field(default=0.05, description="Seconds for each call of a hook.")
    on_error: FailurePolicy = Field(
        default="refuse", description="What follows a failure of a hook: refuse the request, or ignore the hook."
    )
    on_timeout: FailurePolicy = Field(default="refuse", description="What follows if a coroutine exceeds its budget.")
    load_timeout: Seconds = Field(default=10, description="Seconds in which the extension must be loaded.")
    hooks: dict[HookName, ExtensionHookSection] = Field(default={}, description="Other values for single hooks.")
