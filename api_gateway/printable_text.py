"""Text of clients and upstreams as a terminal may show it."""


def printable(text: str) -> str:
    """Return the text with what is not printable (line breaks, escape sequences) in the form of Python's escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
