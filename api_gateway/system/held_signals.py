"""Signals during the start, most of which is spent on imports; this module therefore has almost none.

Signals for a reload or a restart are blocked until their handlers are installed, because their default action ends the
process. Then they are delivered. Stop signals end the process at once, without a traceback.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

BLOCKED_SIGNALS = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})


def block_signals() -> None:
    """Block SIGHUP, SIGUSR1 and SIGUSR2. To be called in the main thread, before any other thread starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)


@contextmanager
def unblocked_signals() -> Iterator[None]:
    """Unblock them within this block, which has installed handlers; then restore the previous mask."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_quietly() -> None:
    """Exit at SIGINT or SIGTERM until the server installs its own handlers: nothing is served yet.

    Needed for the first process of a container, for which the kernel performs no default actions.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # SIG_IGN: set by a shell for background jobs
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    """Exit with the code that shells use. An exception could be caught by imports or finalisers."""
    os._exit(128 + number)
