"""Two releases at work on the same test rows: what the gate reads. Knows nothing of verdicts, nor of who is champion.

What a row gets from an expert depends on that row and the expert's weights alone, so where both releases give a row to
an expert of the same digest, it is computed once, and the two are equal to the last bit.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from moa import metrics
from moa.base import load, pick_device
from moa.config import Config
from moa.evaluate import SPARE_TOKENS, test_rows
from moa.registry import Registry
from moa.rows import Row
from moa.workspace import MANIFEST, Workspace, read_json

Content = Sequence[tuple[str, Row]]   # (domain, test row)
Asked = Sequence[tuple[int, str]]     # (index of the row, who answers it)
Key = tuple[int, str, str]            # (index of the row, digest of who answers it, encoding)


class _Answers:
    """Losses and scores of rows, each computed once for every expert that was asked."""

    def __init__(self, workspace: Workspace, config: Config, content: Content) -> None:
        self.workspace, self.config, self.content = workspace, config, content
        self.losses: dict[Key, float] = {}
        self.scores: dict[Key, float] = {}
        seen: dict[str, int] = defaultdict(int)
        self.scored: set[int] = set()   # indices of the rows that are answered, the first of each domain
        for index, (domain, _) in enumerate(content):
            if seen[domain] < config.release.metric_rows:
                self.scored.add(index)
            seen[domain] += 1

    def of(self, mixture: Any, asked: Asked) -> list[tuple[int, float, float | None]]:
        """(index, loss, score) of what is asked; the score of a row that is not answered is None."""
        keys = {pair: (pair[0], mixture.experts[pair[1]], f"{mixture.encoder.system!r}") for pair in asked}
        missing = [pair for pair in asked if keys[pair] not in self.losses]
        losses = mixture.losses([self.content[index][1].messages for index, _ in missing], [by for _, by in missing])
        self.losses.update((keys[pair], loss) for pair, (loss, _) in zip(missing, losses, strict=True))
        answered = [pair for pair in asked if pair[0] in self.scored and keys[pair] not in self.scores]
        by_domain: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for pair in answered:
            by_domain[self.content[pair[0]][0]].append(pair)
        for domain, pairs in by_domain.items():
            for pair, score in zip(pairs, self._score(mixture, domain, pairs), strict=True):
                self.scores[keys[pair]] = score
        return [(pair[0], self.losses[keys[pair]], self.scores.get(keys[pair])) for pair in asked]

    def _score(self, mixture: Any, domain: str, pairs: Asked) -> list[float]:
        """The domain's own metric of greedy answers, as long as `moa evaluate` lets them be."""
        params, judge = self.config.evaluate, metrics.resolve(self.config.domains[domain].metric)
        longest = int(read_json(self.workspace.corpus(domain) / MANIFEST)["tokens"]["completion"]["max"])
        limit = min(params.max_new_tokens, longest + SPARE_TOKENS)
        found = []
        for start in range(0, len(pairs), params.batch_rows):
            batch = pairs[start:start + params.batch_rows]
            rows = [self.content[index][1] for index, _ in batch]
            answers = mixture.generate([row.prompt for row in rows], [by for _, by in batch], max_new_tokens=limit)
            found += [judge(one.answer, row.reference, row.question) for one, row in zip(answers, rows, strict=True)]
        return found


def compare(workspace: Workspace, config: Config, incumbent: int, challenger: int) -> dict[str, Any]:
    """Loss of every test row under both releases, routed as each would route it, in nats per completion token; of the
    first `release.metric_rows` of each domain also the score of what they answer.

    A domain that only one of them knows counts for that one, and one that the incumbent does not know is answered by
    the base too.
    """
    from moa.mixture import BASE, Mixture, answering

    registry = Registry(workspace, config)
    base = load(workspace, config.base, pick_device(config.execution.devices))
    content = test_rows(workspace, config, sorted(config.domains))
    rows: list[dict[str, Any]] = [{"domain": domain, "row": row.id} for domain, row in content]
    routing: dict[str, dict[str, float]] = {}
    answers = _Answers(workspace, config, content)

    def ask(mixture: Mixture, name: str, asked: Asked) -> None:
        for index, loss, score in answers.of(mixture, asked):
            rows[index][f"{name}_loss"] = loss
            if score is not None:
                rows[index][f"{name}_score"] = score

    incumbents: list[str] = []
    for name, version in (("incumbent", incumbent), ("challenger", challenger)):
        mixture = Mixture.load(registry.download(version), base)
        known = [index for index, (domain, _) in enumerate(content) if domain in mixture.labels]
        decisions = mixture.route([content[index][1].prompt for index in known])
        ask(mixture, name, [(index, answering(one)) for index, one in zip(known, decisions, strict=True)])
        right = [content[index][0] == one.domain for index, one in zip(known, decisions, strict=True)]
        routing[name] = {"accuracy": sum(right) / max(len(right), 1),
                         "abstention": sum(one.abstained for one in decisions) / max(len(right), 1)}
        if name == "incumbent":
            incumbents = mixture.labels
        else:
            ask(mixture, "base", [(index, BASE) for index in known if content[index][0] not in incumbents])
        mixture.unload()
    return {"incumbent": incumbent, "challenger": challenger, "rows": rows, "routing": routing}
