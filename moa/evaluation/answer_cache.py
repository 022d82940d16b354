"""What an expert made of a row before: a cache, so that evaluating a new domain does not ask all others again.

    .moa/cache/answers/KEY.json    by row: loss, target tokens, and the greedy answer under each limit of tokens

What a row gets from an expert depends on that row and the expert's weights alone, so the key is the digest of these, of
the base, of how text becomes tokens and of the code. Never asked by the gate, which measures; can be deleted any time.
"""

from contextlib import suppress
from typing import Any

from moa.core import code_version, digests
from moa.core.files import read_json, write_json
from moa.core.paths import Workspace


class AnswerCache:
    """Losses and answers of one mixture's experts; `save` keeps what was added."""

    def __init__(self, workspace: Workspace, mixture: Any) -> None:
        self.folder, self.mixture = workspace.cache / "answers", mixture
        self._known: dict[str, dict[str, Any]] = {}

    def loss(self, row: str, by: str) -> tuple[float, int] | None:
        found = self._of(by).get(row)
        return (found["loss"], found["tokens"]) if found else None

    def answer(self, row: str, by: str, limit: int) -> str | None:
        found: str | None = self._of(by).get(row, {}).get("answers", {}).get(str(limit))
        return found

    def add_loss(self, row: str, by: str, loss: float, tokens: int) -> None:
        self._of(by)[row] = {"answers": {}, **self._of(by).get(row, {}), "loss": loss, "tokens": tokens}

    def add_answer(self, row: str, by: str, limit: int, answer: str) -> None:
        """Of a row whose loss is known."""
        self._of(by)[row]["answers"][str(limit)] = answer

    def save(self) -> None:
        for by, rows in self._known.items():
            write_json(self.folder / f"{self._key(by)}.json", rows)

    def _of(self, by: str) -> dict[str, Any]:
        if by not in self._known:
            self._known[by] = {}
            with suppress(OSError, ValueError):   # absent, or damaged: it can be computed again
                self._known[by] = dict(read_json(self.folder / f"{self._key(by)}.json"))
        return self._known[by]

    def _key(self, by: str) -> str:
        mixture = self.mixture
        return digests.of_json({"base": mixture.base.pin.digest, "dtype": str(mixture.base.device.dtype),
                                "expert": mixture.experts[by], "system": mixture.encoder.system,
                                "max_tokens": mixture.encoder.max_tokens, "code": code_version.digest("evaluate")})[:32]
