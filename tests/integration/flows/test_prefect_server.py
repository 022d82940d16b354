"""The servers of `moa up`: what a web page that the owner visits can do (nothing), and what the owner can."""

import asyncio
import contextlib
import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import websockets

from flows.sensor import send_arrival_event
from moa.core.files import read_json
from moa.core.paths import Workspace
from tests import tiny
from tests.integration.flows.test_up import PARAMS, environment, told, until

FOREIGN = ("https://evil.example", "null", "http://localhost:1", "http://127.0.0.1.evil.example")
# What a user may have set for another server, and moa's own must not take over.
ELSEWHERE = {"MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "*",
             "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "*"}


@dataclass
class Up:
    workspace: Workspace
    process: "subprocess.Popen[str]"
    out: Path

    @property
    def api(self) -> str:
        return str(read_json(self.workspace.up)["api"])

    @property
    def password(self) -> str:
        with contextlib.suppress(OSError):
            return (self.workspace.local / "prefect-password").read_text().strip()
        return ""

    def ask(self, method: str, path: str, *, known: bool = True, **how: Any) -> httpx.Response:
        """A request to Prefect's API, by default of a client that has the password."""
        user, _, word = self.password.partition(":")
        with httpx.Client(trust_env=False, timeout=60, auth=(user, word) if known else None) as client:
            return client.request(method, f"{self.api}/{path}", **how)

    def deployment(self) -> dict[str, Any]:
        known: list[dict[str, Any]] = self.ask("POST", "deployments/filter", json={}).json()
        return next(each for each in known if each["entrypoint"].endswith(".adapt"))


@contextlib.contextmanager
def keeping_current(root: Path) -> Iterator[Up]:
    """`moa up` in a new workspace at `root`, with MLflow's pages, once it has deployed its flows."""
    workspace = tiny.workspace(root, (), **PARAMS)
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True, env=environment())
    out = root.parent / "out.txt"
    with out.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "moa", "up", "--mlflow", "--mlflow-port", "0"], cwd=root,
                                   env={**environment(), **ELSEWHERE}, text=True, stdout=file, stderr=file)
    started = Up(workspace, process, out)
    try:
        until(lambda: "Ctrl-C ends everything" in out.read_text(), process)
        until(lambda: len(started.ask("POST", "deployments/filter", json={}).json()) == 3, process)
        yield started
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with keeping_current(tmp_path_factory.mktemp("guarded") / "w") as started:
        yield started


def refused(reply: httpx.Response) -> bool:
    return reply.status_code in (400, 401, 403) and "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("known", [False, True])
def test_a_page_of_another_site_is_refused(up: Up, origin: str, known: bool) -> None:
    """Whether or not it guessed the password: the preflight, and what needs none."""
    path = f"deployments/{up.deployment()['id']}"
    preflight = {"Origin": origin, "Access-Control-Request-Method": "PATCH",
                 "Access-Control-Request-Headers": "content-type,authorization"}
    assert refused(up.ask("OPTIONS", path, known=known, headers=preflight))
    simple = {"Origin": origin, "Content-Type": "text/plain"}
    body = json.dumps({"name": "by a page"}).encode()
    for method, where in (("PATCH", path), ("POST", f"{path}/create_flow_run"), ("POST", "deployments/filter"),
                          ("GET", path), ("GET", "health")):
        assert refused(up.ask(method, where, known=known, headers=simple, content=body)), (method, where)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])   # the second: another port of localhost
