"""Replays access logs under other limits, by the real admission and limiter. Serves no requests."""
