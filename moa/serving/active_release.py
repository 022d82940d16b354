"""The release that a server answers with: loads the champion, replaces it when the champion changes, runs batches.

A replaced release finishes the requests that were submitted to it and is then freed.
"""

import copy
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from moa.base import load, pin
from moa.base.device import pick_device
from moa.base.load import Base
from moa.core.config import Config
from moa.core.errors import MoaError
from moa.core.paths import Workspace
from moa.mixture.generation import engine
from moa.mixture.generation.engine import GenerationConfig, Tell
from moa.mixture.mixture import Answer, Conversation, Listener, Mixture, Request
from moa.mixture.router import Decision
from moa.release.champion import champion
from moa.release.export import adapter_name
from moa.release.registry import Registry
from moa.serving.batcher import Job

RETRY_SECONDS = 60   # before a release that could not be loaded is tried again

# Called with the version and digest of a release, a prompt, and the router's decision on it.
Watch = Callable[[int, str, Conversation, Decision], None]


class ObservedMixture(Mixture):
    """A mixture that reports each decision of its router to `tell`."""

    tell: Callable[[Conversation, Decision], None] | None = None

    def route(self, prompts: Sequence[Conversation]) -> list[Decision]:
        """The router's decision on each prompt."""
        decisions = super().route(prompts)
        if self.tell is not None:
            for prompt, decision in zip(prompts, decisions, strict=True):
                self.tell(prompt, decision)
        return decisions


