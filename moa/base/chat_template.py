"""The chat template beside a base's tokenizer: the base's own, or a named one of moa's for a base without one.

A template that `set_template` writes into the base's folder is digested, used and checked like one that came with the
base.

moa's own template keeps the rules that `moa.base.encoding` relies on: a rendered conversation is a prefix of its
continuation, and an answer ends with the end mark. It also stops a user's text from imitating another role: a turn
begins with its role on a line of its own, and such a line inside a user's or system text gets a space before it. Only
the end mark, which is removed from these texts, ends an answer.
"""

from pathlib import Path
from typing import Any

from moa.base import sources
from moa.core.errors import BaseModelError
from moa.core.files import read_json_object, write_json

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"

PLAIN = """\
{%- macro quoted(text) -%}
{{- text | replace('\\nUser:', '\\n User:') | replace('\\nAssistant:', '\\n Assistant:') | replace(eos_token, ' ') -}}
{%- endmacro -%}
{%- for message in messages -%}
{{- '\\n' if not loop.first and loop.previtem['role'] == 'assistant' else '' -}}
{%- if message['role'] == 'assistant' -%}
{{- 'Assistant:\\n' + message['content'] + eos_token -}}
{%- elif message['role'] == 'user' -%}
{{- quoted('User:\\n' + message['content']) + '\\n\\n' -}}
{%- elif message['content'] -%}
{{- quoted('\\n' + message['content'])[1:] + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""
NAMED = {"plain": PLAIN}


def template(folder: Path, source: object) -> str:
    """Read the chat template of the tokenizer in `folder`, whose base messages call `source`.

    Raises BaseModelError where there is none.
    """
    file = folder / FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    text = read_json_object(folder / CONFIG).get("chat_template")
    if isinstance(text, list):   # a list of named templates: transformers uses the one called default
        text = {entry["name"]: entry["template"] for entry in text}.get("default")
    if not isinstance(text, str):
        raise BaseModelError(f"{source} has no chat template, so conversations cannot be rendered for it: set "
                             "`base.template: plain` in params.yaml, use an instruction-tuned model, or add a "
                             f"{FILE} to a path: base.")
    return text


def set_template(folder: Path, name: str, source: object) -> None:
    """Give the tokenizer in `folder` the template called `name`, in place of its own.

    Args:
        folder: the folder of the base.
        name: a key of `NAMED`.
        source: the base's source, for messages.

    Raises:
        BaseModelError: the tokenizer cannot be loaded, or its end mark is not one token of its own.
    """
    from transformers import AutoTokenizer

    sources.silence_transformers()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise BaseModelError(f"The tokenizer of {source} cannot be loaded: {sources.first_line(error)}") from None
    end = tokenizer.eos_token
    if end is None or tokenizer(end, add_special_tokens=False)["input_ids"] != [tokenizer.eos_token_id]:
        raise BaseModelError(f"The tokenizer of {source} has no end mark (eos_token) that is one token of its own, "
                             f"so a model could not end an answer in the template {name!r}: use another base.")
    config = read_json_object(folder / CONFIG)
    if config.pop("chat_template", None) is not None:
        write_json(folder / CONFIG, config)
    (folder / FILE).write_text(NAMED[name], encoding="utf-8")
