"""Readers of JSON, CSV, TSV and Parquet files: they yield raw rows, one at a time, without a check of their content.

Text that cannot be read as a row gives a raw row whose value is a RowRejected with the reason. A file that cannot be
read at all raises DataError, whatever exception its library raises. Text is UTF-8, with or without a byte order mark,
or UTF-16 with one; lines end with \\n, \\r\\n or \\r.
"""

import codecs
import csv
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from moa.core.errors import ArtifactError, DataError, MoaError, in_words, of_machine
from moa.core.names import escaped, printable

FORMATS = {".jsonl": "JSON lines", ".json": "JSON", ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet"}
LONGEST_LINE = 16 << 20    # characters; a longer line is rejected without parsing it
LARGEST_JSON = 256 << 20   # bytes of a .json file, which is read into memory
REREAD = 1 << 20           # characters of a malformed CSV record, up to which its lines are parsed again one by one
BATCH = 1024               # rows of a Parquet file in memory
DEEPEST = 100              # levels of nested lists and objects; Python's recursion limit allows about 900


class RejectionCode(StrEnum):
    """Why a row was rejected, for programs: rejected.jsonl and quality.json hold it beside the words of the reason."""

    NOT_UTF8 = "not-utf8"
    LONG_LINE = "long-line"             # over LONGEST_LINE
    TOO_DEEP = "too-deep"               # over DEEPEST, or deeper than the parser allows
    MALFORMED = "malformed"             # no JSON, CSV or TSV
    REPEATED_KEY = "repeated-key"
    FIELD_COUNT = "field-count"         # more fields than the header names
    UNREADABLE = "unreadable"           # a value of a Parquet file that cannot be converted
    NOT_OBJECT = "not-object"
    BAD_CHAT = "bad-chat"               # messages are no list of messages, or roles do not take turns
    MISSING = "missing"                 # a column that the domain reads
    NOT_TEXT = "not-text"
    CONTROL_CHARACTERS = "control-characters"
    EMPTY = "empty"
    SPECIAL_TOKEN = "special-token"     # noqa: S105 - the base's, which would end or begin a turn
    TOO_LONG = "too-long"               # over prompt.max_tokens
    NO_TOKENS = "no-tokens"             # an answer that the tokenizer makes nothing of
    TEMPLATE = "template"               # the base's chat template refuses it


class RowRejected(Exception):
    """One row cannot be used. As text it is the reason, `KIND` or `KIND: DETAIL`.

    Args:
        code: the reason for programs.
        kind: the reason in words, without what differs from row to row.
        detail: what differs.
    """

    def __init__(self, code: RejectionCode, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.code, self.kind = code, kind


class RawRow(NamedTuple):
    """One row as it was read from a file."""

    file: str                   # name of the file
    line: int                   # number of the row's first line, or of the row in a JSON list or Parquet file, from 1
    value: Any                  # the row's object, or a RowRejected
    source: str | None = None   # the row's text in the file; None where it has none of its own

    @property
    def text(self) -> str:
        """The row's text in the file, or else its value as JSON."""
        if self.source is not None:
            return self.source
        return json.dumps(self.value, ensure_ascii=False, default=str)


def raw_files(folder: Path) -> list[Path]:
    """The files under `folder` that `read` reads, in its order."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in FORMATS
                  and not path.name.startswith(".") and path.is_file())


def read(folder: Path, domain: str) -> Iterator[RawRow]:
    """Yield every row of the raw files in `folder`, which belong to `domain`.

    Raises DataError and ArtifactError as `read_file` does, and DataError where there is no file.
    """
    files = raw_files(folder)
    if not files:
        raise DataError(f"Domain {domain!r} has no rows: run `moa domain add {domain} FILE`, or put "
                        f"{', '.join(FORMATS)} files into data/raw/{domain}/.")
    for path in files:
        yield from read_file(path, path.relative_to(folder).as_posix())


def read_file(path: Path, name: str) -> Iterator[RawRow]:
    """Yield every row of one file, which messages call `name`.

    Raises:
        DataError: the file cannot be read; the message names the last row that was read.
        ArtifactError: the file cannot be read because of the machine (`moa.core.errors.of_machine`).
    """
    name, row = printable(name), 0
    try:
        for raw in _rows(path, name):
            if _too_deep(raw.value):
                raw = raw._replace(value=RowRejected(RejectionCode.TOO_DEEP, "nested too deeply"))
            yield raw
            row = raw.line
    except MoaError:
        raise
    except Exception as error:   # pyarrow, its time zones, codecs and the disk raise many kinds of exceptions
        if of_machine(error):
            raise ArtifactError(f"{name} cannot be read now: {in_words(error)}; mend that and run the command again."
                                ) from error
        raise DataError(f"{name} is not a {FORMATS.get(path.suffix.lower(), 'text')} file that can be read (after row "
                        f"{row}): {escaped(in_words(error))}") from error


def _rows(path: Path, name: str) -> Iterator[RawRow]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path, name)
    if kind == ".jsonl":
        return _json_lines(path, name)
    if kind == ".json":
        return _json(path, name)
    return _separated(path, name, "\t" if kind == ".tsv" else ",")


def _too_deep(value: Any) -> bool:
    """Whether `value` has more than DEEPEST levels. The walk goes by level, because recursion could be too deep."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        if not level:
            return False
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, dict | list | tuple)]
    return True


