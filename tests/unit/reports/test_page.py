"""The report page: its figures against the rows they come from, what it leaves out, and that nothing writes into it."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moa.core.config import Config
from moa.core.errors import UsageError
from moa.core.files import write_json
from moa.core.paths import MANIFEST, Workspace
from moa.evaluation.routing import abstentions, reliability
from moa.reports import facts as report_facts
from moa.reports import page as report_page
from moa.reports import svg

EVIL = "</td></table></svg><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;\"'"
CONFIG = Config.model_validate({"base": {"source": "path:toy"}, "domains": {
    name: {"metric": "rouge_l"} for name in ("law", "sql", "new")}})
LEVELS = [{"level": level, "accuracy": 0.7 + level / 100, "agreement": 1 - abs(level - 4) / 20} for level in range(6)]
DECISION = {"promote": False, "against": 2, "reason": "law: loss is worse", "domains": {
    "law": {"verdict": "fail", "loss": {"verdict": "fail", "reason": "worse", "rows": 41, "point": 0.25,
                                        "interval": (0.125, 0.5), "improved": False},
            "metric": {"verdict": "not enough data", "reason": "6 answers, 20 are needed", "rows": 6, "point": None,
                       "interval": None, "improved": False},
            "known": {"loss": {"verdict": "fail", "reason": "worse", "rows": 21, "point": 0.5, "interval": (0.25, 0.75),
                               "improved": False}, "metric": None}},
    "sql": {"verdict": "pass", "reason": "an old record", "rows": 33, "point": -0.5, "interval": [-0.75, -0.25],
            "improved": True}}}


HOSTILE = st.lists(st.one_of(st.text(max_size=4), st.sampled_from((
    "<script>alert(1)</script>", '"onload="alert(1)', "' onerror='alert(1)", "</title></svg></td></table>", "</style>",
    "<!--", "]]>", "&amp;", "&#60;b>", "{{ 7*7 }}", "{% include 'style.css' %}", "{#", "\\u003cb>"))),
    min_size=1).map("".join).filter(bool)


class Page(HTMLParser):
    """Tags, links and text of a page, and what was left open."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.structure: list[tuple[str, ...]] = []   # each tag with the names of its attributes
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.parts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.structure.append((tag, *(name for name, _ in attrs)))
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.parts)


def rows(domain: str, shift: float) -> list[dict[str, Any]]:
    """Twenty rows of one domain; the router gets every fifth wrong, and the base then answers as well as it can."""
    found = []
    for number in range(20):
        forced = 1.0 + number / 50
        losses = {"base": forced + 0.5, "forced": forced, "routed": forced + (shift if number % 5 == 0 else 0.0)}
        found += [{"domain": domain, "row": f"{domain}{number}", "system": system, "loss": loss, "tokens": 5 + number,
                   "score": None if number >= 6 else float(number % 2 or system == "forced")}
                  for system, loss in losses.items()]
    return found


