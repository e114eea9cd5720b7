"""Checks whether the gateway could start on this machine: PEM files, packages, addresses, and the state folder.

All functions block. A condition that may be gone at the start, such as a port in use, is a warning and not an error.
"""

import errno
import importlib.util
import os
import socket
import ssl
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path

from api_gateway.assembly.extensions import extension_problems
from api_gateway.assembly.issuers import keys_of
from api_gateway.assembly.tracing import encoder_module
from api_gateway.config import GatewayConfig
from api_gateway.downstream.certificates import CertificateError, date_error, load_certificates, readable_keys
from api_gateway.errors import StartupError
from api_gateway.process.server_certificates import expiry_problem
from api_gateway.settings.bind_address import BindAddress
from api_gateway.settings.diagnostics import KeyPath
from api_gateway.settings.rules import Finding
from api_gateway.settings.store_url import StoreUrl
from api_gateway.storage.embedded_server import NoServer, find_server
from api_gateway.system.state_folder import StateError, check_folder_version, lock_holder, own_folder
from api_gateway.system.x509 import PRIVATE_KEY, load_pair, verifying_context

_PRIVILEGED = 1024
_STORE_FILES = {"ca_file": "ssl_ca_certs", "cert_file": "ssl_certfile", "key_file": "ssl_keyfile"}


def file_errors(config: GatewayConfig) -> Iterator[Finding]:
    """Yield the required files and packages that cannot be used."""
    for name, upstream in config.upstreams.items():
        key_path: KeyPath = ("upstreams", name)
        if upstream.http2 and importlib.util.find_spec("h2") is None:
            yield Finding((*key_path, "http2"), "needs the package h2: pip install 'httpx[http2]', got True")
        if any(target.url.startswith("https:") for target in upstream.targets):
            tls = upstream.tls
            files = {"ca_file": tls.ca_file, "cert_file": tls.cert_file, "key_file": tls.key_file}
            given = {key: path for key, path in files.items() if path is not None}
            for key, message in _pem_problems(given):
                yield Finding((*key_path, "tls", key), message)
    yield from _certificate_errors(config)
    yield from _issuer_errors(config)
    yield from _tracing_errors(config)
    for number, problem in extension_problems(config):
        yield Finding(("extensions", str(number), "use"), problem)
    store = config.store
    if store.is_shared:
        options = StoreUrl.parse(store.url.get_secret_value()).options
        given = {key: Path(options[option]) for key, option in _STORE_FILES.items() if option in options}
        for key, message in _pem_problems(given):
            yield Finding(("store", "url"), f"{key}: {message}")
    elif config.server.workers > 1:
        try:
            find_server()
        except NoServer as error:
            yield Finding(("server", "workers"), f"{error}, got {config.server.workers}")


def _issuer_errors(config: GatewayConfig) -> Iterator[Finding]:
    if "jwt" not in config.identity.sources:
        return
    for name, section in config.identity.jwt.issuers.items():
        key_path: KeyPath = ("identity", "jwt", "issuers", name)
        try:
            keys_of(name, section, clock=time.monotonic)
        except StartupError as error:
            place, _, cause = str(error).partition(": ")
            if place == "identity.sources":  # a package is missing, for all of them
                yield Finding(("identity", "sources"), cause)
                return
            yield Finding((*key_path, place.rpartition(".")[2]), cause)


def _tracing_errors(config: GatewayConfig) -> Iterator[Finding]:
    if config.tracing.enabled:
        try:
            encoder_module()
        except StartupError as error:
            yield Finding(("tracing", "enabled"), f"{str(error).partition(': ')[2]}, got True")


def _certificate_errors(config: GatewayConfig) -> Iterator[Finding]:
    """Yield the certificates that cannot be used, whatever their dates."""
    section = config.server.tls
    if section is None:
        return
    for number, pair in enumerate(section.certificates):
        try:
            load_certificates(section.model_copy(update={"certificates": [pair]}))
        except CertificateError as error:
            place = error.place
            if place[0] == "certificates":
                place = (place[0], str(number), *place[2:])
            elif number:
                continue  # not of a certificate, and reported with the first
            yield Finding(("server", "tls", *place), error.message)


def startup_errors(config: GatewayConfig) -> Iterator[Finding]:
    """Yield everything that would make the start fail, and certificates that clients would refuse."""
    found = list(file_errors(config))
    yield from found
    section = config.server.tls
    if section is not None and not found:
        error = date_error(load_certificates(section), None, time.time())
        if error is not None:
            yield Finding(("server", "tls", *error.place), error.message)
    yield from (finding for finding, is_passing in _address_findings(config) if not is_passing)
    if not config.store.keeps_clients:
        yield from _state_errors(config.state_dir)


def startup_warnings(config: GatewayConfig) -> Iterator[Finding]:
    """Yield conditions that would make a start fail now, but may be gone later, or that disable a feature."""
    yield from (finding for finding, is_passing in _address_findings(config) if is_passing)
    yield from certificate_warnings(config)
    if config.store.keeps_clients:
        yield from _state_errors(config.state_dir)
    holder = lock_holder(own_folder(config.state_dir))
    if holder is not None:
        message = f"another gateway (process {holder}) uses {config.state_dir}; a second one cannot start meanwhile"
        yield Finding(("state_dir",), message)


def key_warnings(config: GatewayConfig) -> Iterator[Finding]:
    """Yield the keys of certificates that others than their owner have access to."""
    section = config.server.tls
    for place, message in () if section is None else readable_keys(section):
        yield Finding(("server", "tls", *place), message)


