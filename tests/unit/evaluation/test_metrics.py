"""Metrics on answers written by hand, on hostile ones, and on any text at all."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.core.errors import ConfigError
from moa.evaluation.metrics import (
    METRICS,
    bleu,
    exact,
    final_number,
    json_equal,
    resolve,
    rouge_l,
    rouge_l_mean,
)
from moa.evaluation.metrics import token_f1 as f1

SCHEMA = ("Which staff in Oslo earn above 3000?\n\n"
          "CREATE TABLE staff (id INTEGER PRIMARY KEY, name TEXT, city VARCHAR(20), pay INTEGER);\n"
          "CREATE TABLE trips (staff_id INTEGER, cost REAL, day DATE);")
QUERY = "SELECT name FROM staff WHERE city = 'Oslo' AND pay > 3000;"


@pytest.mark.parametrize(("prediction", "reference", "score"), [
    ("4 x 6 = 24.\n#### 24", "#### 24", 1), ("The answer is 24.", "#### 24", 1), ("#### 24 or 25", "#### 24", 0),
    ("It costs $1,200.00.", "#### 1200", 1), ("24 first\n####", "#### 24", 1), ("", "#### 24", 0),
    ("none", "no number either", 0), ("30 - 6", "6", 1), ("It is -6", "6", 0), ("-$6", "-6", 1), ("0.5", "5", 0),
    ("#### 7 because 3 + 4", "#### 4", 1),
])
def test_final_number(prediction: str, reference: str, score: float) -> None:
    assert final_number(prediction, reference, "") == score


@pytest.mark.parametrize(("prediction", "score"), [
    ('{"b": "x", "a": 2.0}', 1), ('Sure: {"a": 2, "b": "x"} and {"a": 3}', 1), ('```json\n{"a": 2, "b": "x"}\n```', 1),
    ('{"a": "2", "b": "x"}', 0), ('{"a": 2}', 0), ('{"a": true, "b": "x"}', 0), ('{"a": 2, "b": "x"', 0), ("", 0),
    ('{"a": ' * 50_000, 0), ('{"a": ' + "9" * 5000 + "}", 0), ("{ {not json} " '{"a": 2, "b": "x"}', 1),
])
def test_json_equal(prediction: str, score: float) -> None:
    assert json_equal(prediction, '{"a": 2, "b": "x"}', "") == score


def test_json_equal_needs_an_object_in_the_reference_and_knows_truth_from_one() -> None:
    assert json_equal("{}", "no object", "") == 0
    assert json_equal('{"a": [1, {"b": null}]}', '{"a": [1.0, {"b": null}]}', "") == 1
    assert json_equal('{"a": 1}', '{"a": true}', "") == 0


def test_text_metrics() -> None:
    assert exact(" Next  Friday. ", "next friday", "") == 1
    assert exact("Friday", "Thursday", "") == 0
    assert rouge_l("a b c d", "a c d", "") == pytest.approx(2 * 0.75 / 1.75)
    assert f1("a b b", "b b c", "") == pytest.approx(2 / 3)
    assert f1("", "", "") == 1
    assert f1("...", "word", "") == 0


def test_corpus_figures() -> None:
    lines = ["the cat sat on the mat", "a dog ran over the hill"]
    assert bleu(lines, lines) == pytest.approx(100)
    assert bleu(["x y z w", "q"], lines) < 5
    assert rouge_l_mean(lines, [lines[0], "nothing shared"]) == pytest.approx(0.5)
    assert math.isnan(bleu([], []))
    assert math.isnan(rouge_l_mean([], []))


def test_resolve_knows_names_and_import_paths() -> None:
    assert resolve("exact") is exact
    assert resolve("moa.evaluation.metrics:exact") is exact


@pytest.mark.parametrize("name", ["accuracy", "nowhere.at.all:f", "moa.evaluation.metrics:nothing",
                                  "moa.evaluation.metrics:METRICS", ":", "",
                                  "moa.evaluation.metrics:", ".x:y"])
def test_resolve_refuses_in_one_sentence_with_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError, match="final_number, sql_result, json_equal, rouge_l, exact, token_f1"):
        resolve(name)


fragments = st.sampled_from(["SELECT", " name ", "FROM staff", "'", '"', "(", ")", ";", "```", "####", "{", "}", ":",
                             "[", "-$1,", "0.", "9" * 30, "\x00", "\ud800", "%", "--", "/*", "WITH RECURSIVE", "\n",
                             "²", "٣"])
texts = st.one_of(st.text(max_size=60), st.lists(fragments, max_size=12).map("".join),
                  st.recursive(st.none() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
                               | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8).map(json.dumps))
REFERENCES = {"final_number": "#### 24", "sql_result": QUERY, "json_equal": '{"a": 1}'}


@pytest.mark.parametrize("name", METRICS)
@given(prediction=texts, reference=st.none() | texts)
@settings(max_examples=80, deadline=None)
def test_any_text_scores_between_zero_and_one(name: str, prediction: str, reference: str | None) -> None:
    wanted = REFERENCES.get(name, "Return the name.") if reference is None else reference
    assert 0 <= METRICS[name](prediction, wanted, SCHEMA) <= 1
