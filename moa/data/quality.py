"""The quality report of a prepared corpus: numbers with examples, and warnings for the user.

The report is on one domain alone; `moa.data.overlap` compares domains. It reads the files that stage `prepare` wrote,
batch by batch and without a Python loop over rows, so that two million rows take seconds and little memory. `concerns`
writes a warning for each number above its threshold, one of the constants of this module. A warning stops nothing: the
user decides.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moa.data.corpus import SPLITS
from moa.data.readers import RejectionCode

BATCH = 1 << 14        # rows in memory
SAMPLE = 500           # rows whose language is identified
SEED = 0
EXAMPLES = 5           # of each kind
SHOWN = 160            # characters of an example
REASONS = 20           # reasons of rejection that are listed
SHORT = 2              # most tokens of a short answer, end mark included
LETTERS = 20           # fewest letters of a text whose language is identified
SURE = 0.5             # least probability of an identified language: code, tables and names have less
LOCAL = 100            # most frequent texts kept of a batch: those of over 1 % of all rows are among some batch's
PERCENTILES = (5, 50, 95, 99)
# Answers that stand for a missing one, in lower case.
BLANK = ("n/a", "na", "none", "null", "nil", "nan", "todo", "tbd", "unknown", "undefined", "no answer", "no output")


class _RowStatistics(NamedTuple):
    """Statistics of all rows of a corpus; the arrays have one element a row, in the order of the splits."""

    prompt: np.ndarray          # tokens of the prompt
    completion: np.ndarray      # tokens of the answers
    turns: np.ndarray           # assistant messages in the conversation
    system: int                 # number of rows that begin with a system message
    blank: int                  # number of blank answers: see `_count_blank`
    answers: "_TextCounter"     # last answers
    openings: "_TextCounter"    # first OPENING words of last answers
    questions: list[str]        # last user messages of the sampled rows
    training: int               # number of training rows, which are the first ones


def quality_report(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the quality report of a prepared corpus, as a JSON object.

    Args:
        folder: folder of the corpus, with its Parquet files, `rejected.jsonl` and `near_duplicates.jsonl`.
        manifest: the manifest of the corpus, which need not be written yet.

    Returns:
        The report: `domain`, `rows`, `redacted`, `rejected`, `codes`, `near_duplicates`, `tokens`, `turns`,
        `answers`, `languages`, and `warnings`, which are the sentences of `concerns`.
    """
    rows, statistics = dict(manifest["rows"]), _statistics(folder)
    report = {
        "domain": manifest["domain"], "rows": rows, "redacted": dict(manifest.get("redacted", {})),
        "rejected": _rejected(folder, manifest.get("reasons", {}), rows["read"]),
        "codes": dict(manifest.get("codes", {})),
        "near_duplicates": {"count": rows.get("near_duplicates", 0), "across_splits": rows.get("straddling", 0),
                            "examples": _near_duplicates(folder)},
        "tokens": _tokens(statistics), "turns": _turns(statistics), "answers": _answers(statistics),
        "languages": _languages(statistics),
    }
    return {**report, "warnings": concerns(report)}


# One pass over the rows.

