"""Environment variables that keep requests to loopback addresses away from the user's HTTP proxy.

moa's own servers listen on loopback addresses, which a proxy cannot reach. urllib, requests, httpx, websockets and
botocore all read these variables, each in its own way. This module imports the standard library only.
"""

import os
from collections.abc import Mapping

HOSTS = ("127.0.0.1", "localhost", "::1")   # without brackets: httpx raises InvalidURL for [::1]
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy", "socks_proxy")
NO_PROXY = "no_proxy"   # lists the hosts that are asked without a proxy


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Values of no_proxy and NO_PROXY that add the loopback addresses to those which `environment` excludes already.

    The result is empty where `environment` names no proxy: a lone NO_PROXY makes urllib ignore the proxies in the
    settings of macOS or Windows.
    """
    if not any(environment.get(variable) for name in PROXY_VARIABLES for variable in (name, name.upper())):
        return {}
    # Where both variables are set, every client uses the one in lower case.
    excluded = environment.get(NO_PROXY) or environment.get(NO_PROXY.upper()) or ""
    hosts = [host for part in excluded.split(",") if (host := part.strip())]
    # An asterisk excludes every host, and urllib recognises it only when it stands alone.
    value = "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, *HOSTS]))
    return {NO_PROXY: value, NO_PROXY.upper(): value}


def bypass_proxies() -> None:
    """Make this process, and the children that inherit its environment, ask loopback addresses without a proxy."""
    os.environ.update(without_proxy(os.environ))
