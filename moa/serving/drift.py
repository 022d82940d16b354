"""The drift report of logged prompts: whether they still resemble the rows that the champion was calibrated on, and
which of them may belong to a domain that it lacks.

    .moa/cache/drift/    what the champion's router says of its own validation rows, computed once a release
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
from moa.core.text import shorten
from moa.data import corpus
from moa.serving import drift_statistics, prompt_log
from moa.serving.drift_statistics import RoutedPrompt
from moa.serving.prompt_log import LoggedPrompt

WINDOW = 1_000            # newest prompts that are compared with validation
VALIDATION_ROWS = 4_000   # of all domains together that the comparison is made with
WIDTH_ROWS = 100          # of each domain that say how far apart its prompts are
ABSTAINED = 20_000        # newest abstained prompts that are considered
SAMPLE = 1_000            # of these that are grouped, drawn with a fixed seed: memory grows with the square
PSI_LIMIT = 0.25          # population stability index from which a shift is reported
FOUND = 3                 # exit code of `moa drift` for a shift or a missing domain
SHOWN = 200               # characters of an example
NEAREST = 3               # experts named for a group


def check(workspace: Workspace, config: Config) -> dict[str, Any]:
    """The drift report.

    Returns:
        `measures` with verdict, numbers and a sentence each, `verdict` over all of them, and in `missing` the groups of
        prompts that may be a domain of their own.

    Raises:
        RegistryError: there is no champion.
        ArtifactError: there are no validation rows to compare with.
    """
    from moa.release.champion import champion, open_mixture

    version, folder = champion(workspace, config)
    served, abstained, counts = _gather(workspace, version)

    @cache
    def mixture() -> Any:   # the base takes seconds to load: only where it is needed
        return open_mixture(folder, workspace)

    least = config.drift.min_prompts
    reference = (_reference(workspace, folder, version.digest, mixture)
                 if len(served) >= least or len(abstained) >= config.drift.cluster else None)
    known = [RoutedPrompt(**row) for row in reference["rows"]] if reference else []
    measures = drift_statistics.measures([_seen(each) for each in served], known, window=WINDOW, least=least,
                                         psi_limit=PSI_LIMIT)
    missing = (_missing(mixture, abstained, reference["width"], config.drift.cluster)
               if reference and len(abstained) >= config.drift.cluster else _nothing(len(abstained)))
    return {"release": version.version, "name": version.name, "digest": version.digest,
            "verdict": drift_statistics.overall(measures), "prompts": counts,
            "validation": {"rows": len(known), "changed": reference["changed"] if reference else []},
            "measures": [measure.as_dict() for measure in measures], **missing}


def alarming(report: dict[str, Any]) -> bool:
    """Whether the report needs attention: prompts shifted, or a domain may be missing."""
    return report["verdict"] == "shifted" or bool(report["missing"])


# Logged prompts.

def _gather(workspace: Workspace, version: Any) -> tuple[list[LoggedPrompt], list[LoggedPrompt], dict[str, Any]]:
    """The champion's newest prompts; the prompts that any release abstained on, each text once; and counts.

    A prompt whose domain the caller named tells nothing about the router, so it is only counted.
    """
    served: deque[LoggedPrompt] = deque(maxlen=2 * WINDOW)
    abstained: deque[LoggedPrompt] = deque(maxlen=ABSTAINED)
    counts = {"kept": 0, "of_champion": 0, "forced": 0}
    for kept in prompt_log.read(workspace):
        counts["kept"] += 1
        if kept.forced or kept.score is None or kept.confidence is None:
            counts["forced"] += 1
            continue
        if (kept.release, kept.digest) == (version.version, version.digest):
            counts["of_champion"] += 1
            served.append(kept)
        if kept.abstained:
            abstained.append(kept)
    ordered = sorted(served, key=lambda kept: kept.at)   # two servers may write at once
    span = {"from": _time(ordered[0].at), "to": _time(ordered[-1].at)} if ordered else {"from": None, "to": None}
    return ordered, list({kept.text: kept for kept in abstained}.values()), {
        **counts, "compared": min(len(ordered), WINDOW), **span}


def _seen(kept: LoggedPrompt) -> RoutedPrompt:
    assert kept.score is not None and kept.confidence is not None
    return RoutedPrompt(domain=kept.domain, score=kept.score, confidence=kept.confidence, abstained=kept.abstained)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


# Validation rows.

def _reference(workspace: Workspace, folder: Path, digest: str, mixture: Callable[[], Any]) -> dict[str, Any]:
    """`rows`, the champion's decisions on its validation rows; `width`, how far apart prompts of one domain may be;
    `changed`, the domains whose rows are no longer those that the champion learned from.

    The result is cached by the release's digest, so later changes of the corpora do not change it.
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
    found = {"rows": [asdict(RoutedPrompt(domain=one.domain, score=one.score, confidence=one.confidence,
                                          abstained=one.abstained)) for one in mixture().route(mixed)],
             "width": drift_statistics.widest(drift_statistics.unit(_standard(mixture(), part[:WIDTH_ROWS]))
                                              for part in prompts.values() if part),
             "changed": [domain for domain in manifest["labels"]
                         if _corpus(workspace, domain) != manifest["experts"][domain].get("corpus")]}
    write_json(path, found)
    return found


