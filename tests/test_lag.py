"""The sampler tells how late a timer of the event loop was."""

import asyncio
import time

from api_gateway.lag import EVERY, LagSampler


async def test_a_loop_that_is_held_up_is_told_by_how_much_and_a_calm_one_that_it_is_calm() -> None:
    lags: list[float] = []
    sampler = LagSampler(asyncio.get_running_loop(), lags.append)
    assert repr(sampler) == "<LagSampler [off]>"
    sampler.start()
    assert repr(sampler) == "<LagSampler [on]>"
    await asyncio.sleep(EVERY * 3.5)
    calm = len(lags)
    time.sleep(EVERY + 0.3)  # noqa: ASYNC251 - what a busy loop is like
    await asyncio.sleep(0.02)
    sampler.stop()
    assert calm >= 2
    assert min(lags[:calm]) < 0.1
    assert max(lags[calm:]) > 0.25
    seen = len(lags)
    await asyncio.sleep(EVERY * 2)
    assert len(lags) == seen
