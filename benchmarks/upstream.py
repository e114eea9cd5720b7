"""The upstream of all peers: nginx for downloads, and behind it a sink that reads uploads to their end.

nginx responds to `return` before it has read the request body, and otherwise would store the body on disk, so a small
asyncio server receives the uploads: `python -m benchmarks.upstream <port>`. It also holds requests to /api/hold for
HOLD seconds. On other loopback addresses nginx offers the same with the same port: TARGETS for load balancing,
TLS_ADDRESS with TLS.
"""

import asyncio
import importlib
import json
import shutil
import subprocess
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
CHUNKED = json.dumps([{"id": number, "name": "Ada Lovelace", "city": "London"} for number in range(19)]).encode()
HOLD = 6.0  # seconds
TARGETS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
TLS_ADDRESS, TLS_NAME = "127.0.0.4", "upstream.test"  # both are in the certificate
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(UPLOADED) + UPLOADED


@contextmanager
def upstream(folder: Path, core: int) -> Iterator[int]:
    """Run the upstream on a core; yield the port of its nginx, which serves /api/<size> and /api/upload.

    If openssl is installed, it also serves with TLS, by the certificate that `certificate` names.
    """
    _make_certificate(folder)
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


def certificate(folder: Path) -> Path | None:
    """Return the certificate of the upstream in a folder, which is its own authority; None if there is none."""
    path = folder / "upstream.pem"
    return path if path.exists() else None


def _make_certificate(folder: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        return
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
    names = ["-subj", "/CN=upstream", "-addext", f"subjectAltName=IP:{TLS_ADDRESS},DNS:{TLS_NAME}"]
    files = ["-keyout", str(folder / "upstream.key"), "-out", str(folder / "upstream.pem")]
    subprocess.run([openssl, "req", "-x509", *key, *names, *files], check=True, capture_output=True)  # noqa: S603 - fixed arguments


def _nginx(folder: Path, port: int, sink: int) -> str:
    addresses = " ".join(f"listen {address}:{port} backlog=4096;" for address in TARGETS)
    if certificate(folder) is not None:
        addresses += f" listen {TLS_ADDRESS}:{port} backlog=4096 ssl;"
        addresses += f" ssl_certificate {folder}/upstream.pem; ssl_certificate_key {folder}/upstream.key;"
    return f"""
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
    access_log off; sendfile on; tcp_nopush on; open_file_cache max=10;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    upstream sink {{ server 127.0.0.1:{sink}; keepalive 128; }}
    server {{
        {addresses}
        keepalive_requests 1000000000; keepalive_timeout 1h;
        client_max_body_size 0; default_type application/json;
        location = /api/small {{ return 200 '{SMALL.decode()}'; }}
        location /api/small/ {{ return 200 '{SMALL.decode()}'; }}
        location = /api/chunked {{
            gzip on; gzip_proxied any; gzip_types application/json; return 200 '{CHUNKED.decode()}';
        }}
        location /api/ {{ root {folder}; }}
        location = /api/upload {{
            proxy_pass http://sink; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_request_buffering off;
        }}
        location = /api/hold {{ proxy_pass http://sink; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
}}
"""


class Sink(asyncio.BufferedProtocol):
    """Reads a request to its end, then responds, to /api/hold after `HOLD` seconds."""

    def __init__(self, buffer: bytearray) -> None:
        self._buffer = buffer  # shared by all connections
        self._is_held = False
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

    def on_url(self, url: bytes) -> None:
        """Note whether the request is to be held; called by the parser."""
        self._is_held = url.endswith(b"/hold")

    def on_message_complete(self) -> None:
        """Send the response; called by the parser."""
        if self._is_held:
            asyncio.get_running_loop().call_later(HOLD, self._transport.write, _ANSWER)
        else:
            self._transport.write(_ANSWER)


async def _serve(port: int) -> None:
    buffer = bytearray(262_144)
    server = await asyncio.get_running_loop().create_server(lambda: Sink(buffer), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


def run(port: int) -> None:
    """Serve uploads until terminated, with uvloop if installed."""
    try:
        importlib.import_module("uvloop").run(_serve(port))
    except ModuleNotFoundError:
        asyncio.run(_serve(port))


if __name__ == "__main__":
    run(int(sys.argv[1]))
