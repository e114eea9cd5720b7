"""Snapshots of workers, their merging, Prometheus text and response schemas. Changes no state."""