def _validation(workspace: Workspace, domain: str, domains: int) -> list[list[Message]]:
    """Prompts of a domain's validation rows, in the order of their digests, so that the limit favours none."""
    if _corpus(workspace, domain) is None:
        return []
    limit = max(VALIDATION_ROWS // domains, 1)
    return [row.prompt for row in corpus.read(workspace.corpus(domain), "validation")[:limit]]


def _corpus(workspace: Workspace, domain: str) -> str | None:
    path = workspace.corpus(domain) / MANIFEST
    return read_json(path)["digest"] if path.is_file() else None


def _features(mixture: Any, prompts: Sequence[list[Message]]) -> Any:
    """The router's features of N prompts: (N, L, D)."""
    from moa.mixture.layer_routing import layer_selector
    from moa.mixture.router import features

    encoder, router = mixture.encoder, mixture.router
    ids = [encoder.prompt(prompt)[-encoder.max_tokens:] for prompt in prompts]
    return features(mixture.base.model, ids, router.depth, layer_selector(mixture.stack, router))


def _standard(mixture: Any, prompts: Sequence[list[Message]]) -> Any:
    return mixture.router.standard(_features(mixture, prompts), mixture.router.reads).numpy()


# Missing domains.

def _nothing(distinct: int) -> dict[str, Any]:
    return {"abstained": {"distinct": distinct, "looked_at": 0, "still": 0}, "missing": []}


def _missing(mixture: Callable[[], Any], abstained: list[LoggedPrompt], width: float | None,
             least: int) -> dict[str, Any]:
    """Groups of at least `least` different prompts that the champion leaves to the base.

    They are routed again, because the champion may have learned what an earlier release abstained on.
    """
    if width is None:
        return _nothing(len(abstained))
    looked = (abstained if len(abstained) <= SAMPLE
              else random.Random(0).sample(abstained, SAMPLE))   # noqa: S311  (a sample, no secret)
    decisions = mixture().route([kept.messages for kept in looked])
    still = [kept for kept, decision in zip(looked, decisions, strict=True) if decision.abstained]
    found: list[dict[str, Any]] = []
    if len(still) >= least:
        router, seen = mixture().router, _features(mixture(), [kept.messages for kept in still])
        unit = drift_statistics.unit(router.standard(seen, router.reads).numpy())
        chances = router.probabilities(seen).numpy()
        for group in drift_statistics.groups(unit, width, least):
            mean = dict(zip(router.labels, chances[group].mean(0).tolist(), strict=True))
            nearest = sorted(mean, key=lambda label: (-mean[label], label))[:NEAREST]
            found.append({"prompts": len(group),
                          "nearest": [{"domain": label, "probability": mean[label]} for label in nearest],
                          "examples": [shorten(still[place].text, SHOWN)
                                       for place in drift_statistics.typical(unit, group)],
                          "from": _time(min(still[place].at for place in group)),
                          "to": _time(max(still[place].at for place in group))})
    return {"abstained": {"distinct": len(abstained), "looked_at": len(looked), "still": len(still)}, "missing": found}


# Text.

def headline(report: dict[str, Any]) -> str:
    """The verdict in one line."""
    return (f"{report['name']} version {report['release']}: {report['verdict']}"
            + ("; a domain may be missing" if report["missing"] else ""))


def sentence(group: dict[str, Any]) -> str:
    """A group of `missing` as one line."""
    nearest = ", ".join(f"{one['domain']} ({one['probability']:.2f})" for one in group["nearest"])
    return f"a domain may be missing: {group['prompts']} prompts, nearest experts {nearest}"


NEWS = ("release", "verdict", "shifted", "missing")   # of `facts`: a change of any of them is reported


def facts(report: dict[str, Any]) -> dict[str, Any]:
    """The report for the event log or an event; `missing` holds the nearest expert of each group of prompts."""
    shifted = [one for one in report["measures"] if one["verdict"] == "shifted"]
    return {"release": report["release"], "verdict": report["verdict"], "prompts": report["prompts"]["compared"],
            "shifted": [one["name"] for one in shifted],
            "missing": [group["nearest"][0]["domain"] for group in report["missing"]],
            "reason": "; ".join([*(one["reason"] for one in shifted), *map(sentence, report["missing"])])}


def drift_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    prompts, abstained = report["prompts"], report["abstained"]
    lines = [headline(report),
             f"{prompts['of_champion']} prompts routed"
             + (f", {prompts['from']} to {prompts['to']}" if prompts["from"] else "")
             + f"; the newest {prompts['compared']} against {report['validation']['rows']} validation rows"
             + (f"; {prompts['forced']} left out, whose domain the caller named" if prompts["forced"] else "")]
    if changed := report["validation"]["changed"]:
        lines.append(f"the rows of {', '.join(changed)} changed since: their validation rows are those of now")
    width = max(len(one["verdict"]) for one in report["measures"])
    lines += ["", *(f"  {one['verdict']:<{width}}  {one['reason']}" for one in report["measures"]), "",
              f"{abstained['distinct']} different prompts were left to the base"
              + (f", {abstained['still']} of {abstained['looked_at']} looked at would be today"
                 if abstained["looked_at"] else "")]
    for group in report["missing"]:
        lines += [sentence(group), *(f"    {example}" for example in group["examples"])]
    return "\n".join(lines)


def drift_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, for Prefect's pages."""
    found = [f"# {headline(report)}", "",
             f"{report['prompts']['compared']} prompts against {report['validation']['rows']} validation rows.", "",
             "| measure | verdict | |", "|---|---|---|",
             *(f"| {one['name']} | {one['verdict']} | {one['reason']} |" for one in report["measures"])]
    for group in report["missing"]:
        found += ["", f"## {sentence(group).capitalize()}", "", *_quoted(group["examples"])]
    return "\n".join(found)


def _quoted(examples: Iterable[str]) -> list[str]:
    """Prompts as code blocks: they are untrusted text, and in code neither links nor HTML take effect."""
    return ["    " + example for example in examples]
