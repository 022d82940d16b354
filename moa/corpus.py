"""The stage `prepare`: raw rows to a corpus. Every line read is kept, rejected with a reason, or a duplicate.

Knows nothing of training. A row's place in train, validation or test is a function of its content alone, so rows that
arrive later never move the ones that are there.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa import digests
from moa import rows as corpora
from moa.base import load_tokenizer, pin
from moa.config import Config, PrepareParams
from moa.errors import DataError
from moa.rows import SPLITS, Message, Row, Split
from moa.tokens import Encoder
from moa.workspace import MANIFEST, Workspace, replace_directory, write_json

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SHINGLE = 5  # words
PERMUTATIONS = 64  # MinHash; candidates are checked exactly, so this costs recall only
SHOWN = 500  # characters of a rejected row that are kept
ALLOWED_CONTROL = {"\n", "\r", "\t"}


class Rejected(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as found: `value` is what was read, or the reason why nothing could be."""

    file: str
    line: int
    value: Any
    text: str


def prepare(workspace: Workspace, config: Config, domain: str) -> dict[str, Any]:
    """Write `data/corpora/NAME` from `data/raw/NAME` and return its manifest.

    Raises DataError when there is nothing to read, too little is usable, or more than `prepare.max_rejected` is not.
    """
    params = config.prepare
    encoder = Encoder(load_tokenizer(workspace), config.prompt.system, config.prompt.max_tokens)
    kept: dict[str, Row] = {}
    rejected: list[dict[str, Any]] = []
    read = 0
    for raw in _read_folder(workspace.raw(domain), domain):
        read += 1
        try:
            row = _row(raw.value, encoder)
        except Rejected as reason:
            rejected.append({"file": raw.file, "line": raw.line, "reason": str(reason), "text": raw.text[:SHOWN]})
        else:
            kept[row.id] = row
    exact = read - len(rejected) - len(kept)
    _refuse_if_unusable(workspace, domain, params, read, len(kept), rejected)
    unique = _without_near_duplicates(kept, params.near_duplicate)
    splits: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    for row in unique:
        splits[split_of(row.id, params)].append(row)
    if empty := [split for split, content in splits.items() if not content]:
        raise DataError(
            f"Domain {domain!r}: no row falls into {empty[0]} out of {len(unique)}; add rows, or raise "
            f"prepare.{empty[0]} in params.yaml."
        )
    return _write(
        workspace,
        config,
        domain,
        splits,
        rejected,
        {
            "read": read,
            "kept": len(unique),
            "rejected": len(rejected),
            "duplicates": exact,
            "near_duplicates": len(kept) - len(unique),
        },
    )


# Reading: every row of every file, whatever it holds.


def _read_folder(folder: Path, domain: str) -> Iterator[Raw]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in FORMATS) if folder.is_dir() else []
    if not files:
        raise DataError(f"Domain {domain!r} has no rows: put {', '.join(FORMATS)} files into data/raw/{domain}/.")
    for path in files:
        yield from _read_file(path, path.relative_to(folder).as_posix())


def _read_file(path: Path, name: str) -> Iterator[Raw]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet as pq

        try:
            records = pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{name} is not a Parquet file: {' '.join(str(error).split())[:200]}") from None
        yield from (Raw(name, number, value, str(value)) for number, value in enumerate(records, 1))
        return
    if kind == ".jsonl":
        for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if line.strip():
                yield Raw(name, number, _parsed(line), line.decode("utf-8", "replace"))
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    if kind == ".json":
        value = _parsed(text.encode())
        if not isinstance(value, list):
            raise DataError(
                f"{name} must be one JSON list of rows; write one object a line into a .jsonl file instead."
            )
        yield from (
            Raw(name, number, item, json.dumps(item, ensure_ascii=False)) for number, item in enumerate(value, 1)
        )
        return
    try:
        for record in (
            reader := csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",")
        ):
            yield Raw(name, reader.line_num, {key: value for key, value in record.items() if value}, str(record))
    except csv.Error as error:
        raise DataError(f"{name} cannot be read as {kind[1:].upper()}: {error}.") from None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Rejected("not UTF-8")
    except (ValueError, RecursionError) as error:
        return Rejected(f"malformed JSON: {error}" if isinstance(error, ValueError) else "JSON nested too deeply")


# Validating: what was read to a row, or a reason.


def _row(value: Any, encoder: Encoder) -> Row:
    from jinja2 import TemplateError

    if isinstance(value, Rejected):
        raise value
    if not isinstance(value, dict):
        raise Rejected(f"not an object but {type(value).__name__}")
    messages = _chat(value["messages"]) if "messages" in value else _instruction(value)
    for marker in encoder.tokenizer.all_special_tokens:  # read as the marker itself, it would end or begin a turn
        if any(marker in message["content"] for message in messages):
            raise Rejected(f"the text contains {marker}, a marker of the base's own")
    try:
        encoded = encoder.row(messages)
    except TemplateError as error:
        raise Rejected(f"the base's chat template refuses it: {error}") from None
    if not encoded.completion_tokens:
        raise Rejected("the answer has no tokens")
    if len(encoded.ids) > encoder.max_tokens:
        raise Rejected(f"too long: {len(encoded.ids)} tokens, prompt.max_tokens is {encoder.max_tokens}")
    return Row(digests.of_json(messages)[:32], tuple(messages), encoded.prompt_tokens, encoded.completion_tokens)


