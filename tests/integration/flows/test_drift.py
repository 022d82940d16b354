"""Kept prompts looked at: the command in a process of its own, and the flow under a real Prefect server, over a real
release of a tiny base."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows import prefect_server
from flows.steps import event_log, release
from moa.base import pin
from moa.core import config
from moa.core.config import Config
from moa.core.errors import ArtifactError, PipelineError
from moa.core.paths import Workspace
from moa.data import prepare
from moa.experts import train
from moa.mixture.assemble import assemble
from moa.mixture.mixture import Mixture
from moa.release.champion import champion, open_mixture
from moa.serving import prompt_log
from moa.serving.prompt_log import LoggedPrompt, PromptLogger
from tests import tiny
from tests.waiting import until

DOMAINS = ("alpha", "beta")
Released = tuple[Workspace, Config, Mixture]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    """A champion of two domains, and it at work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOA_DTYPE", "float32")
        patch.delenv("MOA_API_KEY", raising=False)
        workspace = tiny.workspace(
            tmp_path_factory.mktemp("drift"), DOMAINS, rows=200,
            train={"rank": 2, "alpha": 4.0, "epochs": 1, "rows_per_epoch": 4, "validation_rows": 2},
            drift={"min_prompts": 40, "cluster": 10})
        for domain in DOMAINS:   # numbers of three digits, as those of the prompts below
            (workspace.raw(domain) / "rows.jsonl").write_text("".join(
                json.dumps(tiny.row(domain, number)) + "\n" for number in range(300, 500)), encoding="utf-8")
        loaded = config.load(workspace.params)
        pin.fetch(workspace, loaded.base)
        for domain in DOMAINS:
            prepare.prepare(workspace, loaded, domain)
        train.train(workspace, loaded, DOMAINS)
        assemble(workspace, loaded)
        release.register_mixture(workspace, loaded, release.register_experts(workspace, loaded))
        release.promote(workspace, loaded, 1, "first release")
        yield workspace, loaded, open_mixture(champion(workspace, loaded)[1], workspace)


@pytest.fixture
def workspace(released: Released) -> Workspace:
    """The same with nothing kept and nothing noted."""
    found = released[0]
    shutil.rmtree(prompt_log.folder(found), ignore_errors=True)
    found.event_log.unlink(missing_ok=True)
    return found


def questions(domain: str, numbers: range) -> list[str]:
    return [tiny.row(domain, number)["instruction"] for number in numbers]


def serve(released: Released, texts: Sequence[str], **changed: Any) -> None:
    """Keep these prompts as a server does that was asked them."""
    workspace, loaded, mixture = released
    version = champion(workspace, loaded)[0]
    keeper = PromptLogger(workspace, 1, loaded.drift.redact)
    messages = [[{"role": "user", "content": text}] for text in texts]
    for place, (asked, decision) in enumerate(zip(messages, mixture.route(messages), strict=True)):
        keeper.keep(LoggedPrompt(**{
            "at": time.time() + place / 1000, "release": version.version, "digest": version.digest, "messages": asked,
            "cut": False, "domain": decision.domain, "forced": False, "abstained": decision.abstained,
            "score": decision.score, "confidence": decision.confidence} | changed))
    keeper.close()


def verdicts(report: dict[str, Any]) -> dict[str, str]:
    return {measure["name"]: measure["verdict"] for measure in report["measures"]}


FAMILIAR = [*questions("alpha", range(200, 245)), *questions("beta", range(200, 240))]
STRANGE = questions("gamma", range(30))


# The check.

def test_familiar_prompts_are_stable_and_named_domains_are_left_out(workspace: Workspace, released: Released) -> None:
    from moa.serving.drift import check

    serve(released, FAMILIAR)
    serve(released, STRANGE, forced=True, score=None, confidence=None, abstained=False, domain="beta")
    serve(released, questions("beta", range(50)), release=7, digest="another release's")
    report = check(workspace, released[1])
    assert report["prompts"] | {"from": None, "to": None} == {
        "kept": 85 + 30 + 50, "of_champion": 85, "forced": 30, "compared": 85, "from": None, "to": None}
    assert verdicts(report) == {"score": "stable", "confidence": "stable", "abstention": "stable", "domains": "shifted"}
    assert report["missing"] == [] and report["validation"]["changed"] == []
    shares = next(m["reason"] for m in report["measures"] if m["name"] == "domains")   # the first half was all alpha
    assert re.search(r"most in (alpha, from 100\.0% to \d\.\d%|beta, from 0\.0% to (9\d\.\d|100\.0)%)$", shares)


