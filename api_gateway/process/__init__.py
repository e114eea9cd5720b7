"""The processes of a gateway: server, supervisor, workers, listeners, signals. Handles no request itself."""
