"""Stage `prepare`: raw rows to a corpus. Every row that is read is kept, rejected with a reason, or a duplicate.

Rows are processed in batches, so that memory does not grow with their text. A row's split depends on its own group
(moa.data.splits), which the row alone decides but for replies of a closed set, so that new rows do not move old ones.
Of near-duplicates in two splits, the one that is not for training stays.

    data/corpora/NAME/    train.parquet, validation.parquet, test.parquet, rejected.jsonl, near_duplicates.jsonl,
                          quality.json, manifest.json (last)
"""

import gc
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moa.base.encoding import ChatEncoder, Message, Rendered
from moa.base.load import load_tokenizer
from moa.base.pin import pin
from moa.core import digests
from moa.core.config import Config, PrepareParams
from moa.core.errors import DataError
from moa.core.files import replace_directory, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import splits
from moa.data.conversations import conversation, group_value
from moa.data.corpus import SPLITS, Row, row_id
from moa.data.readers import RawRow, RejectionCode, RowRejected, read
from moa.data.row_store import RowFates, RowStore

BATCH = 2048          # rows processed together
SHOWN = 500           # characters of a rejected row that are recorded
CHARACTERS = 200      # per token of `prompt.max_tokens`; a longer row is rejected without encoding it


def prepare(workspace: Workspace, config: Config, domain: str, encoder: ChatEncoder | None = None) -> dict[str, Any]:
    """Stage `prepare` of one domain: write `data/corpora/NAME` from `data/raw/NAME`.

    Args:
        workspace: holds the raw rows and the fetched base.
        config: `prepare`, `prompt` and the domain are used.
        domain: name of the domain.
        encoder: encodes the rows; None = with the tokenizer of the fetched base.

    Returns:
        The manifest of the corpus.

    Raises:
        DataError: there are no files, a file cannot be read, too few rows are usable, a split is empty, or the share of
            rejected rows is above `prepare.max_rejected`.
        BaseModelError: the base was not fetched, or its tokenizer has changed.
    """
    from moa.core.progress import track
    from moa.data.quality import quality_report

    if encoder is None:
        encoder = ChatEncoder(load_tokenizer(workspace), **config.prompt.model_dump())
    params = config.prepare
    with _scratch(workspace, domain) as scratch, replace_directory(workspace.corpus(domain)) as folder:
        store = RowStore(scratch, params.near_duplicate)
        row_filter = RowFilter(config, domain, encoder, store)
        with (_rare_garbage_collection(), (folder / "rejected.jsonl").open("wb") as file,
              track(f"prepare {domain}", unit="rows") as bar):
            for batch in _batches(read(workspace.raw(domain), domain)):
                row_filter.take(batch, file)
                bar.advance(len(batch))
        _require_usable_rows(workspace, domain, params, row_filter, folder / "rejected.jsonl")
        settled = store.settle(splits.split_bounds(params))
        written = store.write(folder, settled)
        counts = row_filter.counts(settled) | {split: count for split, (count, _) in written.items()}
        _require_rows_in_each_split(domain, params, counts)
        base = pin(workspace)
        manifest = {
            "kind": "corpus", "domain": domain,
            "digest": digests.of_json({"rows": {split: digest for split, (_, digest) in written.items()},
                                       "tokenizer": base.tokenizer, "template": base.template,
                                       "prompt": config.prompt.model_dump()}),
            "rows": counts, "groups": {split: settled.groups(split) for split in SPLITS},
            "reasons": dict(row_filter.reasons.most_common()), "codes": dict(row_filter.codes.most_common()),
            "redacted": dict(sorted(row_filter.redacted.items())),
            "tokens": {part: _summary(store.tokens(part, settled)) for part in ("prompt", "completion")},
            "longest_answer": int(store.tokens("completion", settled)[settled.untested].max()),
            "base": {"tokenizer": base.tokenizer, "template": base.template}}
        write_json(folder / "quality.json", quality_report(folder, manifest))
        write_json(folder / MANIFEST, manifest)
    return manifest


