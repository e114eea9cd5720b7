"""The connection of a command to a running gateway: calls of operator endpoints, their errors, and the exit codes.

Only light modules are imported, so that `--help` is fast; the configuration is read when a gateway is called.
"""

import argparse
import http.client
import json
import math
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from api_gateway._version import __version__
from api_gateway.printable_text import printable
from api_gateway.system.x509 import load_pair

JsonObject = dict[str, Any]

TIMEOUT = 10.0  # seconds
# Exit codes
FAILED = 1  # the gateway refused the request, or the configuration has an error
NOT_REACHED = 6  # no gateway responds
NOT_AUTHORIZED = 7  # the gateway does not accept the token
INTERRUPTED = 130  # by SIGINT, as shells count
_LONGEST_INTERVAL = 86_400  # seconds
_MOST_DIGITS = 9
_REFUSALS = (401, 403)  # statuses


class CommandFailed(Exception):
    """The command failed; the message is for standard error. `status` is that of the response, if there was one."""

    def __init__(self, message: str, code: int = FAILED, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class OperatorClient:
    """Calls the operator endpoints at one URL."""

    def __init__(
        self,
        url: str,
        token: str | None,
        token_from: str = "--token-file",  # noqa: S107 - no secret
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`token_from` names the place of the token, for messages.

        Without `tls`, the authorities of the system are trusted.
        """
        self.url = url
        self._token = token
        self._token_from = token_from
        # The token is for this URL: no proxy and no other server gets it.
        handlers: list[Any] = [urllib.request.ProxyHandler({}), _NoRedirection]
        if tls is not None:
            handlers.append(urllib.request.HTTPSHandler(context=tls))
        self._opener = urllib.request.build_opener(*handlers)

    def __repr__(self) -> str:
        return f"<OperatorClient of {self.url}>"

    def get(self, path: str, **query: Any) -> Any:
        """Return the body of a response to GET; parameters of the query that are None are left out.

        A list repeats its parameter.
        """
        given = {name: value for name, value in query.items() if value is not None}
        return self.call("GET", f"{path}?{urlencode(given, doseq=True)}" if given else path)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Call an operator endpoint and return the body of its response. Raises CommandFailed."""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            self.url + path, method=method, headers=headers, data=None if body is None else json.dumps(body).encode()
        )
        try:
            return self._document(request)
        except (OSError, ValueError, http.client.HTTPException) as error:  # also of a server that speaks no HTTP
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            cause = " ".join(str(reason).split())  # which may quote what a server of another protocol has sent
            raise CommandFailed(f"{self.url}: no usable response: {cause}. {_remedy(reason)}", NOT_REACHED) from None

    def _document(self, request: urllib.request.Request) -> JsonObject:
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                found = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, _detail(error.read())) from None
        if not isinstance(found, dict):
            raise ValueError("it is not that of a gateway")  # noqa: TRY004 - as if it were no JSON
        return found

    def _refused(self, status: int, detail: str) -> CommandFailed:
        message = f"{self.url}: {status}: {detail}"
        if status not in _REFUSALS:
            return CommandFailed(message, FAILED, status)
        remedy = f"The token is from {self._token_from}; --token-file names a file with another one."
        if not self._token:
            remedy = f"No token was sent ({self._token_from}); --token-file names a file with one."
        return CommandFailed(f"{message} {remedy}", NOT_AUTHORIZED, status)


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which would send the token to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse to follow."""


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which gateway is meant, and with which token."""
    parser.add_argument("--url", help="URL of the operator endpoints (default: as configured)")
    parser.add_argument(
        "--config", metavar="FILE", help="configuration file of the gateway (default: $GATEWAY_CONFIG)"
    )
    parser.add_argument("--token-file", type=Path, help="file with an operator token (default: as configured)")
    parser.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="PEM certificates of the authorities to trust (default: the configured certificate; with --url, the"
        " system's authorities)",
    )
    parser.add_argument(
        "--cert", type=Path, metavar="FILE", help="PEM certificate of the operator, if TLS requires one"
    )
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="PEM file with the key of --cert (default: the same file)"
    )


