"""Snapshots of a worker, their merging across workers, Prometheus text and response schemas. Changes nothing."""
