"""The hint for a file whose columns have other names than moa's."""

import pytest

from moa.workspace.row_sources import _advice


@pytest.mark.parametrize(("columns", "hint"), [
    (["ticket", "product", "question", "answer", "channel"], "instruction=question,output=answer"),
    (["Reply", "id", "User_Prompt"], "instruction=User_Prompt,output=Reply"),
    (["q", "a"], "instruction=q,output=a"), (["first", "second", "third"], "instruction=first,output=third"),
    (["answer", "reply"], "instruction=answer,output=reply"), (["only"], "instruction=only,output=only")])
def test_the_hint_names_the_columns_that_sound_like_questions_and_answers(columns: list[str], hint: str) -> None:
    assert _advice(columns).endswith(f"say which holds what, for instance --map {hint}.")
