"""Resolves sources of rows (files, folders, data sets of a hub) to files, and checks that their rows can be used.

A file's name in data/raw/NAME is its original stem and the beginning of its digest, so equal content has one name. No
function here changes data/.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moa.core import digests
from moa.core.config import Domain
from moa.core.errors import ArtifactError, DataError, UsageError, in_words, of_machine
from moa.core.names import is_valid_unicode, printable
from moa.core.paths import Workspace
from moa.core.text import name_list
from moa.data.conversations import RowRejected, conversation, fields
from moa.data.readers import FORMATS, raw_files, read_file

# Words in the names of columns that hold questions, and answers, the most telling first: for a hint alone.
ASKING = ("instruction", "question", "prompt", "query", "request", "input", "q", "problem", "text")
ANSWERING = ("output", "answer", "response", "reply", "completion", "a", "solution", "target", "label")
LOOKED_AT = 100        # first rows of a file that `check` reads
LOOKED_FOR = 10_000    # rows in which `check` looks for a column that the first ones lack
HUB = "hub:OWNER/NAME@REVISION"


@dataclass(frozen=True)
class HubDataset:
    """Which part of a hub's data set to take."""

    revision: str | None = None  # None = the one in the source, or main
    split: str | None = None     # None = train
    subset: str | None = None    # None = the only one


@dataclass(frozen=True)
class SourceFile:
    """A file with rows, whose content is known by its digest."""

    path: Path
    stem: str      # of its original name, with safe characters only
    digest: str
    origin: str    # original name, without the folders of this machine
    size: int      # bytes

    def name(self, digits: int = 12) -> str:
        """The file's name in data/raw/NAME, with so many hexadecimal digits of its digest."""
        return f"{self.stem}-{self.digest[:digits]}{Path(self.path).suffix.lower()}"


@dataclass(frozen=True)
class SourceFiles:
    """The files of all sources of a command."""

    found: tuple[SourceFile, ...]   # one for each content
    twice: tuple[str, ...]          # origins of files whose content `found` has already
    ignored: tuple[str, ...]        # names of files of unknown formats


@contextmanager
def gathered(workspace: Workspace, sources: Sequence[str], here: Path, hub: HubDataset) -> Iterator[SourceFiles]:
    """Find the files of `sources` and download data sets of a hub, which are deleted when the block ends.

    Several processes may do this at once.

    Args:
        here: folder that relative paths start from.

    Raises UsageError or DataError naming a source that does not exist or cannot be read.
    """
    remote = [source for source in sources if source.startswith("hub:")]
    if hub != HubDataset() and not remote:
        raise UsageError(f"--revision, --split and --subset belong to data sets of a hub; a source of that kind is "
                         f"written {HUB}.")
    scratch = workspace.local / f"intake.{os.getpid()}"
    for other in scratch.parent.glob("intake.*"):
        if other == scratch or not process_is_alive(other.suffix[1:]):   # left by a killed command
            shutil.rmtree(other, ignore_errors=True)
    by_digest: dict[str, SourceFile] = {}
    twice: list[str] = []
    ignored: list[str] = []
    try:
        for source in sources:
            if source in remote:
                scratch.mkdir(parents=True, exist_ok=True)
                files_of_source = [_from_hub(source, hub, scratch)]
            else:
                files_of_source, others = _from_disk(workspace, source, here)
                ignored += others
            for file in files_of_source:
                if file.digest in by_digest:
                    twice.append(file.origin)
                by_digest.setdefault(file.digest, file)
        yield SourceFiles(tuple(by_digest.values()), tuple(twice), tuple(ignored))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def process_is_alive(pid: str) -> bool:
    """Whether a process with this id runs on this machine; False for a text that is no process id."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True   # the process belongs to another user
    except (OSError, ValueError, OverflowError):
        return False
    return True


# Files and folders.

def _from_disk(workspace: Workspace, source: str, here: Path) -> tuple[list[SourceFile], list[str]]:
    """The files of a source that is a file or folder, and the names of a folder's files of unknown formats."""
    path = (here / Path(source).expanduser()).resolve()
    source = printable(source)
    if not os.path.exists(path):   # noqa: PTH110 - False for a name that is too long, too
        raise UsageError(f"There is no file or folder {source}; a source is a {', '.join(FORMATS)} file, a folder of "
                         f"these, or {HUB}.")
    data = workspace.data.resolve()
    if path.is_relative_to(data) or data.is_relative_to(path):
        raise UsageError(f"{source} is, or holds, the workspace's own data/; name the files that your rows come from. "
                         "Files that lie in data/raw/NAME already are taken in by `moa domain add NAME`.")
    if path.is_file():
        if path.suffix.lower() not in FORMATS:
            raise UsageError(f"{source} is not of a known format; files end with {', '.join(FORMATS)}.")
        return [look(path, path.name)], []
    if not path.is_dir():
        raise UsageError(f"{source} is neither a file nor a folder.")
    chosen = raw_files(path)
    others = sorted(printable(other.relative_to(path)) for other in path.rglob("*")
                    if other.is_file() and other not in set(chosen))
    if not chosen:
        raise UsageError(f"The folder {source} holds no {', '.join(FORMATS)} file"
                         f"{f', only {name_list(others)}' if others else ' and nothing else'}.")
    return [look(each, f"{path.name}/{each.relative_to(path).as_posix()}") for each in chosen], others


