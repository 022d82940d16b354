"""The quality report for people: as a page that shows no row as markup, and as text for a terminal."""

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moa.core.errors import UsageError
from moa.reports import quality as quality_page
from tests.unit.data.test_quality import SORRY, corpus, plain, talk


class Page(HTMLParser):
    """Tags and texts of a page, and whether every tag is closed."""

    VOID = frozenset({"meta", "link", "!doctype"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str | None] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.links += [value for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


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
    evil = "</td></table><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;\"'"
    rejected = [{"file": evil, "line": 1, "code": "malformed", "kind": evil, "reason": f"{evil}: {evil}",
                 "text": evil}]
    near = [{"id": evil, "of": evil, "split": "train", "of_split": "test", "text": evil}]
    report = corpus(tmp_path, [talk(evil, evil) for _ in range(30)], rejected, near)
    page = Page()
    page.feed(quality_page.render(beside({**report, "redacted": {"email": 3}}, evil)))
    assert not page.open
    assert not page.tags.keys() & {"script", "img", "iframe", "object"}
    assert page.links == ["data:,"]   # an empty icon, or a browser asks the server for one
    assert page.tags["svg"] >= 6
    assert evil in page.text
    assert "redacted" in page.text


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
