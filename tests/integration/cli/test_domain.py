"""A domain is checked on what is really prepared, and a row is found wherever it is: real DVC, real MLflow."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moa.base import pin
from moa.core import config, digests
from moa.core.errors import UsageError
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import overlap
from moa.release.lineage import dvc_outputs
from moa.release.registry import Registry
from moa.reports import quality, row_lookup
from moa.workspace.data_versions import DataVersions
from moa.workspace.domains import check
from tests import tiny

BASE = {"digest": "b" * 64, "weights": "w", "tokenizer": "t", "template": "c", "source": "path:toy"}
SECRET = "Write to ada@mail.example about the harbour, the lighthouse and every ship that ever came in."
LONG = " ".join(f"{number:x}" for number in range(60))


def moa(workspace: Workspace, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, from beside the workspace."""
    return subprocess.run([sys.executable, "-m", "moa", "--workspace", workspace.root.name, *words], text=True,
                          capture_output=True, check=False, cwd=workspace.root.parent)


def write(workspace: Workspace, domain: str, rows: list[Any]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (workspace.raw(domain) / "rows.jsonl").write_text("\n".join(lines) + "\n")


def own_rows(domain: str) -> list[Any]:
    """Forty rows of the domain alone: questions of other letters than the other domain's."""
    letters = {"alpha": "abcdefg", "beta": "tuvwxyz"}[domain]
    return [{"instruction": " ".join(letters[(number * step) % 7] * (1 + number % step) for step in range(2, 9)) +
             f" {letters[number % 7]}{letters[number // 7]}", "output": f"{domain} {number}"} for number in range(40)]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Two domains, in raw rows of every fate. To be copied."""
    root = tmp_path_factory.mktemp("checked") / "workspace"
    made = tiny.workspace(root, ("alpha", "beta"), prepare={"validation": 0.2, "test": 0.2, "min_rows": 10,
                                                            "redact": ["email"]})
    write(made, "alpha", [
        *own_rows("alpha"), *own_rows("beta")[:6], {"instruction": SECRET, "output": "Done."},
        own_rows("alpha")[0], {"instruction": "what has no answer"},
        {"instruction": LONG, "output": "Little."}, {"instruction": f"{LONG} or", "output": "Little."}])
    write(made, "beta", own_rows("beta"))
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield made


@pytest.fixture(scope="module")
def checked(raw: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Both domains prepared. To be copied."""
    made = copied(raw, tmp_path_factory.mktemp("both"))
    for domain in ("alpha", "beta"):
        check(made, config.load(made.params), domain, [].append)
    return made


@pytest.fixture
def unprepared(raw: Workspace, tmp_path: Path) -> Workspace:
    return copied(raw, tmp_path)


@pytest.fixture
def workspace(checked: Workspace, tmp_path: Path) -> Workspace:
    return copied(checked, tmp_path)


def copied(workspace: Workspace, folder: Path) -> Workspace:
    return Workspace(shutil.copytree(workspace.root, folder / "workspace", symlinks=True))


def which(workspace: Workspace, words: str) -> dict[str, Any]:
    return row_lookup.which(workspace, config.load(workspace.params), words)


def test_before_anything_is_prepared_a_row_is_found_in_its_file(unprepared: Workspace) -> None:
    row, = which(unprepared, "THE  harbour,\nthe LIGHTHOUSE")["rows"]
    assert row["places"] == ["data/raw/alpha/rows.jsonl:47"]
    assert (row["split"], row["why"], row["releases"]) == (None, "the domain was not prepared yet", [])
    assert not unprepared.mlflow.exists()   # asking makes no database


def test_check_prepares_one_domain_and_says_that_it_is_alone(unprepared: Workspace) -> None:
    workspace = unprepared
    done = moa(workspace, "domain", "check", "alpha", "--json", "--html", "report/alpha.html")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["base", "prepare@alpha"]
    assert not workspace.corpus("beta").exists()
    report = json.loads(done.stdout)
    assert report["rows"]["read"] == 51
    assert report["rows"]["read"] == sum(report["rows"][key] for key in ("kept", "rejected", "duplicates"))
    assert (report["rows"]["near_duplicates"], report["redacted"]) == (1, {"email": 1})
    assert report["rejected"][0]["example"]["line"] == 49
    assert report["across"]["neighbours"] is None and report["across"]["not_prepared"] == ["beta"]
    assert re.match(r"alpha: \d+ test groups are too few for a verdict", report["power"])
    assert re.match(r"The gate cannot judge alpha: its test rows are \d+ groups, and 20 are needed\.",
                    report["warnings"][-1])
    assert re.match(r"alpha: of fresh prompts at most \d+\.\d\d% are left to the base .* more groups\.",
                    report["promise"])
    assert (workspace.root.parent / "report/alpha.html").read_text().startswith("<!doctype html>")


def test_check_finds_what_two_domains_share(unprepared: Workspace) -> None:
    workspace = unprepared
    check(workspace, config.load(workspace.params), "alpha", [].append)
    done = moa(workspace, "domain", "check", "beta", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["prepare@beta", "..."]   # the base and alpha are fresh
    across = json.loads(done.stdout)["across"]
    assert across["duplicates"]["domains"]["alpha"]["count"] == across["duplicates"]["count"] == 6
    assert across["duplicates"]["examples"][0]["text"].startswith(("t", "u", "v", "w", "x", "y", "z"))
    assert across["neighbours"]["told_apart"].keys() == {"alpha"}
    ran: list[str] = []
    report = check(workspace, config.load(workspace.params), "alpha", ran.append)
    assert ran == []
    assert "! 6 rows stand in beta too, word for word" in quality.text(report)
    strange = report["across"]["neighbours"]
    learned = {row["id"] for row in which(workspace, "beta ")["rows"] if (row["domain"], row["split"]) == (
        "alpha", "train")}
    assert {each["id"] for each in strange["examples"] if each["looks_like"] == "beta"} <= learned
    assert strange["domains"] == ({"beta": len(learned)} if learned else {})


@pytest.mark.parametrize(("words", "places", "why"), [
    (own_rows("alpha")[0]["instruction"], [1, 48], None),
    ("what has no answer", [49], "rejected: output is missing"),
    ("ada@mail.example", [47], None),
    ("Write to [EMAIL] about", [47], None),
])
def test_every_fate_of_a_row_is_told(workspace: Workspace, words: str, places: list[int], why: str | None) -> None:
    row, = which(workspace, words)["rows"]
    assert row["domain"] == "alpha"
    assert row["places"] == [f"data/raw/alpha/rows.jsonl:{place}" for place in places]
    assert row["why"] == why
    assert (row["split"] in ("train", "validation", "test")) == (why is None)


def test_a_near_duplicate_names_the_row_that_stands_for_it(workspace: Workspace) -> None:
    kept, left = sorted(which(workspace, LONG)["rows"], key=lambda row: row["split"] is None)
    assert left["why"] == f"a near-duplicate of {kept['id']} in {kept['split']}"
    assert which(workspace, kept["id"][:8])["rows"] == which(workspace, kept["id"])["rows"] == [kept]


def test_words_that_mean_nobody_are_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="too short"):
        which(workspace, " a ")
    monkeypatch.setattr(row_lookup, "MOST", 10)
    with pytest.raises(UsageError, match="more than 10 rows"):
        which(workspace, "alpha")


def test_nowhere_is_an_exit_code_of_its_own(workspace: Workspace) -> None:
    done = moa(workspace, "domain", "which", "no such text", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["found"] is False
    done = moa(workspace, "domain", "which", "no such text")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == "Nowhere in the raw files and corpora of alpha, beta, nor in the corpora of 0 releases.\n"


# Releases.

def release(workspace: Workspace) -> int:
    """Register a mixture whose experts, a few bytes each, say that they learned from the corpora as they are."""
    settings = config.load(workspace.params)
    pinned = {}
    for domain in settings.domains:
        folder = workspace.expert(domain)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        corpus = read_json(workspace.corpus(domain) / MANIFEST)["digest"]
        (folder / "adapter_model.safetensors").write_bytes(corpus.encode())
        pinned[domain] = digests.of_files(sorted(folder.iterdir()), folder)
        write_json(folder / MANIFEST, {
            "kind": "expert", "domain": domain, "digest": pinned[domain], "base": BASE, "corpus": corpus, "rank": 2,
            "alpha": 4.0, "targets": ["q_proj"], "train": {}, "best_epoch": 1, "curve": []})
    shutil.rmtree(workspace.mixture, ignore_errors=True)
    for domain in pinned:
        shutil.copytree(workspace.expert(domain), workspace.mixture / "experts" / domain)
    facts = {"base": BASE["digest"], "labels": sorted(pinned), "experts": pinned, "router": {"weights": "r" * 64}}
    write_json(workspace.mixture / MANIFEST, {"kind": "mixture", "digest": digests.of_json(facts), **facts,
                                              "source": BASE["source"]})
    registry = Registry(workspace, settings)
    return registry.register_mixture({domain: registry.register_expert(domain) for domain in pinned}).version


def test_a_deleted_row_is_still_found_in_the_releases_that_hold_it(workspace: Workspace) -> None:
    assert release(workspace) == 1
    Registry(workspace, config.load(workspace.params)).set_champion(1, "the first", "a test")
    held, = which(workspace, "ada@mail.example")["rows"]
    assert held["releases"] == [{"version": 1, "split": held["split"], "champion": True}]
    rejected, = which(workspace, "what has no answer")["rows"]
    assert rejected["releases"] == []

    before = dvc_outputs(workspace)["data/corpora/alpha"]
    rows = (workspace.raw("alpha") / "rows.jsonl").read_text().splitlines()
    write(workspace, "alpha", [line for line in rows if "ada@" not in line])
    check(workspace, config.load(workspace.params), "alpha", [].append)
    assert release(workspace) == 2
    gone, = which(workspace, held["id"])["rows"]
    assert (gone["places"], gone["split"]) == ([], None)
    assert gone["why"] == "it is gone from data/raw, but releases hold it"
    assert gone["releases"] == held["releases"]
    text = row_lookup.text(which(workspace, "the lighthouse and every ship"))
    did = {"train": "learned from it", "validation": "was validated on it", "test": "was tested on it"}
    assert f"  no longer in data/raw\n  release 1 (champion) {did[held['split']]}" in text
    still, = which(workspace, own_rows("alpha")[3]["instruction"])["rows"]
    assert [each["version"] for each in still["releases"]] == [1, 2]

    # Without the old corpus nobody can say: that is said.
    cached = DataVersions(workspace).cached(before)
    assert {MANIFEST, "train.parquet", "quality.json"} <= cached.keys()
    cached["train.parquet"].unlink()
    done = moa(workspace, "domain", "which", held["id"])
    assert done.returncode == 1
    assert done.stdout.endswith("release 1, alpha: unknown, its corpus is not in this cache\n")


def test_a_corpus_that_cannot_be_prepared_is_one_sentence(workspace: Workspace) -> None:
    write(workspace, "beta", ["oops"] * 40)
    done = moa(workspace, "domain", "check", "beta")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("moa: prepare@beta failed: Domain 'beta': 40 of 40 rows cannot be")
    assert moa(workspace, "domain", "check", "gamma").stderr.startswith("moa: No domain 'gamma' in params.yaml")


# The neighbours' ground.

@pytest.mark.parametrize("architecture", sorted(tiny.ARCHITECTURES))
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_the_input_embeddings_are_read_without_a_model(tmp_path: Path, architecture: str, shard: str) -> None:
    from transformers import AutoModelForCausalLM

    tiny.base(tmp_path / "tiny-base", architecture=architecture)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-base")
    model.save_pretrained(tmp_path / "tiny-base", max_shard_size=shard)
    if shard == "10KB":
        (tmp_path / "tiny-base/model.safetensors").unlink(missing_ok=True)
        assert len(list((tmp_path / "tiny-base").glob("model-*.safetensors"))) > 1
    place = Workspace(tmp_path)
    pin.fetch(place, config.BaseParams(source="path:tiny-base"))
    ids = np.array([0, 7, 200])
    found = overlap.embeddings(tmp_path / "tiny-base", ids)
    assert np.array_equal(found, model.get_input_embeddings().weight.detach().float().numpy()[ids])
