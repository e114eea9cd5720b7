"""Reloading the configuration: reading, comparing, serialising, outcomes. Creates no runtime objects."""
