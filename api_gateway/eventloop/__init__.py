"""Timers, tasks, lag and pacing on the asyncio event loop. Independent of HTTP and of the gateway."""
