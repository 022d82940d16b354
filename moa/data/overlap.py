"""Overlap of a domain with other domains: shared rows, near-duplicates, and rows that resemble another domain's.

Prepared corpora, and the splits of one corpus, are compared in three ways: by ids; by shingles
(moa.data.near_duplicates); and by the topic of their questions, which finds the nearest neighbours of each row among a
sample of all domains. A row whose neighbours are of another domain is hard to route. The vector of a question is the
mean of the base's input embeddings of its tokens, so no model runs. The report says how many rows were sampled.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moa.base.load import load_tokenizer
from moa.base.pin import locate
from moa.core.config import Config
from moa.core.errors import BaseModelError
from moa.core.paths import MANIFEST, Workspace
from moa.data.corpus import SPLITS

SEED = 0
BATCH = 1 << 14         # rows of a corpus in memory
EXAMPLES = 5            # of each kind
SHOWN = 160             # characters of an example
ALIKE = 0.8             # Jaccard similarity of near-duplicates: lower than that at which stage `prepare` removes rows
COMPARED = 10_000       # rows of the domain whose shingles are compared, and as many of all others together
SAMPLE = 500            # training rows per domain whose nearest neighbours are searched
TOKENS = 512            # tokens of a question that are read
RARE = 1e-2             # share of all tokens at which a token has weight one half
NEIGHBOURS = 5          # nearest neighbours of a row
STRANGERS = 4           # a row looks like another domain when so many of its neighbours are of that domain

# Thresholds of the warnings.
LOOKS_SHARE = 0.02      # share of the sampled rows that look like another domain
APART = 0.8             # accuracy of telling two domains apart by their neighbours


@dataclass(frozen=True)
class _Sample:
    """Some rows of one corpus; the lists have one element a row."""

    domain: str
    ids: list[str]
    splits: list[str]
    questions: list[str]   # all user messages
    texts: list[str]       # the whole conversations

    def __len__(self) -> int:
        return len(self.ids)


def domain_overlap(workspace: Workspace, config: Config, domain: str) -> dict[str, Any]:
    """Report on the overlap of a domain's corpus with the other prepared domains, and between its own splits.

    Args:
        workspace: holds the corpora and the fetched base.
        config: its domains and its base.
        domain: a domain whose corpus is prepared.

    Returns:
        A JSON object: `others` and `not_prepared` (names of domains), `duplicates`, `near_duplicates`, `neighbours`
        (None without other domains), and `warnings`, which are sentences for the user.

    Raises:
        BaseModelError: the base was not fetched, or has changed.
    """
    prepared = [name for name in config.domains if (workspace.corpus(name) / MANIFEST).is_file()]
    others = [name for name in prepared if name != domain]
    report: dict[str, Any] = {
        "others": others, "not_prepared": [name for name in config.domains if name not in prepared],
        "duplicates": _duplicates(workspace, domain, others),
        "near_duplicates": _near_duplicates(workspace, domain, others),
        "neighbours": _neighbours(workspace, config, domain, others) if others else None,
    }
    return {**report, "warnings": list(_warnings(domain, report))}


# Rows of corpora.

def _sample(folder: Path, counts: Mapping[str, int]) -> _Sample:
    """Rows of a corpus, chosen by a fixed seed: up to `counts[split]` of each split."""
    import pyarrow.parquet as pq

    sample = _Sample(folder.name, [], [], [], [])
    for split, count in counts.items():
        with pq.ParquetFile(folder / f"{split}.parquet", pre_buffer=False) as file:
            total, done = file.metadata.num_rows, 0
            chosen = np.sort(np.random.default_rng(SEED).choice(total, min(count, total), replace=False))
            for batch in file.iter_batches(BATCH, columns=["id", "messages"]):
                inside = chosen[(chosen >= done) & (chosen < done + batch.num_rows)] - done
                done += batch.num_rows
                rows = batch.take(inside)
                sample.ids.extend(rows.column("id").to_pylist())
                sample.splits.extend([split] * len(inside))
                for messages in rows.column("messages").to_pylist():
                    sample.texts.append(" ".join(message["content"] for message in messages))
                    sample.questions.append("\n".join(message["content"] for message in messages
                                                      if message["role"] == "user"))
    return sample


def _ids(folder: Path) -> tuple[Any, np.ndarray]:
    """The ids of all rows of a corpus, as an Arrow array, and for each the index of its split in SPLITS: int64 [N]."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pq.read_table(folder / f"{split}.parquet", columns=["id"]).column("id") for split in SPLITS]
    splits = np.repeat(np.arange(len(SPLITS)), [len(column) for column in columns])
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()), splits


