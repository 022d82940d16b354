"""The names that `import moa` offers: imported late, typed, and errors that a program without moa's names can catch."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import moa
from moa.core import errors

FUNCTIONS = ("cotrain", "init", "load", "plan", "run")


def _public(name: str) -> Iterator[tuple[str, Any]]:
    """A public function, or the public methods and properties of a public class."""
    found = getattr(moa, name)
    if inspect.isfunction(found):
        yield name, found
    elif inspect.isclass(found):
        for member, value in vars(found).items():
            if not member.startswith("_"):
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if inspect.isfunction(function):
                    yield f"{name}.{member}", function


MEMBERS = dict(each for name in moa.__all__ if name != "errors" for each in _public(name))


def test_every_public_name_is_there() -> None:
    assert len(set(moa.__all__)) == len(moa.__all__) and set(moa.__all__) <= set(dir(moa))
    assert {name for name in moa.__all__ if inspect.isfunction(getattr(moa, name))} == set(FUNCTIONS)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        moa.nonsense   # type: ignore[attr-defined]   # noqa: B018


@pytest.mark.parametrize("name", MEMBERS)
def test_what_a_public_function_returns_has_a_type(name: str) -> None:
    annotation = inspect.signature(MEMBERS[name]).return_annotation
    assert annotation is not inspect.Signature.empty and annotation is not Any and annotation != "Any"


@pytest.mark.parametrize("name", [name for name in moa.__all__ if name != "errors"])
def test_a_public_name_is_documented_with_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(moa, name)) or ""
    assert ">>> " in text
    assert all(inspect.getdoc(member) for each, member in MEMBERS.items() if each.partition(".")[0] == name)


@pytest.mark.parametrize("name", moa.errors.__all__)
def test_an_error_of_moa_is_also_a_standard_one(name: str) -> None:
    error = getattr(moa.errors, name)
    assert error is getattr(errors, name) and issubclass(error, errors.MoaError)
    standard = ValueError if name in ("ConfigError", "DataError", "UsageError") else RuntimeError
    assert error is errors.MoaError or issubclass(error, standard)
    assert error.exit_code >= 1


def test_no_error_is_left_out() -> None:
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert raised == set(moa.errors.__all__)
