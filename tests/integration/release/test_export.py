"""A release leaves as plain PEFT directories, and an adapter of plain PEFT comes in: real MLflow, git and DVC."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.steps import release as releasing
from moa.base import load
from moa.core import config, digests
from moa.core.errors import ArtifactError, ConfigError, DataError, RegistryError, UsageError
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.experts import train
from moa.mixture import assemble
from moa.release import export as exporting
from moa.release.champion import open_mixture
from moa.release.registry import Registry
from moa.reports import facts as report_facts
from moa.reports import page as report_page
from moa.workspace import import_expert
from moa.workspace import plan as planning
from moa.workspace.pipeline import Pipeline
from tests import tiny

QUESTION = [{"role": "user", "content": "alpha: what is alpha 3 of 832?"}]
STAGES = ["base", "prepare@alpha", "prepare@beta", "train@alpha", "train@beta", "assemble", "evaluate"]


def moa(workspace: Workspace, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, from beside the workspace."""
    return subprocess.run([sys.executable, "-m", "moa", "--workspace", workspace.root.name, *words], text=True,
                          capture_output=True, check=False, cwd=workspace.root.parent)


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MOA_DTYPE", "float32")
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Built, recorded in DVC, and released as version 1: in this process, for speed."""
    return tiny.released(tmp_path_factory.mktemp("released") / "workspace")


@pytest.fixture
def workspace(built: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy to change. MLflow keeps whole paths, so files of releases go where the first workspace's are."""
    copied = tmp_path / "workspace"
    shutil.copytree(built.root, copied, symlinks=True)
    monkeypatch.chdir(copied)
    return Workspace(copied)


def read(workspace: Workspace) -> config.Config:
    return config.load(workspace.params)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


# Out.

def test_exported_experts_are_the_mixtures_in_plain_peft(workspace: Workspace, tmp_path: Path) -> None:
    from peft import PeftModel

    done = exporting.export(workspace, read(workspace), tmp_path / "out", "peft")
    manifest = read_json(tmp_path / "out" / MANIFEST)
    assert manifest["release"] == {"name": "moa-mixture", "version": 1,
                                   "digest": read_json(workspace.mixture / MANIFEST)["digest"]}
    mixture = open_mixture(workspace.mixture, workspace)
    ids = mixture.encoder.prompt(QUESTION)
    for number, label in enumerate(mixture.labels):
        entry = manifest["experts"][label]
        folder = tmp_path / "out" / entry["path"]
        assert entry["path"] == f"{label}-{entry['digest'][:12]}" and entry["rank"] == 2
        assert digests.of_expert(folder) == entry["digest"] == mixture.experts[label]
        with mixture._using([number]):
            wanted = logits(mixture.base.model, ids)
        plain = PeftModel.from_pretrained(load.load(workspace, read(workspace).base).model, folder).eval()
        torch.testing.assert_close(logits(plain, ids), wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wanted, logits(mixture.base.model, ids), atol=1e-4)   # experts do something
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(each["path"] for each in manifest["experts"].values()), "router.safetensors", "router.json", MANIFEST}
    assert done["command"] is None


def test_an_exported_router_decides_from_its_two_files(workspace: Workspace, tmp_path: Path) -> None:
    """As its own words say: standardise a level, multiply, softmax. No moa code but for the features."""
    from safetensors.torch import load_file

    exporting.export(workspace, read(workspace), tmp_path / "out", "peft")
    tensors, facts = (load_file(tmp_path / "out/router.safetensors"), read_json(tmp_path / "out/router.json"))
    mixture = open_mixture(workspace.mixture, workspace)
    found = mixture._features([QUESTION], None)[0]
    level = facts["reads_level"]
    heard = (found[level] - tensors["mean"][level]) / tensors["scale"][level]
    probabilities = ((tensors["weight"][level] @ heard + tensors["bias"][level]) / facts["temperature"]).softmax(-1)
    decision, = mixture.route([QUESTION])
    assert facts["labels"][int(probabilities.argmax())] == decision.domain
    assert float(probabilities.max()) == pytest.approx(decision.confidence, rel=1e-4)


