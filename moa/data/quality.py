"""What a prepared corpus is made of, as numbers with examples, and which of them deserve a look before training.

Reads the files that prepare wrote, batch by batch, with no loop over rows, so that two million take seconds and little
memory. Looks at one domain alone: `moa.data.overlap` compares it with others. `concerns` puts what deserves a look into
sentences; every threshold stands here by name, and a concern stops nothing: the user decides.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moa.data.corpus import SPLITS

BATCH = 1 << 14        # rows at a time
SAMPLE = 500           # rows whose language is told
SEED = 0
EXAMPLES = 5           # of each kind
SHOWN = 160            # characters of an example
REASONS = 20           # classes of rejection that are listed
SHORT = 2              # tokens of an answer, end mark included, that leave hardly any text
LETTERS = 20           # letters in a text whose language can be told
SURE = 0.5             # certainty below which it is not: code, tables, names
LOCAL = 100            # most frequent texts remembered per batch: one of more than 1 % of all rows is in some batch's
PERCENTILES = (5, 50, 95, 99)
BLANK = ("n/a", "na", "none", "null", "nil", "nan", "todo", "tbd", "unknown", "undefined", "no answer", "no output")


class _Seen(NamedTuple):
    """What the pass over the rows found; the arrays have one element a row, in the order of the splits."""

    prompt: np.ndarray
    completion: np.ndarray
    turns: np.ndarray        # answers in the conversation
    system: int              # rows that begin with a system message
    blank: int
    answers: "_Frequent"
    openings: "_Frequent"
    questions: list[str]     # last user message of the sampled rows


def quality_report(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The report on the corpus in `folder`, whose manifest (not necessarily written yet) is `manifest`."""
    rows, seen = dict(manifest["rows"]), _read(folder)
    report = {
        "domain": manifest["domain"], "rows": rows, "redacted": dict(manifest.get("redacted", {})),
        "rejected": _rejected(folder, manifest.get("reasons", {}), rows["read"]),
        "near_duplicates": {"count": rows.get("near_duplicates", 0), "across_splits": rows.get("straddling", 0),
                            "examples": _near_duplicates(folder)},
        "tokens": _tokens(seen), "turns": _turns(seen), "answers": _answers(seen), "languages": _languages(seen),
    }
    return {**report, "warnings": concerns(report)}


# One pass over the rows.

class _Frequent:
    """Counts equal texts by hash, and remembers those that may be among the most frequent."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []
        self._texts: dict[int, tuple[str, int]] = {}   # the beginning, and its words

    def add(self, texts: list[str]) -> None:
        hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
        self._hashes.append(hashes)
        values, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        for place in np.lexsort((first, -counts))[:LOCAL]:
            text = texts[int(first[place])]
            self._texts.setdefault(int(values[place]), (text[:SHOWN], len(text.split())))

    def result(self, total: int) -> tuple[int, int, list[dict[str, Any]]]:
        """How many different texts, in how many rows the most frequent one stands, and those that stand in several."""
        values, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *self._hashes]), return_counts=True)
        places = np.searchsorted(values, list(self._texts))
        found = sorted((-int(counts[place]), *text) for place, text in zip(places, self._texts.values(), strict=True))
        return len(values), int(counts.max(initial=0)), [
            {"text": text, "words": words, "count": -count, "share": round(-count / total, 4)}
            for count, text, words in found[:EXAMPLES] if count < -1]


def _read(folder: Path) -> _Seen:
    import pyarrow.parquet as pq

    files = [pq.ParquetFile(folder / f"{split}.parquet", buffer_size=1 << 20, pre_buffer=False) for split in SPLITS]
    total = sum(file.metadata.num_rows for file in files)
    sampled = np.sort(np.random.default_rng(SEED).choice(total, min(SAMPLE, total), replace=False))
    prompts, completions, turns = [], [], []
    system = blank = done = 0
    answers, openings, questions = _Frequent(), _Frequent(), []
    for batch in (batch for file in files for batch in file.iter_batches(BATCH)):
        size = batch.num_rows
        prompts.append(batch.column("prompt_tokens").to_numpy())
        completions.append(batch.column("completion_tokens").to_numpy())
        count, with_system, output, asked = _conversations(batch.column("messages"))
        turns.append(count)
        system += with_system
        blank += _blank(output)
        answers.add(output.to_pylist())
        openings.add(_openings(output))
        inside = sampled[(sampled >= done) & (sampled < done + size)] - done
        questions += asked.take(inside).to_pylist()
        done += size
    for file in files:
        file.close()
    empty = np.zeros(0, np.int32)
    return _Seen(np.concatenate([empty, *prompts]), np.concatenate([empty, *completions]),
                 np.concatenate([empty, *turns]), system, blank, answers, openings, questions)


def _conversations(messages: Any) -> tuple[np.ndarray, int, Any, Any]:
    """Of a list<struct<role, content>> array: answers by row, rows with a system message, last answers, last
    questions."""
    import pyarrow.compute as pc

    flat = messages.flatten()
    roles, contents = pc.struct_field(flat, "role"), pc.struct_field(flat, "content")
    ends = np.cumsum(pc.list_value_length(messages).to_numpy(zero_copy_only=False))
    starts = np.concatenate(([0], ends[:-1])).astype(np.int64)
    spoken = pc.equal(roles, "assistant").to_numpy(zero_copy_only=False).astype(np.int32)
    turns = np.add.reduceat(spoken, starts).astype(np.int32) if len(starts) and len(spoken) else np.zeros(0, np.int32)
    system = int(pc.sum(pc.equal(roles.take(starts), "system")).as_py() or 0)
    return turns, system, contents.take(ends - 1), contents.take(np.maximum(ends - 2, starts))


def _blank(output: Any) -> int:
    """Answers that hold no letter and no digit, or are a word for having none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    short = output.filter(pc.less(pc.utf8_length(output), 30))
    said = pc.utf8_trim(pc.utf8_lower(short), characters=" .!-[]()<>")
    nothing = pc.or_(pc.is_in(said, value_set=pa.array(BLANK)), pc.match_substring_regex(said, r"^[^\p{L}\p{N}]*$"))
    return int(pc.sum(nothing).as_py() or 0)


