"""Prefect artifacts of a flow run: the build's report, the gate's verdicts, and what an adaptation decided.

They show on Prefect's pages what the workspace's report and event log hold; nothing reads them back.
"""

import sys
from typing import Any

from flows.steps import event_log
from flows.steps.session import Result, Session
from moa.core.config import Config, load
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.project import Names
from moa.evaluation.gate import verdict_of
from moa.reports import facts as report_facts
from moa.reports import text as report

REPORT, GATE, LEARNED = "report", "gate", "learned"   # ends of artifact keys, which begin with the project's name


def store_build(session: Session, result: Result) -> None:
    """Store a build's report and the gate's verdicts as Prefect artifacts of the current flow run.

    An error is printed and not raised: the build has ended, and an artifact must not change how.
    """
    try:
        from prefect.artifacts import create_markdown_artifact, create_table_artifact

        key = Names.of(session.config).artifact
        page = build_page(session.workspace, session.config, result)
        create_markdown_artifact(page, key(REPORT), "Evaluation and release of this build")
        if verdicts := gate_table(result):
            create_table_artifact(verdicts, key(GATE), "The gate's verdicts on this release")
    except Exception as error:
        session.screen.say(f"Prefect did not keep this build's report: {type(error).__name__}: {error}")


def store_learning(workspace: Workspace, logged: int, facts: dict[str, Any]) -> None:
    """Store what an adaptation or a retraining decided as a Prefect artifact of the current flow run.

    An error is printed and not raised.

    Args:
        logged: entries that the event log had before the run; the artifact shows the later ones.
        facts: what the run returned, with the forgetting report of its release if there is one.
    """
    from moa.release import forgetting

    parts = [f"## {facts['state']}", _fenced(event_log.text(event_log.read(workspace)[logged:]))]
    if comparison := facts.get("forgetting"):
        parts += ["## What it kept", _fenced(forgetting.text(comparison))]
    try:
        from prefect.artifacts import create_markdown_artifact

        key = Names.of(load(workspace.params)).artifact(LEARNED)
        create_markdown_artifact("\n\n".join(parts), key, "What was learned, and why")
    except Exception as error:
        print(f"moa: Prefect did not keep the account of this run: {type(error).__name__}: {error}", file=sys.stderr)


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def build_page(workspace: Workspace, config: Config, result: Result) -> str:
    """The report of a build as Markdown: how each step ended, then the figures of the evaluation.

    After a failure there are no figures, because data/reports may be an earlier build's.
    """
    outcomes = "\n".join(f"- {state}: {', '.join(names)}" for state in ("done", "cached", "skipped", "failed")
                         if (names := result.named(state)))
    head = f"## {workspace.root.name}\n\n{outcomes}\n\n"
    if failure := result.failure():
        return f"{head}{failure}\n"
    manifest = workspace.mixture / MANIFEST
    router = read_json(manifest).get("router", {}) if manifest.is_file() else {}
    release = _release(result)
    moved = report.moved_text(workspace, config, release or {})
    return head + report.build_markdown(report_facts.evaluation(workspace.reports), router, release, moved)


def gate_table(result: Result) -> list[dict[str, Any]]:
    """The gate's comparisons as rows of a table, its decision last; empty when the gate was not asked."""
    release = _release(result) or {}
    if not (decision := release.get("decision")):
        return []
    rows = [{**{key: verdict[key] for key in ("domain", "measure", "verdict", "difference")},
             "interval": " to ".join(f"{end:+.4f}" for end in verdict["interval"] or ()), "rows": verdict["rows"],
             "reason": verdict["reason"]} for verdict in report_facts.verdicts(decision)]
    return [*rows, {"domain": "", "measure": "release", "verdict": verdict_of(decision),
                    "difference": None, "interval": "", "rows": None, "reason": decision["reason"]}]


def _release(result: Result) -> dict[str, Any] | None:
    return result.release if isinstance(result.release, dict) else None