def test_a_page_of_another_site_may_link_to_it_and_not_embed_it(up: Up, site: str) -> None:
    for kind in ("iframe", "image", "script", "empty"):
        assert refused(up.ask("GET", "../", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Dest": kind})), kind
    assert up.ask("GET", "../ui-settings", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Dest": "document"}).is_success


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "",
                                  "localhost@evil.example", "192.168.1.5:{port}"])
@pytest.mark.parametrize("known", [False, True])
def test_a_name_that_was_pointed_at_this_machine_is_refused(up: Up, host: str, known: bool) -> None:
    host = host.format(port=urlsplit(up.api).port)
    assert refused(up.ask("POST", "deployments/filter", known=known, headers={"Host": host}, json={}))
    for path in ("health", "../", "../ui-settings"):
        assert refused(up.ask("GET", path, known=known, headers={"Host": host})), path


def test_without_the_password_no_command_is_planted(up: Up, tmp_path: Path) -> None:
    """The attack as it worked: pull steps of a deployment are commands that its next run executes."""
    before, planted = up.deployment(), tmp_path / "planted"
    steps = [{"prefect.deployments.steps.run_shell_script": {"script": f"touch {planted}"}}]
    change = up.ask("PATCH", f"deployments/{before['id']}", known=False, json={"pull_steps": steps})
    run = up.ask("POST", f"deployments/{before['id']}/create_flow_run", known=False, json={"name": "planted"})
    assert (change.status_code, run.status_code) == (401, 401)
    assert up.deployment()["pull_steps"] == before["pull_steps"]
    assert not up.ask("POST", "flow_runs/filter", json={"flow_runs": {"name": {"any_": ["planted"]}}}).json()


def test_websockets_are_guarded_too(up: Up) -> None:
    address = f"{up.api.replace('http:', 'ws:')}/events/in"

    async def open_with(origin: str | None, password: str) -> str:
        async with websockets.connect(address, subprotocols=[websockets.Subprotocol("prefect")], proxy=None,
                                      origin=websockets.Origin(origin) if origin else None) as socket:
            await socket.send(json.dumps({"type": "auth", "token": password}))
            said: str = json.loads(await socket.recv())["type"]
            return said

    for origin in FOREIGN:
        with pytest.raises(websockets.InvalidStatus):
            asyncio.run(open_with(origin, up.password))
    with pytest.raises(websockets.ConnectionClosed):
        asyncio.run(open_with(None, "moa:guess"))
    own = up.api.removesuffix("/api")
    assert [asyncio.run(open_with(origin, up.password)) for origin in (None, own)] == ["auth_success"] * 2


def test_the_owner_is_let_in(up: Up) -> None:
    """With the password: a program, the server's own pages, and those pages through a tunnel with another port."""
    own = up.api.removesuffix("/api")
    assert up.ask("POST", "deployments/filter", json={}).status_code == 200
    for host in (urlsplit(own).netloc, "localhost:4200"):
        reply = up.ask("POST", "deployments/filter", json={}, headers={"Host": host, "Origin": f"http://{host}"})
        assert reply.status_code == 200 and len(reply.json()) == 3
    page = httpx.get(own, trust_env=False, follow_redirects=True, headers={"Accept": "text/html"})
    assert page.status_code == 200 and "<html" in page.text
    shown = httpx.get(f"{own}/ui-settings", trust_env=False).json()
    assert (shown["auth"], shown["api_url"]) == ("BASIC", "/api")   # they ask for it, and send it to their own server


def test_only_the_owner_can_read_the_password(up: Up) -> None:
    said = up.out.read_text()
    assert f"Prefect   {up.api.removesuffix('/api')}   (password: in .moa/prefect-password)" in said
    assert stat.S_IMODE(up.workspace.prefect_password.stat().st_mode) == 0o600
    word = up.password.partition(":")[2]
    assert len(word) >= 32 and word not in said
    family = [psutil.Process(up.process.pid), *psutil.Process(up.process.pid).children(recursive=True)]
    assert not [each for each in family if any(word in argument for argument in each.cmdline())]
    holding = [path for path in up.workspace.root.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]
    assert holding == [up.workspace.prefect_password]


def test_other_commands_of_the_owner_know_it(up: Up) -> None:
    said = subprocess.run([sys.executable, "-m", "moa", "status", "--json"], cwd=up.workspace.root, check=True,
                          env=environment(), capture_output=True, text=True).stdout
    facts = json.loads(said)
    assert facts["prefect"]["answers"] and {each["flow"] for each in facts["scheduled"]} >= {"retrain"}
    assert up.password.partition(":")[2] not in said and facts["prefect"]["password"] == ".moa/prefect-password"
    # and the run that it sets off asks the server in a process of its own
    assert send_arrival_event(up.workspace, ["elsewhere"])
    until(lambda: told(up.workspace, "skipped", trigger="rows of elsewhere arrived"), up.process)


def test_a_configured_server_that_refuses_is_one_sentence(up: Up) -> None:
    done = subprocess.run([sys.executable, "-m", "moa", "adapt"], cwd=up.workspace.root, capture_output=True, text=True,
                          env={**environment(), "PREFECT_API_URL": up.api, "PREFECT_API_AUTH_STRING": "moa:wrong"})
    assert done.returncode == 1 and done.stderr.startswith(f"moa: The Prefect server at {up.api} asks for a password")
    assert len(done.stderr.splitlines()) == 1


def test_mlflows_pages_are_for_this_machine(up: Up) -> None:
    url = str(read_json(up.workspace.up)["mlflow"])
    port = urlsplit(url).port
    search, make = f"{url}/api/2.0/mlflow/experiments/search", f"{url}/api/2.0/mlflow/experiments/create"

    def post(where: str, **headers: str) -> httpx.Response:
        body = {"name": "by a page", "max_results": 100}
        return httpx.post(where, json=body, headers=headers, trust_env=False, timeout=60)

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}/health", trust_env=False).status_code == 200
        return False

    until(answers, up.process)
    for origin in ("https://evil.example", "null"):
        assert refused(post(make, Origin=origin))
        seen = httpx.get(search, headers={"Origin": origin}, trust_env=False, timeout=60)
        assert "access-control-allow-origin" not in seen.headers
    for host in ("evil.example", f"evil.example:{port}", f"192.168.1.5:{port}", f"10.0.0.1:{port}"):
        assert refused(post(make, Host=host)), host
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        reply = post(search, Host=host, Origin=f"http://{host}")
        assert reply.status_code == 200 and "by a page" not in [each["name"] for each in reply.json()["experiments"]]