def test_the_vllm_command_is_printed_and_kept(workspace: Workspace) -> None:
    done = moa(workspace, "export", "out", "--format", "vllm")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    folder = workspace.root.parent / "out"
    names = [each["path"] for each in read_json(folder / MANIFEST)["experts"].values()]
    assert words == ["vllm", "serve", str(workspace.root / "tiny-base"), "--enable-lora", "--lora-modules",
                     *(f"{name}={folder / name}" for name in names), "--max-lora-rank", "8"]
    fake = workspace.root.parent / "bin"
    fake.mkdir()
    (fake / "vllm").write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    (fake / "vllm").chmod(0o700)
    run = subprocess.run(["sh", str(folder / exporting.SCRIPT), "--port", "8001"], text=True, capture_output=True,
                         check=True, env={**os.environ, "PATH": f"{fake}:{os.environ['PATH']}"}, cwd="/")
    where, *given = run.stdout.splitlines()
    assert where == str(folder) and given[-2:] == ["--port", "8001"]
    assert given[:-2] == ["serve", words[2], "--enable-lora", "--lora-modules", *(f"{name}={name}" for name in names),
                          "--max-lora-rank", "8"]


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder: name a new one"):
        exporting.export(workspace, read(workspace), tmp_path / "full", "peft")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(UsageError, match="--format gguf is not known"):
        exporting.export(workspace, read(workspace), tmp_path / "out", "gguf")
    with pytest.raises(RegistryError, match="no version 7; its versions: 1"):
        exporting.export(workspace, read(workspace), tmp_path / "out", "peft", 7)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="name another folder"):
        exporting.export(workspace, read(workspace), tmp_path / "file" / "out", "peft")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    exporting.export(workspace, read(workspace), tmp_path / "empty", "peft", 1)
    assert (tmp_path / "empty" / MANIFEST).is_file()


# In.

def trained_elsewhere(workspace: Workspace, folder: Path, **options: Any) -> Path:
    """An adapter as plain PEFT saves it after a step of plain PyTorch."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(workspace.root / "tiny-base"), LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **options}))
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=5.0)
    ids = torch.tensor([[5, 9, 40, 41, 2]])
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def planned(workspace: Workspace) -> dict[str, tuple[str, ...]]:
    """What DVC finds stale itself, and why."""
    return {name: tuple(reason.text for reason in reasons)
            for name, reasons in Pipeline(workspace).snapshot().stale.items()}


def test_an_imported_expert_is_fresh_until_what_it_is_measured_on_changes(workspace: Workspace,
                                                                          tmp_path: Path) -> None:
    outside = trained_elsewhere(workspace, tmp_path / "outside")
    assert planned(workspace) == {}
    done = moa(workspace, "expert", "import", str(outside), "--domain", "beta")
    assert done.returncode == 0, done.stderr
    assert "rank 3, q_proj, up_proj" in done.stdout and "only its shapes could be compared" in done.stdout
    manifest = read_json(workspace.expert("beta") / MANIFEST)
    assert manifest["source"] == "imported" and manifest["digest"] == digests.of_expert(workspace.expert("beta"))
    assert manifest["corpus"] == read_json(workspace.corpus("beta") / MANIFEST)["digest"]
    assert planned(workspace) == {"assemble": ("data/experts changed",)}
    shown = moa(workspace, "plan")
    assert shown.returncode == 0 and "train@beta" not in shown.stdout and "assemble" in shown.stdout
    # The steps after it take it as it is, and training finds nothing to do.
    before = (workspace.expert("beta") / "adapter_model.safetensors").read_bytes()
    train.train(workspace, read(workspace), ["alpha", "beta"])
    assemble.assemble(workspace, read(workspace))
    assert (workspace.expert("beta") / "adapter_model.safetensors").read_bytes() == before
    same_as_peft(workspace, outside)
    release(workspace)
    # Later changes make it stale as any other.
    text = workspace.params.read_text()
    workspace.params.write_text(text.replace("rank: 2", "rank: 4"))
    assert "parameter train changed" in planned(workspace)["train@beta"]
    changed = config.load(workspace.params)
    plan = planning.make_plan(Pipeline(workspace).snapshot(), changed, planning.Statistics.read(workspace, changed))
    assert plan.imported == ("beta",) and "Imported, and replaced if it is trained here: beta." in plan.text()
    assert not train.finished(workspace, changed, "beta")
    workspace.params.write_text(text)
    rows = workspace.raw("beta") / "rows.jsonl"
    rows.write_text(rows.read_text() + json.dumps(tiny.row("beta", 77)) + "\n")
    snapshot = Pipeline(workspace).snapshot()
    assert "prepare@beta" in snapshot.stale and "train@beta" in snapshot.affected


def test_dvc_brings_the_imported_expert_back_and_not_the_one_trained_before(workspace: Workspace,
                                                                            tmp_path: Path) -> None:
    done = import_expert.import_adapter(workspace, trained_elsewhere(workspace, tmp_path / "outside"), "beta")
    shutil.rmtree(workspace.expert("beta"))
    pipeline = Pipeline(workspace)
    with pipeline.lock():
        assert [reason.kind for reason in pipeline.stale(["train@beta"])["train@beta"]] == ["restore"]
        pipeline.reproduce("train@beta", lambda _: None)
    assert read_json(workspace.expert("beta") / MANIFEST)["digest"] == done["digest"]


def release(workspace: Workspace) -> None:
    """Registered as any other, and said to be imported; the mixture's run keeps the page that was true then."""
    registry = Registry(workspace, read(workspace))
    versions = {domain: registry.register_expert(domain) for domain in ("alpha", "beta")}
    assert [versions[domain].version for domain in ("alpha", "beta")] == [1, 2]
    run = registry.client.get_run(versions["beta"].run_id)
    assert run.data.tags["moa.source"] == "imported" and "best_epoch" not in run.data.params
    released = releasing.register_mixture(workspace, read(workspace), versions)
    assert released.version == 2
    page = next(Path(registry.client.get_run(released.run_id).info.artifact_uri.removeprefix("file://"))
                .glob("report.html")).read_text()
    assert "champion (version 1)" in page and "challenger (this workspace)" in page and "beta (imported)" in page


