"""Lists what each benchmark claims, how old its stored result is, on which commit it was measured, and what it reached.

`make bench` runs it. The claims are those of README.md; `common.finish` stores results. A result of before results were
stored is marked as transcribed: its figures are from RESULTS.md, its commit is not known. Measures nothing.
"""

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moa.core import git
from moa.core.text import table

FOLDER = Path(__file__).resolve().parent
ROW = re.compile(r"^\| `(\w+)\.py` \| (.+) \|$", re.MULTILINE)
HEAD = ("benchmark", "age", "commit", "since", "goals")


def claims(readme: str) -> dict[str, str]:
    """What each benchmark claims, by name, from the table of README.md."""
    return dict(ROW.findall(readme))


def row(name: str, path: Path, now: datetime) -> list[str]:
    """Cells of one benchmark: name, age, commit, commits since then that touch what was measured, goals met.

    Args:
        name: of the benchmark.
        path: the file of its result, which need not exist.
        now: time from which the age counts.
    """
    if not path.exists():
        return [name, "-", "-", "-", "no stored result"]
    result = json.loads(path.read_text(encoding="utf-8"))
    commit = result["commit"]
    date = datetime.fromisoformat(result["date"])
    days = (now - (date if date.tzinfo else date.replace(tzinfo=UTC))).days   # a transcribed one has no time
    mark = "+" if result["changed"] else ""   # files differed from the commit
    unknown = "transcribed" if result.get("transcribed") else "-"
    met = sum(bool(each["met"]) for each in result["goals"])
    return [name, f"{days} day{'' if days == 1 else 's'}", f"{commit[:12]}{mark}" if commit else unknown,
            commits_since(name, commit), f"{met} of {len(result['goals'])} met"]


def commits_since(name: str, commit: str | None) -> str:
    """How many commits after `commit` touch moa, flows or the benchmark's script; "?" where git cannot say."""
    repository = FOLDER.parent
    if commit is None or not git.has_commit(repository, commit):
        return "?"
    counted = git.run(repository, "rev-list", "--count", f"{commit}..HEAD", "--", "moa", "flows",
                      f"benchmarks/{name}.py")
    return counted.strip()


def listing(readme: str, folder: Path, now: datetime) -> str:
    """The whole list: a table, then the claims. `folder` has the stored results."""
    known = claims(readme)
    by_hand = {path.stem: "measured by hand (RESULTS.md)" for path in sorted(folder.glob("*.json"))
               if path.stem not in known}
    rows = [row(name, folder / f"{name}.json", now) for name in known | by_hand]
    missing: list[Any] = [cells for cells in rows if cells[-1] == "no stored result"]
    lines = [table([HEAD, *rows], right=(3,)), "", *(f"{name}: {claim}" for name, claim in (known | by_hand).items())]
    if missing:
        lines += ["", f"{len(missing)} without a stored result: RESULTS.md has what was seen."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(listing((FOLDER / "README.md").read_text(encoding="utf-8"), FOLDER / "results",
                             datetime.now(UTC)) + "\n")
