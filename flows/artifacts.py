"""What a build came to, kept with its flow run: a page and the gate's verdicts, as Prefect artifacts.

They repeat the report on Prefect's pages.
"""

import sys
from typing import Any

from flows.steps import event_log
from flows.steps.session import Result, Session
from moa.core.config import load
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.project import Names
from moa.reports import facts as report_facts
from moa.reports import text as report

REPORT, GATE, LEARNED = "report", "gate", "learned"   # ends of their keys, which begin with the project's name


def store_build(session: Session, result: Result) -> None:
    """Store the artifacts of the flow run that is running. Whatever goes wrong is said, and fails nothing."""
    try:
        from prefect.artifacts import create_markdown_artifact, create_table_artifact

        key = Names.of(session.config).artifact
        create_markdown_artifact(build_page(session, result), key(REPORT), "Evaluation and release of this build")
        if verdicts := gate_table(result):
            create_table_artifact(verdicts, key(GATE), "What the gate said of this release")
    except Exception as error:   # the build is what counts, and it is done
        session.screen.say(f"Prefect did not keep this build's report: {type(error).__name__}: {error}")


def store_learning(workspace: Workspace, before: int, facts: dict[str, Any]) -> None:
    """What an adaptation or a retraining decided, by the ledger's lines after the first `before`, and what its release
    kept of the one before. Whatever goes wrong is said, and fails nothing."""
    from moa.release import forgetting

    parts = [f"## {facts['state']}", _fenced(event_log.text(event_log.read(workspace)[before:]))]
    if kept := facts.get("forgetting"):
        parts += ["## What it kept", _fenced(forgetting.text(kept))]
    try:
        from prefect.artifacts import create_markdown_artifact

        key = Names.of(load(workspace.params)).artifact(LEARNED)
        create_markdown_artifact("\n\n".join(parts), key, "What was learned, and why")
    except Exception as error:
        print(f"moa: Prefect did not keep the account of this run: {type(error).__name__}: {error}", file=sys.stderr)


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def build_page(session: Session, result: Result) -> str:
    """Markdown: how the steps ended, then the figures, unless a failure left those of an earlier build."""
    ended = "\n".join(f"- {state}: {', '.join(names)}" for state in ("done", "cached", "skipped", "failed")
                      if (names := result.named(state)))
    head = f"## {session.workspace.root.name}\n\n{ended}\n\n"
    if failure := result.failure():
        return f"{head}{failure}\n"
    mixture = session.workspace.mixture / MANIFEST
    router = read_json(mixture).get("router", {}) if mixture.is_file() else {}
    return head + report.build_markdown(report_facts.evaluation(session.workspace.reports), router, _release(result))


def gate_table(result: Result) -> list[dict[str, Any]]:
    """The gate's comparisons, a row each, and last its decision; empty where the gate was not asked."""
    release = _release(result) or {}
    if not (decision := release.get("decision")):
        return []
    rows = [{**{key: verdict[key] for key in ("domain", "measure", "verdict", "difference")},
             "interval": " to ".join(f"{end:+.4f}" for end in verdict["interval"] or ()), "rows": verdict["rows"],
             "reason": verdict["reason"]} for verdict in report_facts.verdicts(decision)]
    return [*rows, {"domain": "", "measure": "release", "verdict": "pass" if decision["promote"] else "refused",
                    "difference": None, "interval": "", "rows": None, "reason": decision["reason"]}]


def _release(result: Result) -> dict[str, Any] | None:
    return result.release if isinstance(result.release, dict) else None
