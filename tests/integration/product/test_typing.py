"""What a type checker says of a program that uses moa: the examples, right calls and wrong ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import REPOSITORY

PROGRAMS = [*sorted((REPOSITORY / "examples").glob("*.py")), REPOSITORY / "docs" / "generate_reference.py"]
USES = """
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import moa

mixture = moa.load()
assert_type(mixture, moa.Mixture)
assert_type(moa.Mixture.from_pretrained("models:/moa-mixture@champion", device="cuda:0"), moa.Mixture)
chat = [{"role": "user", "content": "Hello"}]
assert_type(mixture.generate("Hello", max_new_tokens=64), moa.Completion)
assert_type(mixture.generate(chat, domain="math"), moa.Completion)
assert_type(mixture.generate(["Hello", "Bye"]), moa.Rows[moa.Completion])
assert_type(mixture.generate([chat, chat], domain=["math", None]), moa.Rows[moa.Completion])
assert_type(mixture.generate("Hello").routing.confidence, float | None)
assert_type(mixture.generate("Hello").usage.total_tokens, int)
assert_type(mixture.stream(chat), Iterator[str])
assert_type(mixture.route("Hello"), moa.Routing)
assert_type(mixture.route([chat]), moa.Rows[moa.Routing])
assert_type(mixture.explain(chat).levels, tuple[moa.LevelChoice, ...])
assert_type(mixture.score([chat])[0], moa.Score)
ws = moa.Workspace.find()
assert_type(ws, moa.Workspace)
assert_type(ws.root, Path)
assert_type(moa.init("here").add("support", [{"instruction": "x", "output": "y"}]), moa.Added)
assert_type(moa.plan(ws).steps, tuple[moa.PlanStep, ...])
assert_type(moa.run(ws, promote=True).version, int | None)
registry = moa.Registry(ws)
assert_type(registry.champion(), moa.Release | None)
assert_type(registry.compare(2, 1), moa.Comparison)
assert_type(registry.promote(2), moa.ChampionChange)
assert_type(registry.rollback().version, int)
error: type[ValueError] = moa.errors.ConfigError
"""
WRONG = {
    'moa.load(version="three")': "arg-type", 'moa.load().generate(3)': "call-overload",
    'moa.LoraConfig(rank=8)': "call-arg", 'moa.TrainingArguments(epochs=2)': "call-arg",
    'moa.Registry().champion().version': "union-attr", 'moa.nothing()': "attr-defined",
    'moa.plan().steps = ()': "misc",
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The codes of the errors by file, and their text after it."""
    folder = tmp_path_factory.mktemp("typed")
    files = list(PROGRAMS)
    for name, text in {"uses": USES, **{f"wrong_{number}": f"import moa\n{line}\n"
                                        for number, line in enumerate(WRONG)}}.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        files.append(folder / f"{name}.py")
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--no-pretty", *files],
                          cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert not done.stderr
    found: dict[str, list[str]] = {path.stem: [] for path in files}
    for line in done.stdout.splitlines():
        if ": error: " in line:
            found[Path(line.partition(":")[0]).stem].append(line)
    return found


@pytest.mark.parametrize("name", [*(path.stem for path in PROGRAMS), "uses"])
def test_a_program_that_uses_moa_is_typed(name: str, checked: dict[str, list[str]]) -> None:
    assert checked[name] == []


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_use_is_found(number: int, checked: dict[str, list[str]]) -> None:
    codes = [code for line in checked[f"wrong_{number}"] for code in re.findall(r"\[([a-z-]+)\]$", line)]
    assert codes == [list(WRONG.values())[number]]
