"""This machine's own servers are asked directly, whatever HTTP proxy the user's environment names.

urllib, requests, httpx, websockets and botocore all read these variables, each in its own way. Standard library only.
"""

import os
from collections.abc import Mapping

HOSTS = ("127.0.0.1", "localhost", "::1")   # without brackets: httpx raises InvalidURL for [::1]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy", "socks_proxy")
EXCEPT = "no_proxy"


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set, so that no client with this environment asks a loopback address through a proxy.

    The user's own exceptions stay. Empty where no proxy is named: a lone NO_PROXY makes urllib pass over the proxies
    that macOS or Windows have in their settings.
    """
    if not any(environment.get(form) for name in PROXIES for form in (name, name.upper())):
        return {}
    said = environment.get(EXCEPT) or environment.get(EXCEPT.upper()) or ""   # lower case wins in every client
    hosts = [host for each in said.split(",") if (host := each.strip())]
    # The asterisk excepts every host, and urllib knows it only on its own.
    value = "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, *HOSTS]))
    return {EXCEPT: value, EXCEPT.upper(): value}


def bypass_proxies() -> None:
    """From now on this process, and what inherits its environment, asks loopback addresses without a proxy."""
    os.environ.update(without_proxy(os.environ))
