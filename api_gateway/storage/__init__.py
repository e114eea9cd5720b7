"""Access to a Redis or Valkey server, and the embedded server. Independent of the stored data."""
