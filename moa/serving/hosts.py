"""Whether a request's Host is this machine: the defence of a server without a key against DNS rebinding.

A web page may resolve a name of its own to 127.0.0.1, and a browser then sends the page's requests to this server. They
differ from a local client's requests in the Host header alone.
"""

import re
from collections.abc import Iterable
from ipaddress import AddressValueError, IPv4Address, IPv6Address

# Stricter than RFC 9110: no user name, no trailing dot, no zone, no empty port. Local clients send none of these, and
# two parsers may read them differently.
HOST = re.compile(rb"(?:(?P<name>localhost)|(?P<v4>[0-9.]+)|\[(?P<v6>[0-9a-f:.]+)\])(?::(?P<port>[0-9]{1,5}))?",
                  re.IGNORECASE)
MOST_PORT = 65_535


def names_this_machine(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the request has exactly one Host header, and that is `localhost` or a loopback address.

    Args:
        headers: of an ASGI scope, the names in lower case. They are read raw: Starlette's `request.url` puts the
            server's own address in the place of a Host that it cannot parse.

    Returns:
        False for a Host that is missing, comes twice or cannot be parsed. Headers of proxies, such as X-Forwarded-Host,
        do not count: the caller chooses them.
    """
    values = [value for name, value in headers if name == b"host"]
    found = HOST.fullmatch(values[0]) if len(values) == 1 else None
    if found is None or int(found["port"] or 0) > MOST_PORT:
        return False
    try:
        return (found["name"] is not None
                or (found["v4"] is not None and IPv4Address(found["v4"].decode()).is_loopback)
                or (found["v6"] is not None and IPv6Address(found["v6"].decode()).is_loopback))
    except AddressValueError:
        return False
