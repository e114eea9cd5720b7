"""State that is written to the state folder in the background: what it is, and what follows if it is not written.

A snapshot has, for each kind of state, why its last write failed; None if it was written, or if there is none.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class KindOfState(NamedTuple):
    """What follows while a kind of state is not written, and the page of the dashboard that shows it."""

    consequence: str
    link: str


KINDS: Mapping[str, KindOfState] = {
    "quotas": KindOfState(
        "Charges of quotas are not stored, so a restart forgets what clients have used since", "#/clients"
    ),
    "usage": KindOfState("The usage of clients is not stored, so a restart forgets it", "#/clients"),
    "webhook_events": KindOfState(
        "Events of the webhook are not stored, so a restart forgets those that wait", "#/configuration/webhook"
    ),
    "required_proofs": KindOfState(
        "The ids that need a credential are not stored, so a start without the client store uses former ones",
        "#/clients",
    ),
    "key_uses": KindOfState("The last uses of API keys are not stored, so a restart forgets them", "#/clients"),
}


def merged_errors(errors: Iterable[Mapping[str, str | None]]) -> dict[str, str | None]:
    """Return the errors of several workers: of each kind the first one."""
    merged: dict[str, str | None] = {}
    for one in errors:
        for name, error in one.items():
            merged[name] = merged.get(name) or error
    return merged
