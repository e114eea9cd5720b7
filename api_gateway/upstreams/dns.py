"""Resolves the names of targets periodically; each address becomes a target.

While a name cannot be resolved, its known addresses are kept; before the first success, the name itself is the target.
"""

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from api_gateway.ip_addresses import is_address
from api_gateway.upstreams.target import Target

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # (host, port) -> addresses; raises OSError

MAX_ADDRESSES = 64  # per name; more would only cost memory and health checks
_JITTER = 0.1  # share of the interval by which look-ups are spread


@dataclass(frozen=True, slots=True)
class Resolution:
    """The result of one look-up: added and removed addresses. For an error see `name.error`."""

    name: "HostName"
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    is_recovered: bool = False

    @property
    def is_change(self) -> bool:
        """True if the addresses have changed."""
        return bool(self.added or self.removed)


class HostName:
    """A configured target, whose host may be a name, and the targets for its current addresses.

    States: not resolved (one target with the name itself), resolved (one target per address). `error` is why the last
    look-up failed, None if it succeeded; `asked_at` is the time of its result in monotonic seconds.
    """

    def __init__(self, url: str, weight: int = 1) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None  # noqa: S101 - validated by the configuration
        self.url = url
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.is_address = is_address(self.host)
        self.error: str | None = None
        self.asked_at: float | None = None
        self._scheme = parts.scheme
        self._weight = weight
        self._targets: dict[str, Target] = {"": Target(url, weight)}  # by address; "" is the name itself

    def __repr__(self) -> str:
        return f"<HostName {self.host!r} [{', '.join(self.addresses) or 'not resolved'}]>"

    @property
    def targets(self) -> list[Target]:
        """The current targets: at least one."""
        return list(self._targets.values())

    @property
    def addresses(self) -> tuple[str, ...]:
        """The current addresses; none until the name was resolved."""
        return tuple(address for address in self._targets if address)

    def set_weight(self, weight: int) -> None:
        """Set the weight of all its targets."""
        self._weight = weight
        for target in self._targets.values():
            target.weight = weight

    def update(self, addresses: Sequence[str], now: float) -> Resolution:
        """Use the addresses of a response. Known addresses keep their targets with their state."""
        found = sorted(set(addresses))[:MAX_ADDRESSES]
        if not found:
            return self.fail("it has no address", now)
        before, was_failing = self._targets, self.error is not None
        self._targets = {address: before.get(address) or self._target(address) for address in found}
        self.error, self.asked_at = None, now
        return Resolution(
            self,
            added=tuple(address for address in found if address not in before),
            removed=tuple(address for address in before if address and address not in self._targets),
            is_recovered=was_failing,
        )

    def fail(self, error: str, now: float) -> Resolution:
        """Record a failed look-up; the targets stay."""
        self.error, self.asked_at = error, now
        return Resolution(self)

    def _target(self, address: str) -> Target:
        place = f"[{address}]" if ":" in address else address
        return Target(f"{self._scheme}://{place}:{self.port}", self._weight, named=self.url, address=address)


async def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of `host` from the event loop's resolver. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


async def resolve_periodically(
    names: Sequence[HostName],
    interval: float,
    resolve: Resolve,
    on_resolution: Callable[[Resolution], None],
    *,
    clock: Callable[[], float],
    source: random.Random,
) -> None:
    """Resolve each name about every `interval` seconds, independently of the others, until cancelled."""
    async with asyncio.TaskGroup() as group:
        for name in names:
            if not name.is_address:
                group.create_task(_resolve_name(name, interval, resolve, on_resolution, clock, source))


async def resolve_once(name: HostName, within: float, resolve: Resolve, clock: Callable[[], float]) -> Resolution:
    """Resolve a name once, within at most `within` seconds, and apply the result."""
    try:
        async with asyncio.timeout(within):
            addresses = await resolve(name.host, name.port)
    except TimeoutError:
        return name.fail(f"no response within {within:g} s", clock())
    except (OSError, UnicodeError) as error:  # UnicodeError: a label is too long
        return name.fail(getattr(error, "strerror", None) or str(error), clock())
    return name.update(addresses, clock())


async def _resolve_name(
    name: HostName,
    interval: float,
    resolve: Resolve,
    on_resolution: Callable[[Resolution], None],
    clock: Callable[[], float],
    source: random.Random,
) -> None:
    while True:
        on_resolution(await resolve_once(name, interval, resolve, clock))
        await asyncio.sleep(interval * source.uniform(1 - _JITTER, 1 + _JITTER))
