"""What is kept elsewhere: Redis and Valkey servers, SQLite files."""
