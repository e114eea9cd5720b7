"""Upstreams and targets: load balancing, outlier detection, health checks and DNS. No routes or clients here."""
