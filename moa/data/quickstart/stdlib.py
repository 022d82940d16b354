"""Functions of the running interpreter's standard library, each with the first sentence of its docstring.

Files are parsed, never imported. The rows depend on the Python version. Test suites and applications are left out.
"""

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moa.data.quickstart.bank import Row, distinct, words

SKIPPED = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__",
                     "turtledemo"})
INSTRUCTIONS = words(
    "Summarise what this function does in one sentence.|What does this Python function do? Answer in one sentence.|"
    "Write the first sentence of this function's docstring.|Describe this function in a single sentence.|"
    "Say in one sentence what this code does.|Document this function with one sentence.|"
    "In one sentence, what is this function for?|Give a one-line description of this function.")
MOST_CHARACTERS = 360   # of source: about 90 tokens
SHORTEST, LONGEST = 4, 18   # words of a summary
SENTENCE = re.compile(r"[A-Z][^\n]*?[.!?](?=\s|$)")
ABBREVIATED = ("e.g.", "i.e.", "etc.", "vs.", "cf.")
MARKUP = re.compile(r"[`*<>|{}\\]|::|->|https?:")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def library_files(root: Path) -> list[Path]:
    """The modules of the standard library, in the order of their names."""
    return sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))


def summary(docstring: str) -> str | None:
    """The first sentence of a docstring as plain prose; None when it is not a clean sentence."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    if not paragraph.isascii() or any(short in paragraph for short in ABBREVIATED):
        return None
    match = SENTENCE.match(paragraph)
    sentence = match.group() if match else paragraph + "."
    if MARKUP.search(sentence) or not sentence[0].isalpha() or not sentence[0].isupper():
        return None
    return sentence if SHORTEST <= len(sentence.split()) <= LONGEST else None


def does_something(function: Function) -> bool:
    """Whether the body, without docstring, has a statement besides `pass`, `raise` and constants."""
    body = [node for node in function.body if not isinstance(node, ast.Pass | ast.Raise)]
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


def documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(source without docstring, summary) of every short function of a module, methods included."""
    for node in ast.walk(tree):
        if not isinstance(node, Function) or not (docstring := ast.get_docstring(node)):
            continue
        sentence = summary(docstring)
        node.body = node.body[1:]
        if sentence is None or not does_something(node):
            continue
        source = ast.unparse(node)
        if len(source) <= MOST_CHARACTERS and source.isascii() and sentence.rstrip(".").lower() not in source.lower():
            yield source, sentence


def functions(root: Path) -> list[tuple[str, str]]:
    """(source, summary) of every short documented function of the modules below `root`, without repeated ones."""
    pairs: list[tuple[str, str]] = []
    sources: set[str] = set()
    summaries: set[str] = set()
    for path in library_files(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):   # templates and files kept for old interpreters
            continue
        for source, sentence in documented(tree):
            if source not in sources and sentence.lower() not in summaries:
                pairs.append((source, sentence))
            sources.add(source)
            summaries.add(sentence.lower())
    return pairs


def generate(rng: random.Random, rows: int) -> list[Row]:
    """`rows` rows of the corpus, or fewer where no more differ enough."""
    pairs = functions(Path(sysconfig.get_path("stdlib")))
    rng.shuffle(pairs)
    remaining = iter(pairs)

    def draw() -> Row | None:
        source, sentence = next(remaining, ("", ""))
        return {"instruction": rng.choice(INSTRUCTIONS), "input": source, "output": sentence} if source else None

    return distinct(draw, rows)
