"""What is personal data goes, what only looks like it stays, and nothing breaks the reader."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.data.redaction import PLACEHOLDERS, Redactor

ALL = ("email", "phone", "card", "account")


@pytest.mark.parametrize(("text", "redacted"), [
    ("Write to ada.lovelace+work@mail.example.co.uk.", "Write to [EMAIL]."),
    ("<jörg@müller.example>", "<[EMAIL]>"),
    ("Call +49 30 901820 now", "Call [PHONE] now"),
    ("Ruf 0049 30 901820 an", "Ruf [PHONE] an"),
    ("(+49) 30 901820", "[PHONE]"),
    ("+1 (415) 555-2671, or +442079460958!", "[PHONE], or [PHONE]!"),
    ("(212) 555-0123 or 415.555.2671", "[PHONE] or [PHONE]"),
    ('{"phone": "030 901820"}', '{"phone": "[PHONE]"}'),
    ("Tel.: 020 7946 0958.", "Tel.: [PHONE]."),
    ("Card 4111 1111 1111 1111, exp 12/30", "Card [CARD], exp 12/30"),
    ("378282246310005 and 5555-5555-5555-4444", "[CARD] and [CARD]"),
    ("IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFF", "IBAN [ACCOUNT] BIC COBADEFF"),
    ("gb29nwbk60161331926819", "[ACCOUNT]"),
    ("XX12 3456 7890 1234 DE89 3704 0044 0532 0130 00", "XX12 3456 7890 1234 [ACCOUNT]"),
])
def test_personal_data_is_replaced(text: str, redacted: str) -> None:
    redactor = Redactor(ALL)
    assert redactor(text) == redacted
    assert sum(redactor.counts.values()) == sum(redacted.count(each) for each in PLACEHOLDERS.values())


@pytest.mark.parametrize("text", [
    "On 2024-01-12 at 10:30, 1,234,567 items for $2,125,552,368.00",
    "SELECT * FROM orders WHERE id = 2125552368 AND total > 4155552671",
    "order 4111111111111112, tracking 1234567890123456",
    "3.14159265358979323846 and 0.4111111111111111 and 4111111111111111.5",
    "5+4930901820 = 4930901825; 12 + 49 30 = 91",
    "192.168.100.200, version 1.2.3-4, ISBN 978-3-16-148410-0",
    "x = a@b.mean() + c@d.T; @app.route('/')",
    "DE89 3704 0044 0532 0130 01 has a wrong check digit",
    "room 212-555, 10 000 000 people, 555 tel",
    "What is 2004005006 - 11011011011?",
])
def test_what_only_looks_like_it_stays(text: str) -> None:
    redactor = Redactor(ALL)
    assert redactor(text) == text
    assert not redactor.counts


def test_only_the_chosen_kinds_are_replaced_and_counted() -> None:
    redactor = Redactor(["email"])
    assert redactor("a@b.example +49 30 901820 a@c.example") == "[EMAIL] +49 30 901820 [EMAIL]"
    assert redactor("b@b.example") == "[EMAIL]"
    assert redactor.counts == {"email": 3}
    with pytest.raises(ValueError, match="no rule for name"):
        Redactor(["name"])


pieces = st.sampled_from(["a@b.example", "+49 30 901820", "0049 30 901820", "(212) 555-0123", "415.555.2671", "tel: ",
                          "4111 1111 1111 1111", "378282246310005", "DE89 3704 0044 0532 0130 00", "(", ")", "-", " ",
                          "+", ".", ",", "[PHONE]", "1", "00", "x", "\n", "٣٣", "é@"])


@given(st.one_of(st.text(), st.lists(pieces, max_size=12).map("".join)))
def test_redacting_twice_changes_nothing(text: str) -> None:
    once, again = Redactor(ALL), Redactor(ALL)
    redacted = once(text)
    assert Redactor(ALL)(text) == redacted
    assert again(redacted) == redacted
    assert not again.counts


@pytest.mark.slow
@pytest.mark.parametrize(("repeated", "end"), [("a", "@"), ("b.", ""), ("1", ""), ("4111 ", ""), ("+1 ", ""),
                                               ("DE89 ", ""), ("tel: ", ""), ("(212) ", "")])
def test_long_texts_take_no_longer_than_they_are(repeated: str, end: str) -> None:
    """A text 16 times as long: twice that is noise, 16 times that is a search which begins anew at every character.
    Of this thread's own time, so that neither the machine's speed nor its other work counts."""
    def cost(length: int) -> float:
        text = ("a@" if repeated == "b." else "") + repeated * (length // len(repeated)) + end
        spent = []
        for _ in range(3):
            begun = time.thread_time()
            Redactor(ALL)(text)
            spent.append(time.thread_time() - begun)
        return min(spent)

    assert cost(400_000) < 64 * cost(25_000)
