"""Decisions on retries, circuit breaker policies, concurrency limits and load shedding.

Reads no clock, does not wait, and sends nothing.
"""
