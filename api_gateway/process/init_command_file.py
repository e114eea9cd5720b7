"""The command `api-gateway init`: writes a first configuration file, from upstreams or an OpenAPI 3 document."""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from api_gateway.config import load_config
from api_gateway.process.operator_client import CommandFailed
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.openapi_routes import DescribedRoute, DocumentError, read_openapi
from api_gateway.settings.starter_file import starter_text


def write_first_file(options: argparse.Namespace) -> None:
    """Write the file. Raises CommandFailed."""
    if options.file.suffix.lower() == ".toml":
        raise CommandFailed(f"{options.file}: a first file is written in YAML; name a file that ends in .yaml")
    upstreams = dict(map(_upstream, options.upstream))
    routes: list[DescribedRoute] = []
    default = next(iter(upstreams), "")
    if options.from_openapi is not None:
        try:
            described = read_openapi(options.from_openapi)
        except DocumentError as error:
            raise CommandFailed(str(error)) from None
        routes = described.routes
        if not default:
            if described.url is None:
                raise CommandFailed(
                    f"{options.from_openapi}: names no server with a whole URL; add --upstream"
                    f" {described.name or 'upstream'}=http://host:port"
                )
            default = described.name or "upstream"
            upstreams[default] = described.url
    text = starter_text(upstreams, routes, default)
    _check(text, options.file)
    try:
        with options.file.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise CommandFailed(f"{options.file}: exists already, and nothing is overwritten; name another file") from None
    except OSError as error:
        raise CommandFailed(f"{options.file}: cannot be written: {(error.strerror or str(error)).lower()}") from None
    print(f"{options.file}: written. Start the gateway with: api-gateway --config {options.file}", file=sys.stderr)


def _upstream(given: str) -> tuple[str, str]:
    name, separator, url = given.partition("=")
    if not separator or not name:
        raise CommandFailed("--upstream: must be NAME=URL, such as users=http://127.0.0.1:9001")
    return name, url


def _check(text: str, file: Path) -> None:
    """Raise CommandFailed if the gateway would not accept the text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gateway.yaml")
        path.write_text(text, encoding="utf-8")
        try:
            load_config(path)
        except ConfigError as error:
            lines = str(error).replace(str(path), str(file))  # no file is written, so its lines mean nothing
            raise CommandFailed(
                re.sub(rf"^{re.escape(str(file))}:\d+: ", f"{file}: ", lines, flags=re.MULTILINE)
            ) from None
