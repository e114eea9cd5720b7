"""The client side of an upstream: its transport, timeouts and retries."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import httpx

from api_gateway.http1.headers import Fields
from api_gateway.models import Exchange
from api_gateway.resilience.fair_shares import ResourceState
from api_gateway.resilience.retry import RetryDecider, RetryPolicy
from api_gateway.transport.http1_transport import AnyTransport, UpstreamTransport
from api_gateway.transport.httpx_call import HttpxCalls
from api_gateway.transport.request import Origin
from api_gateway.transport.upstream_call import UpstreamCall
from api_gateway.transport.upstream_connection import UpstreamConnection
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Upstream

ABORTED_CALLS = "aborted_calls"  # the name of the resource
MAX_ABORTED = 512  # calls that another transport has not ended, unless the configuration says otherwise
TARGET, CLIENT = "target", "client"  # values of `host_header`


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts in seconds; `total` None: no limit."""

    connect: float
    response: float
    idle: float
    total: float | None
    tunnel: float = 3600.0  # without a byte in either direction of a tunnel


class HostFields(dict[Target, bytes]):
    """The `Host` for the requests to each target, computed at the first one; empty if it is the client's."""

    def __init__(self, setting: str, origins: Mapping[Target, Origin]) -> None:
        """`setting`: `target`, `client`, or the value itself."""
        super().__init__()
        self.setting = setting
        self._origins = origins

    def __missing__(self, target: Target) -> bytes:
        if self.setting == TARGET:
            host = self._origins[target].netloc
        else:
            host = b"" if self.setting == CLIENT else self.setting.encode()
        self[target] = host
        return host


class ResponseTimeouts(dict[float, dict[str, float]]):
    """Timeouts by the time until the head of the response, which routes may set."""

    def __init__(self, timeouts: Timeouts) -> None:
        super().__init__()
        self._timeouts = timeouts

    def __missing__(self, response: float) -> dict[str, float]:
        found = self[response] = _timeouts_by_operation(replace(self._timeouts, response=response))
        return found


