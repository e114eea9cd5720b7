"""What a token costs: its first sight by algorithm, and a request with one that is remembered.

`python -m benchmarks.tokens` measures the steps of a request within one process: see `benchmarks.steps`. All
algorithms are measured that a gateway permits by default, in one run and in turns. `--processes` runs gateways on one
core; upstream (nginx) and load use the other. They run at the same time and are driven in turns, so that ratios hold
on a machine that is not idle; the first sight is measured for three algorithms. `--before` is a checkout of another
commit, whose gateway is measured too; it receives the same header fields. Needs the extra jwt.
"""

import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, OKPKey, RSAKey

from api_gateway.settings.jwt import ASYMMETRIC
from benchmarks.cases import CLIENT, Case
from benchmarks.claims import Claim, print_costs
from benchmarks.load import alternating_costs, await_ready
from benchmarks.processes import free_port, running
from benchmarks.steps import alternating_steps, head_of
from benchmarks.upstream import upstream

ROOT = Path(__file__).parent.parent
GATEWAY_CORE, LOAD_CORE = 0, 1
ISSUER, AUDIENCE = "https://issuer.test", "https://api.test"
FREQUENT = ("RS256", "ES256", "EdDSA")  # those that are measured in whole processes too
# In microseconds. OpenSSL itself takes longer for the last three, see docs/jwt.md.
LIMITS = dict.fromkeys(ASYMMETRIC, 250) | dict.fromkeys(("Ed448", "ES384", "ES512"), 1000)
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "EdDSA": "Ed25519"}  # of others: their name, or RSA
TOKENS = 3_000  # more than the header sets that a gateway remembers
_FEWEST = 250  # for a few rounds within one process, so that none is sent again
_PER_NEW = 10  # rounds with remembered tokens for one with new ones, whose claim needs no such accuracy
CLAIMS = (
    Claim("a remembered token", "ES256: tokens", "ES256: no tokens", 1.5),
    Claim("a remembered token, compared with before", "ES256: tokens", "ES256: before", 1.5),
    *(
        Claim(
            f"the first sight of a token, {name}",
            f"{name}, new: tokens, none remembered",
            f"{name}, new: no tokens",
            limit,
        )
        for name, limit in LIMITS.items()
    ),
)
_LUA = """
local tokens, number = {}, 0
for line in io.lines("%s") do tokens[#tokens + 1] = line end
request = function()
  number = number %% #tokens + 1
  wrk.headers["Authorization"] = "Bearer " .. tokens[number]
  return wrk.format()
end
"""


def signed(algorithm: str, key: Any, number: int) -> str:
    """Return a token of the client, which differs from others in its id."""
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": CLIENT, "iat": now, "exp": now + 86_400, "jti": f"{number:032}"}
    claims |= {"azp": "web", "scope": "openid read write", "realm_access": {"roles": ["reader", "writer"]}}
    return str(jwt.encode({"alg": algorithm, "kid": key.kid}, claims, key, algorithms=[algorithm]))


def keys() -> dict[str, Any]:
    """Return a private key for each algorithm. Those of RSA share one."""
    found: dict[str, Any] = {"RSA": RSAKey.generate_key(2048, {"kid": "RSA"})}
    for curve in ("P-256", "P-384", "P-521"):
        found[curve] = ECKey.generate_key(curve, {"kid": curve})
    for curve in ("Ed25519", "Ed448"):
        found[curve] = OKPKey.generate_key(curve, {"kid": curve})
    return {name: found[_CURVES.get(name, name if name in found else "RSA")] for name in ASYMMETRIC}