def certificate_warnings(config: GatewayConfig) -> Iterator[Finding]:
    """Yield keys that others may read, and certificates that expire soon."""
    section = config.server.tls
    if section is None:
        return
    yield from key_warnings(config)
    with suppress(CertificateError):  # which is an error
        now = time.time()
        for number, one in enumerate(load_certificates(section).loaded):
            problem = expiry_problem(one, now, section.expiry_warning_days)
            if problem is not None and now < one.facts.not_after:
                yield Finding(("server", "tls", "certificates", str(number), "certificate"), problem)


# PEM files


def _pem_problems(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield the setting and the problem of each file that cannot be used."""
    unreadable = False
    for key, path in files.items():
        try:
            text = path.read_bytes()
        except OSError as error:
            unreadable = True
            yield key, f"cannot be read: {(error.strerror or str(error)).lower()}, got '{path}'"
        else:
            if key != "ca_file" and b"ENCRYPTED" in text:
                unreadable = True
                yield key, f"is encrypted; the gateway cannot ask for a passphrase, got '{path}'"
            elif key == ("key_file" if "key_file" in files else "cert_file") and PRIVATE_KEY not in text:
                unreadable = True
                remedy = "" if key == "key_file" else "; name the file of its key in 'key_file'"
                yield key, f"contains no private key{remedy}, got '{path}'"
    if "key_file" in files and "cert_file" not in files:
        yield "key_file", f"needs the cert_file that it belongs to, got '{files['key_file']}' alone"
    if not unreadable:
        yield from _pem_contents(files)


def _pem_contents(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    if "ca_file" in files:
        try:
            verifying_context(files["ca_file"])
        except ssl.SSLError as error:
            yield "ca_file", f"contains no PEM certificate ({_reason(error)}), got '{files['ca_file']}'"
    if "cert_file" not in files:
        return
    certificate, key = files["cert_file"], files.get("key_file")
    try:
        load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            yield (
                ("key_file" if key else "cert_file"),
                f"does not belong to '{certificate}', got '{key or certificate}'",
            )
            return
        where = f"'{certificate}'" if key is None else f"'{certificate}' with the key '{key}'"
        yield "cert_file", f"cannot be used as PEM ({_reason(error)}), got {where}"


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "unreadable").replace("_", " ").lower()


# Addresses


def _address_findings(config: GatewayConfig) -> Iterator[tuple[Finding, bool]]:
    """Yield the obstacles to listening, and whether each may be temporary."""
    server, admin = config.server, config.admin
    address = BindAddress.of(server.host, server.port, server.socket_mode)
    yield from _bind_findings(("server", "host"), ("server", "port"), address)
    if server.tls is not None and server.tls.redirect_from is not None:
        place: KeyPath = ("server", "tls", "redirect_from")
        yield from _bind_findings(place, place, BindAddress.parse(server.tls.redirect_from, server.socket_mode))
    if admin.listen is not None:
        key_path: KeyPath = ("admin", "listen")
        yield from _bind_findings(key_path, key_path, BindAddress.parse(admin.listen, admin.socket_mode))


def _bind_findings(host_path: KeyPath, port_path: KeyPath, address: BindAddress) -> Iterator[tuple[Finding, bool]]:
    if address.path:
        for message in _socket_path_problems(Path(address.path)):
            yield Finding(host_path, f"{message}, got 'unix:{address.path}'"), False
        return
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a host name"
        yield Finding(host_path, f"the host cannot be resolved: {reason.lower()}, got {address.host!r}"), False
        return
    failures = [_bind_failure(family, key_path) for family, _, _, _, key_path in dict.fromkeys(found)]
    if not failures or None in failures:
        return
    code = failures[0]
    if code == errno.EADDRINUSE:
        message = f"is in use; the start fails until the other program has ended, got {address.port}"
        yield Finding(port_path, message), True
    elif code == errno.EACCES and address.port < _PRIVILEGED:
        message = f"a port below {_PRIVILEGED} needs a privilege (CAP_NET_BIND_SERVICE), got {address.port}"
        yield Finding(port_path, message), False
    else:
        yield Finding(host_path, f"cannot listen: {os.strerror(code or 0).lower()}, got {address.host!r}"), False


def _bind_failure(family: int, address: object) -> int | None:
    """Return the errno of an attempt to bind, None if it succeeds."""
    try:
        with closing(socket.socket(family, socket.SOCK_STREAM)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)  # type: ignore[arg-type]  # as returned by getaddrinfo
    except OSError as error:
        return error.errno
    return None


def _socket_path_problems(path: Path) -> Iterator[str]:
    if not path.parent.is_dir():
        yield f"the folder '{path.parent}' does not exist"
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        yield f"the folder '{path.parent}' is not writable"
    elif not _takes_files(path.parent):
        yield f"no file can be created in the folder '{path.parent}'"
    elif path.exists() and not path.is_socket():
        yield "the path exists and is not a socket"


def _takes_files(folder: Path) -> bool:
    """Return whether a file can be created in a folder, which its permissions alone do not say: see /proc."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# State


def _state_errors(state_dir: Path) -> Iterator[Finding]:
    key_path: KeyPath = ("state_dir",)
    existing = own = own_folder(state_dir)
    while not existing.exists() and not existing.is_symlink() and existing != existing.parent:
        existing = existing.parent
    if existing == own:
        found = own.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            yield Finding(key_path, f"'{own}' is not a folder of this user, got '{state_dir}'")
            return
    if not existing.is_dir():
        yield Finding(key_path, f"'{existing}' is not a folder, got '{state_dir}'")
    elif not os.access(existing, os.W_OK | os.X_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        yield Finding(key_path, f"'{existing}' is not writable for this user, got '{state_dir}'")
    elif not _takes_files(existing):
        yield Finding(key_path, f"no file can be created in '{existing}', got '{state_dir}'")
    elif existing == own:
        try:
            check_folder_version(own)
        except StateError as error:
            yield Finding(key_path, str(error).removeprefix("state_dir: "))
