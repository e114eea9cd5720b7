"""Header lines that differ from those of an earlier request in one value, such as that of `traceparent`."""

from api_gateway.http1.fast_parser import field_name


class VaryingValue:
    """What the header lines of two requests have in common that differ in the value of one line, of field `name`.

    So the lines of a further request need not be parsed if they differ in this value only, as is usual for requests of
    one connection: of one program that is traced, or of a proxy with many clients.
    """

    __slots__ = ("_after", "_before", "_sent_after", "_sent_before", "name")

    def __init__(self, name: bytes, received: tuple[bytes, bytes], sent: tuple[bytes, bytes]) -> None:
        """`received` and `sent` are what stands before and behind the value, as received and as sent upstream."""
        self.name = name
        self._before, self._after = received
        self._sent_before, self._sent_after = sent

    def __repr__(self) -> str:
        return f"<VaryingValue of {self.name!r}>"

    def value_in(self, lines: bytes) -> bytes | None:
        """Return the value in header lines that are the same otherwise; None if they are not, or if it is empty."""
        before, after = self._before, self._after
        start, end = len(before), len(lines) - len(after)
        if start < end and lines.startswith(before) and lines.endswith(after):
            return lines[start:end]
        return None

    def sent_with(self, value: bytes) -> bytes:
        """Return the lines for the upstream with another value."""
        return self._sent_before + value + self._sent_after


def varying_value(earlier: bytes, lines: bytes, sent: bytes) -> VaryingValue | None:
    """Return what two sections of header lines have in common; None unless they differ in the value of one line.

    `sent` is what is sent upstream of `lines`.
    """
    others, own = earlier.split(b"\r\n"), lines.split(b"\r\n")
    if len(others) != len(own):
        return None
    differing, former = b"", b""
    for other, line in zip(others, own, strict=True):
        if other != line:
            if differing:
                return None
            differing, former = line, other
    name = field_name(differing)
    line = b"\r\n%b\r\n" % differing
    if not name or name != field_name(former) or own.count(differing) > 1 or line not in sent:
        return None
    size = len(name) + 4  # with the line break before the name, and what separates it from the value
    start, sent_start, length = lines.index(line) + size, sent.index(line) + size, len(line) - 2 - size
    return VaryingValue(
        name, (lines[:start], lines[start + length :]), (sent[:sent_start], sent[sent_start + length :])
    )
