"""Builders: from a configuration to live objects, and from those to the objects of the next one. Serves nothing."""
