"""Real peers: programs of others, each started by its test. `make interop`; needs the extra `interop`."""
