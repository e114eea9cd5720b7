"""The command `api-gateway keys`: creates, lists, rotates and revokes API keys of a running gateway.

It calls the operator endpoints, with the token of the configuration, or the generated one in `state_dir`. A key is
printed alone to standard output, so that a script can use it; everything else about it goes to standard error.
"""

import argparse
import secrets
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from api_gateway.printable_text import table
from api_gateway.process.operator_client import add_access_options, client_of, run_action, segment, show
from api_gateway.system.command_line import CommandParser


def run_keys(arguments: Sequence[str]) -> int:
    """Run `api-gateway keys` with these arguments; return the exit code."""
    options = _parser().parse_args(arguments)
    return run_action(lambda: options.action(options))


def _parser() -> CommandParser:
    parser = CommandParser(prog="api-gateway keys", description="Manage the API keys of clients of a running gateway.")
    create = parser.add_command("create", "create a key and print it")
    create.add_argument("client", help="client id")
    create.add_argument("--label", default="", help="name of the key, such as its user or purpose")
    create.add_argument("--expires-in", type=float, metavar="SECONDS", help="seconds of validity (default: no end)")
    create.add_argument("--route", action="append", metavar="NAME", help="valid for this route only; may be repeated")
    create.add_argument(
        "--allow-bare-id", action="store_true", help="still accept the client's id without a credential"
    )
    create.set_defaults(action=_create)
    listing = parser.add_command("list", "list the keys of a client")
    listing.add_argument("client", help="client id")
    listing.set_defaults(action=_list)
    rotate = parser.add_command("rotate", "create a key in place of another one, and print it")
    rotate.add_argument("client", help="client id")
    rotate.add_argument("key_id", metavar="key", help="id of the key, as listed")  # `--key` is the operator's
    rotate.add_argument(
        "--overlap",
        type=float,
        default=86_400,
        metavar="SECONDS",
        help="seconds for which the old key stays valid (default: a day)",
    )
    rotate.set_defaults(action=_rotate)
    revoke = parser.add_command("revoke", "revoke a key")
    revoke.add_argument("client", help="client id")
    revoke.add_argument("key_id", metavar="key", help="id of the key, as listed")  # `--key` is the operator's
    revoke.set_defaults(action=_revoke)
    generate = parser.add_command("generate", "print a key for the configuration file, and its digest")
    generate.set_defaults(action=_generate)
    for command in (create, listing, rotate, revoke):
        add_access_options(command)
    return parser


def _create(options: argparse.Namespace) -> None:
    body: dict[str, Any] = {"label": options.label}
    if options.expires_in is not None:
        body["expires_in_seconds"] = options.expires_in
    if options.route:
        body["routes"] = options.route
    if options.allow_bare_id:
        body["verified_only"] = False
    _show_created(client_of(options).call("POST", _path(options.client), body))


def _list(options: argparse.Namespace) -> None:
    found = client_of(options).call("GET", _path(options.client))
    rows = [
        (
            key["id"],
            key["label"] or "-",
            "configuration" if key["configured"] else key["created_at"],
            "expired" if key["expired"] else key["expires_at"] or "never",
            key["replaced_by"] or "-",
            key["last_used_at"] or "-",
            ", ".join(_routes(key)),
        )
        for key in found["keys"]
    ]
    for line in table(("ID", "LABEL", "CREATED", "EXPIRES", "REPLACED BY", "LAST USED", "ROUTES"), rows):
        show(line)


def _routes(key: Mapping[str, Any]) -> list[str]:
    if key["routes"] is None:
        return ["all"]
    return [f"{name} (no such route)" if name in key["unknown_routes"] else name for name in key["routes"]]


def _rotate(options: argparse.Namespace) -> None:
    path = f"{_path(options.client)}/{segment(options.key_id, 'key id')}/rotate"
    made = client_of(options).call("POST", path, {"overlap_seconds": options.overlap})
    _show_created(made)
    print(f"Key {made['previous_id']} is valid until {made['previous_expires_at']}.", file=sys.stderr)


def _revoke(options: argparse.Namespace) -> None:
    gone = client_of(options).call("DELETE", f"{_path(options.client)}/{segment(options.key_id, 'key id')}")
    print(f"Key {gone['id']} is revoked; valid keys left: {gone['keys_left']}.", file=sys.stderr)


def _generate(_options: argparse.Namespace) -> None:
    api_keys = import_module("api_gateway.clients.api_keys")  # which imports pydantic
    key = api_keys.new_key(secrets.token_bytes(api_keys.RANDOM_BYTES))
    print(key)
    print(f"In the configuration: digest: sha256:{api_keys.digest_of(key.encode())}", file=sys.stderr)


def _show_created(made: Mapping[str, Any]) -> None:
    print(made["key"])
    proof = "needs a credential from now on" if made["verified_only"] else "can still be claimed by anyone"
    expiry = f"expires {made['expires_at']}" if made["expires_at"] else "does not expire"
    print(f"Key {made['id']}, which {expiry}. The id '{made['client_id']}' {proof}.", file=sys.stderr)


def _path(client_id: str) -> str:
    return f"/clients/{segment(client_id, 'client id')}/keys"
