"""Reloading the configuration: reading, comparing, handing over, outcome. Builds nothing that lives."""
