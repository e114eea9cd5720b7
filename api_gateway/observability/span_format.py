"""Parts of spans in protobuf's wire format: numbers, and the bytes before values that differ in each span."""

_SPAN = b"\x12"  # key of a span in ScopeSpans: 2, bytes
_ATTRIBUTE = b"J"  # key of an attribute in Span: 9, bytes
_TWO_BYTES, _THREE_BYTES = 2**14, 2**21  # the first numbers that need more
_UINT64 = 2**64 - 1
_REMEMBERED_TEXTS, _REMEMBERED_SPANS = 128, 2048  # lengths


def varint(number: int) -> bytes:
    """Return a number in the wire format: seven bits in each byte, the lowest first."""
    if 0 <= number < len(_VARINTS):
        return _VARINTS[number]
    if 0 < number < _TWO_BYTES:
        return bytes((number & 0x7F | 0x80, number >> 7))
    if 0 < number < _THREE_BYTES:
        return bytes((number & 0x7F | 0x80, number >> 7 & 0x7F | 0x80, number >> 14))
    return _long_varint(number & _UINT64)


def _long_varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


_VARINTS = [_long_varint(number) for number in range(1024)]


class SpanHeads(dict[int, bytes]):
    """Key and length of a span, by its length in bytes."""

    def __init__(self) -> None:
        super().__init__((size, self[size]) for size in range(_REMEMBERED_SPANS))

    def __missing__(self, size: int) -> bytes:
        return _SPAN + varint(size)


class TextHeads(dict[int, bytes]):
    """The bytes before a text in the attribute with one name, by the length of the text in bytes.

    The messages are KeyValue (name: 1, bytes; value: 2, bytes) and AnyValue (text: 1, bytes).
    """

    def __init__(self, name: str) -> None:
        self._key = b"\x0a" + varint(len(name)) + name.encode()
        super().__init__((size, self[size]) for size in range(_REMEMBERED_TEXTS))

    def __missing__(self, size: int) -> bytes:
        text = b"\x0a" + varint(size)
        pair = self._key + b"\x12" + varint(len(text) + size) + text
        return _ATTRIBUTE + varint(len(pair) + size) + pair


def heads_of_number(name: str) -> list[bytes]:
    """Return the bytes before a number in the attribute with this name, by the length of the number in bytes.

    The messages are KeyValue (name: 1, bytes; value: 2, bytes) and AnyValue (integer: 3).
    """
    key = b"\x0a" + varint(len(name)) + name.encode()
    return [b"%b%c%b\x12%c\x18" % (_ATTRIBUTE, len(key) + size + 3, key, size + 1) for size in range(11)]