class RowFilter:
    """Passes the usable rows of a domain on to a RowStore, in batches, and counts the outcome of each raw row.

    Args:
        config: `prepare.redact` and the domain are used.
        name: name of the domain.
        encoder: counts the tokens of rows, and knows the longest that is allowed.
        store: gets the usable rows.
    """

    def __init__(self, config: Config, name: str, encoder: ChatEncoder, store: RowStore) -> None:
        self.domain, self.encoder, self.store = config.domains[name], encoder, store
        self.read = self.rejected = self.grouped = 0
        self.reasons: Counter[str] = Counter()           # by kind of reason
        self.codes: Counter[RejectionCode] = Counter()
        self.first: dict[str, str] = {}   # by kind of reason: whole reason, file and line of its first row
        self.redact: Any = None
        self.redact_rejected: Any = str   # redacts the texts of rejected rows, whose replacements are not counted
        if config.prepare.redact:
            from moa.data.redaction import Redactor

            self.redact, self.redact_rejected = Redactor(config.prepare.redact), Redactor(config.prepare.redact)
        markers = encoder.tokenizer.all_special_tokens   # in a row's text, one of them could end or begin a turn
        self.marker = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))) or r"(?!)")

    @property
    def redacted(self) -> Counter[str]:
        """Number of replacements in usable rows, by kind of personal data."""
        return Counter() if self.redact is None else self.redact.counts

    def counts(self, settled: RowFates) -> dict[str, int]:
        """Numbers of rows by outcome: read = kept + rejected + duplicates.

        `near_duplicates` is a part of `duplicates`, and `straddling` a part of `near_duplicates`.
        """
        kept = int(settled.stays.sum())
        return {"read": self.read, "kept": kept, "rejected": self.rejected,
                "duplicates": settled.duplicates + settled.near_duplicates,
                "near_duplicates": settled.near_duplicates, "straddling": settled.straddling}

    def take(self, batch: Sequence[RawRow], rejections: Any) -> None:
        """Add the usable rows of a batch to the store, and write the others as JSON lines to the file `rejections`."""
        readable: list[tuple[RawRow, list[Message], Rendered]] = []
        self.read += len(batch)
        for raw in batch:
            try:
                messages = self._messages(raw.value)
                readable.append((raw, messages, self._rendered(messages)))
            except RowRejected as rejected:
                self._reject(raw, rejected, rejections)
        rows, groups = [], []
        lengths = self.encoder.lengths([rendered for _, _, rendered in readable])
        for (raw, messages, _), (prompt, completion) in zip(readable, lengths, strict=True):
            if not completion:
                self._reject(raw, RowRejected(RejectionCode.NO_TOKENS, "the answer has no tokens"), rejections)
            elif prompt + completion > self.encoder.max_tokens:
                self._reject(raw, self._too_long(prompt + completion, "tokens"), rejections)
            else:
                column = group_value(raw.value, self.domain)
                self.grouped += column is not None
                row = Row(row_id(messages), tuple(messages), prompt, completion)
                rows.append(row)
                groups.append(splits.group(row.id, messages, column, self.domain))
        self.store.add(rows, groups)

    def _messages(self, value: Any) -> list[Message]:
        """The redacted messages of a raw row. Raises RowRejected."""
        messages = conversation(value, self.domain)
        if self.redact is not None:
            messages = [{**message, "content": self.redact(message["content"])} for message in messages]
        for message in messages:
            if match := self.marker.search(message["content"]):
                raise RowRejected(RejectionCode.SPECIAL_TOKEN,
                                  f"the text contains {match[0]}, a special token of the base")
        return messages

    def _rendered(self, messages: list[Message]) -> Rendered:
        """The row as the encoder renders it. Raises RowRejected where it is far too long or cannot be rendered."""
        from jinja2 import TemplateError

        if (size := sum(len(message["content"]) for message in messages)) > CHARACTERS * self.encoder.max_tokens:
            raise self._too_long(size, "characters")
        try:
            return self.encoder.rendered(messages)
        except TemplateError as error:
            raise RowRejected(RejectionCode.TEMPLATE, "the base's chat template refuses it", str(error)) from None

    def _too_long(self, size: int, unit: str) -> RowRejected:
        return RowRejected(RejectionCode.TOO_LONG, "too long",
                           f"{size} {unit}, prompt.max_tokens is {self.encoder.max_tokens}")

    def _reject(self, raw: RawRow, rejected: RowRejected, rejections: Any) -> None:
        self.rejected += 1
        self.codes[rejected.code] += 1
        self.reasons[rejected.kind] += 1
        self.first.setdefault(rejected.kind, f"{rejected} (first at {raw.file}:{raw.line})")
        # Redacted before it is cut to SHOWN characters: personal data that is cut in two is not recognised.
        text = self.redact_rejected(raw.text[:2 * SHOWN])[:SHOWN]
        record = {"file": raw.file, "line": raw.line, "code": rejected.code, "kind": rejected.kind,
                  "reason": str(rejected), "text": text}
        rejections.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def _batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    source = iter(rows)
    while batch := list(islice(source, BATCH)):
        yield batch


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Collect garbage rarely in the block: rows form no reference cycles, and collecting took a quarter of the time."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@contextmanager
def _scratch(workspace: Workspace, domain: str) -> Iterator[Path]:
    """Yield an empty temporary folder. One that a killed process left is deleted first."""
    folder = workspace.local / "preparing" / domain
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_usable_rows(workspace: Workspace, domain: str, params: PrepareParams, row_filter: RowFilter,
                         rejections: Path) -> None:
    """Raise DataError where too many rows were rejected, too few are usable, or none has the `group_by` column."""
    if row_filter.rejected and row_filter.rejected > params.max_rejected * row_filter.read:
        kind, count = row_filter.reasons.most_common(1)[0]
        path = workspace.local / "rejected" / f"{domain}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(rejections, path)
        raise DataError(
            f"Domain {domain!r}: {row_filter.rejected} of {row_filter.read} rows cannot be used, most often ({count}) "
            f"because of: {row_filter.first[kind]}. All are listed in {workspace.relative(path)}; mend them, or raise "
            f"prepare.max_rejected ({params.max_rejected}).")
    usable = row_filter.store.count
    if usable < params.min_rows:
        raise DataError(f"Domain {domain!r} has {usable} usable rows; prepare.min_rows asks for {params.min_rows}.")
    group_by = row_filter.domain.group_by
    if group_by not in (None, "none") and not row_filter.grouped:
        raise DataError(f"Domain {domain!r}: no row has the column {group_by!r} that its group_by names; "
                        "name another column in params.yaml, or none.")


def _require_rows_in_each_split(domain: str, params: PrepareParams, counts: dict[str, int]) -> None:
    """Raise DataError where too few rows were kept, or a split is empty."""
    if counts["kept"] < params.min_rows:
        raise DataError(f"Domain {domain!r} has {counts['kept']} usable rows, {counts['duplicates']} others are "
                        f"duplicates; prepare.min_rows asks for {params.min_rows}. If rows that differ in a few words "
                        "are meant to count, raise prepare.near_duplicate in params.yaml.")
    if empty := [split for split in SPLITS if not counts[split]]:
        raise DataError(f"Domain {domain!r}: no row falls into {empty[0]} out of {counts['kept']}; add rows, raise "
                        f"prepare.{'test' if empty[0] == 'train' else empty[0]} in params.yaml, or, if many rows share "
                        f"one answer, set domains.{domain}.group_by.")


def _summary(counts: np.ndarray) -> dict[str, float]:
    return {"mean": float(np.mean(counts)), "p50": float(np.percentile(counts, 50)),
            "p95": float(np.percentile(counts, 95)), "max": int(counts.max()), "total": int(counts.sum())}
