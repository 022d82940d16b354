"""Keys go out of the text of params.yaml, and a number comes in; every other byte stays."""

from typing import Any

import pytest
from ruamel.yaml import YAML

from moa.core.errors import ConfigError
from moa.workspace.params_editor import remove_key, set_number


def parsed(text: str) -> Any:
    return YAML(typ="safe").load(text)


@pytest.mark.parametrize(("before", "after"), [
    ("a: 1\nrelease:   # of releases\n  # how many\n  min_rows: 4\n  seed: 0   # gone\n\n# next\nb: 2\n",
     "a: 1\nrelease:   # of releases\n  # how many\n  min_rows: 4\n\n# next\nb: 2\n"),
    ("release:\n  seed: 0\n  min_rows: 4\n", "release:\n  min_rows: 4\n"),
    ("release:   # alone\n  seed: 0\nb: 2\n", "release: {}   # alone\nb: 2\n"),
    ("release: {seed: 0}   # x\n", "release: {}   # x\n"),
    ("release: {min_rows: 4, seed: 0}\n", "release: {min_rows: 4}\n"),
    ("release: {seed: 0, min_rows: 4}\n", "release: {min_rows: 4}\n"),
    ("release:\r\n  seed: 0\r\n  min_rows: 4\r\n", "release:\r\n  min_rows: 4\r\n"),
    ("release:\n  seed:\n    - 1\n    - 2\n  min_rows: 4\n", "release:\n  min_rows: 4\n"),
    ("release:\n  min_rows: 4\n  seed: 0", "release:\n  min_rows: 4\n"),
])
def test_a_key_goes(before: str, after: str) -> None:
    assert remove_key(before, "release", "seed") == after


@pytest.mark.parametrize("text", ["release: &r {seed: 0}\nother: *r\n", "x: &r {seed: 0}\nrelease: *r\n",
                                  "release:\n  <<: {seed: 0}\n  min_rows: 4\n",
                                  "release:\n  ? seed\n  : 0\n  min_rows: &m 4\nother: *m\n"])
def test_what_cannot_be_edited_safely_is_left_to_people(text: str) -> None:
    try:
        changed = remove_key(text, "release", "seed")
    except ConfigError as refused:
        assert "cannot edit safely" in str(refused)
    else:
        assert parsed(changed) == {**parsed(text), "release": {"min_rows": 4}}


@pytest.mark.parametrize(("before", "after"), [
    ("a: 1\n", "a: 1\n\nformat: 1   # why\n"),
    ("a: 1", "a: 1\n\nformat: 1   # why\n"),
    ("a: 1\r\n# end\r\n", "a: 1\r\n# end\r\n\r\nformat: 1   # why\r\n"),
    ("a: 1\nformat: 0   # mine\nb: 2\n", "a: 1\nformat: 1   # mine\nb: 2\n"),
])
def test_a_number_comes_in(before: str, after: str) -> None:
    assert set_number(before, "format", 1, "why") == after


@pytest.mark.parametrize("text", ["{a: 1}\n", "a: 1\n...\n"])
def test_a_number_that_cannot_come_in_is_left_to_people(text: str) -> None:
    with pytest.raises(ConfigError, match="write `format: 1` into it yourself"):
        set_number(text, "format", 1, "why")
