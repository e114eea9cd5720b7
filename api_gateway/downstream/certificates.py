"""Certificates of the listener for clients: loaded from PEM files, and chosen by the name that a client asks for.

`load_certificates` blocks and changes nothing: an error leaves the certificates in force.
"""

import os
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from api_gateway.settings.tls import CertificateSection, ServerTlsSection
from api_gateway.system.x509 import PRIVATE_KEY, CertificateFacts, facts_of_pem, load_pair

ALPN = ["http/1.1"]
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_READABLE = 0o077  # permissions of others than the owner
_BY_ANYONE = 0o007
_WILDCARD = "*."


class CertificateError(Exception):
    """A certificate, its key or an authority cannot be used; `place` is the setting below `server.tls`."""

    def __init__(self, place: tuple[str, ...], message: str) -> None:
        super().__init__(f"server.tls.{'.'.join(place)}: {message}")
        self.place = place
        self.message = message


@dataclass(frozen=True, slots=True)
class LoadedCertificate:
    """One certificate in force: its file, and what it says."""

    file: str
    facts: CertificateFacts


@dataclass(frozen=True, slots=True)
class Certificates:
    """The certificates in force, with a context for each set of names."""

    loaded: tuple[LoadedCertificate, ...]
    default: ssl.SSLContext
    exact: Mapping[str, ssl.SSLContext] = field(repr=False)
    wildcards: Mapping[str, ssl.SSLContext] = field(repr=False)  # by what follows `*`, such as `.example.com`

    def of_name(self, name: str | None) -> ssl.SSLContext | None:
        """Return the context for a name: the exact one, or that of a wildcard, which stands for one label."""
        if name is None:
            return None
        name = name.lower().removesuffix(".")
        found = self.exact.get(name)
        if found is not None:
            return found
        return self.wildcards.get(name[name.find(".") :]) if "." in name else None


def load_certificates(section: ServerTlsSection) -> Certificates:
    """Load all certificates of a section. Blocks. Raises CertificateError.

    Certificates with the same names share a context, so that one of each kind of key (RSA, ECDSA) can be given. Dates
    are not checked, see `date_error`.
    """
    loaded: list[LoadedCertificate] = []
    contexts: dict[frozenset[str], ssl.SSLContext] = {}
    for number, pair in enumerate(section.certificates):
        place = ("certificates", str(number))
        facts = _facts_of(pair, place)
        names = frozenset(facts.names)
        if names not in contexts:
            contexts[names] = server_context(section)
        _load_pair(contexts[names], pair, place)
        loaded.append(LoadedCertificate(str(pair.certificate), facts))
    exact, wildcards = _by_name((one.facts.names, contexts[frozenset(one.facts.names)]) for one in loaded)
    return Certificates(tuple(loaded), contexts[frozenset(loaded[0].facts.names)], exact, wildcards)