def _instruction(value: dict[str, Any]) -> list[Message]:
    question, answer = _text(value, "instruction"), _text(value, "output")
    if value.get("input") not in (None, ""):
        question = f"{question}\n\n{_text(value, 'input')}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _chat(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("messages is not a list of {role, content}")
    messages = [{"role": _text(turn, "role"), "content": _text(turn, "content")} for turn in turns]
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise Rejected("roles must be an optional system, then user and assistant in turn, ending with assistant")
    return messages


def _text(value: dict[str, Any], key: str) -> str:
    if key not in value:
        raise Rejected(f"{key} is missing")
    text = value[key]
    if not isinstance(text, str):
        raise Rejected(f"{key} is not text but {type(text).__name__}")
    if not text.strip():
        raise Rejected(f"{key} is empty")
    if any((letter < " " and letter not in ALLOWED_CONTROL) or "\ud800" <= letter <= "\udfff" for letter in text):
        raise Rejected(f"{key} has control characters")
    return text.strip()


def _refuse_if_unusable(
    workspace: Workspace, domain: str, params: PrepareParams, read: int, usable: int, rejected: Sequence[dict[str, Any]]
) -> None:
    if rejected and len(rejected) > params.max_rejected * read:
        reason, count = Counter(item["reason"] for item in rejected).most_common(1)[0]
        first = next(item for item in rejected if item["reason"] == reason)
        path = workspace.local / "rejected" / f"{domain}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_lines(rejected))
        raise DataError(
            f"Domain {domain!r}: {len(rejected)} of {read} rows cannot be used, most often ({count}) "
            f"because of: {reason} (first at {first['file']}:{first['line']}). All are listed in "
            f"{workspace.relative(path)}; mend them, or raise prepare.max_rejected ({params.max_rejected})."
        )
    if usable < params.min_rows:
        raise DataError(f"Domain {domain!r} has {usable} usable rows; prepare.min_rows asks for {params.min_rows}.")


# Deduplicating and splitting.


def _shingles(row: Row) -> frozenset[str]:
    words = " ".join(message["content"] for message in row.messages).lower().split()
    return frozenset(" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def _without_near_duplicates(kept: dict[str, Row], threshold: float) -> list[Row]:
    """Rows in the order of their ids; of rows at least `threshold` alike, the smallest id stays."""
    ordered = [kept[key] for key in sorted(kept)]
    if not threshold:
        return ordered
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    unique: dict[str, tuple[Row, frozenset[str]]] = {}
    for row in ordered:
        shingles = _shingles(row)
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
        if any(
            len(shingles & other) >= threshold * len(shingles | other)
            for other in (unique[key][1] for key in index.query(sketch))
        ):
            continue
        index.insert(row.id, sketch)
        unique[row.id] = (row, shingles)
    return [row for row, _ in unique.values()]


def split_of(row_id: str, params: PrepareParams) -> Split:
    """The side a row is on, from its id (hexadecimal digest of its content) and the shares alone."""
    place = int(digests.of_bytes(f"split:{row_id}".encode())[:13], 16) / 16**13
    if place < params.test:
        return "test"
    return "validation" if place < params.test + params.validation else "train"


# Writing.


def _lines(records: Sequence[dict[str, Any]]) -> bytes:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return text.encode("utf-8", "replace")


def _summary(counts: Sequence[int]) -> dict[str, float]:
    import numpy as np

    return {
        "mean": float(np.mean(counts)),
        "p50": float(np.percentile(counts, 50)),
        "p95": float(np.percentile(counts, 95)),
        "max": max(counts),
        "total": sum(counts),
    }


def _write(
    workspace: Workspace,
    config: Config,
    domain: str,
    splits: dict[Split, list[Row]],
    rejected: Sequence[dict[str, Any]],
    counts: dict[str, int],
) -> dict[str, Any]:
    base = pin(workspace)
    manifest = {
        "kind": "corpus",
        "domain": domain,
        "digest": digests.of_json(
            {
                "rows": {split: [row.id for row in content] for split, content in splits.items()},
                "tokenizer": base.tokenizer,
                "template": base.template,
                "prompt": config.prompt.model_dump(),
            }
        ),
        "rows": counts | {str(split): len(content) for split, content in splits.items()},
        "tokens": {
            part: _summary([getattr(row, f"{part}_tokens") for content in splits.values() for row in content])
            for part in ("prompt", "completion")
        },
        "base": {"tokenizer": base.tokenizer, "template": base.template},
    }
    with replace_directory(workspace.corpus(domain)) as folder:
        for split, content in splits.items():
            corpora.write(folder / f"{split}.parquet", content)
        (folder / "rejected.jsonl").write_bytes(_lines(rejected))
        write_json(folder / MANIFEST, manifest)
    return manifest
