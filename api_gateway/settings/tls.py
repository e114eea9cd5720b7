"""The section `server.tls`: certificates of the listener for clients, and what is required of clients."""

from typing import Literal

from pydantic import Field, model_validator

from api_gateway.settings.setting_types import CIPHERS, HSTS, FilePath, Listen, Seconds, Section


class CertificateSection(Section):
    """A certificate and its key, PEM files. The names that it is for are those in it."""

    certificate: FilePath = Field(description="The certificate, followed by those of the authorities up to the root.")
    key: FilePath | None = Field(
        default=None, description="Not encrypted. None: it is in the file of the certificate."
    )


class ClientCertificatesSection(Section):
    """Certificates of clients: their authorities, and whether every connection needs a certificate."""

    ca: FilePath = Field(description="PEM certificates of the authorities that issue certificates of clients.")
    mode: Literal["optional", "required"] = Field(
        default="optional", description="required: a connection without a certificate is refused in its handshake."
    )
    crl: FilePath | None = Field(
        default=None, description="PEM revocation lists of these authorities, each a current one."
    )


class ServerTlsSection(Section):
    """TLS on the listener for clients."""

    certificates: list[CertificateSection] = Field(
        min_length=1, description="Chosen by the name that the client asks for; the first one is for all others."
    )
    reject_unknown_names: bool = Field(
        default=False, description="Refuse connections for names that no certificate has, and without a name."
    )
    minimum_version: Literal["1.2", "1.3"] = Field(default="1.2", description="The oldest version of TLS.")
    ciphers: str | None = Field(
        default=None, pattern=CIPHERS, description="Cipher suites of TLS 1.2 as for OpenSSL. None: those of Python."
    )
    handshake_timeout: Seconds = Field(default=10, description="The longest time of a handshake.")
    max_handshakes: int = Field(
        default=1000, ge=2, le=1_000_000, description="In progress, per worker, in fair shares of the addresses."
    )
    client_certificates: ClientCertificatesSection | None = None
    redirect_from: Listen | None = Field(
        default=None, description="host:port of plain HTTP, whose requests are redirected to https."
    )
    redirect_port: int | None = Field(
        default=None, ge=1, le=65_535, description="The port in Location. None: that of the server; 443 is left out."
    )
    acme_challenges: FilePath | None = Field(
        default=None, description="A folder that redirect_from serves as /.well-known/acme-challenge/."
    )
    hsts: str | None = Field(
        default=None,
        pattern=HSTS,
        description="Strict-Transport-Security of all responses by TLS, such as max-age=86400.",
    )
    expiry_warning_days: int = Field(
        default=14, ge=0, le=3650, description="Days before its expiry from which a certificate is reported."
    )

    @model_validator(mode="after")
    def _agree(self) -> "ServerTlsSection":
        if self.acme_challenges is not None and self.redirect_from is None:
            raise ValueError("acme_challenges needs redirect_from, whose listener serves the folder")
        return self
