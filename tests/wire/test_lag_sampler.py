"""The sampler reports the lag of the event loop."""

import asyncio
import socket
import time
from collections.abc import Callable

import pytest
import uvloop

from api_gateway.eventloop.lag_sampler import SAMPLE_INTERVAL, LagSampler
from tests.cases import each


@each("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@each("busy", [SAMPLE_INTERVAL / 2, SAMPLE_INTERVAL, SAMPLE_INTERVAL * 2])
def test_the_lag_of_a_busy_loop_is_reported_and_that_of_an_idle_one_is_zero(
    make_loop: Callable[[], asyncio.AbstractEventLoop], busy: float
) -> None:
    """With what sockets bring, and also where a turn takes just as long as what lies between two samples."""
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
    assert len(calm) >= 2
    assert len(lags) >= 3
    median = sorted(lags)[len(lags) // 2]
    assert median > busy * 0.5
    assert calm[0] < median, "the least of the calm loop, as another program may have had the processor meanwhile"


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_delay_of_timers_only_is_reported_too(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
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
    assert sorted(lags)[len(lags) // 2] > SAMPLE_INTERVAL


def test_once_stopped_it_reports_nothing() -> None:
    loop, lags = asyncio.new_event_loop(), list[float]()
    sampler = LagSampler(loop, lags.append)
    sampler.start()
    sampler.stop()
    sampler.stop()
    loop.run_until_complete(asyncio.sleep(SAMPLE_INTERVAL * 2))
    loop.close()
    assert lags == []
