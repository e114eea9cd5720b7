"""The certificates of the listener for clients as a value: part of a worker's snapshot."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CertificateSnapshot:
    """A certificate in force: its file, its first name, and its expiry in seconds since the epoch."""

    file: str
    name: str
    not_after: float


@dataclass(frozen=True, slots=True)
class TlsSnapshot:
    """The certificates in force, and sentences on what is wrong with them."""

    certificates: tuple[CertificateSnapshot, ...] = ()
    problems: tuple[str, ...] = ()

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TlsSnapshot":
        """Return the snapshot from its state, as `asdict` and JSON represent it."""
        certificates = tuple(CertificateSnapshot(**one) for one in state["certificates"])
        return cls(certificates, tuple(state["problems"]))


WITHOUT_TLS = TlsSnapshot()


def merge_tls(snapshots: Iterable[TlsSnapshot]) -> TlsSnapshot:
    """Return the certificates and problems of several workers; of one file, the certificate that expires first."""
    certificates: dict[str, CertificateSnapshot] = {}
    problems: dict[str, None] = {}
    for snapshot in snapshots:
        for one in snapshot.certificates:
            known = certificates.get(one.file)
            if known is None or one.not_after < known.not_after:
                certificates[one.file] = one
        problems |= dict.fromkeys(snapshot.problems)
    return TlsSnapshot(tuple(certificates.values()), tuple(problems))