def look(path: Path, origin: str) -> SourceFile:
    """Describe and digest the file at `path`, whose original name is `origin`.

    Raises DataError when it cannot be read, and ArtifactError when the cause is the machine, such as a failing disk.
    """
    origin = printable(origin)
    try:
        return SourceFile(path, stem(path.stem), digests.of_file(path), origin, path.stat().st_size)
    except OSError as error:
        kind = ArtifactError if of_machine(error) else DataError
        raise kind(f"{origin} cannot be read: {in_words(error)}.") from error


def stem(name: str) -> str:
    """`name` without characters that file systems, shells or YAML would quote, at most 60 long; "rows" if empty."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")[:60] or "rows"


# A hub's data sets.

def _from_hub(source: str, hub: HubDataset, scratch: Path) -> SourceFile:
    """Download one split of a hub's data set into the folder `scratch`. Raises UsageError or DataError."""
    name, _, revision = source.removeprefix("hub:").partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"The source {printable(source)} is not understood; write {HUB}.")
    if revision and hub.revision not in (None, revision):
        raise UsageError(f"{printable(source)} and --revision {printable(hub.revision or '')} contradict each other; "
                         "give one revision.")
    for part in (revision, hub.revision, hub.split, hub.subset):
        if part and not is_valid_unicode(part):
            raise UsageError(f"{printable(part)} is no UTF-8, and no part of a hub's data set is called so.")
    commit = _commit(name, revision or hub.revision or "main")
    split = hub.split or "train"
    path = scratch / f"{stem(f'{name}-{split}')}-{commit[:12]}.parquet"
    _download(name, commit, split, hub.subset, path)
    origin = f"hub:{name}@{commit} {f'{hub.subset} ' if hub.subset else ''}{split}"
    return SourceFile(path, stem(f"{name}-{f'{hub.subset}-' if hub.subset else ''}{split}"), digests.of_file(path),
                      printable(origin), path.stat().st_size)


def _commit(name: str, revision: str) -> str:
    """The commit that a revision of a hub's data set names now. Raises DataError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except GatedRepoError:
        raise DataError(f"The data set {name} asks for consent: give it on the hub and set HF_TOKEN.") from None
    except RepositoryNotFoundError:
        raise DataError(f"The hub has no data set {name}, or it is private; check the name, or set HF_TOKEN.") from None
    except RevisionNotFoundError:
        raise DataError(f"The data set {name} has no revision {revision}; name a branch, tag or commit.") from None
    except OfflineModeIsEnabled:
        raise DataError(f"The data set {name} cannot be fetched: HF_HUB_OFFLINE is set; unset it, or add files."
                        ) from None
    except (OSError, _transport()) as error:
        raise DataError(f"The hub cannot be asked for the data set {name}: {_first_line(error)} Check the network, or "
                        "add files.") from None
    assert commit is not None, "the hub names a commit for every revision"
    return commit


def _download(name: str, commit: str, split: str, subset: str | None, path: Path) -> None:
    """Write one split to `path` as Parquet. Code in the data set's repository is never run. Raises DataError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(name, subset, revision=commit, split=split)
        loaded.to_parquet(str(path))
    except (ValueError, OSError, datasets.exceptions.DatasetsError, _transport()) as error:
        raise DataError(f"The split {split!r} of the data set {name} cannot be read: {_first_line(error)}") from None


