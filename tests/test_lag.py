"""The sampler tells how long a turn of the event loop takes."""

import asyncio
import socket
import time
from collections.abc import Callable

import pytest
import uvloop

from api_gateway.lag import EVERY, LagSampler


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("busy", [EVERY / 2, EVERY, EVERY * 2])
def test_a_busy_loop_is_told_by_how_much_and_a_calm_one_that_it_is_calm(
    make_loop: Callable[[], asyncio.AbstractEventLoop], busy: float
) -> None:
    """With what sockets bring, and also where a turn takes just as long as what lies between two samples."""
    loop, lags = make_loop(), list[float]()
    sampler = LagSampler(loop, lags.append)
    assert repr(sampler) == "<LagSampler [off]>"
    sampler.start()
    assert repr(sampler) == "<LagSampler [on]>"
    loop.run_until_complete(asyncio.sleep(EVERY * 5))
    calm = sorted(lags)
    lags.clear()
    here, there = socket.socketpair()
    there.send(b"never read")
    loop.add_reader(here, time.sleep, busy)
    loop.run_until_complete(asyncio.sleep(6 * (EVERY + busy)))
    loop.remove_reader(here)
    sampler.stop()
    here.close()
    there.close()
    loop.close()
    assert len(calm) >= 2
    assert calm[0] < busy / 2
    assert len(lags) >= 3
    assert sorted(lags)[len(lags) // 2] == pytest.approx(busy, rel=0.5)


def test_once_stopped_it_says_nothing_more() -> None:
    loop, lags = asyncio.new_event_loop(), list[float]()
    sampler = LagSampler(loop, lags.append)
    sampler.start()
    sampler.stop()
    sampler.stop()
    loop.run_until_complete(asyncio.sleep(EVERY * 2))
    loop.close()
    assert lags == []
