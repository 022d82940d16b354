"""What a failed command says of its error: a record, which decides, or only its last words."""

import json
from typing import Any

import pytest

from moa.core.errors import RECORD, ErrorRecord
from moa.core.subprocesses import ErrorLines, last_words


@pytest.mark.parametrize(("lines", "reason"), [
    (["noise", "moa: The base is gone."], "The base is gone."),
    (["ERROR: failed to reproduce 'assemble': Parameters 'assemble' are missing from 'params.yaml'."],
     "Parameters 'assemble' are missing from 'params.yaml'."),
    (["ValueError: no", "ERROR: failed to reproduce 'train@math'"], "ValueError: no."),
    (["", " "], "it ended with status 7 and said nothing."),
])
def test_last_words(lines: list[str], reason: str) -> None:
    assert last_words(lines, 7) == reason


def record(error: str, number: int | None = None, message: str = "Why.") -> str:
    return f"{RECORD}{json.dumps({'error': error, 'errno': number, 'message': message})}"


FULL, ROWS = record("OSError", 28), record("DataError", None, "No space left on device.")


@pytest.mark.parametrize(("lines", "expected"), [
    ([record("BaseModelError", None, "The base is gone."), "moa: The base is gone.",
      "ERROR: failed to reproduce 'base': failed to run: moa base, exited with 1"],
     ErrorRecord("The base is gone.", "BaseModelError", None, 7)),
    (["half a line" + FULL], ErrorRecord("Why.", "OSError", 28, 7)),
    ([FULL, ROWS], ErrorRecord("Why.", "OSError", 28, 7)),   # of two processes, the one that does not blame the rows
    ([ROWS, FULL], ErrorRecord("Why.", "OSError", 28, 7)),
    ([record("DataError", None, "First."), ROWS], ErrorRecord("No space left on device.", "DataError", None, 7)),
    ([f"{RECORD}{{half a record", "moa: DataError"], ErrorRecord("DataError.", None, None, 7)),
    ([f'{RECORD}"a string"'], ErrorRecord("a string", None, None, 7)),
])
def test_the_error_of_a_command(lines: list[str], expected: ErrorRecord) -> None:
    errors = ErrorLines()
    for line in lines:
        errors.take(line)
    assert errors.cause(7) == expected


@pytest.mark.parametrize(("data", "rows"), [
    ({"error": "DataError", "errno": None, "message": "No space left on device: Input/output error"}, True),
    ({"error": "TrainingError", "errno": None, "message": "The loss is not finite."}, True),
    ({"error": "DataError", "errno": 28, "message": "It cannot be read."}, False),   # a full disk was the cause
    ({"error": "OSError", "errno": 27, "message": "File too large"}, False),
    ({"error": "MemoryError", "errno": None, "message": "MemoryError"}, False),
    ({"error": "RuntimeError", "errno": None, "message": "the rows are wrong"}, False),
    ({"error": "BaseModelError", "errno": None, "message": "The base is gone."}, False),
    ("DataError: an answer of an older worker", False),
])
def test_who_is_to_blame(data: Any, rows: bool) -> None:
    assert ErrorRecord.read(data).blames_rows is rows
