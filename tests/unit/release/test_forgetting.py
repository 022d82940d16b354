"""The pure parts of the proof that nothing was forgotten: experts, answers, figures, routes, words."""

from typing import Any

from moa.data.corpus import Row
from moa.release.forgetting import complaint, expert_changes, figures, paired, text, word_for_word

ROWS = [Row(str(number), ({"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "x"}),
            3, 1) for number in range(3)]


def test_experts_are_told_by_their_digests() -> None:
    found = expert_changes({"math": "a", "sql": "b", "old": "c"}, {"math": "a", "sql": "d", "law": "e"})
    assert {domain: each["change"] for domain, each in found.items()} == {
        "law": "new", "math": "same", "old": "removed", "sql": "changed"}
    assert found["sql"] == {"change": "changed", "old": "b", "new": "d"} and found["law"]["old"] is None


def test_answers_are_compared_word_for_word() -> None:
    same = word_for_word(ROWS, ["one", "two", ""], ["one", "two", ""])
    assert same == {"prompts": 3, "equal": True, "differing": []}
    other = word_for_word(ROWS, ["one", "two", ""], ["one", "two ", ""])
    assert not other["equal"]
    assert other["differing"] == [{"row": "1", "prompt": "What is 1?", "old": "two", "new": "two "}]


def test_a_releases_figures_are_read_from_its_metrics() -> None:
    recorded = {"math/forced/loss": 0.5, "math/forced/score": 0.75, "math/forced/rows": 32.0, "math/forced/bleu": 3.0,
                "math/routed/loss": 0.6, "math/base/loss": 2.0, "routing/accuracy": 0.9, "sql/routed/score": 1.0}
    assert figures(recorded) == {
        "math": {"forced": {"loss": 0.5, "score": 0.75}, "rows": 32, "routed": {"loss": 0.6}},
        "sql": {"routed": {"score": 1.0}}}


def test_routes_are_compared_on_the_rows_that_both_releases_had() -> None:
    old = {("math", "1"): "math", ("math", "2"): "math", ("math", "3"): "sql", ("math", "gone"): "math",
           ("sql", "1"): "sql"}
    new = {("math", "1"): "law", ("math", "2"): "math", ("math", "3"): "math", ("math", "new"): "law",
           ("sql", "1"): "sql", ("law", "1"): "law"}
    math, sql = paired(old, new)
    assert (math.domain, math.rows, math.before, math.after) == ("math", 3, {"math": 2, "sql": 1},
                                                                 {"math": 2, "law": 1})
    assert (math.lost, math.gained, math.fall) == ({"law": 1}, 1, 0)
    assert math.text == "from 66.7% to 66.7%, 1 prompt goes to law now"
    assert (sql.rows, sql.lost, sql.text) == (1, {}, "from 100.0% to 100.0%")


def facts(answer: str) -> dict[str, Any]:
    golden = {"math": word_for_word(ROWS[:2], ["one", "two"], ["one", answer])}
    return {"old": 3, "new": 4, "equal": golden["math"]["equal"], "golden": golden,
            "experts": expert_changes({"math": "a" * 64, "sql": "b" * 64}, {"math": "a" * 64, "sql": "c" * 64}),
            "table": [{"version": version, "champion": True, "domains": figures(
                {"math/forced/loss": version / 8, "math/forced/score": 1.0, "math/routed/loss": version / 4})}
                for version in (1, 3, 4)],
            "routing": {}}


def test_the_proof_in_words() -> None:
    said = text(facts("two")).splitlines()
    assert said[0] == "version 3 -> version 4"
    assert "math    same     aaaaaaaaaaaa                  2 of 2 equal" in said
    assert "sql     changed  bbbbbbbbbbbb -> cccccccccccc  -" in said
    assert "math    its own expert       0.1250  1.000  0.3750  1.000  0.5000  1.000" in said
    assert "math    the router's choice  0.2500  -      0.7500  -      1.0000  -" in said
    assert said[-1] == "routing: the releases recorded no test row that both were tested on"


def test_an_answer_that_differs_is_shown_and_named() -> None:
    said = text(facts("three"))
    assert "1 of 2 equal" in said
    assert "math answers otherwise: What is 1?\n  old: two\n  new: three" in said
    assert complaint(facts("three")).startswith(
        "Between versions 3 and 4 an expert that is the same bytes answers otherwise: math.")