def _openings(output: Any) -> list[str]:
    """The first OPENING words of answers that have more."""
    import pyarrow.compute as pc

    words = pc.utf8_split_whitespace(pc.utf8_slice_codeunits(output, 0, OPENING * 30), max_splits=OPENING)
    words = words.filter(pc.greater(pc.list_value_length(words), OPENING))
    joined: list[str] = pc.binary_join(pc.list_slice(words, 0, OPENING), " ").to_pylist()
    return joined


# What the pass found, as the report says it.

def histogram_edges(longest: int) -> list[int]:
    """Where the bins of a histogram over token counts begin, and where the last ends: 0, 1, 2, 3, 4, 6, 8, 12 ..."""
    found = [0, 1, 2]
    while found[-1] <= longest:
        power = 1 << (found[-1].bit_length() - 1)
        found.append(power * 2 if found[-1] > power else power * 3 // 2)
    return found


def _tokens(seen: _Seen) -> dict[str, Any]:
    whole = seen.prompt + seen.completion
    bins = histogram_edges(int(whole.max(initial=0)))
    return {"edges": bins, **{name: _lengths(counts, bins) for name, counts in
                              (("prompt", seen.prompt), ("completion", seen.completion), ("row", whole))}}


def _lengths(counts: np.ndarray, bins: list[int]) -> dict[str, Any]:
    if not len(counts):
        return {"counts": [0] * (len(bins) - 1)}
    return {"counts": np.histogram(counts, bins)[0].tolist(), "mean": round(float(counts.mean()), 1),
            **{f"p{percent}": float(value) for percent, value in
               zip(PERCENTILES, np.percentile(counts, PERCENTILES), strict=True)}, "max": int(counts.max())}


def _turns(seen: _Seen) -> dict[str, Any]:
    total = max(len(seen.turns), 1)
    values, counts = np.unique(np.minimum(seen.turns, 10), return_counts=True)
    return {"answers": {("10 or more" if value == 10 else str(value)): int(count)
                        for value, count in zip(values.tolist(), counts.tolist(), strict=True)},
            "several": round(float((seen.turns > 1).sum()) / total, 4), "system": round(seen.system / total, 4)}


def _answers(seen: _Seen) -> dict[str, Any]:
    total = max(len(seen.completion), 1)
    different, largest, frequent = seen.answers.result(total)
    return {"different": different, "largest_group": largest, "most_frequent": frequent,
            "openings": seen.openings.result(total)[2],
            "short": int((seen.completion <= SHORT).sum()), "blank": seen.blank}


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _languages(seen: _Seen) -> dict[str, Any]:
    found: Counter[str] = Counter()
    for text in seen.questions:
        language, certainty = "short", 1.0
        if sum(map(str.isalpha, text)) >= LETTERS:
            language, certainty = _identifier().classify(text[:2000])
        found["unsure" if certainty < SURE or language == "zxx" else language] += 1   # zxx: its word for no language
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return {"sampled": len(seen.questions),
            "shares": {language: round(count / len(seen.questions), 4) for language, count in ordered}}


# The files beside the rows.

def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())


def _rejected(folder: Path, reasons: Mapping[str, int], read: int) -> list[dict[str, Any]]:
    """Classes of reasons, the most frequent first, each with its first row."""
    listed = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:REASONS]
    missing, examples = {reason for reason, _ in listed}, {}
    for record in _records(folder / "rejected.jsonl") if missing else ():
        if (reason := record["reason"].partition(":")[0]) in missing:
            examples[reason] = {**record, "reason": record["reason"][:2 * SHOWN], "text": record["text"][:SHOWN]}
            missing.remove(reason)
            if not missing:
                break
    return [{"reason": reason, "count": count, "share": round(count / max(read, 1), 4),
             "example": examples.get(reason)} for reason, count in listed]


def _near_duplicates(folder: Path) -> list[dict[str, Any]]:
    """The first pairs, those that were on two sides before the others."""
    first: list[dict[str, Any]] = []
    for record in _records(folder / "near_duplicates.jsonl"):
        record["text"] = record.get("text", "")[:SHOWN]
        first.append(record)
        if len(first) == 20 * EXAMPLES:
            break
    return sorted(first, key=lambda record: record["split"] == record.get("of_split"))[:EXAMPLES]


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