def server_context(section: ServerTlsSection) -> ssl.SSLContext:
    """Return a context with the settings of a section, without a certificate of the server. Raises CertificateError.

    Renegotiation is off: a client could have handshakes computed without end.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[section.minimum_version]
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(ALPN)
    if section.ciphers is not None:
        try:
            context.set_ciphers(section.ciphers)
        except ssl.SSLError as error:
            message = f"names no cipher suite that OpenSSL has, got {section.ciphers!r}"
            raise CertificateError(("ciphers",), message) from error
    clients = section.client_certificates
    if clients is not None:
        _trust(context, ("client_certificates", "ca"), clients.ca)
        context.verify_mode = ssl.CERT_REQUIRED if clients.mode == "required" else ssl.CERT_OPTIONAL
        if clients.crl is not None:
            _trust(context, ("client_certificates", "crl"), clients.crl)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def date_error(certificates: Certificates, before: Certificates | None, now: float) -> CertificateError | None:
    """Return the error of a certificate that is not valid at `now` (seconds since the epoch) and not already in force.

    One that expired in force does not prevent the change of another.
    """
    known = () if before is None else before.loaded
    for number, one in enumerate(certificates.loaded):
        if one in known or one.facts.not_before <= now < one.facts.not_after:
            continue
        what = "has expired; renew it" if one.facts.not_after <= now else "is not valid yet; check the clock"
        return CertificateError(("certificates", str(number), "certificate"), f"{what}, got '{one.file}'")
    return None


def watched_files(section: ServerTlsSection) -> tuple[Path, ...]:
    """Return the files whose change changes the certificates."""
    clients = section.client_certificates
    found = [path for pair in section.certificates for path in (pair.certificate, pair.key)]
    if clients is not None:
        found += [clients.ca, clients.crl]
    return tuple(dict.fromkeys(path for path in found if path is not None))


def readable_keys(section: ServerTlsSection) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the setting and a warning for each key that others than its owner may read."""
    for number, pair in enumerate(section.certificates):
        key = pair.key or pair.certificate
        try:
            status = key.stat()
        except OSError:
            continue  # an error, which `load_certificates` reports
        mode = status.st_mode & 0o777
        # A key of another user, such as a credential of systemd (0440), may reach the gateway by its group only.
        if mode & (_READABLE if status.st_uid == os.geteuid() else _BY_ANYONE):
            message = f"others than its owner have access to the key; use chmod 600, got '{key}' with {mode:04o}"
            yield ("certificates", str(number), "certificate" if pair.key is None else "key"), message


def _facts_of(pair: CertificateSection, place: tuple[str, ...]) -> CertificateFacts:
    file = pair.certificate
    text = _read((*place, "certificate"), file)
    try:
        facts = facts_of_pem(text)
    except ValueError as error:
        raise CertificateError((*place, "certificate"), f"{error}, got '{file}'") from error
    if not facts.names:
        raise CertificateError((*place, "certificate"), f"has no name, neither DNS nor address, got '{file}'")
    return facts


def _load_pair(context: ssl.SSLContext, pair: CertificateSection, place: tuple[str, ...]) -> None:
    key = pair.key or pair.certificate
    setting = (*place, "certificate" if pair.key is None else "key")
    text = _read(setting, key)
    if b"ENCRYPTED" in text:
        raise CertificateError(setting, f"is encrypted; the gateway cannot ask for a passphrase, got '{key}'")
    if PRIVATE_KEY not in text:
        remedy = "" if pair.key is not None else "; name the file of its key in 'key'"
        raise CertificateError(setting, f"contains no private key{remedy}, got '{key}'")
    try:
        load_pair(context, pair.certificate, pair.key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(setting, f"does not belong to '{pair.certificate}', got '{key}'") from error
        reason = (error.reason or "unreadable").replace("_", " ").lower()
        message = f"cannot be used as PEM ({reason}), got '{pair.certificate}' with the key '{key}'"
        raise CertificateError((*place, "certificate"), message) from error
    except OSError as error:  # it has been removed since
        raise _unreadable(setting, key, error) from error


def _read(place: tuple[str, ...], file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(place, file, error) from error


def _unreadable(place: tuple[str, ...], file: Path, error: OSError) -> CertificateError:
    return CertificateError(place, f"cannot be read: {(error.strerror or str(error)).lower()}, got '{file}'")


def _trust(context: ssl.SSLContext, place: tuple[str, ...], file: Path) -> None:
    _read(place, file)
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as error:
        raise CertificateError(place, f"contains nothing that can be used as PEM, got '{file}'") from error


def _by_name(
    given: Iterable[tuple[Sequence[str], ssl.SSLContext]],
) -> tuple[dict[str, ssl.SSLContext], dict[str, ssl.SSLContext]]:
    """Return the contexts by exact name, and by wildcard without `*`; the first certificate with a name has it."""
    exact: dict[str, ssl.SSLContext] = {}
    wildcards: dict[str, ssl.SSLContext] = {}
    for names, context in given:
        for name in names:
            if name.startswith(_WILDCARD):
                wildcards.setdefault(name[1:], context)
            else:
                exact.setdefault(name, context)
    return exact, wildcards
