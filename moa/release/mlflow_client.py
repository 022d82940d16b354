"""How moa opens MLflow: quietly, once, and with an end to waiting."""

import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moa.core.errors import RegistryError
from moa.core.loopback import bypass_proxies
from moa.core.paths import Workspace

PROBE_SECONDS = 5

# Read by MLflow when it is imported or at each call; what the user has set stays.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",   # MLflow's own seven, each waiting longer, are minutes
}


def uri(workspace: Workspace) -> str:
    """Where the versions are: MLFLOW_TRACKING_URI, or a SQLite database of this workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.mlflow / 'mlflow.db'}"


def shown(address: str) -> str:
    """`address` without the password it may hold."""
    return re.sub(r"://[^/@]*@", "://", address)


def private(workspace: Workspace) -> bool:
    """Whether the versions are in the workspace's own database, which no other project uses."""
    kind, _, path = uri(workspace).partition(":///")
    return kind == "sqlite" and Path(path).resolve() == (workspace.mlflow / "mlflow.db").resolve()


def connect(workspace: Workspace) -> Any:
    """A client, ready for use. Raises RegistryError when no server answers.

    A new database is made by one process while the others wait: MLflow's migrations do not survive company.
    """
    from filelock import FileLock

    address = uri(workspace)
    workspace.mlflow.mkdir(parents=True, exist_ok=True)
    with mlflow_errors(address), FileLock(workspace.mlflow / "open.lock"):
        quiet_mlflow()
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=address, registry_uri=address)
        with _short_of_patience():
            client.search_experiments(max_results=1)
        return client


def load() -> None:
    """Import what `connect` needs, seconds of work, where there is time for it."""
    quiet_mlflow()
    for name in ("mlflow.tracking", "mlflow.artifacts", "mlflow.store.tracking.sqlalchemy_store",
                 "mlflow.store.model_registry.sqlalchemy_store"):
        importlib.import_module(name)


def experiment(workspace: Workspace, client: Any, name: str) -> str:
    """The id of the experiment `name`, made if there is none. Raises RegistryError when it was deleted."""
    from filelock import FileLock

    address = uri(workspace)
    with mlflow_errors(address), FileLock(workspace.mlflow / "open.lock"):
        if (found := client.get_experiment_by_name(name)) is None:
            # A server chooses where its artifacts lie; in a database of ours they lie beside it.
            place = (workspace.mlflow / "artifacts").as_uri() if private(workspace) else None
            return str(client.create_experiment(name, artifact_location=place))
        if found.lifecycle_stage == "deleted":
            raise RegistryError(f"The MLflow experiment {name!r} at {shown(address)} was deleted: "
                                f"run `mlflow experiments restore --experiment-id {found.experiment_id}`.")
        return str(found.experiment_id)


def pages(workspace: Workspace, port: int) -> tuple[list[str], dict[str, str]] | None:
    """The command that shows our database in a browser, and its environment; None when a server shows it already.

    A SQLite database is there, with its tables, before this returns: the server makes them without asking for the lock
    under which `connect` does. Raises RegistryError.
    """
    address = uri(workspace)
    if address.startswith(("http:", "https:")):
        return None
    if address.startswith("sqlite:"):
        connect(workspace)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", address, "--host", "127.0.0.1",
               "--port", str(port), "--workers", "1",
               # For this machine's programs and the server's own pages: not for the local network, which MLflow lets in
               # by default, nor for other sites' pages, whatever the user's environment says for some other server.
               "--allowed-hosts", "localhost,127.0.0.1,localhost:*,127.0.0.1:*",
               "--cors-allowed-origins", f"http://127.0.0.1:{port}"]
    return command, {**ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",   # else ten processes
                     "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false"}


def quiet_mlflow() -> None:
    """No telemetry, no advice, no progress: what matters comes back as a value or an error."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    bypass_proxies()
    for name in ("mlflow", "alembic", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def mlflow_errors(address: str) -> Iterator[None]:
    """Turn what MLflow, its database or the network raise inside into a RegistryError of one sentence."""
    try:
        yield
    except RegistryError:
        raise
    except Exception as error:
        if not _from_outside(error):
            raise
        detail = " ".join(str(error).split())
        if "Max retries exceeded" in detail or "timed out" in detail or "Connection" in detail:
            raise RegistryError(f"No MLflow server answers at {shown(address)}: start it, or unset "
                                "MLFLOW_TRACKING_URI to use this workspace's own database.") from error
        raise RegistryError(f"MLflow at {shown(address)} refused: {shown(detail[:400])}") from error


def _from_outside(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | RequestException | SQLAlchemyError)


@contextmanager
def _short_of_patience() -> Iterator[None]:
    """For the first request only: later ones may be uploads that take their time."""
    wanted = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(PROBE_SECONDS), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def default_uri(address: str) -> Iterator[None]:
    """Make `address` MLflow's own default inside, for the calls that look there whatever their client says.

    Undone afterwards: MLflow writes the default into the environment, where `uri` would take it for the user's wish.
    """
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(address)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def missing(error: Exception) -> bool:
    """Whether MLflow says that what was asked for is not there."""
    return getattr(error, "error_code", "") in {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}
