"""The keys of an issuer of tokens: fetched in the background, used while the issuer is down, and replaced by rotation.

Fetches are never made by requests themselves: a request can only wait for the one in progress, which all share.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Clock

logger = logging.getLogger(__name__)

FETCH_TIMEOUT = 5.0  # seconds for a fetch, which is also how long a request waits for one
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0  # seconds after a failed fetch; doubled each time
_JITTER = 0.1  # share of an interval by which fetches of several processes are spread
MAX_CANDIDATES = 4  # keys that a signature without a key id is compared with


class VerificationKey(Protocol):
    """A key that verifies signatures. `identity` is equal for equal keys."""

    is_withdrawn: bool  # the issuer no longer publishes the key

    @property
    def kid(self) -> str | None: ...  # noqa: D102
    @property
    def algorithms(self) -> frozenset[str]: ...  # noqa: D102 - permitted ones that the key can be used with
    @property
    def identity(self) -> str: ...  # noqa: D102

    def verify(self, algorithm: str, signed: bytes, signature: bytes) -> bool:
        """Return whether `signature` is a signature of `signed` by this key."""
        ...


class KeysUnavailable(Exception):
    """The keys cannot be obtained; the message has the cause."""


Load = Callable[[], Awaitable[Sequence[VerificationKey]]]  # raises KeysUnavailable


class IssuerKeys:
    """The keys of one issuer.

    States: without keys (none could be obtained, or those there were are too old), current, and stale (the last fetch
    failed; the keys are used until `stale_for` seconds after they were fetched). A fetch may be in progress in each.
    """

    def __init__(
        self,
        name: str,
        load: Load,
        *,
        clock: Clock,
        refresh_interval: float,
        unknown_key_interval: float,
        stale_for: float,
        on_withdrawal: Callable[[], None] = lambda: None,
        on_fetch: Callable[[bool], None] = lambda _succeeded: None,
        source: random.Random | None = None,
    ) -> None:
        """`name` is the issuer's name in the configuration. `on_withdrawal` is called when a key becomes invalid.

        `on_fetch` is called after each fetch, with whether it succeeded.
        """
        self.name = name
        self.error: str | None = None  # why the last fetch failed; no secrets
        self.fetched_at: float | None = None  # when the last fetch succeeded
        self.fetches = self.failures = 0
        self._load, self._clock, self._on_withdrawal, self._on_fetch = load, clock, on_withdrawal, on_fetch
        self._refresh_interval, self._unknown_key_interval = refresh_interval, unknown_key_interval
        self._stale_for = stale_for
        self._source = source or random.Random()  # noqa: S311 - spreads fetches, guards nothing
        self._keys: tuple[VerificationKey, ...] = ()
        self._asked_at: float | None = None  # when the last fetch began
        self._fetch: asyncio.Task[None] | None = None
        self._retry = _FIRST_RETRY

    def __repr__(self) -> str:
        state = "without keys" if not self._keys else "current" if self.error is None else "stale"
        return f"<IssuerKeys {self.name!r} [{len(self._keys)} keys, {state}]>"

    @property
    def count(self) -> int:
        """The number of keys in use."""
        return len(self._keys)

    @property
    def is_empty(self) -> bool:
        """True if no token of the issuer can be verified."""
        return not self._keys

    @property
    def retry_after(self) -> float:
        """Seconds after which a request may start the next fetch, at least 1."""
        since = 0.0 if self._asked_at is None else self._clock() - self._asked_at
        return max(self._interval - since, 1.0)

    def candidates(self, kid: str | None, algorithm: str) -> list[VerificationKey]:
        """Return the keys that a signature may be verified with: those of the token's key id, or without one."""
        found = [
            key
            for key in self._keys
            if algorithm in key.algorithms and (kid is None or key.kid is None or key.kid == kid)
        ]
        return found[:MAX_CANDIDATES]

    def may_find(self) -> bool:
        """Return whether waiting for `fetched` may yield an unknown key; False limits the rate of fetches."""
        if self._fetch is not None or self._asked_at is None:
            return True
        return self._clock() - self._asked_at >= self._interval

    async def look_for_new(self) -> None:
        """Wait for the fetch in progress or start one, unless the last one is too recent to yield new keys."""
        if self.may_find():
            await self.fetched()

    async def fetched(self) -> None:
        """Wait for the fetch in progress, or start one. Returns too if it fails; see `error`."""
        if self._fetch is None:
            self._asked_at = self._clock()
            self._fetch = asyncio.create_task(self._fetch_keys(), name=f"keys of issuer {self.name}")
        await asyncio.wait([self._fetch])

    async def run(self) -> None:
        """Fetch the keys now and again before they become old, until cancelled."""
        try:
            while True:
                if self.fetched_at is None or self._clock() - self.fetched_at >= _FIRST_RETRY:  # else by a request
                    await self.fetched()
                await asyncio.sleep(self._next_delay() * self._source.uniform(1 - _JITTER, 1))
        finally:
            if self._fetch is not None:
                await cancel_and_wait(self._fetch)

    @property
    def _interval(self) -> float:
        """Seconds between two fetches that requests start."""
        return self._unknown_key_interval if self._keys else _FIRST_RETRY

    def _next_delay(self) -> float:
        return self._refresh_interval if self.error is None else min(self._retry, self._refresh_interval)

    async def _fetch_keys(self) -> None:
        self.fetches += 1
        try:
            async with asyncio.timeout(FETCH_TIMEOUT):
                keys = await self._load()
        except TimeoutError:
            self._note_failure(f"no response within {FETCH_TIMEOUT:g} s")
        except KeysUnavailable as error:
            self._note_failure(str(error))
        except Exception as error:  # a defect, after which the keys must still be fetched again
            logger.exception("issuer %s: fetching its keys failed", self.name)
            self._note_failure(f"internal error: {type(error).__name__}")
        else:
            self._note_success(keys)
        finally:
            self._fetch = None
            self._on_fetch(self.error is None)

    def _note_success(self, keys: Sequence[VerificationKey]) -> None:
        if self.error is not None:
            logger.warning("issuer %s: keys available again", self.name)
        self.error, self._retry, self.fetched_at = None, _FIRST_RETRY, self._clock()
        self._replace(keys)

    def _note_failure(self, cause: str) -> None:
        now, is_first = self._clock(), self.error is None
        self.failures += 1
        self._retry = _FIRST_RETRY if is_first else min(2 * self._retry, _LAST_RETRY)
        self.error = cause
        if self._keys and self.fetched_at is not None and now - self.fetched_at > self._stale_for:
            logger.error("issuer %s: its keys are too old and not used any more", self.name)
            self._replace(())
        if is_first:
            used = f"the last ones are used for up to {self._stale_for:g} s" if self._keys else "there are none"
            logger.error("issuer %s: keys cannot be obtained, %s: %s", self.name, used, cause)

    def _replace(self, keys: Iterable[VerificationKey]) -> None:
        """Use these keys. Known ones stay the same objects, so that tokens verified with them stay verified."""
        known = {key.identity: key for key in self._keys}
        self._keys = tuple([known.pop(key.identity, key) for key in keys])
        for key in known.values():
            key.is_withdrawn = True
        if known:
            logger.info("issuer %s: %d keys withdrawn, %d in use", self.name, len(known), len(self._keys))
            self._on_withdrawal()
