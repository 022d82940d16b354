"""params.yaml is right, or one sentence names the key, what is allowed and what was found."""

from pathlib import Path

import pytest

from moa.core import config
from moa.core.errors import ConfigError
from tests import tiny

GOOD = "base: {source: 'path:x'}\ndomains:\n  math: {metric: exact}\n"
GROUPS = "prompt: {}\nprepare: {}\ntrain: {}\nassemble: {}\nevaluate: {}\n"
COMPLETE = GROUPS + GOOD


def load(folder: Path, text: str) -> config.Config:
    path = folder / "params.yaml"
    path.write_text(text)
    return config.load(path)


def test_the_projects_own_params_are_valid() -> None:
    assert config.load(tiny.REPOSITORY / "params.yaml").domains


def test_defaults_fill_what_is_not_said(tmp_path: Path) -> None:
    loaded = load(tmp_path, COMPLETE)
    assert loaded.prepare == config.PrepareParams()
    assert loaded.require_domain("math") == "math"
    with pytest.raises(ConfigError, match=r"No domain 'sql'.*math"):
        loaded.require_domain("sql")


@pytest.mark.parametrize(("text", "message"), [
    (GOOD + "trian: {rank: 8}", r"unknown key 'trian'; allowed here: .*train"),
    (GOOD + "train: {ranks: 8}", r"unknown key 'train\.ranks'; allowed here: .*rank, "),
    (GOOD + "train: {rank: eight}", r"train\.rank: .*integer.*'eight'"),
    (GOOD + "train: {rank: 8.5}", r"train\.rank: .*integer.*8\.5"),
    (GOOD + "train: {rank: 0}", r"train\.rank: .*greater than or equal to 1.*0"),
    (GOOD + "prepare: {test: 0.9}", r"prepare\.test: .*less than 0\.5.*0\.9"),
    (GOOD + "prompt: {system: 3}", r"prompt\.system: .*string.*3"),
    (GOOD + "  a/b: {metric: exact}", r"a/b.*lower-case letters"),
    (GOOD + "  ..: {metric: exact}", r"lower-case letters"),
    (GOOD + "  base: {metric: exact}", r"'base' has a meaning of its own"),
    (GOOD + "  sql: {}", r"domains\.sql\.metric"),
    (GOOD + "  sql: {metrics: exact}", r"metric"),
    (GOOD + "quickstart: [Math]", r"quickstart.*lower-case letters"),
    (GOOD + "project: My Shop", r"project: .*lower-case letters, digits and '-'.*'My Shop'"),
    (GOOD + "project: shop-", r"project: .*ends with a letter or digit"),
    (GOOD + "project: 12", r"project: .*string.*12"),
    ("base: {source: 'path:x'}", r"domains"),
    ("", r"base"),
    ("[1, 2]", r"the file"),
    ("base: {source: 'path:x'", r"not valid YAML"),
])
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"params\.yaml is missing"):
        config.load(tmp_path / "params.yaml")


def test_a_domain_without_a_metric_is_told_which_key_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"domains\.math must have keys of its own: metric"):
        load(tmp_path, "base: {source: 'path:x'}\ndomains:\n  math:\n")


@pytest.mark.parametrize("group", config.LEFT_OUT)
def test_a_group_of_defaults_may_be_left_out(tmp_path: Path, group: str) -> None:
    written = {key: value for key, value in config.LEFT_OUT.items() if key != group}
    assert load(tmp_path, GOOD) == load(tmp_path, GOOD + "".join(f"{key}: {value}\n" for key, value in written.items()))
    assert load(tmp_path, f"{GOOD}{group}: {config.LEFT_OUT[group]}\n") == load(tmp_path, GOOD)
