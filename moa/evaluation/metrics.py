"""Scores of answers: strings in, floats out. No files, no models, no knowledge of domains.

A metric is called as `metric(prediction, reference, question)` and returns a number from 0 to 1; `question` is the last
user message, with the schema in it for `sql_result`. A metric never raises, whatever the prediction.
"""

import importlib
import json
import math
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from decimal import Decimal
from functools import cache
from typing import Any

from moa.core.errors import ConfigError

Metric = Callable[[str, str, str], float]

NUMBER = re.compile(r"(?:(?<!\w)-)?\$?[0-9][0-9,]*(?:\.[0-9]+)?")


def last_number(text: str) -> Decimal | None:
    """The last number after the last `####` that has one behind it, else of the whole text."""
    for part in (text.rpartition("####")[2], text):
        if found := NUMBER.findall(part):
            return Decimal(found[-1].replace(",", "").replace("$", ""))
    return None


def final_number(prediction: str, reference: str, _question: str) -> float:
    """1 when the last numbers are equal (`$1,200.00` is `1200`), else 0; 0 when either text has none."""
    expected = last_number(reference)
    return float(expected is not None and last_number(prediction) == expected)


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, or None."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            return decoder.raw_decode(text, at)[0]
        except ValueError:   # not JSON, or more digits than an int may have
            at = text.find("{", at + 1)
        except RecursionError:   # nested beyond reason
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
    found = first_object(prediction)
    try:
        return float(expected is not None and found is not None and same_value(found, expected))
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
    found, expected = (Counter(re.findall(r"\w+", text.casefold())) for text in (prediction, reference))
    if not found or not expected:
        return float(found == expected)
    return 2 * (found & expected).total() / (found.total() + expected.total())


# sql_result: both queries are run on the same small made-up database, built from the schema in the question.

