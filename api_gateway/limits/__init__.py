"""Rate limits in a shared store, the fallback limiter, and RateLimit header fields. Independent of routes."""