def test_a_missing_domain_is_found_once_it_has_enough_different_prompts(workspace: Workspace,
                                                                        released: Released) -> None:
    from moa.serving.drift import check, drift_text

    serve(released, FAMILIAR)
    serve(released, STRANGE[:9] * 5)   # often asked, but nine questions
    report = check(workspace, released[1])
    assert report["prompts"]["of_champion"] == 85 + 45 and report["missing"] == []
    assert 9 <= report["abstained"]["distinct"] < 9 + 10

    serve(released, STRANGE[9:])
    report = check(workspace, released[1])
    (group,) = report["missing"]
    assert group["prompts"] == 30 and {one["domain"] for one in group["nearest"]} == set(DOMAINS)
    assert sum(one["probability"] for one in group["nearest"]) == pytest.approx(1)
    assert set(group["examples"]) <= set(STRANGE) and len(group["examples"]) == 3
    assert verdicts(report)["score"] == verdicts(report)["abstention"] == "shifted"
    assert "a domain may be missing: 30 prompts, nearest experts" in drift_text(report)
    assert check(workspace, released[1]) == report


def test_what_an_earlier_release_abstained_on_counts_only_as_long_as_it_is_strange(workspace: Workspace,
                                                                                   released: Released) -> None:
    from moa.serving.drift import check

    serve(released, [*STRANGE[:15], *FAMILIAR[:20]], release=7, digest="an earlier release", abstained=True)
    report = check(workspace, released[1])
    still = report["abstained"].pop("still")   # of the familiar ones the champion may abstain on one or two
    assert report["abstained"] == {"distinct": 35, "looked_at": 35} and 15 <= still <= 17
    assert [group["prompts"] for group in report["missing"]] == [15]
    assert set(verdicts(report).values()) == {"not enough data"}


