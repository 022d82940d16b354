"""moa.graph and moa.workspace.plan: pure, so checked over random graphs."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.core.config import Config
from moa.core.errors import UsageError
from moa.core.files import write_json
from moa.core.paths import MANIFEST, Workspace
from moa.workspace import plan
from moa.workspace.stage_graph import CHANGED, Graph, Reason, Snapshot, Stage

CHANGE = (Reason(CHANGED, "data/raw/x changed"),)


def config(**train: Any) -> Config:
    return Config.model_validate({"base": {"source": "path:x"}, "domains": {"math": {"metric": "m"},
                                 "sql": {"metric": "m"}}, "train": train})


def pipeline(*stale: str) -> Snapshot:
    upstream = {"assemble": ["train@math", "train@sql"], "evaluate": ["assemble"]}
    for domain in ("math", "sql"):
        upstream |= {f"prepare@{domain}": ["base", f"quickstart@{domain}"], f"train@{domain}": [f"prepare@{domain}"]}
    names = {*upstream, *(name for above in upstream.values() for name in above)}
    return Snapshot(Graph([Stage(name, "true") for name in sorted(names)], upstream), dict.fromkeys(stale, CHANGE))


@st.composite
def snapshots(draw: st.DrawFn) -> tuple[dict[str, list[str]], set[str]]:
    names = [f"s{number}" for number in range(draw(st.integers(1, 9)))]
    upstream = {name: draw(st.lists(st.sampled_from(names[:number]), unique=True)) if number else []
                for number, name in enumerate(names)}
    return upstream, draw(st.sets(st.sampled_from(names)))


def reachable(upstream: dict[str, list[str]], name: str, stale: set[str]) -> bool:
    """By definition: stale itself, or reads from something that is."""
    return name in stale or any(reachable(upstream, above, stale) for above in upstream[name])


@settings(deadline=None)   # the first example imports networkx
@given(snapshots())
def test_every_descendant_of_a_stale_step_and_nothing_else(case: tuple[dict[str, list[str]], set[str]]) -> None:
    upstream, stale = case
    snapshot = Snapshot(Graph([Stage(name, "true") for name in upstream], upstream), dict.fromkeys(stale, CHANGE))
    made = plan.make_plan(snapshot, config(), plan.Statistics())
    assert {step.name for step in made.stale} == {name for name in upstream if reachable(upstream, name, stale)}
    assert {step.name for step in made.steps if step.state == "stale"} == stale
    order = [step.name for step in made.steps]
    assert sorted(order) == sorted(upstream)
    assert all(order.index(above) < order.index(name) for name in upstream for above in upstream[name])
    assert all(step.reasons for step in made.stale)


def test_reasons_experts_and_release() -> None:
    made = plan.make_plan(pipeline("quickstart@math"), config(), plan.Statistics())
    assert [(step.name, step.state) for step in made.stale] == [
        ("quickstart@math", "stale"), ("prepare@math", "maybe"), ("train@math", "maybe"), ("assemble", "maybe"),
        ("evaluate", "maybe")]
    assert made.stale[0].reasons == ("data/raw/x changed",)
    assert made.stale[1].reasons == ("upstream quickstart@math will run",)
    assert made.experts == ("math",) and made.router and made.release
    assert "train@math" in made.text() and "train@sql" not in made.text()
    assert made.as_dict()["fresh"] == 4 and made.power == ()


def test_it_says_what_the_gate_can_tell_of_the_experts_to_be_trained() -> None:
    manifest = {"groups": {"test": 59}, "rows": {"kept": 600, "train": 480},
                "tokens": {"prompt": {"mean": 50.0}, "completion": {"mean": 10.0}}}
    made = plan.make_plan(pipeline("train@math"), config(), plan.Statistics({"math": manifest, "sql": manifest}))
    assert [sentence.split(":")[0] for sentence in made.power] == ["math"]
    assert "math: 59 test groups can show a rise of loss from 0.043 nats on" in made.text()
    assert made.as_dict()["power"] == list(made.power)


@pytest.mark.parametrize("groups", [0, 12])
def test_it_names_a_domain_that_the_gate_cannot_judge_also_when_nothing_is_to_be_done(groups: int) -> None:
    enough = {"groups": {"test": 59}, "rows": {"kept": 600, "train": 480}, "tokens": {}}
    few = {"groups": {"test": groups}, "rows": {"kept": 120, "train": 96}, "tokens": {}}
    made = plan.make_plan(pipeline(), config(), plan.Statistics({"math": enough, "sql": few}))
    rows = {0: 200, 12: 80}[groups]
    assert made.power == (f"sql: {groups} test groups are too few for a verdict of the gate, which needs 20: about "
                          f"{rows} more rows.",)
    assert f"all 9 steps are fresh.\nWhat the gate can tell:\n  sql: {groups} test groups" in made.text()


def test_it_says_what_the_router_will_promise_in_every_prepared_domain() -> None:
    manifest = {"groups": {"train": 148, "validation": 17, "test": 59},
                "rows": {"kept": 224, "train": 148, "validation": 17}, "tokens": {}}
    statistics = plan.Statistics({"math": manifest, "sql": manifest}, promises={"math": {"groups": 9, "wanted": 0.01}})
    made = plan.make_plan(pipeline("train@math"), config(), statistics)
    assert [sentence.split(":")[0] for sentence in made.promises] == ["math", "sql"]
    assert "What the router can promise:\n  math: of fresh prompts at most 2.53% are left to the base" in made.text()
    assert made.as_dict()["promises"] == list(made.promises)
    many = Config.model_validate({"base": {"source": "path:x"}, "domains": {
        f"d{number}": {"metric": "m"} for number in range(40)}})
    corpora = dict.fromkeys(many.domains, manifest)
    assert len(plan.make_plan(pipeline("assemble"), many, plan.Statistics(corpora)).promises) == 2


def test_a_router_that_stays_keeps_its_recorded_promises() -> None:
    recorded = {"math": {"groups": 300, "wanted": 0.01, "share": 0.00994, "more": 0}}
    said = plan.make_plan(pipeline(), config(), plan.Statistics(promises=recorded)).text()
    assert said == ("Nothing to do: all 9 steps are fresh.\nWhat the router promises:\n  math: of fresh prompts at "
                    "most 0.99% are left to the base (95 % confidence, 300 groups).")
    assert "No prompt is left to the base" in plan.make_plan(pipeline(), config(), plan.Statistics(promises={})).text()
    assert plan.make_plan(pipeline(), config(), plan.Statistics()).promises == ()   # a router from before promises


def test_statistics_have_the_recorded_promises(tmp_path: Path) -> None:
    workspace, recorded = Workspace(tmp_path), {"math": {"groups": 300}}
    assert plan.Statistics.read(workspace, config()).promises is None
    for router, found in (({"promises": recorded}, recorded), ({"rule": "early"}, None)):
        write_json(workspace.mixture / MANIFEST, {"router": router})
        assert plan.Statistics.read(workspace, config()).promises == found


def test_it_says_that_an_epoch_leaves_rows_out() -> None:
    manifest = {"rows": {"train": 321}, "tokens": {}}
    params = {"base": {"source": "path:x"}, "domains": {"math": {"metric": "m"}, "sql": {"metric": "m"}}}
    for cap, said in ((80, "; of math only train.rows_per_epoch: 80 rows an epoch"), (400, ""), (None, "")):
        made = plan.estimate_training(("math",), Config.model_validate(params | {"train": {"rows_per_epoch": cap}}),
                                      plan.Statistics({"math": manifest}, {"train": 100.0}))
        assert made.basis == f"measured 100 tokens/s{said}"


def test_nothing_to_do() -> None:
    made = plan.make_plan(pipeline(), config(), plan.Statistics())
    assert not made.stale and not made.experts and not made.router and made.release is None
    assert made.estimate.tokens == 0 and "all 9 steps are fresh" in made.text()


def test_domains_limits_only_their_own_steps() -> None:
    snapshot = pipeline("quickstart@math", "quickstart@sql").limited(["sql"])
    made = plan.make_plan(snapshot, config(), plan.Statistics())
    assert {step.name for step in made.stale} == {"quickstart@sql", "prepare@sql", "train@sql", "assemble", "evaluate"}
    assert "train@math" in made.left_out and made.experts == ("sql",)


def test_force_by_step_and_by_stage() -> None:
    assert set(pipeline().forced(["train"]).stale) == {"train@math", "train@sql"}
    assert set(pipeline().forced(["train@sql"]).stale) == {"train@sql"}
    with pytest.raises(UsageError, match="No stage 'trian'"):
        pipeline().forced(["trian"])


@pytest.mark.parametrize(("train", "seen"), [({"epochs": 3}, 150), ({"epochs": 3, "rows_per_epoch": 20}, 60),
                                             ({"epochs": 1, "rows_per_epoch": 999}, 50)])
def test_tokens_are_rows_seen_times_mean_tokens(train: dict[str, int], seen: int) -> None:
    manifest = {"rows": {"train": 50}, "tokens": {"prompt": {"mean": 30.0}, "completion": {"mean": 12.5}}}
    statistics = plan.Statistics({"math": manifest}, {"train": 85.0})
    made = plan.estimate_training(("math",), config(**train), statistics)
    assert made.tokens == round(seen * 42.5)
    left_out = "; of math only train.rows_per_epoch: 20 rows an epoch" if seen == 60 else ""
    assert made.minutes == round(made.tokens / 85 / 60, 1) and made.basis == f"measured 85 tokens/s{left_out}"


def test_defaults_are_said() -> None:
    made = plan.estimate_training(("math", "sql"), config(epochs=2), plan.Statistics())
    assert made.tokens == 2 * 2 * plan.DEFAULT_ROWS * plan.DEFAULT_ROW_TOKENS
    assert "assuming 240 tokens/s" in made.basis and "120 tokens a row assumed" in made.basis