def _questions(folder: Path, ids: Iterable[str]) -> dict[str, str]:
    """The beginning of the last user message of the rows of a corpus with these ids, by id."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted, questions = pa.array(sorted(set(ids)), pa.string()), {}
    for split in SPLITS:
        with pq.ParquetFile(folder / f"{split}.parquet", pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH, columns=["id", "messages"]) if len(wanted) else ():
                for row in batch.filter(pc.is_in(batch.column("id"), value_set=wanted)).to_pylist():
                    questions[row["id"]] = row["messages"][-2]["content"][:SHOWN]
    return questions


# Duplicates and near-duplicates.

def _duplicates(workspace: Workspace, domain: str, others: Sequence[str]) -> dict[str, Any]:
    """Rows that other domains contain as well: their number by other domain and by pair of splits, and examples."""
    import pyarrow.compute as pc

    ids, splits = _ids(workspace.corpus(domain))
    shared: dict[str, dict[str, Any]] = {}
    examples = []
    for other in others:
        other_ids, other_splits = _ids(workspace.corpus(other))
        matches = pc.index_in(ids, value_set=other_ids).to_numpy(zero_copy_only=False)   # NaN or None: no match
        rows = np.flatnonzero(~np.isnan(matches.astype(np.float64)))
        if not len(rows):
            continue
        match_splits = other_splits[matches[rows].astype(np.int64)]
        pairs = Counter(zip(splits[rows].tolist(), match_splits.tolist(), strict=True))
        shared[other] = {"count": len(rows), "splits": {f"{SPLITS[split]}/{SPLITS[other_split]}": count
                                                        for (split, other_split), count in sorted(pairs.items())}}
        examples += [{"id": ids[int(row)].as_py(), "domain": other, "split": SPLITS[splits[row]],
                      "other_split": SPLITS[split]} for row, split in zip(rows[:EXAMPLES], match_splits, strict=False)]
    examples = examples[:EXAMPLES]
    texts = _questions(workspace.corpus(domain), (example["id"] for example in examples))
    return {"count": sum(counts["count"] for counts in shared.values()), "domains": shared,
            "examples": [{**example, "text": texts[example["id"]]} for example in examples]}


def _near_duplicates(workspace: Workspace, domain: str, others: Sequence[str]) -> dict[str, Any]:
    """Sampled rows that are near-duplicates of a sampled row of another domain, or of another split of `domain`.

    Validation and test rows are a quarter of the sample each, because a near-duplicate of theirs does most harm.
    """
    from moa.data import near_duplicates

    samples = [_sample(workspace.corpus(domain), {"test": COMPARED // 4, "validation": COMPARED // 4,
                                                  "train": COMPARED // 2})]
    share = COMPARED // max(len(others), 1)
    samples += [_sample(workspace.corpus(other), {split: share // 4 if split != "train" else share // 2
                                                  for split in SPLITS}) for other in others]
    owners = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
    starts = np.concatenate(([0], np.cumsum([len(sample) for sample in samples])))
    across: dict[str, dict[str, Any]] = {kind: {"rows": set(), "domains": Counter(), "examples": []}
                                         for kind in ("domains", "splits")}
    own = samples[0]
    for row, match, similarity in near_duplicates.pairs([text for sample in samples for text in sample.texts], ALIKE):
        if row >= len(own):
            continue   # row < match, so neither row is of `domain`
        other, other_row = samples[owners[match]], match - int(starts[owners[match]])
        same_domain = other is own
        if (same_domain and own.splits[row] == own.splits[match]) or own.ids[row] == other.ids[other_row]:
            continue
        matches = across["splits" if same_domain else "domains"]
        if row not in matches["rows"]:
            matches["domains"][other.domain] += 1
        matches["rows"].add(row)
        if len(matches["examples"]) < EXAMPLES:
            matches["examples"].append({
                "id": own.ids[row], "split": own.splits[row], "text": own.questions[row][:SHOWN],
                "other_id": other.ids[other_row], "other_split": other.splits[other_row],
                "other_text": other.questions[other_row][:SHOWN], "domain": other.domain,
                "similarity": round(similarity, 3)})
    return {"threshold": ALIKE, "compared": len(own), "compared_elsewhere": len(owners) - len(own),
            "across_domains": {"count": len(across["domains"]["rows"]),
                               "domains": dict(sorted(across["domains"]["domains"].items())),
                               "examples": across["domains"]["examples"]},
            "across_splits": {"count": len(across["splits"]["rows"]), "examples": across["splits"]["examples"]}}


# Neighbours.

def _neighbours(workspace: Workspace, config: Config, domain: str, others: Sequence[str]) -> dict[str, Any]:
    """Sampled rows that look like another domain, and how well each other domain is told apart from `domain`."""
    samples = [_sample(workspace.corpus(name), {"train": SAMPLE}) for name in (domain, *others)]
    samples = [sample for sample in samples if sample.domain == domain or len(sample) > NEIGHBOURS]
    vectors = _normalised(_vectors(workspace, config, samples))
    labels = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
    own = samples[0]
    nearest = labels[_nearest(vectors[0], np.concatenate(vectors))]   # (own rows, NEIGHBOURS)
    counts = np.stack([(nearest == label).sum(1) for label in range(len(samples))], axis=1)
    counts[:, 0] = 0
    rows = np.flatnonzero(counts.max(1) >= STRANGERS)
    looks_like = counts[rows].argmax(1)
    return {
        "sampled": len(own), "count": len(rows), "share": round(len(rows) / max(len(own), 1), 4),
        "domains": dict(sorted(Counter(samples[label].domain for label in looks_like).items())),
        "examples": [{"id": own.ids[row], "looks_like": samples[label].domain, "text": own.questions[row][:SHOWN],
                      "neighbours": int(counts[row, label])}
                     for row, label in sorted(zip(rows.tolist(), looks_like.tolist(), strict=True),
                                              key=lambda pair: -counts[pair])[:EXAMPLES]],
        "told_apart": {sample.domain: _separability(vectors[0], vectors[number])
                       for number, sample in enumerate(samples) if number}}


def _vectors(workspace: Workspace, config: Config, samples: Sequence[_Sample]) -> list[np.ndarray]:
    """Mean input embedding of each row's questions, frequent tokens weighted down: float32 [rows, D] per sample.

    The weights are those of Arora et al. 2017 (see `_normalised`).
    """
    tokenizer = load_tokenizer(workspace)
    ids = [[row[:TOKENS] for row in tokenizer([text[:TOKENS * 20] for text in sample.questions],
                                              add_special_tokens=False)["input_ids"]] for sample in samples]
    used, counts = np.unique(np.concatenate([np.array(row, np.int64) for rows in ids for row in rows]),
                             return_counts=True)
    weights = (RARE / (RARE + counts / counts.sum())).astype(np.float32)[:, None]
    table = embeddings(locate(workspace, config.base), used) * weights
    return [np.stack([table[np.searchsorted(used, row)].mean(0) if row else np.zeros(table.shape[1], np.float32)
                      for row in rows]) for rows in ids]


def embeddings(weights: Path, ids: np.ndarray) -> np.ndarray:
    """Read the base's input embeddings of the tokens `ids` from its safetensors files: float32 [len(ids), D].

    The tensor is recognised by its shape, a row for every token of the vocabulary, and by its name, which must not be
    that of an output layer unless there is no other.

    Args:
        weights: folder of the base's weights and config.json.
        ids: int64, token ids.

    Raises:
        BaseModelError: there is no such tensor.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    from moa.base.sources import WEIGHTS

    size = AutoConfig.from_pretrained(weights, trust_remote_code=False).get_text_config().vocab_size
    candidates = []   # the best one sorts first
    for path in sorted(weights.glob(WEIGHTS)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and shape[0] >= size:
                    output = "head" in name or "embed_out" in name or "output" in name
                    candidates.append((output, not ("emb" in name or "wte" in name), shape[0] != size, name, path))
    if not candidates:
        raise BaseModelError(f"The base has no tensor of {size} input embeddings, so neighbours cannot be found.")
    *_, name, path = min(candidates)
    with safe_open(path, framework="pt") as file:
        rows: np.ndarray = file.get_tensor(name)[torch.from_numpy(ids)].float().numpy()
    return rows


def _normalised(vectors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Centre the vectors on the mean of the domains' means, remove their common component, and scale them to length 1.

    The common component is the direction in which all questions vary most, which is about grammar and length. Removing
    it, like the weights of `_vectors`, is from Arora et al. 2017, "A simple but tough-to-beat baseline for sentence
    embeddings". It halved the number of rows that wrongly looked like another domain (math, code, medicine and SQL
    questions).
    """
    centre = np.mean([rows.mean(0) for rows in vectors], axis=0)
    centred = [rows - centre for rows in vectors]
    common = np.linalg.svd(np.concatenate(centred), full_matrices=False)[2][:1]
    centred = [rows - rows @ common.T @ common for rows in centred]
    return [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9) for rows in centred]


def _nearest(rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """For each of `rows`, the indices of its NEIGHBOURS nearest vectors in `candidates` by cosine.

    `candidates` begins with `rows`: a row is not its own neighbour.
    """
    similarity = rows @ candidates.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS]


def _separability(first: np.ndarray, second: np.ndarray) -> float:
    """Balanced accuracy of nearest-neighbour classification between two domains, leave-one-out: 0.5 = chance."""
    vectors, labels = np.concatenate([first, second]), np.repeat([0, 1], [len(first), len(second)])
    votes = labels[_nearest(vectors, vectors)].mean(1) > 0.5
    right = votes == labels
    return round(float((right[labels == 0].mean() + right[labels == 1].mean()) / 2), 4)


# Warnings.

def _warnings(domain: str, report: Mapping[str, Any]) -> Iterator[str]:
    for other, shared in report["duplicates"]["domains"].items():
        yield (f"{shared['count']:,} rows stand in {other} too, word for word "
               f"({', '.join(f'{count:,} {pair}' for pair, count in shared['splits'].items())}).")
    near = report["near_duplicates"]
    if count := near["across_domains"]["count"]:
        where = " or ".join(near["across_domains"]["domains"])
        yield f"{count:,} of {near['compared']:,} rows are near-duplicates of a row of {where}."
    if count := near["across_splits"]["count"]:
        yield (f"{count:,} of {near['compared']:,} rows are near-duplicates of a row of another split (similarity "
               f"{ALIKE} or more), so test scores will be too good: lower prepare.near_duplicate, or set a group_by "
               "column.")
    if (neighbours := report["neighbours"]) is None:
        return
    if neighbours["share"] > LOOKS_SHARE:
        where = ", ".join(f"{count} like {other}" for other, count in neighbours["domains"].items())
        yield f"{neighbours['count']:,} of {neighbours['sampled']:,} sampled rows look like another domain's ({where})."
    for other, accuracy in neighbours["told_apart"].items():
        if accuracy < APART:
            yield (f"{domain} and {other} are told apart with an accuracy of {accuracy:.0%} only: one expert may do "
                   "for both, or their rows are mixed up.")
