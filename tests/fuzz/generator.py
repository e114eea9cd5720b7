"""Draws cases: valid ones, which must be answered in full, mutated ones, and every byte boundary in turn."""

import random
from collections.abc import Iterator
from itertools import count

from tests.fuzz.case import FIN, PAUSE, RESET, Case, Script, Step
from tests.fuzz.corpus import COMPLETE, FAULTY, OTHER, PLAIN, ROUTES, SPECIAL, nonce_of, whole
from tests.fuzz.mutation import broken_at, ended, mutated, paced, pause

_SHARE_VALID, _SHARE_SWEEP = 0.2, 0.25


class Generator:
    """Draws cases from one source of chance."""

    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)
        self._sweep = self._boundaries()

    def draw(self) -> Case:
        """Return the next case."""
        share = self._source.random()
        if share < _SHARE_VALID:
            return self._valid()
        if share < _SHARE_VALID + _SHARE_SWEEP:
            return next(self._sweep)
        return self._mutated()

    def _target(self, nonce: bytes, *, is_faulty: bool = False) -> bytes:
        """Return a target; upstreams that misbehave share no connection with others, whom they would do harm."""
        return b"/api/%b%b/%b" % (b"x" if is_faulty else b"", self._source.choice(ROUTES).encode(), nonce)

    def _valid(self) -> Case:
        """Return requests and responses that nothing is wrong with, in any pace, pipelined or one after the other."""
        source = self._source
        nonces = tuple(nonce_of(source) for _ in range(source.choice((1, 1, 2, 3, 6, 20))))
        sent: list[bytes] = []
        responses: dict[bytes, Script] = {}
        expected: list[tuple[str, int, bytes]] = []
        for nonce in nonces:
            method, request = source.choice(PLAIN)
            data, status, body = source.choice(COMPLETE)(nonce)
            sent.append(request(self._target(nonce), nonce))
            closes = b"Connection: close" in data
            responses[nonce] = (*paced(source, data), *([Step(FIN)] if closes else []))
            expected.append((method, status, b"" if method == "HEAD" else body))
        steps = paced(source, b"".join(sent)) if source.random() < 0.5 else _each(source, sent)
        return Case(tuple(steps), nonces, responses, tuple(expected))

    def _mutated(self) -> Case:
        """Return a few requests, some of them mutated, and responses that may be."""
        source = self._source
        nonces = tuple(nonce_of(source) for _ in range(source.choice((1, 1, 1, 2, 3))))
        faulty_client, faulty_upstream = source.choice(((True, True), (True, False), (True, False), (False, True)))
        sent: list[bytes] = []
        for nonce in nonces:
            other = source.random() < 0.5
            request = source.choice(OTHER) if other else source.choice(PLAIN)[1]
            data = request(self._target(nonce, is_faulty=faulty_upstream), nonce)
            sent.append(mutated(source, data) if faulty_client and source.random() < 0.6 else data)
        steps = paced(source, b"".join(sent)) if source.random() < 0.7 else _each(source, sent)
        client = ended(source, steps) if faulty_client else steps
        responses = {nonce: self._response(nonce, is_faulty=faulty_upstream) for nonce in nonces}
        return Case(tuple(client), nonces, responses, is_faulty=faulty_upstream)

    def _response(self, nonce: bytes, *, is_faulty: bool) -> Script:
        source = self._source
        special = FAULTY if is_faulty else SPECIAL
        data = source.choice(special)(nonce) if source.random() < 0.4 else source.choice(COMPLETE)(nonce)[0]
        if not is_faulty:
            return (*paced(source, data), *([Step(FIN)] if b"Connection: close" in data else []))
        if source.random() < 0.7:
            data = mutated(source, data)
        return tuple(ended(source, paced(source, data)))

    def _boundaries(self) -> Iterator[Case]:
        """Yield every message broken at every byte, on either side, in every way; then all again."""
        messages = [*(request for _, request in PLAIN), *OTHER]
        for turn in count():
            for kind in (FIN, RESET, PAUSE):
                for at in range(400):
                    nonce = nonce_of(self._source)
                    target = self._target(nonce)
                    request = messages[(at + turn) % len(messages)](target, nonce)
                    response = (COMPLETE[(at + turn) % len(COMPLETE)](nonce))[0]
                    if at <= len(request):
                        yield Case(broken_at(request, at, kind), (nonce,), {nonce: whole(response)})
                    if at <= len(response):
                        target = self._target(nonce, is_faulty=True)
                        plain = PLAIN[turn % len(PLAIN)][1](target, nonce)
                        yield Case(whole(plain), (nonce,), {nonce: broken_at(response, at, kind)}, is_faulty=True)


def _each(source: random.Random, messages: list[bytes]) -> list[Step]:
    """Return the steps that send one message after the other, each in its pace."""
    steps: list[Step] = []
    for message in messages:
        steps += [*paced(source, message), *pause(source)]
    return steps
