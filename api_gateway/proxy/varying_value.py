"""Header lines that differ from those of an earlier request in one value, such as that of `traceparent`."""

from api_gateway.http1.fast_parser import field_name


class VaryingValue:
    """The position of the one value, of field `name`, in which header lines differ from those of the request before.

    So the lines of a further request need not be parsed if they differ in this value only, as is usual for requests of
    one connection: of one program that is traced, or of a proxy with many clients. Offsets, because connections would
    otherwise hold their lines twice.
    """

    __slots__ = ("_left", "_sent_left", "_sent_start", "_start", "name")

    def __init__(self, name: bytes, received: tuple[int, int], sent: tuple[int, int]) -> None:
        """`received` and `sent` are the bytes before and behind the value, as received and as sent upstream."""
        self.name = name
        self._start, self._left = received
        self._sent_start, self._sent_left = sent

    def __repr__(self) -> str:
        return f"<VaryingValue of {self.name!r}>"

    def value_in(self, lines: bytes, earlier: bytes) -> bytes | None:
        """Return the value in header lines that equal earlier ones otherwise; None if not, or if it is empty."""
        start, end = self._start, len(lines) - self._left
        if start < end and lines.startswith(earlier[:start]) and lines.endswith(earlier[len(earlier) - self._left :]):
            return lines[start:end]
        return None

    def sent_with(self, value: bytes, earlier: bytes) -> bytes:
        """Return earlier lines for the upstream with another value."""
        return earlier[: self._sent_start] + value + earlier[len(earlier) - self._sent_left :]


def varying_value(earlier: bytes, lines: bytes, sent: bytes) -> VaryingValue | None:
    """Return where two sections of header lines differ; None unless they differ in the value of one line.

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
    at, sent_at, size = lines.index(line), sent.index(line), len(line) - 2  # without the line break behind it
    before = len(name) + 4  # with the line break before the name, and what separates it from the value
    return VaryingValue(name, (at + before, len(lines) - at - size), (sent_at + before, len(sent) - sent_at - size))
