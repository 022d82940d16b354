"""Converts a raw row to a conversation, or rejects it with a reason."""

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from moa.base.encoding import Message
from moa.core.config import Domain
from moa.data.readers import RejectionCode, RowRejected

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}   # as in ShareGPT

__all__ = ["RowRejected", "conversation", "fields", "group_value"]


def conversation(value: Any, domain: Domain) -> list[Message]:
    """The messages of one raw row: a chat, or an instruction with its output.

    Args:
        value: the row's object, or the RowRejected that a reader put in its place.
        domain: its `map` and `template` say which columns hold the texts.

    Returns:
        An optional system message, then user and assistant messages in turn; the last one is the assistant's.

    Raises:
        RowRejected: the row is no such conversation.
    """
    if isinstance(value, RowRejected):
        raise value
    if not isinstance(value, dict):
        raise RowRejected(RejectionCode.NOT_OBJECT, f"not an object but {type(value).__name__}")
    chat_column = domain.map.get("messages", "messages")
    instructions_only = ("instruction" in domain.map or domain.template is not None) and "messages" not in domain.map
    if value.get(chat_column) is not None and not instructions_only:
        return _chat(value[chat_column])
    return _instruction(value, domain)


def group_value(value: Mapping[str, Any], domain: Domain) -> str | None:
    """The row's value in the domain's `group_by` column, as text; None where the column is not set, or empty."""
    if domain.group_by in (None, "none"):
        return None
    group = value.get(domain.group_by)
    return None if group in (None, "") else str(group)


def fields(template: str) -> list[str]:
    """Names of the columns in the braces of a domain's `template`. Raises ValueError where it is malformed."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
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
        input_column = names.get("input", "input")
        if value.get(input_column) not in (None, ""):
            question = f"{question}\n\n{_text(value, input_column)}"
    messages = [{"role": "user", "content": question},
                {"role": "assistant", "content": _text(value, names.get("output", "output"))}]
    system = names.get("system", "system")
    if value.get(system) not in (None, ""):
        messages.insert(0, {"role": "system", "content": _text(value, system)})
    return messages


def _chat(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowRejected(RejectionCode.BAD_CHAT, "messages is not a list of {role, content}")
    messages = []
    for turn in turns:
        role_key, text_key = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
        role = _text(turn, role_key)
        messages.append({"role": ROLES.get(role, role), "content": _text(turn, text_key)})
    roles = [message["role"] for message in messages]
    turn_roles = roles[1:] if roles[0] == "system" else roles
    if not turn_roles or len(turn_roles) % 2 or turn_roles != ["user", "assistant"] * (len(turn_roles) // 2):
        raise RowRejected(RejectionCode.BAD_CHAT,
                          "roles must be an optional system, then user and assistant in turn, ending with assistant")
    return messages


def _text(value: Mapping[str, Any], key: str) -> str:
    """The stripped text under `key`. Raises RowRejected where it is missing, empty, no text or not printable."""
    text = value.get(key)
    if text is None:
        raise RowRejected(RejectionCode.MISSING, f"{key} is missing")
    if not isinstance(text, str):
        raise RowRejected(RejectionCode.NOT_TEXT, f"{key} is not text but {type(text).__name__}")
    if CONTROL.search(text):
        raise RowRejected(RejectionCode.CONTROL_CHARACTERS, f"{key} has control characters")
    if "\r" in text:   # so that line ends of Windows or old Mac files make no different row
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.strip()
    if not text:
        raise RowRejected(RejectionCode.EMPTY, f"{key} is empty")
    return text