SQL_SEEDS = (0, 1)          # two databases: two different queries seldom agree on both
SQL_ROWS = 40               # of each made-up table
SQL_MOST_ROWS = 2_000       # of a result
SQL_STEPS = 1_000_000       # of SQLite's virtual machine, for one query: well under a second
SQL_LONGEST = 1_000         # bytes of a value or row of a result: with the steps, a bound on memory
SQL_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION}
SQL_FORBIDDEN = {"load_extension", "random", "randomblob", "zeroblob"}
SQL_TOKEN = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|\d+(?:\.\d+)?|\w+|\*""")
SQL_STATEMENT = re.compile(r"""(?:[^;'"]|'[^']*'|"[^"]*")*""")
FENCE = re.compile(r"```\w*\s*(.*?)(?:```|\Z)", re.DOTALL)
WORDS = ("amber", "birch", "coral", "delta", "ember", "fjord", "grove", "heath", "islet", "jade", "kelp", "lotus")

Cell = str | int | float | bytes | None
Literals = dict[str, list[str]]   # column, in lower case, to the literals it is compared with; "" = no one column


def _tables(question: str) -> list[str]:
    """The CREATE TABLE statements of a text, each to its closing parenthesis."""
    found = []
    for match in re.finditer(r"create\s+table\b[^(]*\(", question, re.IGNORECASE):
        depth, at = 1, match.end()
        while depth and at < len(question):
            depth += {"(": 1, ")": -1}.get(question[at], 0)
            at += 1
        found.append(question[match.start():at])
    return found


def _literals(query: str, columns: set[str]) -> Literals:
    """The literals of a query under the column named last before them. Numbers that follow no column do not count."""
    found: Literals = {}
    column = ""
    for token in SQL_TOKEN.findall(query):
        name = token.strip('"').lower()
        if name in columns:
            column = name
        elif token[0] in "'\"":
            found.setdefault(column, []).append(token[1:-1].replace("''", "'"))
        elif name in ("*", "limit", "offset"):
            column = ""
        elif token[0].isdigit() and column:
            found.setdefault(column, []).append(token)
    return found


def _number(rng: random.Random, literals: list[str], real: bool) -> int | float:
    """A number that is often one of the literals, or next to one: that is where comparisons differ."""
    near = [float(text) for text in literals if re.fullmatch(r"\d{1,15}(\.\d+)?", text)]
    if near:
        value = rng.choice(near)
        value = rng.choice((value, value, value, value - 1, value + 1, rng.uniform(0, 2 * value)))
    else:
        value = rng.uniform(1, 1000)
    return round(value, 2) if real else round(value)


def _day(rng: random.Random, literals: list[str]) -> str:
    known = [text for text in literals if re.fullmatch(r"[12]\d{3}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d)", text)]
    if known and rng.random() < 0.8:
        near = date.fromisoformat(rng.choice(known))
        return (near + timedelta(days=rng.choice((0, 0, -1, 1, rng.randint(-200, 200))))).isoformat()
    return (date(2019, 1, 1) + timedelta(days=rng.randrange(2400))).isoformat()


def _text(rng: random.Random, literals: list[str], words: list[str]) -> str:
    """Half the time a literal (a LIKE pattern with its wildcards filled), else one of `words`, the first ones most."""
    if literals and rng.random() < 0.5:
        return rng.choice(literals).replace("%", rng.choice(("", words[0]))).replace("_", "a")
    return words[int(len(words) * rng.random() ** 2)]


def _rows(table: list[tuple[str, str, bool]], literals: Literals, rng: random.Random) -> list[list[Cell]]:
    """Made-up rows for columns given as (name, declared type, is the primary key)."""
    words = {name: rng.sample(WORDS, rng.randint(4, len(WORDS))) for name, _, _ in table}
    rows: list[list[Cell]] = []
    for number in range(1, SQL_ROWS + 1):
        row: list[Cell] = []
        for name, kind, key in table:
            bound = literals.get(name, [])
            if "INT" in kind and (key or name == "id"):
                row.append(number)
            elif "INT" in kind and name.endswith("id") and (not bound or rng.random() < 0.5):
                row.append(rng.randint(1, SQL_ROWS))
            elif re.search("INT|REAL|FLOA|DOUB|NUM|DEC", kind):
                row.append(_number(rng, bound, "INT" not in kind))
            elif re.search("DATE|TIME", kind) or name.endswith("date"):
                row.append(_day(rng, bound))
            else:
                loose = literals.get("", [])
                row.append(f"{words[name][0]} {number}" if key else _text(rng, bound + loose, words[name]))
        rows.append(row)
    return rows


def _database(tables: list[str], reference: str, seed: int) -> sqlite3.Connection:
    """The tables in memory, filled so that the reference's conditions hold for some rows; from here on read-only."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in tables:
        connection.execute(statement)
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    columns = {name: [(row[1].lower(), row[2].upper(), bool(row[5]))
                      for row in connection.execute(f'PRAGMA table_info("{name}")')] for name in names}
    literals = _literals(reference, {column for table in columns.values() for column, _, _ in table})
    rng = random.Random(f"{seed} {tables}")   # noqa: S311 - made-up rows, not cryptography
    for name in names:
        marks = ", ".join("?" * len(columns[name]))
        # A row that breaks a constraint of the schema is left out.
        connection.executemany(f'INSERT OR IGNORE INTO "{name}" VALUES ({marks})',   # noqa: S608
                               _rows(columns[name], literals, rng))

    def reads_only(action: int, _: str | None, detail: str | None, *__: str | None) -> int:
        allowed = action in SQL_READS and not (action == sqlite3.SQLITE_FUNCTION and detail in SQL_FORBIDDEN)
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, SQL_LONGEST)   # now: the schema itself may be longer
    connection.set_authorizer(reads_only)
    return connection


def _statement(text: str) -> str:
    """The first statement, out of its code fence if it has one."""
    fenced = FENCE.search(text)
    found = SQL_STATEMENT.match((fenced.group(1) if fenced else text).strip())
    return found.group() if found else ""


def _answer(connection: sqlite3.Connection, query: str) -> tuple[int, list[tuple[Cell, ...]]] | None:
    """Number of columns and rows (floats to six places) of a query; None when it fails or goes on too long."""
    ticks = iter(range(SQL_STEPS // 1000))
    connection.set_progress_handler(lambda: next(ticks, None) is None, 1000)
    try:
        cursor = connection.execute(query)
        rows = cursor.fetchmany(SQL_MOST_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        return None
    if cursor.description is None or len(rows) > SQL_MOST_ROWS:
        return None
    return len(cursor.description), [tuple(round(cell, 6) if isinstance(cell, float) else cell for cell in row)
                                     for row in rows]


def _ordered(query: str) -> bool:
    """Whether the outermost query has an ORDER BY."""
    bare, inner = re.sub(r"'[^']*'", "", query), 1
    while inner:
        bare, inner = re.subn(r"\([^()]*\)", " ", bare)
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


def sql_result(prediction: str, reference: str, question: str) -> float:
    """1 when both queries give the same rows on made-up databases of the question's schema, else 0.

    Order counts only where the reference has ORDER BY; column names never do. A query that writes, fails or takes too
    many steps scores 0. Without a schema, or with a reference that does not run on it, the texts are compared.
    """
    wanted, given = _statement(reference), _statement(prediction)
    for seed in SQL_SEEDS:
        try:
            connection = _database(_tables(question), reference, seed)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
            return exact(given, wanted, question)
        try:
            expected = _answer(connection, wanted)
            if expected is None:
                return exact(given, wanted, question)
            found = _answer(connection, given)
        finally:
            connection.close()
        if found is None or found[0] != expected[0]:
            return 0.0
        if Counter(found[1]) != Counter(expected[1]) or (_ordered(wanted) and found[1] != expected[1]):
            return 0.0
    return 1.0


METRICS: dict[str, Metric] = {
    "final_number": final_number,
    "sql_result": sql_result,
    "json_equal": json_equal,
    "rouge_l": rouge_l,
    "exact": exact,
    "token_f1": token_f1,
}


def resolve(name: str) -> Metric:
    """The metric called `name` here, or the function behind `module:function`. Raises ConfigError for neither."""
    if name in METRICS:
        return METRICS[name]
    known = ", ".join(METRICS)
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise ConfigError(f"No metric {name!r}; there are {known}, or write module:function for your own.")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"The metric {name!r} cannot be imported ({error}); metrics of moa are {known}.") from error
    if not callable(found):
        raise ConfigError(f"The metric {name!r} is not a function; metrics of moa are {known}.")
    return found


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
