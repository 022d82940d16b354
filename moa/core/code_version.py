"""Code digests: one for each stage, over the modules of `moa` that the stage's result depends on.

dvc.yaml names these digests as parameters of its stages. So an upgrade of `moa` makes only those stages stale whose
code changed, and `moa plan` lists these stages before anything runs.

A stage's code is its module in `STAGES` and every module of `moa` that this one imports, directly or not, at the top or
inside a function, with their data files (`FILES`). `moa.core` is left out, because it decides how files are written and
not what is in them, and so are the modules in `WORDING`. The digest of a module covers its syntax tree without
comments, docstrings and the names of the modules that it imports from. So a reworded comment or a moved module makes no
stage stale, and a changed constant does.
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
# Data files of a module, as a pattern relative to the module's folder: a stage that imports the module depends on them.
FILES = {"moa.base.kernels.build": "csrc/*.[ch]", "moa.data.quickstart.bank": "*.yaml"}
PACKAGE = Path(__file__).parents[1]
COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)   # no string in the C sources contains these


def write(workspace: Workspace) -> None:
    """Update `.moa/code.json`, where DVC reads the code digest of each stage when it decides which stages are stale."""
    write_json_if_changed(workspace.code, _digests())


def digest(stage: str) -> str:
    """Digest of the installed code that `stage`, a key of `STAGES`, depends on: 32 hexadecimal digits."""
    return _digests()[stage]


def of_modules(*names: str) -> str:
    """Digest of the code of these modules without their imports, computed as in `digest`: a cache key for results."""
    return digests.of_bytes("".join(map(_content_digest, names)).encode())[:32]


@cache
def _digests() -> dict[str, str]:
    """Code digest by stage. Parsing takes half a second, so a file named by the digest of all sources caches them."""
    sources = [path for kind in ("*.py", "*.c", "*.h", "*.yaml") for path in PACKAGE.rglob(kind)]
    name = f"code-{digests.of_files(sources, PACKAGE)[:32]}.json"
    with suppress(OSError, RuntimeError, ValueError):   # no such file yet, a damaged file, or no home folder
        return dict(read_json(user_cache() / name))
    by_stage = {stage: digests.of_bytes("".join(sorted(map(_content_digest, modules(stage)))).encode())[:32]
                for stage in STAGES}
    with suppress(OSError, RuntimeError):
        write_json(user_cache() / name, by_stage)
    return by_stage


@cache
def modules(stage: str) -> frozenset[str]:
    """Names of the modules whose code `stage`, a key of `STAGES`, depends on, its own module included."""
    reached: set[str] = set()
    frontier = {STAGES[stage]}
    while frontier:
        reached |= frontier
        frontier = {name for module in frontier for name in _imports(module)} - reached
    return frozenset(reached)


def _source_file(module: str) -> Path | None:
    """The source file of `module`; None when there is no such module."""
    path = PACKAGE.parent / Path(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _syntax_tree(module: str) -> ast.Module:
    file = _source_file(module)
    assert file is not None, module
    return ast.parse(file.read_bytes())


@cache
def _imports(module: str) -> frozenset[str]:
    """The modules of `moa` that `module` imports at run time: imports under `if TYPE_CHECKING:` do not count."""
    names: set[str] = set()
    for node in _runtime_nodes(_syntax_tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {inner if _source_file(inner := f"{node.module}.{alias.name}") else node.module
                      for alias in node.names}
    return frozenset(name for name in names if name.startswith("moa.") and not name.startswith("moa.core.")
                     and name not in WORDING)


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and its descendants, except the bodies of `if TYPE_CHECKING:`."""
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        children = iter(node.orelse)
    for child in children:
        yield from _runtime_nodes(child)


@cache
def _content_digest(module: str) -> str:
    """Digest of a module's canonical syntax tree and of its `FILES`, C sources without comments and white space."""
    hasher = hashlib.sha256(repr(_canonical(_syntax_tree(module))).encode())
    if module in FILES:
        for file in sorted((PACKAGE.parent / Path(*module.split("."))).parent.glob(FILES[module])):
            text = file.read_text(encoding="utf-8")
            hasher.update(" ".join(COMMENTS.sub(" ", text).split()).encode() if file.suffix in (".c", ".h")
                          else text.encode())
    return hasher.hexdigest()


def _canonical(node: object) -> object:
    """A syntax tree as plain tuples, without positions, docstrings, empty fields and the modules that imports name.

    Empty fields are left out because Python versions differ in which ones a node has.
    """
    if isinstance(node, list):
        return [_canonical(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _has_docstring(node):
        fields["body"] = node.body[1:]
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moa"):
        del fields["module"]
    return type(node).__name__, [(name, _canonical(value)) for name, value in fields.items()
                                 if value is not None and value != []]


def _has_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
