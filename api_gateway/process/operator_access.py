"""Where the operator endpoints of a configured gateway are, and the token for them."""

import os
from pathlib import Path
from typing import NamedTuple

from api_gateway.admin.operator_token import token_file
from api_gateway.config import CONFIG_VARIABLE, GatewayConfig, load_config
from api_gateway.process.operator_client import CommandFailed
from api_gateway.settings.bind_address import UNIX_PREFIX, BindAddress, authority
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.secret import shown_path

_SETTING = "admin.token of the configuration"
_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound


class OperatorAccess(NamedTuple):
    """The URL of the operator endpoints without a slash at its end, the token, and where the token is from.

    `certificate` is the only one that is trusted at a configured address, whose name it need not have.
    """

    url: str
    token: str | None
    token_from: str
    certificate: Path | None = None


def find_access(config: str | None, url: str | None, token: Path | None) -> OperatorAccess:
    """Return the access by the configuration, with another URL or the token of another file if they are given.

    Raises CommandFailed.
    """
    try:
        settings = load_config(config)
    except ConfigError as error:
        raise CommandFailed(str(error)) from None
    found, certificate = url or "", None
    if not found:
        section, admin = settings.server.tls, settings.admin
        has_tls = section is not None and (admin.listen is None or admin.tls)
        found = _configured_url(admin.listen, settings.server.host, settings.server.port, is_tls=has_tls)
        if section is not None and has_tls:
            certificate = section.certificates[0].certificate
    if "@" in found:
        raise CommandFailed("--url: must have no user name or password; --token-file names a file with a token")
    if not found.startswith(("http://", "https://")):
        raise CommandFailed(f"--url: must begin with http:// or https://, got '{found}'")
    found = found.rstrip("/")
    return OperatorAccess(found, *_token_of(settings, config, token), certificate)


def _token_of(settings: GatewayConfig, config: str | None, token: Path | None) -> tuple[str | None, str]:
    """Return the token, and where it is from."""
    if token is not None:
        return _read(token), str(token)
    if settings.admin.token is not None:
        return _checked(settings.admin.token.get_secret_value(), _SETTING), _SETTING
    path = token_file(settings.state_dir)
    if os.access(path, os.R_OK):
        return _read(path), str(path)
    where = f"--config, or ${CONFIG_VARIABLE}" if config is None else config
    return None, f"none: {where} names no token, and {path} cannot be read"


def _configured_url(admin: str | None, host: str, port: int, *, is_tls: bool) -> str:
    if admin is not None:
        address = BindAddress.parse(admin, 0)
        host, port = (f"{UNIX_PREFIX}{address.path}" if address.path else address.host), address.port
    if host.startswith(UNIX_PREFIX):
        raise CommandFailed(
            f"--url: is needed, as the operator endpoints are on {host}, which this command cannot use"
        )
    scheme = "https" if is_tls else "http"
    return f"{scheme}://{authority('localhost' if host in _EVERYWHERE else host, port)}"


def _read(path: Path) -> str:
    """Return the token of a file. Messages quote none of it. Raises CommandFailed."""
    try:
        return _checked(path.read_text(errors="replace").strip(), str(path))
    except OSError as error:
        cause = (error.strerror or str(error)).lower()
        raise CommandFailed(f"the file of the token cannot be read: {cause}, got {shown_path(path)}") from None


def _checked(token: str, place: str) -> str:
    """Return a token that a header field can have: the error of a library would quote any other one."""
    if not token.isascii() or not token.isprintable():
        raise CommandFailed(f"{place}: must be one token, on one line, in visible ASCII characters")
    return token
