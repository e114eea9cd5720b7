"""TLS of one process: certificates in force, how they are replaced, and what became of handshakes.

Every handshake begins with one context, `front`, which has the keys of session tickets, and which the callback for the
name replaces by the context of a certificate. So new certificates do not end sessions. `ssl` has no access to ticket
keys, so each worker has its own, and a client that comes back to another worker has a full handshake.
"""

import asyncio
import hashlib
import logging
import os
import ssl
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from api_gateway.downstream.certificates import (
    CertificateError,
    Certificates,
    LoadedCertificate,
    date_error,
    load_certificates,
    server_context,
    watched_files,
)
from api_gateway.resilience.fair_shares import FairShares
from api_gateway.settings.tls import ServerTlsSection

logger = logging.getLogger(__name__)

TICKET_LIFE = 86_400.0  # seconds after which the keys of session tickets are replaced
HANDSHAKE_FAILURES = (
    "timeout",
    "too_many",
    "disconnected",
    "plain_http",
    "not_tls",
    "unknown_name",
    "protocol_version",
    "no_shared_cipher",
    "certificate_missing",
    "certificate_invalid",
    "client_rejected",
    "other",
)
RELOADS = ("success", "failure")
# The words of OpenSSL; what begins with TLSV1_ALERT or SSLV3_ALERT comes from the client.
_FAILURE_OF = {
    "CALLBACK_FAILED": "unknown_name",
    "CERTIFICATE_VERIFY_FAILED": "certificate_invalid",
    "NO_SHARED_CIPHER": "no_shared_cipher",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "certificate_missing",
    "UNSUPPORTED_PROTOCOL": "protocol_version",
    "VERSION_TOO_LOW": "protocol_version",
    "WRONG_VERSION_NUMBER": "not_tls",
}
_VERSIONS = ("TLSv1.2", "TLSv1.3")

Stamp = tuple[tuple[int, int, int, int] | None, ...]


class TlsCounters:
    """The results of handshakes and of reloads of certificates. One for the process: `TLS_COUNTERS`."""

    def __init__(self) -> None:
        self.handshakes: Counter[str] = Counter(
            {f"{version}/{session}": 0 for version in _VERSIONS for session in ("new", "resumed")}
        )
        self.failures: Counter[str] = Counter(dict.fromkeys(HANDSHAKE_FAILURES, 0))
        self.reloads: Counter[str] = Counter(dict.fromkeys(RELOADS, 0))

    def __repr__(self) -> str:
        return f"<TlsCounters [{self.handshakes.total()} handshakes, {self.failures.total()} failures]>"


TLS_COUNTERS = TlsCounters()


@dataclass(frozen=True, slots=True)
class PreparedTls:
    """The files of a section, loaded and not in force yet. `digest` changes with the terms of sessions."""

    section: ServerTlsSection
    certificates: Certificates
    stamp: Stamp
    digest: bytes

    @classmethod
    def of(cls, section: ServerTlsSection) -> "PreparedTls":
        """Load the files of a section, whatever the dates of certificates. Blocks. Raises CertificateError."""
        stamp = _stamp_of(watched_files(section))  # before they are read: a later change is noticed
        return cls(section, load_certificates(section), stamp, _digest(section))


