"""A certificate authority for tests, and a raw client over TLS."""

import os
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from tests.kit import PATIENCE, RawClient, Wire

HOST = "a.test"
# What an authority's key is for.
_USES = x509.KeyUsage(
    key_cert_sign=True,
    crl_sign=True,
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and its key."""

    certificate: Path
    key: Path

    @property
    def setting(self) -> dict[str, str]:
        """The item of `server.tls.certificates`."""
        return {"certificate": str(self.certificate), "key": str(self.key)}

    def replace(self, other: "Pair") -> None:
        """Become a copy of another pair, as a program that renews certificates does it: each file by renaming."""
        for ours, theirs in ((self.key, other.key), (self.certificate, other.certificate)):
            fresh = ours.with_suffix(".new")
            fresh.write_bytes(theirs.read_bytes())
            fresh.chmod(0o600)
            os.replace(fresh, ours)  # noqa: PTH105


class Authority:
    """An authority whose certificates and keys are files of one folder."""

    def __init__(self, folder: Path, name: str = "ca", *, is_plain: bool = False) -> None:
        """`is_plain`: its certificates lack the extensions that Python's default contexts demand since 3.13."""
        self.folder = folder
        self._is_plain = is_plain
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._builder(self._name, self._key.public_key(), 90).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        if not is_plain:
            certificate = certificate.add_extension(_USES, critical=True)
        self.certificate = certificate.sign(self._key, hashes.SHA256())
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        file: str,
        *names: str | x509.GeneralName,
        subject: str | None = None,
        days: float = 90,
        kind: str = "ec",
    ) -> Pair:
        """Issue a certificate for these names (DNS unless they are of another kind), valid for so many days."""
        key: Any = (
            ec.generate_private_key(ec.SECP256R1())
            if kind == "ec"
            else rsa.generate_private_key(public_exponent=65_537, key_size=2048)
        )
        alternative = [x509.DNSName(name) if isinstance(name, str) else name for name in names]
        builder = self._builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject or file)]), key.public_key(), days
        )
        if alternative:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        pair = Pair(self.folder / f"{file}.pem", self.folder / f"{file}.key")
        signed = builder.sign(self._key, hashes.SHA256())
        pair.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        pair.key.chmod(0o600)
        return pair

    def revoke(self, *pairs: Pair) -> Path:
        """Write the revocation list with these certificates, and return its file."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(now - timedelta(days=1))
            .next_update(now + timedelta(days=1))
        )
        for pair in pairs:
            revoked = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
            entry = x509.RevokedCertificateBuilder().serial_number(revoked.serial_number).revocation_date(now)
            builder = builder.add_revoked_certificate(entry.build())
        file = self.folder / "crl.pem"
        file.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return file

    def context(self, client: Pair | None = None) -> ssl.SSLContext:
        """Return a client's context that trusts this authority, and presents a certificate."""
        context = ssl.create_default_context(cafile=str(self.file))
        context.set_alpn_protocols(["h2", "http/1.1"])
        if client is not None:
            context.load_cert_chain(client.certificate, client.key)
        return context

    def _builder(self, subject: x509.Name, public: Any, days: float) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=100))
            .not_valid_after(now + timedelta(days=days))
        )
        if self._is_plain:
            return builder
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        subject_key = x509.SubjectKeyIdentifier.from_public_key(public)
        return builder.add_extension(subject_key, critical=False).add_extension(own, critical=False)


class TlsClient(RawClient):
    """A raw client over TLS."""

    def __init__(
        self,
        port: int,
        context: ssl.SSLContext,
        name: str | None = HOST,
        session: ssl.SSLSession | None = None,
        first: bytes = b"",
    ) -> None:
        """`first` is sent before the handshake."""
        plain = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        if first:
            plain.sendall(first)
        try:
            Wire.__init__(self, context.wrap_socket(plain, server_hostname=name, session=session))
        except BaseException:
            plain.close()
            raise

    @property
    def tls(self) -> ssl.SSLSocket:
        """The socket."""
        return cast("ssl.SSLSocket", self.sock)

    @property
    def served_by(self) -> str:
        """The common name of the certificate of the server."""
        found: Any = self.tls.getpeercert()
        return str(dict(pair[0] for pair in found["subject"])["commonName"])
