"""What is said to HTTP clients about proxies, and what the real ones make of it."""

import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from moa.core.loopback import without_proxy

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(("given", "value"), [
    ({}, None),
    ({"NO_PROXY": "corp.example"}, None),
    ({"http_proxy": ""}, None),
    ({"HTTP_PROXY": PROXY}, "127.0.0.1,localhost,::1"),
    ({"https_proxy": PROXY, "NO_PROXY": "corp.example, localhost"}, "corp.example,localhost,127.0.0.1,::1"),
    ({"ALL_PROXY": PROXY, "no_proxy": "lower.example", "NO_PROXY": "upper.example"},
     "lower.example,127.0.0.1,localhost,::1"),
    ({"all_proxy": PROXY, "NO_PROXY": "corp.example,*"}, "*"),
])
def test_what_is_set(given: dict[str, str], value: str | None) -> None:
    assert without_proxy(given) == ({} if value is None else {"no_proxy": value, "NO_PROXY": value})


CLIENTS = """
import os, sys, urllib.request
from urllib.parse import urlsplit
import httpx, requests
from moa.core.loopback import bypass_proxies
bypass_proxies()
for url in sys.argv[1:]:
    chosen = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    pool = httpx.Client()._transport_for_url(httpx.URL(url))._pool
    bypassed = bool(urllib.request.proxy_bypass(urlsplit(url).netloc))
    print(bypassed, chosen is None, type(pool).__name__ == "ConnectionPool")
"""


@pytest.mark.parametrize("given", [{"HTTP_PROXY": PROXY}, {"http_proxy": PROXY, "NO_PROXY": "a.example"},
                                   {"ALL_PROXY": PROXY, "HTTP_PROXY": PROXY, "no_proxy": "a.example"}])
def test_urllib_requests_and_httpx_understand_it(given: dict[str, str]) -> None:
    urls = ["http://127.0.0.1:4200/api", "http://localhost:5000", "http://mlflow.example:5000", "http://127.0.0.1.example"]
    said = subprocess.run([sys.executable, "-c", CLIENTS, *urls], env={"PATH": "/bin:/usr/bin", **given},
                          capture_output=True, text=True, check=True).stdout.splitlines()
    own = [urlsplit(url).hostname in ("127.0.0.1", "localhost") for url in urls]
    assert said == [f"{each} {each} {each}" for each in own]
