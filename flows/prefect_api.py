"""Prefect's API in plain HTTP: importing Prefect would take longer than the requests."""

import base64
import json
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from flows.prefect_settings import setting
from moa.core import loopback
from moa.core.files import read_json
from moa.core.paths import Workspace


@dataclass(frozen=True)
class Api:
    """A Prefect API: its URL, and the credentials for it."""

    url: str
    password: str | None = field(default=None, repr=False)   # as in PREFECT_API_AUTH_STRING: user:password
    key: str | None = field(default=None, repr=False)        # of Prefect Cloud

    def ask(self, path: str, body: Any = None, *, seconds: float = 5.0) -> Any:
        """Send GET, or POST if there is a `body` for JSON, to `path` below the URL, and return the decoded answer.

        An empty answer is None. `seconds` is the timeout. Raises OSError (an HTTPError for an error status) or
        ValueError (an answer that is no JSON).
        """
        content = self._send(path, None if body is None else json.dumps(body).encode(), seconds)
        return json.loads(content) if content else None

    def _send(self, path: str, data: bytes | None, seconds: float) -> bytes:
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", data,   # noqa: S310 - own setting, or ours
                                         {"Content-Type": "application/json", **self._headers()})
        with self._opener().open(request, timeout=seconds) as reply:
            content: bytes = reply.read()
        return content

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
        except HTTPError as error:
            return error.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
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

    def _opener(self) -> urllib.request.OpenerDirector:
        local = urlsplit(self.url).hostname in loopback.HOSTS   # urllib does not match [::1] with NO_PROXY
        return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))


def configured_api() -> Api | None:
    """The API that the user's Prefect settings name, with their password or key; None if they name none."""
    url = setting("PREFECT_API_URL")
    return Api(url, setting("PREFECT_API_AUTH_STRING"), setting("PREFECT_API_KEY")) if url else None


def workspace_api(workspace: Workspace) -> Api | None:
    """The API that serves this workspace: that of `moa up` if it runs, else the configured one; None without either."""
    try:
        url = str(read_json(workspace.up)["api"])
    except (OSError, ValueError, KeyError, TypeError):
        return configured_api()
    with suppress(OSError, ValueError):   # the password file exists as long as moa's own server runs
        return Api(url, workspace.prefect_password.read_text(encoding="utf-8").rstrip("\n"))
    return Api(url, setting("PREFECT_API_AUTH_STRING"), setting("PREFECT_API_KEY"))
