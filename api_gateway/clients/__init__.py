"""Clients and their tiers: identification, registry, cache and stores. Enforces no limits."""
