"""The parameters of params.yaml as a list, as a JSON schema and as a page: complete, true and fresh."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from moa.core import config, config_reference
from moa.core.config import Config
from tests import tiny

MINIMAL = "base: {source: 'path:x'}\ndomains:\n  math: {metric: exact}\n"


def parsed(text: str) -> Config:
    return config.parse(text, Path("params.yaml"))[0]


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a model with its field, the groups' included."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


def listed(text: str) -> dict[str, config_reference.Parameter]:
    return {each.name: each for group in config_reference.effective(parsed(text)) for each in group.parameters}


@pytest.mark.parametrize("path", config_reference.files(tiny.REPOSITORY / "docs"), ids=lambda path: path.name)
def test_the_documents_are_fresh(path: Path) -> None:
    fresh = config_reference.files(tiny.REPOSITORY / "docs")[path]
    assert path.read_text(encoding="utf-8") == fresh, "run `make parameters`"


def test_every_key_has_a_description() -> None:
    every = [*fields(Config), *fields(config.Domain, "domains.NAME.")]
    groups = {name for name, field in every if isinstance(field.annotation, type)
              and issubclass(field.annotation, BaseModel)}
    assert len(every) > 60 and not [name for name, field in every if name not in groups and not field.description]


def test_every_value_is_listed_with_its_default() -> None:
    found = listed(MINIMAL + "train: {rank: 4, epochs: 2}\n")
    offered = {name for name, field in fields(Config) if "." in name and config.UNLISTED not in field.metadata}
    assert offered <= found.keys() and {"project", "quickstart", "format", "domains.math.metric"} <= found.keys()
    assert [name for name, each in found.items() if each.differs] == ["train.rank"]
    assert (found["train.rank"].value, found["train.rank"].default) == (4, 8)
    assert found["base.source"].required and not found["base.source"].differs


def test_a_key_that_is_not_offered_is_listed_where_it_is_set() -> None:
    assert "adapt.poll" not in listed(MINIMAL)
    assert listed(MINIMAL + "adapt: {poll: 0.5}\n")["adapt.poll"].differs


def test_the_text_marks_what_is_no_default() -> None:
    text = config_reference.as_text(config_reference.effective(parsed(MINIMAL + "prompt: {system: ''}\n")))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert [line for line in lines[:-1] if line.startswith("*")] == [
        '* system "" system message of rows without one; null = template\'s (default: null)']
    assert "max_tokens 1024 longest row, and longest prompt the router reads" in lines
    assert "domains.math: " + str(config.Domain.__doc__) in lines


@pytest.mark.parametrize("text", [
    MINIMAL, MINIMAL + "adapt: {poll: 0.5}\nexecution: {devices: [cpu]}\nrelease: {approval: manual}\n",
    (tiny.REPOSITORY / "params.yaml").read_text(encoding="utf-8")])
def test_the_schema_accepts_what_moa_accepts(text: str) -> None:
    parsed(text)
    jsonschema.validate(YAML(typ="safe").load(text), config_reference.schema())


@pytest.mark.parametrize("wrong", ["trian: {rank: 8}", "train: {ranks: 8}", "train: {rank: 0}", "train: {rank: eight}",
                                   "prepare: {test: 0.9}", "release: {approval: never}", "prepare: {redact: [name]}"])
def test_the_schema_refuses_what_moa_refuses(wrong: str) -> None:
    with pytest.raises(config.ConfigError):
        parsed(MINIMAL + wrong)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(YAML(typ="safe").load(MINIMAL + wrong), config_reference.schema())


def test_editors_suggest_what_is_offered() -> None:
    train = json.loads(config_reference.schema_text())["$defs"]["TrainParams"]["properties"]
    assert train["warm_patience"]["doNotSuggest"] is True and "doNotSuggest" not in train["patience"]
