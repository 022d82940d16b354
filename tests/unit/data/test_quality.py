"""The quality report counts as a loop over the rows would and warns with numbers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moa.base.encoding import Message
from moa.data import corpus as rows
from moa.data import quality
from moa.data.corpus import Row
from moa.data.readers import RejectionCode, RowRejected

SORRY = "I am sorry, but as an assistant I cannot help with that."


def talk(*texts: str, system: str | None = None) -> tuple[Message, ...]:
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return (*head, *({"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)))


def corpus(folder: Path, conversations: list[tuple[Message, ...]], rejected: list[dict[str, Any]] | None = None,
           near: list[dict[str, Any]] | None = None, **counts: int) -> dict[str, Any]:
    """Write what prepare writes, every tenth row to test and validation, and return the report on it."""
    made = [Row(f"{number:032x}", each, sum(len(one["content"]) for one in each[:-1]), len(each[-1]["content"]))
            for number, each in enumerate(conversations)]
    sides = {"test": made[::10], "validation": made[1::10],
             "train": [row for place, row in enumerate(made) if place % 10 > 1]}
    folder.mkdir(exist_ok=True, parents=True)
    for split, content in sides.items():
        pq.write_table(rows.table(content), folder / f"{split}.parquet")
    for name, records in (("rejected.jsonl", rejected or []), ("near_duplicates.jsonl", near or [])):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    reasons, codes = (dict(Counter(record[key] for record in rejected or [])) for key in ("kind", "code"))
    counted = {"read": len(made) + len(rejected or []), "kept": len(made), "rejected": len(rejected or []),
               "duplicates": 0, "near_duplicates": 0, "straddling": 0,
               **{split: len(content) for split, content in sides.items()}, **counts}
    return quality.quality_report(folder, {"domain": "toy", "rows": counted, "reasons": reasons, "codes": codes,
                                           "redacted": {}})


def rejections(*reasons: RowRejected) -> list[dict[str, Any]]:
    """The records of rejected.jsonl."""
    return [{"file": "a.jsonl", "line": line, "code": reason.code, "kind": reason.kind, "reason": str(reason),
             "text": "x" * 500} for line, reason in enumerate(reasons, 1)]


def plain(number: int) -> tuple[Message, ...]:
    return talk(f"How many minutes are {number} hours and another {number * 7} minutes, please?",
                f"There are {number * 67} minutes in all of that.")


# Counting.

words = st.sampled_from(["yes", "no", "a b", "N/A", "...", SORRY, "one two three four five six seven eight nine", "ü"])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.builds(lambda texts, system: talk(*texts, system=system),
                          st.lists(words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0),
                          st.sampled_from([None, "Be brief."])), min_size=1, max_size=40))
def test_it_counts_as_a_loop_would(tmp_path_factory: pytest.TempPathFactory, found: list[tuple[Message, ...]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "BATCH", 7)
        report = corpus(tmp_path_factory.mktemp("corpus"), found)
    answers = [each[-1]["content"] for each in found]
    begin = Counter(" ".join(text.split()[:8]) for text in answers if len(text.split()) > 8)
    assert report["answers"]["different"] == len(set(answers))
    assert report["answers"]["largest_group"] == max(Counter(answers).values())
    tried = answers[::10] + answers[1::10]
    learned = [answer for place, answer in enumerate(answers) if place % 10 > 1]
    assert report["answers"]["untrained"] == sum(answer not in learned for answer in tried)
    assert report["answers"]["blank"] == sum(text in ("N/A", "...") for text in answers)
    assert report["answers"]["short"] == sum(len(text) <= quality.SHORT for text in answers)
    for each in report["answers"]["most_frequent"]:
        assert each["count"] == answers.count(each["text"])
    for each in report["answers"]["openings"]:
        assert each["count"] == begin[each["text"]]
    turns = [sum(one["role"] == "assistant" for one in each) for each in found]
    assert report["turns"]["answers"] == {str(key): count for key, count in sorted(Counter(turns).items())}
    assert report["turns"]["system"] == round(sum(each[0]["role"] == "system" for each in found) / len(found), 4)
    for part in ("prompt", "completion", "row"):
        assert sum(report["tokens"][part]["counts"]) == len(found)
    assert report["tokens"]["completion"]["max"] == max(map(len, answers))
    assert sum(report["languages"]["shares"].values()) == pytest.approx(1, abs=0.01)
    assert report["languages"]["sampled"] == len(found)


@pytest.mark.parametrize("longest", [0, 1, 2, 3, 5, 48, 1000, 4096])
def test_the_bins_hold_every_length_once(longest: int) -> None:
    edges = quality.histogram_edges(longest)
    assert edges == sorted(set(edges))
    assert edges[0] == 0 and edges[-2] <= max(longest, 1) < edges[-1]


def test_the_frequent_answer_of_a_large_corpus_is_found_in_any_batch(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "BATCH", 50)
    monkeypatch.setattr(quality, "LOCAL", 3)
    found = [talk("q?", f"answer {number // 2}" if number % 10 else SORRY) for number in range(1000)]
    first = corpus(tmp_path, found)["answers"]["most_frequent"][0]
    assert (first["text"], first["count"], first["share"]) == (SORRY, 100, 0.1)


def test_rejections_and_near_duplicates_have_examples(tmp_path: Path) -> None:
    rejected = rejections(
        RowRejected(RejectionCode.MALFORMED, "malformed JSON", "one"),
        RowRejected(RejectionCode.EMPTY, "output is empty"),
        RowRejected(RejectionCode.MALFORMED, "malformed JSON", "two: three"),
        RowRejected(RejectionCode.TOO_LONG, "too long", "300 tokens, prompt.max_tokens is 256"))
    near = [{"id": "1", "of": "2", "split": "train", "of_split": side, "text": "t"} for side in ("train", "test")]
    report = corpus(tmp_path, [plain(number) for number in range(300)], rejected, near, near_duplicates=2)
    assert [(each["reason"], each["count"], each["example"]["line"]) for each in report["rejected"]] == [
        ("malformed JSON", 2, 1), ("output is empty", 1, 2), ("too long", 1, 4)]
    assert [each["code"] for each in report["rejected"]] == ["malformed", "empty", "too-long"]
    assert report["codes"] == {"malformed": 2, "empty": 1, "too-long": 1}
    assert [each["of_split"] for each in report["near_duplicates"]["examples"]] == ["test", "train"]
    assert all(len(each["example"]["text"]) <= quality.SHOWN for each in report["rejected"])


def test_languages_are_told_apart(tmp_path: Path) -> None:
    german = [talk(f"Wie viele Minuten sind {number} Stunden, wenn man sie zusammenzählt?", f"Es sind {number}.")
              for number in range(40)]
    report = corpus(tmp_path, [*german, *(plain(number) for number in range(60)), talk("2 + 2?", "4")])
    shares = report["languages"]["shares"]
    assert shares["de"] > 0.3 and shares["en"] > 0.5 and shares["short"] > 0
    assert any(each.startswith("The questions are in several languages: en ") for each in report["warnings"])


# Warnings.

def test_a_sound_corpus_has_no_warning(tmp_path: Path) -> None:
    assert corpus(tmp_path, [plain(number) for number in range(400)])["warnings"] == []


@pytest.mark.parametrize(("found", "counts", "warning"), [
    ([talk(f"Question number {n}?", SORRY) for n in range(30)], {}, "30 of 330 (9.1%) rows have the same answer"),
    ([talk(f"Question number {n}?", f"{SORRY} Ask {n}.") for n in range(30)], {},
     "30 of 330 (9.1%) answers begin alike"),
    ([talk("How is that?", "n/a")], {}, "1 of 301 (0.3%) answers say nothing"),
    ([talk(f"Is {n} even?", ("yes", "maybe", "never", "often")[n % 4] if n else "rarely") for n in range(2000)], {},
     "61 of 460 (13.3%) validation and test rows have an answer that no training row has, though there are only 305 "),
    ([talk(f"Is {n} even?", "y") for n in range(200)], {}, "200 of 500 (40.0%) answers have fewer than two tokens"),
    ([talk(f"Question number {n}?", f"Yes, {n} of them", system="S") for n in range(100)], {}, "25% of the rows have"),
    ([], {"duplicates": 100}, "100 of 300 (33.3%) rows are copies"),
    ([], {"duplicates": 50, "near_duplicates": 50}, "50 of 300 (16.7%) rows differ from another by a few words"),
    ([], {"straddling": 9}, "9 of 300 (3.0%) rows were near-duplicates of a row in another split"),
    ([], {"test": 3}, "The test split has 3 rows"),
])
def test_what_deserves_a_look_is_said_with_its_numbers(tmp_path: Path, found: list[tuple[Message, ...]],
                                                       counts: dict[str, int], warning: str) -> None:
    report = corpus(tmp_path, [*(plain(number) for number in range(300)), *found], **counts)
    assert [each for each in report["warnings"] if each.startswith(warning)], report["warnings"]
    assert len(report["warnings"]) == 1


def test_refused_rows_are_warned_of(tmp_path: Path) -> None:
    rejected = rejections(*[RowRejected(RejectionCode.TOO_LONG, "too long", "9")] * 20,
                          *[RowRejected(RejectionCode.EMPTY, "output is empty")] * 10)
    report = corpus(tmp_path, [plain(number) for number in range(270)], rejected)
    assert report["warnings"] == [
        "20 of 300 (6.7%) rows are longer than prompt.max_tokens allows and were rejected.",
        "10 of 300 (3.3%) rows cannot be used, most often because of: output is empty."]
