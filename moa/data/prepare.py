"""Stage `prepare`: raw rows to a corpus. Every row read is kept, rejected with a reason, or a duplicate.

Rows pass through in batches, so that memory does not grow with their text. A row's side is a function of its group
(moa.data.splits), which the row alone decides but for replies of a closed set, so that rows that arrive later do not
move the ones that are there; and of near-duplicates on two sides only the one that is not for training stays.

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

from moa.base.encoding import ChatEncoder, Message
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
from moa.data.readers import RawRow, RowRejected, read
from moa.data.row_store import RowFates, RowStore

BATCH = 2048          # rows processed together
SHOWN = 500           # characters of a rejected row that are recorded
CHARACTERS = 200      # per token; a longer row is rejected without encoding it


def prepare(workspace: Workspace, config: Config, domain: str, encoder: ChatEncoder | None = None) -> dict[str, Any]:
    """Write `data/corpora/NAME` from `data/raw/NAME` and return its manifest. `encoder`: None = the base's.

    Raises DataError when there is nothing to read, too little is usable, or more than `prepare.max_rejected` is not.
    """
    from moa.core.progress import track
    from moa.data.quality import quality_report

    if encoder is None:
        encoder = ChatEncoder(load_tokenizer(workspace), config.prompt.system, config.prompt.max_tokens)
    params = config.prepare
    with _scratch(workspace, domain) as scratch, replace_directory(workspace.corpus(domain)) as folder:
        staging = RowStore(scratch, params.near_duplicate)
        intake = RowFilter(config, domain, encoder, staging)
        with (_acyclic(), (folder / "rejected.jsonl").open("wb") as file,
              track(f"prepare {domain}", unit="rows") as bar):
            for batch in _batches(read(workspace.raw(domain), domain)):
                intake.take(batch, file)
                bar.advance(len(batch))
        _refuse_if_unusable(workspace, domain, params, intake, folder / "rejected.jsonl")
        settled = staging.settle(splits.split_bounds(params))
        written = staging.write(folder, settled)
        counts = intake.counts(settled) | {split: count for split, (count, _) in written.items()}
        _refuse_if_lopsided(domain, params, counts)
        base = pin(workspace)
        manifest = {
            "kind": "corpus", "domain": domain,
            "digest": digests.of_json({"rows": {split: digest for split, (_, digest) in written.items()},
                                       "tokenizer": base.tokenizer, "template": base.template,
                                       "prompt": config.prompt.model_dump()}),
            "rows": counts, "reasons": dict(intake.reasons.most_common()),
            "redacted": dict(sorted(intake.redacted.items())),
            "tokens": {part: _summary(staging.tokens(part, settled)) for part in ("prompt", "completion")},
            "base": {"tokenizer": base.tokenizer, "template": base.template}}
        write_json(folder / "quality.json", quality_report(folder, manifest))
        write_json(folder / MANIFEST, manifest)
    return manifest


class RowFilter:
    """Passes usable rows on to a RowStore, in batches, and counts the outcome of each raw row."""

    def __init__(self, config: Config, name: str, encoder: ChatEncoder, staging: RowStore) -> None:
        self.domain, self.encoder, self.staging = config.domains[name], encoder, staging
        self.read = self.rejected = self.grouped = 0
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}   # by class of reason: its first row's place and whole reason
        self.redact: Any = None
        self.conceal: Any = str   # the same for rows that are rejected, whose texts are kept and not counted
        if config.prepare.redact:
            from moa.data.redaction import Redactor

            self.redact, self.conceal = Redactor(config.prepare.redact), Redactor(config.prepare.redact)
        markers = encoder.tokenizer.all_special_tokens   # read as the marker itself, one would end or begin a turn
        self.marker = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))) or r"(?!)")

    @property
    def redacted(self) -> Counter[str]:
        """Replacements by kind of personal data."""
        return Counter() if self.redact is None else self.redact.counts

    def counts(self, settled: RowFates) -> dict[str, int]:
        """read = kept + rejected + duplicates; near-duplicates are among the duplicates, straddling among the near."""
        kept = int(settled.stays.sum())
        return {"read": self.read, "kept": kept, "rejected": self.rejected,
                "duplicates": settled.duplicates + settled.near_duplicates,
                "near_duplicates": settled.near_duplicates, "straddling": settled.straddling}

    def take(self, batch: Sequence[RawRow], rejections: Any) -> None:
        """Stage the usable rows of a batch, and write the others with their reasons."""
        ready: list[tuple[RawRow, list[Message], Any]] = []
        self.read += len(batch)
        for raw in batch:
            try:
                messages = self._messages(raw.value)
                ready.append((raw, messages, self._pieces(messages)))
            except RowRejected as reason:
                self._reject(raw, str(reason), rejections)
        rows, groups = [], []
        lengths = self.encoder.lengths([pieces for _, _, pieces in ready])
        for (raw, messages, _), (prompt, completion) in zip(ready, lengths, strict=True):
            if not completion:
                self._reject(raw, "the answer has no tokens", rejections)
            elif prompt + completion > self.encoder.max_tokens:
                self._reject(raw, f"too long: {prompt + completion} tokens, prompt.max_tokens is "
                                  f"{self.encoder.max_tokens}", rejections)
            else:
                column = group_value(raw.value, self.domain)
                self.grouped += column is not None
                row = Row(row_id(messages), tuple(messages), prompt, completion)
                rows.append(row)
                groups.append(splits.group(row.id, messages, column, self.domain))
        self.staging.add(rows, groups)

    def _messages(self, value: Any) -> list[Message]:
        messages = conversation(value, self.domain)
        if self.redact is not None:
            messages = [{**message, "content": self.redact(message["content"])} for message in messages]
        for message in messages:
            if found := self.marker.search(message["content"]):
                raise RowRejected(f"the text contains {found[0]}, a marker of the base's own")
        return messages

    def _pieces(self, messages: list[Message]) -> list[tuple[str, bool]]:
        from jinja2 import TemplateError

        if (size := sum(len(message["content"]) for message in messages)) > CHARACTERS * self.encoder.max_tokens:
            raise RowRejected(f"too long: {size} characters, prompt.max_tokens is {self.encoder.max_tokens}")
        try:
            return self.encoder.pieces(messages)
        except TemplateError as error:
            raise RowRejected(f"the base's chat template refuses it: {error}") from None

    def _reject(self, raw: RawRow, reason: str, rejections: Any) -> None:
        self.rejected += 1
        kind = reason.partition(":")[0]
        self.reasons[kind] += 1
        self.first.setdefault(kind, f"{reason} (first at {raw.file}:{raw.line})")
        text = self.conceal(raw.text[:2 * SHOWN])[:SHOWN]   # personal data that is cut in two would not be recognised
        record = {"file": raw.file, "line": raw.line, "reason": reason, "text": text}
        rejections.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def _batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    source = iter(rows)
    while batch := list(islice(source, BATCH)):
        yield batch


@contextmanager
def _acyclic() -> Iterator[None]:
    """Pause the garbage collector: these millions of objects form no cycles, and it took a quarter of the time."""
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
    """A temporary folder. The next run deletes that of a killed one."""
    folder = workspace.local / "preparing" / domain
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_if_unusable(workspace: Workspace, domain: str, params: PrepareParams, intake: RowFilter,
                        rejections: Path) -> None:
    if intake.rejected and intake.rejected > params.max_rejected * intake.read:
        kind, count = intake.reasons.most_common(1)[0]
        path = workspace.local / "rejected" / f"{domain}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(rejections, path)
        raise DataError(
            f"Domain {domain!r}: {intake.rejected} of {intake.read} rows cannot be used, most often ({count}) "
            f"because of: {intake.first[kind]}. All are listed in {workspace.relative(path)}; mend them, or raise "
            f"prepare.max_rejected ({params.max_rejected}).")
    usable = intake.staging.count
    if usable < params.min_rows:
        raise DataError(f"Domain {domain!r} has {usable} usable rows; prepare.min_rows asks for {params.min_rows}.")
    if intake.domain.group_by not in (None, "none") and not intake.grouped:
        raise DataError(f"Domain {domain!r}: no row has the column {intake.domain.group_by!r} that its group_by names; "
                        "name another column in params.yaml, or none.")


def _refuse_if_lopsided(domain: str, params: PrepareParams, counts: dict[str, int]) -> None:
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
