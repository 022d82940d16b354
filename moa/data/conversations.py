"""Conversion of a raw row to a conversation, or its rejection with a reason."""

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from moa.base.encoding import Message
from moa.core.config import Domain
from moa.data.readers import RowRejected

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}   # as in ShareGPT

__all__ = ["RowRejected", "conversation", "fields", "group_value"]


def conversation(value: Any, domain: Domain) -> list[Message]:
    """The messages of one raw row, as `domain` reads it: chat, or an instruction with its output.

    Raises RowRejected with the reason.
    """
    if isinstance(value, RowRejected):
        raise value
    if not isinstance(value, dict):
        raise RowRejected(f"not an object but {type(value).__name__}")
    turns = domain.map.get("messages", "messages")
    plain = ("instruction" in domain.map or domain.template is not None) and "messages" not in domain.map
    if value.get(turns) is not None and not plain:
        return _chat(value[turns])
    return _instruction(value, domain)


def group_value(value: Mapping[str, Any], domain: Domain) -> str | None:
    """The row's value in the domain's `group_by` column; None without one."""
    if domain.group_by in (None, "none"):
        return None
    found = value.get(domain.group_by)
    return None if found in (None, "") else str(found)


def fields(template: str) -> list[str]:
    """Names of the columns in a template's braces. Raises ValueError when it is no template."""
    names = [name for _, name, spec, how in Formatter().parse(template) if name is not None]
    if any(not name or re.search(r"[.\[\]]", name) for name in names):
        raise ValueError("a place is {column}, with the column's name and nothing else; write {{ and }} for braces")
    return names


def _instruction(value: Mapping[str, Any], domain: Domain) -> list[Message]:
    names = domain.map
    if domain.template is not None:
        texts = {name: _text(value, name) for name in fields(domain.template)}
        question = "".join(literal + (texts[name] if name is not None else "")
                           for literal, name, _, _ in Formatter().parse(domain.template))
    else:
        question = _text(value, names.get("instruction", "instruction"))
        extra = names.get("input", "input")
        if value.get(extra) not in (None, ""):
            question = f"{question}\n\n{_text(value, extra)}"
    messages = [{"role": "user", "content": question},
                {"role": "assistant", "content": _text(value, names.get("output", "output"))}]
    system = names.get("system", "system")
    if value.get(system) not in (None, ""):
        messages.insert(0, {"role": "system", "content": _text(value, system)})
    return messages


def _chat(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowRejected("messages is not a list of {role, content}")
    messages = []
    for turn in turns:
        role, content = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
        name = _text(turn, role)
        messages.append({"role": ROLES.get(name, name), "content": _text(turn, content)})
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise RowRejected("roles must be an optional system, then user and assistant in turn, ending with assistant")
    return messages


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if text is None:
        raise RowRejected(f"{key} is missing")
    if not isinstance(text, str):
        raise RowRejected(f"{key} is not text but {type(text).__name__}")
    if CONTROL.search(text):
        raise RowRejected(f"{key} has control characters")
    if "\r" in text:   # so that line ends of other systems make no other row
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.strip()
    if not text:
        raise RowRejected(f"{key} is empty")
    return text
