"""The command `doctor`: checks everything that a start and a request need, and names a remedy for each fault."""
