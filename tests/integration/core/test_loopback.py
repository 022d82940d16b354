"""A user behind an HTTP proxy: this machine's own servers are asked directly, another machine's through the proxy."""

import http.server
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from moa.core.files import read_json
from tests import tiny
from tests.integration.flows.test_up import PARAMS, environment, until


class Proxy(http.server.ThreadingHTTPServer):
    """Records what it is asked for and refuses it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        super().__init__(("127.0.0.1", 0), Refuse)

    @property
    def variables(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {form: url for name in ("http_proxy", "https_proxy", "all_proxy") for form in (name, name.upper())}

    def for_loopback(self) -> list[str]:
        return [line for line in self.seen if "127.0.0.1" in line or "localhost" in line]


class Refuse(http.server.BaseHTTPRequestHandler):
    server: Proxy

    def refuse(self) -> None:
        self.server.seen.append(self.requestline)
        self.send_error(502)

    do_GET = do_POST = do_CONNECT = do_PATCH = do_PUT = refuse

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_loopback_is_asked_directly(proxy: Proxy, tmp_path: Path) -> None:
    workspace = tiny.workspace(tmp_path / "w", (), **PARAMS)
    env = {**environment(), **proxy.variables}
    for name in ("NO_PROXY", "no_proxy"):
        env.pop(name, None)
    subprocess.run(["git", "init", "-q", "."], cwd=workspace.root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=workspace.root, check=True, env=env)

    def moa(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "moa", *words], cwd=workspace.root, env={**env, **more},
                              capture_output=True, text=True)

    process = subprocess.Popen([sys.executable, "-m", "moa", "up", "--no-ui", "--mlflow", "--mlflow-port", "0"],
                               cwd=workspace.root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until(workspace.up.exists, process)   # so its own server was ready
        facts = until(lambda: (found := json.loads(moa("status", "--json").stdout))["scheduled"] and found, process)
        assert facts["prefect"]["answers"]
        pages = str(read_json(workspace.up)["mlflow"])
        until(lambda: moa("release", "list", "--json", MLFLOW_TRACKING_URI=pages).returncode == 0, process)
        assert not proxy.for_loopback()
        proxy.seen.clear()
        away = moa("release", "list", "--json", MLFLOW_TRACKING_URI="http://mlflow.example:5000")
        assert away.returncode and any("mlflow.example" in line for line in proxy.seen)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert not proxy.for_loopback()


RUN = """
from pathlib import Path
from flows import prefect_server
from moa.core.paths import Workspace

with prefect_server.running(Workspace(Path.cwd())) as started:
    started.ready()
    from prefect import flow
    print("FOUND", started.own, flow(lambda: 42, name="answer")())
"""


def test_a_library_user_needs_no_command_line_for_it(proxy: Proxy, tmp_path: Path) -> None:
    env = {**environment(), **proxy.variables, "PREFECT_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "FOUND True 42" in done.stdout, done.stderr[-3000:]
    assert not proxy.for_loopback()
