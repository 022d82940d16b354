"""The sentence that a failed step leaves behind is found, whoever says it."""

import pytest

from moa.core.subprocesses import last_error


@pytest.mark.parametrize(("lines", "reason"), [
    (["noise", "moa: The base is gone.", "ERROR: failed to reproduce 'base': failed to run: moa base, exited with 1"],
     "The base is gone."),
    (["ERROR: failed to reproduce 'assemble': Parameters 'assemble' are missing from 'params.yaml'."],
     "Parameters 'assemble' are missing from 'params.yaml'."),
    (["ValueError: no", "ERROR: failed to reproduce 'train@math'"], "ValueError: no."),
    (["", " "], "it ended with status 7 and said nothing."),
])
def test_last_error(lines: list[str], reason: str) -> None:
    assert last_error(lines, 7) == reason
