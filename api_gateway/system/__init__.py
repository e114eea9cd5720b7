"""What the gateway asks of the operating system: clocks, descriptors, memory, sockets, signals, streams, files.

Knows nothing of HTTP.
"""
