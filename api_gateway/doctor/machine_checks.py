"""Checks of this machine: files and packages, the state folder, ports, descriptors and time zones. All block."""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import available_timezones

from pydantic import BaseModel

from api_gateway.config import GatewayConfig
from api_gateway.doctor.checks import CheckResult, broken, doubtful, good
from api_gateway.process.start_check import file_errors, startup_errors
from api_gateway.resilience.fair_shares import default_connections
from api_gateway.settings.bind_address import BindAddress
from api_gateway.settings.diagnostics import KeyPath, path_text
from api_gateway.settings.rules import Finding, find_warnings
from api_gateway.system.descriptor_limit import raise_descriptor_limit
from api_gateway.system.peer_process import PROC
from api_gateway.system.socket_table import SocketTable
from api_gateway.system.state_folder import lock_holder, own_folder
from api_gateway.system.x509 import facts_of_pem

_PRIVILEGED = 1024
_CERTIFICATES = ("cert_file", "certificate")  # settings of all sections that name one
SOON = timedelta(days=14)  # a certificate that ends within it is to be renewed


def check_files(config: GatewayConfig, origin: Callable[[KeyPath], str]) -> Iterator[CheckResult]:
    """Check the files and packages that the configuration needs, and what it says without an effect."""
    found = list(file_errors(config))
    for one in found:
        yield broken(_place(one, origin), one.message, "Correct the file or the setting, or install the package.")
    if not found:
        yield good("files and packages", "those that the configuration names can be used")
    for one in find_warnings(config):
        yield doubtful(_place(one, origin), one.message, "Change or remove the setting.")


def _place(finding: Finding, origin: Callable[[KeyPath], str]) -> str:
    return f"{origin(finding.path)}{finding.shown_value or path_text(finding.path)}"


def check_certificates(config: GatewayConfig, now: datetime) -> Iterator[CheckResult]:
    """Check until when the certificates are valid that any section names."""
    for place, path in _certificate_files(config, ()):
        try:
            facts = facts_of_pem(path.read_bytes())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            yield broken(place, f"'{path}' cannot be used: {reason.lower()}", "Name a PEM file with the certificate.")
        else:
            yield validity(place, datetime.fromtimestamp(facts.not_after, UTC), now)


def validity(about: str, end: datetime, now: datetime) -> CheckResult:
    """Return whether a certificate is valid, and for how long."""
    date = f"{end:%Y-%m-%d %H:%M} UTC"
    if end <= now:
        return broken(about, f"the certificate has expired at {date}", "Renew it.")
    if end - now < SOON:
        return doubtful(about, f"the certificate expires at {date}", "Renew it, and check what should have done so.")
    return good(about, f"the certificate is valid until {date}")


def _certificate_files(value: Any, place: KeyPath) -> Iterator[tuple[str, Path]]:
    items: Mapping[str, Any] = {}
    if isinstance(value, BaseModel):
        items = {name: getattr(value, name) for name in type(value).model_fields}
        for name in _CERTIFICATES:
            if isinstance(items.get(name), Path):
                yield path_text((*place, name)), items[name]
    elif isinstance(value, Mapping):
        items = {str(name): inner for name, inner in value.items()}
    elif isinstance(value, list):
        items = {str(index): inner for index, inner in enumerate(value)}
    for name, inner in items.items():
        yield from _certificate_files(inner, (*place, name))


def check_state(config: GatewayConfig) -> Iterator[CheckResult]:
    """Check that the state folder can be written."""
    found = [one for one in startup_errors(config) if one.path == ("state_dir",)]
    for one in found:
        remedy = "Give the user of the gateway write access, or set state_dir to another folder."
        yield broken("state_dir", one.message, remedy)
    if found:
        return
    holder = lock_holder(own_folder(config.state_dir))
    used = f", used by the gateway with process id {holder}" if holder is not None else ""
    yield good("state_dir", f"'{config.state_dir}' can be written{used}")


