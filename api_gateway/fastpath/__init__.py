"""Plain requests, served in callbacks of the event loop without an ASGI call or a task.

Decides as the ASGI path does.
"""
