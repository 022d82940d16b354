"""The stage `evaluate`: base, routed and label forced on every domain's test rows.

    data/reports/rows.parquet     one line per row and system
    data/reports/summary.json     what they come to
    data/reports/report.md        the same as text

What a row gets from an expert depends on that row and expert alone, so each pair is computed once for all systems, and
not again for an expert that did not change (`AnswerCache`).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moa.base.device import pick_device
from moa.base.load import load
from moa.core.config import Config
from moa.core.files import replace_directory, write_json
from moa.core.paths import Workspace
from moa.data import corpus
from moa.evaluation import metrics, routing
from moa.evaluation.answer_cache import AnswerCache
from moa.evaluation.scoring import (
    Content,
    Pair,
    answer_limit,
    generate_answers,
    pinned_rows,
    score_answers,
    with_other_questions,
)
from moa.evaluation.summary import markdown

SYSTEMS = ("base", "routed", "forced")


@dataclass(frozen=True, slots=True)
class Scored:
    """One test row under one system.

    `loss` is in nats per completion token and `tokens` counts these. `answer` and `score` are None for rows that were
    scored by loss alone. `routed_to`, `confidence` and `abstained` are the router's decision, under every system. Rows
    of one `group` depend on each other; None = the corpus names none, and the row is a group by itself. `swapped_loss`,
    of the system `forced` alone, is the loss of the row's answer after the question of another row of its domain.
    """

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
    group: str | None = None
    swapped_loss: float | None = None


def evaluate(workspace: Workspace, config: Config) -> dict[str, Any]:
    """Score the mixture in the workspace, write `data/reports`, and return the summary, as `summarise` makes it.

    Raises ConfigError for an unknown metric, ArtifactError for a missing or altered mixture or corpus.
    """
    from moa.mixture.mixture import Mixture

    for domain in config.domains.values():
        metrics.resolve(domain.metric)   # before anything slow
    base = load(workspace, config.base, pick_device(config.execution.devices))
    mixture = Mixture.load(workspace.mixture, base, config.execution.resident)
    cache = AnswerCache(workspace, mixture)
    scored = score(mixture, workspace, config, cache)
    cache.save()
    summary = summarise(scored, mixture.labels, mixture.router.figures.get("promises"))
    with replace_directory(workspace.reports) as folder:
        _write_rows(folder / "rows.parquet", scored)
        (folder / "report.md").write_text(markdown(summary), encoding="utf-8")
        write_json(folder / "summary.json", summary)
    return summary


def score(mixture: Any, workspace: Workspace, config: Config, cache: AnswerCache | None = None) -> list[Scored]:
    """Every test row under every system. Losses and answers come from `cache` where it has them, and go into it."""
    from moa.core.progress import track
    from moa.mixture.mixture import BASE, answering

    content = pinned_rows(workspace, config, mixture.labels)
    decisions = mixture.route([row.prompt for _, row in content])
    by_system = {"base": [BASE] * len(content), "routed": [answering(decision) for decision in decisions],
                 "forced": [domain for domain, _ in content]}
    pairs = sorted({(index, by) for answerers in by_system.values() for index, by in enumerate(answerers)})
    answered = _first_rows(content, config.evaluate.generate_rows)
    limits = {domain: answer_limit(workspace, config, domain) for domain in mixture.labels}
    losses: dict[Pair, tuple[float, int]] = {}
    answers: dict[Pair, str] = {}
    for index, by in pairs if cache else ():
        assert cache is not None
        domain, row = content[index]
        if (loss := cache.loss(row.id, by)) is not None:
            losses[index, by] = loss
        if index in answered and (answer := cache.answer(row.id, by, limits[domain])) is not None:
            answers[index, by] = answer
    without_loss = [pair for pair in pairs if pair not in losses]
    without_answer = [pair for pair in pairs if pair[0] in answered and pair not in answers]
    with track("evaluate", total=len(without_loss) + len(without_answer), unit="rows") as bar:
        losses.update(zip(without_loss, mixture.losses([content[index][1].messages for index, _ in without_loss],
                                                       [by for _, by in without_loss]), strict=True))
        bar.advance(len(without_loss))
        answers |= generate_answers(mixture, workspace, config, content, without_answer, bar.advance)
    if cache:
        for index, by in without_loss:
            cache.add_loss(content[index][1].id, by, *losses[index, by])
        for index, by in without_answer:
            cache.add_answer(content[index][1].id, by, limits[content[index][0]], answers[index, by])
    scores = score_answers(config, content, answers)
    swapped = _swapped_losses(mixture, content, cache)
    return [Scored(domain, row.id, system, by, *losses[index, by], answers.get((index, by)), row.reference,
                   scores.get((index, by)), decision.domain, decision.confidence, decision.abstained, row.group,
                   swapped.get(index) if system == "forced" else None)
            for system, answerers in by_system.items()
            for index, ((domain, row), by, decision) in enumerate(zip(content, answerers, decisions, strict=True))]


def _swapped_losses(mixture: Any, content: Content, cache: AnswerCache | None) -> dict[int, float]:
    """By index, the loss of a row under its domain's expert with the question of another row of the domain."""
    asked = with_other_questions(content)
    ids = {index: corpus.row_id(messages) for index, messages in asked.items()}
    found = {index: known[0] for index in asked
             if cache and (known := cache.loss(ids[index], content[index][0])) is not None}
    missing = [index for index in asked if index not in found]
    losses = mixture.losses([asked[index] for index in missing], [content[index][0] for index in missing])
    for index, (loss, tokens) in zip(missing, losses, strict=True):
        found[index] = loss
        if cache:
            cache.add_loss(ids[index], content[index][0], loss, tokens)
    return found


