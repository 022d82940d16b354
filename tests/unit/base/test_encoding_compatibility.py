"""docs/compatibility.md says what was tried with public chat templates: exact, or refused and why.

The templates are not part of the project. Where they lie beside the checkout, the table is compared with what the
encoder does; MOA_WRITE_DOCS=1 writes it.
"""

import copy
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from moa.base.encoding import ChatEncoder, Message
from moa.core.errors import DataError
from tests import tiny

REPOSITORY = Path(__file__).parents[3]
TEMPLATES = REPOSITORY.parent / "shared" / "templates"
PAGE = REPOSITORY / "docs" / "compatibility.md"
BEGIN, END = "<!-- templates -->\n", "<!-- end templates -->"
SWITCHES: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})


def conversation(answers: int, system: bool, thoughts: bool) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}] if system else []
    for turn in range(answers):
        thought = "<think>\nwell\n</think>\n\n" if thoughts else ""
        messages += [{"role": "user", "content": f"Delete nothing {turn}?"},
                     {"role": "assistant", "content": f"{thought}No {turn}."}]
    return messages


def outcome(encoder: ChatEncoder, messages: list[Message]) -> str:
    """`exact`, or why not."""
    try:
        row, prompt = encoder.row(messages), encoder.prompt(messages[:-1])
    except DataError as error:
        return "thoughts" if "asks for an answer with" in str(error) else "answers"
    except TemplateError:
        return "template"
    text = encoder.tokenizer.apply_chat_template(messages, chat_template=encoder._dated, tokenize=False,
                                                 **encoder.template_args)
    ids = [encoder.tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, text.rstrip("\n"))]
    assert row.ids in ids and row.ids[:len(prompt)] == prompt and all(row.targets[len(prompt):])
    return "exact"


WORDS = {"thoughts": "refused: asks for an answer otherwise than it writes it", "template": "the template refuses it",
         "answers": "refused: answers cannot be told apart"}


def line(file: Path) -> str:
    """A row of the table: of all conversations without variables, or with the first variables that make them exact."""
    template, best = file.read_text(encoding="utf-8"), None
    for switch in SWITCHES:
        tokens = copy.deepcopy(tiny.tokenizer())
        tokens.chat_template = template
        encoder = ChatEncoder(tokens, None, 1024, switch)
        found = {(answers, system): {outcome(encoder, conversation(answers, system, thoughts))
                                     for thoughts in (False, True)}
                 for answers, system in itertools.product((1, 2, 3), (False, True))}
        exact = sum(each == {"exact"} for each in found.values())
        if best is None or exact > best[0]:
            best = exact, found, switch
        if exact == len(found):
            break
    assert best is not None
    _, found, switch = best
    cells = []
    for answers, system in ((1, False), (1, True), (3, False)):
        reasons = sorted(found[answers, system] - {"exact"}) if answers == 1 else sorted(
            (found[2, system] | found[3, system]) - {"exact"})
        cells.append("exact" if not reasons else "; ".join(WORDS[reason] for reason in reasons))
    args = ", ".join(f"{key}: {str(value).lower()}" for key, value in switch.items())
    return f"| {file.stem} | {' | '.join(cells)} | {f'`{{{args}}}`' if args else ''} |"


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="the public templates are not beside this checkout")
def test_the_page_says_what_the_encoder_does_with_public_templates() -> None:
    lines = [line(file) for file in sorted(TEMPLATES.glob("*.jinja"), key=lambda file: file.stem.lower())]
    whole = sum(each.split(" | ")[1:4] == ["exact"] * 3 for each in lines)
    table = "\n".join([f"{whole} of {len(lines)} are exact in every conversation that was tried.", "",
                       "| template | one answer | with a system message | several answers | `prompt.template_args` |",
                       "|---|---|---|---|---|", *lines, ""])
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    present, _, after = rest.partition(END)
    if os.environ.get("MOA_WRITE_DOCS"):
        PAGE.write_text(f"{before}{BEGIN}{table}{END}{after}", encoding="utf-8")
    else:
        assert present == table