class UpstreamClient:
    """An upstream with its transport, timeouts and retries. By default there are no retries.

    `is_native`: it is reached by the gateway's own transport; `is_simple`: load balancing needs no header field, and
    no route of it is one that an exchange has to look at.

    `hash_header` (lower case) is the header field whose value is the key for load balancing, instead of the client.
    `host_header` is the `Host` that the upstream gets: see `HostFields`. `authorities` are those of all targets and of
    `host_header`. `max_aborted` limits the calls that another
    transport has not ended although they were aborted.
    """

    __slots__ = (
        "_acquire_idle",
        "_removed",
        "_timeouts_by_response",
        "authorities",
        "calls",
        "hash_header",
        "hosts",
        "is_native",
        "is_simple",
        "origins",
        "retried_statuses",
        "retries",
        "timeouts",
        "total_timeout",
        "transport",
        "tunnel_timeout",
        "upstream",
    )

    def __init__(
        self,
        upstream: Upstream,
        transport: AnyTransport,
        timeouts: Timeouts,
        *,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is frozen
        source: random.Random | None = None,
        hash_header: bytes | None = None,
        host_header: str = TARGET,
        max_aborted: int = MAX_ABORTED,
    ) -> None:
        self.upstream = upstream
        self.origins = {target: _origin(target) for target in upstream.targets}
        self._removed: set[Target] = set()
        self._connect(transport, max_aborted)
        retries = RetryDecider(retry, source or random.Random())  # noqa: S311 - spreads load, guards nothing
        self._configure(timeouts, retries, hash_header, host_header)

    def _connect(self, transport: AnyTransport, max_aborted: int = MAX_ABORTED) -> None:
        self.transport = transport
        self.is_native = isinstance(transport, UpstreamTransport)
        self.calls = HttpxCalls(None if isinstance(transport, UpstreamTransport) else transport, max_aborted)
        self._acquire_idle: dict[Target, Callable[[str | None], UpstreamCall | None]] = {}

    def _configure(
        self, timeouts: Timeouts, retries: RetryDecider, hash_header: bytes | None, host_header: str
    ) -> None:
        self.hosts = HostFields(host_header, self.origins)
        self._list_authorities()
        retry = retries.policy
        self.total_timeout = timeouts.total
        self.retries = retries
        self.retried_statuses = retry.statuses if retry.attempts > 1 and retry.budget > 0 else frozenset()
        self.hash_header = hash_header
        self.is_simple = hash_header is None
        self.tunnel_timeout = timeouts.tunnel
        self.timeouts = _timeouts_by_operation(timeouts)
        self._timeouts_by_response = ResponseTimeouts(timeouts)

    def _list_authorities(self) -> None:
        own = () if self.hosts.setting in (TARGET, CLIENT) else (self.hosts.setting.encode(),)
        self.authorities = tuple(dict.fromkeys((*(origin.netloc for origin in self.origins.values()), *own)))

    def __repr__(self) -> str:
        return f"<UpstreamClient {self.upstream!r}>"

    def succeeded_by(
        self,
        timeouts: Timeouts,
        retry: RetryPolicy,
        hash_header: bytes | None,
        transport: AnyTransport,
        host_header: str = TARGET,
        max_aborted: int = MAX_ABORTED,
    ) -> "UpstreamClient":
        """Return a client of the same upstream with other settings. Both share its state; this one stays usable."""
        other = UpstreamClient(
            self.upstream,
            transport,
            timeouts,
            hash_header=hash_header,
            host_header=host_header,
            max_aborted=max_aborted,
        )
        other._share(self, self.retries.succeeded_by(retry))
        other._configure(timeouts, other.retries, hash_header, host_header)
        return other

    def _share(self, before: "UpstreamClient", retries: RetryDecider) -> None:
        """Share the state of a client that this one succeeds."""
        self.origins, self._removed, self.retries = before.origins, before._removed, retries  # noqa: SLF001 - as above
        if self.transport is before.transport:
            self._acquire_idle = before._acquire_idle  # noqa: SLF001 - as above
            before.calls.limit, self.calls = self.calls.limit, before.calls

    def host_of(self, target: Target, client_host: bytes) -> bytes:
        """Return the `Host` for a request to `target`; `client_host` is that of the client, empty if it has none."""
        return self.hosts[target] or client_host or self.origins[target].netloc

    def hash_key(self, fields: Fields, exchange: Exchange) -> str:
        """Return the key for load balancing: the value of `hash_header`, or the client if it is absent."""
        values = None if self.hash_header is None else fields.get(self.hash_header)
        return exchange.client_key if values is None else values[0].decode("latin-1")

    def set_targets(self, targets: Sequence[Target], now: float) -> None:
        """Set the targets. Requests in progress on others continue; idle connections to those are closed."""
        before = self.upstream.targets
        for target in targets:
            if target not in self.origins:
                self.origins[target] = _origin(target)
                if isinstance(self.transport, UpstreamTransport):
                    self.transport.pool(self.origins[target]).revive()
        self._list_authorities()
        self.upstream.set_targets(targets, now)
        self._removed.update(target for target in before if target not in targets)
        self.sweep()

    def sweep(self) -> None:
        """Delete the state of removed targets that have no request in progress."""
        live = {self.origins[target].key for target in self.upstream.targets}
        for target in list(self._removed):
            origin = self.origins[target]
            is_free = True
            if isinstance(self.transport, UpstreamTransport) and origin.key not in live:
                is_free = self.transport.retire(origin)
            if is_free and target.in_flight == 0:
                self._removed.discard(target)
                self._acquire_idle.pop(target, None)
                self.hosts.pop(target, None)
                del self.origins[target]

    def resources(self) -> list[ResourceState]:
        """Return the use of the connections to all targets; nothing before the first connection.

        With another transport, return the calls that were aborted and have not ended.
        """
        name = self.upstream.name
        if not isinstance(self.transport, UpstreamTransport):
            calls = self.calls
            return [ResourceState(ABORTED_CALLS, name, calls.limit, calls.aborted, calls.refused)]
        requests, tunnels = self.transport.resources()
        if not requests:
            return []
        return [ResourceState.of("requests", requests, name), ResourceState.of("tunnels", tunnels, name)]

    def idle_connection(self, target: Target, principal: str | None) -> UpstreamCall | None:
        """Take an idle connection to `target` if there is one and the principal's share permits it, else None.

        If the transport is another one than the gateway's own, begin a call on that, which is possible unless too many
        that were aborted have not ended.
        """
        take = self._acquire_idle.get(target)
        if take is None:
            if isinstance(self.transport, UpstreamTransport):
                take = self.transport.pool(self.origins[target]).acquire_idle
            else:
                take = partial(self.calls.begin, self.origins[target])
            self._acquire_idle[target] = take
        return take(principal)

    def admit_tunnel(self, target: Target, principal: str | None) -> None:
        """Refuse a tunnel before its handshake: raises ShareExceeded if the principal's share is used up."""
        assert isinstance(self.transport, UpstreamTransport)  # noqa: S101 - only called if `is_native`
        self.transport.pool(self.origins[target]).admit_tunnel(principal)

    def timeouts_within(self, response: float | None) -> dict[str, float]:
        """Return the timeouts with another one until the head of the response; None: the upstream's."""
        return self.timeouts if response is None else self._timeouts_by_response[response]

    async def connection(
        self,
        target: Target,
        principal: str | None,
        connect: float,
        on_connect: Callable[[], None],
        *,
        is_fresh: bool = False,
    ) -> UpstreamConnection:
        """Open a connection to `target` within `connect` seconds, or await one; `on_connect` is called before opening.

        If `is_fresh`, it is a new one in any case. Raises httpx.TransportError; for another transport always, as
        `idle_connection` has not begun a call on it.
        """
        if not isinstance(self.transport, UpstreamTransport):
            raise self.calls.refusal()
        pool = self.transport.pool(self.origins[target])
        return await pool.acquire(
            connect, self.timeouts["pool"], principal=principal, is_fresh=is_fresh, on_connect=on_connect
        )


@lru_cache(maxsize=256)
def _timeouts_by_operation(timeouts: Timeouts) -> dict[str, float]:
    """Return the timeouts as an extension of requests: one object for all upstreams with the same, never changed."""
    return {
        "connect": timeouts.connect,
        "pool": timeouts.connect,
        "read": timeouts.response,
        "write": timeouts.idle,
        "idle": timeouts.idle,
    }


def _origin(target: Target) -> Origin:
    return Origin.of(httpx.URL(target.named or target.url), target.address)
