"""The stage `evaluate`: base, routed and label forced on every domain's test rows.

    data/reports/rows.parquet     one line per row and system
    data/reports/summary.json     what they come to
    data/reports/report.md        the same for people

Knows nothing of releases. What a row gets from an expert depends on that row and expert alone, so each pair is computed
once, whichever systems share it, and not again for an expert that did not change.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa.base.load import load, pick_device
from moa.core.config import Config
from moa.core.files import read_json, replace_directory, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import corpus
from moa.data.corpus import Row
from moa.evaluation import metrics
from moa.evaluation.answer_cache import AnswerCache
from moa.evaluation.summary import table

SYSTEMS = ("base", "routed", "forced")
Pair = tuple[int, str]   # (index of a row, who answers it)
SPARE_TOKENS = 8   # an answer may be this much longer than the longest one seen in the corpus


@dataclass(frozen=True, slots=True)
class Scored:
    """One test row under one system. `loss` is nats per completion token; rows that were not answered have no score."""

    domain: str
    row: str
    system: str
    answered_by: str
    loss: float
    tokens: int
    answer: str | None
    reference: str
    score: float | None
    routed_to: str
    confidence: float
    abstained: bool


def evaluate(workspace: Workspace, config: Config) -> dict[str, Any]:
    """Score the mixture in the workspace, write `data/reports`, and return the summary."""
    from moa.mixture.mixture import Mixture

    for domain in config.domains.values():
        metrics.resolve(domain.metric)   # before anything slow
    base = load(workspace, config.base, pick_device(config.execution.devices))
    mixture = Mixture.load(workspace.mixture, base, config.execution.resident)
    memory = AnswerCache(workspace, mixture)
    scored = score(mixture, workspace, config, memory)
    memory.save()
    summary = summarise(scored, mixture.labels)
    with replace_directory(workspace.reports) as folder:
        _write_rows(folder / "rows.parquet", scored)
        (folder / "report.md").write_text(f"```\n{table(summary)}\n```\n", encoding="utf-8")
        write_json(folder / "summary.json", summary)
    return summary


def test_rows(workspace: Workspace, config: Config, domains: Sequence[str]) -> list[tuple[str, Row]]:
    """(domain, row) of the pinned test rows: in the order of their digests, so that a limit takes no sides."""
    return [(domain, row) for domain in domains
            for row in corpus.read(workspace.corpus(domain), "test")[:config.evaluate.rows]]


def score(mixture: Any, workspace: Workspace, config: Config, memory: AnswerCache | None = None) -> list[Scored]:
    """Every test row under every system; `memory` is asked first, and told what it did not know."""
    from moa.core.progress import track
    from moa.mixture.mixture import BASE, answering

    content = test_rows(workspace, config, mixture.labels)
    decisions = mixture.route([row.prompt for _, row in content])
    by_system = {"base": [BASE] * len(content), "routed": [answering(decision) for decision in decisions],
                 "forced": [domain for domain, _ in content]}
    pairs = sorted({(index, by) for answerers in by_system.values() for index, by in enumerate(answerers)})
    asked = _asked(content, config.evaluate.generate_rows)
    limits = {domain: answer_limit(workspace, config, domain) for domain in mixture.labels}
    losses: dict[Pair, tuple[float, int]] = {}
    answers: dict[Pair, str] = {}
    for index, by in pairs if memory else ():
        assert memory is not None
        domain, row = content[index]
        if (known := memory.loss(row.id, by)) is not None:
            losses[index, by] = known
        if index in asked and (answer := memory.answer(row.id, by, limits[domain])) is not None:
            answers[index, by] = answer
    todo = [pair for pair in pairs if pair not in losses]
    open_ = [pair for pair in pairs if pair[0] in asked and pair not in answers]
    with track("evaluate", total=len(todo) + len(open_), unit="rows") as bar:
        losses.update(zip(todo, mixture.losses([content[index][1].messages for index, _ in todo],
                                               [by for _, by in todo]), strict=True))
        bar.advance(len(todo))
        for domain in mixture.labels:
            wanted = [pair for pair in open_ if content[pair[0]][0] == domain]
            for start in range(0, len(wanted), config.evaluate.batch_rows):
                batch = wanted[start:start + config.evaluate.batch_rows]
                written = mixture.generate([content[index][1].prompt for index, _ in batch], [by for _, by in batch],
                                           max_new_tokens=limits[domain])
                answers.update(zip(batch, (one.answer for one in written), strict=True))
                bar.advance(len(batch))
    if memory:
        for index, by in todo:
            memory.add_loss(content[index][1].id, by, *losses[index, by])
        for index, by in open_:
            memory.add_answer(content[index][1].id, by, limits[content[index][0]], answers[index, by])
    judge = {domain: metrics.resolve(config.domains[domain].metric) for domain in mixture.labels}
    result = []
    for system, answerers in by_system.items():
        for index, ((domain, row), by, decision) in enumerate(zip(content, answerers, decisions, strict=True)):
            (loss, tokens), answer = losses[index, by], answers.get((index, by))
            result.append(Scored(
                domain, row.id, system, by, loss, tokens, answer, row.reference,
                None if answer is None else judge[domain](answer, row.reference, row.question),
                decision.domain, decision.confidence, decision.abstained))
    return result


def _asked(content: Sequence[tuple[str, Row]], limit: int) -> set[int]:
    """Indices of the first `limit` rows of each domain: those that are answered, not only scored by loss."""
    seen: dict[str, int] = defaultdict(int)
    chosen = set()
    for index, (domain, _) in enumerate(content):
        if seen[domain] < limit:
            chosen.add(index)
        seen[domain] += 1
    return chosen


def answer_limit(workspace: Workspace, config: Config, domain: str) -> int:
    """Most tokens of an answer in `domain`."""
    longest = read_json(workspace.corpus(domain) / MANIFEST)["tokens"]["completion"]["max"]
    return min(config.evaluate.max_new_tokens, int(longest) + SPARE_TOKENS)


def summarise(scored: Sequence[Scored], labels: Sequence[str]) -> dict[str, Any]:
    """The table: domain by system, and how well the router chose.

    `loss` is the mean over all completion tokens of the domain's rows, `perplexity` its exponential, `score` the mean
    of the domain's metric over the answered rows, `bleu` (0 to 100) and `rouge_l` over the same. `accuracy` is the
    share of rows whose own domain is the router's best guess, `abstention` the share it left to the base, `ece` the
    expected calibration error of its confidence; `confusion` counts rows by domain and best guess.
    """
    import torch

    from moa.mixture.calibration import expected_calibration_error

    domains = {domain: {system: _figures([one for one in scored if (one.domain, one.system) == (domain, system)])
                        for system in SYSTEMS} for domain in labels}
    routed = [one for one in scored if one.system == "routed"]
    confusion = {domain: {guess: sum(one.domain == domain and one.routed_to == guess for one in routed)
                          for guess in labels} for domain in labels}
    right = [one.domain == one.routed_to for one in routed]
    ece = expected_calibration_error(torch.tensor([one.confidence for one in routed]), torch.tensor(right))
    return {"domains": domains,
            "routing": {"accuracy": sum(right) / len(routed), "ece": ece,
                        "abstention": sum(one.abstained for one in routed) / len(routed), "confusion": confusion}}


def _figures(scored: Sequence[Scored]) -> Mapping[str, float]:
    answered = [one for one in scored if one.answer is not None and one.score is not None]
    predictions, references = [str(one.answer) for one in answered], [one.reference for one in answered]
    loss = sum(one.loss * one.tokens for one in scored) / sum(one.tokens for one in scored)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            "score": sum(one.score or 0.0 for one in answered) / len(answered),
            "bleu": metrics.bleu(predictions, references), "rouge_l": metrics.rouge_l_mean(predictions, references),
            "rows": len(scored), "answered": len(answered)}


def _write_rows(path: Any, scored: Sequence[Scored]) -> None:
    from dataclasses import asdict

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([asdict(one) for one in scored]), path)
