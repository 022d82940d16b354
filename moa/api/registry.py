"""The releases of a workspace: which there are, which one is champion, and how two of them compare."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa.api.host import host_kept
from moa.api.results import ChampionChange, Comparison, DomainComparison, Release, Rows
from moa.api.workspace import Workspace, configuration, located


class Registry:
    """The releases of one workspace, in MLflow: its own database, or the server that MLFLOW_TRACKING_URI names.

    Args:
        workspace: None = the one around the current folder.

    >>> import moa
    >>> registry = moa.Registry("my-experts")
    >>> registry.champion()
    Release(version=1, state='champion', domains=('alpha', 'beta'))
    >>> len(registry.releases().to_frame())
    1
    """

    def __init__(self, workspace: Workspace | str | Path | None = None) -> None:
        self.workspace = located(workspace)

    def releases(self) -> Rows[Release]:
        """Every release, newest first. Raises RegistryError when MLflow cannot be reached."""
        with host_kept():
            from moa.reports.releases import listed

            return Rows(map(_release, listed(self.workspace.paths, configuration(self.workspace))["releases"]))

    def champion(self) -> Release | None:
        """The release that serves; None before the first promotion."""
        return next((each for each in self.releases() if each.state == "champion"), None)

    def get(self, version: int) -> Release:
        """A release by number. Raises RegistryError when there is none."""
        with host_kept():
            from moa.reports.releases import shown

            return _release(shown(self.workspace.paths, configuration(self.workspace), version))

    def history(self) -> Rows[ChampionChange]:
        """Every change of champion, oldest first."""
        with host_kept():
            from moa.reports.releases import history

            entries = history(self.workspace.paths, configuration(self.workspace))["history"]
        return Rows(ChampionChange(entry["version"], entry["previous"], entry["reason"], entry["effective"],
                                   entry["at"], entry["by"]) for entry in entries)

    def promote(self, version: int, *, force: bool = False, reason: str | None = None) -> ChampionChange:
        """Make a release champion if the gate passes it.

        Args:
            version: the release.
            force: promote it even if the gate refuses it; needs a `reason`.
            reason: why; kept in the history.

        Raises:
            RegistryError: the gate refuses it, or there is no such release.
            UsageError: `force` without a reason.
        """
        with host_kept():
            from flows.steps.release import approve

            config = configuration(self.workspace)
            return _change(approve(self.workspace.paths, config, version, force=force, note=reason))

    def rollback(self, to: int | None = None, *, reason: str | None = None) -> ChampionChange:
        """Make the previous champion champion again, or `to`, which must have been champion once.

        Raises:
            RegistryError: there is nothing to go back to.
        """
        with host_kept():
            from flows.steps.release import roll_back

            return _change(roll_back(self.workspace.paths, configuration(self.workspace), to, reason))

    def compare(self, challenger: int, incumbent: int | None = None) -> Comparison:
        """Compare two releases on the same test rows, as the gate does.

        Args:
            challenger: a release.
            incumbent: the release that it is compared with; None = the champion.

        Raises:
            RegistryError: there is no such release.
            UsageError: both are the same release.
        """
        with host_kept():
            from moa.release.champion import compare_versions, other_version

            paths, config = self.workspace.paths, configuration(self.workspace)
            other = other_version(paths, config, challenger, incumbent)
            facts = compare_versions(paths, config, other, challenger)
        by_domain: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in facts["rows"]:
            by_domain[row["domain"]].append(row)
        return Comparison(challenger, other, tuple(
            DomainComparison(domain, len(rows), _mean(rows, "challenger_loss"), _mean(rows, "incumbent_loss"))
            for domain, rows in by_domain.items()),
            facts["routing"]["challenger"]["accuracy"], facts["routing"]["incumbent"]["accuracy"])

    def __repr__(self) -> str:
        return f"Registry({self.workspace.root.name!r})"

    def _repr_html_(self) -> str:
        return self.releases()._repr_html_()


def _release(facts: dict[str, Any]) -> Release:
    gate = facts["gate"] or {}
    return Release(facts["version"], facts["state"], tuple(facts["domains"]), facts["created"], facts["digest"],
                   gate.get("promote"), gate.get("reason") or "")


def _change(facts: dict[str, Any]) -> ChampionChange:
    return ChampionChange(facts["version"], facts["previous"], facts["reason"], facts["changed"],
                          facts.get("at", ""), facts.get("by", ""))


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    known = [row[name] for row in rows if row.get(name) is not None]
    return sum(known) / len(known) if known else None