def configuration(folder: Path, port: int, origin: int, jwt: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the configuration of a gateway; `jwt` are its settings of tokens."""
    sections: dict[str, Any] = {
        "server": {"port": port},
        "state_dir": str(folder / "state"),
        "log": {"access": False},
        "tiers": {"FREE": {"rate": 1_000_000, "capacity": 1_000_000}},
        "upstreams": {"up": {"targets": [{"url": f"http://127.0.0.1:{origin}"}]}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
    }
    return sections if jwt is None else sections | identity(folder.parent, jwt)


def identity(folder: Path, jwt: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of a gateway that accepts tokens; the folder has the keys of their issuer."""
    issuer = {"issuer": ISSUER, "audiences": [AUDIENCE], "jwks_file": str(folder / "keys.json")}
    return {"identity": {"sources": ["jwt", "header", "address"], "jwt": {"issuers": {"one": issuer}, **jwt}}}


def issue(folder: Path, algorithms: Sequence[str], count: int) -> dict[str, list[str]]:
    """Write the keys of the issuer, and return so many of its tokens by algorithm."""
    private = keys()
    public = {key.kid: key.as_dict(private=False) for key in private.values()}
    (folder / "keys.json").write_text(json.dumps({"keys": list(public.values())}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)  # EdDSA is an old name, which issuers still use
        return {name: [signed(name, private[name], number) for number in range(count)] for name in algorithms}


@contextmanager
def gateway(checkout: Path, folder: Path, origin: int, jwt: Mapping[str, Any] | None) -> Iterator[tuple[int, int]]:
    """Run the gateway of a checkout; yield its process id and port."""
    folder.mkdir()
    port, path = free_port(), folder / "gateway.json"
    path.write_text(json.dumps(configuration(folder, port, origin, jwt)))  # JSON is YAML
    command = [sys.executable, str(checkout / "run_gateway.py"), "--config", str(path)]
    env = {"PYTHONPATH": str(checkout)}
    with running(command, core=GATEWAY_CORE, port=port, folder=folder, env=env) as pid:
        await_ready(port)
        yield pid, port


def steps(rounds: int) -> dict[str, list[float]]:
    """Return the CPU time of a request in microseconds within one process, by what was measured. Raises Failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heads = {
            algorithm: [head_of("small", {"Authorization": f"Bearer {token}"}) for token in tokens]
            for algorithm, tokens in issue(folder, ASYMMETRIC, min(TOKENS, _FEWEST + 2 * rounds)).items()
        }
        gateways: dict[str, Mapping[str, Any]] = {
            "no tokens": {},
            "tokens": identity(folder, {}),
            "tokens, none remembered": identity(folder, {"max_remembered": 1}),
        }
        runs = [(gateway, "ES256") for gateway in ("no tokens", "tokens")]
        first = {"ES256": heads["ES256"][:1]}
        found = alternating_steps(gateways, first, runs, folder / "remembered", rounds)
        new = {f"{algorithm}, new": heads[algorithm] for algorithm in ASYMMETRIC}
        runs = [(gateway, case) for case in new for gateway in ("no tokens", "tokens, none remembered")]
        return found | alternating_steps(gateways, new, runs, folder / "new", math.ceil(rounds / _PER_NEW))


def measure(seconds: float, rounds: int, before: Path | None) -> dict[str, list[float]]:
    """Return the CPU time of a request in microseconds, by what was measured, in each round. Raises Failed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases = {}
        for name, tokens in issue(folder, FREQUENT, TOKENS).items():
            (folder / name).write_text("\n".join(tokens))
            cases[name] = Case(name, headers={"Authorization": f"Bearer {tokens[0]}"})
            cases[f"{name}, new"] = Case(name, lua=_LUA % (folder / name))
        (folder / "origin").mkdir()
        origin = stack.enter_context(upstream(folder / "origin", LOAD_CORE))
        checkouts: dict[str, tuple[Path, Mapping[str, Any] | None]] = {
            "no tokens": (ROOT, None),
            "tokens": (ROOT, {}),
            "tokens, none remembered": (ROOT, {"max_remembered": 1}),
        }
        if before is not None:
            checkouts["before"] = (before, None)
        gateways = {
            name: stack.enter_context(gateway(checkout, folder / name.replace(" ", "-"), origin, jwt))
            for name, (checkout, jwt) in checkouts.items()
        }
        runs = [(name, "ES256") for name in gateways if name != "tokens, none remembered"]
        runs += [(name, f"{one}, new") for one in FREQUENT for name in ("no tokens", "tokens, none remembered")]
        return alternating_costs(gateways, cases, runs, core=LOAD_CORE, seconds=seconds, rounds=rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table and the claims."""
    return print_costs("benchmarks.tokens", __doc__, measure, CLAIMS, arguments, steps=steps)


if __name__ == "__main__":
    sys.exit(main())
