"""New data of an old domain, through the gate, on real MLflow and a base that is tiny but learns.

Poison brings test rows of its own, on which who learned it looks better: the rows that the champion was tested on
decide."""

import json
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.steps import release
from moa.base import pin
from moa.core import config
from moa.core.config import Config
from moa.core.paths import Workspace
from moa.data import prepare
from moa.evaluation import comparison
from moa.evaluation.evaluate import evaluate, read_rows
from moa.experts import train
from moa.mixture.assemble import assemble
from moa.release.champion import compare_versions
from moa.release.registry import Registry
from tests import tiny

WORDS = {"alpha": (("red", "fire"), ("blue", "water"), ("green", "leaf"), ("black", "coal")),
         "beta": (("one", "uno"), ("two", "due"), ("six", "sei"), ("ten", "dieci"))}
ROWS = 160
Rows = list[dict[str, str]]


def rows(domain: str, numbers: Iterable[int], *, permuted: bool = False) -> Rows:
    """Questions whose answer depends on one word of theirs; permuted, each gets another question's answer."""
    words = WORDS[domain]
    return [{"instruction": " ".join([domain, domain, f"{number * 7919 % 997:03d}", *[words[number % 4][0]] * 3]),
             "output": words[(number + permuted) % 4][1]} for number in numbers]


class Shop:
    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.kept = workspace.root.with_name("kept")   # the workspace as it was when version 1 was released

    @property
    def settings(self) -> Config:
        return config.load(self.workspace.params)

    def arrive(self, domain: str, content: Rows, name: str = "arrived") -> None:
        self.workspace.raw(domain).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in content)
        (self.workspace.raw(domain) / f"{name}.jsonl").write_text(text, encoding="utf-8")

    @property
    def tested(self) -> dict[str, set[str]]:
        """Ids of the rows that version 1 was tested on."""
        found = comparison.tested(Registry(self.workspace, self.settings).download(1))
        assert found is not None
        return found

    def domains(self, *names: str) -> None:
        yaml = YAML()
        content = yaml.load(self.workspace.params)
        content["domains"] = {name: {"metric": "rouge_l"} for name in names}
        yaml.dump(content, self.workspace.params)

    def rebuild(self, *stale: str) -> dict[str, Any]:
        """What `moa run` does with these domains stale."""
        for domain in stale:
            prepare.prepare(self.workspace, self.settings, domain)
        train.train(self.workspace, self.settings, stale)
        assemble(self.workspace, self.settings)
        evaluate(self.workspace, self.settings)
        return release.release(self.workspace, self.settings)


