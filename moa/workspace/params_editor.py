"""A domain or another key into or out of the text of params.yaml; every other byte stays, comments and quotes included.

YAML libraries give a comment between two keys to the key above it, so that writing the parsed file again moves or loses
it. Here the parser only says where things stand. Knows neither files nor what the values mean.
"""

import re
from collections.abc import Mapping
from io import StringIO
from typing import Any, NamedTuple

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from moa.core.errors import ConfigError

BY_HAND = "params.yaml is written in a way that moa cannot edit safely"


class _Span(NamedTuple):
    """One entry of a mapping or list: where it begins and ends in the text."""

    key: str
    start: int
    end: int


def add_domain(text: str, name: str, reading: Mapping[str, Any]) -> str:
    """The text with `name` as the last of `domains`. Raises ConfigError when that must be done by hand."""
    key, domains = _top(text, "domains")
    spans = _spans(text, domains)
    if domains.flow_style and spans:
        changed = text[:spans[-1].end] + f", {_flow({name: dict(reading)})[1:-1]}" + text[spans[-1].end:]
    elif domains.flow_style:   # {}
        changed = text[:domains.start_mark.index].rstrip(" ") + text[domains.end_mark.index:]
        changed = _below(changed, key.end_mark.index, _block(name, reading, 2))
    else:
        changed = _below(text, spans[-1].end, _block(name, reading, domains.start_mark.column))
    expected = _parsed(text)
    expected["domains"][name] = dict(reading)
    return _checked(changed, expected, f"add this under `domains` yourself:\n{_block(name, reading, 2)}")


def remove_domain(text: str, name: str) -> str:
    """The text without `name` in `domains` and `quickstart`. Raises ConfigError when that must be done by hand."""
    expected = _parsed(text)
    changed = text
    if name in expected["domains"]:
        changed = _without(changed, "domains", name)
        del expected["domains"][name]
    if name in (expected.get("quickstart") or ()):
        changed = _without(changed, "quickstart", name)
        expected["quickstart"].remove(name)
    return _checked(changed, expected, f"take {name!r} out of it yourself and run the command again.")


def remove_key(text: str, group: str, key: str) -> str:
    """The text without `key` in `group`. Raises ConfigError when that must be done by hand."""
    expected = _parsed(text)
    del expected[group][key]
    return _checked(_without(text, group, key), expected, f"take {group}.{key} out of it yourself and run the command "
                                                          "again.")


def set_number(text: str, key: str, number: int, comment: str) -> str:
    """The text with `key: number` at its top level: in the place of an older number, or at its end with `comment`."""
    expected = {**_parsed(text), key: number}
    changed, found = re.subn(rf"^{key}:[ \t]+\d+", f"{key}: {number}", text, count=1, flags=re.MULTILINE)
    if not found:
        newline = "\r\n" if "\r\n" in text else "\n"
        gap = "" if text.endswith("\n") else newline
        changed = f"{text}{gap}{newline}{key}: {number}   # {comment}{newline}"
    return _checked(changed, expected, f"write `{key}: {number}` into it yourself and run the command again.")


def _without(text: str, group: str, name: str) -> str:
    key, collection = _top(text, group)
    spans = _spans(text, collection)
    at = next((number for number, span in enumerate(spans) if span.key == name), None)
    if at is None:   # merged from another place
        raise ConfigError(f"{BY_HAND}: `{group}` must be written out in it.")
    empty = "{}" if isinstance(collection, MappingNode) else "[]"
    if len(spans) == 1:
        if collection.flow_style:
            return text[:collection.start_mark.index] + empty + text[collection.end_mark.index:]
        colon = text.index(":", key.end_mark.index) + 1
        begin, end = _lines(text, spans[0])
        return f"{text[:colon]} {empty}{text[colon:begin]}{text[end:]}"
    if not collection.flow_style:
        begin, end = _lines(text, spans[at])
        return text[:begin] + text[end:]
    if at:
        return text[:spans[at - 1].end] + text[spans[at].end:]
    return text[:spans[0].start] + text[spans[1].start:]


def _top(text: str, group: str) -> tuple[ScalarNode, CollectionNode]:
    """Key and value of a group of the file."""
    root = YAML(pure=True).compose(StringIO(text))
    if isinstance(root, MappingNode):
        for key, value in root.value:
            if key.value == group and isinstance(value, CollectionNode) and not value.anchor:
                return key, value
    raise ConfigError(f"{BY_HAND}: `{group}` must be written out in it.")


def _spans(text: str, collection: CollectionNode) -> list[_Span]:
    if isinstance(collection, MappingNode):
        return [_Span(key.value, key.start_mark.index, _end(text, value) if value.start_mark.index > key.end_mark.index
                      else _line_end(text, key.end_mark.index))   # an alias: the value stands elsewhere
                for key, value in collection.value]
    return [_Span(item.value, item.start_mark.index, _end(text, item)) for item in collection.value]


def _end(text: str, node: Node) -> int:
    """Where the node's own text ends; the parser would count comments and empty lines behind it, too."""
    if isinstance(node, CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(text, last[1] if isinstance(last, tuple) else last)
    start, end = node.start_mark.index, node.end_mark.index
    return start + len(text[start:end].rstrip())


def _lines(text: str, span: _Span) -> tuple[int, int]:
    """The whole lines that an entry stands on."""
    return text.rfind("\n", 0, span.start) + 1, min(_line_end(text, span.end) + 1, len(text))


def _line_end(text: str, index: int) -> int:
    end = text.find("\n", index)
    return len(text) if end < 0 else end


def _below(text: str, index: int, block: str) -> str:
    """`block` on lines of its own under the line of `index`."""
    end = _line_end(text, index)
    newline = "\r\n" if "\r\n" in text else "\n"
    block = block.replace("\n", newline)
    return f"{text}{newline}{block}" if end == len(text) else text[:end + 1] + block + text[end + 1:]


def _block(name: str, reading: Mapping[str, Any], indent: int) -> str:
    return "".join(f"{' ' * indent}{line}\n" for line in _dumped({name: reading}, flow=False).split("\n"))


def _flow(value: Mapping[str, Any]) -> str:
    return _dumped(value, flow=True)


def _dumped(value: Mapping[str, Any], *, flow: bool) -> str:
    out = StringIO()
    yaml: Any = YAML()
    yaml.default_flow_style, yaml.width = flow, 1 << 20
    yaml.dump(_quoted(value), out)
    return out.getvalue().rstrip("\n")


def _quoted(value: Any) -> Any:
    """The same, with whatever could end a line escaped."""
    if isinstance(value, Mapping):
        return {key: _quoted(one) for key, one in value.items()}
    return DoubleQuotedScalarString(value) if isinstance(value, str) and not value.isprintable() else value


def _parsed(text: str) -> Any:
    return YAML(typ="safe").load(text)


def _checked(changed: str, expected: Any, advice: str) -> str:
    try:
        right = _parsed(changed) == expected
    except YAMLError:
        right = False
    if not right:
        raise ConfigError(f"{BY_HAND}: {advice}")
    return changed
