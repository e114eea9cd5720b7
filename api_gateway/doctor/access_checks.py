"""Checks of who can operate the gateway: the strength of tokens, and where the operator endpoints can be reached."""

from collections.abc import Iterator
from ipaddress import ip_address

from pydantic import SecretStr

from api_gateway.config import GatewayConfig
from api_gateway.doctor.checks import CheckResult, doubtful, good
from api_gateway.settings.bind_address import BindAddress

_SHORTEST = 24  # characters of a token that cannot be guessed
_FEWEST = 10  # different ones among them


def check_tokens(config: GatewayConfig) -> Iterator[CheckResult]:
    """Check that no operator token can be guessed. Nothing of a token is shown."""
    tokens: dict[str, SecretStr | None] = {"admin.token": config.admin.token}
    tokens |= {f"admin.tokens.{name}.token": one.token for name, one in config.admin.tokens.items()}
    for about, token in tokens.items():
        if token is None:
            continue
        text = token.get_secret_value()
        if len(text) < _SHORTEST or len(set(text)) < _FEWEST:
            detail = f"can be guessed, as it has {len(text)} characters, {len(set(text))} of them different"
            yield doubtful(about, detail, "Use a random one, as openssl rand -hex 32 prints it.")
        else:
            yield good(about, "is long enough that it cannot be guessed")


def check_exposure(config: GatewayConfig) -> Iterator[CheckResult]:
    """Check from where the operator endpoints can be reached."""
    admin, server = config.admin, config.server
    about = "server.host" if admin.listen is None else "admin.listen"
    address = (
        BindAddress.of(server.host, server.port, 0) if admin.listen is None else BindAddress.parse(admin.listen, 0)
    )
    if address.path or _is_loopback(address.host):
        yield good(about, f"operator endpoints are on {address}, for this machine only")
        return
    detail = f"operator endpoints are on {address}, which other machines can reach"
    if admin.listen is None:
        remedy = "Set admin.listen to 127.0.0.1:9901, so that clients cannot even try a token."
    else:
        remedy = "Let a firewall admit operators only, or listen on a loopback address."
    yield doubtful(about, detail, remedy)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