def _transport() -> type[Exception]:
    """The HTTPError of the HTTP library that the hub's client uses: requests or httpx, depending on its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__bases__ if kind.__name__ == "HTTPError")


def _first_line(error: BaseException) -> str:
    """The first line of an error's message as a sentence of at most 300 characters, or its class."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text[:300] if text.endswith(".") else f"{text[:300]}."


# Whether the rows can be used.

def check(source: SourceFile, domain: Domain) -> None:
    """Check that the rows of a file can be used with the settings of `domain`.

    Raises DataError unless one of the file's first rows becomes a conversation, and every column that `domain` names
    exists.
    """
    rows = _values(source, LOOKED_AT)
    if not rows:
        raise DataError(f"{source.origin} has no rows.")
    columns = {str(key): None for row in rows if isinstance(row, dict) for key in row}
    wanted = {f"--map {key}": column for key, column in domain.map.items()}
    if domain.group_by not in (None, "none"):
        wanted["--group-by"] = domain.group_by or ""
    wanted |= {f"--template {{{column}}}": column for column in fields(domain.template or "")}
    missing = {option: column for option, column in wanted.items() if column not in columns}
    if missing:   # JSON rows may differ in keys, and a CSV row has no key for an empty field
        more = {str(key): None for row in _values(source, LOOKED_FOR) if isinstance(row, dict) for key in row}
        for option, column in missing.items():
            if column not in more:
                raise DataError(f"{source.origin} has no column {column!r}, which {option} names; its columns are "
                                f"{name_list(list(more)) or 'none'}.")
    reasons: Counter[str] = Counter()
    for row in rows:
        try:
            conversation(row, domain)
            return
        except RowRejected as rejected:
            reasons[str(rejected)] += 1
    reason, count = reasons.most_common(1)[0]
    raise DataError(f"{source.origin}: none of its first {len(rows)} rows can be used, most often ({count}) because "
                    f"of: {reason}. {_advice(list(columns))}")


def _values(source: SourceFile, limit: int) -> list[Any]:
    """The first `limit` rows of a file, as JSON values."""
    return [raw.value for raw in islice(read_file(source.path, source.origin), limit)]


def _advice(columns: list[str]) -> str:
    """A sentence that tells the user how to map these columns."""
    if not columns:
        return "A row is an object with instruction and output, or with chat messages."
    asked = _called(columns, ASKING) or columns[0]
    rest = [column for column in columns if column != asked] or columns
    return (f"Its columns are {name_list(columns)}; say which holds what, for instance --map instruction="
            f"{printable(asked)},output={printable(_called(rest, ANSWERING) or rest[-1])}.")


def _called(columns: Sequence[str], words: Sequence[str]) -> str | None:
    """The column whose name has the first of these words that any name has; None without one."""
    return next((column for word in words for column in columns if word in re.split(r"[\W_]+", column.lower())), None)


def copy_checked(source: SourceFile, target: Path, *, link: bool = False) -> None:
    """Copy a file to `target` and verify the copy's digest. Raises DataError when the file has changed,
    and ArtifactError when the machine is the cause, such as a full disk.

    With `link`, `target` becomes a hard link to the file if it has none yet and the file system allows it. A file with
    another hard link is copied, because a program may write to it through that link.
    """
    try:
        if not (link and _linked(source.path, target)):
            shutil.copyfile(source.path, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
        same = digests.of_file(target) == source.digest
    except OSError as error:
        kind = ArtifactError if of_machine(error) else DataError
        raise kind(f"{source.origin} cannot be copied to {target.parent.name}: {error.strerror}.") from error
    if not same:
        raise DataError(f"{source.origin} changed while it was copied; run the command again.")


def _linked(source: Path, target: Path) -> bool:
    """Make `target` a hard link to `source`. Returns whether that was possible and safe."""
    if source.is_symlink() or source.stat().st_nlink != 1:
        return False
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