def test_many_abstained_prompts_are_sampled_the_same_way_each_time(workspace: Workspace, released: Released,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from moa.serving import drift

    monkeypatch.setattr(drift, "SAMPLE", 20)
    serve(released, STRANGE)
    report = drift.check(workspace, released[1])
    assert report["abstained"] == {"distinct": 30, "looked_at": 20, "still": 20}
    assert drift.check(workspace, released[1]) == report


def test_what_it_is_compared_with_is_computed_once_a_release(workspace: Workspace, released: Released,
                                                             tmp_path: Path) -> None:
    from moa.serving.drift import check

    serve(released, FAMILIAR)
    shutil.rmtree(workspace.cache / "drift", ignore_errors=True)
    before = check(workspace, released[1])
    (kept,) = (workspace.cache / "drift").iterdir()
    corpora = workspace.data / "corpora"
    corpora.rename(tmp_path / "corpora")
    try:
        assert check(workspace, released[1]) == before
        kept.unlink()
        with pytest.raises(ArtifactError, match="None of the champion's domains has a prepared corpus here"):
            check(workspace, released[1])
        shutil.copytree(tmp_path / "corpora" / "alpha", workspace.corpus("alpha"))
        report = check(workspace, released[1])
        assert report["validation"]["changed"] == ["beta"]
        assert report["validation"]["rows"] < before["validation"]["rows"]
        kept.unlink()
    finally:
        shutil.rmtree(corpora, ignore_errors=True)
        (tmp_path / "corpora").rename(corpora)


# The server.

@contextmanager
def serving(workspace: Workspace, *words: str) -> Iterator[str]:
    """`moa serve` as a process; yields where."""
    process = subprocess.Popen([sys.executable, "-m", "moa", "serve", "--port", "0", *words], cwd=workspace.root,
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        process.stdout.close()


def test_a_server_keeps_what_it_was_asked(workspace: Workspace, released: Released) -> None:
    from moa.serving.state import Settings

    _, loaded, mixture = released
    assert Settings().keep == loaded.drift.keep == 0   # only where somebody asks for it
    asked = [FAMILIAR[0], STRANGE[0], "beta: write to jo@example.org", FAMILIAR[1]]
    with serving(workspace, "--keep-prompts", "1") as url:
        for number, text in enumerate(asked):
            body = {"model": "moa/beta" if number == 2 else "moa", "max_tokens": 2, "stream": number == 1,
                    "messages": [{"role": "user", "content": text}]}
            assert httpx.post(f"{url}/chat/completions", json=body, timeout=None).status_code == 200
    kept = list(prompt_log.read(workspace))
    assert [each.text for each in kept] == [*asked[:2], "beta: write to [EMAIL]", asked[3]]
    version = champion(workspace, loaded)[0]
    assert {(each.release, each.digest) for each in kept} == {(1, version.digest)}
    assert [each.forced for each in kept] == [False, False, True, False]
    assert (kept[2].domain, kept[2].score, kept[2].abstained) == ("beta", None, False)
    for each in (kept[0], kept[1], kept[3]):
        (decision,) = mixture.route([each.messages])
        assert (each.domain, each.abstained) == (decision.domain, decision.abstained)
        assert (each.score, each.confidence) == pytest.approx((decision.score, decision.confidence))
    assert [each.abstained for each in kept] == [False, True, False, False]


# The flow.

def events(url: str, name: str) -> list[Any]:
    """What Prefect has of these events once there are any: they are sent, and stored, in the background."""
    from prefect.client.orchestration import get_client

    prefect_server.Server(url).settle()
    asked = {"filter": {"event": {"name": [name]}}, "limit": 50}
    with get_client(sync_client=True) as client:
        return until(lambda: list(client._client.post("/events/filter", json=asked).json()["events"]))


def test_the_flow_tells_prefect_and_the_ledger(prefect_url: str, workspace: Workspace, released: Released) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    from flows.drift import drift, record_verdict

    serve(released, [*FAMILIAR, *STRANGE])
    report = drift(str(workspace.root))
    assert report is not None and report["verdict"] == "shifted" and len(report["missing"]) == 1

    (line,) = event_log.read(workspace, kinds=["drift"])
    assert line["verdict"] == "shifted" and line["release"] == 1 and "abstention" in line["shifted"]
    assert "a domain may be missing: 30 prompts" in event_log.text([line])
    assert record_verdict(workspace, report) is None   # the same again is no news
    assert (record_verdict(workspace, report | {"missing": [], "verdict": "stable"}) or {})["n"] == line["n"] + 1
    assert (record_verdict(workspace, report) or {})["n"] == line["n"] + 2

    resource = {"prefect.resource.id": "moa.release.1", "prefect.resource.name": "moa-mixture version 1"}
    (look,) = events(prefect_url, "moa.drift")
    assert resource.items() <= look["resource"].items() and look["payload"]["verdict"] == "shifted"
    (missing,) = events(prefect_url, "moa.domain.missing")
    assert resource.items() <= missing["resource"].items() and missing["payload"]["prompts"] == 30
    assert set(missing["payload"]["examples"]) <= set(STRANGE)
    with get_client(sync_client=True) as client:
        newest = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["moa-drift"])),
                                       sort=ArtifactSort.UPDATED_DESC, limit=1)[0]
    assert "A domain may be missing: 30 prompts" in str(newest.data) and "| abstention | shifted |" in str(newest.data)
    assert newest.description == "moa-mixture version 1: shifted; a domain may be missing"


def test_before_the_first_release_there_is_nothing_to_say(prefect_url: str, tmp_path: Path) -> None:
    from flows.drift import check, drift

    assert prefect_url
    empty = tiny.workspace(tmp_path / "w")
    assert drift(str(empty.root)) is None
    assert event_log.read(empty) == []
    with pytest.raises(PipelineError, match="could not be looked at: Nothing has been released yet, so there is no"):
        check(empty)   # the command's own words
