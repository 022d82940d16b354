"""Losses and answers of earlier evaluations, so that a new domain does not cost a run of all other experts.

    .moa/cache/answers/KEY.json    by row: loss, completion tokens, and the greedy answer under each limit of tokens

What a row gets from an expert depends on that row and the expert's weights alone, so KEY is the digest of the expert,
the base, the encoding of text and the code. The gate does not use this cache. The folder can be deleted at any time.
"""

from contextlib import suppress
from typing import Any

from moa.core import code_version, digests
from moa.core.files import read_json, write_json
from moa.core.paths import Workspace


class AnswerCache:
    """Losses and answers of one mixture's experts, by row id and label (`by`). Additions reach the disk by `save`."""

    def __init__(self, workspace: Workspace, mixture: Any) -> None:
        self.folder, self.mixture = workspace.cache / "answers", mixture
        self._known: dict[str, dict[str, Any]] = {}

    def loss(self, row: str, by: str) -> tuple[float, int] | None:
        """Loss in nats per completion token, and the number of these tokens; None where it is unknown."""
        entry = self._of(by).get(row)
        return (entry["loss"], entry["tokens"]) if entry else None

    def answer(self, row: str, by: str, limit: int) -> str | None:
        """The greedy answer of at most `limit` tokens; None where it is unknown."""
        answer: str | None = self._of(by).get(row, {}).get("answers", {}).get(str(limit))
        return answer

    def add_loss(self, row: str, by: str, loss: float, tokens: int) -> None:
        self._of(by)[row] = {"answers": {}, **self._of(by).get(row, {}), "loss": loss, "tokens": tokens}

    def add_answer(self, row: str, by: str, limit: int, answer: str) -> None:
        """Add the answer to a row whose loss is known. Raises KeyError for any other row."""
        self._of(by)[row]["answers"][str(limit)] = answer

    def save(self) -> None:
        """Write the entries of every expert that was used."""
        for by, rows in self._known.items():
            write_json(self.folder / f"{self._key(by)}.json", rows)

    def _of(self, by: str) -> dict[str, Any]:
        if by not in self._known:
            self._known[by] = {}
            with suppress(OSError, ValueError):   # a file that is absent or damaged can be computed again
                self._known[by] = dict(read_json(self.folder / f"{self._key(by)}.json"))
        return self._known[by]

    def _key(self, by: str) -> str:
        mixture = self.mixture
        return digests.of_json({"base": mixture.base.pin.digest, "dtype": str(mixture.base.device.dtype),
                                "expert": mixture.experts[by], "system": mixture.encoder.system,
                                "max_tokens": mixture.encoder.max_tokens, "code": code_version.digest("evaluate")})[:32]
