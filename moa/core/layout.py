"""The layout of a workspace: a number for how its files are named and written, which a newer moa may raise.

Two places hold it, because a workspace has two kinds of files:

    params.yaml     `format: N` is the layout of the files in git; clones share it. Without the key it is 0.
    .moa/format     the layout of this machine's own files. A clone has none until its first change.

Every command checks the layout, so this module imports little.
"""

import re
from contextlib import suppress
from pathlib import Path

from moa import __version__
from moa.core.errors import ConfigError
from moa.core.files import write_atomic

OLDEST, LAYOUT = 0, 1   # the range of layouts that this moa reads; it writes LAYOUT
# The key `format` of params.yaml. It is matched as text, because parsing YAML would slow every command down.
TRACKED = re.compile(r"""^(["']?)format\1[ \t]*:[ \t]+(\d+)[ \t]*(?:#.*)?$""", re.MULTILINE)


def check_layout(root: Path) -> None:
    """Check that this moa knows the layout of the workspace at `root`.

    Raises:
        ConfigError: a newer moa made the workspace, or `.moa/format` holds no number.
    """
    for place, number in (("params.yaml", tracked_layout(root)), (".moa/format", local_layout(root))):
        if number is not None and number > LAYOUT:
            raise ConfigError(f"This workspace has layout {number} ({place}), which a newer moa made, and moa "
                              f"{__version__} reads layouts {OLDEST} to {LAYOUT}: run `pip install -U moa-lora` and "
                              "the command again.")


def tracked_layout(root: Path) -> int | None:
    """The layout of the files in git; None where params.yaml has no key `format` or cannot be read."""
    with suppress(OSError, UnicodeDecodeError):   # loading the configuration reports what is wrong with params.yaml
        if match := TRACKED.search((root / "params.yaml").read_text(encoding="utf-8")):
            return int(match[2])
    return None


def local_layout(root: Path) -> int | None:
    """The layout of `.moa/`; None where no moa that knows layouts has changed the workspace yet.

    Raises ConfigError where `.moa/format` holds no number.
    """
    try:
        text = _path(root).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(f".moa/format should hold the number of the workspace's layout, and holds {text[:20]!r}: "
                          "delete the file, and the next change writes it.")
    return int(text)


def write_local_layout(root: Path) -> None:
    """Write `.moa/format` unless it exists. Without the file, `.moa/` has layout 0, which differs in nothing else."""
    if not _path(root).exists():
        write_atomic(_path(root), f"{LAYOUT}\n".encode())


def _path(root: Path) -> Path:
    return root / ".moa" / "format"