def learner(folder: Path) -> None:
    """A tiny base whose experts can learn: an output layer that lets a token be certain."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(folder)
    tiny.base(folder, architecture="gpt_neox")
    weights = load_file(folder / "model.safetensors")
    weights["embed_out.weight"] *= 60
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Version 1 is champion. MLflow's database is not left open: `shop` puts another in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        yield _first(tmp_path_factory)


def _first(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    workspace = tiny.workspace(
        tmp_path_factory.mktemp("poison") / "first", tuple(WORDS), rows=1,
        train={"rank": 4, "alpha": 8.0, "epochs": 8, "learning_rate": 0.02, "batch_tokens": 1024,
               "validation_rows": 16},
        assemble={"max_abstention": 0.0}, evaluate={"generate_rows": 2, "max_new_tokens": 8},
        release={"min_rows": 10, "metric_rows": 12})
    learner(workspace.root / "tiny-base")
    shop = Shop(workspace)
    for domain in WORDS:
        shop.arrive(domain, rows(domain, range(ROWS)), "rows")
    pin.fetch(workspace, shop.settings.base)
    assert shop.rebuild(*WORDS)["champion"] == 1
    shutil.copytree(workspace.root, shop.kept, symlinks=True)
    return shop


@pytest.fixture
def shop(first: Shop) -> Shop:
    """As it was when version 1 was released, at the same path each time: MLflow's database names it."""
    shutil.rmtree(first.workspace.root)
    shutil.copytree(first.kept, first.workspace.root, symlinks=True)
    return first


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison, to save a start of Python."""
    monkeypatch.setattr("flows.steps.release.compare", lambda workspace, *versions: compare_versions(
        workspace, config.load(workspace.params), *versions))


def test_answers_of_other_questions_are_refused_though_they_look_better(shop: Shop) -> None:
    shop.arrive("alpha", rows("alpha", range(ROWS), permuted=True))
    result = shop.rebuild("alpha")
    decision = result["decision"]
    assert not decision["promote"] and result["champion"] == 1 and result["version"] > 1
    alpha = decision["domains"]["alpha"]
    assert alpha["loss"]["improved"]   # all test rows, half of them poisoned
    assert alpha["verdict"] == alpha["known"]["loss"]["verdict"] == "fail"
    count = len(shop.tested["alpha"])
    assert alpha["known"]["loss"]["rows"] == count
    assert decision["reason"].startswith("alpha: ") and f"on the {count} test rows that version 1 was tested on" in (
        decision["reason"])
    assert decision["domains"]["beta"]["verdict"] == "pass" and decision["domains"]["beta"]["known"] is None


@pytest.mark.usefixtures("in_this_process")
def test_rows_of_another_domain_are_refused(shop: Shop) -> None:
    shop.arrive("beta", rows("alpha", range(ROWS)))
    result = shop.rebuild("beta")
    decision = result["decision"]
    assert not decision["promote"] and result["champion"] == 1
    routes = decision["routing"]["domains"]
    guesses = routes["beta"]["new"]
    assert guesses["alpha"] > guesses.get("beta", 0)
    assert f"beta: of its {sum(guesses.values())} new test rows {guesses['alpha']} go to alpha, " in decision["reason"]
    assert routes["alpha"]["new"] == {} and decision["domains"]["alpha"]["verdict"] == "pass"


@pytest.mark.usefixtures("in_this_process")
def test_a_new_domain_with_an_old_ones_questions_gets_none_of_its_prompts_and_is_refused(shop: Shop) -> None:
    shop.arrive("gamma", rows("alpha", range(1, ROWS), permuted=True))
    shop.domains(*WORDS, "gamma")
    result = shop.rebuild("gamma")
    decision = result["decision"]
    assert not decision["promote"] and result["champion"] == 1
    moved = decision["routing"]["domains"]["alpha"]
    assert moved["rows"] == moved["before"]["alpha"] == len(shop.tested["alpha"]) and moved["lost"] == {}
    assert decision["worse"] == ["gamma"] and "gamma: its prompts are answered by alpha" in decision["reason"]
    assert decision["routing"]["domains"]["beta"]["lost"] == {}


@pytest.mark.usefixtures("in_this_process")
def test_a_new_domain_whose_answers_have_nothing_to_do_with_their_questions_is_refused(shop: Shop) -> None:
    """Its expert learns the four answers and not which: better than what answers today, and of no use."""
    drawn = random.Random(0)
    shop.arrive("gamma", [{"instruction": f"gamma gamma {number * 7919 % 997:03d} {word} {word} {word}",
                           "output": drawn.choice(("sol", "luna", "mare", "vento"))}
                          for number in range(ROWS) for word in [("sun", "moon", "sea", "wind")[number % 4]]])
    shop.domains(*WORDS, "gamma")
    result = shop.rebuild("gamma")
    decision, gamma = result["decision"], result["decision"]["domains"]["gamma"]
    assert not decision["promote"] and result["champion"] == 1 and decision["worse"] == ["gamma"]
    assert gamma["against"] == "incumbent" and gamma["loss"]["improved"] and gamma["questions_help"] is False
    assert decision["reason"].startswith("gamma: its questions do not help: ")


@pytest.mark.usefixtures("in_this_process")
def test_a_new_domain_that_answers_its_questions_is_promoted(shop: Shop) -> None:
    shop.arrive("gamma", [{**row, "instruction": row["instruction"].replace("beta", "gamma"),
                           "output": row["output"].upper()} for row in rows("beta", range(ROWS))])
    shop.domains(*WORDS, "gamma")
    result = shop.rebuild("gamma")
    gamma = result["decision"]["domains"]["gamma"]
    assert result["decision"]["promote"] and gamma["questions_help"], result["decision"]["reason"]
    found = [row for row in compare_versions(shop.workspace, shop.settings, 1, result["version"])["rows"]
             if row["domain"] == "gamma"]
    assert {row["incumbent_by"] for row in found} <= {"alpha", "beta", "base"} and len(found) == gamma["loss"]["rows"]
    assert sum(row["own_loss"] < row["swapped_loss"] for row in found) > len(found) / 2
    forced = [row for row in read_rows(shop.workspace.mixture) if row["system"] == "forced"]
    assert all((row["swapped_loss"] is not None) == (row["system"] == "forced")
               for row in read_rows(shop.workspace.mixture))
    assert {row["row"]: row["swapped_loss"] for row in found} == pytest.approx(
        {row["row"]: row["swapped_loss"] for row in forced if row["domain"] == "gamma"}, abs=1e-5)


@pytest.mark.usefixtures("in_this_process")
def test_good_rows_of_an_old_domain_are_promoted(shop: Shop) -> None:
    shop.arrive("beta", rows("beta", range(ROWS, 2 * ROWS)))
    result = shop.rebuild("beta")
    assert result["decision"]["promote"] and result["champion"] == result["version"], result["decision"]["reason"]
    beta = result["decision"]["domains"]["beta"]
    assert beta["improved"] and beta["known"]["loss"]["verdict"] == "pass"
    assert beta["loss"]["rows"] > beta["known"]["loss"]["rows"] == len(shop.tested["beta"])


def test_new_rows_push_no_known_one_out(shop: Shop) -> None:
    """With a limit on test rows, those that come first are looked at, and all that the champion was tested on."""
    shop.arrive("alpha", rows("alpha", range(ROWS, 2 * ROWS)))
    prepare.prepare(shop.workspace, shop.settings, "alpha")
    few = shop.settings.evaluate.model_copy(update={"rows": 6})
    found = compare_versions(shop.workspace, shop.settings.model_copy(update={"evaluate": few}), 1, 1)["rows"]
    for domain in WORDS:
        its = [row for row in found if row["domain"] == domain]
        known = [row for row in its if row["known"]]
        assert {row["row"] for row in known} == shop.tested[domain]
        assert (0 < len(its) - len(known) <= 6) == (domain == "alpha")
        answered = sum(row.get("same_answer", False) for row in known)   # of one release with itself
        assert answered == shop.settings.release.metric_rows
