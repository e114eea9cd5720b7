"""Reading IP addresses, the same everywhere: without zones, and IPv4-mapped IPv6 addresses as IPv4. Pure."""

from ipaddress import IPv4Address, IPv6Address, ip_address


def parse_address(text: str) -> IPv4Address | IPv6Address:
    """Return an address without its zone; an IPv4-mapped IPv6 address as IPv4. Raises ValueError for other text."""
    return unmapped(ip_address(text.partition("%")[0]))


def unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Return the IPv4 address for an IPv4-mapped IPv6 address, any other address as it is."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def is_address(text: str, version: int | None = None) -> bool:
    """Return whether a text is an IP address, perhaps with a zone; of this version, if one is given."""
    try:
        found = ip_address(text)
    except ValueError:
        return False
    return version in (None, found.version)
