"""Rows between reading and writing: texts on disk, in buckets by id, and a hundred bytes a row in memory.

What is decided over all rows at once, duplicates and sides, is decided on those numbers. Then the buckets are read one
after the other, in the order of the ids, so that the same rows give the same files whatever order they came in.
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
FLUSH = 1 << 14          # rows kept before they go to their buckets
ROW_GROUP = 1 << 14      # rows of a row group of the corpus: files must not depend on how rows came in
SHOWN = 200              # characters of a near-duplicate that are kept


@dataclass(frozen=True)
class RowFates:
    """Outcome of every staged row. Arrays are indexed by the order of arrival."""

    stays: np.ndarray       # bool [N]
    group: np.ndarray       # uint64 [N], digest of its group
    side: np.ndarray        # int8 [N], an index of splits.ORDER
    double_of: np.ndarray   # int64 [N], the row whose near-duplicate it is, or -1
    duplicates: int         # copies of another row

    @property
    def near_duplicates(self) -> int:
        return int((self.double_of >= 0).sum())

    @property
    def straddling(self) -> int:
        """Near-duplicates of a row on another side, which would have leaked."""
        left_out = np.flatnonzero(self.double_of >= 0)
        return int((self.side[left_out] != self.side[self.double_of[left_out]]).sum())


class RowStore:
    """Takes rows in any order, then settles and writes them. `threshold` 0 = no search for near-duplicates."""

    def __init__(self, folder: Path, threshold: float) -> None:
        self.folder = folder
        self.count = 0
        self._sketches = Sketches(folder / "shingles", threshold) if threshold else None
        self._rows: list[Row] = []
        self._writers: dict[int, Any] = {}
        self._parts: dict[str, list[np.ndarray]] = {"ids": [], "groups": [], "answers": [], "prompt": [],
                                                    "completion": []}

    def add(self, rows: Sequence[Row], groups: Sequence[Group]) -> None:
        """Stage rows with their groups."""
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
        import pyarrow as pa

        if not self._rows:
            return
        table = corpora.table(self._rows)
        numbers = np.arange(self.count - len(self._rows), self.count)
        table = table.append_column("number", pa.array(numbers, pa.int64()))
        bucket = (self._parts_of("ids")[numbers, 0] >> np.uint64(58)).astype(np.int64)
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

    def _parts_of(self, name: str) -> np.ndarray:
        parts = self._parts[name]
        if len(parts) > 1:
            self._parts[name] = parts = [np.concatenate(parts)]
        return parts[0]

    def tokens(self, part: str, settled: RowFates) -> np.ndarray:
        """`prompt` or `completion` tokens of the rows that stay."""
        counts: np.ndarray = self._parts_of(part)[settled.stays]
        return counts

    def settle(self, bounds: tuple[float, float]) -> RowFates:
        """Decide what stays, and where. Of near-duplicates the one furthest ahead in splits.ORDER stays."""
        ids, arrived = self._parts_of("ids"), np.arange(self.count)
        order = np.lexsort((arrived, ids[:, 1], ids[:, 0]))
        ordered = ids[order]
        first = np.concatenate(([True], (ordered[1:] != ordered[:-1]).any(1)))
        unique = order[first]   # the first of its copies, in the order of the ids
        group = self._groups(unique)
        side = np.searchsorted(np.array(bounds), positions(group), side="right").astype(np.int8)
        side[unique] = np.minimum.reduceat(side[order], np.flatnonzero(first))   # copies may name other groups
        stays, double_of = np.zeros(self.count, bool), np.full(self.count, -1)
        stays[unique] = True
        if self._sketches is not None:
            priority = np.full(self.count, -1)
            priority[unique[np.argsort(side[unique], kind="stable")]] = np.arange(len(unique))
            stays, double_of = self._sketches.survivors(priority)
        return RowFates(stays, group, side, double_of, self.count - len(unique))

    def _groups(self, unique: np.ndarray) -> np.ndarray:
        """The digest of every row's group, [N]; rows with a reply of a closed set are groups by themselves."""
        groups, answers = self._parts_of("groups").copy(), self._parts_of("answers")
        shared, counts = np.unique(answers[unique], return_counts=True)
        canned = np.isin(answers, shared[(counts >= CANNED) & (shared != 0)])
        groups[canned] = [alone(f"{high:016x}{low:016x}") for high, low in self._parts_of("ids")[canned].tolist()]
        return groups

    def write(self, folder: Path, settled: RowFates) -> dict[Split, tuple[int, str]]:
        """Write the splits and `near_duplicates.jsonl`. Returns each split's count and the digest of its ids."""
        import pyarrow as pa

        self._flush()
        for writer in self._writers.values():
            writer.close()
        with (_Splits(folder) as splits, (folder / "near_duplicates.jsonl").open("w", encoding="utf-8") as doubles):
            for bucket in sorted(self._writers):
                with pa.memory_map(str(self.folder / f"{bucket:02}.arrow")) as file:
                    table = pa.ipc.open_file(file).read_all().sort_by([("id", "ascending"), ("number", "ascending")])
                numbers = table.column("number").to_numpy()
                names = pa.array([f"{digest:016x}" for digest in settled.group[numbers].tolist()], pa.string())
                table = table.drop_columns(["number", "group"]).append_column("group", names)
                for code, split in enumerate(ORDER):
                    mine = settled.stays[numbers] & (settled.side[numbers] == code)
                    splits.append(split, table.filter(pa.array(mine)))
                for place in np.flatnonzero(settled.double_of[numbers] >= 0):
                    double = self._double(table.slice(int(place), 1).to_pylist()[0], int(numbers[place]), settled)
                    doubles.write(json.dumps(double, ensure_ascii=False) + "\n")
            return splits.finish()

    def _double(self, row: dict[str, Any], number: int, settled: RowFates) -> dict[str, str]:
        other = int(settled.double_of[number])
        high, low = (int(half) for half in self._parts_of("ids")[other])
        return {"id": row["id"], "of": f"{high:016x}{low:016x}", "split": ORDER[settled.side[number]],
                "of_split": ORDER[settled.side[other]], "text": row["messages"][-2]["content"][:SHOWN]}


class _Splits:
    """The Parquet files of a corpus, written side by side in row groups of one size."""

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
        import pyarrow as pa

        self._counts[split] += table.num_rows
        self._digests[split].update("".join(table.column("id").to_pylist()).encode())
        waiting = pa.concat_tables([self._waiting[split], table])
        while waiting.num_rows >= ROW_GROUP:
            self._files[split].write_table(waiting.slice(0, ROW_GROUP))
            waiting = waiting.slice(ROW_GROUP)
        self._waiting[split] = waiting

    def finish(self) -> dict[Split, tuple[int, str]]:
        for split, waiting in self._waiting.items():
            if waiting.num_rows:
                self._files[split].write_table(waiting)
        return {split: (self._counts[split], self._digests[split].hexdigest()) for split in corpora.SPLITS}
