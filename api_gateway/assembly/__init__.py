"""Builds the runtime objects of a configuration, and changes them for the next one. Handles no requests."""
