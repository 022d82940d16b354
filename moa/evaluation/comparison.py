"""Two releases compared on the same test rows: what the gate reads, and why a domain got worse.

What a row gets from an expert depends on that row and the expert's weights alone, so where both releases route a row to
an expert of the same digest, its loss and answer are computed once and are equal to the last bit.

A regression is attributed row by row to what differs for that row: another expert answers it (the router is the cause),
or the same expert answers with other weights (the expert is the cause). The cause with the largest share is named.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from moa.base.device import pick_device
from moa.base.load import load
from moa.core.config import Config
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.evaluation.evaluate import read_rows
from moa.evaluation.scoring import (
    Content,
    Pair,
    generate_answers,
    pinned_rows,
    score_answers,
    with_other_questions,
)
from moa.mixture.artifact import EXPERTS

Tested = Mapping[str, Set[str]]   # ids of test rows, by domain
ComparedRow = Mapping[str, Any]   # a row of the result: `incumbent_loss`, `challenger_by` and so on
Parts = Mapping[str, Any]         # of a release: `experts` (digest and corpus by domain) and `prompt`
Key = tuple[int, str, str]        # (index of the row, digest of the expert that answers it, system prompt)


class _Answers:
    """Losses and scores of rows, each computed once for each expert."""

    def __init__(self, workspace: Workspace, config: Config, content: Content, tested: Tested) -> None:
        self.workspace, self.config, self.content = workspace, config, content
        self.losses: dict[Key, float] = {}
        self.tokens: dict[int, int] = {}   # completion tokens by index of the row
        self.scores: dict[Key, float] = {}
        seen: dict[tuple[str, bool], int] = defaultdict(int)
        # Indices of the rows that are answered: the first of each domain, and the first known ones.
        self.scored: set[int] = set()
        for index, (domain, row) in enumerate(content):
            for part in [(domain, False), (domain, True)][:1 + (row.id in tested.get(domain, ()))]:
                if seen[part] < config.release.metric_rows:
                    self.scored.add(index)
                seen[part] += 1

    def key(self, mixture: Any, pair: Pair) -> Key:
        """What a row's loss and answer depend on."""
        return pair[0], mixture.experts[pair[1]], f"{mixture.encoder.system!r}"

    def losses_of(self, mixture: Any, pairs: Sequence[Pair]) -> list[float]:
        missing = [pair for pair in pairs if self.key(mixture, pair) not in self.losses]
        losses = mixture.losses([self.content[index][1].messages for index, _ in missing], [by for _, by in missing])
        for pair, (loss, tokens) in zip(missing, losses, strict=True):
            self.losses[self.key(mixture, pair)], self.tokens[pair[0]] = loss, tokens
        return [self.losses[self.key(mixture, pair)] for pair in pairs]

    def scores_of(self, mixture: Any, pairs: Sequence[Pair]) -> list[float]:
        """Scores of the greedy answers by the metric of each row's domain."""
        missing = [pair for pair in pairs if self.key(mixture, pair) not in self.scores]
        answers = generate_answers(mixture, self.workspace, self.config, self.content, missing)
        for pair, score in score_answers(self.config, self.content, answers).items():
            self.scores[self.key(mixture, pair)] = score
        return [self.scores[self.key(mixture, pair)] for pair in pairs]


def tested(release: Path) -> dict[str, set[str]] | None:
    """Ids of the test rows, by domain, that a downloaded release was evaluated on when it was registered.

    Args:
        release: the release's mixture folder, as `Registry.download` gives it.

    Returns:
        None where the release recorded no rows.
    """
    ids: dict[str, set[str]] = defaultdict(set)
    for row in read_rows(release):
        ids[row["domain"]].add(row["row"])
    return dict(ids) or None


