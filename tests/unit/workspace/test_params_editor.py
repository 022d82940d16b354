"""params.yaml is edited in place: the domain comes or goes, and every other byte stays."""

import difflib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from moa.core.config import DOMAIN_NAME
from moa.core.errors import ConfigError
from moa.workspace.params_editor import add_domain, remove_domain
from tests.tiny import REPOSITORY

OURS = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
READING = {"metric": "rouge_l", "map": {"instruction": "question", "output": "an answer"},
           "template": "Q: {question} # no comment\nC: {context}", "group_by": "id"}
STYLES = [
    "domains: {}   # none yet\nprepare: {}\n",
    "domains: {}\n",
    "domains: {a: {metric: x}}   # one\nprepare: {}\n",
    "domains: {a: {metric: x},\n  b: {metric: 'y'},   # two\n}\n",
    "domains:\n    a: {metric: x}   # four spaces\n\n# next\nprepare: {}\n",
    "# before\ndomains:\n  # of a\n  a:\n    metric: x\n    template: |\n      one\n\n      two\n\n\n# next\nt: [1]\n",
    "domains:\r\n  a:\r\n    metric: \"x\"   # CRLF\r\n\r\nprepare: {}\r\n",
    "domains:\n  'a': &same\n    metric: x\n  b: *same\n# next\nempty: null\nother: ~\n",
    OURS,
]


def parsed(text: str) -> Any:
    return YAML(typ="safe").load(text)


@pytest.mark.parametrize("text", STYLES)
@pytest.mark.parametrize("name", ["law", "2024", "on", "a-very_long-name"])
def test_a_domain_comes_and_goes(text: str, name: str) -> None:
    added = add_domain(text, name, READING)
    expected = parsed(text)
    expected["domains"][name] = READING
    assert parsed(added) == expected and list(parsed(added)["domains"])[-1] == name
    assert remove_domain(added, name) == text
    if "{a: {" not in text:   # on a line of its own: all that was there is there, in its order
        removed = [line for line in difflib.ndiff(text.splitlines(), added.splitlines()) if line.startswith("- ")]
        assert removed in ([], [f"- {text.splitlines()[0]}"])


@pytest.mark.parametrize("text", STYLES[2:])
def test_an_old_domain_goes(text: str) -> None:
    before = parsed(text)
    for name in [*before["domains"]]:
        if "&same" in text and name == "a":
            with pytest.raises(ConfigError, match="cannot edit safely: take 'a' out of it yourself"):
                remove_domain(text, name)
            continue
        after = parsed(remove_domain(text, name))
        expected = {**before, "domains": {key: value for key, value in before["domains"].items() if key != name}}
        if "quickstart" in before:
            expected["quickstart"] = [other for other in before["quickstart"] if other != name]
        assert after == expected


def test_comments_stay_where_they_are() -> None:
    text = remove_domain(add_domain(OURS, "law", {"metric": "exact"}), "python")
    assert "    metric: exact\n\n# Corpora that moa generates itself" in text
    assert "quickstart: [math, sql, extract]\n" in text
    assert remove_domain("domains: {}\nquickstart:   # ours\n- math\n- sql   # last\n", "sql") == (
        "domains: {}\nquickstart:   # ours\n- math\n")
    assert remove_domain("domains: {}\nquickstart:\n- math\n", "math") == "domains: {}\nquickstart: []\n"


@pytest.mark.parametrize("text", ["domains: &all\n  a: {metric: x}\nother: *all\n", "prepare: {}\n"])
def test_what_must_be_done_by_hand(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot edit safely: `domains` must be written out"):
        add_domain(text, "law", READING)


@given(st.lists(st.tuples(st.from_regex(DOMAIN_NAME, fullmatch=True), st.text(max_size=40)), min_size=1, max_size=6,
                unique_by=lambda pair: pair[0]))
def test_any_names_and_templates(pairs: list[tuple[str, str]]) -> None:
    text = "domains: {}   # start\nquickstart: []\n"
    for name, template in pairs:
        text = add_domain(text, name, {"metric": "x", "template": template})
    assert parsed(text)["domains"] == {name: {"metric": "x", "template": template} for name, template in pairs}
    for name, _ in pairs:
        text = remove_domain(text, name)
    assert text == "domains: {}   # start\nquickstart: []\n"
