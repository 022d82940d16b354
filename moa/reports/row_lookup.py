"""`moa domain which`: every place of a row, for those who must account for it or delete it.

The search covers the raw files as they are now (rejected, repeated and redacted rows included), the prepared corpora,
and the corpora that released experts learned from, where they are in the workspace or in DVC's cache. A release whose
corpus cannot be read is named, because silence would mean that it does not hold the row. Nothing is changed.
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
from moa.data.conversations import conversation
from moa.data.corpus import SPLITS, row_id
from moa.data.readers import RowRejected, raw_files, read
from moa.workspace.data_versions import DataVersions

BATCH = 1 << 14
MOST = 1000            # rows that are listed; more are refused
SHORTEST = 3           # letters of a text
SHOWN = 200
DID = {"train": "learned from it", "validation": "was validated on it", "test": "was tested on it"}


@dataclass(frozen=True)
class _Query:
    """The query: a row's id or the beginning of it, or a text that a row contains."""

    text: str            # in lower case, white space as single blanks
    prefix: str | None   # of an id

    @classmethod
    def of(cls, words: str) -> "_Query":
        text = _plain(words)
        if len(text) < SHORTEST:
            raise UsageError(f"{words!r} is too short to look for: give {SHORTEST} letters or more of a row's text, or "
                             "8 hexadecimal digits or more of its id.")
        return cls(text, text if re.fullmatch(r"[0-9a-f]{8,32}", text) else None)

    def matches_id(self, row_id: str) -> bool:
        return self.prefix is not None and row_id.startswith(self.prefix)

    def matches_text(self, texts: Iterable[str]) -> bool:
        return any(self.text in _plain(text) for text in texts)


@dataclass
class _Found:
    """One row of a domain. A row that is not a conversation has no id."""

    domain: str
    id: str | None
    text: str = ""
    places: list[tuple[str, int]] = field(default_factory=list)   # file under data/raw/NAME, and line
    split: str | None = None
    why: str = ""                                                 # the row is in no split
    releases: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"domain": self.domain, "id": self.id, "split": self.split, "why": self.why or None,
                "places": [f"data/raw/{self.domain}/{file}:{line}" for file, line in self.places],
                "text": self.text[:SHOWN], "releases": self.releases}


def which(workspace: Workspace, config: Config, words: str) -> dict[str, Any]:
    """Every row whose id begins with `words` or whose text contains them.

    Returns:
        `rows`, each with its split (or why it has none), its places and its releases; `unknown`, the releases whose
        corpora cannot be read; `found`, and what was `searched`. Raises UsageError for words that are too short, or
        that more than `MOST` rows contain.
    """
    query = _Query.of(words)
    rows: dict[tuple[str, str], _Found] = {}
    for domain in config.domains:
        for found in _raw(workspace, config, domain, query):
            key = (domain, found.id or f"{found.places[0]}")
            if key in rows:
                rows[key].places += found.places
            else:
                rows[key] = found
                _refuse_if_many(words, rows)
    versions, unknown, corpora = _corpora(workspace, config)
    for (domain, _), corpus in corpora.items():
        wanted = {row.id for row in rows.values() if row.domain == domain and row.id}
        for digest, split, text in _prepared(corpus.files, query, wanted):
            row = rows.setdefault((domain, digest), _Found(domain, digest, text))
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
    if len(rows) > MOST:
        raise UsageError(f"{words!r} stands in more than {MOST:,} rows: give more of the text, or a row's id.")


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


# Raw rows.

def _raw(workspace: Workspace, config: Config, domain: str, query: _Query) -> Iterator[_Found]:
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
                yield _Found(domain, None, raw.text, [place], why=f"rejected: {reason}")
            continue
        contents = [message["content"] for message in messages]
        redacted = [{**message, "content": redact(message["content"])} for message in messages]
        digest = row_id(redacted)
        if (query.matches_id(digest) or query.matches_text(contents)
                or query.matches_text(message["content"] for message in redacted)):
            yield _Found(domain, digest, contents[-2], [place])


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def _explain(workspace: Workspace, domain: str, rows: list[_Found]) -> None:
    """Set `why` of rows of the raw files that are in no split, from what the last prepare recorded."""
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
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())


