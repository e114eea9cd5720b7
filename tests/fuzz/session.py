"""Runs cases against a gateway, many at once, and looks at the gateway meanwhile and afterwards."""

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case
from tests.fuzz.gateway import TOKEN, Gateway
from tests.fuzz.peers import Upstream, run

AT_ONCE = 16  # cases
_PROBE_EVERY = 0.2  # seconds
_PROBE_WITHIN = 5.0  # seconds for /healthz
_SETTLES_WITHIN = 30.0  # seconds until nothing is left of what has ended: the longest of the time limits, and slack
_IDLE_FOR = 0.4  # seconds over which an idle gateway's processor time is measured
_IDLE_SHARE = 0.6  # of a processor, which an idle gateway does not reach
_SLACK = 3  # descriptors and tasks that may come and go


class Found(Exception):
    """Something is wrong; says what."""


class Session:
    """One gateway, its upstream, and the cases run since the last look at what they have left."""

    def __init__(self, folder: Path) -> None:
        self.upstream = Upstream()
        for _ in range(4):
            self.upstream.listen()
        self.gateway = Gateway(folder, self.upstream.ports)
        self.recent: list[Case] = []
        self.count = 0
        self._base = (0, 0)

    async def start(self) -> None:
        """Start, and note what there is while nothing happens."""
        await asyncio.to_thread(self.gateway.start)
        for _ in range(3):
            await self._gauges()
        self._base = (self.gateway.descriptors(), (await self._gauges())[1])

    async def close(self) -> str | None:
        """Stop both; return what is wrong with how the gateway ends."""
        wrong = await asyncio.to_thread(self.gateway.stop)
        self.upstream.close()
        return wrong

    def kill(self) -> None:
        """End both now."""
        self.gateway.kill()
        self.upstream.close()

    async def run(self, cases: Iterable[Case], until: float | None = None) -> None:
        """Run cases until there are no more, or until that time. Raises Found."""
        cases = iter(cases)
        prober = asyncio.create_task(self._probe())
        workers = [asyncio.create_task(self._work(cases, until)) for _ in range(AT_ONCE)]
        working: asyncio.Future[Any] = asyncio.gather(*workers)
        try:
            await asyncio.wait({prober, working}, return_when=asyncio.FIRST_COMPLETED)
            for one in (working, prober):
                if one.done():
                    one.result()
        finally:
            for task in (prober, *workers):
                task.cancel()
            await asyncio.gather(prober, working, *workers, return_exceptions=True)
        if self.upstream.findings:
            raise Found(self.upstream.findings.pop())

    async def _work(self, cases: Iterable[Case], until: float | None) -> None:
        for case in cases:
            self.recent.append(case)
            self.count += 1
            for nonce in case.nonces:
                if not case.is_faulty or len(case.responses[nonce]) <= 1:
                    self.upstream.owners[nonce] = self.count
            self.upstream.scripts |= case.responses
            wrong = await run(case, self.gateway.port, self.upstream.owners)
            if wrong is not None:
                seen = [self.upstream.progress.get(nonce, "it has not come") for nonce in case.nonces]
                raise Found(f"{wrong}; at the upstream: {', '.join(seen)}; of {case}")
            if until is not None and time.monotonic() >= until:
                return

    async def _probe(self) -> None:
        """Ask for /healthz again and again."""
        while True:
            await asyncio.sleep(_PROBE_EVERY)
            if (ended := self.gateway.end()) is not None:
                raise Found(ended)
            try:
                async with asyncio.timeout(_PROBE_WITHIN):
                    answer = await self._ask("/healthz")
            except (OSError, EOFError) as error:
                await asyncio.sleep(_PROBE_EVERY)
                raise Found(self.gateway.end() or f"/healthz is not answered: {error!r}") from error
            if b" 200 " not in answer[:16]:
                raise Found(f"/healthz: {answer!r}")

    async def settle(self) -> None:
        """See to it that nothing is left of the cases that were run. Raises Found."""
        until = time.monotonic() + _SETTLES_WITHIN
        self.upstream.hang_up()
        try:
            while (left := await self._left()) is not None:
                if time.monotonic() > until:
                    raise Found(f"{left} are left {_SETTLES_WITHIN:g} s after the last case")
                await asyncio.sleep(0.1)
                self.upstream.hang_up()
        except (OSError, EOFError, ValueError) as error:
            raise Found(self.gateway.end() or f"/metrics is not answered: {error!r}") from error
        before, began = self.gateway.cpu_seconds(), time.monotonic()
        await asyncio.sleep(_IDLE_FOR)
        used = (self.gateway.cpu_seconds() - before) / (time.monotonic() - began)
        if used > _IDLE_SHARE:
            raise Found(f"the gateway uses {used:.0%} of a processor while it is idle")
        if (defect := self.gateway.defect()) is not None:
            raise Found(defect)
        self.recent.clear()
        self.upstream.scripts.clear()
        self.upstream.progress.clear()

    async def _left(self) -> str | None:
        """Return what is left, None if nothing is."""
        in_flight, tasks = await self._gauges()
        descriptors = self.gateway.descriptors()
        if in_flight > 0:
            return f"{in_flight} requests in flight"
        if tasks > self._base[1] + _SLACK:
            return f"{tasks - self._base[1]} tasks"
        if descriptors > self._base[0] + _SLACK:
            return f"{descriptors - self._base[0]} descriptors"
        return None

    async def _gauges(self) -> tuple[int, int]:
        """Return the requests in flight and the tasks of the event loop."""
        async with asyncio.timeout(_PROBE_WITHIN):
            text = (await self._ask("/metrics?format=prometheus")).decode()
        gauges = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("gateway_"))
        in_flight = sum(float(value) for name, value in gauges.items() if "in_flight" in name)
        if "gateway_event_loop_tasks" not in gauges:
            raise ValueError(text[:400])
        return int(in_flight), int(float(gauges["gateway_event_loop_tasks"]))

    async def _ask(self, path: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.gateway.port)
        try:
            fields = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n"
            writer.write(f"GET {path} HTTP/1.1\r\n{fields}\r\n".encode())
            answer = await reader.read()
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        if not answer:
            raise EOFError
        return answer