def evaluated(workspace: Workspace, domains: dict[str, float]) -> list[dict[str, Any]]:
    """`data/reports` as the stage evaluate leaves it."""
    every = [row for domain, shift in domains.items() for row in rows(domain, shift)]
    workspace.reports.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(every), workspace.reports / "rows.parquet")
    summary: dict[str, Any] = {"domains": {}, "routing": {"accuracy": 0.9, "abstention": 0.05, "ece": 0.02,
                                                          "confusion": {}}}
    for domain in domains:
        summary["routing"]["confusion"][domain] = {guess: 16 if guess == domain else 4 for guess in domains}
        summary["domains"][domain] = {}
        for system in ("base", "forced", "routed"):
            mine = [row for row in every if (row["domain"], row["system"]) == (domain, system)]
            loss = sum(row["loss"] * row["tokens"] for row in mine) / sum(row["tokens"] for row in mine)
            summary["domains"][domain][system] = {"loss": loss, "score": 0.5, "rows": 20, "answered": 6}
    write_json(workspace.reports / "summary.json", summary)
    return every


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Built and never released: law learned here, sql imported, new not even prepared."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = Workspace(tmp_path / "workspace")
    write_json(made.base_manifest, {"source": "path:toy", "digest": "b" * 64, "architecture": "Toy",
                                    "parameters": 12_000_000})
    for name in ("law", "sql"):
        counts = {"read": 50, "kept": 45, "rejected": 3, "duplicates": 2, "train": 30, "validation": 5, "test": 10}
        write_json(made.corpus(name) / MANIFEST, {"digest": name[0] * 64, "rows": counts})
        write_json(made.corpus(name) / "quality.json", {"rows": counts, "warnings": [f"{name} repeats itself"]})
    write_json(made.expert("law") / MANIFEST, {
        "digest": "1" * 64, "corpus": "0" * 64, "rank": 8, "best_epoch": 2, "best_loss": 1.25,
        "parent": {"domain": "sql", "digest": "6" * 64}, "curve": [
            {"step": 10, "train_loss": 1.5, "validation_loss": 1.5}, {"step": 20, "train_loss": 1.0,
                                                                      "validation_loss": 1.25}]})
    write_json(made.expert("sql") / MANIFEST, {"digest": "2" * 64, "corpus": "s" * 64, "rank": 4, "source": "imported",
                                               "best_epoch": None, "best_loss": None, "curve": []})
    write_json(made.mixture / MANIFEST, {
        "digest": "9" * 64, "labels": ["law", "sql"],
        "router": {"rule": "early", "layer": 4, "validation_rows": 1_200, "levels": LEVELS},
        "experts": {"law": {"digest": "1" * 64}, "sql": {"digest": "7" * 64, "parent": "2" * 64}}})
    evaluated(made, {"law": 0.4, "sql": 0.0})
    return made


def test_figures_are_those_of_the_rows(workspace: Workspace) -> None:
    facts = report_facts.gather(workspace, CONFIG)
    assert facts["champion"] is None and facts["registry_trouble"] is None and not workspace.mlflow.exists()
    found = facts["challenger"]
    law = [row for row in rows("law", 0.4) if row["system"] == "forced"]
    losses, tokens = np.array([row["loss"] for row in law]), np.array([row["tokens"] for row in law])
    drawn = np.random.default_rng(7).integers(20, size=(20_000, 20))   # the same bootstrap, of other draws
    means = (losses[drawn] * tokens[drawn]).sum(1) / tokens[drawn].sum(1)
    forced = found["scores"]["law"]["forced"]
    percentiles = np.quantile(means, [0.025, 0.975])   # the gate's interval is wider on few rows
    assert forced["loss_interval"] == pytest.approx(percentiles, abs=0.03)
    assert forced["loss_interval"][0] < percentiles[0] < percentiles[1] < forced["loss_interval"][1]
    assert forced["loss_interval"][0] < forced["loss"] < forced["loss_interval"][1]
    assert forced["score_interval"] == pytest.approx((0.6097, 1.0), abs=1e-4)   # 6 of 6 right
    assert found["scores"]["law"]["base"]["score_interval"][0] < 0.5
    paid = [0, 5, 10, 15]   # rows that the router sends elsewhere
    cost = found["tax"]["law"]
    assert cost["loss"] == pytest.approx(0.4 * sum(5 + number for number in paid) / sum(5 + n for n in range(20)))
    assert cost["score"] == pytest.approx(0.5) and (cost["rows"], cost["answered"]) == (20, 6)
    assert 0 <= cost["loss_interval"][0] < cost["loss"] < cost["loss_interval"][1]
    assert found["tax"]["sql"]["loss"] == 0.0 and found["tax"]["sql"]["loss_interval"] == (0.0, 0.0)