def compare(workspace: Workspace, config: Config, incumbent: Path, challenger: Path) -> dict[str, Any]:
    """Losses and scores of two releases on the same test rows, each row routed as each release would route it.

    Args:
        incumbent: folder of the incumbent's mixture, as `Registry.download` gives it.
        challenger: folder of the challenger's mixture.

    Returns:
        `rows`: for each test row `domain`, `row` (its id), `group` (rows of one depend on each other) and `tokens` (of
        its completion), then under the prefixes `incumbent`, `challenger` and `base` the loss in nats per completion
        token, and the score of the answer for the first `release.metric_rows` rows of each domain. `*_routed` is the
        router's best guess, `*_by` the label that answers. A domain that the challenger lacks has the incumbent's
        figures only. A domain that the incumbent lacks has those of what the incumbent answers today, the base's, and
        two losses of its own expert, whatever the router says: `own_loss`, and `swapped_loss` with the question of
        another row of the domain. `same_expert` marks rows that one expert, by its digest, answers in both releases.
        `same_answer` marks rows of domains whose answered rows go to the same experts in both releases: their answers
        are equal, so they are not generated. `known` tells whether the incumbent was tested on the row; all rows of the
        incumbent's domains are known where the incumbent recorded none.
        `routing`: accuracy and abstention of each release on its own domains. `parts`: what else may make their answers
        differ.
    """
    from moa.mixture.mixture import BASE, Mixture, answering

    base = load(workspace, config.base, pick_device(config.execution.devices))
    before = tested(incumbent) or {}
    content = pinned_rows(workspace, config, sorted(config.domains), before)
    rows: list[dict[str, Any]] = [{"domain": domain, "row": row.id, "group": row.group} for domain, row in content]
    routing: dict[str, dict[str, float]] = {}
    answers = _Answers(workspace, config, content, before)
    pairs_of: dict[str, list[Pair]] = {}
    keys: dict[str, dict[int, Key]] = {}

    def measure(mixture: Mixture, name: str, pairs: Sequence[Pair]) -> None:
        pairs_of[name], keys[name] = list(pairs), {pair[0]: answers.key(mixture, pair) for pair in pairs}
        for (index, _), loss in zip(pairs, answers.losses_of(mixture, pairs), strict=True):
            rows[index][f"{name}_loss"] = loss

    incumbent_domains: list[str] = []
    challenger_domains = read_json(challenger / MANIFEST)["experts"]
    parts: dict[str, dict[str, Any]] = {}
    for name, folder in (("incumbent", incumbent), ("challenger", challenger)):
        mixture, parts[name] = Mixture.load(folder, base, config.execution.resident), _parts(folder)
        indices = [index for index, (domain, _) in enumerate(content)
                   if domain in mixture.labels or domain in challenger_domains]
        decisions = mixture.route([content[index][1].prompt for index in indices])
        measure(mixture, name, [(index, answering(one)) for index, one in zip(indices, decisions, strict=True)])
        for index, one in zip(indices, decisions, strict=True):
            rows[index] |= {f"{name}_routed": one.domain, f"{name}_by": answering(one),
                            f"{name}_abstained": one.abstained}
        mine = [(content[index][0] == one.domain, one.abstained)
                for index, one in zip(indices, decisions, strict=True) if content[index][0] in mixture.labels]
        routing[name] = {"accuracy": sum(right for right, _ in mine) / max(len(mine), 1),
                         "abstention": sum(abstained for _, abstained in mine) / max(len(mine), 1)}
        if name == "incumbent":
            incumbent_domains = mixture.labels
        else:
            new = [index for index in indices if content[index][0] not in incumbent_domains]
            measure(mixture, "base", [(index, BASE) for index in new])
            own = [(index, content[index][0]) for index in new]
            for (index, _), loss in zip(own, answers.losses_of(mixture, own), strict=True):
                rows[index]["own_loss"] = loss
            asked = with_other_questions([content[index] for index in new])
            losses = mixture.losses(list(asked.values()), [content[new[place]][0] for place in asked])
            for place, (loss, _) in zip(asked, losses, strict=True):
                rows[new[place]]["swapped_loss"] = loss
        mixture.unload()
    differ = {content[index][0] for index in answers.scored
              if keys["incumbent"].get(index) != keys["challenger"].get(index)}
    for index in answers.scored:
        if content[index][0] not in differ:
            rows[index]["same_answer"] = True
    for name, folder in (("incumbent", incumbent), ("challenger", challenger)) if differ else ():
        mixture = Mixture.load(folder, base, config.execution.resident)
        for system in (name, "base") if name == "challenger" else (name,):
            pairs = [pair for pair in pairs_of.get(system, ())
                     if pair[0] in answers.scored and content[pair[0]][0] in differ]
            for (index, _), score in zip(pairs, answers.scores_of(mixture, pairs), strict=True):
                rows[index][f"{system}_score"] = score
        mixture.unload()
    for index, (result, (domain, row)) in enumerate(zip(rows, content, strict=True)):
        result["tokens"] = answers.tokens.get(index, 1)
        result["same_expert"] = index in keys["incumbent"] and keys["incumbent"][index] == keys["challenger"].get(index)
        result["known"] = domain in incumbent_domains and row.id in before.get(domain, {row.id})
    return {"rows": rows, "routing": routing, "parts": parts}


