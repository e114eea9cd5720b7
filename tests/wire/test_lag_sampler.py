"""The sampler reports the lag of the event loop."""

import asyncio
import itertools
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import uvloop

from api_gateway.eventloop.lag_sampler import SAMPLE_INTERVAL, LagSampler
from tests.kit import case

LOOPS = (asyncio.new_event_loop, uvloop.new_event_loop)
MakeLoop = Callable[[], asyncio.AbstractEventLoop]


def test_the_lag_of_a_busy_loop_is_reported_and_that_of_an_idle_one_is_zero() -> None:
    """With what sockets bring, and also where a turn takes just as long as what lies between two samples.

    The loops run at once, each in a thread of its own, and are kept busy by sleeping.
    """
    cases = list(itertools.product(LOOPS, [SAMPLE_INTERVAL / 2, SAMPLE_INTERVAL, SAMPLE_INTERVAL * 2]))
    with ThreadPoolExecutor(len(cases)) as threads:
        for (make_loop, busy), (calm, lags) in zip(
            cases, threads.map(lambda one: calm_and_busy(*one), cases), strict=True
        ):
            with case(make_loop.__module__, busy):
                assert len(calm) >= 2
                assert len(lags) >= 3
                median = lags[len(lags) // 2]
                assert median > busy * 0.5
                assert calm[0] < median, "the least, as another program may have had the processor meanwhile"


def calm_and_busy(make_loop: MakeLoop, busy: float) -> tuple[list[float], list[float]]:
    """Return the lags of an idle loop, and those while a socket's callback takes so long; both sorted."""
    loop, lags = make_loop(), list[float]()
    sampler = LagSampler(loop, lags.append)
    assert repr(sampler) == "<LagSampler [off]>"
    sampler.start()
    assert repr(sampler) == "<LagSampler [on]>"
    loop.run_until_complete(asyncio.sleep(SAMPLE_INTERVAL * 5))
    calm = sorted(lags)
    lags.clear()
    here, there = socket.socketpair()
    there.send(b"never read")
    loop.add_reader(here, time.sleep, busy)
    loop.run_until_complete(asyncio.sleep(6 * (SAMPLE_INTERVAL + busy)))
    loop.remove_reader(here)
    sampler.stop()
    here.close()
    there.close()
    loop.close()
    return calm, sorted(lags)


def test_a_delay_of_timers_only_is_reported_too() -> None:
    with ThreadPoolExecutor(len(LOOPS)) as threads:
        for make_loop, lags in zip(LOOPS, threads.map(lags_of_late_timers, LOOPS), strict=True):
            with case(make_loop.__module__):
                assert lags[len(lags) // 2] > SAMPLE_INTERVAL


def lags_of_late_timers(make_loop: MakeLoop) -> list[float]:
    """Return the lags, sorted, of a loop that is kept busy between its timers."""
    loop, lags = make_loop(), list[float]()

    def stall() -> None:
        time.sleep(SAMPLE_INTERVAL * 2.5)
        loop.call_later(0.001, stall)

    sampler = LagSampler(loop, lags.append)
    sampler.start()
    loop.call_soon(stall)
    loop.run_until_complete(asyncio.sleep(SAMPLE_INTERVAL * 15))
    sampler.stop()
    loop.close()
    return sorted(lags)


def test_once_stopped_it_reports_nothing() -> None:
    loop, lags = asyncio.new_event_loop(), list[float]()
    sampler = LagSampler(loop, lags.append)
    sampler.start()
    sampler.stop()
    sampler.stop()
    loop.run_until_complete(asyncio.sleep(SAMPLE_INTERVAL * 2))
    loop.close()
    assert lags == []
