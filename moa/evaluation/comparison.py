"""Two releases at work on the same test rows: what the gate reads. Knows nothing of verdicts, nor of who is champion.

What a row gets from an expert depends on that row and the expert's weights alone, so where both releases give a row to
an expert of the same digest, it is computed once, and the two are equal to the last bit.

Why a domain got worse is told from the same rows: each row's rise of loss is attributed to what differs for that row.
Another expert answers it now (the router), or the same expert answers with other weights (that expert). The largest
share names the cause.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from moa.base.load import load, pick_device
from moa.core.config import Config
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.data.corpus import Row, read
from moa.evaluation import metrics
from moa.evaluation.evaluate import answer_limit
from moa.mixture.artifact import EXPERTS

Content = Sequence[tuple[str, Row]]   # (domain, test row)
Tested = Mapping[str, Set[str]]       # ids of the test rows of a domain
Asked = Sequence[tuple[int, str]]     # (index of the row, who answers it)
ComparedRow = Mapping[str, Any]   # a row of the result: `incumbent_loss`, `challenger_by` and so on
Parts = Mapping[str, Any]         # of a release: `experts` (digest and corpus by domain) and `prompt`
Key = tuple[int, str, str]            # (index of the row, digest of who answers it, encoding)


class _Answers:
    """Losses and scores of rows, each computed once for every expert that was asked."""

    def __init__(self, workspace: Workspace, config: Config, content: Content, tested: Tested) -> None:
        self.workspace, self.config, self.content = workspace, config, content
        self.losses: dict[Key, float] = {}
        self.scores: dict[Key, float] = {}
        seen: dict[tuple[str, bool], int] = defaultdict(int)
        self.scored: set[int] = set()   # rows that are answered: the first of each domain, and of those once tested
        for index, (domain, row) in enumerate(content):
            for part in [(domain, False), (domain, True)][:1 + (row.id in tested.get(domain, ()))]:
                if seen[part] < config.release.metric_rows:
                    self.scored.add(index)
                seen[part] += 1

    def key(self, mixture: Any, pair: tuple[int, str]) -> Key:
        """What a row's loss and answer depend on."""
        return pair[0], mixture.experts[pair[1]], f"{mixture.encoder.system!r}"

    def losses_of(self, mixture: Any, asked: Asked) -> list[float]:
        missing = [pair for pair in asked if self.key(mixture, pair) not in self.losses]
        losses = mixture.losses([self.content[index][1].messages for index, _ in missing], [by for _, by in missing])
        self.losses.update((self.key(mixture, pair), loss) for pair, (loss, _) in zip(missing, losses, strict=True))
        return [self.losses[self.key(mixture, pair)] for pair in asked]

    def scores_of(self, mixture: Any, asked: Asked) -> list[float]:
        by_domain: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for pair in asked:
            if self.key(mixture, pair) not in self.scores:
                by_domain[self.content[pair[0]][0]].append(pair)
        for domain, pairs in by_domain.items():
            for pair, score in zip(pairs, self._score(mixture, domain, pairs), strict=True):
                self.scores[self.key(mixture, pair)] = score
        return [self.scores[self.key(mixture, pair)] for pair in asked]

    def _score(self, mixture: Any, domain: str, pairs: Asked) -> list[float]:
        """The domain's own metric of greedy answers, as long as `moa evaluate` lets them be."""
        params, judge = self.config.evaluate, metrics.resolve(self.config.domains[domain].metric)
        limit = answer_limit(self.workspace, self.config, domain)
        found = []
        for start in range(0, len(pairs), params.batch_rows):
            batch = pairs[start:start + params.batch_rows]
            rows = [self.content[index][1] for index, _ in batch]
            answers = mixture.generate([row.prompt for row in rows], [by for _, by in batch], max_new_tokens=limit)
            found += [judge(one.answer, row.reference, row.question) for one, row in zip(answers, rows, strict=True)]
        return found


def tested(release: Path) -> dict[str, set[str]] | None:
    """Ids of the test rows, by domain, that a downloaded release was evaluated on when it was registered; None where it
    does not say."""
    import pyarrow.parquet as pq

    path = release.parent / "reports" / "rows.parquet"
    if not path.is_file():
        return None
    found: dict[str, set[str]] = defaultdict(set)
    for row in pq.read_table(path, columns=["domain", "row"]).to_pylist():
        found[row["domain"]].add(row["row"])
    return dict(found)


def _rows(workspace: Workspace, config: Config, before: Tested) -> list[tuple[str, Row]]:
    """The pinned test rows, and those tested before that new rows pushed beyond `evaluate.rows`."""
    limit = config.evaluate.rows
    return [(domain, row) for domain in sorted(config.domains)
            for place, row in enumerate(read(workspace.corpus(domain), "test"))
            if limit is None or place < limit or row.id in before.get(domain, ())]


