"""Upstreams and their targets: balancing, outlier detection, health checks and DNS. Knows no routes or clients."""
