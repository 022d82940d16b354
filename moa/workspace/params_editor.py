"""Edits the text of params.yaml: adds and removes domains and keys, and preserves every other byte.

YAML libraries attach a comment between two keys to the key above it, so that writing a parsed file moves or loses
comments. Here the parser only locates the entries, and the text is edited. The functions work on texts, not on files.
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
    """Add the domain `name` at the end of `domains`, with the fields `reading`, and return the new text.

    Raises ConfigError when the text cannot be edited safely.
    """
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
    """Remove `name` from `domains` and `quickstart`, and return the new text.

    Raises ConfigError when the text cannot be edited safely.
    """
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
    """Remove `key` from the top-level mapping `group`, and return the new text.

    Raises ConfigError when the text cannot be edited safely.
    """
    expected = _parsed(text)
    del expected[group][key]
    return _checked(_without(text, group, key), expected, f"take {group}.{key} out of it yourself and run the command "
                                                          "again.")


def set_number(text: str, key: str, number: int, comment: str) -> str:
    """Set the top-level `key` to `number` and return the new text; a new key is appended at the end, with `comment`.

    Raises ConfigError when the text cannot be edited safely.
    """
    expected = {**_parsed(text), key: number}
    changed, replaced = re.subn(rf"^{key}:[ \t]+\d+", f"{key}: {number}", text, count=1, flags=re.MULTILINE)
    if not replaced:
        newline = "\r\n" if "\r\n" in text else "\n"
        gap = "" if text.endswith("\n") else newline
        changed = f"{text}{gap}{newline}{key}: {number}   # {comment}{newline}"
    return _checked(changed, expected, f"write `{key}: {number}` into it yourself and run the command again.")


def _without(text: str, group: str, name: str) -> str:
    """The text without the entry `name` of the top-level mapping or list `group`."""
    key, collection = _top(text, group)
    spans = _spans(text, collection)
    position = next((number for number, span in enumerate(spans) if span.key == name), None)
    if position is None:   # the entry comes from a merge key (<<)
        raise ConfigError(f"{BY_HAND}: `{group}` must be written out in it.")
    empty = "{}" if isinstance(collection, MappingNode) else "[]"
    if len(spans) == 1:
        if collection.flow_style:
            return text[:collection.start_mark.index] + empty + text[collection.end_mark.index:]
        colon = text.index(":", key.end_mark.index) + 1
        begin, end = _lines(text, spans[0])
        return f"{text[:colon]} {empty}{text[colon:begin]}{text[end:]}"
    if not collection.flow_style:
        begin, end = _lines(text, spans[position])
        return text[:begin] + text[end:]
    if position:
        return text[:spans[position - 1].end] + text[spans[position].end:]
    return text[:spans[0].start] + text[spans[1].start:]


def _top(text: str, group: str) -> tuple[ScalarNode, CollectionNode]:
    """The nodes of the top-level key `group` and its value. Raises ConfigError where the value is not written out."""
    root = YAML(pure=True).compose(StringIO(text))
    if isinstance(root, MappingNode):
        for key, value in root.value:
            if key.value == group and isinstance(value, CollectionNode) and not value.anchor:
                return key, value
    raise ConfigError(f"{BY_HAND}: `{group}` must be written out in it.")


def _spans(text: str, collection: CollectionNode) -> list[_Span]:
    """The spans of all entries of a mapping or list, in order."""
    if isinstance(collection, MappingNode):
        return [_Span(key.value, key.start_mark.index, _end(text, value) if value.start_mark.index > key.end_mark.index
                      else _line_end(text, key.end_mark.index))   # an alias: its value is elsewhere in the text
                for key, value in collection.value]
    return [_Span(item.value, item.start_mark.index, _end(text, item)) for item in collection.value]


def _end(text: str, node: Node) -> int:
    """Where the node's own text ends. The parser's end mark also covers comments and empty lines after it."""
    if isinstance(node, CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(text, last[1] if isinstance(last, tuple) else last)
    start, end = node.start_mark.index, node.end_mark.index
    return start + len(text[start:end].rstrip())


def _lines(text: str, span: _Span) -> tuple[int, int]:
    """Start and end of the whole lines that an entry is on."""
    return text.rfind("\n", 0, span.start) + 1, min(_line_end(text, span.end) + 1, len(text))


def _line_end(text: str, index: int) -> int:
    end = text.find("\n", index)
    return len(text) if end < 0 else end


def _below(text: str, index: int, block: str) -> str:
    """Insert `block` below the line of `index`, with the line ends of the text."""
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
    """`value` with its unprintable texts, such as line breaks, in double quotes and escaped."""
    if isinstance(value, Mapping):
        return {key: _quoted(field) for key, field in value.items()}
    return DoubleQuotedScalarString(value) if isinstance(value, str) and not value.isprintable() else value


def _parsed(text: str) -> Any:
    return YAML(typ="safe").load(text)


def _checked(changed: str, expected: Any, advice: str) -> str:
    """Return `changed` if it parses to `expected`. Raises ConfigError with `advice` otherwise."""
    try:
        correct = _parsed(changed) == expected
    except YAMLError:
        correct = False
    if not correct:
        raise ConfigError(f"{BY_HAND}: {advice}")
    return changed
