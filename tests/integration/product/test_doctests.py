"""The examples in the docstrings of the public API do what they say, on a toy base."""

import doctest
import inspect
from pathlib import Path

import pytest

import moa
from tests import tiny

BEFORE_A_RELEASE = ("init", "Workspace", "plan", "run")   # the order in which a newcomer would try them
REST = [name for name in moa.__all__ if name not in (*BEFORE_A_RELEASE, "errors")]


def check(name: str) -> None:
    """Run the examples of a public name and of its methods."""
    tests = doctest.DocTestFinder().find(getattr(moa, name), f"moa.{name}", globs={})
    found = [test for test in tests if test.examples]
    assert found
    runner = doctest.DocTestRunner()
    wrong: list[str] = []
    for test in found:
        assert not any(doctest.SKIP in example.options for example in test.examples)
        runner.run(test, out=wrong.append)
    assert not wrong, "".join(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: `tiny-base`, and `my-experts`, which the examples of the first names build."""
    root = tmp_path_factory.mktemp("doctests")
    tiny.base(root / "tiny-base")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        patched.setenv("MOA_DTYPE", "float32")
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        workspace = moa.init("my-experts", base="path:tiny-base")
        for domain in ("alpha", "beta"):
            workspace.add(domain, [tiny.row(domain, number) for number in range(60)])
        for name in BEFORE_A_RELEASE:
            check(name)
        moa.load("my-experts", device="cpu").save_pretrained("exported", include_base=True)
    return root


@pytest.mark.parametrize("name", REST)
def test_the_examples_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MOA_DTYPE", "float32")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check(name)


def test_every_function_and_class_has_examples() -> None:
    assert all(inspect.isclass(found) or inspect.isfunction(found) for name in REST for found in [getattr(moa, name)])
