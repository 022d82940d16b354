"""Connects to MLflow without its log output, with time limits, and with its errors turned into RegistryError."""

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

PROBE_SECONDS = 5   # timeout of the first request, which shows whether a server answers

# MLflow reads these when it is imported or at each call. Values that the user has set stay.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",   # MLflow's default of 7, with growing pauses, takes minutes
}


def uri(workspace: Workspace) -> str:
    """The address of the MLflow registry: MLFLOW_TRACKING_URI, or else the workspace's own SQLite database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.mlflow / 'mlflow.db'}"


def shown(address: str) -> str:
    """`address` without the password it may hold."""
    return re.sub(r"://[^/@]*@", "://", address)


def private(workspace: Workspace) -> bool:
    """Whether the registry is the workspace's own SQLite database, which no other project uses."""
    kind, _, path = uri(workspace).partition(":///")
    return kind == "sqlite" and Path(path).resolve() == (workspace.mlflow / "mlflow.db").resolve()


def connect(workspace: Workspace) -> Any:
    """An `MlflowClient` that has reached its server. Raises RegistryError when no server answers.

    A lock lets one process at a time create the database: MLflow's migrations fail when two processes run them.
    """
    from filelock import FileLock

    address = uri(workspace)
    workspace.mlflow.mkdir(parents=True, exist_ok=True)
    with mlflow_errors(address), FileLock(workspace.mlflow / "open.lock"):
        quiet_mlflow()
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=address, registry_uri=address)
        with _short_timeout():
            client.search_experiments(max_results=1)
        return client


def load() -> None:
    """Import MLflow's modules ahead of `connect`: the import takes seconds, which a caller may spend while it waits."""
    quiet_mlflow()
    for name in ("mlflow.tracking", "mlflow.artifacts", "mlflow.store.tracking.sqlalchemy_store",
                 "mlflow.store.model_registry.sqlalchemy_store"):
        importlib.import_module(name)


def experiment(workspace: Workspace, client: Any, name: str) -> str:
    """The id of the MLflow experiment `name`, which is created if it is missing. Raises RegistryError if deleted."""
    from filelock import FileLock

    address = uri(workspace)
    with mlflow_errors(address), FileLock(workspace.mlflow / "open.lock"):
        if (existing := client.get_experiment_by_name(name)) is None:
            # A server chooses its artifact location; the workspace's own database keeps artifacts beside it.
            location = (workspace.mlflow / "artifacts").as_uri() if private(workspace) else None
            return str(client.create_experiment(name, artifact_location=location))
        if existing.lifecycle_stage == "deleted":
            raise RegistryError(f"The MLflow experiment {name!r} at {shown(address)} was deleted: "
                                f"run `mlflow experiments restore --experiment-id {existing.experiment_id}`.")
        return str(existing.experiment_id)


def pages(workspace: Workspace, port: int) -> tuple[list[str], dict[str, str]] | None:
    """The command of the MLflow server that shows the registry's pages at `port`, and its environment variables.

    Returns None where the registry is a server, which has pages of its own. A SQLite database and its tables are
    created before this returns, because the MLflow server would create them without the lock that `connect` takes.
    Raises RegistryError.
    """
    address = uri(workspace)
    if address.startswith(("http:", "https:")):
        return None
    if address.startswith("sqlite:"):
        connect(workspace)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", address, "--host", "127.0.0.1",
               "--port", str(port), "--workers", "1",
               # Allow programs on this machine and the server's own pages only. By default MLflow also admits the local
               # network, and the user's environment may admit other sites' pages, for another server.
               "--allowed-hosts", "localhost,127.0.0.1,localhost:*,127.0.0.1:*",
               "--cors-allowed-origins", f"http://127.0.0.1:{port}"]
    return command, {**ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",   # it would start ten processes
                     "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false"}


def quiet_mlflow() -> None:
    """Switch off MLflow's telemetry, log output and progress bars for this process; set no variable that is set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    bypass_proxies()
    for name in ("mlflow", "alembic", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def mlflow_errors(address: str) -> Iterator[None]:
    """Turn errors of MLflow, its database or the network within the block into a RegistryError of one sentence."""
    try:
        yield
    except RegistryError:
        raise
    except Exception as error:
        if not _is_mlflow_error(error):
            raise
        if _unanswered(error):
            raise RegistryError(f"No MLflow server answers at {shown(address)}: start it, or unset "
                                "MLFLOW_TRACKING_URI to use this workspace's own database.") from error
        detail = " ".join(str(error).split())[:400]
        raise RegistryError(f"MLflow at {shown(address)} refused: {shown(detail)}") from error


def _is_mlflow_error(error: Exception) -> bool:
    """Whether MLflow, its HTTP client or its database raised `error`."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | RequestException | SQLAlchemyError)


def _unanswered(error: BaseException) -> bool:
    """Whether no server answered: an HTTP client or a database driver failed to connect, or waited in vain.

    MLflow raises an exception of its own while it handles the client's, so that one is in the chain.
    """
    from requests import exceptions as http
    from sqlalchemy.exc import OperationalError

    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, http.ConnectionError | http.RetryError | http.Timeout | ConnectionError | TimeoutError):
            return True
        # Without a statement it was connecting that failed. SQLite, whose errors have a code, connects to no server.
        if (isinstance(chain, OperationalError) and chain.statement is None
                and not hasattr(chain.orig, "sqlite_errorcode")):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


@contextmanager
def _short_timeout() -> Iterator[None]:
    """Shorten MLflow's timeout and retries within the block, for the first request: later ones may be long uploads."""
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
    """Make `address` MLflow's global default within the block, for its functions that ignore the client's address.

    The default is reset afterwards: MLflow writes it into MLFLOW_TRACKING_URI, where `uri` would read it as set by the
    user.
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
    """Whether an error of MLflow means that the requested entity does not exist."""
    return getattr(error, "error_code", "") in {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}
