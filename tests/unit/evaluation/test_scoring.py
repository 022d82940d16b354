"""Rows with the questions of others."""

from hypothesis import given
from hypothesis import strategies as st

from moa.data.corpus import Row
from moa.evaluation.scoring import with_other_questions


def row(number: int, question: str, answer: str, group: str | None = None) -> Row:
    return Row(str(number), ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."},
                             {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": question},
                             {"role": "assistant", "content": answer}), 9, 1, group)


rows = st.lists(st.tuples(st.sampled_from(["math", "sql"]), st.sampled_from("abcd"), st.sampled_from("xyz"),
                          st.sampled_from([None, "g", "h"])), max_size=12)


@given(rows)
def test_only_the_question_is_exchanged_and_comes_from_another_group(drawn: list[tuple[str, str, str, str | None]]
                                                                     ) -> None:
    content = [(domain, row(number, question, answer, group))
               for number, (domain, question, answer, group) in enumerate(drawn)]
    exchanged = with_other_questions(content)
    for index, (domain, own) in enumerate(content):
        others = [other for place, (of, other) in enumerate(content) if place != index and of == domain
                  and (own.group is None or other.group != own.group) and other.question != own.question]
        assert (index in exchanged) == bool(others)
        if index in exchanged:
            asked = exchanged[index]
            assert [*asked[:3], asked[4]] == [*own.messages[:3], own.messages[4]]
            mine = [other for other in others if other.question == asked[3]["content"]]
            assert mine and (any(other.reference != own.reference for other in mine)
                             or all(other.reference == own.reference for other in others))
    assert with_other_questions(content) == exchanged
