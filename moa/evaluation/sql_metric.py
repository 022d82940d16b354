"""Whether two SQL queries mean the same: both run on small made-up databases with the schema of the question.

The databases are in memory and read-only once they are filled. A query is bounded in steps of SQLite's virtual machine,
in rows and in bytes of a value, so that a hostile one ends without harm.
"""

import random
import re
import sqlite3
from collections import Counter
from datetime import date, timedelta

SEEDS = (0, 1)                # two databases: two different queries seldom agree on both
ROWS = 40                     # of each made-up table
MAX_RESULT_ROWS = 2_000       # of a result
MAX_STEPS = 1_000_000         # of SQLite's virtual machine, for one query: well under a second
MAX_BYTES = 1_000             # bytes of a value or row of a result: with the steps, a bound on memory
READ_ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION}
FORBIDDEN_FUNCTIONS = {"load_extension", "random", "randomblob", "zeroblob"}
TOKEN = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|\d+(?:\.\d+)?|\w+|\*""")
STATEMENT = re.compile(r"""(?:[^;'"]|'[^']*'|"[^"]*")*""")
FENCE = re.compile(r"```\w*\s*(.*?)(?:```|\Z)", re.DOTALL)
WORDS = ("amber", "birch", "coral", "delta", "ember", "fjord", "grove", "heath", "islet", "jade", "kelp", "lotus")

Cell = str | int | float | bytes | None
Literals = dict[str, list[str]]   # column, in lower case, to the literals it is compared with; "" = no one column


def _tables(question: str) -> list[str]:
    """The CREATE TABLE statements of a text, each to its closing parenthesis."""
    statements = []
    for match in re.finditer(r"create\s+table\b[^(]*\(", question, re.IGNORECASE):
        depth, end = 1, match.end()
        while depth and end < len(question):
            depth += {"(": 1, ")": -1}.get(question[end], 0)
            end += 1
        statements.append(question[match.start():end])
    return statements


def _literals(query: str, columns: set[str]) -> Literals:
    """The literals of a query under the column named last before them. Numbers that follow no column do not count."""
    found: Literals = {}
    column = ""
    for token in TOKEN.findall(query):
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
    for number in range(1, ROWS + 1):
        row: list[Cell] = []
        for name, kind, key in table:
            bound = literals.get(name, [])
            if "INT" in kind and (key or name == "id"):
                row.append(number)
            elif "INT" in kind and name.endswith("id") and (not bound or rng.random() < 0.5):
                row.append(rng.randint(1, ROWS))
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
        allowed = action in READ_ACTIONS and not (action == sqlite3.SQLITE_FUNCTION and detail in FORBIDDEN_FUNCTIONS)
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)   # now: the schema itself may be longer
    connection.set_authorizer(reads_only)
    return connection


def statement(text: str) -> str:
    """The first SQL statement of a text, taken out of its code fence if it has one; empty where there is none."""
    fenced = FENCE.search(text)
    found = STATEMENT.match((fenced.group(1) if fenced else text).strip())
    return found.group() if found else ""


def _run(connection: sqlite3.Connection, query: str) -> tuple[int, list[tuple[Cell, ...]]] | None:
    """Number of columns, and rows (floats to six places) of a query; None when it fails or exceeds a bound."""
    ticks = iter(range(MAX_STEPS // 1000))
    connection.set_progress_handler(lambda: next(ticks, None) is None, 1000)
    try:
        cursor = connection.execute(query)
        rows = cursor.fetchmany(MAX_RESULT_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        return None
    if cursor.description is None or len(rows) > MAX_RESULT_ROWS:
        return None
    return len(cursor.description), [tuple(round(cell, 6) if isinstance(cell, float) else cell for cell in row)
                                     for row in rows]


def _ordered(query: str) -> bool:
    """Whether the outermost query has an ORDER BY."""
    bare, inner = re.sub(r"'[^']*'", "", query), 1
    while inner:
        bare, inner = re.subn(r"\([^()]*\)", " ", bare)
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


def same_result(query: str, reference: str, question: str) -> bool | None:
    """Whether both queries give the same rows on made-up databases with the schema of `question`.

    Order counts only where `reference` has ORDER BY; column names never do. A query that writes, fails or takes too
    many steps is not the same. None without a usable schema, or where `reference` itself does not run on it.
    """
    for seed in SEEDS:
        try:
            connection = _database(_tables(question), reference, seed)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
            return None
        try:
            expected = _run(connection, reference)
            if expected is None:
                return None
            result = _run(connection, query)
        finally:
            connection.close()
        if result is None or result[0] != expected[0]:
            return False
        if Counter(result[1]) != Counter(expected[1]) or (_ordered(reference) and result[1] != expected[1]):
            return False
    return True
