"""The addresses behind the names of targets: asked for again and again, each address a target of its own.

A name that cannot be resolved stays with what was known of it: at first, that is the name itself.
"""

import asyncio
import ipaddress
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from api_gateway.upstreams.target import Target

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # (host, port) -> addresses; raises OSError

MAX_ADDRESSES = 64  # of one name: more make no difference but in what they cost
_JITTER = 0.1  # share of the interval by which questions spread out


@dataclass(frozen=True, slots=True)
class Resolution:
    """What became of asking for one name: the addresses that came and went, and why it failed if it did."""

    name: "HostName"
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    is_recovered: bool = False

    @property
    def is_change(self) -> bool:
        """Tell whether other addresses than before are to be used."""
        return bool(self.added or self.removed)


class HostName:
    """A configured target whose host is a name, and the targets that this stands for now.

    `error` is why the last question failed, None if it did not; `asked_at` is when it was asked, monotonic seconds.
    """

    def __init__(self, url: str, weight: int = 1) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None  # noqa: S101 - the configuration sees to that
        self.url = url
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.is_address = _is_address(self.host)
        self.error: str | None = None
        self.asked_at: float | None = None
        self._scheme = parts.scheme
        self._weight = weight
        self._targets: dict[str, Target] = {"": Target(url, weight)}  # by address; the name itself at first

    def __repr__(self) -> str:
        return f"<HostName {self.host!r} [{', '.join(self.addresses) or 'not resolved'}]>"

    @property
    def targets(self) -> list[Target]:
        """The targets it stands for: at least one."""
        return list(self._targets.values())

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses it stands for; none until it was resolved."""
        return tuple(address for address in self._targets if address)

    def set_weight(self, weight: int) -> None:
        """Give another weight to the targets it stands for."""
        self._weight = weight
        for target in self._targets.values():
            target.weight = weight

    def update(self, addresses: Sequence[str], now: float) -> Resolution:
        """Take in an answer. An address that is known keeps its target, with all that is known of that."""
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
        """Keep what is known, as nothing else could be learnt."""
        self.error, self.asked_at = error, now
        return Resolution(self)

    def _target(self, address: str) -> Target:
        place = f"[{address}]" if ":" in address else address
        return Target(f"{self._scheme}://{place}:{self.port}", self._weight, named=self.url, address=address)


async def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of `host`, as the event loop's resolver finds them. Raises OSError."""
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
    """Ask for every name about every `interval` seconds until cancelled, each by itself."""
    async with asyncio.TaskGroup() as group:
        for name in names:
            if not name.is_address:
                group.create_task(_resolve_name(name, interval, resolve, on_resolution, clock, source))


async def resolve_once(name: HostName, within: float, resolve: Resolve, clock: Callable[[], float]) -> Resolution:
    """Ask once, for `within` seconds at most, and take in what comes of it."""
    try:
        async with asyncio.timeout(within):
            addresses = await resolve(name.host, name.port)
    except TimeoutError:
        return name.fail(f"no answer within {within:g} s", clock())
    except (OSError, UnicodeError) as error:  # the latter is how Python says that a label is too long
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


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
