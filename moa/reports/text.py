"""Figures of evaluations, comparisons and builds as text, for terminals and for pages that show Markdown."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moa.core.config import Config
from moa.core.files import read_json
from moa.core.paths import Workspace
from moa.core.text import table
from moa.evaluation import summary
from moa.reports import changed_hands
from moa.reports.sample_question import sample_question
from moa.workspace.data_versions import uncommitted

# Figures of `champion_table`.
COLUMNS = ("loss", "perplexity", "score")
ROUTING = ("accuracy", "abstention", "ece", "by_domain", "promises", "reliability")
BAR = 20   # characters of a probability of 1


def champion_table(workspace: Workspace, config: Config, *, rerun: bool = False) -> dict[str, Any]:
    """The champion's figures: those measured when it was built, or with `rerun` new ones on the present test rows.

    Returns:
        `release` (its version), and `domains` and `routing` as in `summary.json`.

    Raises RegistryError without a champion.
    """
    from moa.release.champion import champion, open_mixture

    version, folder = champion(workspace, config)
    if rerun:
        from moa.evaluation.evaluate import score, summarise

        mixture = open_mixture(folder, workspace)
        measured = summarise(score(mixture, workspace, config), mixture.labels, mixture.router.figures.get("promises"))
    else:
        measured = read_json(folder.parent / "reports" / "summary.json")
    return {"release": version.version,
            "domains": {domain: {system: {key: figures[key] for key in COLUMNS} for system, figures in systems.items()}
                        for domain, systems in measured["domains"].items()},
            "routing": {key: measured["routing"][key] for key in ROUTING if key in measured["routing"]}}


def comparison_text(compared: dict[str, Any]) -> str:
    """A table of the mean losses of two releases by domain.

    `compared` is the result of `moa.evaluation.comparison.compare`.
    """
    by_domain: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in compared["rows"]:
        by_domain[row["domain"]].append(row)
    systems = ("base", "incumbent", "challenger")
    lines: list[tuple[str, ...]] = [("domain", "rows", *systems)]
    for domain, rows in by_domain.items():
        lines.append((domain, str(len(rows)), *(_mean([row.get(f"{name}_loss") for row in rows]) for name in systems)))
    return table(lines, right=range(1, 5))


def trace_text(trace: list[dict[str, Any]], decision: dict[str, Any]) -> str:
    """The result of `moa.release.champion.routing_trace` as text.

    Each level has a line with its head's probability and domain, marked if the router's rule reads it. The rule's
    decision comes last.
    """
    lines = [("level", "", "probability", "domain")]
    for choice in trace:
        bar = "█" * round(BAR * choice["probability"])
        mark = "  <- read" if choice["level"] in decision["levels"] else ""
        lines.append((f"{choice['level']}", f"{bar:░<{BAR}}", f"{choice['probability']:.1%}",
                      f"{choice['domain']}{mark}"))
    decided = f"rule {decision['rule']}: {decision['domain']}, confidence {decision['confidence']:.1%}"
    if decision["abstained"]:
        decided += (f"; similarity {decision['score']:.3g} is below {decision['threshold']:.3g}, as for every other "
                    "domain, so the router abstains")
    return f"{table(lines, right=[0, 2])}\n{decided}"


def _mean(losses: list[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"


def answered_by(reply: Mapping[str, Any]) -> str:
    """Which expert answered a question and why, for `reply` of `moa.release.champion.ask`."""
    if reply["abstained"]:
        return (f"the base answered: unlike {reply['domain']}'s rows ({reply['similarity']:.2f} < "
                f"{reply['threshold']:.2f}); --domain {reply['domain']} forces it")
    if reply["confidence"] is None:
        return f"{reply['answered_by']} answered, as asked for"
    return f"{reply['answered_by']} answered (confidence {reply['confidence']:.2f})"


def run_summary(workspace: Workspace, config: Config, release: Any) -> str:
    """The last lines of `moa run`: the table of figures, where the results are, and commands to try next.

    `release` is the result of `flows.steps.release`; another value leaves its facts out.
    """
    measured = read_json(workspace.reports / "summary.json")
    sample = sample_question(workspace, config)
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.relative(workspace.mlflow)}/mlflow.db"
    release = release if isinstance(release, dict) else {}
    version, champion = release.get("version", "?"), release.get("champion")
    verdict = release["decision"]["reason"] if release.get("decision") else ""
    serving = f"champion is version {champion}" if champion else "there is no champion yet"
    waiting = ([f"waiting   version {version} passed the gate: `moa release promote {version}` makes it champion"]
               if release.get("waiting") else [])
    moved = moved_text(workspace, config, release)
    changed = uncommitted(workspace)
    return "\n".join([
        "", summary.table(measured), "", *([moved, ""] if moved else []),
        f"release   version {version} of {release.get('name', config.release.name)} ({verdict}); {serving}",
        *waiting,
        f"report    {workspace.relative(workspace.reports)}/report.md, rows.parquet, summary.json",
        f"MLflow    mlflow ui --backend-store-uri {tracking}",
        f"Prefect   PREFECT_HOME={workspace.relative(workspace.prefect)} prefect server start",
        "", "Try next:",
        f"  moa ask {sample.shell_word}",
        f"  moa ask --domain base {sample.shell_word}",
        "  moa plan",
        *([f"  git add {' '.join(changed)} && git commit -m 'Release {version}'"] if changed else [])])


def moved_text(workspace: Workspace, config: Config, release: Mapping[str, Any]) -> str:
    """The known prompts that changed hands since the release that this one was compared with; empty without one.

    `release` is the result of `flows.steps.release`.
    """
    if not (against := (release.get("decision") or {}).get("against")):
        return ""
    return changed_hands.text(changed_hands.of_releases(workspace, config, against, release["version"]))


def gate_line(decision: Mapping[str, Any], rows: Mapping[str, int], *, touched: Sequence[str] = (),
              accepted: bool = False, waits: bool = False) -> str:
    """What the gate decided in one line: short differences, which release stays or becomes champion, the next command.

    Args:
        decision: the gate's decision on a version, as `flows.steps.release.decide` returns it.
        rows: by domain that cannot be judged yet, about how many more rows of data it takes.
        touched: domains whose new rows an adaptation has taken in, and will set aside where they are refused.
        accepted: a person has accepted these rows, so the release is promoted whatever the gate says.
        waits: a release that passes is not promoted now, and waits for `moa release promote`.
    """
    version, against, reason = decision["version"], decision.get("against"), decision["reason"].rstrip(".")
    stays = f"champion stays {against}" if against else "there is no champion yet"
    details = f"next: `moa gate {version}`"
    if decision["promote"]:
        better = [_better(domain, verdict) for domain, verdict in decision.get("domains", {}).items()
                  if domain in decision.get("improved", ())]
        said = f"better: {', '.join(better)}" if better and against else reason
        return (f"gate PASSED version {version}: {said}; "
                + (f"{stays}; next: `moa release promote {version}`" if waits else "it becomes champion"))
    said = ", ".join(decision.get("brief") or [reason])
    outcome = {"worse": "REFUSED", "not enough data": "WAITING"}.get(decision.get("outcome", ""), "NO BETTER")
    if reason == "already champion":
        return f"gate UNCHANGED version {version}: {reason}"
    if accepted:
        return f"gate {outcome} version {version}: {said}; accepted, so it becomes champion all the same"
    if outcome == "WAITING" and rows:
        details = f"next: add {' and '.join(f'{count:,} rows of {domain}' for domain, count in sorted(rows.items()))}"
    mine = sorted(set(decision.get("worse", ())) & set(touched))
    if outcome == "REFUSED" and mine:
        details = f"next: `moa adapt --accept {mine[0]} --reason TEXT`, if you know better"
    return f"gate {outcome} version {version}: {said}; {stays}; {details}"


def _better(domain: str, verdict: Mapping[str, Any]) -> str:
    """The gain of a domain in a few words."""
    loss, metric = verdict["loss"], verdict.get("metric") or {}
    if loss["improved"] or not metric.get("improved"):
        return f"{domain} {loss['point']:+.3f} nats"
    return f"{domain} score {metric['point']:+.3f}"


# Markdown.

def build_markdown(evaluation: Mapping[str, Any] | None, router: Mapping[str, Any],
                   release: Mapping[str, Any] | None, moved: str = "") -> str:
    """The result of a build as Markdown: the decision, scores with intervals, routing, prompts that changed hands.

    Args:
        evaluation: result of `moa.reports.facts.evaluation`; None = scores and routing are left out.
        router: `router` of the mixture's manifest.
        release: result of `flows.steps.release`; None = the decision is left out.
        moved: result of `moved_text`.
    """
    parts = [f"**Release** {released_line(release)}"] if release else []
    if evaluation:
        parts.append("### Scores\n\n" + _grid(
            ("domain", "system", "loss", "metric", "rows / answered"),
            ((domain, summary.NAMES[system], _bounded(each["loss"], each["loss_interval"]),
              _bounded(each["score"], each["score_interval"]), f"{each['rows']} / {each['answered']}")
             for domain, systems in evaluation["scores"].items() for system, each in systems.items())))
        parts += _routing(evaluation, router)
    if moved:
        parts.append(f"### Known prompts that changed hands\n\n```text\n{moved}\n```")
    return "\n\n".join(parts) + "\n"


def released_line(release: Mapping[str, Any]) -> str:
    """One sentence on a release: which version was registered, the gate's reason, and which version is champion."""
    decision, champion = release.get("decision") or {}, release.get("champion")
    reason = str(decision.get("reason", "")).rstrip(".")
    serving = f"champion is version {champion}" if champion else "there is no champion yet"
    waiting = "; it waits for approval" if release.get("waiting") else ""
    return (f"version {release.get('version', '?')} of {release.get('name', '?')}"
            f"{f': {reason}' if reason else ''}; {serving}{waiting}.")


