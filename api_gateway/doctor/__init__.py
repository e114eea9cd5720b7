"""The command `doctor`: tries everything that a start and a request need, and names what to do about each fault."""
