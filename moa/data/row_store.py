"""The rows of a corpus between reading and writing: texts in files, and a hundred bytes a row in memory.

Each row goes to a bucket file by its id. Duplicates and splits are decided over all rows at once, on the numbers in
memory. Then the buckets are read one after the other, in the order of the ids, so that the same rows give the same
corpus in whatever order they arrived.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from moa.data import corpus as corpora
from moa.data.corpus import Row, Split
from moa.data.near_duplicates import Sketches
from moa.data.splits import CANNED, ORDER, Group, alone, positions

BUCKETS = 64             # by the first byte of the id
FLUSH = 1 << 14          # rows in memory before they are written to their buckets
ROW_GROUP = 1 << 14      # rows of a Parquet row group: a fixed size, so that files do not depend on how rows arrived
SHOWN = 200              # characters of a near-duplicate's question in near_duplicates.jsonl


@dataclass(frozen=True)
class RowFates:
    """Outcome of all N rows of a RowStore. Arrays are indexed by the order of arrival."""

    stays: np.ndarray       # bool [N]
    group: np.ndarray       # uint64 [N], digest of the row's group
    side: np.ndarray        # int8 [N], the row's split, as an index of splits.ORDER
    double_of: np.ndarray   # int64 [N], the staying row that a removed row is a near-duplicate of, or -1
    duplicates: int         # number of exact copies of another row

    @property
    def near_duplicates(self) -> int:
        """Number of rows that were removed as near-duplicates."""
        return int((self.double_of >= 0).sum())

    @property
    def straddling(self) -> int:
        """Number of removed near-duplicates of a row of another split: they would have leaked into it."""
        removed = np.flatnonzero(self.double_of >= 0)
        return int((self.side[removed] != self.side[self.double_of[removed]]).sum())

    @property
    def untested(self) -> np.ndarray:
        """Of the rows that stay, whether each is a training or validation row: bool."""
        return self.side[self.stays] != ORDER.index("test")

    def groups(self, split: Split) -> int:
        """Number of groups that the rows of a split belong to."""
        return len(np.unique(self.group[self.stays & (self.side == ORDER.index(split))]))


class RowStore:
    """Takes the rows of a corpus in any order, decides with `settle` which stay, and writes the splits.

    Args:
        folder: an empty folder for temporary files.
        threshold: least Jaccard similarity of near-duplicates; 0 = near-duplicates are not searched.
    """

    def __init__(self, folder: Path, threshold: float) -> None:
        self.folder = folder
        self.count = 0
        self._sketches = Sketches(folder / "shingles", threshold) if threshold else None
        self._rows: list[Row] = []
        self._writers: dict[int, Any] = {}
        self._parts: dict[str, list[np.ndarray]] = {"ids": [], "groups": [], "answers": [], "prompt": [],
                                                    "completion": []}

    def add(self, rows: Sequence[Row], groups: Sequence[Group]) -> None:
        """Add rows with their groups."""
        if not rows:
            return
        ids = np.frombuffer(bytes.fromhex("".join(row.id for row in rows)), ">u8").reshape(-1, 2).astype(np.uint64)
        self._parts["ids"].append(ids)
        self._parts["groups"].append(np.array([each.digest for each in groups], np.uint64))
        self._parts["answers"].append(np.array([each.answer or 0 for each in groups], np.uint64))
        self._parts["prompt"].append(np.array([row.prompt_tokens for row in rows], np.int32))
        self._parts["completion"].append(np.array([row.completion_tokens for row in rows], np.int32))
        if self._sketches is not None:
            self._sketches.add([" ".join([message["content"] for message in row.messages]) for row in rows])
        self._rows += rows
        self.count += len(rows)
        if len(self._rows) >= FLUSH:
            self._flush()

    def _flush(self) -> None:
        """Write the rows in memory to their buckets."""
        import pyarrow as pa

        if not self._rows:
            return
        table = corpora.table(self._rows)
        numbers = np.arange(self.count - len(self._rows), self.count)
        table = table.append_column("number", pa.array(numbers, pa.int64()))
        bucket = (self._joined("ids")[numbers, 0] >> np.uint64(58)).astype(np.int64)
        order = np.argsort(bucket, kind="stable")
        table, bucket = table.take(pa.array(order)), bucket[order]
        edges = np.searchsorted(bucket, np.arange(BUCKETS + 1))
        for number in range(BUCKETS):
            begin, end = int(edges[number]), int(edges[number + 1])
            if begin < end:
                self._writer(number, table.schema).write_table(table.slice(begin, end - begin))
        self._rows.clear()

    def _writer(self, bucket: int, schema: Any) -> Any:
        import pyarrow as pa

        if bucket not in self._writers:
            self._writers[bucket] = pa.ipc.new_file(str(self.folder / f"{bucket:02}.arrow"), schema)
        return self._writers[bucket]

    def _joined(self, name: str) -> np.ndarray:
        """One array of the numbers `name` of all rows."""
        parts = self._parts[name]
        if len(parts) > 1:
            self._parts[name] = parts = [np.concatenate(parts)]
        return parts[0]

    def tokens(self, part: str, settled: RowFates) -> np.ndarray:
        """Token counts of the rows that stay, of their `prompt` or their `completion` (`part`): int32."""
        counts: np.ndarray = self._joined(part)[settled.stays]
        return counts

    def settle(self, bounds: tuple[float, float]) -> RowFates:
        """Decide which rows stay, and in which split. `bounds` are those of `moa.data.splits.split_bounds`.

        Of exact copies the first to arrive stays; of near-duplicates the one whose split is first in splits.ORDER.
        """
        ids, arrived = self._joined("ids"), np.arange(self.count)
        order = np.lexsort((arrived, ids[:, 1], ids[:, 0]))
        ordered = ids[order]
        first = np.concatenate(([True], (ordered[1:] != ordered[:-1]).any(1)))
        unique = order[first]   # of each id the first row to arrive, in the order of the ids
        group = self._groups(unique)
        # Copies may be of several groups: the lowest counts, whose split is the first one in splits.ORDER.
        group[unique] = np.minimum.reduceat(group[order], np.flatnonzero(first))
        side = np.searchsorted(np.array(bounds), positions(group), side="right").astype(np.int8)
        stays, double_of = np.zeros(self.count, bool), np.full(self.count, -1)
        stays[unique] = True
        if self._sketches is not None:
            priority = np.full(self.count, -1)
            priority[unique[np.argsort(side[unique], kind="stable")]] = np.arange(len(unique))
            stays, double_of = self._sketches.survivors(priority)
        return RowFates(stays, group, side, double_of, self.count - len(unique))

    def _groups(self, unique: np.ndarray) -> np.ndarray:
        """The digest of every row's group, [N]; rows with a reply of a closed set are groups by themselves."""
        groups, answers = self._joined("groups").copy(), self._joined("answers")
        shared, counts = np.unique(answers[unique], return_counts=True)
        canned = np.isin(answers, shared[(counts >= CANNED) & (shared != 0)])
        groups[canned] = [alone(f"{high:016x}{low:016x}") for high, low in self._joined("ids")[canned].tolist()]
        return groups

    def write(self, folder: Path, settled: RowFates) -> dict[Split, tuple[int, str]]:
        """Write the splits and `near_duplicates.jsonl` into `folder`. May be called once, after all rows are added.

        Returns:
            For each split, its number of rows and the digest of their ids.
        """
        import pyarrow as pa

        self._flush()
        for writer in self._writers.values():
            writer.close()
        near_duplicates = folder / "near_duplicates.jsonl"
        with _SplitWriter(folder) as splits, near_duplicates.open("w", encoding="utf-8") as file:
            for bucket in sorted(self._writers):
                with pa.memory_map(str(self.folder / f"{bucket:02}.arrow")) as buffer:
                    table = pa.ipc.open_file(buffer).read_all().sort_by([("id", "ascending"), ("number", "ascending")])
                numbers = table.column("number").to_numpy()
                names = pa.array([f"{digest:016x}" for digest in settled.group[numbers].tolist()], pa.string())
                table = table.drop_columns(["number", "group"]).append_column("group", names)
                for code, split in enumerate(ORDER):
                    in_split = settled.stays[numbers] & (settled.side[numbers] == code)
                    splits.append(split, table.filter(pa.array(in_split)))
                for index in np.flatnonzero(settled.double_of[numbers] >= 0):
                    row = table.slice(int(index), 1).to_pylist()[0]
                    record = self._near_duplicate_record(row, int(numbers[index]), settled)
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            return splits.finish()

    def _near_duplicate_record(self, row: dict[str, Any], number: int, settled: RowFates) -> dict[str, str]:
        other = int(settled.double_of[number])
        high, low = (int(half) for half in self._joined("ids")[other])
        return {"id": row["id"], "of": f"{high:016x}{low:016x}", "split": ORDER[settled.side[number]],
                "of_split": ORDER[settled.side[other]], "text": row["messages"][-2]["content"][:SHOWN]}


