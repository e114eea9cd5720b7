"""Measurements beside other proxies; each module is a command of its own."""
