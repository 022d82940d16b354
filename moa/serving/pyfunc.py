"""The mixture as an MLflow pyfunc model: takes OpenAI chat bodies and returns chat completions.

MLflow stores the script of `moa.release.registration` and no pickle: the model is code that needs `moa` installed, with
the mixture as an artifact.
"""

import os
import warnings
from pathlib import Path
from typing import Any

from moa.core.errors import UsageError
from moa.core.paths import Workspace
from moa.serving.protocol import ChatError, ChatResponseBuilder, parse


def python_model() -> Any:
    """Make the object that MLflow loads and calls. With type hints on `predict`, MLflow would refuse chat bodies."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import PythonModel

    with warnings.catch_warnings(record=True):   # MLflow advises type hints in spite of any filter

        class ChatMixture(PythonModel):
            def load_context(self, context):  # type: ignore[no-untyped-def]
                from moa.release.champion import open_mixture

                self.mixture = open_mixture(Path(context.artifacts["mixture"]), _workspace(context.model_config or {}))

            def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
                try:
                    return respond(self.mixture, model_input)
                except ChatError as error:
                    raise MlflowException.invalid_parameter_value(str(error)) from None

    return ChatMixture()


def respond(mixture: Any, body: Any) -> dict[str, Any]:
    """Answer one chat body with a chat completion. Raises ChatError."""
    question = parse(body)
    try:
        answer = mixture.chat(question.messages, domain=question.domain, **question.options)
    except UsageError as error:   # an unknown expert, a prompt that is too long, or an option out of range
        raise ChatError(400, str(error), "invalid_body") from None
    return ChatResponseBuilder(None).completion(answer).as_dict()


def _workspace(recorded: dict[str, Any]) -> Workspace | None:
    """The workspace whose base is used: MOA_WORKSPACE, or the one that registered the mixture if it exists here."""
    variable = os.environ.get("MOA_WORKSPACE")
    if variable:
        return Workspace.find(Path(variable))
    root = recorded.get("workspace")
    return Workspace(Path(root)) if root and (Path(root) / "params.yaml").is_file() else None
