"""The server is as it says: schemathesis sends it what its OpenAPI document allows, and what it does not."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urljoin

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

from moa.core.config import Config
from moa.core.paths import Workspace
from moa.serving.metrics import PATHS, Metrics
from moa.serving.protocol import OPTIONS
from moa.serving.schemas import WITHOUT_EFFECT
from moa.serving.server import build
from moa.serving.state import ServerState, Settings
from tests.integration.serving.test_server import CHAT, Served, first_release, question, serving

KEY = "Bearer sesame"
# 413 counts as a refusal beside those that schemathesis knows: a body that is too large is refused unread, whether or
# not the schema allows what is in it.
SETTINGS = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 413, 415, 429]
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, Config]]:
    """A release on a base whose context holds whatever is asked: no schema knows how many tokens a text has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOA_DTYPE", "float32")
        patch.delenv("MOA_API_KEY", raising=False)
        yield first_release(tmp_path_factory.mktemp("described"), context=1 << 17)


@pytest.fixture(scope="module")
def server(released: tuple[Workspace, Config]) -> Iterator[Served]:
    (released[0].root / "key").write_text("sesame\n")
    with serving(released[0], "--key-file", "key", "--max-tokens", "8", "--max-prompt-tokens", "100000") as served:
        yield served


def answered(server: Served) -> dict[str, float]:
    """How many chat requests had which status so far."""
    counted = server.metrics({"Authorization": KEY})
    return {status: counted.get(f'moa_requests_total{{path="{CHAT}",status="{status}"}}', 0)
            for status in ("200", "400")}


def test_schemathesis_finds_nothing(server: Served, tmp_path: Path) -> None:
    """All its checks on every operation, with a key: at the bounds of each schema, then on so many drawn examples."""
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    before = answered(server)
    done = subprocess.run(
        [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json", "--checks", "all",
         "--header", f"Authorization: {KEY}", "--request-timeout", "120", "--max-examples", "30", "--seed", "1",
         "--no-color", "--generation-database", "none"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=570, env=dict(os.environ))
    assert done.returncode == 0 and "No issues found" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]
    after = answered(server)
    assert all(after[status] - before[status] > 20 for status in after), "questions of both kinds were asked"


def test_the_document_is_as_open_as_the_rest(server: Served) -> None:
    assert server.get("/openapi.json").status_code == 401
    described = server.get("/openapi.json", headers={"Authorization": KEY}).json()
    assert described["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    schemas = described["components"]["schemas"]
    models = server.get("/v1/models", headers={"Authorization": KEY}).json()["data"]
    offered = schemas["ChatRequest"]["properties"]["model"]["enum"]
    assert [model["id"] for model in models] == offered[:len(models)]
    for model in offered[len(models):]:   # as `moa export` calls an expert
        reply = server.post({"messages": question("alpha", 1), "model": model, "max_tokens": 2},
                            headers={"Authorization": KEY})
        assert reply.status_code == 200 and reply.json()["model"] == f"moa/{model.rpartition('-')[0]}"
    assert len(offered) == 2 * len(models) - 2


def application(labels: Sequence[str] = ("a",), key: str | None = None, backend: Any = None) -> FastAPI:
    """The application of a server of these experts, which need not be there for its document."""
    adapters = {f"{label}-0": label for label in labels}
    release = SimpleNamespace(mixture=SimpleNamespace(labels=labels), adapters=adapters)
    return build(ServerState(Settings(key=key, max_tokens=64), cast(Any, SimpleNamespace(now=release)), cast(Any, None),
                             Metrics(), backend))


def test_the_document_has_every_path_and_option() -> None:
    app = application()
    described = app.openapi()
    routes = {(route.path, method.lower()) for route in cast(list[Any], app.routes) for method in route.methods}
    page = {("/docs", "get"), ("/docs/{name}", "get")}
    assert {(path, method) for path, methods in described["paths"].items() for method in methods} == routes - page
    assert {*described["paths"], "/docs"} == set(PATHS)
    question = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert question.keys() == {"messages", "model", "stream", "stream_options", *OPTIONS, *WITHOUT_EFFECT}
    assert len(WITHOUT_EFFECT) == 14 and question["max_tokens"]["anyOf"][0]["maximum"] == 64
    for schema in described["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_the_document_is_the_present_releases() -> None:
    labels = ["a"]
    app = application(labels)
    for names in (["moa", "moa/a", "base", "a-0"], ["moa", "moa/a", "moa/b", "base", "a-0"]):
        assert app.openapi()["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == names
        labels += ["b"]


@pytest.mark.parametrize("key", [True, False])
def test_the_document_asks_for_a_key_and_warns_of_a_backend_where_there_is_one(key: bool) -> None:
    described = json.loads(json.dumps(application(key="x" if key else None, backend=not key).openapi()))
    assert {"502", "4XX"} - described["paths"][CHAT]["post"]["responses"].keys() == ({"502", "4XX"} if key else set())
    for path, methods in described["paths"].items():
        for operation in methods.values():
            guarded = path != "/healthz"
            assert operation.get("security", []) == ([{"bearer": []}] if key and guarded else [])
            assert ("401" in operation["responses"]) == (key and guarded)
            assert ("403" in operation["responses"]) == (not key)


def test_the_page_asks_this_server_alone() -> None:
    """Swagger UI works without the internet: all that its page names is under the page's own address."""
    client = TestClient(application(), base_url="http://127.0.0.1")
    page = client.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    named = re.findall(r"""(?:src|href|url)(?:=|: )["']([^"']+)""", page.text)
    assert "openapi.json" in named and len(named) == 4
    for address in named:
        found = client.get(urljoin("/docs", address))
        assert found.status_code == 200 and len(found.content) > 500
    assert "validatorUrl\": null" in page.text
    assert client.get("/docs/other.js").json()["error"]["code"] == "not_found"


def test_the_page_needs_the_key_too() -> None:
    client = TestClient(application(key="sesame"))
    for path in ("/docs", "/docs/swagger-ui.css", "/openapi.json"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"Authorization": KEY}).status_code == 200
