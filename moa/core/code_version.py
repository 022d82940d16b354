"""Code digests: one for each stage, over the modules of `moa` that the stage's result depends on.

dvc.yaml names these digests as parameters of its stages. So an upgrade of `moa` makes only those stages stale whose
code changed, and `moa plan` shows them before anything runs.

A stage's code is its module in `STAGES` and every module of `moa` that this one imports, directly or not, at the top or
inside a function, with their data files (`FILES`). `moa.core` is left out, because it decides how files are written and
not what is in them, and so are the modules in `WORDING`. The digest of a module covers its syntax tree without comments
and docstrings, and of its imports the names but not the modules they come from: a reworded comment or a moved module
makes nothing stale, and a changed constant does.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from moa.core import digests
from moa.core.files import read_json, write_json, write_json_if_changed
from moa.core.paths import Workspace, user_cache

STAGES = {"base": "moa.base.pin", "quickstart": "moa.data.quickstart.generate", "prepare": "moa.data.prepare",
          "train": "moa.experts.train", "assemble": "moa.mixture.assemble", "evaluate": "moa.evaluation.evaluate"}
WORDING = ("moa.evaluation.summary",)   # modules that only word what a stage reports
# Modules with files that are no Python, as patterns relative to the module's folder: a stage that imports the module
# depends on them.
FILES = {"moa.base.kernels.build": "csrc/*.[ch]", "moa.data.quickstart.bank": "*.yaml"}
PACKAGE = Path(__file__).parents[1]
COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)   # no string in the C sources contains these


def write(workspace: Workspace) -> None:
    """Bring `.moa/code.json` up to date, from which DVC reads the digests when it decides what is stale."""
    write_json_if_changed(workspace.code, _digests())


def digest(stage: str) -> str:
    """Digest of the code behind `stage`, as it is installed here: 32 hexadecimal digits."""
    return _digests()[stage]


def of_modules(*names: str) -> str:
    """Digest of the code of these modules alone, counted as in `digest`: a key for what they computed."""
    return digests.of_bytes("".join(map(_content, names)).encode())[:32]


@cache
def _digests() -> dict[str, str]:
    """`digest` by stage. Parsing takes half a second, so the result is cached under the digest of all source files."""
    sources = [path for kind in ("*.py", "*.c", "*.h", "*.yaml") for path in PACKAGE.rglob(kind)]
    name = f"code-{digests.of_files(sources, PACKAGE)[:32]}.json"
    with suppress(OSError, RuntimeError, ValueError):   # not there yet, damaged, or no home folder
        return dict(read_json(user_cache() / name))
    found = {stage: digests.of_bytes("".join(sorted(map(_content, modules(stage)))).encode())[:32] for stage in STAGES}
    with suppress(OSError, RuntimeError):
        write_json(user_cache() / name, found)
    return found


@cache
def modules(stage: str) -> frozenset[str]:
    """Names of the modules whose code `stage` depends on."""
    found: set[str] = set()
    new = {STAGES[stage]}
    while new:
        found |= new
        new = {name for module in new for name in _imports(module)} - found
    return frozenset(found)


def _file(module: str) -> Path | None:
    """The source file of `module`, None where there is no such module."""
    path = PACKAGE.parent / Path(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _tree(module: str) -> ast.Module:
    file = _file(module)
    assert file is not None, module
    return ast.parse(file.read_bytes())


@cache
def _imports(module: str) -> frozenset[str]:
    """The modules of `moa` that `module` imports when it runs; what it imports for its types alone is left out."""
    names: set[str] = set()
    for node in _running(_tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {inner if _file(inner := f"{node.module}.{alias.name}") else node.module for alias in node.names}
    return frozenset(name for name in names if name.startswith("moa.") and not name.startswith("moa.core.")
                     and name not in WORDING)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all below it, but for what stands under `if TYPE_CHECKING:`."""
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        children = iter(node.orelse)
    for child in children:
        yield from _running(child)


@cache
def _content(module: str) -> str:
    """Digest of what counts of a module, and of its `FILES`."""
    found = hashlib.sha256(repr(_canonical(_tree(module))).encode())
    if module in FILES:
        for file in sorted((PACKAGE.parent / Path(*module.split("."))).parent.glob(FILES[module])):
            text = file.read_text(encoding="utf-8")
            found.update(" ".join(COMMENTS.sub(" ", text).split()).encode() if file.suffix in (".c", ".h")
                         else text.encode())
    return found.hexdigest()


def _canonical(node: object) -> object:
    """A syntax tree as plain tuples: no positions, no docstrings, no empty fields, no modules in imports.

    Python versions differ in which empty fields a node has, so these must not count.
    """
    if isinstance(node, list):
        return [_canonical(each) for each in node]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _documented(node):
        fields["body"] = node.body[1:]
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moa"):
        del fields["module"]
    return type(node).__name__, [(name, _canonical(value)) for name, value in fields.items()
                                 if value is not None and value != []]


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
