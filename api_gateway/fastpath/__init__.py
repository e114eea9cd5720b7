"""Plain requests, served in callbacks of the event loop without an ASGI call or a task.

The fast path makes the same decisions as the ASGI path.
"""
