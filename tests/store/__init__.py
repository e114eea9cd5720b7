"""State outside the process: Redis and Valkey servers, SQLite files."""