class _SplitWriter:
    """Writes the Parquet files of all splits of a corpus at the same time, in row groups of ROW_GROUP rows."""

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as pq

        self._files = {split: pq.ParquetWriter(folder / f"{split}.parquet", corpora.schema())
                       for split in corpora.SPLITS}
        self._waiting = {split: corpora.schema().empty_table() for split in corpora.SPLITS}
        self._digests = {split: hashlib.sha256() for split in corpora.SPLITS}
        self._counts = dict.fromkeys(corpora.SPLITS, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def append(self, split: Split, table: Any) -> None:
        """Add the rows of an Arrow table to a split."""
        import pyarrow as pa

        self._counts[split] += table.num_rows
        self._digests[split].update("".join(table.column("id").to_pylist()).encode())
        waiting = pa.concat_tables([self._waiting[split], table])
        while waiting.num_rows >= ROW_GROUP:
            self._files[split].write_table(waiting.slice(0, ROW_GROUP))
            waiting = waiting.slice(ROW_GROUP)
        self._waiting[split] = waiting

    def finish(self) -> dict[Split, tuple[int, str]]:
        """Write the last row groups. Returns each split's number of rows and the digest of their ids."""
        for split, waiting in self._waiting.items():
            if waiting.num_rows:
                self._files[split].write_table(waiting)
        return {split: (self._counts[split], self._digests[split].hexdigest()) for split in corpora.SPLITS}
