"""Rate limits in a shared store, the limiter for its outages, and the RateLimit header fields. Knows no routes."""
