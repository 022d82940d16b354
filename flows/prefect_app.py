"""`python -m flows.prefect_app PORT`: Prefect's server on loopback, for this machine's programs and its own pages.

A page of another site must not reach the server through its owner's browser. Prefect itself checks the password
(PREFECT_SERVER_API_AUTH_STRING) alone; host and origin are checked here, before a request gets to Prefect.
"""

import re
import sys

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

HOST = "127.0.0.1"
# Any port, because an SSH tunnel from another machine has a port of its own.
OWN = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")

REFUSAL = "Only this machine's own programs and this server's own pages are answered."


class OwnPages:
    """ASGI middleware that refuses requests whose host is not loopback, and those of other sites' pages, with 403.

    The Host header is checked because a site may point a name of its own at 127.0.0.1 (DNS rebinding); Origin because
    browsers send requests, and open websockets, across sites; Sec-Fetch-Site because browsers send no Origin with a
    frame or an image. A link to this server's pages still works. Programs send none of these headers but Host.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _own(Headers(scope=scope)):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse(REFUSAL, 403)(scope, receive, send)


def _own(headers: Headers) -> bool:
    """Whether a request is for loopback and not from another site's page."""
    hosts = [host.lower() for host in headers.getlist("host")]
    if len(hosts) != 1 or not OWN.fullmatch(hosts[0]):
        return False
    followed = headers.get("sec-fetch-dest") == "document"   # a link, or an address that the owner typed
    embedded = headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed
    return not embedded and all(origin.lower() == f"http://{hosts[0]}" for origin in headers.getlist("origin"))


def main(port: int) -> None:
    """Run Prefect's server on loopback behind `OwnPages`, with the settings that `prefect server start` uses."""
    import uvicorn

    from flows.prefect_server import application

    app, server = application()
    uvicorn.run(OwnPages(app), host=HOST, port=port, log_level=server.logging_level.lower(),
                timeout_keep_alive=server.api.keepalive_timeout, ws_ping_interval=server.api.websocket_ping_interval,
                ws_ping_timeout=server.api.websocket_ping_timeout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
