"""Decisions on retries, circuit breaker policies, concurrency limits and load shedding. No clock, no I/O."""