def check_ports(config: GatewayConfig, proc: Path = PROC) -> Iterator[CheckResult]:
    """Check that the gateway can listen, and who else does if it cannot."""
    server, admin = config.server, config.admin
    places = {"server.port": BindAddress.of(server.host, server.port, server.socket_mode)}
    if admin.listen is not None:
        places["admin.listen"] = BindAddress.parse(admin.listen, admin.socket_mode)
    if server.tls is not None and server.tls.redirect_from is not None:
        places["server.tls.redirect_from"] = BindAddress.parse(server.tls.redirect_from, server.socket_mode)
    for about, address in places.items():
        if address.path:
            yield _socket_result(about, Path(address.path))
        else:
            yield _port_result(about, address, lock_holder(own_folder(config.state_dir)), proc)


def _socket_result(about: str, path: Path) -> CheckResult:
    if not os.access(path.parent, os.W_OK | os.X_OK):
        remedy = "Create the folder, writable for the user of the gateway."
        return broken(about, f"the folder '{path.parent}' cannot be written", remedy)
    return good(about, f"the socket '{path}' can be created")


def _port_result(about: str, address: BindAddress, holder: str | None, proc: Path) -> CheckResult:
    try:
        found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM)
        with closing(socket.socket(found[0][0], socket.SOCK_STREAM)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(found[0][4])
    except (OSError, UnicodeError) as error:
        code = getattr(error, "errno", None)
        if code == errno.EADDRINUSE:
            return _port_in_use(about, address, holder, proc)
        if code == errno.EACCES and address.port < _PRIVILEGED:
            remedy = "Use a port from 1024, or give the process CAP_NET_BIND_SERVICE."
            return broken(about, f"port {address.port} needs a privilege", remedy)
        reason = getattr(error, "strerror", None) or "it is not a host name"
        return broken(about, f"cannot listen on {address}: {reason.lower()}", "Set an address of this machine.")
    return good(about, f"{address} is free" if address.port else "any free port will be used")


def _port_in_use(about: str, address: BindAddress, holder: str | None, proc: Path) -> CheckResult:
    pid, name = _listener(address.port, proc)
    by = "a process of another user" if pid is None else f"process {pid} ({name})"
    if holder is not None and pid is not None and (str(pid) == holder or _parent(pid, proc) == holder):
        return good(about, f"{address} is used by the running gateway, {by}")
    remedy = "End that process, or set another port."
    return broken(about, f"{address} is in use by {by}", remedy)


def _listener(port: int, proc: Path) -> tuple[int | None, str]:
    """Return id and name of the process that listens on a port, as far as this user may know it."""
    with suppress(OSError):
        row = SocketTable.read(proc / "self").listener(port)
        target = None if row is None else f"socket:[{row.inode}]"
        for folder in proc.iterdir() if target is not None else ():
            if folder.name.isdigit():
                with suppress(OSError):
                    if any(os.readlink(one) == target for one in (folder / "fd").iterdir()):  # noqa: PTH115 - no path
                        return int(folder.name), (folder / "comm").read_text().strip()
    return None, ""


def _parent(pid: int, proc: Path) -> str:
    with suppress(OSError):
        return (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1]
    return ""


def check_descriptors(
    config: GatewayConfig, limit: Callable[[], int] = raise_descriptor_limit
) -> Iterator[CheckResult]:
    """Check that the limit of open files permits the connections that are configured."""
    available = limit()
    clients = config.server.max_connections or default_connections(available)
    upstreams = sum(len(one.targets) * one.pool.max_connections for one in config.upstreams.values())
    needed = clients + min(clients, upstreams)
    detail = f"{available} open files for {clients} clients and up to {min(clients, upstreams)} connections to targets"
    if needed > available:
        remedy = f"Raise the limit (ulimit -n, LimitNOFILE=) to {needed + 100}, or lower server.max_connections."
        yield doubtful("open files", detail, remedy)
    else:
        yield good("open files", detail)


def check_time_zones(
    config: GatewayConfig, known: Callable[[], set[str]] = available_timezones
) -> Iterator[CheckResult]:
    """Check that the time zones of quotas are known."""
    named = sorted({limit.time_zone for limit in config.limits if limit.period is not None})
    if not named:
        return
    missing = [name for name in named if name not in known()]
    if missing:
        yield broken("time zones", f"unknown: {', '.join(missing)}", "Install the package tzdata.")
    else:
        yield good("time zones", f"known: {', '.join(named)}")