# Text.


def _open(path: Path, newline: str | None) -> TextIO:
    """Open a text file. A byte that is no UTF-8 becomes a lone surrogate, which `decoded` finds."""
    with path.open("rb") as file:
        head = file.read(4)
    # Bytes of another encoding may equal UTF-16's byte order mark, but a zero byte hardly ever follows them.
    if (head.startswith(codecs.BOM_UTF16_LE) and head[3:] == b"\0") or (
            head.startswith(codecs.BOM_UTF16_BE) and head[2:3] == b"\0"):
        return path.open(encoding="utf-16", errors="replace", newline=newline)
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _lines(file: TextIO) -> Iterator[tuple[int, str | RowRejected]]:
    """Physical lines with their line ends, numbered from 1; a line that is too long is a RowRejected."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            while (rest := file.readline(LONGEST_LINE)) and not rest.endswith("\n"):
                pass
            yield number, RowRejected(RejectionCode.LONG_LINE, f"a line of more than {LONGEST_LINE:,} characters")
        else:
            yield number, line


def decoded(text: str) -> bool:
    """Whether all bytes of a text that `_open` decoded were valid: it holds no lone surrogate."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# JSON.


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError where a key is repeated."""
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated[:80]!r} stands twice in one object")
    return value


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def _parse(line: str) -> Any:
    """The JSON value of a text, or a RowRejected."""
    if not decoded(line):
        return RowRejected(RejectionCode.NOT_UTF8, "not UTF-8")
    try:
        return _decode(line)
    except json.JSONDecodeError as error:
        return RowRejected(RejectionCode.MALFORMED, "malformed JSON", str(error))
    except ValueError as error:
        return RowRejected(RejectionCode.REPEATED_KEY, str(error))
    except RecursionError:
        return RowRejected(RejectionCode.TOO_DEEP, "JSON nested too deeply")


def _json_lines(path: Path, name: str) -> Iterator[RawRow]:
    with _open(path, newline=None) as file:
        for number, line in _lines(file):
            if isinstance(line, RowRejected):
                yield RawRow(name, number, line, "")
            elif line.strip():
                yield RawRow(name, number, _parse(line), line.rstrip("\n"))


def _json(path: Path, name: str) -> Iterator[RawRow]:
    """Rows of a .json file: a list, one object, or, against its name, one object a line."""
    if path.stat().st_size > LARGEST_JSON:
        raise DataError(f"{name} has more than {LARGEST_JSON >> 20} MiB: write one object a line into a .jsonl file, "
                        "which is read line by line.")
    with _open(path, newline=None) as file:
        text = file.read()
    value = _parse(text) if text.strip() else []
    if isinstance(value, list):
        yield from (RawRow(name, number, item) for number, item in enumerate(value, 1))
    elif isinstance(value, RowRejected) and not text.lstrip().startswith("["):
        yield from _json_lines(path, name)
    elif isinstance(value, RowRejected):
        raise DataError(f"{name} cannot be read: {value}. Mend it, or write one object a line into a .jsonl file.")
    elif "\n" in text.strip():
        raise DataError(f"{name} must be a list of rows, or hold one object a line; it is one {type(value).__name__}.")
    else:
        yield RawRow(name, 1, value, text)


# CSV and TSV.


class _LineFeed:
    """Iterator over lines for a csv reader, which can be made to read lines of the current record again."""

    def __init__(self, file: TextIO) -> None:
        self.lines = _lines(file)
        self.again: deque[tuple[int, str]] = deque()   # lines to read before those of the file
        self.taken: list[tuple[int, str]] = []         # lines of the current record; the caller clears it

    def __iter__(self) -> "_LineFeed":
        return self

    def __next__(self) -> str:
        number, line = self.again.popleft() if self.again else next(self.lines)
        if isinstance(line, RowRejected):
            self.taken.append((number, ""))
            raise csv.Error(str(line))
        self.taken.append((number, line))
        return line

    def give_back(self) -> None:
        """Queue all but the first line of the current record to be read again."""
        self.again.extendleft(reversed(self.taken[1:]))


def _separated(path: Path, name: str, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(LONGEST_LINE)
    with _open(path, newline="") as file:
        feed = _LineFeed(file)
        reader = csv.reader(feed, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            feed.taken.clear()
            fields: list[str] | RowRejected
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # A stray quotation mark makes one record of many lines: only its own line is rejected.
                fields = RowRejected(RejectionCode.MALFORMED, f"malformed {path.suffix[1:].upper()}", str(error))
                if len(feed.taken) > 1 and sum(len(line) for _, line in feed.taken) <= REREAD:
                    feed.give_back()
                    del feed.taken[1:]
            number = feed.taken[0][0] if feed.taken else 0
            if header is None:
                header = _header(fields, name)
            elif fields:
                yield RawRow(name, number, _record(header, fields),
                             "".join(line for _, line in feed.taken).rstrip("\r\n"))


def _header(fields: list[str] | RowRejected, name: str) -> list[str] | None:
    """The column names of a header line; None for an empty line. Raises DataError where the file cannot be used."""
    if isinstance(fields, RowRejected):
        raise DataError(f"{name} has no readable header line: {fields}.")
    if not fields:
        return None
    header = [field.strip() for field in fields]
    if repeated := next((field for field in header if field and header.count(field) > 1), None):
        raise DataError(f"{name}: the column {repeated[:80]!r} stands twice in its header; give each its own name.")
    return header


def _record(header: Sequence[str], fields: list[str] | RowRejected) -> Mapping[str, str] | RowRejected:
    """A row as a dict by column name, without empty fields; or a RowRejected."""
    if isinstance(fields, RowRejected):
        return fields
    if len(fields) > len(header) and any(fields[len(header):]):
        return RowRejected(RejectionCode.FIELD_COUNT, f"{len(fields)} fields, and the header names {len(header)}")
    if not all(map(decoded, fields)):
        return RowRejected(RejectionCode.NOT_UTF8, "not UTF-8")
    return {key: value for key, value in zip(header, fields, strict=False) if value}


# Parquet.


def _parquet(path: Path, name: str) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if repeated := next((column for column in names if names.count(column) > 1), None):
            raise DataError(f"{name}: the column {repeated!r} stands twice; give each its own name.")
        for batch in file.iter_batches(BATCH):
            for value in _values(batch):
                number += 1
                yield RawRow(name, number, value)


def _values(batch: Any) -> list[Any]:
    """The rows of a batch. A row with a value that pyarrow cannot convert is a RowRejected.

    Examples are an unknown time zone and bytes that are no text. The batch is halved until such a row is alone.
    """
    try:
        return list(batch.to_pylist())
    except Exception as error:
        if batch.num_rows == 1:
            return [RowRejected(RejectionCode.NOT_UTF8, "not UTF-8") if isinstance(error, UnicodeDecodeError) else
                    RowRejected(RejectionCode.UNREADABLE, "not readable", escaped(in_words(error)))]
        half = batch.num_rows // 2
        return _values(batch.slice(0, half)) + _values(batch.slice(half))
