"""Word problems of two to four steps with the worked answer. Knows how a problem is told, not which ones there are.

The problems themselves are data, in `moa.data.quickstart.problems`. In a step, `<total = price * count>` is computed,
kept under its name for later steps, and shown as `4 x 6 = 24`; the last one is the answer.
"""

import operator
import random
import re
from collections.abc import Callable

from moa.data.quickstart.bank import Row, distinct, people
from moa.data.quickstart.problems import PROBLEMS, Problem

EQUATION = re.compile(r"<(\w+) = (\w+) ([-+*/]) (\w+)>")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv,
}
# A small model shall learn the steps, not long multiplication.
LARGEST = {"+": 200, "-": 200, "*": 120, "/": 200}
MOST_TRIES = 200


def compute(sign: str, left: int, right: int) -> int | None:
    """The result, or None where it is not a small whole number above zero."""
    if sign == "/" and (right < 2 or left % right):
        return None
    result = OPERATIONS[sign](left, right)
    return result if 0 < result <= LARGEST[sign] else None


def work(steps: tuple[str, ...], numbers: dict[str, int]) -> tuple[list[str], int] | None:
    """The steps with their equations filled in, and the last result; None when some result will not do."""
    known = dict(numbers)
    lines: list[str] = []
    result = 0
    for step in steps:
        found = EQUATION.search(step)
        assert found, f"no equation in {step!r}"
        name, left, sign, right = found.groups()
        a, b = (int(word) if word.isdigit() else known[word] for word in (left, right))
        value = compute(sign, a, b)
        if value is None:
            return None
        known[name] = result = value
        shown = sign.replace("*", "x")
        lines.append(f"{step[:found.start()]}{a} {shown} {b} = {value}{step[found.end():]}")
    return lines, result


def tell(problem: Problem, rng: random.Random) -> Row | None:
    """One telling of a problem, or None when no numbers fitted it."""
    for _ in range(MOST_TRIES):
        numbers = {name: rng.choice(values) for name, values in problem.numbers.items()}
        worked = work(problem.steps, numbers)
        if worked:
            break
    else:
        return None
    lines, answer = worked
    (name, she, her), (other, _, _) = people(rng, 2)
    fields: dict[str, object] = {word: rng.choice(bank) for word, bank in problem.words.items()}
    fields |= {"name": name, "she": she, "She": she.capitalize(), "her": her, "other": other, **numbers}
    steps = " ".join(lines).format_map(fields)
    return {"instruction": rng.choice(problem.tellings).format_map(fields), "output": f"{steps}\n#### {answer}"}


def generate(rng: random.Random, rows: int) -> list[Row]:
    return distinct(lambda: tell(rng.choice(PROBLEMS), rng), rows)
