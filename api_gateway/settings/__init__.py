"""Sections of the configuration, the rules between them, and error messages. Creates no runtime objects."""
