"""Benchmarks of the gateway and of other proxies; most modules are commands."""
