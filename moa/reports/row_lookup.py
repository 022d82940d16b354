"""`moa domain which`: finds every place of a row, for users who must account for a row or delete it.

The search covers the present raw files (with rejected, duplicate and redacted rows), the prepared corpora, and the
corpora that released experts learned from, if the workspace or DVC's cache has them. A release whose corpus cannot be
read is reported as unknown, because the row may be in it. The search changes nothing.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa.core.config import Config
from moa.core.errors import UsageError
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.text import shorten
from moa.data.conversations import conversation
from moa.data.corpus import SPLITS, row_id
from moa.data.readers import RowRejected, raw_files, read
from moa.workspace.data_versions import DataVersions

BATCH = 1 << 14        # rows of a corpus that are read at once
MOST = 1000            # matching rows that are listed; a query that more rows match is refused
SHORTEST = 3           # characters of a query
SHOWN = 200            # characters of a row's text
# What a release did with a row, by the row's split.
USES = {"train": "learned from it", "validation": "was validated on it", "test": "was tested on it"}


@dataclass(frozen=True)
class _Query:
    """What the user searches for: the id of a row or its beginning, or a text that the row contains."""

    text: str            # normalised by `_normalised`
    prefix: str | None   # the text, if it may be the beginning of an id

    @classmethod
    def of(cls, words: str) -> "_Query":
        """Parse the user's words. Raises UsageError where they are too short."""
        text = _normalised(words)
        if len(text) < SHORTEST:
            raise UsageError(f"{words!r} is too short to look for: give {SHORTEST} letters or more of a row's text, or "
                             "8 hexadecimal digits or more of its id.")
        return cls(text, text if re.fullmatch(r"[0-9a-f]{8,32}", text) else None)

    def matches_id(self, row_id: str) -> bool:
        """Whether the query may mean the row with this id."""
        return self.prefix is not None and row_id.startswith(self.prefix)

    def matches_text(self, texts: Iterable[str]) -> bool:
        """Whether one of `texts` contains the query's text."""
        return any(self.text in _normalised(text) for text in texts)


