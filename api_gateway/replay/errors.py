"""Why a replay is not possible."""


class ReplayError(Exception):
    """The replay cannot be made. The message names the file, or the place in an expression."""