class _TextCounter:
    """Counts equal texts by their hashes, and keeps the texts that may be among the most frequent."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []
        self._texts: dict[int, tuple[str, int]] = {}   # by hash: beginning of the text, and number of its words

    def add(self, texts: list[str]) -> None:
        """Count the texts of a batch."""
        hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
        self._hashes.append(hashes)
        values, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        for index in np.lexsort((first, -counts))[:LOCAL]:
            text = texts[int(first[index])]
            self._texts.setdefault(int(values[index]), (text[:SHOWN], len(text.split())))

    def absent(self, first: int) -> int:
        """How many of the texts that were added after the first so many are not among these."""
        hashes = np.concatenate([np.zeros(0, np.int64), *self._hashes])
        return int((~np.isin(hashes[first:], hashes[:first])).sum())

    def result(self, total: int) -> tuple[int, int, list[dict[str, Any]]]:
        """Summarise the counts; `total` is the number of rows that shares refer to.

        Returns:
            The number of different texts, the count of the most frequent one, and the EXAMPLES most frequent texts of
            those that were added more than once.
        """
        values, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *self._hashes]), return_counts=True)
        indices = np.searchsorted(values, list(self._texts))
        ranked = sorted((-int(counts[index]), *text) for index, text in zip(indices, self._texts.values(), strict=True))
        return len(values), int(counts.max(initial=0)), [
            {"text": text, "words": words, "count": -count, "share": round(-count / total, 4)}
            for count, text, words in ranked[:EXAMPLES] if count < -1]


def _statistics(folder: Path) -> _RowStatistics:
    """Read all splits of the corpus in `folder` once."""
    import pyarrow.parquet as pq

    files = [pq.ParquetFile(folder / f"{split}.parquet", buffer_size=1 << 20, pre_buffer=False) for split in SPLITS]
    total = sum(file.metadata.num_rows for file in files)
    sampled = np.sort(np.random.default_rng(SEED).choice(total, min(SAMPLE, total), replace=False))
    prompts, completions, turns = [], [], []
    system = blank = done = 0
    answers, openings, questions = _TextCounter(), _TextCounter(), []
    for batch in (batch for file in files for batch in file.iter_batches(BATCH)):
        size = batch.num_rows
        prompts.append(batch.column("prompt_tokens").to_numpy())
        completions.append(batch.column("completion_tokens").to_numpy())
        batch_turns, with_system, last_answers, last_questions = _conversations(batch.column("messages"))
        turns.append(batch_turns)
        system += with_system
        blank += _count_blank(last_answers)
        answers.add(last_answers.to_pylist())
        openings.add(_openings(last_answers))
        inside = sampled[(sampled >= done) & (sampled < done + size)] - done
        questions += last_questions.take(inside).to_pylist()
        done += size
    for file in files:
        file.close()
    training = files[SPLITS.index("train")].metadata.num_rows
    empty = np.zeros(0, np.int32)
    return _RowStatistics(np.concatenate([empty, *prompts]), np.concatenate([empty, *completions]),
                          np.concatenate([empty, *turns]), system, blank, answers, openings, questions, training)


def _conversations(messages: Any) -> tuple[np.ndarray, int, Any, Any]:
    """Take conversations, an Arrow array of list<struct<role, content>>, apart.

    Returns:
        The number of assistant messages of each row (int32), the number of rows that begin with a system message, and
        two Arrow arrays of strings: each row's last answer, and the message before it.
    """
    import pyarrow.compute as pc

    flat = messages.flatten()
    roles, contents = pc.struct_field(flat, "role"), pc.struct_field(flat, "content")
    ends = np.cumsum(pc.list_value_length(messages).to_numpy(zero_copy_only=False))
    starts = np.concatenate(([0], ends[:-1])).astype(np.int64)
    is_answer = pc.equal(roles, "assistant").to_numpy(zero_copy_only=False).astype(np.int32)
    turns = (np.add.reduceat(is_answer, starts).astype(np.int32) if len(starts) and len(is_answer)
             else np.zeros(0, np.int32))
    system = int(pc.sum(pc.equal(roles.take(starts), "system")).as_py() or 0)
    return turns, system, contents.take(ends - 1), contents.take(np.maximum(ends - 2, starts))


def _count_blank(answers: Any) -> int:
    """Number of answers that have no letter and no digit, or are a word of BLANK."""
    import pyarrow as pa
    import pyarrow.compute as pc

    short = answers.filter(pc.less(pc.utf8_length(answers), 30))
    texts = pc.utf8_trim(pc.utf8_lower(short), characters=" .!-[]()<>")
    blank = pc.or_(pc.is_in(texts, value_set=pa.array(BLANK)), pc.match_substring_regex(texts, r"^[^\p{L}\p{N}]*$"))
    return int(pc.sum(blank).as_py() or 0)


def _openings(answers: Any) -> list[str]:
    """The first OPENING words of the answers that have more words."""
    import pyarrow.compute as pc

    words = pc.utf8_split_whitespace(pc.utf8_slice_codeunits(answers, 0, OPENING * 30), max_splits=OPENING)
    words = words.filter(pc.greater(pc.list_value_length(words), OPENING))
    joined: list[str] = pc.binary_join(pc.list_slice(words, 0, OPENING), " ").to_pylist()
    return joined


# Sections of the report.

def histogram_edges(longest: int) -> list[int]:
    """Bin edges of a histogram of token counts up to `longest`: 0, 1, 2, 3, 4, 6, 8, 12, 16 ..."""
    edges = [0, 1, 2]
    while edges[-1] <= longest:
        power = 1 << (edges[-1].bit_length() - 1)
        edges.append(power * 2 if edges[-1] > power else power * 3 // 2)
    return edges


def _tokens(statistics: _RowStatistics) -> dict[str, Any]:
    whole = statistics.prompt + statistics.completion
    bins = histogram_edges(int(whole.max(initial=0)))
    return {"edges": bins, **{name: _length_summary(counts, bins) for name, counts in
                              (("prompt", statistics.prompt), ("completion", statistics.completion), ("row", whole))}}


def _length_summary(counts: np.ndarray, bins: list[int]) -> dict[str, Any]:
    if not len(counts):
        return {"counts": [0] * (len(bins) - 1)}
    return {"counts": np.histogram(counts, bins)[0].tolist(), "mean": round(float(counts.mean()), 1),
            **{f"p{percent}": float(value) for percent, value in
               zip(PERCENTILES, np.percentile(counts, PERCENTILES), strict=True)}, "max": int(counts.max())}


def _turns(statistics: _RowStatistics) -> dict[str, Any]:
    total = max(len(statistics.turns), 1)
    values, counts = np.unique(np.minimum(statistics.turns, 10), return_counts=True)
    return {"answers": {("10 or more" if value == 10 else str(value)): int(count)
                        for value, count in zip(values.tolist(), counts.tolist(), strict=True)},
            "several": round(float((statistics.turns > 1).sum()) / total, 4),
            "system": round(statistics.system / total, 4)}


def _answers(statistics: _RowStatistics) -> dict[str, Any]:
    total = max(len(statistics.completion), 1)
    different, largest, frequent = statistics.answers.result(total)
    return {"different": different, "largest_group": largest, "most_frequent": frequent,
            "openings": statistics.openings.result(total)[2],
            "short": int((statistics.completion <= SHORT).sum()), "blank": statistics.blank,
            "untrained": statistics.answers.absent(statistics.training)}


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _languages(statistics: _RowStatistics) -> dict[str, Any]:
    """Shares of the sampled questions by language; `short` and `unsure` are those whose language is not identified."""
    languages: Counter[str] = Counter()
    for text in statistics.questions:
        language, certainty = "short", 1.0
        if sum(map(str.isalpha, text)) >= LETTERS:
            language, certainty = _identifier().classify(text[:2000])
        # zxx is the code of texts without a language.
        languages["unsure" if certainty < SURE or language == "zxx" else language] += 1
    ordered = sorted(languages.items(), key=lambda item: (-item[1], item[0]))
    return {"sampled": len(statistics.questions),
            "shares": {language: round(count / len(statistics.questions), 4) for language, count in ordered}}


# The files beside the splits.

def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())


def _rejected(folder: Path, reasons: Mapping[str, int], read: int) -> list[dict[str, Any]]:
    """The most frequent kinds of reasons of rejection, each with its first row.

    `reasons`: number of rows by kind. `read`: number of rows read.
    """
    listed = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:REASONS]
    missing, examples = {reason for reason, _ in listed}, {}
    for record in _records(folder / "rejected.jsonl") if missing else ():
        if (reason := record["kind"]) in missing:
            examples[reason] = {**record, "reason": record["reason"][:2 * SHOWN], "text": record["text"][:SHOWN]}
            missing.remove(reason)
            if not missing:
                break
    return [{"reason": reason, "code": examples.get(reason, {}).get("code"), "count": count,
             "share": round(count / max(read, 1), 4), "example": examples.get(reason)} for reason, count in listed]


def _near_duplicates(folder: Path) -> list[dict[str, Any]]:
    """Examples of removed near-duplicates: of the first ones, those in two splits before the others."""
    first: list[dict[str, Any]] = []
    for record in _records(folder / "near_duplicates.jsonl"):
        record["text"] = record.get("text", "")[:SHOWN]
        first.append(record)
        if len(first) == 20 * EXAMPLES:
            break
    return sorted(first, key=lambda record: record["split"] == record.get("of_split"))[:EXAMPLES]


# Warnings.

OPENING = 8             # words at the beginning of an answer that are compared

# A warning is written where a share of the rows read or kept is above its threshold.
REJECTED_SHARE = 0.02
TOO_LONG_SHARE = 0.01
DUPLICATE_SHARE = 0.2
NEAR_DUPLICATE_SHARE = 0.1
STRADDLING_SHARE = 0.01
SHORT_SHARE = 0.2
BLANK_SHARE = 0.0
ANSWER_SHARE = 0.05     # of one answer of at least LABEL_WORDS words
LABEL_SHARE = 0.8       # of one shorter answer, which may be a label
LABEL_WORDS = 4
OPENING_SHARE = 0.05
LANGUAGE_SHARE = 0.05   # of the second language
SYSTEM_SHARE = 0.05     # of the rows with a system message, and of those without one
CLOSED_SET = 4          # fewest rows for each different answer, on average, where the answers are a closed set
SPLIT_ROWS = 20         # fewest validation or test rows: the gate needs as many for a verdict


def concerns(report: Mapping[str, Any]) -> list[str]:
    """The warnings of a quality report, as sentences with numbers.

    Warnings of lost rows come first, then those of answers, then those of mixed languages and system messages.
    """
    return [*_row_warnings(report), *_answer_warnings(report["answers"], report["rows"]),
            *_mixture_warnings(report)]


def _row_warnings(report: Mapping[str, Any]) -> Iterator[str]:
    """Warnings of rejected rows, of duplicates, and of splits with few rows."""
    rows, read = report["rows"], max(report["rows"]["read"], 1)
    too_long = report.get("codes", {}).get(RejectionCode.TOO_LONG, 0)
    rejected, near = rows["rejected"] - too_long, rows.get("near_duplicates", 0)
    if too_long > TOO_LONG_SHARE * read:
        yield f"{_of(too_long, read)} rows are longer than prompt.max_tokens allows and were rejected."
    if rejected > REJECTED_SHARE * read:
        commonest = next(entry for entry in report["rejected"] if entry["code"] != RejectionCode.TOO_LONG)
        yield f"{_of(rejected, read)} rows cannot be used, most often because of: {commonest['reason']}."
    if (exact := rows["duplicates"] - near) > DUPLICATE_SHARE * read:
        yield f"{_of(exact, read)} rows are copies of another."
    if near > NEAR_DUPLICATE_SHARE * read:
        yield f"{_of(near, read)} rows differ from another by a few words at most."
    if (straddling := rows.get("straddling", 0)) > STRADDLING_SHARE * read:
        yield (f"{_of(straddling, read)} rows were near-duplicates of a row in another split and were left out: a "
               "group_by column would keep such rows together.")
    for split in ("validation", "test"):
        if rows[split] < SPLIT_ROWS:
            yield f"The {split} split has {rows[split]} rows: too few to judge an expert by ({SPLIT_ROWS} or more)."


def _answer_warnings(answers: Mapping[str, Any], rows: Mapping[str, int]) -> Iterator[str]:
    """Warnings of blank, short and repeated answers, and of answers of a closed set that are never trained on."""
    kept, held_out = rows["kept"], rows["validation"] + rows["test"]
    if answers["blank"] > BLANK_SHARE * kept:
        yield f"{_of(answers['blank'], kept)} answers say nothing (no letter, no digit, or a word such as N/A)."
    if answers["short"] > SHORT_SHARE * kept:
        yield f"{_of(answers['short'], kept)} answers have fewer than two tokens of text."
    warned: dict[str, int] = {}   # by opening: rows of a repeated answer, whose opening gets no second warning
    for answer in answers["most_frequent"]:
        if answer["share"] > (ANSWER_SHARE if answer["words"] >= LABEL_WORDS else LABEL_SHARE):
            warned[" ".join(answer["text"].split()[:OPENING])] = answer["count"]
            yield f"{_of(answer['count'], kept)} rows have the same answer: {_quoted(answer['text'])}"
    if answers["untrained"] and kept >= CLOSED_SET * answers["different"]:
        yield (f"{_of(answers['untrained'], held_out)} validation and test rows have an answer that no training row "
               f"has, though there are only {answers['different']:,} different answers: add rows of the rare ones, or "
               "set group_by: none.")
    for opening in answers["openings"]:
        if opening["share"] > OPENING_SHARE and warned.get(opening["text"]) != opening["count"]:
            yield f"{_of(opening['count'], kept)} answers begin alike: {_quoted(opening['text'])}"


def _mixture_warnings(report: Mapping[str, Any]) -> Iterator[str]:
    """Warnings of several languages, and of system messages in some rows only."""
    known = [(language, share) for language, share in report["languages"]["shares"].items()
             if language not in ("short", "unsure")]
    if len(known) > 1 and known[1][1] >= LANGUAGE_SHARE:
        languages = ", ".join(f"{language} {share:.0%}" for language, share in known if share >= LANGUAGE_SHARE / 2)
        yield f"The questions are in several languages: {languages}."
    if SYSTEM_SHARE < (share := report["turns"]["system"]) < 1 - SYSTEM_SHARE:
        yield f"{share:.0%} of the rows have a system message of their own; the others get prompt.system."


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({count / max(total, 1):.1%})"


def _quoted(text: str) -> str:
    """`text` in quotation marks, on one line of at most 80 characters."""
    text = " ".join(text.split())
    return json.dumps(text if len(text) <= 80 else f"{text[:77]}...", ensure_ascii=False)