def _parts(mixture: Path) -> dict[str, Any]:
    """What may make two releases answer differently, except the router, whose changes show in `*_by` of the rows."""
    manifest = read_json(mixture / MANIFEST)
    return {"prompt": manifest["prompt"],
            "experts": {label: {"digest": expert["digest"],
                                "corpus": read_json(mixture / EXPERTS / label / MANIFEST).get("corpus")}
                        for label, expert in manifest["experts"].items()}}


def attribute_regressions(rows: Sequence[ComparedRow], before: Parts, after: Parts) -> dict[str, str]:
    """Why each domain would have got worse: a clause to follow "because".

    Args:
        rows: of `compare`.
        before, after: parts of the incumbent and of the challenger, as `compare` returns them.

    Returns:
        Clauses by domain, for every domain of which something differs, whether it is worse or not.
    """
    by_domain: dict[str, list[ComparedRow]] = defaultdict(list)
    for row in rows:
        if "challenger_by" in row:
            by_domain[row["domain"]].append(row)
    causes = {domain: _cause(domain, group, before, after) for domain, group in sorted(by_domain.items())}
    return {domain: cause for domain, cause in causes.items() if cause}


def _cause(domain: str, rows: Sequence[ComparedRow], before: Parts, after: Parts) -> str:
    """Empty where nothing differs; the base does not count, because no release changes it."""
    new = domain not in before["experts"]
    # Rows by the label whose expert changed; None for those that the router moved.
    groups: dict[str | None, list[ComparedRow]] = defaultdict(list)
    for row in rows:
        label = row["challenger_by"]
        if label != (domain if new else row["incumbent_by"]):
            groups[None].append(row)
        elif _digest(before, label) != _digest(after, label):
            groups[label].append(row)
    if groups:
        worst = max(groups, key=lambda label: (_harm(groups[label]), len(groups[label]), label is None))
        return (_routed(rows, groups[worst]) if worst is None else
                _changed(worst, domain, f"{len(groups[worst])} of {len(rows)}", before, after))
    return "the prompt changed" if before["prompt"] != after["prompt"] else ""


def _harm(rows: Sequence[ComparedRow]) -> tuple[float, float]:
    """Total rise of the losses, then total fall of the scores; a loss of NaN is the worst."""
    rises = [row["challenger_loss"] - other for row in rows if (other := _other(row, "loss")) is not None]
    falls = [other - row["challenger_score"] for row in rows
             if "challenger_score" in row and (other := _other(row, "score")) is not None]
    return (math.inf if any(math.isnan(rise) for rise in rises) else sum(rises)), sum(falls)


def _other(row: ComparedRow, what: str) -> float | None:
    """The incumbent's figure, or the base's for a domain that the incumbent lacks."""
    value = row.get(f"incumbent_{what}", row.get(f"base_{what}"))
    return None if value is None else float(value)


def _routed(rows: Sequence[ComparedRow], moved: Sequence[ComparedRow]) -> str:
    now = Counter(row["challenger_by"] for row in moved)
    return f"the router gives {len(moved)} of its {len(rows)} rows to {' and '.join(sorted(now))} now"


def _changed(label: str, domain: str, share: str, before: Parts, after: Parts) -> str:
    whose = "its expert" if label == domain else f"the expert of {label}, which answers {share} of its rows,"
    old, new = before["experts"].get(label), after["experts"][label]
    if old is None:
        return f"{whose} is new"
    said = f"{whose} changed from {old['digest'][:12]} to {new['digest'][:12]}"
    if old.get("corpus") == new.get("corpus"):
        return said
    # An expert under a wrong name gives itself away by what it learned from.
    strangers = sorted({name for parts in (before, after) for name, each in parts["experts"].items()
                        if name != label and each.get("corpus") == new.get("corpus") is not None})
    return f"{said} and learned from {'the corpus of ' + strangers[0] if strangers else 'another corpus'}"


def _digest(parts: Parts, label: str) -> str | None:
    expert = parts["experts"].get(label)
    return expert["digest"] if expert else None
