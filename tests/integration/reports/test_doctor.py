"""What `moa doctor` says of a champion, with real MLflow, whose files are there or not."""

import shutil

import pytest

from moa.core.paths import Workspace
from moa.release.registry import Registry
from moa.reports import doctor
from moa.reports.doctor import Doctor
from tests.integration.release.test_registry import CONFIG, database, register, registry, workspace

__all__ = ["database", "registry", "workspace"]   # fixtures


def examined(workspace: Workspace) -> Doctor:
    found = Doctor()
    doctor._registry(found, workspace, CONFIG)
    return found


def test_the_champions_files_are_looked_for_in_the_artifact_store(
        registry: Registry, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined(workspace).problems == []   # no champion yet
    register(registry)
    registry.set_champion(1, "first", "ann")
    sound = examined(workspace)
    assert sound.problems == [] and sound.facts["mlflow"]["champion"] == 1
    shutil.rmtree(workspace.mlflow / "artifacts")
    [lost] = examined(workspace).problems
    assert lost.check == "artifacts" and lost.message.startswith(
        "MLflow's artifact store has no file of the champion, version 1: restore the store from a backup, or ")

    def no_answer(*_: object) -> bool:
        raise RuntimeError("No credentials.")

    monkeypatch.setattr(Registry, "lists_files", no_answer)
    [unread] = examined(workspace).problems
    assert unread.check == "artifacts" and unread.message.startswith(
        "MLflow's artifact store cannot be read (RuntimeError: No credentials.), so the champion, version 1, cannot ")


def test_a_database_that_nothing_has_made_yet_is_not_made(workspace: Workspace) -> None:
    (workspace.mlflow / "mlflow.db").unlink()
    found = examined(workspace)
    assert found.problems == [] and found.facts["mlflow"]["champion"] is None
    assert not (workspace.mlflow / "mlflow.db").exists()
