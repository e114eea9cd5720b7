"""The Redis session and the embedded server. Knows how to reach a store, not what is stored."""
