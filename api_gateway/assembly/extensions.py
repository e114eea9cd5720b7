"""Tries the extensions of a configuration in another process, loads them, and builds the stages of their hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.extensions.fields import REQUEST_FIXED, RESPONSE_FIXED, checked_changes
from api_gateway.extensions.hooks import Hook, HookPolicy, OnCall
from api_gateway.extensions.interface import Identity, Respond, checked_cost, checked_identity, checked_response
from api_gateway.extensions.loading import ExtensionError, hooks_of, load_extension
from api_gateway.extensions.trial import try_extension
from api_gateway.settings.extensions import ExtensionSection, HookName

Hooks = Mapping[HookName, Sequence[Hook]]


class LoadedExtension(NamedTuple):
    """An extension, and its section."""

    section: ExtensionSection
    extension: object


def extension_problems(config: GatewayConfig) -> Iterator[tuple[int, str]]:
    """Yield the number of each extension that another process could not load, and why. Blocks."""
    for number, section in enumerate(config.extensions):
        problem = try_extension(section.name, section.use, section.options, section.load_timeout, section.hooks)
        if problem is not None:
            yield number, f"the extension '{section.name}' cannot be loaded: {problem}, got {section.use!r}"


def load_extensions(config: GatewayConfig) -> tuple[LoadedExtension, ...]:
    """Load all extensions, each after it has been loaded in another process. Blocks; raises StartupError."""
    for number, problem in extension_problems(config):
        raise StartupError(f"extensions[{number}].use: {problem}")
    loaded = []
    for number, section in enumerate(config.extensions):
        try:
            extension = load_extension(section.name, section.use, section.options, section.hooks)
        except ExtensionError as error:
            raise StartupError(
                f"extensions.{number}.use: the extension '{section.name}' cannot be loaded: {error}"
            ) from error
        loaded.append(LoadedExtension(section, extension))
    return tuple(loaded)


def hooks_by_name(loaded: Iterable[LoadedExtension], tiers: Iterable[str], on_call: OnCall) -> Hooks:
    """Return the hooks of all extensions by name, in the order of the configuration."""
    checks: Mapping[HookName, Callable[[Any], Any]] = {
        "identify": partial(_identity, frozenset(tiers)),
        "cost": checked_cost,
        "on_request": _request_result,
        "on_response": partial(checked_changes, fixed=RESPONSE_FIXED),
    }
    return {
        name: [
            Hook(section.name, name, getattr(extension, name), _policy(section, name), check, on_call)
            for section, extension in loaded
            if name in hooks_of(extension)
        ]
        for name, check in checks.items()
    }


def _policy(section: ExtensionSection, name: HookName) -> HookPolicy:
    own = section.hooks.get(name)
    if own is None:
        return HookPolicy(section.budget, section.on_error, section.on_timeout)
    budget = section.budget if own.budget is None else own.budget
    return HookPolicy(budget, own.on_error or section.on_error, own.on_timeout or section.on_timeout)


def _identity(tiers: frozenset[str], result: object) -> Identity:
    identity = checked_identity(result)
    if identity.tier is not None and identity.tier.upper() not in tiers:
        raise ValueError(f"there is no tier {identity.tier!r}; the tiers are {', '.join(sorted(tiers))}")
    return identity


def _request_result(result: Any) -> Any:
    return checked_response(result) if isinstance(result, Respond) else checked_changes(result, REQUEST_FIXED)
