"""Questions about a small schema, each answered by one SQLite query. The tables themselves are in `tables.yaml`.

A shape is some wordings of a question and the query that answers it; `draw_fields` fills in what stands in braces.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from moa.data.quickstart.bank import Row, distinct, load

JOINED = 0.2   # share of questions about two tables
WHOLE = 0.75   # share of schemas that show both text columns, and of those that show both number columns
AGGREGATES = (("AVG", "average"), ("SUM", "total"), ("MAX", "maximum"), ("MIN", "minimum"))
COMPARISONS = (
    (">", ("above", "greater than", "of more than")), ("<", ("below", "less than", "under")),
    (">=", ("of at least", "not less than")), ("<=", ("of at most", "not more than")),
)
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}

Shape = tuple[tuple[str, ...], str]   # wordings of the question, query


@dataclass(frozen=True)
class Label:
    """A text column: `noun` names it in a question, and rows have these `values`."""

    column: str
    noun: str
    values: list[str]


@dataclass(frozen=True)
class Measure:
    """A number column: `noun` names it in a question, `most` and `least` are the words for the ends of its range."""

    column: str
    noun: str
    low: int
    high: int
    most: str
    least: str
    kind: str = "INTEGER"


@dataclass(frozen=True)
class Table:
    """`one` and `many` name its rows; `name` is the column that tells them apart; `day` is a date column."""

    table: str
    one: str
    many: str
    name: str
    labels: tuple[Label, ...]
    measures: tuple[Measure, ...]
    day: str | None = None


@dataclass(frozen=True)
class Link:
    """Rows of table `owned`, each called `one`, refer to rows of table `owner` by their column `key`."""

    owner: str
    owned: str
    one: str
    key: str


SHAPES: tuple[Shape, ...] = (
    (("List the {name} of all {many} {said}.", "Which {many} are there {said}? Give the {name}."),
     "SELECT {name} FROM {table} WHERE {where};"),
    (("Show {name} and {measure} of the {many} {is_said}.", "What are {name} and {measure} of every {one} {is_said}?"),
     "SELECT {name}, {number} FROM {table} WHERE {is_where};"),
    (("How many {many} {said} are there?", "Count the {many} {said}."), "SELECT COUNT(*) FROM {table} WHERE {where};"),
    (("Which {many} are {is_said} {link} {more_said}? Give the {name}.",
      "List the {name} of {many} {is_said} {link} {more_said}."),
     "SELECT {name} FROM {table} WHERE {is_where} {link_sql} {more_where};"),
    (("What is the {aggregate} {measure} of {many} {is_said}?",
      "Compute the {aggregate} {measure} over all {many} {is_said}."),
     "SELECT {function}({number}) FROM {table} WHERE {is_where};"),
    (("Which {one} {is_said} has the {end} {measure}? Give the {name}.",
      "Find the {name} of the {one} {is_said} that has the {end} {measure}."),
     "SELECT {name} FROM {table} WHERE {is_where} ORDER BY {number}{order} LIMIT 1;"),
    (("Give the {name} of the {count_word} {many} with the {end} {measure}, {end} first.",
      "Starting from the {end} {measure}, name the first {count_word} {many} by {name}."),
     "SELECT {name} FROM {table} ORDER BY {number}{order} LIMIT {count};"),
    (("List the {name} of {many} {is_said} in order of {way} {measure}.",
      "Sort the {many} {is_said} by {way} {measure} and show the {name}."),
     "SELECT {name} FROM {table} WHERE {is_where} ORDER BY {number}{order};"),
    (("For each {label}, count the {many} {more_said}.", "How many {many} {more_said} does each {label} have?"),
     "SELECT {text}, COUNT(*) FROM {table} WHERE {more_where} GROUP BY {text};"),
    (("Show the {aggregate} {measure} of {many} per {label}.",
      "What is the {aggregate} {measure} of the {many} for each {label}?"),
     "SELECT {text}, {function}({number}) FROM {table} GROUP BY {text};"),
    (("Which {label} values occur for more than {count_word} {many}?",
      "Find each {label} that more than {count_word} {many} share."),
     "SELECT {text} FROM {table} GROUP BY {text} HAVING COUNT(*) > {count};"),
    (("Which different {label} values do {many} {more_said} have?",
      "List every {label} once among {many} {more_said}."),
     "SELECT DISTINCT {text} FROM {table} WHERE {more_where};"),
    (("List the {name} of {many} with {a_measure} from {low} to {high}.",
      "Which {many} have {a_measure} between {low} and {high}? Give the {name}."),
     "SELECT {name} FROM {table} WHERE {number} BETWEEN {low} AND {high};"),
    (("Count the {many} whose {label} is {value} or {value2}.",
      "How many {many} have {value} or {value2} as their {label}?"),
     "SELECT COUNT(*) FROM {table} WHERE {text} IN ('{value}', '{value2}');"),
    (("Give the {name} of every {one} whose {label} is neither {value} nor {value2}.",
      "Leaving out {label} {value} and {value2}, which {many} are there? Give the {name}."),
     "SELECT {name} FROM {table} WHERE {text} NOT IN ('{value}', '{value2}');"),
    (("Which {many} have {a_measure} {side} the average? Give the {name}.",
      "List the {name} of {many} whose {measure} is {side} average."),
     "SELECT {name} FROM {table} WHERE {number} {sign} (SELECT AVG({number}) FROM {table});"),
)
DATED: tuple[Shape, ...] = (
    (("Which {many} have {a_day} date {when} {date}? Give the {name}.",
      "List the {name} of {many} whose {day} date is {when} {date}."),
     "SELECT {name} FROM {table} WHERE {day} {sign} '{date}';"),
    (("How many {many} {is_said} have {a_day} date {when} {date}?",
      "Count the {many} {is_said} whose {day} date is {when} {date}."),
     "SELECT COUNT(*) FROM {table} WHERE {is_where} AND {day} {sign} '{date}';"),
)
# Rows of `{owned}` refer to rows of `{table}`.
OWNED: tuple[Shape, ...] = (
    (("How many {owned} belong to {many} {is_said}?", "Count the {owned} of {many} {is_said}."),
     "SELECT COUNT(*) FROM {join} WHERE {is_where};"),
    (("What is the {aggregate} cost of {owned} that belong to {many} {is_said}?",
      "Compute the {aggregate} cost over all {owned} of {many} {is_said}."),
     "SELECT {function}(cost) FROM {join} WHERE {is_where};"),
    (("For each {owned_one} {cost_condition}, show the {name} of its {one} and the cost.",
      "Show {name} of the {one} and cost for every {owned_one} {cost_condition}."),
     "SELECT {name}, cost FROM {join} WHERE {cost_where};"),
    (("Count the {owned} {cost_condition} per {label} of their {one}.",
      "How many {owned} {cost_condition} does each {label} of {many} have?"),
     "SELECT {text}, COUNT(*) FROM {join} WHERE {cost_where} GROUP BY {text};"),
)


def some_number(rng: random.Random, measure: Measure) -> int:
    """A random value inside the measure's range, rounded to a size of step that fits the range."""
    span = measure.high - measure.low
    step = next(size for size in (1000, 100, 10, 5, 1) if span >= 12 * size or size == 1)
    value = rng.randint(measure.low + span // 5, measure.high - span // 5)
    return value if measure.column == "year" else max(1, value // step * step)


def with_article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def compared(rng: random.Random, measure: Measure) -> tuple[str, str]:
    """A condition on a number column, in words and in SQL."""
    sign, ways = rng.choice(COMPARISONS)
    value = some_number(rng, measure)
    return f"with {with_article(measure.noun)} {rng.choice(ways)} {value}", f"{measure.column} {sign} {value}"


def draw_fields(rng: random.Random, table: Table, labels: tuple[Label, ...],
                measures: tuple[Measure, ...]) -> dict[str, object]:
    """A value for every field of a shape, with columns only from `labels` and `measures`, which the schema shows."""
    label, measure, marked = rng.choice(labels), rng.choice(measures), rng.choice(labels)
    value, value2 = rng.sample(label.values, 2)
    mark = rng.choice(marked.values)
    is_said, is_where = f"with {marked.noun} {mark}", f"{marked.column} = '{mark}'"
    more_said, more_where = compared(rng, rng.choice(measures))
    said, where = rng.choice(((is_said, is_where), (more_said, more_where)))
    low, high = sorted((some_number(rng, measure), some_number(rng, measure)))
    falling, greater, both = (rng.random() < 0.5 for _ in range(3))
    # A sum or an average of years means nothing.
    function, aggregate = rng.choice(AGGREGATES[2:] if measure.column == "year" else AGGREGATES)
    count = rng.choice(tuple(COUNTS))
    return {
        "table": table.table, "one": table.one, "many": table.many, "name": table.name,
        "day": table.day, "a_day": with_article(table.day or "day"),
        "text": label.column, "label": label.noun, "value": value, "value2": value2,
        "number": measure.column, "measure": measure.noun, "a_measure": with_article(measure.noun),
        "low": low, "high": high + (low == high), "function": function, "aggregate": aggregate,
        "is_said": is_said, "is_where": is_where, "more_said": more_said, "more_where": more_where,
        "said": said, "where": where, "link": "and" if both else "or", "link_sql": "AND" if both else "OR",
        "end": measure.most if falling else measure.least, "order": " DESC" if falling else "",
        "way": "falling" if falling else "rising", "count": count, "count_word": COUNTS[count],
        "sign": ">" if greater else "<", "side": "above" if greater else "below",
        "when": "after" if greater else "before",
        "date": f"{rng.randint(2019, 2024)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
    }


def about_one(rng: random.Random, tables: Sequence[Table]) -> Row:
    """A row whose query reads one table."""
    table = rng.choice(tables)
    labels = table.labels if rng.random() < WHOLE else (rng.choice(table.labels),)
    measures = table.measures if rng.random() < WHOLE else (rng.choice(table.measures),)
    columns = [f"{table.name} TEXT", *(f"{label.column} TEXT" for label in labels),
               *(f"{measure.column} {measure.kind}" for measure in measures)]
    if table.day:
        columns.append(f"{table.day} DATE")
    questions, query = rng.choice(SHAPES + DATED if table.day else SHAPES)
    fields = draw_fields(rng, table, labels, measures)
    return {"instruction": rng.choice(questions).format_map(fields),
            "input": f"CREATE TABLE {table.table} ({', '.join(columns)});",
            "output": query.format_map(fields)}


def about_two(rng: random.Random, tables: Sequence[Table], links: Sequence[Link]) -> Row:
    """A row whose query joins a table and another one whose rows belong to it."""
    link = rng.choice(links)
    table = next(table for table in tables if table.table == link.owner)
    label = rng.choice(table.labels)
    condition, where = compared(rng, Measure("cost", "cost", 10, 900, "highest", "lowest"))
    fields = draw_fields(rng, table, (label,), table.measures) | {
        "owned": link.owned, "owned_one": link.one, "cost_condition": condition, "cost_where": where,
        "join": f"{link.owned} JOIN {link.owner} ON {link.owned}.{link.key} = {link.owner}.id"}
    questions, query = rng.choice(OWNED)
    schema = (f"CREATE TABLE {link.owner} (id INTEGER, {table.name} TEXT, {label.column} TEXT);\n"
              f"CREATE TABLE {link.owned} ({link.key} INTEGER, cost INTEGER);")
    return {"instruction": rng.choice(questions).format_map(fields), "input": schema,
            "output": query.format_map(fields)}


def generate(rng: random.Random, rows: int) -> list[Row]:
    """`rows` rows of the corpus, or fewer where no more differ enough."""
    data = load("tables")
    tables = [Table(**entry | {"labels": tuple(Label(**label) for label in entry["labels"]),
                               "measures": tuple(Measure(**measure) for measure in entry["measures"])})
              for entry in data["tables"]]
    links = [Link(**entry) for entry in data["links"]]
    return distinct(lambda: about_two(rng, tables, links) if rng.random() < JOINED else about_one(rng, tables), rows)
