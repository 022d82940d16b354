"""Prefect's API in plain HTTP: importing Prefect would take longer than the requests."""

import base64
import json
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flows.prefect_settings import setting
from moa.core import loopback
from moa.core.files import read_json
from moa.core.paths import Workspace

if TYPE_CHECKING:
    from ssl import SSLContext


class ApiRefusal(OSError):
    """The API answered with the HTTP status `status`, which is that of an error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status


@dataclass(frozen=True)
class Api:
    """A Prefect API: its URL, and the credentials for it."""

    url: str
    password: str | None = field(default=None, repr=False)   # as in PREFECT_API_AUTH_STRING: user:password
    key: str | None = field(default=None, repr=False)        # of Prefect Cloud

    def ask(self, path: str, body: Any = None, *, seconds: float = 5.0) -> Any:
        """Send GET, or POST if there is a `body` for JSON, to `path` below the URL, and return the decoded answer.

        An empty answer is None. `seconds` is the timeout. Raises OSError (an ApiRefusal for an error status) or
        ValueError (an answer that is no JSON, or a URL that is none).
        """
        content = self._send(path, None if body is None else json.dumps(body).encode(), seconds)
        return json.loads(content) if content else None

    def _send(self, path: str, data: bytes | None, seconds: float) -> bytes:
        import ssl

        import httpx  # not at the top: where no API is known, no command needs it

        proxied = urlsplit(self.url).hostname not in loopback.HOSTS   # a proxy cannot reach loopback addresses
        # Certificates take longer to load than a request; a context without them trusts no server.
        plain = not proxied and urlsplit(self.url).scheme == "http"
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else _certificates()
        try:
            with httpx.Client(verify=tls, trust_env=proxied, follow_redirects=True,
                              timeout=seconds) as client:
                reply = client.request("GET" if data is None else "POST", f"{self.url.rstrip('/')}/{path}",
                                       content=data, headers={"Content-Type": "application/json", **self._headers()})
        except httpx.InvalidURL as error:
            raise ValueError(f"{self.url} is no URL: {error}") from error
        except (httpx.HTTPError, ImportError) as error:   # ImportError: for a SOCKS proxy, httpx needs another package
            raise ConnectionError(f"{self.url}: {error}") from error
        if not reply.is_success:
            raise ApiRefusal(reply.status_code)
        return reply.content

    def answers(self) -> bool:
        """Whether the server says that it is healthy, which it does to any client, with or without a password."""
        with suppress(OSError, ValueError):
            self._send("health", None, seconds=3)
            return True
        return False

    def refuses(self) -> bool:
        """Whether the server answers and refuses this password or key."""
        try:
            self.ask("admin/version")
        except ApiRefusal as error:
            return error.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        except (OSError, ValueError):
            pass
        return False

    def environment(self) -> dict[str, str]:
        """Environment variables that make Prefect's own clients use this API, whatever settings files say."""
        settings = {"PREFECT_API_URL": self.url, "PREFECT_API_AUTH_STRING": self.password, "PREFECT_API_KEY": self.key}
        return {name: value for name, value in settings.items() if value}

    def _headers(self) -> dict[str, str]:
        """The password before the key, as in Prefect's own client."""
        if self.password:
            return {"Authorization": f"Basic {base64.b64encode(self.password.encode()).decode()}"}
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@cache
def _certificates() -> "SSLContext":
    """The certificates that HTTPS trusts; SSL_CERT_FILE may name them."""
    import httpx

    return httpx.create_ssl_context()


def configured_api() -> Api | None:
    """The API that the user's Prefect settings name, with their password or key; None if they name none."""
    url = setting("PREFECT_API_URL")
    return Api(url, setting("PREFECT_API_AUTH_STRING"), setting("PREFECT_API_KEY")) if url else None


def refusal(api: Api) -> str:
    """The message for the user where `Api.refuses` is true."""
    return (f"The Prefect server at {api.url} asks for a password or key, and there is none, or a wrong one: set "
            "PREFECT_API_AUTH_STRING (or PREFECT_API_KEY), or unset PREFECT_API_URL to let moa start a server of its "
            "own.")


def workspace_api(workspace: Workspace) -> Api | None:
    """The API that serves this workspace: that of `moa up` if it runs, else the configured one; None without either."""
    try:
        url = str(read_json(workspace.up)["api"])
    except (OSError, ValueError, KeyError, TypeError):
        return configured_api()
    with suppress(OSError, ValueError):   # the password file exists as long as moa's own server runs
        return Api(url, workspace.prefect_password.read_text(encoding="utf-8").rstrip("\n"))
    return Api(url, setting("PREFECT_API_AUTH_STRING"), setting("PREFECT_API_KEY"))