def compare(workspace: Workspace, config: Config, incumbent: Path, challenger: Path) -> dict[str, Any]:
    """Loss of every test row under two releases, routed as each would route it, in nats per completion token; of the
    first `release.metric_rows` of each domain also the score of what they answer. Where the same experts answer all of
    these in both, the answers are the same (`same_answer`), and nobody has to write them.

    A domain that only one of them knows counts for that one, and one that the incumbent does not know is answered by
    the base too. `known` is whether the incumbent's release was tested on the row: of a release that does not say on
    which, all rows of its domains are. `incumbent` and `challenger` are folders as `Registry.download` gives them.
    """
    from moa.mixture.mixture import BASE, Mixture, answering

    base = load(workspace, config.base, pick_device(config.execution.devices))
    before = tested(incumbent) or {}
    content = _rows(workspace, config, before)
    rows: list[dict[str, Any]] = [{"domain": domain, "row": row.id} for domain, row in content]
    routing: dict[str, dict[str, float]] = {}
    answers = _Answers(workspace, config, content, before)
    asked: dict[str, list[tuple[int, str]]] = {}
    keys: dict[str, dict[int, Key]] = {}

    def ask(mixture: Mixture, name: str, pairs: Asked) -> None:
        asked[name], keys[name] = list(pairs), {pair[0]: answers.key(mixture, pair) for pair in pairs}
        for (index, _), loss in zip(pairs, answers.losses_of(mixture, pairs), strict=True):
            rows[index][f"{name}_loss"] = loss

    incumbents: list[str] = []
    parts: dict[str, dict[str, Any]] = {}
    for name, folder in (("incumbent", incumbent), ("challenger", challenger)):
        mixture, parts[name] = Mixture.load(folder, base, config.execution.resident), _parts(folder)
        its = [index for index, (domain, _) in enumerate(content) if domain in mixture.labels]
        decisions = mixture.route([content[index][1].prompt for index in its])
        ask(mixture, name, [(index, answering(one)) for index, one in zip(its, decisions, strict=True)])
        for index, one in zip(its, decisions, strict=True):
            rows[index] |= {f"{name}_routed": one.domain, f"{name}_by": answering(one)}
        right = [content[index][0] == one.domain for index, one in zip(its, decisions, strict=True)]
        routing[name] = {"accuracy": sum(right) / max(len(right), 1),
                         "abstention": sum(one.abstained for one in decisions) / max(len(right), 1)}
        if name == "incumbent":
            incumbents = mixture.labels
        else:
            ask(mixture, "base", [(index, BASE) for index in its if content[index][0] not in incumbents])
        mixture.unload()
    differ = {content[index][0] for index in answers.scored
              if keys["incumbent"].get(index) != keys["challenger"].get(index)}
    for index in answers.scored:
        if content[index][0] not in differ:
            rows[index]["same_answer"] = True
    for name, folder in (("incumbent", incumbent), ("challenger", challenger)) if differ else ():
        mixture = Mixture.load(folder, base, config.execution.resident)
        for who in (name, "base") if name == "challenger" else (name,):
            pairs = [pair for pair in asked.get(who, ()) if pair[0] in answers.scored and content[pair[0]][0] in differ]
            for (index, _), score in zip(pairs, answers.scores_of(mixture, pairs), strict=True):
                rows[index][f"{who}_score"] = score
        mixture.unload()
    for made, (domain, row) in zip(rows, content, strict=True):
        made["known"] = domain in incumbents and row.id in before.get(domain, {row.id})
    return {"rows": rows, "routing": routing, "parts": parts}


def _parts(mixture: Path) -> dict[str, Any]:
    """What may make two releases answer differently, but for the router: that shows in who answers."""
    manifest = read_json(mixture / MANIFEST)
    return {"prompt": manifest["prompt"],
            "experts": {label: {"digest": expert["digest"],
                                "corpus": read_json(mixture / EXPERTS / label / MANIFEST).get("corpus")}
                        for label, expert in manifest["experts"].items()}}


def attribute_regressions(rows: Sequence[ComparedRow], before: Parts, after: Parts) -> dict[str, str]:
    """A clause, to follow "because", for every domain of which something differs, whether it is worse or not."""
    by_domain: dict[str, list[ComparedRow]] = defaultdict(list)
    for row in rows:
        if "challenger_by" in row:
            by_domain[row["domain"]].append(row)
    found = {domain: _cause(domain, its, before, after) for domain, its in sorted(by_domain.items())}
    return {domain: said for domain, said in found.items() if said}


def _cause(domain: str, rows: Sequence[ComparedRow], before: Parts, after: Parts) -> str:
    """Empty where nothing differs but perhaps the base, which no release changes."""
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
    """How much loss rose in all, then how much the scores fell; a loss that is no number is the worst."""
    rises = [row["challenger_loss"] - other for row in rows if (other := _other(row, "loss")) is not None]
    falls = [other - row["challenger_score"] for row in rows
             if "challenger_score" in row and (other := _other(row, "score")) is not None]
    return (math.inf if any(math.isnan(rise) for rise in rises) else sum(rises)), sum(falls)


def _other(row: ComparedRow, what: str) -> float | None:
    """Of a domain that the incumbent lacks, the base's."""
    found = row.get(f"incumbent_{what}", row.get(f"base_{what}"))
    return None if found is None else float(found)


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