def client_of(options: argparse.Namespace) -> OperatorClient:
    """Return the client for the options of `add_access_options`. Raises CommandFailed, also if one is not text."""
    for name, value in vars(options).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not _is_encodable(text):
                raise CommandFailed(f"{name.replace('_', '-')}: must be text in UTF-8, got {text!r}")
    find_access = import_module("api_gateway.process.operator_access").find_access
    access = find_access(options.config, options.url, options.token_file)
    tls = None
    if access.url.startswith("https://"):
        tls = _context(access.certificate, options.ca, options.cert, options.key)
    elif options.ca or options.cert or options.key:
        raise CommandFailed(f"{access.url}: --ca, --cert and --key are for https; begin --url with https://")
    return OperatorClient(access.url, access.token, access.token_from, tls)


def seconds_between(text: str) -> float:
    """Return the time between two questions, for an option."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _LONGEST_INTERVAL:  # nor is it not a number
        raise argparse.ArgumentTypeError(f"must be from 0 to {_LONGEST_INTERVAL} seconds, got {text!r}")
    return seconds


def whole_number(text: str) -> int:
    """Return a number that is not negative, for an option."""
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise argparse.ArgumentTypeError(f"must be a whole number of at most {_MOST_DIGITS} digits, got {text!r}")
    return int(text)


def segment(text: str, name: str) -> str:
    """Return a value as a segment of a path; `name` says what it is. Raises CommandFailed if it is empty."""
    if not text:
        raise CommandFailed(f"{name}: must not be empty, got ''")
    return quote(text, safe="")


def run_action(action: Callable[[], None]) -> int:
    """Run a command and return its exit code; its error is a line on standard error."""
    try:
        _run(action)
    except CommandFailed as error:
        print("\n".join(map(printable, str(error).splitlines())), file=sys.stderr)
        return error.code
    except BrokenPipeError:  # of standard output; what it holds must not be written again at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _run(action: Callable[[], None]) -> None:
    try:
        action()
    except KeyError as error:  # of another server, or of another version of the gateway
        raise CommandFailed(
            f"The response has no {error}, so it is not that of a gateway of this version ({__version__}); name the"
            " address of its operator endpoints with --url."
        ) from None


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes on the command line that are not UTF-8
        return False
    return True


def show(line: str = "") -> None:
    """Print a line in which nothing from a client or an upstream can affect the terminal."""
    print(printable(line), flush=True)


def _context(pinned: Path | None, ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    """Return the TLS context: it trusts the authorities of `ca`, else `pinned`, else those of the system.

    It presents `certificate`, if there is one.

    `pinned` is the certificate of the configuration, which is trusted for any name: the gateway is on this machine.
    Raises CommandFailed.
    """
    if key is not None and certificate is None:
        raise CommandFailed(f"--key: needs --cert, the certificate that it belongs to, got {key} alone")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusted = ca or pinned
    try:
        if trusted is None:
            context.load_default_certs()
        else:
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.check_hostname = ca is not None
            context.load_verify_locations(trusted)
    except (OSError, ssl.SSLError) as error:
        raise CommandFailed(f"{trusted}: cannot be used: {error.strerror or error}") from None
    if certificate is not None:
        try:
            load_pair(context, certificate, key)
        except (OSError, ssl.SSLError) as error:
            files = f"{certificate} with {key}" if key else f"{certificate}"
            raise CommandFailed(f"{files}: cannot be used: {error.strerror or error}") from None
    return context


def _remedy(reason: object) -> str:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return "Name a file with the authority of its certificate with --ca, and a host in the certificate with --url."
    if isinstance(reason, ssl.SSLError) and "CERTIFICATE_REQUIRED" in str(reason):
        return "Its TLS requires a certificate of clients: name one with --cert."
    return (
        "Start the gateway, or name the address of its operator endpoints with --url, or its configuration with"
        " --config."
    )


def _detail(body: bytes) -> str:
    try:
        found = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        return "the response is not that of a gateway"
    return str(found)


def print_json(document: Any, *, is_line: bool = False) -> None:
    """Print JSON in ASCII, so that no text in it can affect a terminal."""
    print(json.dumps(document, indent=None if is_line else 2), flush=True)


def show_all(lines: Sequence[str], indent: str = "") -> None:
    """Print lines like `show`, each after an indentation."""
    for line in lines:
        show(f"{indent}{line}")
