"""The abilities of a call of an upstream, as values."""

from typing import NamedTuple


class CallAbilities(NamedTuple):
    """The abilities of a kind of call; read once for each attempt.

    `interim`: it reports interim responses, and forwards an expectation of 100 (Continue). `trailers`: it takes a
    chunked body with its framing and trailers; otherwise the content alone. `upgrade`: its connection can be taken out
    of the pool, for a tunnel or a stream.
    """

    interim: bool
    trailers: bool
    upgrade: bool
