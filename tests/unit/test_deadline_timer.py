"""A timer fires once, at its last deadline, and is rarely rearmed on the event loop."""

import asyncio
import gc
import math
import weakref
from collections.abc import Callable

import pytest

from api_gateway.eventloop.deadline_timer import DeadlineTimer


class Timer:
    """A timer of the loop below."""

    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call = call
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Loop:
    """As much of an event loop as an alarm needs, whose time passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(due, call))
        return self.timers[-1]

    def standing(self) -> list[float]:
        """Return when the timers that are set ring."""
        return sorted(timer.due for timer in self.timers if not timer.is_cancelled)

    def advance(self, seconds: float) -> None:
        """Let time pass, ringing on the way."""
        end = self.now + seconds
        while (due := min(self.standing(), default=math.inf)) <= end:
            timer = next(timer for timer in self.timers if timer.due == due and not timer.is_cancelled)
            self.timers.remove(timer)
            self.now = due
            timer.call()
        self.now = end


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def rung(loop: Loop) -> list[float]:
    """The times at which the alarm has rung."""
    return []


@pytest.fixture
def alarm(loop: Loop, rung: list[float]) -> DeadlineTimer:
    return DeadlineTimer(loop, lambda: rung.append(loop.now))  # type: ignore[arg-type]  # as much of a loop as it needs


def test_it_fires_once_when_its_time_has_passed(loop: Loop, alarm: DeadlineTimer, rung: list[float]) -> None:
    alarm.set(2)
    loop.advance(1.9)
    assert rung == []
    loop.advance(10)
    assert rung == [102]
    assert loop.standing() == []


def test_a_later_deadline_costs_the_loop_nothing(loop: Loop, alarm: DeadlineTimer, rung: list[float]) -> None:
    """The timer that stands is left to ring for nothing, and is then set for the rest."""
    alarm.set(2)
    for _ in range(1000):
        loop.advance(0.001)
        alarm.set(2)
    assert loop.standing() == [102]
    assert len(loop.timers) == 1
    loop.advance(1.5)
    assert loop.standing() == [pytest.approx(103)]
    loop.advance(10)
    assert rung == [pytest.approx(103)]


def test_an_earlier_deadline_is_kept(loop: Loop, alarm: DeadlineTimer, rung: list[float]) -> None:
    alarm.set(60)
    alarm.set(1)
    assert loop.standing() == [101]
    loop.advance(100)
    assert rung == [101]


def test_a_cleared_timer_does_not_fire(loop: Loop, alarm: DeadlineTimer, rung: list[float]) -> None:
    alarm.set(2)
    alarm.clear()
    assert loop.standing() == [102]
    loop.advance(10)
    assert (rung, loop.standing()) == ([], [])


def test_never_is_a_deadline_too(loop: Loop, alarm: DeadlineTimer, rung: list[float]) -> None:
    alarm.set(2)
    alarm.set(None)
    loop.advance(10)
    assert rung == []


@pytest.mark.parametrize("between", [0, 1, 3], ids=["at once", "before the timer", "after it"])
def test_what_was_cleared_can_be_set_again(
    loop: Loop, alarm: DeadlineTimer, rung: list[float], between: float
) -> None:
    alarm.set(2)
    alarm.clear()
    loop.advance(between)
    alarm.set(4)
    loop.advance(3.9)
    assert rung == []
    loop.advance(0.2)
    assert rung == [104 + between]


def test_it_may_be_set_again_as_it_fires(loop: Loop) -> None:
    rung: list[float] = []

    def ring() -> None:
        rung.append(loop.now)
        if len(rung) < 3:
            again.set(5)

    again = DeadlineTimer(loop, ring)  # type: ignore[arg-type]  # as much of a loop as it needs
    again.set(1)
    loop.advance(100)
    assert rung == [101, 106, 111]


def test_a_stopped_timer_holds_no_handle(loop: Loop, alarm: DeadlineTimer, rung: list[float]) -> None:
    alarm.set(2)
    alarm.stop()
    assert loop.standing() == []
    loop.advance(10)
    assert rung == []
    alarm.stop()


def test_a_stopped_timer_holds_no_reference_to_its_owner() -> None:
    """Who would otherwise wait for the garbage collector, as alarm and owner know each other."""

    class Owner:
        def __init__(self) -> None:
            self.alarm = DeadlineTimer(Loop(), self.ring)  # type: ignore[arg-type]  # as much of a loop as it needs

        def ring(self) -> None: ...

    owner = Owner()
    seen = weakref.ref(owner)
    gc.disable()
    try:
        owner.alarm.stop()
        del owner
        assert seen() is None
    finally:
        gc.enable()


def test_it_shows_its_state(alarm: DeadlineTimer) -> None:
    assert repr(alarm) == "<DeadlineTimer [off]>"
    alarm.set(2.5)
    assert repr(alarm) == "<DeadlineTimer [due at 102.500]>"


async def test_it_fires_on_a_real_loop() -> None:
    """The loop and its clock are the subject, so the test waits 50 ms of real time."""
    loop = asyncio.get_running_loop()
    rung = asyncio.Event()
    alarm = DeadlineTimer(loop, rung.set)
    begun = loop.time()
    alarm.set(0.02)
    alarm.set(0.05)
    await asyncio.wait_for(rung.wait(), 30)
    assert loop.time() - begun >= 0.049
