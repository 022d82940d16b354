"""The corpora that moa makes: deterministic, varied, and right. Answers are worked out again from the questions."""

import ast
import calendar
import itertools
import json
import re
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from moa.core.errors import UsageError
from moa.data.quickstart import generate
from moa.evaluation.metrics import METRICS, sql_result

Row = dict[str, str]


# The Python corpus is read from the standard library's sources, in seconds; the others are generated at once.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "python" else name for name in generate.NAMES]


class Corpora(dict[str, list[Row]]):
    """Rows by the name of their corpus, which is written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, name: str) -> list[Row]:
        generate.write(name, self._folder / name)
        lines = (self._folder / name / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        self[name] = list(map(json.loads, lines))
        return self[name]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return Corpora(tmp_path_factory.mktemp("raw"))


def question(row: Row) -> str:
    return "\n\n".join(row[key] for key in ("instruction", "input") if key in row)


@pytest.mark.parametrize("name", ["math", "sql", "extract", "calendar"])
def test_same_seed_same_bytes_and_another_seed_other_rows(name: str, tmp_path: Path) -> None:
    for folder, seed in (("one", 0), ("two", 0), ("other", 1)):
        assert generate.write(name, tmp_path / folder, rows=50, seed=seed) == 50
    one, two, other = ((tmp_path / folder / "rows.jsonl").read_bytes() for folder in ("one", "two", "other"))
    assert one == two != other


@pytest.mark.slow
def test_the_python_corpus_is_deterministic_too(corpora: dict[str, list[Row]], tmp_path: Path) -> None:
    generate.write("python", tmp_path / "again")
    again = (tmp_path / "again" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, again)) == corpora["python"]


def test_writing_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "calendar").mkdir()
    (tmp_path / "calendar" / "old.jsonl").write_text("{}")
    generate.write("calendar", tmp_path / "calendar", rows=3)
    assert [path.name for path in (tmp_path / "calendar").iterdir()] == ["rows.jsonl"]


def test_an_unknown_corpus_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'poetry'.*math, sql, extract, python, calendar"):
        generate.write("poetry", tmp_path / "poetry")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_many_and_well_formed(corpora: dict[str, list[Row]], name: str) -> None:
    rows = corpora[name]
    assert len(rows) >= 400
    for row in rows:
        assert set(row) <= {"instruction", "input", "output"}
        assert all(text and text == text.strip() for text in row.values())
        assert not re.search(r"[{}]", row["instruction"]), "a placeholder was left"
        assert not re.search(r"\b[Aa] (?!one)[aeio]", row["instruction"]), "wrong article"


@pytest.mark.parametrize("name", NAMES)
def test_no_two_rows_nearly_repeat_each_other(corpora: dict[str, list[Row]], name: str) -> None:
    texts = [" ".join(row.values()).lower().split() for row in corpora[name]]
    assert len(set(map(tuple, texts))) == len(texts)
    shingles = [set(zip(text, text[1:], text[2:], strict=False)) for text in texts]
    for one, other in itertools.combinations(shingles, 2):
        assert len(one & other) < 0.9 * len(one | other)


# math

def test_every_equation_is_right_and_the_last_one_is_the_answer(corpora: dict[str, list[Row]]) -> None:
    signs = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, "/": int.__floordiv__}
    for row in corpora["math"]:
        steps, answer = row["output"].split("\n#### ")
        equations = re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)", steps)
        assert 2 <= len(equations) <= 4
        for left, sign, right, result in equations:
            assert signs[sign](int(left), int(right)) == int(result), row
            assert sign != "/" or int(left) % int(right) == 0
            assert 0 < int(result) <= 200
        assert equations[-1][3] == answer


def test_every_number_of_a_working_comes_from_the_question_or_an_earlier_step(corpora: dict[str, list[Row]]) -> None:
    said = {2, 3, 4}   # half, twice, average of three, legs
    for row in corpora["math"]:
        known = said | set(map(int, re.findall(r"\d+", row["instruction"])))
        for left, _, right, result in re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)", row["output"]):
            assert {int(left), int(right)} <= known, row
            known.add(int(result))


# sql

def test_every_query_runs_and_is_told_from_others(corpora: dict[str, list[Row]]) -> None:
    rows = corpora["sql"]
    assert all(sql_result(row["output"], row["output"], question(row)) == 1 for row in rows)
    following = zip(rows, rows[1:] + rows[:1], strict=True)
    mistaken = [sql_result(other["output"], row["output"], question(row)) for row, other in following]
    assert sum(mistaken) < 0.02 * len(rows)


@pytest.mark.parametrize(("right", "wrong"), [
    (" > ", " < "), (" >= ", " > "), (" DESC", ""), ("AVG", "SUM"), ("MAX", "MIN"), (" AND ", " OR "), ("= '", "!= '"),
])
def test_small_mistakes_change_results(corpora: dict[str, list[Row]], right: str, wrong: str) -> None:
    rows = [row for row in corpora["sql"] if right in row["output"]]
    scores = [sql_result(row["output"].replace(right, wrong), row["output"], question(row)) for row in rows]
    assert rows
    assert sum(scores) <= 0.1 * len(rows)


def test_results_are_seldom_empty(corpora: dict[str, list[Row]]) -> None:
    """An empty result is one that a condition which never holds would give as well."""
    rows = [row for row in corpora["sql"] if re.match(r"SELECT [a-z]+ FROM \w+ WHERE [^()]*;", row["output"])]
    nothing = [sql_result(re.sub(r"WHERE .*", "WHERE 0", row["output"]), row["output"], question(row)) for row in rows]
    assert len(rows) > 50
    assert sum(nothing) < 0.05 * len(rows)


def test_values_of_a_query_are_in_its_question(corpora: dict[str, list[Row]]) -> None:
    for row in corpora["sql"]:
        for value in re.findall(r"'([^']*)'", row["output"]):
            assert value in row["instruction"]


# extract

def test_every_record_is_json_with_the_keys_asked_for(corpora: dict[str, list[Row]]) -> None:
    for row in corpora["extract"]:
        record: dict[str, Any] = json.loads(row["output"])
        places = [re.search(rf"\b{key}\b", row["instruction"].split(" state?")[0]) for key in record]
        assert all(places), row
        assert METRICS["json_equal"](row["output"], json.dumps(record, indent=2), question(row)) == 1


def test_records_are_normalised(corpora: dict[str, list[Row]]) -> None:
    iso = re.compile(r"\d{4}-\d\d-\d\d")
    dates = 0
    for row in corpora["extract"]:
        for key, value in json.loads(row["output"]).items():
            if isinstance(value, str) and iso.fullmatch(value):
                dates += 1
                day = date.fromisoformat(value)
                month = calendar.month_name[day.month]
                written = (f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}", f"{day:%d.%m.%Y}",
                           f"{day.day} {month[:3]} {day.year}", f"{month[:3]} {day.day}, {day.year}")
                assert any(form in row["input"] for form in written), row
            if key in ("total", "price", "amount", "salary", "deposit", "refund", "fee", "rent"):
                assert f"{value:,}" in row["input"] or f"{value:,.2f}" in row["input"], row
            if key == "currency":
                assert re.fullmatch("[A-Z]{3}", value)
    assert dates > 100


# python

@pytest.mark.slow
def test_sources_are_code_without_the_summary(corpora: dict[str, list[Row]]) -> None:
    for row in corpora["python"]:
        assert row["output"].rstrip(".").lower() not in row["input"].lower()
        assert row["output"].isascii()
        assert row["output"][0].isalpha()
        assert 3 <= len(row["output"].split()) <= 25
        ast.parse(row["input"])
    assert len({row["output"] for row in corpora["python"]}) == len(corpora["python"])


# calendar

DAY = re.compile(rf"(\d+) ({'|'.join(calendar.month_name[1:])}) (\d{{4}})")
MONTHS = list(calendar.month_name)
WEEKDAYS = list(calendar.day_name)


def written(day: date) -> str:
    return f"{day.day} {MONTHS[day.month]} {day.year}"


def solve_dates(text: str, days: list[date], numbers: list[int], weekdays: list[int]) -> str:
    """The answer to a question that states a whole date."""
    if found := re.search(r"(first|second|third|fourth) (\w+day)", text):
        month = [days[0] + timedelta(days=later) for later in range(28)]
        those = [day for day in month if WEEKDAYS[day.weekday()] == found.group(2)]
        return written(those[("first", "second", "third", "fourth").index(found.group(1))])
    if "weekday" in text:
        nth = re.search(r"the (\d+)(st|nd|rd|th)", text)
        assert nth and days[0].weekday() == weekdays[0]
        return WEEKDAYS[days[0].replace(day=int(nth.group(1))).weekday()]
    if len(days) == 2:
        return f"{(days[1] - days[0]).days} days"
    if "every" in text:
        ordinal = next(word for word in ("first", "second", "third") if f"{word} time" in text)
        return written(days[0] + timedelta(days=(1 + ("first", "second", "third").index(ordinal)) * numbers[0]))
    before = "days before" in text
    return written(days[0] + timedelta(days=-numbers[0] if before else numbers[0]))


def solve_times(text: str, times: list[int], numbers: list[int]) -> str:
    """The answer to a question that states a time of day."""
    def clock(minutes: int) -> str:
        return f"{minutes // 60 % 24:02}:{minutes % 60:02}"

    if " ahead" in text or " behind" in text:
        then = times[0] + 60 * numbers[0] * (1 if " ahead" in text else -1)
        return clock(then) + (" the next day" if then >= 1440 else " the previous day" if then < 0 else "")
    if len(times) == 2 and numbers:
        return clock(next(at for at in itertools.count(times[0], numbers[0]) if at >= times[1]))
    if len(times) == 2:
        hours, minutes = divmod((times[1] - times[0]) % 1440, 60)
        return " ".join([f"{hours} hour" + "s" * (hours > 1)] * bool(hours) + [f"{minutes} minutes"] * bool(minutes))
    if "must end" in text or "was over" in text:
        hour, minute = (re.search(rf"(\d+) {unit}", text) for unit in ("hour", "minute"))
        return clock(times[0] - 60 * int(hour.group(1) if hour else 0) - int(minute.group(1) if minute else 0))
    return clock(times[0] + numbers[0])


def solve(text: str) -> str:
    """The answer, worked out from the question's words alone."""
    days = [date(int(year), MONTHS.index(month), int(day)) for day, month, year in DAY.findall(text)]
    times = [int(hour) * 60 + int(minute) for hour, minute in re.findall(r"(\d\d):(\d\d)", text)]
    bare = re.sub(r"\d\d:\d\d", "", DAY.sub("", text))
    numbers = [int(number) for number in re.findall(r"\b\d+\b", bare) if int(number) < 1000]
    weekdays = [WEEKDAYS.index(name) for name in re.findall("|".join(WEEKDAYS), text)]
    if days:
        return solve_dates(text, days, numbers, weekdays)
    if times:
        return solve_times(text, times, numbers)
    months = re.findall(rf"({'|'.join(MONTHS[1:])})", text)
    year = re.search(r"\b20\d\d\b", text)
    if len(months) == 2 and year:
        return f"{sum(calendar.monthrange(int(year.group()), MONTHS.index(month))[1] for month in months)} days"
    if months and year:
        end = int(year.group()) * 12 + MONTHS.index(months[0]) - 1 + numbers[0]
        return f"{MONTHS[end % 12 + 1]} {end // 12}"
    if "working days" in text or "weekends are free" in text:
        ahead: Iterator[int] = (day % 7 for day in itertools.count(weekdays[0]) if day % 7 < 5)
        return WEEKDAYS[next(itertools.islice(ahead, numbers[0] - 1, None))]
    past = " ago" in text or "days before" in text
    return WEEKDAYS[(weekdays[0] + (-numbers[0] if past else numbers[0])) % 7]


def test_every_calendar_answer_follows_from_its_question(corpora: dict[str, list[Row]]) -> None:
    for row in corpora["calendar"]:
        assert solve(row["instruction"]) == row["output"], row
