"""Signals that ask for a reload or a restart, held back by the kernel while nothing in this process can act on them.

Their default action ends a process. A start takes seconds, so one of them may well arrive within it; it is delivered
as soon as its handler is there. At the end of the process it is dropped.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

HELD = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})


def hold() -> None:
    """Hold them from now on. To be called in the main thread, before any other thread starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


@contextmanager
def delivered() -> Iterator[None]:
    """Deliver them in this block, whose signal handlers are installed, and restore what was there before."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
