"""The command `api-gateway keys`: creates, lists, rotates and revokes API keys of a running gateway.

It calls the operator endpoints, with the token of the configuration, or the generated one in `state_dir`. A key is
printed alone to standard output, so that a script can use it; everything else about it goes to standard error.
"""

import argparse
import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from api_gateway.admin.operator_token import token_file
from api_gateway.clients.api_keys import RANDOM_BYTES, digest_of, new_key
from api_gateway.config import load_config
from api_gateway.settings.bind_address import UNIX_PREFIX, BindAddress, authority
from api_gateway.settings.diagnostics import ConfigError

TIMEOUT = 10.0  # seconds
FAILED = 1  # exit code: the gateway refused the request, or could not be reached
_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound


class CommandFailed(Exception):
    """The command failed; the message is for standard error."""


def run_keys(arguments: Sequence[str]) -> int:
    """Run `api-gateway keys` with these arguments; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.action(options)
    except (CommandFailed, ConfigError) as error:
        print(error, file=sys.stderr)
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="api-gateway keys", description="API keys of clients of a running gateway.")
    commands = parser.add_subparsers(metavar="command", required=True)
    create = commands.add_parser("create", help="create a key and print it")
    create.add_argument("client", help="client id")
    create.add_argument("--label", default="", help="for whom or what the key is")
    create.add_argument("--expires-in", type=float, metavar="SECONDS", help="(default: never)")
    create.add_argument("--route", action="append", metavar="NAME", help="valid for this route only; may be repeated")
    create.add_argument(
        "--open-id", action="store_true", help="whether the client's id may still be claimed without a credential"
    )
    create.set_defaults(action=_create)
    listing = commands.add_parser("list", help="list the keys of a client")
    listing.add_argument("client", help="client id")
    listing.set_defaults(action=_list)
    rotate = commands.add_parser("rotate", help="create a key in place of another one, and print it")
    rotate.add_argument("client", help="client id")
    rotate.add_argument("key", help="id of the key, as listed")
    rotate.add_argument(
        "--overlap", type=float, default=86_400, metavar="SECONDS", help="validity of the old key (default: a day)"
    )
    rotate.set_defaults(action=_rotate)
    revoke = commands.add_parser("revoke", help="revoke a key")
    revoke.add_argument("client", help="client id")
    revoke.add_argument("key", help="id of the key, as listed")
    revoke.set_defaults(action=_revoke)
    generate = commands.add_parser("generate", help="print a key for the configuration file, and its digest")
    generate.set_defaults(action=_generate)
    for command in (create, listing, rotate, revoke):
        command.add_argument("--url", help="of the operator endpoints (default: as configured)")
        command.add_argument("--config", metavar="FILE", help="YAML file of the gateway (default: $GATEWAY_CONFIG)")
        command.add_argument("--token-file", type=Path, help="file with an operator token (default: as configured)")
    return parser


def _create(options: argparse.Namespace) -> None:
    body: dict[str, Any] = {"label": options.label}
    if options.expires_in is not None:
        body["expires_in_seconds"] = options.expires_in
    if options.route:
        body["routes"] = options.route
    if options.open_id:
        body["verified_only"] = False
    _show_created(_call(options, "POST", _path(options.client), body))


def _list(options: argparse.Namespace) -> None:
    found = _call(options, "GET", _path(options.client))
    rows = [("ID", "LABEL", "CREATED", "EXPIRES", "LAST USED", "ROUTES")]
    rows += [
        (
            key["id"],
            key["label"] or "-",
            "configuration" if key["configured"] else key["created_at"],
            "expired" if key["expired"] else key["expires_at"] or "never",
            key["last_used_at"] or "-",
            ", ".join(key["routes"] or ["all"]),
        )
        for key in found["keys"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _rotate(options: argparse.Namespace) -> None:
    path = f"{_path(options.client)}/{quote(options.key, safe='')}/rotate"
    made = _call(options, "POST", path, {"overlap_seconds": options.overlap})
    _show_created(made)
    print(f"Key {made['previous_id']} is valid until {made['previous_expires_at']}.", file=sys.stderr)


def _revoke(options: argparse.Namespace) -> None:
    gone = _call(options, "DELETE", f"{_path(options.client)}/{quote(options.key, safe='')}")
    print(f"Key {gone['id']} is revoked; {gone['keys_left']} valid keys are left.", file=sys.stderr)


def _generate(_options: argparse.Namespace) -> None:
    key = new_key(secrets.token_bytes(RANDOM_BYTES))
    print(key)
    print(f"In the configuration: digest: sha256:{digest_of(key.encode())}", file=sys.stderr)


def _show_created(made: Mapping[str, Any]) -> None:
    print(made["key"])
    proof = "needs a credential from now on" if made["verified_only"] else "can still be claimed by anyone"
    expiry = f"expires {made['expires_at']}" if made["expires_at"] else "does not expire"
    print(f"Key {made['id']}, which {expiry}. The id '{made['client_id']}' {proof}.", file=sys.stderr)


def _path(client_id: str) -> str:
    return f"/clients/{quote(client_id, safe='')}/keys"


def _call(options: argparse.Namespace, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """Call an operator endpoint and return the body of its response. Raises CommandFailed."""
    url, token = _access(options)
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked in `_access`
        url + path, method=method, headers=headers, data=None if body is None else json.dumps(body).encode()
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirection)  # the token is for this URL
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            raise CommandFailed(f"{url}: {error.code}: {_detail(error.read())}") from None
    except (OSError, ValueError) as error:
        raise CommandFailed(f"{url}: no usable response: {error}") from None


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which would send the token to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse to follow."""


def _detail(body: bytes) -> str:
    try:
        found = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        return "the response is not that of a gateway"
    return str(found)


def _access(options: argparse.Namespace) -> tuple[str, str | None]:
    """Return the URL of the operator endpoints and a token, if there is one. Raises CommandFailed and ConfigError."""
    config = load_config(options.config)
    url = options.url or _configured_url(config.admin.listen, config.server.host, config.server.port)
    if not url.startswith(("http://", "https://")):
        raise CommandFailed(f"--url: must begin with http:// or https://, got '{url}'")
    if options.token_file is not None:
        return url.rstrip("/"), _read(options.token_file)
    if config.admin.token is not None:
        return url.rstrip("/"), config.admin.token.get_secret_value()
    path = token_file(config.state_dir)
    return url.rstrip("/"), _read(path) if os.access(path, os.R_OK) else None


def _configured_url(admin: str | None, host: str, port: int) -> str:
    if admin is not None:
        address = BindAddress.parse(admin, 0)
        host, port = (f"{UNIX_PREFIX}{address.path}" if address.path else address.host), address.port
    if host.startswith(UNIX_PREFIX):
        raise CommandFailed(
            f"--url: is needed, as the operator endpoints are on {host}, which this command cannot use"
        )
    return f"http://{authority('localhost' if host in _EVERYWHERE else host, port)}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
