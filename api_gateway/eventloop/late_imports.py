"""Imports of modules that only some gateways need: in a thread, when the first request needs them.

The thread competes with the event loop for the interpreter lock. With the usual switch interval of 5 ms the loop would
wait that long after each system call, so the interval is shorter meanwhile.
"""

import asyncio
import sys
import threading
from importlib import import_module
from types import ModuleType

_SWITCH_INTERVAL = 0.0005  # seconds
_lock = threading.Lock()
_imported: dict[str, ModuleType] = {}


async def late_import(name: str) -> ModuleType:
    """Return a module; the first call imports it in a thread."""
    known = _imported.get(name)
    return await asyncio.to_thread(import_gently, name) if known is None else known


def import_gently(name: str) -> ModuleType:
    """Import a module in a thread other than the event loop's, one at a time; return a known one at once."""
    known = _imported.get(name)
    if known is not None:  # without the lock, which another import may hold for long
        return known
    with _lock:
        if name not in _imported:
            before = sys.getswitchinterval()
            sys.setswitchinterval(min(_SWITCH_INTERVAL, before))
            try:
                _imported[name] = import_module(name)
            finally:
                sys.setswitchinterval(before)
        return _imported[name]
