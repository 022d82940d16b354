"""The text of dvc.lock: one stage's entry in place of another, every other byte as it was.

DVC reads and writes the whole file to record one stage, which takes seconds where there are hundreds of them. Knows
nothing of DVC, nor what an entry says.
"""

import re
from collections.abc import Mapping

HEAD = "schema: '2.0'\nstages:\n"
ENTRY = re.compile(r"^(?=  \S)", re.MULTILINE)          # an entry begins where a line is indented by two
NAME = re.compile(r"  ([\w@.+/-]+(?::[\w@.+/-]+)*):\n")   # that line, written as DVC writes it


def spliced(text: str, entries: Mapping[str, str]) -> str | None:
    """`text` with `entries`: by stage, the lines of its own that DVC would write, the name included.

    New stages come last. None where `text` is not as DVC writes it, and so must be left to DVC.
    """
    if not (text or HEAD).startswith(HEAD):
        return None
    before, *rest = ENTRY.split((text or HEAD)[len(HEAD):])
    blocks: dict[str, str] = {}
    for block in rest:
        found = NAME.match(block)
        if not found or found[1] in blocks or not block.endswith("\n") or re.search(r"^\S", block, re.MULTILINE):
            return None   # a name in quotes, a comment, another group behind the stages
        blocks[found[1]] = block
    if before or any(not (found := NAME.match(block)) or found[1] != name for name, block in entries.items()):
        return None
    return HEAD + "".join({**blocks, **entries}.values())
