"""One entry in place of another, and nothing else. tests/integration/workspace/test_pipeline.py holds it against what
DVC writes."""

import pytest

from moa.workspace.dvc_repository import HEAD, spliced

BASE = "  base:\n    cmd: moa base\n    outs:\n    - path: data/base\n"
TRAIN = ("  train@math:\n    cmd: moa train\n      --domain math\n    params:\n      p:\n        x: |-\n          a\n"
         "\n          b\n")
NEW = "  train@math:\n    cmd: moa train\n"


@pytest.mark.parametrize(("before", "entries", "after"), [
    ("", {"base": BASE}, HEAD + BASE),
    (HEAD + BASE + TRAIN, {"train@math": NEW}, HEAD + BASE + NEW),
    (HEAD + TRAIN + BASE, {"train@math": NEW}, HEAD + NEW + BASE),
    (HEAD + BASE, {"train@math": TRAIN, "base": BASE}, HEAD + BASE + TRAIN),
    (HEAD + BASE, {}, HEAD + BASE),
])
def test_an_entry_takes_the_place_of_its_own(before: str, entries: dict[str, str], after: str) -> None:
    assert spliced(before, entries) == after


@pytest.mark.parametrize("text", [
    f"# a comment\n{HEAD}{BASE}", "stages:\n", HEAD + BASE + BASE, HEAD + '  "base":\n    cmd: x\n',
    f"{HEAD}{BASE}datasets: []\n", HEAD + BASE.rstrip("\n"), f"{HEAD}{BASE}<<<<<<< ours\n", f"{HEAD}# {BASE}",
    HEAD + "  base: {cmd: x}\n", HEAD + "  # why\n" + BASE,
])
def test_what_dvc_did_not_write_is_left_to_dvc(text: str) -> None:
    assert spliced(text, {"train@math": NEW}) is None
