"""Views of the configuration in force and of a reload."""

from api_gateway.admin.utc_times import wall_time
from api_gateway.errors import Draining, InternalError, InvalidValue
from api_gateway.reload.outcome import ReloadOutcome, ReloadRecord, ReloadResult, ReloadState
from api_gateway.reporting.reload_schema import ConfigurationView, Reloaded, ReloadView, SettingChanged

AGAIN_AFTER = 5  # seconds


def reload_view(outcome: ReloadOutcome) -> Reloaded:
    """Return the view of a reload. Raises InvalidValue, Draining or InternalError if the reload changed nothing."""
    problems = list(outcome.problems)
    detail = f"The configuration was not reloaded: {'; '.join(problems).rstrip('.')}."
    if outcome.result is ReloadResult.INVALID:
        raise InvalidValue(detail, extra={"errors": problems})
    if outcome.result is ReloadResult.UNAVAILABLE:
        raise Draining(detail, retry_after=AGAIN_AFTER)
    if outcome.result is ReloadResult.FAILED:
        raise InternalError(detail, extra={"errors": problems})
    return Reloaded(
        result="reloaded" if outcome.changes else "unchanged",
        changes=_changes(outcome),
        needs_restart=list(outcome.needs_restart),
    )


def record_view(record: ReloadRecord) -> ReloadView:
    """Return the view of one of the last reloads."""
    return ReloadView(
        at=wall_time(record.at),
        origin=record.origin,
        result=record.outcome.result.value,
        changes=_changes(record.outcome),
        errors=list(record.outcome.problems),
        omitted=record.omitted,
    )


def _changes(outcome: ReloadOutcome) -> list[SettingChanged]:
    return [
        SettingChanged(
            setting=change.setting,
            old=change.old,
            new=change.new,
            secret=change.is_secret,
            needs_restart=change.setting in outcome.needs_restart,
        )
        for change in outcome.changes
    ]


def configuration_view(state: ReloadState) -> ConfigurationView:
    """Return when the configuration in force was loaded, and the errors of the last reload if it failed."""
    return ConfigurationView(
        status="pass" if state.is_successful else "warn",
        loaded_at=wall_time(state.loaded_at),
        errors=list(state.problems),
    )
