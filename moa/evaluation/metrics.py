"""Scores of answers: strings in, floats out, without files or models.

A metric is called as `metric(prediction, reference, question)` and returns a number from 0 to 1; `question` is the last
user message, with the schema in it for `sql_result`. A metric never raises, whatever the prediction.
"""

import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

from moa.core.errors import ConfigError
from moa.evaluation import sql_metric

Metric = Callable[[str, str, str], float]

NUMBER = re.compile(r"(?:(?<!\w)-)?\$?[0-9][0-9,]*(?:\.[0-9]+)?")


def last_number(text: str) -> Decimal | None:
    """The last number after the last `####`; without one there, the last number of the whole text; None without any."""
    for part in (text.rpartition("####")[2], text):
        if found := NUMBER.findall(part):
            return Decimal(found[-1].replace(",", "").replace("$", ""))
    return None


def final_number(prediction: str, reference: str, _question: str) -> float:
    """1 when the last numbers are equal (`$1,200.00` is `1200`), else 0; 0 when either text has none."""
    expected = last_number(reference)
    return float(expected is not None and last_number(prediction) == expected)


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text; None where there is none."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            return decoder.raw_decode(text, start)[0]
        except ValueError:   # not JSON, or more digits than an int may have
            start = text.find("{", start + 1)
        except RecursionError:   # nested too deeply
            return None
    return None


def same_value(one: Any, other: Any) -> bool:
    """Equality of JSON values: 2 is 2.0, but true is not 1 and "2" is not 2."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    return bool(one == other)


def json_equal(prediction: str, reference: str, _question: str) -> float:
    """1 when the first JSON object of both texts is the same, in any key order, else 0; 0 when either has none."""
    expected = first_object(reference)
    predicted = first_object(prediction)
    try:
        return float(expected is not None and predicted is not None and same_value(predicted, expected))
    except RecursionError:
        return 0.0


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def rouge_l(prediction: str, reference: str, _question: str) -> float:
    """F1 of the longest common subsequence of words: its length over each text's words; 0 when nothing is shared."""
    return float(_rouge().score(reference, prediction)["rougeL"].fmeasure)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def exact(prediction: str, reference: str, _question: str) -> float:
    """1 when the texts are equal but for case, white space and closing full stops, else 0."""
    return float(_plain(prediction) == _plain(reference))


def token_f1(prediction: str, reference: str, _question: str) -> float:
    """F1 of the two bags of words: shared words over each text's words; 1 when both have none, 0 when one has none."""
    predicted, expected = (Counter(re.findall(r"\w+", text.casefold())) for text in (prediction, reference))
    if not predicted or not expected:
        return float(predicted == expected)
    return 2 * (predicted & expected).total() / (predicted.total() + expected.total())


def sql_result(prediction: str, reference: str, question: str) -> float:
    """1 when both queries give the same rows on made-up databases of the question's schema, else 0.

    Without a schema, or with a reference that does not run on it, the texts are compared as `exact` does.
    """
    query, expected = sql_metric.statement(prediction), sql_metric.statement(reference)
    same = sql_metric.same_result(query, expected, question)
    return exact(query, expected, question) if same is None else float(same)


METRICS: dict[str, Metric] = {
    "final_number": final_number,
    "sql_result": sql_result,
    "json_equal": json_equal,
    "rouge_l": rouge_l,
    "exact": exact,
    "token_f1": token_f1,
}


def resolve(name: str) -> Metric:
    """The metric called `name` in `METRICS`, or the function at `module:function`. Raises ConfigError for neither."""
    if name in METRICS:
        return METRICS[name]
    known = ", ".join(METRICS)
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise ConfigError(f"No metric {name!r}; there are {known}, or write module:function for your own.")
    try:
        metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"The metric {name!r} cannot be imported ({error}); metrics of moa are {known}.") from error
    if not callable(metric):
        raise ConfigError(f"The metric {name!r} is not a function; metrics of moa are {known}.")
    return metric


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 by sacreBLEU, 0 to 100: the geometric mean of n-gram precisions (clipped matches over predicted
    n-grams, summed over the corpus) times the brevity penalty. NaN when there are no rows."""
    import sacrebleu

    assert len(predictions) == len(references), "one reference for each prediction"
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score) if predictions else math.nan


def rouge_l_mean(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Sum of `rouge_l` over rows / rows. NaN when there are no rows."""
    scores = [rouge_l(one, other, "") for one, other in zip(predictions, references, strict=True)]
    return math.fsum(scores) / len(scores) if scores else math.nan
