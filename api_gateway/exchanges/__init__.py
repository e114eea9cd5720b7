"""The life of a request in callbacks of the event loop, and the ports of its client's side.

A plain request needs no ASGI call and no task; one that comes by ASGI is served by the same exchange.
"""
