"""Checks of upstreams and issuers: names resolve, targets accept connections, certificates are valid."""

import asyncio
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from api_gateway.config import GatewayConfig
from api_gateway.doctor.checks import Check, CheckResult, Level, broken, doubtful, good
from api_gateway.doctor.machine_checks import validity
from api_gateway.settings.jwt import IssuerSection
from api_gateway.settings.upstreams import HealthCheckSection, UpstreamSection
from api_gateway.system.x509 import facts_of_der, verifying_context
from api_gateway.transport.document_fetch import DocumentUnavailable, fetch_document
from api_gateway.transport.http1_transport import tls_context

_MAX_LINE = 1000  # bytes of a status line
_WAIT = 3.0  # seconds for a connection
_SLOW = {"P-384": "ES384", "P-521": "ES512"}  # algorithms by curve whose verification takes long, see docs/jwt.md


def upstream_checks(config: GatewayConfig) -> Iterator[Check]:
    """Yield a check for each target."""
    for name, section in config.upstreams.items():
        for target in section.targets:
            about = f"upstreams.{name} {target.url}"
            yield Check(about, partial(_target, about, section, target.url))


async def _target(about: str, section: UpstreamSection, url: str) -> list[CheckResult]:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    try:
        await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a host name"
        remedy = "Correct the host in the URL, or the DNS of this machine."
        return [broken(about, f"the name cannot be resolved: {reason.lower()}", remedy)]
    context = None
    if parts.scheme == "https":
        try:
            context = await asyncio.to_thread(
                tls_context, section.tls.ca_file, section.tls.cert_file, section.tls.key_file
            )
        except OSError:
            return []  # the check of files reports it
    began = time.monotonic()
    try:
        async with asyncio.timeout(min(section.timeouts.connect, _WAIT)):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLCertVerificationError as error:
        remedy = "Renew the certificate, correct its names, or name its authority in tls.ca_file."
        return [broken(about, f"its certificate is not accepted: {error.verify_message}", remedy)]
    except ssl.SSLError as error:
        return [broken(about, f"no TLS connection: {error.reason or error}", "Use http:// if the target has no TLS.")]
    except (OSError, TimeoutError) as error:
        code = getattr(error, "errno", None)
        reason = os.strerror(code) if code else "no response in time"
        remedy = "Start the service, or correct the URL or the firewall."
        return [broken(about, f"no connection: {reason.lower()}", remedy)]
    took = time.monotonic() - began
    try:
        results = [_connected(about, writer, took)]
        if section.health_check is not None:
            results.append(await _response_result(about, reader, writer, parts.netloc, section.health_check))
        return results
    finally:
        writer.close()


def _connected(about: str, writer: asyncio.StreamWriter, took: float) -> CheckResult:
    detail = f"accepts connections, after {took * 1000:.0f} ms"
    tls: ssl.SSLObject | None = writer.get_extra_info("ssl_object")
    certificate = None if tls is None else tls.getpeercert(binary_form=True)
    if certificate is None:
        return good(about, detail)
    end = datetime.fromtimestamp(facts_of_der(certificate).not_after, UTC)
    found = validity(about, end, datetime.now(UTC))
    return CheckResult(about, found.level, f"{detail}; {found.detail}", found.remedy)


async def _response_result(
    about: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, check: HealthCheckSection
) -> CheckResult:
    fields = {"Host": host, "User-Agent": "api-gateway-doctor", "Connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    request = f"GET {check.path} HTTP/1.1\r\n{head}\r\n"
    remedy = "Look at the service, or set path and statuses of health_check to what it responds with."
    try:
        async with asyncio.timeout(check.timeout):
            writer.write(request.encode("ascii"))
            await writer.drain()
            line = (await reader.readline())[:_MAX_LINE].decode("latin-1")
    except (OSError, TimeoutError, ValueError):
        return broken(about, f"no response to GET {check.path} within {check.timeout:g} s", remedy)
    version, _, rest = line.partition(" ")
    status = rest[:3]
    if not version.startswith("HTTP/1.") or not status.isdigit():
        return broken(about, f"the response to GET {check.path} is not HTTP", "Correct the port in the URL.")
    ranges = [one.split("-") for one in check.statuses]
    if any(int(low) <= int(status) <= int(high) for low, high in ranges):
        return good(about, f"GET {check.path} responds with {status}")
    detail = f"GET {check.path} responds with {status}, which is not among {', '.join(check.statuses)}"
    return broken(about, detail, remedy)


def issuer_checks(config: GatewayConfig) -> Iterator[Check]:
    """Yield a check for each issuer of tokens whose keys are fetched."""
    for name, section in config.identity.jwt.issuers.items():
        if section.document_url is not None and "jwt" in config.identity.sources:
            about = f"identity.jwt.issuers.{name}"
            yield Check(about, partial(_issuer, about, section))


async def _issuer(about: str, section: IssuerSection) -> list[CheckResult]:
    remedy = "Correct the URL, or let this machine reach it; tokens of this issuer are refused until then."
    try:
        context = await asyncio.to_thread(verifying_context, section.ca_file)
        url = section.document_url or ""
        document = json.loads(await fetch_document(url, context))
        if section.jwks_url is None:
            url = document.get("jwks_uri")
            if not isinstance(url, str) or not section.permits(url):
                return [broken(about, "its OpenID configuration names no URL of keys that is permitted", remedy)]
            document = json.loads(await fetch_document(url, context))
        keys = document.get("keys")
    except (DocumentUnavailable, OSError, ValueError, AttributeError) as error:
        return [broken(about, f"no keys: {error}", remedy)]
    if not isinstance(keys, list) or not keys:
        return [doubtful(about, f"{url} has no keys", "Look at the issuer: without keys all its tokens are refused.")]
    return [good(about, f"{url} has {len(keys)} keys{_note_on(keys, section)}")]


def _note_on(keys: list[Any], section: IssuerSection) -> str:
    """Return which keys verify slowly, and what that costs, as the end of a sentence; empty if none do."""
    curves = [key.get("crv") for key in keys if isinstance(key, dict)]
    slow = [name for curve, name in _SLOW.items() if curve in curves and name in section.permitted]
    if not slow:
        return ""
    return f", some of them for {' and '.join(slow)}: the first request with a token takes 0.4 to 0.8 ms of CPU time"


def worst(results: list[CheckResult]) -> Level:
    """Return the worst level of all results."""
    order = list(Level)
    return max((one.level for one in results), key=order.index, default=Level.OK)
