"""Stage `quickstart`: small corpora that moa generates itself, so that a fresh checkout has something to learn.

`math`, `sql`, `extract` and `calendar` come from hand-written phrases; `python` is read from the standard library of
the running interpreter. The same name, number of rows and seed give the same bytes on the same Python.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from moa.core.errors import UsageError
from moa.core.files import replace_directory
from moa.data.quickstart import calendar, extract, math, sql, stdlib
from moa.data.quickstart.bank import Row

GENERATORS: dict[str, Callable[[random.Random, int], list[Row]]] = {
    "math": math.generate,
    "sql": sql.generate,
    "extract": extract.generate,
    "python": stdlib.generate,
    "calendar": calendar.generate,
}
NAMES: tuple[str, ...] = tuple(GENERATORS)


def write(name: str, directory: Path, rows: int = 440, seed: int = 0) -> int:
    """Write corpus `name` to `directory/rows.jsonl`, in place of what `directory` held.

    Args:
        name: one of `NAMES`.
        directory: the folder to write.
        rows: number of rows.
        seed: seed of the random choices.

    Returns:
        The number of rows written: `rows`, or fewer when no more rows of the corpus differ enough from each other.

    Raises:
        UsageError: `name` is unknown.
    """
    if name not in GENERATORS:
        raise UsageError(f"No quickstart corpus {name!r}; there are {', '.join(NAMES)}.")
    records = GENERATORS[name](random.Random(f"{name}:{seed}"), rows)
    with replace_directory(directory) as folder, (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return len(records)
