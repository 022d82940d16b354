"""The mixture as MLflow serves it: an OpenAI chat body in, a chat completion out. Knows nothing of the registry.

MLflow stores `SCRIPT`, not a pickle: the model is code that needs `moa` installed, and the artifacts beside it.
"""

import os
import warnings
from pathlib import Path
from typing import Any

from moa.errors import UsageError
from moa.workspace import Workspace

SCRIPT = '''"""Loaded by MLflow as the model's code; the rest is in the installed package."""

from mlflow.models import set_model

from moa.pyfunc import python_model

set_model(python_model())
'''
ROLES = ("system", "user", "assistant")
OPENERS = ("system", "user")   # of a conversation: no row of a corpus begins with an answer, and some templates cannot
OPTIONS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature",
           "top_p": "top_p", "seed": "seed", "stop": "stop"}   # OpenAI's name -> ours
WHOLE = {"max_tokens", "max_completion_tokens", "seed"}


class BodyError(ValueError):
    """The request is not one we answer; the message says which field and why."""


def python_model() -> Any:
    """The object MLflow loads and calls. Its `predict` has no type hints: MLflow would refuse chat bodies with them."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import PythonModel

    with warnings.catch_warnings(record=True):   # it advises type hints, past any filter

        class ChatMixture(PythonModel):
            def load_context(self, context):  # type: ignore[no-untyped-def]
                from moa.ask import open_mixture

                self.mixture = open_mixture(Path(context.artifacts["mixture"]), _workspace(context.model_config or {}))

            def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
                try:
                    return respond(self.mixture, model_input)
                except BodyError as error:
                    raise MlflowException.invalid_parameter_value(str(error)) from None

    return ChatMixture()


def respond(mixture: Any, body: Any) -> dict[str, Any]:
    """Answer one chat body. Raises BodyError."""
    from moa.chat import Voice  # which stands on this module

    messages, domain, options = parse(body)
    try:
        answer = mixture.chat(messages, domain=domain, **options)
    except UsageError as error:   # no such expert, a prompt that is too long, an option out of its range
        raise BodyError(str(error)) from None
    return Voice(None).completion(answer)


def parse(body: Any) -> tuple[list[dict[str, str]], str | None, dict[str, Any]]:
    """Messages, forced domain ("base" = no expert, None = the router decides) and decoding options of a chat body.

    Options that the body lacks, or that are null, keep our defaults: without a temperature the answer is greedy.
    """
    if not isinstance(body, dict):
        raise BodyError("The body must be a JSON object with `messages`.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BodyError("`messages` must be a list of at least one message.")
    for place, message in enumerate(messages):
        if (not isinstance(message, dict) or message.get("role") not in ROLES
                or not isinstance(message.get("content"), str)):
            raise BodyError(f"`messages[{place}]` must have a role ({', '.join(ROLES)}) and a text as content.")
    if messages[0]["role"] not in OPENERS:
        raise BodyError(f"`messages[0]` is the {messages[0]['role']}'s; a conversation begins with the "
                        f"{' or the '.join(OPENERS)}.")
    model = body.get("model", "moa")
    if not isinstance(model, str) or not (model in ("moa", "base") or model.removeprefix("moa/") not in ("", model)):
        raise BodyError("`model` must be moa (the router decides), moa/NAME (that expert) or base.")
    domain = None if model == "moa" else model.removeprefix("moa/")
    return ([{"role": message["role"], "content": message["content"]} for message in messages], domain,
            _options(body))


def _options(body: dict[str, Any]) -> dict[str, Any]:
    from moa.generation import Options  # which also says what each option may be

    options: dict[str, Any] = {}
    for key, ours in OPTIONS.items():
        value: Any = body.get(key)
        if value is None:
            continue
        if key in WHOLE and isinstance(value, float) and value.is_integer():   # JSON has 4.0 where it has 4
            value = int(value)
        try:
            Options(**{ours: value})
        except UsageError as error:
            raise BodyError(str(error).replace(ours, f"`{key}`", 1)) from None
        if options.setdefault(ours, value) != value:
            raise BodyError("`max_tokens` and `max_completion_tokens` mean the same and differ: give one.")
    return options


def _workspace(recorded: dict[str, Any]) -> Workspace | None:
    """Where the base is: MOA_WORKSPACE, or the workspace that registered the mixture if it is on this machine."""
    named = os.environ.get("MOA_WORKSPACE")
    if named:
        return Workspace.find(Path(named))
    root = recorded.get("workspace")
    return Workspace(Path(root)) if root and (Path(root) / "params.yaml").is_file() else None