@dataclass
class _MatchingRow:
    """A row of a domain that matches the query, with its places."""

    domain: str
    id: str | None                                                # None for a row that is not a conversation
    text: str = ""                                                # its question, or the whole raw row
    places: list[tuple[str, int]] = field(default_factory=list)   # file under data/raw/NAME, and line
    split: str | None = None                                      # of the present corpus
    why: str = ""                                                 # why the row is in no split
    releases: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The row as a JSON value."""
        return {"domain": self.domain, "id": self.id, "split": self.split, "why": self.why or None,
                "places": [f"data/raw/{self.domain}/{file}:{line}" for file, line in self.places],
                "text": self.text[:SHOWN], "releases": self.releases}


def which(workspace: Workspace, config: Config, words: str) -> dict[str, Any]:
    """Find the rows whose id begins with `words` or whose text contains them; case and white space do not matter.

    Returns:
        `rows`, each with its split (or why it has none), its places in data/raw and its releases; `unknown`, the
        releases whose corpora cannot be read; `found`, whether there are rows; `searched`, domains and releases.

    Raises UsageError for words that are too short, or that match more than MOST rows.
    """
    query = _Query.of(words)
    rows: dict[tuple[str, str], _MatchingRow] = {}
    for domain in config.domains:
        for match in _raw_matches(workspace, config, domain, query):
            key = (domain, match.id or f"{match.places[0]}")
            if key in rows:
                rows[key].places += match.places
            else:
                rows[key] = match
                _refuse_if_many(words, rows)
    versions, unknown, corpora = _corpora(workspace, config)
    for (domain, _), corpus in corpora.items():
        wanted = {row.id for row in rows.values() if row.domain == domain and row.id}
        for digest, split, text in _corpus_matches(corpus.files, query, wanted):
            row = rows.setdefault((domain, digest), _MatchingRow(domain, digest, text))
            _refuse_if_many(words, rows)
            row.split = split if corpus.current else row.split
            row.releases += [{"version": number, "split": split, "champion": number == versions.champion}
                             for number in corpus.versions]
    for domain in config.domains:
        _explain(workspace, domain, [row for row in rows.values() if row.domain == domain and row.split is None])
    for row in rows.values():
        row.releases.sort(key=lambda release: release["version"])
        row.why = row.why or ("" if row.split else "it is gone from data/raw, but releases hold it")
    return {"query": words, "found": bool(rows), "rows": [row.as_dict() for row in rows.values()], "unknown": unknown,
            "searched": {"domains": list(config.domains), "releases": versions.numbers}}


def _refuse_if_many(words: str, rows: Mapping[Any, Any]) -> None:
    """Raise UsageError when more than MOST rows match."""
    if len(rows) > MOST:
        raise UsageError(f"{words!r} stands in more than {MOST:,} rows: give more of the text, or a row's id.")


def _normalised(text: str) -> str:
    """`text` in lower case, with white space as single blanks."""
    return " ".join(text.lower().split())


# Raw rows.

def _raw_matches(workspace: Workspace, config: Config, domain: str, query: _Query) -> Iterator[_MatchingRow]:
    """The matching rows in the raw files of a domain, before and after redaction; one for each place."""
    redact: Callable[[str], str] = str
    if config.prepare.redact:
        from moa.data.redaction import Redactor

        redact = Redactor(config.prepare.redact)
    folder = workspace.raw(domain)
    for raw in read(folder, domain) if raw_files(folder) else ():
        place = (raw.file, raw.line)
        try:
            messages = conversation(raw.value, config.domains[domain])
        except RowRejected as reason:
            if query.matches_text([raw.text, *_strings(raw.value)]):
                yield _MatchingRow(domain, None, raw.text, [place], why=f"rejected: {reason}")
            continue
        contents = [message["content"] for message in messages]
        redacted = [{**message, "content": redact(message["content"])} for message in messages]
        digest = row_id(redacted)
        if (query.matches_id(digest) or query.matches_text(contents)
                or query.matches_text(message["content"] for message in redacted)):
            yield _MatchingRow(domain, digest, contents[-2], [place])


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _explain(workspace: Workspace, domain: str, rows: list[_MatchingRow]) -> None:
    """Set `why` of those rows that are in the raw files, from what the last prepare recorded.

    `rows` are matching rows of the domain that are in no split of its present corpus.
    """
    folder = workspace.corpus(domain)
    rows = [row for row in rows if row.places and row.id]
    if not rows:
        return
    if not (folder / MANIFEST).is_file():
        for row in rows:
            row.why = "the domain was not prepared yet"
        return
    by_id = {row.id: row for row in rows}
    for record in _records(folder / "near_duplicates.jsonl"):
        if record["id"] in by_id:
            by_id[record["id"]].why = f"a near-duplicate of {record['of']} in {record.get('of_split', 'the corpus')}"
    by_place = {place: row for row in rows for place in row.places}
    for record in _records(folder / "rejected.jsonl"):
        if (place := (record["file"], record["line"])) in by_place and not by_place[place].why:
            by_place[place].why = f"rejected: {record['reason']}"
    for row in rows:
        row.why = row.why or "it came after the last prepare: run `moa run`"


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file of lines; none where there is no file."""
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())


# Prepared rows, now and in releases.

@dataclass
class _Versions:
    """The versions of all releases."""

    numbers: list[int] = field(default_factory=list)
    champion: int | None = None


@dataclass
class _Corpus:
    """One version of a domain's corpus."""

    files: dict[str, Path]                              # by name
    current: bool = False                               # whether the workspace has it now
    versions: list[int] = field(default_factory=list)   # releases whose expert learned from it


