"""Sends requests to an OpenTelemetry collector: OTLP over HTTP. Blocking, for a thread of its own."""

import http.client
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

RETRYABLE = frozenset({429, 502, 503, 504})  # by the OTLP specification
_MAX_RESPONSE = 65_536  # bytes that are read of a response
_OK = range(200, 300)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The result of a request; `detail` is the cause.

    The collector accepted it, except for `rejected` spans; or asked for it again, after `retry_after` seconds if that
    is set; or refused it.
    """

    result: Literal["accepted", "retry", "refused"]
    detail: str = ""
    rejected: int = 0
    retry_after: float | None = None


class OtlpSender:
    """Posts to one URL, over one connection that is kept open."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        timeout: float,
        read: Callable[[bytes], tuple[int, str]],
        make_context: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        """`timeout` is in seconds, for connecting and for each part of a response.

        `read` returns, by the body of a successful response, the number of spans that were rejected, and why.
        `make_context` creates the TLS context of a connection.
        """
        parts = urlsplit(url)
        self.url = url
        self.place = f"{parts.scheme}://{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
        self._is_tls = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port
        self._target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
        self._headers = {"Content-Type": "application/x-protobuf", "User-Agent": "api-gateway", **headers}
        self._timeout = timeout
        self._read = read
        self._make_context = make_context
        self._connection: http.client.HTTPConnection | None = None

    def __repr__(self) -> str:
        return f"<OtlpSender to {self.place} [{'closed' if self._connection is None else 'open'}]>"

    def send(self, body: bytes, within: float | None = None) -> Delivery:
        """Send a request within `within` seconds, at most the timeout. Does not raise."""
        timeout = self._timeout if within is None else max(0.01, min(self._timeout, within))
        is_kept = self._connection is not None
        try:
            return self._exchange(body, timeout)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if is_kept and isinstance(error, ConnectionError | http.client.RemoteDisconnected):
                return self.send(body, within)  # the collector had closed it while it was idle
            return Delivery("retry", str(error) or type(error).__name__)

    def _exchange(self, body: bytes, timeout: float) -> Delivery:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._open(timeout)
        elif connection.sock is not None:
            connection.sock.settimeout(timeout)
        connection.request("POST", self._target, body, self._headers)
        response = connection.getresponse()
        content = response.read(_MAX_RESPONSE)
        if response.will_close or not response.isclosed():
            self.close()
        if response.status in _OK:
            return self._accepted(content)
        after = response.headers.get("Retry-After", "")
        return Delivery(
            "retry" if response.status in RETRYABLE else "refused",
            f"status {response.status}",
            retry_after=float(after) if after.isdecimal() else None,
        )

    def _accepted(self, content: bytes) -> Delivery:
        try:
            rejected, detail = self._read(content)
        except Exception:  # noqa: BLE001 - the library's error for a body that is not of its format
            rejected, detail = 0, ""
        return Delivery("accepted", detail, rejected=rejected)

    def _open(self, timeout: float) -> http.client.HTTPConnection:
        if self._is_tls:
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._make_context())
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout)

    def close(self) -> None:
        """Close the connection. The next request opens another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
