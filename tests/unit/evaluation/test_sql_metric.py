"""The metric of SQL answers: queries that mean the same, that do not, and hostile ones."""

from pathlib import Path

import pytest

from moa.evaluation.metrics import sql_result

SCHEMA = ("Which staff in Oslo earn above 3000?\n\n"
          "CREATE TABLE staff (id INTEGER PRIMARY KEY, name TEXT, city VARCHAR(20), pay INTEGER);\n"
          "CREATE TABLE trips (staff_id INTEGER, cost REAL, day DATE);")
QUERY = "SELECT name FROM staff WHERE city = 'Oslo' AND pay > 3000;"
FOREVER = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "


@pytest.mark.parametrize(("prediction", "score"), [
    (QUERY, 1),
    ("```sql\nselect s.name from staff s where s.pay > 3000 and s.city = 'Oslo'\n```", 1),
    ("SELECT name FROM staff WHERE city = \"Oslo\" AND pay >= 3001; DROP TABLE staff;", 1),
    ("SELECT name AS who FROM staff WHERE city = 'Oslo' AND pay > 3000 ORDER BY pay", 1),
    ("SELECT name FROM staff WHERE city = 'Oslo' AND pay >= 3000", 0),
    ("SELECT name FROM staff WHERE city = 'Oslo' OR pay > 3000", 0),
    ("SELECT name, pay FROM staff WHERE city = 'Oslo' AND pay > 3000", 0),
    ("SELECT name FROM staff WHERE city = 'Bergen' AND pay > 3000", 0),
    ("SELECT nome FROM staff", 0), ("I do not know", 0), ("", 0), (";", 0), ("SELECT '", 0), ("SELECT \x00", 0),
    ("SELECT ?", 0), ("SELECT \ud800", 0), ("SELECT CAST(x'ff' AS TEXT)", 0),
])
def test_sql_result(prediction: str, score: float) -> None:
    assert sql_result(prediction, QUERY, SCHEMA) == score


@pytest.mark.parametrize("reference", [
    "SELECT city, COUNT(*) FROM staff GROUP BY city HAVING COUNT(*) > 3",
    "SELECT name FROM staff WHERE name LIKE 'Jo%'",
    "SELECT city, SUM(cost) FROM trips JOIN staff ON staff_id = id WHERE day > '2024-03-09' GROUP BY city",
    "SELECT name FROM staff WHERE id NOT IN (SELECT staff_id FROM trips WHERE cost BETWEEN 5 AND 9.5)",
])
def test_sql_result_of_other_shapes(reference: str) -> None:
    assert sql_result(reference, reference, SCHEMA) == 1
    assert sql_result(QUERY, reference, SCHEMA) == 0


def test_order_counts_only_when_asked_for() -> None:
    ordered, plain = "SELECT id FROM staff ORDER BY id DESC", "SELECT id FROM staff"
    assert sql_result(plain, ordered, SCHEMA) == 0
    assert sql_result(ordered, plain, SCHEMA) == 1
    inner = "SELECT id FROM (SELECT id FROM staff ORDER BY id)"
    assert sql_result(ordered, inner, SCHEMA) == 1


def test_sql_result_without_a_usable_schema_compares_the_texts() -> None:
    assert sql_result("select a from t", "SELECT a  FROM t;", "no schema") == 1
    assert sql_result("select b from t", "SELECT a FROM t;", "CREATE TABLE t (a INTEGER") == 0
    assert sql_result("SELECT x FROM t", "SELECT x FROM t;", "CREATE TABLE t (a INTEGER);") == 1


@pytest.mark.parametrize("prediction", [
    "DROP TABLE staff", "DELETE FROM staff", "UPDATE staff SET pay = 0", "CREATE TABLE t AS SELECT 1",
    "ATTACH 'moa-attached.db' AS other", "VACUUM INTO 'moa-attached.db'", "PRAGMA writable_schema = 1",
    "SELECT load_extension('moa-attached.db')", "SELECT randomblob(1000000000)", "SELECT zeroblob(1000000000)",
    FOREVER + "SELECT x FROM c", FOREVER + "SELECT COUNT(*) FROM c",
    FOREVER + "SELECT printf('%900d', x) FROM c ORDER BY 1", "SELECT " + "(" * 5000 + "1" + ")" * 5000,
])
def test_hostile_queries_end_and_score_zero(prediction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sql_result(prediction, QUERY, SCHEMA) == 0
    assert not list(tmp_path.iterdir())
