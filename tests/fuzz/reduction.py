"""Makes a finding small: the fewest cases, steps and bytes that still show it."""

import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

from tests.fuzz.case import SEND, Case, Script

Shows = Callable[[list[Case]], Awaitable[bool]]


async def reduced(cases: list[Case], shows: Shows, seconds: float) -> list[Case]:
    """Return cases that still show what these do, as few and as small as can be found in that time."""
    until = time.monotonic() + seconds
    cases = await _fewer(cases, shows, until)
    for at in range(len(cases)):
        is_smaller = True
        while is_smaller and time.monotonic() < until:
            is_smaller = False
            for smaller in _smaller(cases[at]):
                if time.monotonic() > until:
                    break
                attempt = [*cases[:at], smaller, *cases[at + 1 :]]
                if await shows(attempt):
                    cases, is_smaller = attempt, True
                    break
    return cases


async def _fewer(cases: list[Case], shows: Shows, until: float) -> list[Case]:
    """Drop cases, half of them at first; the last ones are the likeliest to matter."""
    size = max(1, len(cases) // 2)
    while len(cases) > 1 and time.monotonic() < until:
        for start in range(0, len(cases), size):
            attempt = [*cases[:start], *cases[start + size :]]
            if time.monotonic() > until:
                break
            if attempt and await shows(attempt):
                cases = attempt
                break
        else:
            if size == 1:
                break
            size = max(1, size // 2)
    return cases


def _smaller(case: Case) -> Iterator[Case]:
    """Yield the case with a little less in it, the most at first. What is expected of it is left out then."""
    for script in _shorter(case.client):
        yield replace(case, client=script, expected=())
    for nonce, response in case.responses.items():
        for script in _shorter(response):
            yield replace(case, responses={**case.responses, nonce: script}, expected=())


def _shorter(script: Script) -> Iterator[Script]:
    for at in range(len(script)):
        yield (*script[:at], *script[at + 1 :])
    for at, step in enumerate(script):
        if step.kind != SEND:
            continue
        size = len(step.data) // 2
        while size:
            for start in range(0, len(step.data), size):
                data = step.data[:start] + step.data[start + size :]
                yield (*script[:at], replace(step, data=data), *script[at + 1 :])
            size //= 2
