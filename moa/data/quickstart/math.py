"""Word problems of two to four steps with the worked answer. The problems themselves are in `problems.yaml`.

In a step, `<total = price * count>` is computed, kept under its name for later steps, and shown as `4 x 6 = 24`. The
result of the last step is the answer.
"""

import operator
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moa.data.quickstart.bank import Row, distinct, load, people

EQUATION = re.compile(r"<(\w+) = (\w+) ([-+*/]) (\w+)>")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv,
}
LARGEST = {"+": 200, "-": 200, "*": 120, "/": 200}   # a small model should learn the steps, not long multiplication
MOST_TRIES = 200


@dataclass(frozen=True)
class Problem:
    """A word problem: its wordings, its worked steps, and the numbers and words to draw from."""

    questions: Sequence[str]
    steps: Sequence[str]
    numbers: dict[str, Sequence[int]]
    words: dict[str, Sequence[str]] = field(default_factory=dict)


def problems() -> list[Problem]:
    """The problems of `problems.yaml`."""
    return [Problem(**entry | {"numbers": {name: _choices(values) for name, values in entry["numbers"].items()}})
            for entry in load("problems")["problems"]]


def _choices(values: Any) -> Sequence[int]:
    """A list as it is; `{from, to, step}` as a range that includes both ends."""
    return values if isinstance(values, list) else range(values["from"], values["to"] + 1, values.get("step", 1))


def compute(sign: str, left: int, right: int) -> int | None:
    """The result of an operation; None unless it is a whole number from 1 to the operation's `LARGEST`."""
    if sign == "/" and (right < 2 or left % right):
        return None
    result = OPERATIONS[sign](left, right)
    return result if 0 < result <= LARGEST[sign] else None


def solve(steps: Sequence[str], numbers: dict[str, int]) -> tuple[list[str], int] | None:
    """The steps with their equations filled in, and the last result; None when `compute` refuses one."""
    known = dict(numbers)
    lines: list[str] = []
    result = 0
    for step in steps:
        equation = EQUATION.search(step)
        assert equation, f"no equation in {step!r}"
        name, left, sign, right = equation.groups()
        a, b = (int(word) if word.isdigit() else known[word] for word in (left, right))
        value = compute(sign, a, b)
        if value is None:
            return None
        known[name] = result = value
        shown = sign.replace("*", "x")
        lines.append(f"{step[:equation.start()]}{a} {shown} {b} = {value}{step[equation.end():]}")
    return lines, result


def draw(problem: Problem, rng: random.Random) -> Row | None:
    """A row of this problem with random numbers and wording; None when no numbers fitted in `MOST_TRIES` tries."""
    for _ in range(MOST_TRIES):
        numbers = {name: rng.choice(values) for name, values in problem.numbers.items()}
        solved = solve(problem.steps, numbers)
        if solved:
            break
    else:
        return None
    lines, answer = solved
    (name, she, her), (other, _, _) = people(rng, 2)
    fields: dict[str, object] = {word: rng.choice(choices) for word, choices in problem.words.items()}
    fields |= {"name": name, "she": she, "She": she.capitalize(), "her": her, "other": other, **numbers}
    steps = " ".join(lines).format_map(fields)
    return {"instruction": rng.choice(problem.questions).format_map(fields), "output": f"{steps}\n#### {answer}"}


def generate(rng: random.Random, rows: int) -> list[Row]:
    """`rows` rows of the corpus, or fewer where no more differ enough."""
    known = problems()
    return distinct(lambda: draw(rng.choice(known), rng), rows)