def _first_rows(content: Content, limit: int) -> set[int]:
    """Indices of the first `limit` rows of each domain, which are answered and not only scored by loss."""
    seen: dict[str, int] = defaultdict(int)
    chosen = set()
    for index, (domain, _) in enumerate(content):
        if seen[domain] < limit:
            chosen.add(index)
        seen[domain] += 1
    return chosen


def summarise(scored: Sequence[Scored], labels: Sequence[str],
              promises: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Figures by domain and system (`domains`), and how well the router chose (`routing`).

    Args:
        scored: the rows of every system.
        labels: the domains.
        promises: what the router promises of abstention, by domain, as the mixture's manifest has it; None = nothing.

    `loss` is the mean over all completion tokens of the domain's rows, `perplexity` its exponential, `score` the mean
    of the domain's metric over the answered rows, `bleu` (0 to 100) and `rouge_l` over the same. `accuracy` is the
    share of rows whose own domain is the router's best guess, `abstention` the share that it left to the base, `ece`
    the expected calibration error of its confidence; `confusion` counts rows by domain and best guess. `by_domain` and
    `reliability` are as `moa.evaluation.routing` computes them; `promises` are those given.
    """
    import torch

    from moa.mixture.calibration import expected_calibration_error

    domains = {domain: {system: _figures([one for one in scored if (one.domain, one.system) == (domain, system)])
                        for system in SYSTEMS} for domain in labels}
    routed = [one for one in scored if one.system == "routed"]
    confusion = {domain: {guess: sum(one.domain == domain and one.routed_to == guess for one in routed)
                          for guess in labels} for domain in labels}
    right = [one.domain == one.routed_to for one in routed]
    rows = [asdict(one) for one in routed]
    ece = expected_calibration_error(torch.tensor([one.confidence for one in routed]), torch.tensor(right))
    return {"domains": domains,
            "routing": {"accuracy": sum(right) / len(routed), "ece": ece,
                        "abstention": sum(one.abstained for one in routed) / len(routed), "confusion": confusion,
                        "by_domain": routing.abstentions(rows), "reliability": routing.reliability(rows),
                        **({} if promises is None else {"promises": promises})}}


def _figures(scored: Sequence[Scored]) -> Mapping[str, float]:
    answered = [one for one in scored if one.answer is not None and one.score is not None]
    predictions, references = [str(one.answer) for one in answered], [one.reference for one in answered]
    loss = sum(one.loss * one.tokens for one in scored) / sum(one.tokens for one in scored)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            "score": sum(one.score or 0.0 for one in answered) / len(answered),
            "bleu": metrics.bleu(predictions, references), "rouge_l": metrics.rouge_l_mean(predictions, references),
            "rows": len(scored), "answered": len(answered)}


def _write_rows(path: Any, scored: Sequence[Scored]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([asdict(one) for one in scored]), path)


def read_rows(release: Path) -> list[dict[str, Any]]:
    """The evaluation that a release was registered with: the fields of `Scored`, a dict for each test row and system.

    Args:
        release: the release's mixture folder, as `Registry.download` gives it.

    Returns:
        An empty list where the release recorded none. `group` is None in releases from before groups were recorded.
    """
    import pyarrow.parquet as pq

    path = release.parent / "reports" / "rows.parquet"
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return [{"group": None, **row} for row in rows]