def _corpora(workspace: Workspace, config: Config
             ) -> tuple[_Versions, list[dict[str, Any]], dict[tuple[str, str], _Corpus]]:
    """All releases; those corpora of releases that cannot be read; every readable corpus by domain and digest."""
    corpora: dict[tuple[str, str], _Corpus] = {}
    for domain in config.domains:
        folder = workspace.corpus(domain)
        if (folder / MANIFEST).is_file():
            corpora[domain, read_json(folder / MANIFEST)["digest"]] = _Corpus(
                {path.name: path for path in folder.iterdir()}, current=True)
    from moa.release.registry import Registry

    versions, unknown = _Versions(), list[dict[str, Any]]()
    registry = Registry(workspace, config)
    if not registry.exists():
        return versions, unknown, corpora
    champion = registry.champion()
    versions.champion = champion.version if champion else None
    for version in registry.versions():
        versions.numbers.append(version.version)
        known = registry.corpora(version)
        for domain in sorted(version.experts):
            digest = known.get(domain, {}).get("moa.digest", "")
            if (domain, digest) not in corpora and (files := _cached(workspace, digest, known.get(domain, {}))):
                corpora[domain, digest] = _Corpus(files)
            if (domain, digest) in corpora:
                corpora[domain, digest].versions.append(version.version)
            else:
                unknown.append({"version": version.version, "domain": domain,
                                "why": "its corpus is not in this cache"})
    return versions, unknown, corpora


def _cached(workspace: Workspace, digest: str, tags: Mapping[str, str]) -> dict[str, Path] | None:
    """The files of the corpus with this digest in DVC's cache; None where the cache lacks one of them.

    `tags` are those of `Registry.corpora`.
    """
    files = DataVersions(workspace).cached(tags["dvc.md5"]) if "dvc.md5" in tags else {}
    if not {MANIFEST, *(f"{split}.parquet" for split in SPLITS)} <= files.keys():
        return None
    return files if read_json(files[MANIFEST])["digest"] == digest else None


def _corpus_matches(corpus: Mapping[str, Path], query: _Query, ids: set[str]) -> Iterator[tuple[str, str, str]]:
    """(id, split, question) of the rows of a corpus that match the query, or whose id is among `ids`."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    # Arrow filters rows by the longest ASCII word of the query, because Arrow and Python lower-case ASCII alike. The
    # rows that remain are compared with the whole query in Python.
    word = max((word for word in query.text.split() if word.isascii()), key=len, default="")
    wanted = pa.array(sorted(ids), pa.string())
    for split in SPLITS:
        with pq.ParquetFile(corpus[f"{split}.parquet"], pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH, columns=["id", "messages"]):
                messages, row_ids = batch.column("messages"), batch.column("id")
                contents = pc.utf8_lower(pc.struct_field(messages.flatten(), "content"))
                parents = pc.list_parent_indices(messages).filter(pc.match_substring(contents, word)).unique()
                contains_word = pc.is_in(pa.array(range(batch.num_rows), parents.type), value_set=parents)
                has_id = pc.is_in(row_ids, value_set=wanted)
                if query.prefix:
                    has_id = pc.or_(has_id, pc.starts_with(row_ids, query.prefix))
                for row in batch.filter(pc.or_(contains_word, has_id)).to_pylist():
                    texts = [message["content"] for message in row["messages"]]
                    if row["id"] in ids or query.matches_id(row["id"]) or query.matches_text(texts):
                        yield row["id"], split, texts[-2]


# Text.

def text(report: Mapping[str, Any]) -> str:
    """The result of `which` as text for a terminal."""
    searched, lines = report["searched"], []
    for row in report["rows"]:
        lines += [f"{row['domain']}  {row['id'] or '(no id)'}  {row['split'] or 'in no split: ' + row['why']}",
                  f"  {shorten(row['text'], 100)}"]
        lines += [f"  {place}" for place in row["places"]] or ["  no longer in data/raw"]
        for split, use in USES.items():
            if numbers := [f"{release['version']}{' (champion)' if release['champion'] else ''}"
                           for release in row["releases"] if release["split"] == split]:
                lines.append(f"  {'release' if len(numbers) == 1 else 'releases'} {', '.join(numbers)} {use}")
    if not report["found"]:
        lines.append(f"Nowhere in the raw files and corpora of {', '.join(searched['domains']) or 'no domain'}, nor in "
                     f"the corpora of {_count(len(searched['releases']), 'release')}.")
    lines += [f"release {each['version']}, {each['domain']}: unknown, {each['why']}" for each in report["unknown"]]
    return "\n".join(lines)


def _count(count: int, noun: str) -> str:
    """A number with its noun in singular or plural."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