class TlsTerminator:
    """The certificates of a section, the context of new connections, and the handshakes in progress.

    `error` is why the last reload failed; the certificates before it are in force then.
    """

    def __init__(self, prepared: PreparedTls, wall: Callable[[], float]) -> None:
        """`wall` returns seconds since the epoch."""
        self.error: str | None = None
        self.section = prepared.section
        self.handshakes = FairShares(prepared.section.max_handshakes)
        self._wall = wall
        self._in_force = prepared
        self._seen = prepared.stamp  # of the files at the last attempt
        self._front_since = wall()
        self.front = self._new_front()

    def __repr__(self) -> str:
        return f"<TlsTerminator [{len(self.loaded)} certificates, {self.handshakes!r}]>"

    @property
    def loaded(self) -> tuple[LoadedCertificate, ...]:
        """The certificates in force."""
        return self._in_force.certificates.loaded

    def use(self, prepared: PreparedTls) -> None:
        """Use what was loaded for new connections."""
        before, self._in_force, self._seen = self._in_force, prepared, prepared.stamp
        self.section, self.error = prepared.section, None
        self.handshakes.total = prepared.section.max_handshakes
        if prepared.digest != before.digest or self._wall() - self._front_since >= TICKET_LIFE:
            self._front_since = self._wall()
            self.front = self._new_front()
        TLS_COUNTERS.reloads["success"] += 1
        if prepared.certificates.loaded != before.certificates.loaded:
            logger.info("certificates loaded: %s", _named(self.loaded))

    def prepare(self, section: ServerTlsSection) -> PreparedTls:
        """Load what is to replace what is in force. Blocks. Raises CertificateError, also for an expired one."""
        prepared = PreparedTls.of(section)
        error = date_error(prepared.certificates, self._in_force.certificates, self._wall())
        if error is not None:
            raise error
        return prepared

    def has_certificate_for(self, host: str) -> bool:
        """Return whether a certificate has this name, or unknown names get the first one."""
        return not self.section.reject_unknown_names or self._in_force.certificates.of_name(host) is not None

    async def follow_files(self) -> None:
        """Load the files again if they have changed; if that fails, log why, and keep what is in force."""
        section = self.section
        stamp = await asyncio.to_thread(_stamp_of, watched_files(section))
        if stamp == self._seen and self._wall() - self._front_since < TICKET_LIFE:
            return
        try:
            prepared = await asyncio.to_thread(self.prepare, section)
        except CertificateError as error:
            self._seen, self.error = stamp, str(error)
            TLS_COUNTERS.reloads["failure"] += 1
            logger.error("certificates: the ones before stay in force: %s", error)  # noqa: TRY400 - a mistake of files
            return
        if self.section is section:  # else a reload of the configuration was faster
            self.use(prepared)

    def _new_front(self) -> ssl.SSLContext:
        front = server_context(self.section)
        front.sni_callback = self._choose
        return front

    def _choose(self, handshake: ssl.SSLObject, name: str | None, _front: ssl.SSLContext) -> int | None:
        """Continue a handshake with the certificate for a name (callback of OpenSSL)."""
        context = self._in_force.certificates.of_name(name)
        if context is None:
            if self.section.reject_unknown_names:
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
            context = self._in_force.certificates.default
        handshake.context = context
        return None


def failure_of(error: ssl.SSLError) -> str:
    """Return the reason, one of HANDSHAKE_FAILURES, why a handshake failed."""
    reason = error.reason or ""
    if reason.startswith(("TLSV1_ALERT", "TLSV13_ALERT", "SSLV3_ALERT")):
        return "client_rejected"
    return _FAILURE_OF.get(reason, "other")


def _stamp_of(files: Iterable[Path]) -> Stamp:
    """Return a value that changes with the files, and with symbolic links in their paths (Kubernetes)."""
    return tuple(_file_stamp(file) for file in files)


def _file_stamp(file: Path) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(file)  # noqa: PTH116 - three times as fast, and called again and again
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _digest(section: ServerTlsSection) -> bytes:
    """Return a digest of the terms of sessions: a client whose authority is no longer trusted must not resume one.

    Raises CertificateError if the files of authorities cannot be read.
    """
    clients = section.client_certificates
    digest = hashlib.blake2b(repr((section.minimum_version, section.ciphers)).encode())
    if clients is not None:
        digest.update(clients.mode.encode())
        for key, file in (("ca", clients.ca), ("crl", clients.crl)):
            try:
                digest.update(b"" if file is None else file.read_bytes())
            except OSError as error:
                message = f"cannot be read: {(error.strerror or str(error)).lower()}, got '{file}'"
                raise CertificateError(("client_certificates", key), message) from error
    return digest.digest()


def _named(loaded: Iterable[LoadedCertificate]) -> str:
    return ", ".join(one.facts.names[0] for one in loaded)
