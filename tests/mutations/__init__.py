"""Mutations of the code that limits: each changes a decision, and is caught by the tests that it names.

`python -m tests.mutations` applies them one by one to a copy of the working tree, and reports those that survive.
"""
