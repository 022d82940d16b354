"""Conversations to token ids and target masks. One code path for training, routing, evaluation and serving."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moa.core.errors import DataError

Message = dict[str, str]   # {"role": "system" | "user" | "assistant", "content": ...}


@dataclass(frozen=True, slots=True)
class Encoded:
    """`ids[t]` is predicted from `ids[:t]`; it counts in the loss when `targets[t]`."""

    ids: list[int]
    targets: list[bool]

    @property
    def completion_tokens(self) -> int:
        return sum(self.targets)

    @property
    def question_tokens(self) -> int:
        """Tokens before the last answer: what a model is given to write it."""
        length = len(self.ids)
        while length and self.targets[length - 1]:
            length -= 1
        return length

    @property
    def prompt_tokens(self) -> int:
        return len(self.ids) - self.completion_tokens


class ChatEncoder:
    """Renders messages with the base's chat template and encodes them piece by piece.

    A conversation is cut where a model would start to write, and each piece is encoded alone. The ids before an answer
    are therefore exactly those that `prompt` gives at serving time.
    """

    def __init__(self, tokenizer: Any, system: str | None, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.max_tokens = max_tokens

    def _render(self, messages: Sequence[Message], generate: bool) -> str:
        messages = list(messages)
        if self.system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

    def _pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The rendered conversation as (text, is an assistant's own words); the last piece is the last message."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:turn], generate=True)
            answered = self._render(messages[:turn + 1], generate=False)
            if not answered.startswith(asked) or not asked.startswith(done):
                raise DataError("The base's chat template does not render a conversation as a prefix of its "
                                "continuation, so the answer's tokens cannot be told apart; use another base.")
            pieces += [(asked[len(done):], False), (answered[len(asked):], True)]
            done = answered
        return pieces

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that an assistant is about to answer."""
        pieces = self._pieces(messages)
        asked = self._render(messages, generate=True)
        rest = asked[sum(len(text) for text, _ in pieces):]
        return [token for text in (*(text for text, _ in pieces), rest) for token in self._ids(text)]

    def row(self, messages: Sequence[Message]) -> Encoded:
        """Ids and target mask of a finished conversation: every assistant turn, its end marker included, is a target.

        White space that the template writes after the last end marker is dropped: nobody waits for it.
        """
        ids: list[int] = []
        targets: list[bool] = []
        for text, target in self.pieces(messages):
            piece = self._ids(text)
            ids += piece
            targets += [target] * len(piece)
        return Encoded(ids, targets)

    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The text of a finished conversation as `row` encodes it, in pieces: (text, is a target)."""
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError("A row's last message must be the assistant's answer.")
        pieces = self._pieces(messages)
        pieces[-1] = (pieces[-1][0].rstrip("\n"), True)
        return pieces

    def lengths(self, conversations: Sequence[Sequence[tuple[str, bool]]]) -> list[tuple[int, int]]:
        """Prompt and completion tokens of conversations in pieces, in one call of the tokenizer, which uses all cores.
        """
        texts = [text for pieces in conversations for text, _ in pieces]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        lengths = []
        for pieces in conversations:
            counts = [0, 0]
            for _, target in pieces:
                counts[target] += len(next(ids))
            lengths.append((counts[0], counts[1]))
        return lengths
