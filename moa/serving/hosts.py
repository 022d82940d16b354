"""Checks that a request's Host header names this machine, to protect a server without a key from DNS rebinding.

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
        headers: raw headers of an ASGI scope, names in lower case. Starlette's `request.url` would not do: it
            replaces a Host that it cannot parse with the server's own address.

    Returns:
        False for a Host that is missing, comes twice or cannot be parsed. Headers of proxies, such as X-Forwarded-Host,
        do not count: the caller chooses them.
    """
    values = [value for name, value in headers if name == b"host"]
    host = HOST.fullmatch(values[0]) if len(values) == 1 else None
    if host is None or int(host["port"] or 0) > MOST_PORT:
        return False
    try:
        return (host["name"] is not None
                or (host["v4"] is not None and IPv4Address(host["v4"].decode()).is_loopback)
                or (host["v6"] is not None and IPv6Address(host["v6"].decode()).is_loopback))
    except AddressValueError:
        return False
