"""A corpus on disk: what prepare writes and every later step reads. Knows nothing of validation or splits."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moa.errors import ArtifactError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Message = dict[str, str]   # {"role": "system" | "user" | "assistant", "content": ...}


@dataclass(frozen=True, slots=True)
class Row:
    """One supervised conversation; its last message is the assistant's.

    `id` is the digest of the content, so the same row has the same name wherever it turns up.
    """

    id: str
    messages: tuple[Message, ...]
    prompt_tokens: int
    completion_tokens: int

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
        """The answer a model is trained towards and scored against."""
        return self.messages[-1]["content"]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write one split as Parquet, in the order given."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("id", pa.string()), ("messages", pa.list_(message)),
                        ("prompt_tokens", pa.int32()), ("completion_tokens", pa.int32())])
    records = [{"id": row.id, "messages": list(row.messages), "prompt_tokens": row.prompt_tokens,
                "completion_tokens": row.completion_tokens} for row in rows]
    pq.write_table(pa.Table.from_pylist(records, schema=schema), path)


def read(corpus: Path, split: Split) -> list[Row]:
    """Rows of one split of the corpus in folder `corpus`. Raises ArtifactError when it was never prepared."""
    import pyarrow.parquet as pq

    path = corpus / f"{split}.parquet"
    if not (corpus / "manifest.json").is_file() or not path.is_file():
        raise ArtifactError(f"{corpus} holds no prepared corpus: run `moa prepare --domain {corpus.name}` first.")
    return [Row(record["id"], tuple(record["messages"]), record["prompt_tokens"], record["completion_tokens"])
            for record in pq.read_table(path).to_pylist()]
