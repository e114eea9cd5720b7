"""Signals during the start, which takes seconds, most of them for imports: this module imports next to nothing.

Those that ask for a reload or a restart are held back by the kernel while nothing in this process can act on them, as
their default action ends a process; they are delivered as soon as their handler is there, and dropped at the end of
the process. Those that ask for its end are obeyed at once, without a traceback.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

BLOCKED_SIGNALS = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})


def block_signals() -> None:
    """Hold them from now on. To be called in the main thread, before any other thread starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)


@contextmanager
def unblocked_signals() -> Iterator[None]:
    """Deliver them in this block, whose signal handlers are installed, and restore what was there before."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_quietly() -> None:
    """End at SIGINT or SIGTERM from now on, until the server has handlers of its own: nothing is served yet.

    The kernel would not end the first process of a container, which has no default actions.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell starts what runs in the background
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    """End with the exit code that shells use. An exception would be lost where imports or finalisers catch it."""
    os._exit(128 + number)
