"""The certificates of a server: loaded at its start, followed as their files change, and reported."""

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from api_gateway.config import GatewayConfig
from api_gateway.downstream.certificates import CertificateError, LoadedCertificate
from api_gateway.downstream.tls_terminator import PreparedTls, TlsTerminator
from api_gateway.errors import StartupError
from api_gateway.reporting.tls_snapshot import WITHOUT_TLS, CertificateSnapshot, TlsSnapshot

logger = logging.getLogger(__name__)

FILE_POLL_INTERVAL = 5.0  # seconds between checks of the files
_REMINDER_INTERVAL = 86_400.0  # seconds between messages about certificates that expire
_DAY = 86_400.0


class ServerCertificates:
    """TLS of one server. `terminator` is None while the server speaks plain HTTP.

    `prepare` loads what a configuration needs, and `commit` puts what was prepared last into force.
    """

    def __init__(
        self, config: GatewayConfig, wall: Callable[[], float] = time.time, interval: float = FILE_POLL_INTERVAL
    ) -> None:
        """Load the certificates. Blocks. Raises StartupError."""
        self.terminator: TlsTerminator | None = None
        self._wall = wall
        self._interval = interval
        self._prepared: PreparedTls | None = None
        self.prepare(config)
        self.commit()

    def __repr__(self) -> str:
        return f"<ServerCertificates [{self.terminator!r}]>"

    def prepare(self, config: GatewayConfig) -> None:
        """Load the certificates of a configuration, and change nothing. Blocks. Raises StartupError."""
        section, terminator = config.server.tls, self.terminator
        try:
            if section is None:
                self._prepared = None
            elif terminator is None:  # at the start, an expired certificate is better than none
                self._prepared = PreparedTls.of(section)
            else:
                self._prepared = terminator.prepare(section)
        except CertificateError as error:
            raise StartupError(str(error)) from error

    def commit(self) -> None:
        """Use what was prepared for new connections."""
        prepared = self._prepared
        if prepared is None:
            self.terminator = None
        elif self.terminator is None:
            ignore_unreadable_names()
            self.terminator = TlsTerminator(prepared, self._wall)
        else:
            self.terminator.use(prepared)

    def has_certificate_for(self, host: str) -> bool:
        """Return whether a connection for this host is accepted."""
        return self.terminator is not None and self.terminator.has_certificate_for(host)

    async def follow_files(self) -> None:
        """Follow the files and remind of certificates that expire, until cancelled."""
        reminded = -_REMINDER_INTERVAL
        while True:
            if self.terminator is not None:
                now = time.monotonic()
                if now - reminded >= _REMINDER_INTERVAL:
                    reminded = now
                    for problem in self._expiring(self.terminator):
                        logger.warning("%s", problem)
                await self.terminator.follow_files()
            await asyncio.sleep(self._interval)

    def snapshot(self) -> TlsSnapshot:
        """Return the certificates in force, and what is wrong with them."""
        terminator = self.terminator
        if terminator is None:
            return WITHOUT_TLS
        certificates = tuple(
            CertificateSnapshot(one.file, one.facts.names[0], one.facts.not_after) for one in terminator.loaded
        )
        problems = self._expiring(terminator)
        if terminator.error is not None:
            problems.append(
                f"Changed certificates cannot be used, so the ones before are in force: {terminator.error}"
            )
        return TlsSnapshot(certificates, tuple(problems))

    def _expiring(self, terminator: TlsTerminator) -> list[str]:
        now, days = self._wall(), terminator.section.expiry_warning_days
        found = (expiry_problem(one, now, days) for one in terminator.loaded)
        return [problem for problem in found if problem is not None]


def expiry_problem(certificate: LoadedCertificate, now: float, days: int) -> str | None:
    """Return a sentence if a certificate has expired or expires within so many days; None otherwise."""
    left = certificate.facts.not_after - now
    if left > days * _DAY:
        return None
    at = datetime.fromtimestamp(certificate.facts.not_after, UTC).strftime("%Y-%m-%d %H:%M UTC")
    what = f"The certificate for {certificate.facts.names[0]} ('{certificate.file}')"
    if left <= 0:
        return f"{what} expired on {at}; clients refuse it. Renew it."
    return f"{what} expires in {left / _DAY:.1f} days, on {at}. Renew it."


def ignore_unreadable_names() -> None:
    """Report no server name that is not ASCII: `ssl` fails such a handshake, and writes a traceback for each.

    Any client could fill the log with them; the failures are counted. Idempotent.
    """
    before = sys.unraisablehook
    if not (isinstance(before, partial) and before.func is _report_unraisable):
        sys.unraisablehook = partial(_report_unraisable, before)


def _report_unraisable(before: Callable[[Any], Any], unraisable: "sys.UnraisableHookArgs") -> None:
    is_name = unraisable.exc_type is UnicodeDecodeError and isinstance(unraisable.object, bytes)
    if not is_name:
        before(unraisable)
