"""A process that imports moa and uses it keeps its own settings, and may have a running event loop."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moa.api.host import host_kept, outside_event_loop
from moa.core.paths import Workspace
from moa.core.supervisor import SupervisedProcess

SETTINGS = """
import json, logging, os, sys, warnings
logging.getLogger("transformers").setLevel(logging.INFO)
logging.getLogger("mlflow").setLevel(logging.DEBUG)

def settings():
    loggers = logging.root.manager.loggerDict
    levels = {name: loggers[name].level for name in ("transformers", "mlflow", "alembic") if
              isinstance(loggers.get(name), logging.Logger)}
    return {"environment": dict(os.environ), "filters": list(map(repr, warnings.filters)), "levels": levels,
            "root": [logging.root.level, len(logging.root.handlers)], "folder": os.getcwd()}

before = settings()
import moa
heavy = sorted({"torch", "transformers", "mlflow", "dvc", "prefect", "pandas", "pydantic"} & sys.modules.keys())
imported = settings()
"""
USE = """
mixture = moa.load(sys.argv[1], device="cpu")
text = mixture.generate("alpha?", max_new_tokens=2).text
moa.plan(sys.argv[1])
moa.TrainingArguments()
after = settings()
alembic = after["levels"].pop("alembic", 0)
from transformers.utils import logging as library
bars = library.is_progress_bar_enabled()
print(json.dumps({"before": before, "imported": imported, "after": after, "heavy": heavy, "alembic": alembic,
                  "bars": bars}))
"""


def test_importing_and_using_moa_changes_nothing_of_the_process(released: Workspace, tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "MLFLOW_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", SETTINGS + USE, released.root], cwd=tmp_path, env=variables,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)   # and nothing else was printed
    assert facts["heavy"] == [] and facts["imported"] == facts["before"]
    assert facts["after"] == facts["before"]
    assert facts["alembic"] == 0 and facts["bars"]
    assert not list(tmp_path.iterdir())


def test_what_another_call_still_needs_is_restored_at_its_end() -> None:
    inside, leave = threading.Event(), threading.Event()

    def longer() -> None:
        with host_kept():
            inside.set()
            leave.wait()

    other = threading.Thread(target=longer)
    other.start()
    inside.wait()
    with host_kept():
        os.environ["DVC_OF_A_TEST"] = "1"
        os.environ["OF_THE_HOST"] = "1"
    assert os.environ["DVC_OF_A_TEST"] == "1"
    leave.set()
    other.join()
    assert "DVC_OF_A_TEST" not in os.environ and os.environ.pop("OF_THE_HOST") == "1"


def test_work_leaves_a_running_event_loop() -> None:
    async def cell() -> tuple[str, int]:
        return outside_event_loop(lambda: (threading.current_thread().name, asyncio.run(answer())))

    async def answer() -> int:
        return 42

    name, value = asyncio.run(cell())
    assert name.startswith("moa-api") and value == 42
    assert outside_event_loop(threading.current_thread) is threading.current_thread()


def test_an_interrupted_call_ends_what_it_starts() -> None:
    """Also what it starts after the interruption."""
    started, ended = threading.Event(), []

    def work() -> None:
        for _ in range(2):
            process = SupervisedProcess([sys.executable, "-c", "import time; time.sleep(600)"], cwd=Path.cwd(),
                                        env=os.environ)
            started.set()
            ended.append(process.follow(lambda _: None))

    async def cell() -> None:
        outside_event_loop(work)

    def interrupt() -> None:
        started.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    loop = asyncio.new_event_loop()   # asyncio.run would catch the signal, which a notebook's kernel does not
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(cell())
    loop.close()
    assert len(ended) == 2 and 0 not in ended


def test_errors_come_out_of_the_other_thread() -> None:
    async def cell() -> None:
        outside_event_loop(lambda: {}["absent"])

    with pytest.raises(KeyError, match="absent"):
        asyncio.run(cell())
