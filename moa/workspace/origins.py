"""Where each file in data/raw/NAME came from, kept in DVC's own data/raw/NAME.dvc, which git has.

DVC keeps what it does not know under `meta`.
"""

import re
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from moa.core.errors import ArtifactError, in_words
from moa.core.files import write_atomic
from moa.core.names import printable
from moa.core.paths import Workspace

# A lone surrogate as YAML escapes it, behind an even number of backslashes: no parser of YAML reads it back. It came
# from a file's name that is no UTF-8, in a time when names were kept as they are.
UNREADABLE = re.compile(rb"(?<!\\)((?:\\\\)*)\\u([Dd][89A-Fa-f][0-9A-Fa-f]{2})")


def origins(workspace: Workspace, name: str) -> dict[str, str]:
    """By file, as far as it was added by a command."""
    path = workspace.tracked(name)
    content = YAML(typ="safe").load(path) if path.exists() else None
    return dict(((content or {}).get("meta") or {}).get("moa") or {})


def note(tracked: Path, new: Mapping[str, str]) -> None:
    """Add the origins of new files to the .dvc file that names them."""
    yaml, out = YAML(), StringIO()
    content = yaml.load(tracked)
    content.setdefault("meta", {}).setdefault("moa", {}).update(
        {file: printable(origin) for file, origin in new.items()})
    if content["meta"]["moa"]:
        yaml.dump(content, out)
        tracked.write_text(out.getvalue(), encoding="utf-8")


def mend(workspace: Workspace) -> list[str]:
    """Rewrite the .dvc files that no parser reads because of an origin that is no text; a sentence for each.

    The caller holds the workspace's lock. Raises OSError.
    """
    said = []
    for path, data in _unreadable(workspace):
        write_atomic(path, UNREADABLE.sub(_shown, data))
        said.append(f"{workspace.relative(path)} held a name that is no UTF-8, which DVC cannot read; it is written "
                    "in another way now.")
    return said


def recover(workspace: Workspace) -> list[str]:
    """`mend`, unless another process works here, which has done it then. Raises ArtifactError when the disk refuses."""
    if not next(_unreadable(workspace), None):
        return []
    from filelock import FileLock, Timeout

    try:
        with FileLock(workspace.lock, timeout=0):
            return mend(workspace)
    except Timeout:
        return []
    except OSError as error:
        raise ArtifactError(f"A .dvc file in data/raw that DVC cannot read could not be rewritten: {in_words(error)}; "
                            "mend that and run the command again.") from error


def _unreadable(workspace: Workspace) -> Iterator[tuple[Path, bytes]]:
    """The .dvc files with such a name, and what is in them."""
    for path in sorted((workspace.data / "raw").glob("*.dvc")):
        if UNREADABLE.search(data := path.read_bytes()):
            yield path, data


def _shown(found: re.Match[bytes]) -> bytes:
    r"""The escape of a surrogate as `moa.core.names` writes it: `\\xe9` inside double quotes reads as `\xe9`."""
    return found[1] + printable(chr(int(found[2], 16))).replace("\\", "\\\\").encode("ascii")
