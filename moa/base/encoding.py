"""Encodes conversations to token ids and target masks, one way for training, routing, evaluation and serving."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moa.core.errors import DataError

Message = dict[str, str]   # {"role": "system" | "user" | "assistant", "content": ...}


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation. `ids[t]` is predicted from `ids[:t]` and counts in the loss where `targets[t]`."""

    ids: list[int]
    targets: list[bool]

    @property
    def completion_tokens(self) -> int:
        """Number of target tokens."""
        return sum(self.targets)

    @property
    def question_tokens(self) -> int:
        """Number of tokens before the last answer: the prompt that it answers."""
        length = len(self.ids)
        while length and self.targets[length - 1]:
            length -= 1
        return length

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens that are no targets."""
        return len(self.ids) - self.completion_tokens


class ChatEncoder:
    """Renders messages with the base's chat template and encodes them piece by piece.

    A conversation is cut where an answer begins, and each piece is encoded alone. So the ids before an answer are
    exactly those that `prompt` returns at serving time.

    Args:
        tokenizer: the base's tokenizer, with its chat template.
        system: system prompt of conversations that have none; None for no prompt.
        max_tokens: the longest row of a corpus, and the longest prompt that the router reads. Nothing is truncated.
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
        """The rendered conversation up to its last answer, cut into (text, is an answer)."""
        pieces: list[tuple[str, bool]] = []
        done = ""   # the text of all pieces so far
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], generate=True)
            answered = self._render(messages[:turn + 1], generate=False)
            if not answered.startswith(before) or not before.startswith(done):
                raise DataError("The base's chat template does not render a conversation as a prefix of its "
                                "continuation, so the answer's tokens cannot be told apart; use another base.")
            pieces += [(before[len(done):], False), (answered[len(before):], True)]
            done = answered
        return pieces

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, with the beginning of the answer that a model shall write."""
        pieces = self._pieces(messages)
        rendered = self._render(messages, generate=True)
        rest = rendered[sum(len(text) for text, _ in pieces):]
        return [token for text in (*(text for text, _ in pieces), rest) for token in self._ids(text)]

    def row(self, messages: Sequence[Message]) -> Encoded:
        """Token ids and target mask of a finished conversation: each assistant turn, with its end marker, is a target.

        Raises DataError where the last message is not the assistant's, or the base's template is not supported.
        White space that the template writes after the last end marker is dropped: decoding stops at the marker.
        """
        ids: list[int] = []
        targets: list[bool] = []
        for text, target in self.pieces(messages):
            piece = self._ids(text)
            ids += piece
            targets += [target] * len(piece)
        return Encoded(ids, targets)

    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The text of a finished conversation as `row` encodes it, in pieces: (text, is a target). Raises as `row`."""
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError("A row's last message must be the assistant's answer.")
        pieces = self._pieces(messages)
        pieces[-1] = (pieces[-1][0].rstrip("\n"), True)
        return pieces

    def lengths(self, conversations: Sequence[Sequence[tuple[str, bool]]]) -> list[tuple[int, int]]:
        """(prompt tokens, completion tokens) of each conversation, given in pieces.

        They are encoded in one call of the tokenizer, which uses all cores.
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
