"""The notebook runs from top to bottom in a kernel, which has a running event loop; it is stored without outputs."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import moa
from tests import tiny

NOTEBOOK = tiny.REPOSITORY / "examples" / "quickstart.ipynb"


def _shown(cells: list[Any]) -> dict[str, str]:
    """Everything that a cell shows, by the last line of its code."""
    return {cell.source.splitlines()[-1].partition("   #")[0]: " ".join(map(str, cell.outputs))
            for cell in cells if cell.cell_type == "code"}


def test_the_notebook_builds_a_release_and_shows_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_EXAMPLE_BASE", f"path:{tiny.base(tmp_path / 'tiny-base')}")
    monkeypatch.setenv("MOA_EXAMPLE_WORKSPACE", str(tmp_path / "experts"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    NotebookClient(notebook, timeout=None, kernel_name="python3",
                   resources={"metadata": {"path": str(tmp_path)}}).execute()   # raises when a cell does
    shown = _shown(notebook.cells)
    plan, result = shown["moa.plan(workspace)"], shown["result.to_frame()"]
    assert "<table>" in plan and "train@minutes" in plan and "never run" in plan
    assert "dataframe" in result and "train@sums" in result and "is champion" in result   # which is logged
    assert "'()'" in shown["moa.plan(workspace).stale"]
    assert "answered_by" in shown["mixture.generate(questions, max_new_tokens=24).to_frame()"]
    assert "probability" in shown["mixture.explain(questions[0])"]
    assert "champion" in shown["registry.releases().to_frame()"]
    assert "Release(version=1" in shown["registry.champion()"]
    assert not moa.plan(tmp_path / "experts").stale
