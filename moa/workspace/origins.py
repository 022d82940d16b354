"""The original name of each file in data/raw/NAME, stored in DVC's own file data/raw/NAME.dvc.

DVC preserves the key `meta` of a .dvc file, and git versions the file.
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

# A lone surrogate as YAML escapes it, after an even number of backslashes; YAML parsers reject it. An older moa wrote
# it for a file name that is not UTF-8.
UNREADABLE = re.compile(rb"(?<!\\)((?:\\\\)*)\\u([Dd][89A-Fa-f][0-9A-Fa-f]{2})")


def origins(workspace: Workspace, name: str) -> dict[str, str]:
    """Original names of the files of domain `name`, by path in data/raw/NAME; files added by hand have none."""
    path = workspace.tracked(name)
    content = YAML(typ="safe").load(path) if path.exists() else None
    return dict(((content or {}).get("meta") or {}).get("moa") or {})


def note(tracked: Path, new: Mapping[str, str]) -> None:
    """Add the origins of new files, by path, to the .dvc file `tracked`."""
    yaml, out = YAML(), StringIO()
    content = yaml.load(tracked)
    content.setdefault("meta", {}).setdefault("moa", {}).update(
        {file: printable(origin) for file, origin in new.items()})
    if content["meta"]["moa"]:
        yaml.dump(content, out)
        tracked.write_text(out.getvalue(), encoding="utf-8")


def mend(workspace: Workspace) -> list[str]:
    """Rewrite the .dvc files that YAML parsers reject because of an origin that is not Unicode text.

    Returns a sentence for the user on each of them. The caller holds the workspace's lock. Raises OSError.
    """
    messages = []
    for path, data in _unreadable(workspace):
        write_atomic(path, UNREADABLE.sub(_printable_escape, data))
        messages.append(f"{workspace.relative(path)} held a name that is no UTF-8, which DVC cannot read; it is "
                        "written in another way now.")
    return messages


def recover(workspace: Workspace) -> list[str]:
    """Run `mend` under the workspace's lock, if it is needed.

    Does nothing while another process holds the lock, because that process has run `mend`. Raises ArtifactError when
    a file cannot be written.
    """
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
    """Path and bytes of the .dvc files that match `UNREADABLE`."""
    for path in sorted((workspace.data / "raw").glob("*.dvc")):
        if UNREADABLE.search(data := path.read_bytes()):
            yield path, data


def _printable_escape(match: re.Match[bytes]) -> bytes:
    r"""The escape of a surrogate as `moa.core.names` writes it: `\\xe9` inside double quotes reads as `\xe9`."""
    return match[1] + printable(chr(int(match[2], 16))).replace("\\", "\\\\").encode("ascii")
