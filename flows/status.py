"""`moa status`: stages, champion, services, schedules, waiting rows and last events. Changes nothing."""

import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from flows import prefect_api
from flows.steps import event_log
from flows.steps.adaptation_state import AdaptationState
from flows.steps.learning import pending_rows
from moa.core.config import Config
from moa.core.files import read_json
from moa.core.names import printable
from moa.core.paths import MANIFEST, Workspace
from moa.core.project import deployment_name
from moa.core.text import sentence, table
from moa.workspace.lock import LockHolder

LAST = 5   # entries of the event log


def status(workspace: Workspace, config: Config) -> dict[str, Any]:
    """The facts of `moa status`, as its JSON has them; `text` shows them."""
    from moa.evaluation import power
    from moa.release.registry import Registry
    from moa.workspace.pipeline import Pipeline
    from moa.workspace.plan import Statistics

    corpora = Statistics.read(workspace, config).corpora
    snapshot, champion = Pipeline(workspace).snapshot(), Registry(workspace, config).champion()
    holder, pending = LockHolder.of(workspace), pending_rows(workspace, config)
    interrupted = AdaptationState.load(workspace)
    api, up = prefect_api.workspace_api(workspace), _up(workspace)
    answering = bool(api and api.answers())
    return {"workspace": str(workspace.root), "domains": list(config.domains),
            "champion": f"{champion.name} version {champion.version}" if champion else None,
            "disagreements": disagreements(champion.experts, _experts(workspace, config)) if champion else {},
            "unjudged": {domain: power.rows_for(power.lacking_groups(corpora[domain], config.release), corpora[domain])
                         for domain in power.unjudged(corpora, config.release)},
            "stale": sorted(snapshot.stale), "pending": sorted(snapshot.affected),
            "up": up, "troubles": _troubles(workspace, up),
            "prefect": {"url": api.url if api else None, "answers": answering, "password": _password_file(workspace)},
            "working": holder.read() if holder.at_work() else None,
            "interrupted": sorted(interrupted.before) if interrupted and not holder.at_work() else None,
            "arrived": [{"domain": printable(arrival.domain), "file": printable(arrival.path.name),
                         "size": arrival.size} for arrival in pending.arrivals],
            "due": {"run": pending.due.run, "reason": pending.due.reason, "wait": pending.due.wait},
            "scheduled": _scheduled(api, workspace, config) if api and answering else [],
            "ledger": event_log.read(workspace, last=LAST)}


def _experts(workspace: Workspace, config: Config) -> dict[str, str | None]:
    """Digest of each domain's expert in the workspace; None where it has none yet."""
    paths = {domain: workspace.expert(domain) / MANIFEST for domain in config.domains}
    return {domain: read_json(path)["digest"] if path.is_file() else None for domain, path in paths.items()}


def disagreements(champion: Mapping[str, Mapping[str, Any]], workspace: Mapping[str, str | None]
                  ) -> dict[str, list[str]]:
    """What the champion and the workspace disagree on, as after a promotion by force; empty where they agree.

    Args:
        champion: facts of its experts by domain, their `digest` among them.
        workspace: digests of the experts in the workspace by domain.

    Returns:
        Domains under `champion_only`, `workspace_only`, and `expert_differs`; without the empty ones.
    """
    both = champion.keys() & workspace.keys()
    found = {"champion_only": champion.keys() - both, "workspace_only": workspace.keys() - both,
             "expert_differs": {name for name in both if champion[name]["digest"] != workspace[name]}}
    return {kind: sorted(names) for kind, names in found.items() if names}


def _disagreement_text(kind: str, names: list[str]) -> str:
    return {"champion_only": f"it has {_listed(names)}, which this workspace lacks",
            "workspace_only": f"it lacks {_listed(names)}, which this workspace has",
            "expert_differs": f"its expert of {_listed(names)} is not the one in this workspace"}[kind]


def _up(workspace: Workspace) -> dict[str, Any] | None:
    """The facts and service states that a running `moa up` wrote; None when none runs."""
    from filelock import FileLock, Timeout

    try:
        facts: dict[str, Any] = read_json(workspace.up)
    except (OSError, ValueError):
        return None
    try:
        with FileLock(workspace.local / "up.lock", timeout=0):
            return None   # the lock is free, so `moa up` was killed
    except Timeout:
        return facts


def _password_file(workspace: Workspace) -> str | None:
    """The file with the password of `moa up`'s own Prefect server, relative to the workspace, if it exists."""
    path = workspace.prefect_password
    return workspace.relative(path) if path.exists() else None


