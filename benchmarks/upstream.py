"""The upstream of all peers: nginx for downloads, and behind it a sink that reads uploads to their end.

nginx responds to `return` before it has read the request body, and otherwise would store the body on disk, so a small
asyncio server receives the uploads: `python -m benchmarks.upstream <port>`.
"""

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import httptools

from benchmarks.processes import free_port, running

ROOT = Path(__file__).parent.parent
SMALL = json.dumps({"id": 7, "name": "Ada Lovelace", "pad": "x" * 146}).encode()
SIZES = {"small": len(SMALL), "10k": 10_240, "1m": 1_048_576, "100m": 104_857_600}
UPLOADED = b'{"stored": true}'
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(UPLOADED) + UPLOADED


@contextmanager
def upstream(folder: Path, core: int) -> Iterator[int]:
    """Run the upstream on a core; yield the port of its nginx, which serves /api/<size> and /api/upload."""
    (folder / "api").mkdir()
    (folder / "sink").mkdir()
    for name in ("10k", "1m", "100m"):
        with (folder / "api" / name).open("wb") as file:
            file.truncate(SIZES[name])
    sink, port = free_port(), free_port()
    config = folder / "nginx.conf"
    config.write_text(_nginx(folder, port, sink))
    command = ["nginx", "-p", str(folder), "-c", str(config)]
    read_all = [sys.executable, "-m", "benchmarks.upstream", str(sink)]
    with (
        running(read_all, core=core, port=sink, folder=folder / "sink", env={"PYTHONPATH": str(ROOT)}),
        running(command, core=core, port=port, folder=folder),
    ):
        yield port


def _nginx(folder: Path, port: int, sink: int) -> str:
    return f"""
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
    access_log off; sendfile on; tcp_nopush on; open_file_cache max=10;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    upstream sink {{ server 127.0.0.1:{sink}; keepalive 128; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        keepalive_requests 1000000000; keepalive_timeout 1h;
        client_max_body_size 0; default_type application/json;
        location = /api/small {{ return 200 '{SMALL.decode()}'; }}
        location /api/ {{ root {folder}; }}
        location = /api/upload {{
            proxy_pass http://sink; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_request_buffering off;
        }}
    }}
}}
"""


class Sink(asyncio.BufferedProtocol):
    """Reads a request to its end, then responds."""

    def __init__(self) -> None:
        self._buffer = bytearray(262_144)
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002 - the signature is asyncio's
        """Return the shared buffer."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse received bytes."""
        self._parser.feed_data(memoryview(self._buffer)[:nbytes])

    def on_message_complete(self) -> None:
        """Send the response; called by the parser."""
        self._transport.write(_ANSWER)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", port)
    await server.serve_forever()


def run(port: int) -> None:
    """Serve uploads until terminated, with uvloop if installed."""
    try:
        importlib.import_module("uvloop").run(_serve(port))
    except ModuleNotFoundError:
        asyncio.run(_serve(port))


if __name__ == "__main__":
    run(int(sys.argv[1]))
