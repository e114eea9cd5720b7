"""Timers, tasks, lag and pacing on the asyncio event loop. Knows nothing of HTTP or of the gateway."""
