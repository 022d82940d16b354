"""A released workspace that tests of the API read."""

from collections.abc import Iterator

import pytest

from moa.core.paths import Workspace
from tests import tiny


def _exact(patched: pytest.MonkeyPatch) -> None:
    patched.setenv("MOA_DTYPE", "float32")
    patched.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        _exact(patched)
        yield


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With version 1 as champion. Tests write elsewhere."""
    with pytest.MonkeyPatch.context() as patched:
        _exact(patched)
        return tiny.released(tmp_path_factory.mktemp("api") / "my-experts")
