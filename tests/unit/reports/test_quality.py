"""The quality report for people: as a page that shows no row as markup, and as text for a terminal."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings

from moa.core.errors import UsageError
from moa.reports import quality as quality_page
from tests.unit.data.test_quality import SORRY, corpus, plain, talk
from tests.unit.reports.test_page import EVIL, HOSTILE, Page, keys, spoiled


def beside(report: dict[str, Any], evil: str) -> dict[str, Any]:
    """The report as `moa domain check` makes it, with a hostile row wherever one can be shown."""
    pair = {"id": evil, "split": "train", "text": evil, "other_id": evil, "other_split": "test", "other_text": evil,
            "domain": evil, "similarity": 0.9}
    return {**report, "across": {
        "others": [evil], "not_prepared": [evil],
        "duplicates": {"count": 1, "domains": {}, "examples": [pair]},
        "near_duplicates": {"threshold": 0.8, "compared": 5, "compared_elsewhere": 5,
                            "across_domains": {"count": 1, "domains": {evil: 1}, "examples": [pair]},
                            "across_splits": {"count": 1, "examples": [pair]}},
        "neighbours": {"sampled": 5, "count": 1, "share": 0.2, "domains": {evil: 1}, "told_apart": {evil: 0.5},
                       "examples": [{"id": evil, "looks_like": evil, "text": evil, "neighbours": 4}]}}}


def test_rows_cannot_write_into_the_page(tmp_path: Path) -> None:
    rejected = [{"file": "rows.csv", "line": 1, "code": "malformed", "kind": "no answer", "reason": "no answer: empty",
                 "text": "Why?"}]
    near = [{"id": "a", "of": "b", "split": "train", "of_split": "test", "text": "Why?"}]
    report = beside(corpus(tmp_path, [talk("Why?", SORRY) for _ in range(30)], rejected, near), "sql")
    report |= {"redacted": {"email": 3}, "power": "too few", "promise": "too few"}
    known = keys(report) - {"sql", "email"}
    plain = Page(quality_page.render(spoiled(report, "x", known)))
    assert plain.tags["svg"] >= 6 and "redacted" in plain.text

    @settings(max_examples=40, deadline=None)
    @example(EVIL)
    @given(HOSTILE)
    def check(text: str) -> None:
        page = Page(quality_page.render(spoiled(report, text, known)))
        assert not page.open and page.structure == plain.structure
        assert page.addresses == ["data:,"]   # an empty icon, or a browser asks the server for one
        assert {f"{text}toy", f"The gate: {text}too few"} <= set(page.parts)

    check()


def test_the_text_is_for_a_terminal(tmp_path: Path) -> None:
    report = corpus(tmp_path, [*(plain(number) for number in range(40)), *[talk("Why?", SORRY)] * 10])
    shown = quality_page.text(beside({**report, "redacted": {"email": 3}}, "sql"))
    assert "kept" in shown and "redacted: 3 email" in shown and "█" in shown
    assert f"10  20.0%  {SORRY}" in shown
    assert "Told apart from\n  sql  50%" in shown
    assert shown.splitlines()[-1].startswith("! ")
    assert max(map(len, shown.splitlines())) <= 140
    assert quality_page.text(report).startswith("Domain toy\n")   # without the comparison, too


def test_text_and_page_say_what_so_many_rows_can_show(tmp_path: Path) -> None:
    report = corpus(tmp_path, [plain(number) for number in range(20)])
    said = {**report, "power": "toy: 3 test groups are too few.", "promise": "toy: at most 12 % < 20 %."}
    shown = "The gate: toy: 3 test groups are too few.\n\nThe router: toy: at most 12 % < 20 %."
    assert shown in quality_page.text(said)
    assert "<p>The router: toy: at most 12 % &lt; 20 %.</p>" in quality_page.render(said)
    assert "The router:" not in quality_page.text({**said, "promise": None}) + quality_page.text(report)
    assert "so many rows" not in quality_page.render(report)


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    report = corpus(tmp_path / "corpus", [plain(number) for number in range(20)])
    quality_page.write(tmp_path / "new/page.html", report)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="name another file"):
        quality_page.write(tmp_path / "file/page.html", report)