def same_as_peft(workspace: Workspace, outside: Path) -> None:
    from peft import PeftModel

    mixture = open_mixture(workspace.mixture, workspace)
    ids = mixture.encoder.prompt(QUESTION)
    with mixture._using([mixture.labels.index("beta")]):
        answered = logits(mixture.base.model, ids)
    plain = PeftModel.from_pretrained(load.load(workspace, read(workspace).base).model, outside).eval()
    torch.testing.assert_close(answered, logits(plain, ids), rtol=1e-4, atol=1e-5)


def test_an_exported_expert_comes_in_by_its_bases_digest(workspace: Workspace, tmp_path: Path) -> None:
    done = exporting.export(workspace, read(workspace), tmp_path / "out", "peft")
    alpha = done["experts"]["alpha"]
    taken = import_expert.import_adapter(workspace, tmp_path / "out" / alpha["path"], "beta")
    assert taken["base"]["compared_by"] == "digest" and taken["digest"] == alpha["digest"]
    assert "Its base is this workspace's, by digest." in import_expert.text(taken)
    manifest = read_json(tmp_path / "out" / alpha["path"] / MANIFEST)
    manifest["base"]["template"] = "0" * 64
    write_json(tmp_path / "out" / alpha["path"] / MANIFEST, manifest)
    with pytest.raises(ArtifactError, match=r"the template of this workspace's base \(path:tiny-base\) differ"):
        import_expert.import_adapter(workspace, tmp_path / "out" / alpha["path"], "beta")


def state(workspace: Workspace) -> dict[str, bytes]:
    """All that an import may change, and leftovers of it."""
    found = {str(path): path.read_bytes() for path in sorted(workspace.data.rglob("*")) if path.is_file()}
    return found | {"dvc.lock": (workspace.root / "dvc.lock").read_bytes()}


def test_a_refused_or_broken_import_changes_nothing(workspace: Workspace, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    outside = trained_elsewhere(workspace, tmp_path / "outside")
    before = state(workspace)
    done = moa(workspace, "expert", "import", str(outside), "--domain", "gamma")
    assert done.returncode == 1 and "run `moa domain add gamma FILE` first" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match="No domain 'gamma'"):
        import_expert.import_adapter(workspace, outside, "gamma")
    with monkeypatch.context() as patched:
        def crash(*_: Any) -> None:
            (workspace.root / "dvc.lock").write_text("cut o")
            raise KeyboardInterrupt

        patched.setattr(Pipeline, "record", crash)
        with pytest.raises(KeyboardInterrupt):
            import_expert.import_adapter(workspace, outside, "beta")
    assert state(workspace) == before and not workspace.journal.exists()
    rows = workspace.raw("beta") / "rows.jsonl"
    rows.write_text(rows.read_text() + json.dumps(tiny.row("beta", 78)) + "\n")
    with pytest.raises(DataError, match="run `moa domain check beta` first, which prepares it"):
        import_expert.import_adapter(workspace, outside, "beta")


# The page.

def test_the_report_of_a_released_workspace(workspace: Workspace, tmp_path: Path) -> None:
    done = moa(workspace, "report", "--html", "page.html")
    assert done.returncode == 0, done.stderr
    text = (workspace.root.parent / "page.html").read_text()
    assert "champion (version 1)" in text and "routing tax" in text
    assert "challenger" not in text   # the mixture here is the champion
    facts = report_facts.gather(workspace, read(workspace))
    assert facts["challenger"] is None and set(facts["champion"]["scores"]) == {"alpha", "beta"}
    summary = read_json(workspace.reports / "summary.json")
    for domain, systems in facts["champion"]["scores"].items():
        for system, figures in systems.items():
            low, high = figures["loss_interval"]
            assert figures["loss"] == summary["domains"][domain][system]["loss"]
            assert low <= figures["loss"] <= high
        cost = facts["champion"]["tax"][domain]
        assert cost["loss"] == pytest.approx(systems["routed"]["loss"] - systems["forced"]["loss"], abs=1e-9)
    manifest = read_json(workspace.mixture / MANIFEST)
    write_json(workspace.mixture / MANIFEST, {**manifest, "digest": "e" * 64})
    facts = report_facts.gather(workspace, read(workspace))
    assert facts["challenger"]["digest"] == "e" * 64
    assert "challenger (this workspace)" in report_page.render(facts)
