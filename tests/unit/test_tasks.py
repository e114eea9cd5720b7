"""`cancel_and_wait` ends tasks whatever became of the first cancellation."""

import asyncio
from contextlib import suppress

import pytest

from api_gateway.eventloop.tasks import cancel_and_wait, run_to_completion
from tests.kit import turns
from tests.virtual_time import in_virtual_time


async def deaf(times: int) -> None:
    """Swallow so many cancellations, as `asyncio.wait_for` does at the wrong moment."""
    for _ in range(times):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
    await asyncio.sleep(60)


@in_virtual_time
async def test_several_tasks_are_ended_and_those_that_have_ended_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_gateway.eventloop.tasks._AGAIN_AFTER", 0.01)
    tasks = [asyncio.create_task(deaf(times)) for times in (0, 1, 2)]
    done = asyncio.create_task(asyncio.sleep(0))
    await turns()
    await cancel_and_wait(*tasks, done)
    assert all(task.cancelled() for task in tasks)
    assert not done.cancelled()


@in_virtual_time
async def test_it_goes_through_with_it_when_it_is_cancelled_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_gateway.eventloop.tasks._AGAIN_AFTER", 0.01)
    task = asyncio.create_task(deaf(2))
    await asyncio.sleep(0)
    ending = asyncio.create_task(cancel_and_wait(task))
    await asyncio.sleep(0)
    ending.cancel()
    await asyncio.wait([ending])
    assert ending.cancelled()
    assert task.cancelled()


async def test_work_is_done_to_its_end_when_the_caller_is_cancelled() -> None:
    begun, may_end, done = asyncio.Event(), asyncio.Event(), []

    async def work() -> None:
        begun.set()
        await may_end.wait()
        done.append(True)

    caller = asyncio.create_task(run_to_completion(work()))
    await begun.wait()
    caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done
