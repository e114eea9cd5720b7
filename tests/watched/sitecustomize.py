"""Watches the event loop of a gateway that a test runs as a process of its own; Python imports this at its start."""

import os

if "LOOP_WATCH_REPORTS" in os.environ:
    try:
        from tests.loop_watch import watch_for
    except ImportError:  # a Python without the gateway's dependencies
        pass
    else:
        watch_for(os.environ["LOOP_WATCH_REPORTS"])
