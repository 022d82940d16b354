"""Encodes conversations to token ids and target masks, one way for training, routing, evaluation and serving.

A conversation is rendered as a whole with the base's chat template and encoded as a whole, so its ids are those of
transformers' `apply_chat_template`, and those that any other server computes. The answers are then found in the
rendered text, and the tokens that lie in them are the targets.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np

from moa.core import digests
from moa.core.errors import DataError

Message = dict[str, str]   # {"role": "system" | "user" | "assistant", "content": ...}
Span = tuple[int, int]     # first character, and the one after the last

# The day that templates print which ask for today's: a prompt must not depend on when it is asked. It is the default of
# the templates of Llama 3.1 to 3.3.
TODAY = datetime(2024, 7, 26)
MARK = re.compile(r"\s*<[^<>\s]+>\n*")   # what looks like an end mark, of a tokenizer that has no such token
DATE = re.compile(r"""strftime_now\(\s*['"]([^'"]+)['"]""")


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


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a finished conversation, and where its answers lie, each with its end mark."""

    text: str
    answers: tuple[Span, ...]


class ChatEncoder:
    """Renders conversations with the base's chat template and encodes them.

    Args:
        tokenizer: the base's tokenizer, with its chat template.
        system: system prompt of conversations that have none; None for no prompt.
        max_tokens: the longest row of a corpus, and the longest prompt that the router reads. Nothing is truncated.
        template_args: variables that the template reads, such as {"enable_thinking": False}.
    """

    def __init__(self, tokenizer: Any, system: str | None, max_tokens: int,
                 template_args: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.max_tokens = max_tokens
        self.template_args = dict(template_args or {})

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, with the beginning of the answer that a model shall write."""
        return self._ids(self._render(self._with_system(messages), generate=True))

    def row(self, messages: Sequence[Message]) -> Encoded:
        """Token ids and target mask of a finished conversation: each assistant turn, with its end mark, is a target.

        White space that the template writes after the last end mark is dropped: decoding stops at the mark.

        Raises:
            DataError: the last message is not the assistant's, or the answers of the base's template cannot be told
                apart.
        """
        return self._encode([self.rendered(messages)])[0]

    def rendered(self, messages: Sequence[Message]) -> Rendered:
        """The text of a finished conversation as `row` encodes it, and its answers. Raises as `row`."""
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError("A row's last message must be the assistant's answer.")
        complete = self._with_system(messages)
        text = self._render(complete, generate=False)
        answers = self._continued(complete, text) or self._aligned(complete, text)
        end = self._last_end(text)
        return Rendered(text[:end], (*answers[:-1], (answers[-1][0], end)))

    def lengths(self, conversations: Sequence[Rendered]) -> list[tuple[int, int]]:
        """(prompt tokens, completion tokens) of each conversation.

        They are encoded in one call of the tokenizer, which uses all cores.
        """
        return [(row.prompt_tokens, row.completion_tokens) for row in self._encode(conversations)]

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system is not None and (not messages or messages[0]["role"] != "system"):
            return [{"role": "system", "content": self.system}, *messages]
        return list(messages)

    def _render(self, messages: Sequence[Message], generate: bool) -> str:
        """Render as transformers does. Raises jinja2.TemplateError where the template refuses the conversation."""
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self._dated, tokenize=False, add_generation_prompt=generate,
                **self.template_args)
        except TypeError as error:   # a template of tools iterates over None without them
            raise TemplateError(str(error)) from error
        return text

    @cached_property
    def _dated(self) -> str | None:
        """The tokenizer's template where it asks for today's date, with the date `TODAY`; None for all others."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str) or "strftime_now" not in template:
            return None
        dates = {form: TODAY.strftime(form) for form in DATE.findall(template)}
        return (f"{{%- macro strftime_now(format) -%}}{{{{- {dates!r}.get(format, {TODAY.strftime('%d %b %Y')!r}) -}}}}"
                f"{{%- endmacro -%}}{template}")

    # Where the answers lie.

    def _continued(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        """The answers where the template renders each conversation as a prefix of its continuation; None elsewhere."""
        spans: list[Span] = []
        done = 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], generate=True)
            answered = text if turn == len(messages) - 1 else self._render(messages[:turn + 1], generate=False)
            if not (done <= len(before) <= len(answered) and text.startswith(before) and text.startswith(answered)):
                return None
            spans.append((len(before), len(answered)))
            done = len(answered)
        return spans

    def _aligned(self, messages: Sequence[Message], text: str) -> list[Span]:
        """The answers of a template that writes earlier answers otherwise than the last one.

        The conversation is rendered once more with placeholders for its answers. What lies between the placeholders is
        the template's own text, which is found again in `text`.

        Raises DataError where the template changes more than the answers.
        """
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        before = self._render(messages[:turns[-1]], generate=True)
        if not text.startswith(before):
            raise DataError(self._unlike(before, text))
        frames = self._frames(messages, turns)
        opening = before.removeprefix(self._render(messages[:turns[-1]], generate=False))
        spans, place = [], 0
        # What a frame holds behind the opening may depend on the answer, such as an empty block of thoughts.
        headers = [_header(frame, opening) for frame in frames[:-1]] + [len(frames[-1])]
        for number, turn in enumerate(turns):
            common = _common(frames[number], text[place:])
            following = frames[number + 1][:headers[number + 1]]
            begin, last = place + common, number == len(turns) - 1
            end = (len(text) - len(following) if last and text.endswith(following)
                   else self._answer_end(text, begin, messages[turn]["content"], following))
            if common < headers[number] or end < begin:
                raise DataError(CANNOT)
            spans.append((len(before) if last else place + headers[number], end + self._mark(following, frames[-1])))
            place = end
        if text[place:] != frames[-1]:
            raise DataError(CANNOT)
        return spans

    def _frames(self, messages: Sequence[Message], turns: Sequence[int]) -> list[str]:
        """What the template writes before, between and after the answers. Raises DataError."""
        name = digests.of_bytes("".join(message["content"] for message in messages).encode())[:16]   # in no message
        places = {turn: f"answer{turn}of{name}" for turn in turns}
        marked = self._render([{**message, "content": places.get(turn, message["content"])}
                               for turn, message in enumerate(messages)], generate=False)
        frames = []
        for place in places.values():
            if marked.count(place) != 1:
                raise DataError("The base's chat template does not write each answer of a conversation once, so it "
                                "cannot be learned: rows of a single answer, or `base.template: plain`, are allowed.")
            frame, _, marked = marked.partition(place)
            frames.append(frame)
        return [*frames, marked]

    @staticmethod
    def _answer_end(text: str, begin: int, content: str, following: str) -> int:
        """Where an answer ends that begins at `begin`, whatever the template removes of it; -1 if it is not found."""
        for written in (content, content.strip(), content.rstrip(), content.lstrip()):
            if text.startswith(written + following, begin):
                return begin + len(written)
        return text.find(following, begin)

    def _mark(self, following: str, last: str) -> int:
        """Length of the end mark that `following` begins with, the template's text after an answer; `last` is its text
        after the last one."""
        if last and following.startswith(last):
            return len(last)
        if self._added and (match := self._added.match(following)):
            return match.end()
        if match := MARK.match(following):
            return match.end()
        common = _common(following, last)
        return following.rfind("\n", 0, common) + 1 or common

    def _last_end(self, text: str) -> int:
        """Where a rendered conversation ends: without white space, if that follows an end mark."""
        bare = text.rstrip("\n")
        return len(bare) if self._ends and self._ends.search(bare) else len(text)

    @staticmethod
    def _unlike(prompt: str, text: str) -> str:
        """The sentence for a template that asks for an answer otherwise than it writes it."""
        common = _common(prompt, text)
        begin = max(0, common - 20)
        return (f"The base's chat template asks for an answer with {prompt[begin:common + 40]!r} and writes a finished "
                f"one as {text[begin:common + 40]!r}, so what is learned would not be what is asked for: set "
                "`prompt.template_args`, such as {enable_thinking: false}, if the template has such a switch, or "
                "`base.template: plain`.")

    @cached_property
    def _tokens(self) -> str:
        """A pattern of the tokenizer's added tokens; empty without any."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        return "|".join(sorted(map(re.escape, added - {""}), key=len, reverse=True))

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        return re.compile(rf"\s*(?:{self._tokens})\n*") if self._tokens else None

    @cached_property
    def _ends(self) -> re.Pattern[str] | None:
        return re.compile(rf"(?:{self._tokens})\Z") if self._tokens else None

    # Ids.

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _encode(self, conversations: Sequence[Rendered]) -> list[Encoded]:
        if not conversations:
            return []
        if not self.tokenizer.is_fast:
            return [self._encode_slowly(each) for each in conversations]
        batch = self.tokenizer([each.text for each in conversations], add_special_tokens=False,
                               return_offsets_mapping=True)
        return [Encoded(ids, _targets(np.array(offsets, np.int64).reshape(-1, 2), each.answers))
                for each, ids, offsets in zip(conversations, batch["input_ids"], batch["offset_mapping"], strict=True)]

    def _encode_slowly(self, conversation: Rendered) -> Encoded:
        """As `_encode`, of a tokenizer that does not say which characters a token comes from: by ids of prefixes."""
        ids = self._ids(conversation.text)
        targets = [False] * len(ids)
        for span in conversation.answers:
            start, end = (len(self._ids(conversation.text[:place])) for place in span)
            targets[start:end] = [True] * (min(end, len(ids)) - start)
        return Encoded(ids, targets)


CANNOT = ("The base's chat template does not write a conversation's answers as they are, so their tokens cannot be "
          "told apart: use another base, or `base.template: plain`.")


def _header(frame: str, opening: str) -> int:
    """Where the answer begins that follows `frame`: behind the longest beginning of `opening` that is in it."""
    for length in range(len(opening), 0, -1):
        if (place := frame.rfind(opening[:length])) >= 0:
            return place + length
    return len(frame)


def _common(first: str, second: str) -> int:
    """Length of the longest common prefix of two texts."""
    return next((place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
                min(len(first), len(second)))


def _targets(offsets_T2: np.ndarray, answers: Sequence[Span]) -> list[bool]:
    """Whether each of T tokens lies in an answer, given its first character and the one after its last.

    A token that begins before an answer and ends in it is the answer's: its letters are.
    """
    starts_T, ends_T = offsets_T2.T
    targets_T = np.zeros(len(starts_T), bool)
    for start, end in answers:
        targets_T |= (starts_T < end) & (ends_T > start) & (ends_T <= end)
    return [bool(each) for each in targets_T]
