"""Returns freed memory to the operating system.

glibc's malloc returns only the top of its heap. Memory below it, such as that of request bodies of slow clients, stays
allocated until `malloc_trim` is called, which takes up to about 20 ms for a heap of 200 MB. So it is called in a
thread, and only if much memory has been free for a while. Other C libraries return memory on their own.
"""

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

TRIM_INTERVAL = 5.0  # seconds between checks
MIN_FREE_BYTES = 8 * 1024 * 1024  # bytes that must be free at two consecutive checks


class _MallInfo2(ctypes.Structure):
    """`struct mallinfo2` of malloc.h; `fordblks` are the free bytes of all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class Heap:
    """The heap of the C library. Raises OSError for glibc before 2.33 and other C libraries."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        try:
            self._info, self._trim = library.mallinfo2, library.malloc_trim
        except AttributeError as error:
            raise OSError(f"the C library cannot trim its heap: {error}") from error
        self._info.restype = _MallInfo2
        self._trim.argtypes = [ctypes.c_size_t]

    def free(self) -> int:
        """Return the bytes that malloc holds and that are not in use."""
        return int(self._info().fordblks)

    def trim(self) -> None:
        """Return free pages to the operating system."""
        self._trim(0)


def keep_trimmed(stopped: threading.Event, every: float = TRIM_INTERVAL, worth: int = MIN_FREE_BYTES) -> None:
    """Trim the heap whenever at least `worth` bytes were free at two consecutive checks, `every` seconds apart.

    Blocks until `stopped` is set.
    """
    try:
        heap = Heap()
    except OSError as error:
        logger.debug("%s", error)
        return
    before = 0
    while not stopped.wait(every):
        free = heap.free()
        if min(before, free) >= worth:
            heap.trim()
            free = 0
        before = free


@contextmanager
def trimmed() -> Iterator[None]:
    """Run `keep_trimmed` in a thread within this block."""
    stopped = threading.Event()
    thread = threading.Thread(target=keep_trimmed, args=(stopped,), name="heap", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
