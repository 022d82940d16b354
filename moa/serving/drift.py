"""The drift report of logged prompts: whether they still resemble the champion's validation rows, and which of them may
belong to a domain that the champion lacks.

    .moa/cache/drift/    the decisions of a champion's router on its validation rows, computed once for each release
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from moa.base.encoding import Message
from moa.core import code_version, digests
from moa.core.config import Config
from moa.core.errors import ArtifactError
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.text import indented_table, shorten
from moa.data import corpus
from moa.serving import drift_statistics, prompt_log
from moa.serving.drift_statistics import RoutedPrompt
from moa.serving.prompt_log import LoggedPrompt

WINDOW = 1_000            # newest prompts that are compared with validation
VALIDATION_ROWS = 4_000   # validation rows of all domains together that prompts are compared with
WIDTH_ROWS = 100          # validation rows of each domain from which the width of domains is measured
ABSTAINED = 20_000        # newest abstained prompts that are considered
SAMPLE = 1_000            # of these, the prompts that are grouped, drawn with a fixed seed: memory grows quadratically
PSI_LIMIT = 0.25          # population stability index from which a shift is reported
FOUND = 3                 # exit code of `moa drift` for a shift or a missing domain
SHOWN = 200               # characters of an example
NEAREST = 3               # experts named for a group


def check(workspace: Workspace, config: Config) -> dict[str, Any]:
    """Compare the logged prompts with the champion's validation rows: the drift report, as JSON values.

    Returns:
        `measures`, each with a verdict, numbers and a sentence; `verdict`, over all measures; `missing`, the groups of
        prompts that may be a domain of their own; `prompts`, `validation` and `abstained`, counts of what was compared.

    Raises:
        RegistryError: there is no champion.
        ArtifactError: there are no validation rows to compare with.
    """
    from moa.release.champion import champion, open_mixture

    version, folder = champion(workspace, config)
    served, abstained, counts = _gather(workspace, version)

    @cache
    def mixture() -> Any:   # loading takes seconds, and a report on few prompts does not need it
        return open_mixture(folder, workspace)

    least = config.drift.min_prompts
    reference = (_reference(workspace, folder, version.digest, mixture)
                 if len(served) >= least or len(abstained) >= config.drift.cluster else None)
    known = [RoutedPrompt(**row) for row in reference["rows"]] if reference else []
    measures = drift_statistics.measures([_routed(prompt) for prompt in served], known, window=WINDOW, least=least,
                                         psi_limit=PSI_LIMIT)
    missing = (_missing_domains(mixture, abstained, reference["width"], config.drift.cluster)
               if reference and len(abstained) >= config.drift.cluster else _none_missing(len(abstained)))
    return {"release": version.version, "name": version.name, "digest": version.digest,
            "verdict": drift_statistics.overall(measures), "prompts": counts,
            "validation": {"rows": len(known), "changed": reference["changed"] if reference else []},
            "measures": [measure.as_dict() for measure in measures], **missing}


def alarming(report: dict[str, Any]) -> bool:
    """Whether the report needs attention: prompts shifted, or a domain may be missing."""
    return report["verdict"] == "shifted" or bool(report["missing"])


# Logged prompts.

def _gather(workspace: Workspace, version: Any) -> tuple[list[LoggedPrompt], list[LoggedPrompt], dict[str, Any]]:
    """Read the log: the champion's newest prompts, the distinct prompts that any release abstained on, and counts.

    A prompt whose domain the caller named has no decision of the router, so it is only counted.
    """
    served: deque[LoggedPrompt] = deque(maxlen=2 * WINDOW)
    abstained: deque[LoggedPrompt] = deque(maxlen=ABSTAINED)
    counts = {"kept": 0, "of_champion": 0, "forced": 0}
    for prompt in prompt_log.read(workspace):
        counts["kept"] += 1
        if prompt.forced or prompt.score is None or prompt.confidence is None:
            counts["forced"] += 1
            continue
        if (prompt.release, prompt.digest) == (version.version, version.digest):
            counts["of_champion"] += 1
            served.append(prompt)
        if prompt.abstained:
            abstained.append(prompt)
    ordered = sorted(served, key=lambda prompt: prompt.at)   # several servers may have written the log
    span = {"from": _time(ordered[0].at), "to": _time(ordered[-1].at)} if ordered else {"from": None, "to": None}
    return ordered, list({prompt.text: prompt for prompt in abstained}.values()), {
        **counts, "compared": min(len(ordered), WINDOW), **span}


def _routed(prompt: LoggedPrompt) -> RoutedPrompt:
    """The decision of a logged prompt whose domain the router chose."""
    assert prompt.score is not None and prompt.confidence is not None
    return RoutedPrompt(domain=prompt.domain, score=prompt.score, confidence=prompt.confidence,
                        abstained=prompt.abstained)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


# Validation rows.

def _reference(workspace: Workspace, folder: Path, digest: str, mixture: Callable[[], Any]) -> dict[str, Any]:
    """The validation rows that prompts are compared with.

    The result is cached by the release's digest, so later changes of the corpora do not change it.

    Returns:
        `rows`: the champion's decisions on its validation rows; `width`: how far apart prompts of one domain may be
        (`drift_statistics.widest`); `changed`: the domains whose corpora differ from those that the champion learned
        from.

    Raises ArtifactError when no domain of the champion has a prepared corpus.
    """
    code = code_version.of_modules("moa.mixture.router", "moa.serving.drift",
                                   "moa.serving.drift_statistics")
    path = workspace.cache / "drift" / f"{digests.of_json([digest, code])[:32]}.json"
    if path.is_file():
        return read_json(path)
    manifest = read_json(folder / MANIFEST)
    prompts = {domain: _validation(workspace, domain, len(manifest["labels"])) for domain in manifest["labels"]}
    if not any(prompts.values()):
        raise ArtifactError("None of the champion's domains has a prepared corpus here, so there is nothing to compare "
                            "prompts with: run `moa run`.")
    mixed = [prompt for part in prompts.values() for prompt in part]
    reference = {
        "rows": [asdict(RoutedPrompt(domain=decision.domain, score=decision.score, confidence=decision.confidence,
                                     abstained=decision.abstained)) for decision in mixture().route(mixed)],
        "width": drift_statistics.widest(drift_statistics.unit(_directions(mixture(), part[:WIDTH_ROWS]))
                                         for part in prompts.values() if part),
        "changed": [domain for domain in manifest["labels"]
                    if _corpus(workspace, domain) != manifest["experts"][domain].get("corpus")]}
    write_json(path, reference)
    return reference


def _validation(workspace: Workspace, domain: str, domains: int) -> list[list[Message]]:
    """Prompts of a domain's first validation rows. The rows are ordered by digest, so the limit selects at random."""
    if _corpus(workspace, domain) is None:
        return []
    limit = max(VALIDATION_ROWS // domains, 1)
    return [row.prompt for row in corpus.read(workspace.corpus(domain), "validation")[:limit]]


def _corpus(workspace: Workspace, domain: str) -> str | None:
    """The digest of the domain's corpus; None where it is not prepared."""
    path = workspace.corpus(domain) / MANIFEST
    return read_json(path)["digest"] if path.is_file() else None


def _features(mixture: Any, prompts: Sequence[list[Message]]) -> Any:
    """The router's features of N prompts at L levels, of width D: (N, L, D)."""
    from moa.mixture.layer_routing import layer_selector
    from moa.mixture.router import features

    encoder, router = mixture.encoder, mixture.router
    ids = [encoder.prompt(prompt)[-encoder.max_tokens:] for prompt in prompts]
    return features(mixture.base.model, ids, router.depth, layer_selector(mixture.stack, router))


def _directions(mixture: Any, prompts: Sequence[list[Message]]) -> Any:
    """What the router compares N prompts by: vectors of length one, (N, D)."""
    router = mixture.router
    return router.directions(_features(mixture, prompts)[:, router.reads]).numpy()


# Missing domains.

def _none_missing(distinct: int) -> dict[str, Any]:
    return {"abstained": {"distinct": distinct, "looked_at": 0, "still": 0}, "missing": []}


def _missing_domains(mixture: Callable[[], Any], abstained: list[LoggedPrompt], width: float | None,
                     least: int) -> dict[str, Any]:
    """Find groups of at least `least` different prompts on which the champion abstains.

    The prompts are routed again, because the champion may have learned what an earlier release abstained on.
    """
    if width is None:
        return _none_missing(len(abstained))
    sample = (abstained if len(abstained) <= SAMPLE
              else random.Random(0).sample(abstained, SAMPLE))   # noqa: S311  (a sample, no secret)
    decisions = mixture().route([prompt.messages for prompt in sample])
    abstained_again = [prompt for prompt, decision in zip(sample, decisions, strict=True) if decision.abstained]
    missing: list[dict[str, Any]] = []
    if len(abstained_again) >= least:
        router, features_NLD = mixture().router, _features(mixture(), [prompt.messages for prompt in abstained_again])
        unit_ND = router.directions(features_NLD[:, router.reads]).numpy()
        probabilities = router.probabilities(features_NLD).numpy()
        for group in drift_statistics.groups(unit_ND, width, least):
            mean = dict(zip(router.labels, probabilities[group].mean(0).tolist(), strict=True))
            nearest = sorted(mean, key=lambda label: (-mean[label], label))[:NEAREST]
            missing.append({"prompts": len(group),
                          "nearest": [{"domain": label, "probability": mean[label]} for label in nearest],
                          "examples": [shorten(abstained_again[index].text, SHOWN)
                                       for index in drift_statistics.typical(unit_ND, group)],
                          "from": _time(min(abstained_again[index].at for index in group)),
                          "to": _time(max(abstained_again[index].at for index in group))})
    return {"abstained": {"distinct": len(abstained), "looked_at": len(sample), "still": len(abstained_again)},
            "missing": missing}


# Text.

def headline(report: dict[str, Any]) -> str:
    """The report's verdict in one line."""
    return (f"{report['name']} version {report['release']}: {report['verdict']}"
            + ("; a domain may be missing" if report["missing"] else ""))


def sentence(group: dict[str, Any]) -> str:
    """A group of the report's `missing` in one line."""
    nearest = ", ".join(f"{expert['domain']} ({expert['probability']:.2f})" for expert in group["nearest"])
    return f"a domain may be missing: {group['prompts']} prompts, nearest experts {nearest}"


NEWS = ("release", "verdict", "shifted", "missing")   # keys of `facts` whose change is reported


def facts(report: dict[str, Any]) -> dict[str, Any]:
    """The report's facts for the event log and Prefect's events; `missing` names the nearest expert of each group."""
    shifted = [measure for measure in report["measures"] if measure["verdict"] == "shifted"]
    return {"release": report["release"], "verdict": report["verdict"], "prompts": report["prompts"]["compared"],
            "shifted": [measure["name"] for measure in shifted],
            "missing": [group["nearest"][0]["domain"] for group in report["missing"]],
            "reason": "; ".join([*(measure["reason"] for measure in shifted), *map(sentence, report["missing"])])}


def drift_text(report: dict[str, Any]) -> str:
    """The drift report as text for a terminal."""
    prompts, abstained = report["prompts"], report["abstained"]
    lines = [headline(report),
             f"{prompts['of_champion']} prompts routed"
             + (f", {prompts['from']} to {prompts['to']}" if prompts["from"] else "")
             + f"; the newest {prompts['compared']} against {report['validation']['rows']} validation rows"
             + (f"; {prompts['forced']} left out, whose domain the caller named" if prompts["forced"] else "")]
    if changed := report["validation"]["changed"]:
        lines.append(f"the rows of {', '.join(changed)} changed since: their validation rows are those of now")
    lines += ["", indented_table([(measure["verdict"], measure["reason"]) for measure in report["measures"]]), "",
              f"{abstained['distinct']} different prompts were left to the base"
              + (f", {abstained['still']} of {abstained['looked_at']} looked at would be today"
                 if abstained["looked_at"] else "")]
    for group in report["missing"]:
        lines += [sentence(group), *(f"    {example}" for example in group["examples"])]
    return "\n".join(lines)


def drift_markdown(report: dict[str, Any]) -> str:
    """The drift report as Markdown, for Prefect's pages."""
    lines = [f"# {headline(report)}", "",
             f"{report['prompts']['compared']} prompts against {report['validation']['rows']} validation rows.", "",
             "| measure | verdict | |", "|---|---|---|",
             *(f"| {measure['name']} | {measure['verdict']} | {measure['reason']} |" for measure in report["measures"])]
    for group in report["missing"]:
        lines += ["", f"## {sentence(group).capitalize()}", "", *_quoted(group["examples"])]
    return "\n".join(lines)


def _quoted(examples: Iterable[str]) -> list[str]:
    """Prompts as code blocks: they are untrusted text, and in code neither links nor HTML take effect."""
    return ["    " + example for example in examples]