def _routing(evaluation: Mapping[str, Any], router: Mapping[str, Any]) -> list[str]:
    """The parts on routing: figures, confusion, abstention, reliability, routing tax and agreement of the levels."""
    routing, promised = evaluation["routing"], router.get("promises")
    figures = ", ".join(f"{title} {routing[key]:.1%}" for title, key in (
        ("accuracy", "accuracy"), ("abstention", "abstention"), ("calibration error", "ece")) if key in routing)
    parts = [f"### Routing\n\n{figures}"]
    if confusion := routing.get("confusion"):
        parts.append(_grid(("rows of / best guess", *confusion),
                           ((domain, *(counts.get(guess, 0) for guess in confusion))
                            for domain, counts in confusion.items())))
    if by_domain := routing.get("by_domain"):
        parts.append(_grid(("domain", "rows / groups", summary.LEFT), (
            (domain, f"{each['rows']} / {each['groups']}",
             summary.abstention_text(each, (promised or {}).get(domain))) for domain, each in by_domain.items())))
    if remark := summary.promise_remark(promised):
        parts.append(remark)
    if bins := routing.get("reliability"):
        head, *rows = summary.reliability_cells(bins)
        parts.append(_grid(head, rows))
    if tax := evaluation.get("tax"):
        parts.append(_grid(("routing tax", "loss, routed - forced", "metric, forced - routed"), (
            (domain, _bounded(each["loss"], each["loss_interval"]), _bounded(each["score"], each["score_interval"]))
            for domain, each in tax.items())))
    if levels := router.get("levels"):
        parts.append("### Layer agreement\n\n" + _grid(("level", "accuracy", "agreement"), (
            (each["level"], f"{each['accuracy']:.1%}", f"{each['agreement']:.1%}") for each in levels)))
    return parts


def _bounded(value: float | None, bounds: Sequence[float] | None) -> str:
    """A figure with its interval; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")


def _grid(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. Vertical bars and line breaks within cells are replaced, because they would end the cell."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in line)} |"
                     for line in lines)