@dataclass(frozen=True, eq=False)
class Release:
    """One version of the mixture, loaded into memory."""

    name: str
    version: int
    digest: str
    mixture: Mixture
    created: int              # seconds since 1970
    special: dict[int, str]   # the base's special tokens, such as markers of turns, by id

    @property
    def label(self) -> str:
        """Name and version, as responses' X-Moa-Release has them."""
        return f"{self.name}/{self.version}"

    @property
    def adapters(self) -> dict[str, str]:
        """Labels by the names that `moa export` gives their experts."""
        return {adapter_name(label, self.mixture.experts[label]): label for label in self.mixture.labels}

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint` of the release's answers."""
        return f"{self.name}-{self.version}-{self.digest[:12]}"


class AnswerListener:
    """Passes an answer to callbacks while it is generated: first the label that answers, then pieces of text.

    A row that is generated again, because another row of its batch failed, repeats its text: the repetition is dropped.
    """

    def __init__(self, begun: Tell, piece: Tell) -> None:
        self._begun, self._piece = begun, piece
        self._passed_on = -1   # characters that were passed on; -1 = not even the label
        self._generated = 0     # characters of this attempt

    def begun(self, label: str) -> None:
        """Generation of the answer begins, or begins again; `label` names the expert, or "base"."""
        self._generated = 0
        if self._passed_on < 0:
            self._passed_on = 0
            self._begun(label)

    def piece(self, text: str) -> None:
        """The next piece of the answer's text was generated."""
        self._generated += len(text)
        if (new := self._generated - self._passed_on) > 0:
            self._passed_on = self._generated
            self._piece(text[-new:])


@dataclass(frozen=True)
class ReleaseRequest:
    """One conversation to be answered by one release, with valid options and a domain that the release has."""

    release: Release
    messages: Conversation
    domain: str | None   # named by the caller; None = the router decides
    options: GenerationConfig
    prompt_tokens: int
    listener: AnswerListener | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)   # set once the client has left

    @classmethod
    def of(cls, release: Release, messages: Conversation, domain: str | None, options: dict[str, Any],
           prompt_tokens: int, listener: AnswerListener | None = None) -> Self:
        """The request with `options` as fields of GenerationConfig; sampling without a seed gets a random one."""
        chosen = GenerationConfig(**options)
        if chosen.temperature > 0 and chosen.seed is None:   # so that a row that is generated again repeats its text
            chosen = replace(chosen, seed=secrets.randbits(63))
        return cls(release, messages, domain, chosen, prompt_tokens, listener)

    def job(self) -> Job:
        """A job that generates the answer; it may share a batch with any other job of the release."""
        return Job(self.release, self.prompt_tokens + self.options.max_new_tokens, self)

    def routing(self) -> Job:
        """A job for the router's decision alone; it may share a batch with any other job of the release."""
        return Job(self.release, self.prompt_tokens, self)

    def request(self, ended: Callable[[Answer], None]) -> Request:
        """The mixture's request for this conversation; `ended` is called with the complete answer."""
        callbacks = {} if self.listener is None else {"begun": self.listener.begun, "piece": self.listener.piece}
        return Request(messages=self.messages, domain=self.domain, options=self.options,
                       listener=Listener(**callbacks, ended=ended, cancelled=self.cancelled))


def generate_answers(jobs: Sequence[Job]) -> list[Answer]:
    """Generate the answers of one batch, as `work` of a Batcher. Each job gets its result when its row is complete."""
    return jobs[0].work.release.mixture.answer([job.work.request(job.done.set_result) for job in jobs])


def route_requests(jobs: Sequence[Job]) -> list[Decision]:
    """Route the prompts of one batch, as `work` of a Batcher of a server whose backend decodes."""
    return jobs[0].work.release.mixture.route([job.work.messages for job in jobs])


class ReleaseWatcher:
    """Holds the release that serves (`now`) and replaces it when the champion changes."""

    def __init__(self, workspace: Workspace, config: Config, watch: Watch | None = None) -> None:
        """Load the champion. `watch` is called with every decision of every champion's router.

        Raises MoaError when there is no champion or it cannot be loaded.
        """
        self.workspace, self.config, self.watch = workspace, config, watch
        self.registry = Registry(workspace, config)
        self._base: Base | None = None
        version, folder = champion(workspace, config)
        self.now = self._load(version, folder)
        self.failures = 0   # champions that could not be loaded
        self._refused: tuple[int, float] | None = None   # version that could not be loaded, and when
        self._unreachable = False   # whether the last look-up of the champion failed
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, seconds: float) -> None:
        """Look the champion up every `seconds` in a background thread, until `close`."""
        def run() -> None:
            while not self._stop.wait(seconds):
                self.look()

        self._thread = threading.Thread(target=run, name="moa-champion", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread that `follow` started."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)   # a load may take long, and its result is not needed

    def look(self) -> None:
        """Look the champion up and load it if it has changed. After a failure the present release goes on serving."""
        try:
            version = self.registry.champion()
            self._unreachable = False
        except Exception as error:   # of any kind: the thread must go on looking
            if not self._unreachable:   # logged once, not every few seconds
                _log(f"the champion cannot be looked up, {self.now.label} goes on: {error}")
            self._unreachable = True
            return
        if version is None or version.version == self.now.version or self._refused_lately(version.version):
            return
        try:
            self.now = self._load(version, self.registry.download(version.version))
        except Exception as error:   # of any kind: a broken release must not end the server
            self.failures += 1
            self._refused = version.version, time.monotonic()
            detail = error if isinstance(error, MoaError) else f"{type(error).__name__}: {error}"
            _log(f"{version.name}/{version.version} cannot be loaded, {self.now.label} goes on: {detail}")
            return
        _log(f"{self.now.label} serves from now on")

    def _refused_lately(self, version: int) -> bool:
        return (self._refused is not None and self._refused[0] == version
                and time.monotonic() - self._refused[1] < RETRY_SECONDS)

    def _load(self, version: Any, folder: Path) -> Release:
        mixture = ObservedMixture.load(folder, self._own_base(), self.config.execution.resident)
        if self.watch is not None:
            mixture.tell = partial(self.watch, version.version, version.digest)
        return Release(version.name, version.version, version.digest, mixture, version.created_at // 1000,
                       _special(mixture.base.tokenizer))

    def _own_base(self) -> Base:
        """A copy of the base's modules that shares the weights: the previous release may still use another copy."""
        if self._base is None or self._base.pin != pin.pin(self.workspace):
            device = pick_device(self.config.execution.devices)
            self._base = load.load(self.workspace, self._config_now().base, device)
        model = self._base.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return replace(self._base, model=copy.deepcopy(model, shared))

    def _config_now(self) -> Config:
        """The present configuration: params.yaml may name another base than when the server started."""
        from moa.core.config import load

        return load(self.workspace.params)


def prompt_length(release: Release, messages: Conversation, max_new_tokens: int) -> int:
    """Number of tokens of a request's prompt, as the release that serves encodes it.

    Raises UsageError when the base's context leaves no room for the answer.
    """
    mixture = release.mixture
    encoded = mixture.encoder.prompt(messages)
    engine.answer_budgets(mixture.base.model, [encoded], [max_new_tokens])
    return len(encoded)


def special_in(release: Release, text: str) -> str | None:
    """A special token of the base that `text` contains, literally or after normalisation; None without one.

    Such a text would be encoded as a token of the conversation's structure, and could forge a turn.
    """
    if (marker := next((word for word in release.special.values() if word in text), None)) is not None:
        return marker
    tokenizer = release.mixture.base.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]   # normalisation may make a marker of other letters
    unknown = tokenizer.unk_token_id                               # any rare character may become this token
    return next((release.special[number] for number in ids if number in release.special and number != unknown), None)


def _special(tokenizer: Any) -> dict[int, str]:
    """The tokenizer's special tokens by id."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {number: tokenizer.convert_ids_to_tokens(number) for number in tokenizer.all_special_ids}


def _log(line: str) -> None:
    print(f"moa: {line}", file=sys.stderr, flush=True)
