"""The sections of the configuration, their rules, and the messages about mistakes. Builds nothing that lives."""
