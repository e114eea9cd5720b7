"""Observes a gateway that a test runs as a process: its coverage, its event loop. Python imports this at its start."""

import os

if "LOOP_WATCH_REPORTS" in os.environ:
    try:
        from tests.loop_watch import watch_for
        from tests.measured import VARIABLE, measure_event_loop_into
    except ImportError:  # a Python without the gateway's dependencies
        pass
    else:
        measure_event_loop_into(os.environ.get(VARIABLE))
        watch_for(os.environ["LOOP_WATCH_REPORTS"])