def test_intervals_need_groups_and_finite_values() -> None:
    interval = report_facts.weighted_interval
    assert interval([], []) is None and interval([(1.0, 1.0)], ["a"]) is None
    assert interval([(1.0, 1.0), (2.0, 1.0)], ["a", "a"]) is None
    assert interval([(1.0, 1.0), (float("nan"), 1.0)], ["a", "b"]) is None
    rows = [(float(number), 1.0) for number in range(5_000)]
    low, high = interval(rows, [str(number) for number in range(5_000)]) or (0.0, 0.0)
    assert 2_440 < low < 2_499.5 < high < 2_560   # mean and 1.96 standard errors: 2499.5 +- 40
    low, high = interval(rows, [str(number // 50) for number in range(5_000)]) or (0.0, 0.0)
    assert 2_150 < low < 2_499.5 < high < 2_850   # 100 groups of neighbours: +- 283


@pytest.mark.parametrize(("scores", "groups", "expected"), [
    ([0.0] * 16, "abcdefghijklmnop", (0.0, 0.1936)), ([1.0] * 16, "abcdefghijklmnop", (0.8064, 1.0)),
    ([1.0] * 4 + [0.0] * 12, "abcdefghijklmnop", (0.1018, 0.4950)),   # Wilson's table
    ([0.0] * 16, "aaaabbbbccccdddd", (0.0, 0.4899)),                  # four groups, not sixteen rows
    ([0.0, 1.0], "aa", None), ([], "", None)])
def test_right_and_wrong_answers_have_wilsons_interval(scores: list[float], groups: str,
                                                       expected: tuple[float, float] | None) -> None:
    found = report_facts.score_interval(scores, list(groups))
    assert found == (expected if expected is None else pytest.approx(expected, abs=1e-4))


@pytest.mark.parametrize(("scores", "groups"), [([0.5, 0.25, 1.0], "abc"), ([1.0, 0.0, 1.0, 0.0], "aabc")])
def test_other_scores_have_the_bootstraps_interval(scores: list[float], groups: str) -> None:
    pairs = [(score, 1.0) for score in scores]
    assert report_facts.score_interval(scores, list(groups)) == report_facts.weighted_interval(pairs, list(groups))


def test_the_page_says_what_there_is(workspace: Workspace) -> None:
    html = report_page.render(report_facts.gather(workspace, CONFIG))
    page = Page(html)
    assert not page.open and not page.tags.keys() & {"script", "img", "iframe", "object"}
    assert page.addresses == ["data:,"]
    for words in ("nothing was released", "2 with an expert", "label forced", "routing tax", "90.0%",
                  "law repeats itself", "imported: it was trained elsewhere",
                  "kept: epoch 2, validation loss 1.250; continues the expert of sql 666666666666",
                  f"{'1' * 12} from {'6' * 12}",
                  "rule early, reading", "law (rank 8)", "sql (imported)", "1" * 12, "path:toy"):
        assert words in page.text, words
    assert re.search(r'class="m" style="background:rgba\(59,110,168,0\.80\);color:#fff">16<', html)
    # law learned from a corpus of before; sql's expert is in the mixture by way of joint training.
    assert html.count('class="edge old"') == 1 and "A dashed line" in page.text


def test_layer_agreement_is_plotted_with_the_level_that_is_read(workspace: Workspace) -> None:
    facts = report_facts.gather(workspace, CONFIG)
    router = facts["mixture"]["router"]
    html = report_page.render(facts)
    said = Page(html).text
    assert "Layer agreement" in said and "on 1,200 validation prompts" in said and "4 (read)" in said
    assert "4 of 6 layers are computed" in said and "agreement with the router's choice 1.0000 at level 4" in said
    for level in LEVELS:
        assert f'<td class="n">{level["accuracy"]:.1%}</td><td class="n">{level["agreement"]:.1%}</td>' in html
    middle = re.search(r'<line x1="([\d.]+)" x2="\1" [^>]*class="mark"', html)
    read = re.search(r'<circle cx="([\d.]+)"[^>]*><title>accuracy 0.7400 at level 4</title>', html)
    assert middle and read and middle[1] == read[1]
    assert "(read)" in Page(report_page.render(with_router(facts, router | {"rule": "last"}))).text
    voting = report_page.render(with_router(facts, router | {"rule": "vote"}))
    assert 'class="mark"' not in voting and "The rule reads every level." in voting and "(read)" not in voting
    del router["levels"]   # a mixture of before
    assert "Layer agreement" not in report_page.render(facts)


def with_router(facts: dict[str, Any], router: dict[str, Any]) -> dict[str, Any]:
    return facts | {"mixture": facts["mixture"] | {"router": router}}


def decided(workspace: Workspace) -> None:
    """Gives the rows of data/reports the router's decisions, as evaluations have them: every tenth row is abstained."""
    path = workspace.reports / "rows.parquet"
    every = [{**row, "routed_to": "sql" if number % 20 == 7 else row["domain"], "confidence": 0.5 + number % 10 / 20,
              "abstained": number % 10 == 3, "group": f"g{number % 5}", "answered_by": row["domain"]}
             for number, row in enumerate(pq.read_table(path).to_pylist())]
    pq.write_table(pa.Table.from_pylist(every), path)


def test_abstention_and_reliability_are_shown_by_domain(workspace: Workspace) -> None:
    assert "left to the base" not in report_page.render(report_facts.gather(workspace, CONFIG))   # rows of before
    decided(workspace)
    facts = report_facts.gather(workspace, CONFIG)
    routing = facts["challenger"]["routing"]
    rows = [row for row in pq.read_table(workspace.reports / "rows.parquet").to_pylist() if row["system"] == "routed"]
    assert routing["by_domain"] == abstentions(rows) and routing["reliability"] == reliability(rows)
    assert routing["by_domain"]["law"]["abstained"] > 0 and len(routing["reliability"]) > 3
    router = facts["mixture"]["router"]
    promises = {"law": {"groups": 117, "share": 0.02528, "wanted": 0.01, "more": 182},
                "sql": {"groups": 500, "share": 0.0095, "wanted": 0.01, "more": 0}}
    html = report_page.render(with_router(facts, router | {"promises": promises}))
    page, law = Page(html), routing["by_domain"]["law"]
    assert not page.open
    cells = re.search("<tr>(<td>law</td>.*?)</tr>", html.split("Known prompts that are left to the base")[1])
    assert cells and re.findall(">([^<]+)<", cells[1]) == [
        "law", "20", f"{law['groups']}", f"{law['abstained']}", f"{law['share']:.1%}", f"{law['limit']:.1%}", "2.53%",
        "117", "182"]
    assert "Too few groups to promise 1.00%: law (at most 2.53%, 182 more groups)." in page.text
    for each in routing["reliability"]:
        assert f"confidence {each['confidence']:.1%}, right {each['right']:.1%} (" in page.text
    never = Page(report_page.render(with_router(facts, router | {"promises": {}}))).text
    assert "No prompt is left to the base (assemble.max_abstention is null)." in never
    before = Page(report_page.render(facts)).text   # a router from before promises
    assert "Known prompts that are left to the base" in before and "Too few groups" not in before


def test_the_reliability_diagram_places_dots_intervals_and_counts() -> None:
    bins = [{"low": 0.0, "high": 0.5, "rows": 5, "confidence": 0.25, "right": 0.5, "interval": [0.25, 0.75]},
            {"low": 0.5, "high": 1.0, "rows": 10, "confidence": 1.0, "right": 1.0, "interval": [0.8, 1.0]}]
    drawn = svg.reliability(bins)
    diagonal = re.search(r'<line x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)" class="mark"', drawn)
    dots = [tuple(map(float, dot)) for dot in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert diagonal
    left, right, bottom, top = map(float, diagonal.groups())
    assert dots == [(pytest.approx(left + (right - left) / 4, abs=0.06), pytest.approx((bottom + top) / 2, abs=0.06)),
                    (right, top)]
    heights = [float(each) for each in re.findall(r'<rect [^>]* height="([\d.]+)"', drawn)]
    assert heights[1] == 2 * heights[0]
    whiskers = re.findall(r'y1="([\d.]+)" y2="([\d.]+)" class="s1"', drawn)
    assert float(whiskers[0][0]) == pytest.approx(bottom + (top - bottom) / 4, abs=0.06)
    assert "<svg" not in svg.reliability([])


def test_before_training_the_page_says_what_the_corpora_will_promise(workspace: Workspace) -> None:
    write_json(workspace.corpus("law") / MANIFEST, {"digest": "l" * 64, "rows": {"train": 148, "validation": 17},
                                                   "groups": {"train": 148, "validation": 17, "test": 12}})
    assert report_facts.gather(workspace, CONFIG)["promises"] == []   # this mixture's router promises nothing
    (workspace.mixture / MANIFEST).unlink()
    facts = report_facts.gather(workspace, CONFIG)
    assert facts["promises"] == ["law: of fresh prompts at most 2.53% are left to the base (95 % confidence, 117 "
                                 "groups); 1.00% takes 182 more groups."]
    assert facts["promises"][0] in Page(report_page.render(facts)).text


def test_the_gates_comparisons_are_shown_pair_by_pair(workspace: Workspace) -> None:
    assert [(one["domain"], one["measure"], one["verdict"], one["difference"], one["better"])
            for one in report_facts.verdicts(DECISION)] == [
        ("law", "loss", "fail", 0.25, False), ("law", "metric", "not enough data", None, False),
        ("law", "loss, known rows", "fail", 0.5, False), ("sql", "loss", "pass", -0.5, True)]
    assert report_facts.verdicts({"promote": True, "reason": "first release"}) == []
    facts = report_facts.gather(workspace, CONFIG)
    facts["challenger"] |= {"version": 3, "gate": DECISION}
    said = Page(report_page.render(facts)).text
    for words in ("version 3: refused, against version 2", "law: loss is worse", "+0.250  [+0.125,\u00a0+0.500]",
                  "pass, better"):
        assert words in said, words


def test_a_workspace_with_nothing_built_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    page = Page(report_page.render(report_facts.gather(Workspace(tmp_path), CONFIG)))
    assert "Nothing was evaluated yet" in page.text and "0 with an expert" in page.text and not page.open


def test_no_registry_is_said_and_the_rest_is_shown(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))   # bound and not listening: nobody answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        page = Page(report_page.render(report_facts.gather(workspace, CONFIG)))
    assert "The champion is unknown: No MLflow server answers" in page.text and "routing tax" in page.text


def spoiled(value: Any, text: str, known: set[str]) -> Any:
    """`value` with `text` before every text and every name of it; `known` keys, which the page reads, stay."""
    if isinstance(value, dict):
        return {key if key in known else text + key: spoiled(each, text, known) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(spoiled(each, text, known) for each in value)
    return text + value if isinstance(value, str) else value


def test_nothing_in_a_workspace_can_write_into_the_page(workspace: Workspace) -> None:
    decided(workspace)
    facts = report_facts.gather(workspace, CONFIG)
    moved = {"domain": "law", "row": "0" * 32, "before": "law", "after": "sql", "loss_before": 1.0, "loss_after": 2.0,
             "rise": 1.0, "question": "Why?"}
    facts["changed_hands"] = {"before": "the champion", "now": "this workspace", "rows": [moved]}
    facts["promises"] = ["law promises"]
    champion = {"name": "m", "version": 3, "since": "2026-01-01", "reason": "better", "experts": {},
                "router": facts["mixture"]["router"], "gate": DECISION, **facts["challenger"], "digest": "8" * 64}
    facts |= {"champion": champion, "registry_trouble": "down"}
    known = keys(facts) - {"law", "sql", "new"}
    plain = Page(report_page.render(spoiled(facts, "x", known)))
    assert plain.tags["svg"] >= 5

    @settings(max_examples=40, deadline=None)
    @example(EVIL)
    @given(HOSTILE)
    def check(text: str) -> None:
        page = Page(report_page.render(spoiled(facts, text, known)))
        assert not page.open and page.structure == plain.structure and page.addresses == ["data:,"]
        assert page.parts.count(f"{text}law") >= 5   # table cells and headings, letter by letter
        assert f"The champion is unknown: {text}down" in page.parts

    check()


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return value.keys() | set().union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list | tuple) else set()


def test_a_page_is_written_whole_or_not_at_all(workspace: Workspace, tmp_path: Path) -> None:
    facts = report_facts.gather(workspace, CONFIG)
    report_page.write(tmp_path / "new" / "page.html", facts)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    with pytest.raises(UsageError, match="name another file"):
        report_page.write(workspace.base_manifest / "page.html", facts)
