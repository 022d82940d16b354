"""Rows of a corpus and their Parquet files: stage `prepare` writes them, and all later stages read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moa.base.encoding import Message
from moa.core import digests
from moa.core.errors import ArtifactError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Row:
    """One supervised conversation; its last message is the assistant's."""

    id: str   # from `row_id`: equal rows have equal ids in every corpus
    messages: tuple[Message, ...]
    prompt_tokens: int
    completion_tokens: int
    group: str | None = None   # 16 hexadecimal digits

    @property
    def prompt(self) -> list[Message]:
        """The conversation up to the answer."""
        return list(self.messages[:-1])

    @property
    def question(self) -> str:
        """The last user message."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")

    @property
    def reference(self) -> str:
        """The last message's text: the answer that a model is trained on and scored against."""
        return self.messages[-1]["content"]


def row_id(messages: Sequence[Message]) -> str:
    """The id of a row: 32 hexadecimal digits of a digest of its roles and texts."""
    # The separator is a control character, which texts do not contain.
    return digests.of_bytes("\x1e".join([part for message in messages for part in message.values()]).encode())[:32]


def schema() -> Any:
    """Arrow schema of a split's Parquet file."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema([("id", pa.string()), ("messages", pa.list_(message)),
                      ("prompt_tokens", pa.int32()), ("completion_tokens", pa.int32()), ("group", pa.string())])


def table(rows: Sequence[Row]) -> Any:
    """Rows of a split as an Arrow table with the columns of `schema`."""
    import pyarrow as pa

    columns = schema()
    messages = [message for row in rows for message in row.messages]
    offsets = np.cumsum([0, *(len(row.messages) for row in rows)]).astype(np.int32)
    turns = pa.StructArray.from_arrays([pa.array([message[part] for message in messages], pa.string())
                                        for part in ("role", "content")], ["role", "content"])
    return pa.Table.from_arrays(
        [pa.array([row.id for row in rows], pa.string()), pa.ListArray.from_arrays(pa.array(offsets), turns),
         pa.array([row.prompt_tokens for row in rows], pa.int32()),
         pa.array([row.completion_tokens for row in rows], pa.int32()),
         pa.array([row.group for row in rows], pa.string())], schema=columns)


def read(corpus: Path, split: Split) -> list[Row]:
    """Read all rows of one split of the corpus in folder `corpus`. Raises ArtifactError where it is not prepared."""
    import pyarrow.parquet as pq

    path = corpus / f"{split}.parquet"
    if not (corpus / "manifest.json").is_file() or not path.is_file():
        raise ArtifactError(f"{corpus} holds no prepared corpus: run `moa prepare --domain {corpus.name}` first.")
    return [Row(record["id"], tuple(record["messages"]), record["prompt_tokens"], record["completion_tokens"],
                record.get("group"))
            for record in pq.read_table(path).to_pylist()]
