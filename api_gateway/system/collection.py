"""The garbage collector: paused while a process starts and where it must not run, and tuned for serving."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the collector within this block, or until `settle_objects`.

    Nearly all that a start creates stays, so that collections only cost it time, a tenth of all.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def settle_objects() -> None:
    """End the pause, exempt the objects of the start from collections, and have the collector run less often.

    Requests create no reference cycles, and the default thresholds cost a fifth of their time. Cycles of errors are
    still collected.
    """
    if gc.isenabled():  # the process is older than this start, so there may be much garbage
        gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def frames_of_threads() -> dict[int, FrameType]:
    """Return the current frame of each thread, by its ident, with the collector paused.

    A collection within `sys._current_frames` may let another thread run while a lock of the interpreter is held; a
    thread that is started then, and all others with it, wait for ever (python/cpython#106883).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()  # noqa: SLF001 - documented, and there is no public alternative
    finally:
        if was_enabled:
            gc.enable()