def _troubles(workspace: Workspace, up: dict[str, Any] | None) -> list[str]:
    """A sentence for each service of `moa up` that is down, or one for a `moa up` that was killed."""
    if up is None:
        return ["moa up was killed: start it again"] if workspace.up.exists() else []
    return [f"{name} is down since {part['since']}: {part['why']}" for name, part in up.get("parts", {}).items()
            if part["state"] == "down"]


def service_problems(workspace: Workspace) -> list[str]:
    """A sentence for each server that should answer and does not, with what to do: for `moa doctor`."""
    problems = [sentence(trouble) for trouble in _troubles(workspace, _up(workspace))]
    if (api := prefect_api.configured_api()) is None:
        return problems
    if not api.answers():
        problems.append(f"The Prefect server at {api.url}, which your settings name, does not answer: start it, or "
                        "unset PREFECT_API_URL to let moa start a server of its own.")
    elif api.refuses():
        problems.append(prefect_api.refusal(api))
    return problems


def _scheduled(api: prefect_api.Api, workspace: Workspace, config: Config) -> list[dict[str, str]]:
    """The next scheduled run of each of this workspace's flows, as Prefect has it; empty when Prefect does not say."""
    with suppress(OSError, ValueError, KeyError):
        mine = {"name": {"any_": [deployment_name(workspace, config)]}}
        deployments = {deployment["id"]: deployment
                       for deployment in api.ask("deployments/filter", {"deployments": mine})
                       if deployment["parameters"].get("root") == str(workspace.root)}
        if not deployments:
            return []
        runs = api.ask("flow_runs/filter", {
            "sort": "EXPECTED_START_TIME_ASC", "limit": 50, "deployments": {"id": {"any_": list(deployments)}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
        next_runs: dict[str, str] = {}   # by flow; the answer has the earliest run first
        for run in runs:
            flow = deployments[run["deployment_id"]]["entrypoint"].rsplit(".", 1)[-1]
            next_runs.setdefault(flow, run["expected_start_time"])
        return [{"flow": flow, "at": at} for flow, at in next_runs.items()]
    return []


def text(facts: dict[str, Any]) -> str:
    """The facts of `status` as lines for a person."""
    up, working, prefect = facts["up"], facts["working"], facts["prefect"]
    lines = [("workspace", facts["workspace"]), ("domains", _listed(facts["domains"])),
             ("champion", facts["champion"] or "none"),
             *(("", _disagreement_text(kind, names)) for kind, names in facts["disagreements"].items()),
             *(("gate", f"cannot judge {domain}, which has too few test rows: about {rows:,} more rows are needed")
               for domain, rows in facts["unjudged"].items()),
             ("stale", _listed(facts["stale"])),
             ("pending", _listed(facts["pending"])), ("arrived", facts["due"]["reason"]),
             *(("", f"{each['domain']}/{each['file']}, {each['size']:,} bytes") for each in facts["arrived"]),
             ("at work", f"pid {working['pid']} since {working['since']}" if working else "no run")]
    if facts["interrupted"]:
        lines.append(("", f"an adaptation of {_listed(facts['interrupted'])} was interrupted; "
                          "the next run finishes it"))
    lines.append(("moa up", f"since {up['since']} (pid {up['pid']})" if up else "does not run"))
    lines += [("trouble", each) for each in facts["troubles"]]
    if prefect["url"]:
        lines.append(("prefect", prefect["url"].removesuffix("/api") + ("" if prefect["answers"] else ", no answer")))
        if prefect["password"]:
            lines.append(("", f"password: in {prefect['password']}"))
    lines += [(name, up[name] + _state_suffix(up, name)) for name in ("mlflow", "serve") if up and name in up]
    lines += [(f"next {each['flow']}", _time_left(each["at"])) for each in facts["scheduled"]]
    return "\n".join([table(lines), *(["", event_log.text(facts["ledger"])] if facts["ledger"] else [])])


def _state_suffix(up: dict[str, Any], name: str) -> str:
    """`, STATE` for a service that is not up."""
    state = up.get("parts", {}).get(name, {"state": "up"})["state"]
    return "" if state == "up" else f", {state}"


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _time_left(at: str) -> str:
    """An ISO 8601 time, with the minutes or hours until then."""
    when = datetime.fromisoformat(at)
    minutes = (when.timestamp() - time.time()) / 60
    left = f"{minutes / 60:.0f} h" if minutes > 90 else f"{minutes:.0f} min"
    return f"{when.isoformat(timespec='minutes')} (in {left})"
