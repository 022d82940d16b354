"""Replaces personal data in a text by placeholders: e-mail addresses, phone, card and account numbers.

A match of a pattern must also pass a check of its kind (numbering plan, check digits), because a quantity, a date or an
order number that was replaced in a row would teach a wrong answer:

    email     an address; not `a@b.mean()`, which is code
    phone     an international number (+49 ..., 0049 ...), a number in North American grouping, or digits after "tel:"
    card      a known issuer's prefix and length, and Luhn's check digit
    account   an IBAN: country, length and check digits
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

PLACEHOLDERS = {"email": "[EMAIL]", "account": "[ACCOUNT]", "card": "[CARD]", "phone": "[PHONE]"}   # in this order

EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+'-]{1,64}@(?:\w[\w-]{0,62}\.){1,8}[^\W\d_]{2,24}(?![\w(-])")
ACCOUNT = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){10,30}(?![A-Za-z0-9])", re.IGNORECASE | re.ASCII)
CARD = re.compile(r"(?<![0-9])(?<![0-9][.,])(?:[0-9]{13,19}"
                  r"|[0-9]{4}(?P<a>[ -])[0-9]{4}(?P=a)[0-9]{4}(?P=a)[0-9]{1,4}(?:(?P=a)[0-9]{1,3})?"
                  r"|[0-9]{4}(?P<b>[ -])[0-9]{6}(?P=b)[0-9]{4,5})(?![0-9])(?![.,][0-9])")
INTERNATIONAL = re.compile(r"(?<![\w+)])\(?(?P<prefix>\+|00|011[ -])\(?[1-9][0-9 ().\-/]{5,22}[0-9]")
NATIONAL = re.compile(r"(?<![\w.+-])(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-.])[2-9][0-9]{2}[-.][0-9]{4}"
                      r"(?![\w-]|\.[0-9])")
LABELLED = re.compile(r"\b(?:tel|telephone|phone|mobile|fax)(?: (?:no|nr|number))?[\"']?[.:]{1,2}\s?[\"']?"
                      r"(?P<number>\+?\(?[0-9][0-9 ()./-]{5,18}[0-9])(?![0-9])", re.IGNORECASE)
# Lengths by first digits (ISO/IEC 7812 issuers): Visa, Mastercard, American Express, Diners, Discover, JCB, UnionPay.
ISSUERS: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (4000, 4999, (13, 16, 19)), (5100, 5599, (16,)), (2221, 2720, (16,)), (3400, 3499, (15,)), (3700, 3799, (15,)),
    (3000, 3059, (14,)), (3600, 3699, (14,)), (3800, 3899, (14,)), (6011, 6011, (16, 19)), (6440, 6599, (16, 19)),
    (3528, 3589, (16, 19)), (6200, 6299, (16, 17, 18, 19)))


class Redactor:
    """Replaces the chosen kinds of personal data in texts, and counts the replacements by kind (`counts`).

    Redaction is idempotent. A placeholder may separate two numbers that looked like one before, so a text is searched
    again until nothing is found.

    Args:
        kinds: keys of PLACEHOLDERS.

    Raises:
        ValueError: a kind is unknown.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        rules = {"email": _emails, "account": _accounts, "card": _cards, "phone": _phones}
        if unknown := sorted(set(kinds) - rules.keys()):
            raise ValueError(f"no rule for {', '.join(unknown)}")
        self.counts: Counter[str] = Counter()
        self._rules = [(kind, rules[kind]) for kind in PLACEHOLDERS if kind in kinds]

    def __call__(self, text: str) -> str:
        """The redacted text."""
        before = None
        while before != text:
            before = text
            for kind, rule in self._rules:
                text, replaced = rule(text)
                if replaced:
                    self.counts[kind] += replaced
        return text


def _emails(text: str) -> tuple[str, int]:
    return EMAIL.subn(PLACEHOLDERS["email"], text) if "@" in text else (text, 0)


def _accounts(text: str) -> tuple[str, int]:
    return _replace(text, ACCOUNT, "account", _account_length)


def _account_length(candidate: str) -> int:
    """Length of the IBAN at the start of `candidate`, or 0: words in capitals may follow an IBAN written in groups."""
    from stdnum import iban

    words = candidate.split(" ")
    for end in range(len(words), 0, -1):
        number = " ".join(words[:end])
        if iban.is_valid(number, check_country=False):
            return len(number)
    return 0


def _cards(text: str) -> tuple[str, int]:
    return _replace(text, CARD, "card", lambda candidate: len(candidate) if _is_card(candidate) else 0)


def _is_card(candidate: str) -> bool:
    from stdnum import luhn

    number = candidate.replace(" ", "").replace("-", "")
    issued = any(low <= int(number[:4]) <= high and len(number) in lengths for low, high, lengths in ISSUERS)
    return issued and bool(luhn.is_valid(number))


def _phones(text: str) -> tuple[str, int]:
    total = 0
    if "+" in text or "00" in text or "011" in text:
        text, total = _replace(text, INTERNATIONAL, "phone", _international_length)
    text, national = _replace(text, NATIONAL, "phone", _national_length)
    text, labelled = _replace(text, LABELLED, "phone", _labelled_length, group="number")
    return text, total + national + labelled


def _international_length(candidate: str) -> int:
    """Length of the valid phone number, with its prefix, at the start of `candidate`, or 0."""
    from phonenumbers import PhoneNumberMatcher

    bracket = candidate.startswith("(")
    match = INTERNATIONAL.match(candidate)
    assert match is not None
    end = match.end("prefix")
    with_plus = f"{' ' * (end - 1)}+{candidate[end:]}"   # as long as `candidate`
    number = next(iter(PhoneNumberMatcher(with_plus, None, max_tries=10)), None)
    return number.end if number is not None and number.start <= end and not (bracket and ")" not in candidate) else 0


def _national_length(candidate: str) -> int:
    from phonenumbers import NumberParseException, is_valid_number, parse

    try:
        return len(candidate) if is_valid_number(parse(candidate, "US")) else 0
    except NumberParseException:
        return 0


def _labelled_length(candidate: str) -> int:
    return len(candidate) if 7 <= sum(letter.isdigit() for letter in candidate) <= 15 else 0


def _replace(text: str, pattern: re.Pattern[str], kind: str, length: Callable[[str], int],
             group: str | int = 0) -> tuple[str, int]:
    """Replace matches of `pattern` by the placeholder of `kind`.

    Args:
        text: the text to search.
        pattern: finds candidates.
        kind: a key of PLACEHOLDERS.
        length: how many characters of a candidate are replaced. After 0, the search goes on at the candidate's second
            character, because another one may begin inside it.
        group: group of `pattern` that is the candidate.

    Returns:
        The new text, and the number of replacements.
    """
    parts: list[str] = []
    copied = position = 0
    while match := pattern.search(text, position):
        start = match.start(group)
        if size := length(match[group]):
            parts += [text[copied:start], PLACEHOLDERS[kind]]
            copied = position = start + size
        else:
            position = match.start() + 1
    return "".join([*parts, text[copied:]]), len(parts) // 2