def test_it_ends_with_the_server(tmp_path: Path) -> None:
    with keeping_current(tmp_path / "w") as up:   # one of its own: the other tests need theirs
        assert up.password
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(120) == 0, up.out.read_text()
    assert not up.workspace.prefect_password.exists() and "Traceback" not in up.out.read_text()


RUN = """
import sys
from pathlib import Path
from flows import prefect_server
from moa.core.paths import Workspace

def main():
    with prefect_server.running(Workspace(Path.cwd())) as started:
        url = started.ready()
        import httpx
        from prefect import flow

        @flow
        def double(number: int) -> int:
            return 2 * number

        with httpx.Client(trust_env=False) as client:
            codes = [client.post(f"{url}/flows/filter", json={}, auth=pair).status_code
                     for pair in (("anna", "own word"), ("moa", "guess"), None)]
        print("FOUND", started.own, double(21), *codes)

main()
"""
WORDS = "anna:own word"
SOURCES = {
    "environment": {},
    ".env": {".env": f"PREFECT_SERVER_API_AUTH_STRING='{WORDS}'\nPREFECT_API_AUTH_STRING='for:another server'\n"},
    "prefect.toml": {"prefect.toml": f'[server.api]\nauth_string = "{WORDS}"\n[api]\nauth_string = "for:another"\n'},
    "pyproject.toml": {"pyproject.toml": f'[tool.prefect]\nserver.api.auth_string = "{WORDS}"\n'},
    "profile": {"home/profiles.toml": f'active = "mine"\n[profiles.mine]\nPREFECT_SERVER_API_AUTH_STRING="{WORDS}"\n'},
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_password_of_the_users_own_is_the_servers(tmp_path: Path, source: str) -> None:
    """Wherever Prefect reads it, moa's own server asks for it and moa's own clients know it, whatever they are told."""
    env = {**environment(), "PREFECT_HOME": str(tmp_path / "home")}
    if source == "environment":
        env |= {"PREFECT_SERVER_API_AUTH_STRING": WORDS}
    (tmp_path / "home").mkdir()
    for name, text in SOURCES[source].items():
        (tmp_path / name).write_text(text)
    (tmp_path / "double.py").write_text(RUN)
    done = subprocess.run([sys.executable, "double.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FOUND True 42 200 401 401" in done.stdout, done.stderr[-3000:]
    assert "401" not in done.stderr and "Traceback" not in done.stderr
