"""Transports for httpx clients that keep to the limits a server states. Independent of the gateway."""
