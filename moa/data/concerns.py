"""What in a quality report deserves a look before training, as sentences with numbers.

Every threshold stands here by name. Knows the report's keys and reads no rows. A concern stops nothing: people decide.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

OPENING = 8             # words at the beginning of an answer that make a template

# Shares of the rows read or kept above which a sentence is said.
REJECTED_SHARE = 0.02
TOO_LONG_SHARE = 0.01
DUPLICATE_SHARE = 0.2
NEAR_DUPLICATE_SHARE = 0.1
STRADDLING_SHARE = 0.01
SHORT_SHARE = 0.2
BLANK_SHARE = 0.0
ANSWER_SHARE = 0.05     # one answer of at least LABEL_WORDS words
LABEL_SHARE = 0.8       # one answer of any length
LABEL_WORDS = 4
OPENING_SHARE = 0.05
LANGUAGE_SHARE = 0.05   # of the second language
SYSTEM_SHARE = 0.05     # with, or without, a system message, when the others are not
SPLIT_ROWS = 20         # fewest validation or test rows: the gate asks for as many before it judges


def concerns(report: Mapping[str, Any]) -> list[str]:
    """Sentences with numbers: lost rows first, then answers, then what is mixed."""
    return [*_losses(report), *_of_answers(report["answers"], report["rows"]["kept"]), *_mixtures(report)]


def _losses(report: Mapping[str, Any]) -> Iterator[str]:
    rows, read = report["rows"], max(report["rows"]["read"], 1)
    too_long = sum(each["count"] for each in report["rejected"] if each["reason"] == "too long")
    rejected, near = rows["rejected"] - too_long, rows.get("near_duplicates", 0)
    if too_long > TOO_LONG_SHARE * read:
        yield f"{_of(too_long, read)} rows are longer than prompt.max_tokens allows and were refused."
    if rejected > REJECTED_SHARE * read:
        worst = next(each for each in report["rejected"] if each["reason"] != "too long")
        yield f"{_of(rejected, read)} rows cannot be used, most often because of: {worst['reason']}."
    if (exact := rows["duplicates"] - near) > DUPLICATE_SHARE * read:
        yield f"{_of(exact, read)} rows are copies of another."
    if near > NEAR_DUPLICATE_SHARE * read:
        yield f"{_of(near, read)} rows differ from another by a few words at most."
    if (straddling := rows.get("straddling", 0)) > STRADDLING_SHARE * read:
        yield (f"{_of(straddling, read)} rows were near-duplicates of a row on another side and were left out: a "
               "group_by column would keep such rows together.")
    for split in ("validation", "test"):
        if rows[split] < SPLIT_ROWS:
            yield f"The {split} split has {rows[split]} rows: too few to judge an expert by ({SPLIT_ROWS} or more)."


def _of_answers(answers: Mapping[str, Any], kept: int) -> Iterator[str]:
    if answers["blank"] > BLANK_SHARE * kept:
        yield f"{_of(answers['blank'], kept)} answers say nothing (no letter, no digit, or a word such as N/A)."
    if answers["short"] > SHORT_SHARE * kept:
        yield f"{_of(answers['short'], kept)} answers have fewer than two tokens of text."
    said = {}
    for each in answers["most_frequent"]:
        if each["share"] > (ANSWER_SHARE if each["words"] >= LABEL_WORDS else LABEL_SHARE):
            said[" ".join(each["text"].split()[:OPENING])] = each["count"]
            yield f"{_of(each['count'], kept)} rows have the same answer: {_short(each['text'])}"
    for each in answers["openings"]:
        if each["share"] > OPENING_SHARE and said.get(each["text"]) != each["count"]:
            yield f"{_of(each['count'], kept)} answers begin alike: {_short(each['text'])}"


def _mixtures(report: Mapping[str, Any]) -> Iterator[str]:
    known = [(language, share) for language, share in report["languages"]["shares"].items()
             if language not in ("short", "unsure")]
    if len(known) > 1 and known[1][1] >= LANGUAGE_SHARE:
        told = ", ".join(f"{language} {share:.0%}" for language, share in known if share >= LANGUAGE_SHARE / 2)
        yield f"The questions are in several languages: {told}."
    if SYSTEM_SHARE < (share := report["turns"]["system"]) < 1 - SYSTEM_SHARE:
        yield f"{share:.0%} of the rows bring a system message, the others get prompt.system."


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({count / max(total, 1):.1%})"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return json.dumps(text if len(text) <= 80 else f"{text[:77]}...", ensure_ascii=False)