# Prepared rows, now and in releases.

@dataclass
class _Versions:
    numbers: list[int] = field(default_factory=list)
    champion: int | None = None


@dataclass
class _Corpus:
    """One prepared state of a domain: its files by name, and the releases whose expert learned from it."""

    files: dict[str, Path]
    current: bool = False
    versions: list[int] = field(default_factory=list)


def _corpora(workspace: Workspace, config: Config
             ) -> tuple[_Versions, list[dict[str, Any]], dict[tuple[str, str], _Corpus]]:
    """Releases, their corpora that cannot be read, and every readable corpus by domain and digest."""
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
            if (domain, digest) not in corpora and (found := _cached(workspace, digest, known.get(domain, {}))):
                corpora[domain, digest] = _Corpus(found)
            if (domain, digest) in corpora:
                corpora[domain, digest].versions.append(version.version)
            else:
                unknown.append({"version": version.version, "domain": domain,
                                "why": "its corpus is not in this cache"})
    return versions, unknown, corpora


def _cached(workspace: Workspace, digest: str, tags: Mapping[str, str]) -> dict[str, Path] | None:
    """Files of the corpus with this digest in DVC's cache; None where the cache lacks any of them."""
    found = DataVersions(workspace).cached(tags["dvc.md5"]) if "dvc.md5" in tags else {}
    if not {MANIFEST, *(f"{split}.parquet" for split in SPLITS)} <= found.keys():
        return None
    return found if read_json(found[MANIFEST])["digest"] == digest else None


def _prepared(corpus: Mapping[str, Path], query: _Query, ids: set[str]) -> Iterator[tuple[str, str, str]]:
    """(id, split, question) of rows whose id is among `ids` or matches the query, or that contain its text."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    # Arrow filters by one word of ASCII letters, which Arrow and Python lower-case alike; matches are read in full.
    word = max((word for word in query.text.split() if word.isascii()), key=len, default="")
    wanted = pa.array(sorted(ids), pa.string())
    for split in SPLITS:
        with pq.ParquetFile(corpus[f"{split}.parquet"], pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH, columns=["id", "messages"]):
                messages, row_ids = batch.column("messages"), batch.column("id")
                contents = pc.utf8_lower(pc.struct_field(messages.flatten(), "content"))
                holds = pc.list_parent_indices(messages).filter(pc.match_substring(contents, word)).unique()
                near = pc.is_in(pa.array(range(batch.num_rows), holds.type), value_set=holds)
                named = pc.is_in(row_ids, value_set=wanted)
                if query.prefix:
                    named = pc.or_(named, pc.starts_with(row_ids, query.prefix))
                for row in batch.filter(pc.or_(near, named)).to_pylist():
                    texts = [message["content"] for message in row["messages"]]
                    if row["id"] in ids or query.matches_id(row["id"]) or query.matches_text(texts):
                        yield row["id"], split, texts[-2]


# Text.

def text(report: Mapping[str, Any]) -> str:
    """The answer for a terminal."""
    searched, lines = report["searched"], []
    for row in report["rows"]:
        lines += [f"{row['domain']}  {row['id'] or '(no id)'}  {row['split'] or 'in no split: ' + row['why']}",
                  f"  {' '.join(row['text'].split())[:100]}"]
        lines += [f"  {place}" for place in row["places"]] or ["  no longer in data/raw"]
        for split, did in DID.items():
            if numbers := [f"{release['version']}{' (champion)' if release['champion'] else ''}"
                           for release in row["releases"] if release["split"] == split]:
                lines.append(f"  {'release' if len(numbers) == 1 else 'releases'} {', '.join(numbers)} {did}")
    if not report["found"]:
        lines.append(f"Nowhere in the raw files and corpora of {', '.join(searched['domains']) or 'no domain'}, nor in "
                     f"the corpora of {_count(len(searched['releases']), 'release')}.")
    lines += [f"release {each['version']}, {each['domain']}: unknown, {each['why']}" for each in report["unknown"]]
    return "\n".join(lines)


def _count(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
