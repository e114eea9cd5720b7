"""Messages between a worker and its supervisor: replies contain what is new, and a silent peer is not waited for."""

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import pytest

from api_gateway.eventloop.steps import Steps
from api_gateway.metrics import Recorder
from api_gateway.reporting import worker_channel
from api_gateway.reporting.snapshot import WorkerSnapshot
from api_gateway.reporting.worker_channel import SingleProcess, SupervisorChannel, encode
from tests.kit import PATIENCE, soon


def look() -> WorkerSnapshot:
    return WorkerSnapshot("", Recorder(["users"], ["people"], ["FREE"], (50,), time.monotonic()), buckets=7)


def looking(report: WorkerSnapshot | None = None) -> Steps[WorkerSnapshot]:
    """Look in steps, as the gateway does."""
    yield
    return report or look()


class Peer:
    """The supervisor's end of a channel, which is open within a block."""

    def __init__(self, on_orphaned: Callable[[], None] = lambda: None) -> None:
        self.sock, theirs = socket.socketpair()
        self.member = SupervisorChannel(theirs, on_orphaned)
        self.member.register(looking)

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_unix_connection(sock=self.sock)
        await self.member.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.member.close()
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()

    async def heard(self, kind: str) -> Any:
        while True:
            message = json.loads(await asyncio.wait_for(self.reader.readline(), PATIENCE))
            if message["kind"] == kind:
                return message


async def test_a_single_process_shows_its_own_figures() -> None:
    alone, own = SingleProcess(), look()
    alone.register(lambda: looking(own))
    assert await alone.gather() is own


async def test_a_worker_says_that_it_is_ready_reports_when_asked_and_at_the_end() -> None:
    async with Peer() as peer:
        peer.member.announce_ready()
        assert abs((await peer.heard("ready"))["clock"] - time.monotonic()) < 5
        peer.writer.write(encode("snapshot", id=3))
        asked = await peer.heard("snapshot")
        assert (asked["replies"], asked["snapshot"]["buckets"]) == (3, 7)
        await peer.member.close(cut_off=2)
        left = await peer.heard("left")
        assert (left["cut_off"], left["snapshot"]["buckets"]) == (2, 7)
        peer.writer.close()


async def test_a_worker_reports_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_channel, "SNAPSHOT_INTERVAL", 0.01)
    async with Peer() as peer:
        peer.member.announce_ready()
        for _ in range(3):
            assert (await peer.heard("snapshot"))["replies"] == 0


async def test_the_merged_snapshots_are_those_of_the_supervisor() -> None:
    async with Peer() as peer:
        gathering = asyncio.create_task(peer.member.gather())
        asked = await peer.heard("gather")
        assert asked["snapshot"]["buckets"] == 7, "what it shows may be asked for before it is shown"
        all_together = look()
        all_together.buckets = 21
        peer.writer.write(encode("gathered", id=asked["id"], snapshot=all_together.state(), is_last=True))
        report = await gathering
        assert report.buckets == 21
        assert report.recorder.percentiles == (50,)


async def test_a_supervisor_that_is_silent_is_replaced_by_its_last_reply(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Peer() as peer:
        monkeypatch.setattr(worker_channel, "GATHER_TIMEOUT", 0.05)
        with caplog.at_level(logging.WARNING):
            assert (await peer.member.gather()).buckets == 7, "its own, for want of any answer"
        assert "no response from the supervisor" in caplog.text
        late = look()
        late.buckets = 20
        await peer.heard("gather")
        peer.writer.write(encode("gathered", id=1, snapshot=late.state(), is_last=True))  # nobody waits for it by now
        monkeypatch.setattr(worker_channel, "GATHER_TIMEOUT", PATIENCE)
        gathering = asyncio.create_task(peer.member.gather())
        await peer.heard("gather")
        late.buckets = 21
        peer.writer.write(encode("gathered", id=2, snapshot=late.state(), is_last=True))
        assert (await gathering).buckets == 21
        monkeypatch.setattr(worker_channel, "GATHER_TIMEOUT", 0.05)
        assert (await peer.member.gather()).buckets == 21


async def test_the_end_of_a_supervisor_is_reported_to_its_worker_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_channel, "GATHER_TIMEOUT", 0.05)
    told: list[int] = []
    async with Peer(lambda: told.append(1)) as peer:
        peer.member.announce_ready()
        peer.writer.close()
        await soon(lambda: told == [1], "it is reported")
        assert (await peer.member.gather()).buckets == 7
        await peer.member.close()
        assert told == [1]


async def test_a_supervisor_that_does_not_read_is_sent_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_channel, "MAX_UNSENT", 1)
    async with Peer() as peer:
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        peer.reader._transport.pause_reading()  # type: ignore[attr-defined]  # as if it hung
        for _ in range(3000):
            await peer.member._send_next()
        unsent = peer.member._writer.transport.get_write_buffer_size()
        assert unsent < 5000
        peer.reader._transport.resume_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
