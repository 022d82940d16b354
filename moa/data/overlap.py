"""Overlap of a domain with others: rows they share, near-duplicates, and rows that resemble another domain's.

Compares prepared corpora, and the splits of one, by ids, by shingles (moa.data.near_duplicates) and by the topic of
their questions: the mean of the base's input embeddings over a question's tokens, and the nearest neighbours of each
row among a sample of all domains. No model runs. The report says what was sampled. A row whose neighbours are of
another domain is hard to route.
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
ALIKE = 0.8             # Jaccard similarity of near-duplicates: lower than what prepare removes
COMPARED = 10_000       # rows of the domain whose shingles are compared, and as many of all others together
SAMPLE = 500            # training rows per domain whose neighbours are looked at
TOKENS = 512            # tokens of a question that are read
RARE = 1e-2             # share of all tokens at which a token has weight one half
NEIGHBOURS = 5
STRANGERS = 4           # of them in one other domain make a row look like that domain

# Warnings.
LOOKS_SHARE = 0.02      # share of the sampled rows
APART = 0.8             # accuracy of telling two domains apart by their neighbours


@dataclass(frozen=True)
class _Sample:
    """Some rows of one corpus."""

    domain: str
    ids: list[str]
    splits: list[str]
    questions: list[str]
    texts: list[str]     # the whole conversations

    def __len__(self) -> int:
        return len(self.ids)


def domain_overlap(workspace: Workspace, config: Config, domain: str) -> dict[str, Any]:
    """What `domain`, which must be prepared, shares with the other prepared domains and between its own splits.

    The result has its own `warnings`. Raises BaseModelError when the base was not fetched or has changed.
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
    """Up to so many rows of each split, chosen by a fixed seed."""
    import pyarrow.parquet as pq

    made = _Sample(folder.name, [], [], [], [])
    for split, count in counts.items():
        with pq.ParquetFile(folder / f"{split}.parquet", pre_buffer=False) as file:
            total, done = file.metadata.num_rows, 0
            chosen = np.sort(np.random.default_rng(SEED).choice(total, min(count, total), replace=False))
            for batch in file.iter_batches(BATCH, columns=["id", "messages"]):
                inside = chosen[(chosen >= done) & (chosen < done + batch.num_rows)] - done
                done += batch.num_rows
                taken = batch.take(inside)
                made.ids.extend(taken.column("id").to_pylist())
                made.splits.extend([split] * len(inside))
                for messages in taken.column("messages").to_pylist():
                    made.texts.append(" ".join(message["content"] for message in messages))
                    made.questions.append("\n".join(message["content"] for message in messages
                                                    if message["role"] == "user"))
    return made


def _ids(folder: Path) -> tuple[Any, np.ndarray]:
    """Every id of a corpus, and the number of its split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pq.read_table(folder / f"{split}.parquet", columns=["id"]).column("id") for split in SPLITS]
    sides = np.repeat(np.arange(len(SPLITS)), [len(column) for column in columns])
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()), sides


def _questions(folder: Path, ids: Iterable[str]) -> dict[str, str]:
    """The last user message of some rows of a corpus, by id."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted, found = pa.array(sorted(set(ids)), pa.string()), {}
    for split in SPLITS:
        with pq.ParquetFile(folder / f"{split}.parquet", pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH, columns=["id", "messages"]) if len(wanted) else ():
                for row in batch.filter(pc.is_in(batch.column("id"), value_set=wanted)).to_pylist():
                    found[row["id"]] = row["messages"][-2]["content"][:SHOWN]
    return found


# Duplicates and near-duplicates.

def _duplicates(workspace: Workspace, domain: str, others: Sequence[str]) -> dict[str, Any]:
    """Rows that other domains contain too, with their splits in both."""
    import pyarrow.compute as pc

    mine, sides = _ids(workspace.corpus(domain))
    shared: dict[str, dict[str, Any]] = {}
    examples = []
    for other in others:
        theirs, their_sides = _ids(workspace.corpus(other))
        places = pc.index_in(mine, value_set=theirs).to_numpy(zero_copy_only=False)
        here = np.flatnonzero(~np.isnan(places.astype(np.float64)))
        if not len(here):
            continue
        there = their_sides[places[here].astype(np.int64)]
        pairs = Counter(zip(sides[here].tolist(), there.tolist(), strict=True))
        shared[other] = {"count": len(here), "splits": {f"{SPLITS[one]}/{SPLITS[two]}": count
                                                        for (one, two), count in sorted(pairs.items())}}
        examples += [{"id": mine[int(place)].as_py(), "domain": other, "split": SPLITS[sides[place]],
                      "other_split": SPLITS[side]} for place, side in zip(here[:EXAMPLES], there, strict=False)]
    examples = examples[:EXAMPLES]
    texts = _questions(workspace.corpus(domain), (each["id"] for each in examples))
    return {"count": sum(each["count"] for each in shared.values()), "domains": shared,
            "examples": [{**each, "text": texts[each["id"]]} for each in examples]}


def _near_duplicates(workspace: Workspace, domain: str, others: Sequence[str]) -> dict[str, Any]:
    """Near-duplicates of rows of other domains or splits. Test and validation rows are compared before all others."""
    from moa.data import near_duplicates

    samples = [_sample(workspace.corpus(domain), {"test": COMPARED // 4, "validation": COMPARED // 4,
                                                  "train": COMPARED // 2})]
    share = COMPARED // max(len(others), 1)
    samples += [_sample(workspace.corpus(other), {split: share // 4 if split != "train" else share // 2
                                                  for split in SPLITS}) for other in others]
    owners = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
    starts = np.concatenate(([0], np.cumsum([len(sample) for sample in samples])))
    found: dict[str, dict[str, Any]] = {kind: {"rows": set(), "domains": Counter(), "examples": []}
                                        for kind in ("domains", "splits")}
    own = samples[0]
    for one, two, similarity in near_duplicates.pairs([text for sample in samples for text in sample.texts], ALIKE):
        if one >= len(own):
            continue   # neither row is of `domain`
        sample, place = samples[owners[two]], two - int(starts[owners[two]])
        inside = sample is own
        if (inside and own.splits[one] == own.splits[two]) or own.ids[one] == sample.ids[place]:
            continue
        kind = found["splits" if inside else "domains"]
        if one not in kind["rows"]:
            kind["domains"][sample.domain] += 1
        kind["rows"].add(one)
        if len(kind["examples"]) < EXAMPLES:
            kind["examples"].append({
                "id": own.ids[one], "split": own.splits[one], "text": own.questions[one][:SHOWN],
                "other_id": sample.ids[place], "other_split": sample.splits[place],
                "other_text": sample.questions[place][:SHOWN], "domain": sample.domain,
                "similarity": round(similarity, 3)})
    return {"threshold": ALIKE, "compared": len(own), "compared_elsewhere": len(owners) - len(own),
            "across_domains": {"count": len(found["domains"]["rows"]),
                               "domains": dict(sorted(found["domains"]["domains"].items())),
                               "examples": found["domains"]["examples"]},
            "across_splits": {"count": len(found["splits"]["rows"]), "examples": found["splits"]["examples"]}}


# Neighbours.

def _neighbours(workspace: Workspace, config: Config, domain: str, others: Sequence[str]) -> dict[str, Any]:
    samples = [_sample(workspace.corpus(name), {"train": SAMPLE}) for name in (domain, *others)]
    samples = [sample for sample in samples if sample.domain == domain or len(sample) > NEIGHBOURS]
    vectors = _centred(_vectors(workspace, config, samples))
    labels = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
    own = samples[0]
    nearest = labels[_nearest(vectors[0], np.concatenate(vectors))]   # (own rows, NEIGHBOURS)
    counts = np.stack([(nearest == label).sum(1) for label in range(len(samples))], axis=1)
    counts[:, 0] = 0
    strange = np.flatnonzero(counts.max(1) >= STRANGERS)
    looks = counts[strange].argmax(1)
    return {
        "sampled": len(own), "count": len(strange), "share": round(len(strange) / max(len(own), 1), 4),
        "domains": dict(sorted(Counter(samples[label].domain for label in looks).items())),
        "examples": [{"id": own.ids[row], "looks_like": samples[label].domain, "text": own.questions[row][:SHOWN],
                      "neighbours": int(counts[row, label])}
                     for row, label in sorted(zip(strange.tolist(), looks.tolist(), strict=True),
                                              key=lambda pair: -counts[pair])[:EXAMPLES]],
        "told_apart": {sample.domain: _told_apart(vectors[0], vectors[place])
                       for place, sample in enumerate(samples) if place}}


def _vectors(workspace: Workspace, config: Config, samples: Sequence[_Sample]) -> list[np.ndarray]:
    """Mean input embedding of each row's questions, frequent tokens weighted down: one float32 [rows, D] a sample."""
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
    """The rows `ids` of the base's input embeddings, read from its safetensors files alone: float32 [len(ids), D].

    The tensor is the one with a row for every word of the vocabulary that is not the output's. Raises BaseModelError
    when there is none.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    from moa.base.sources import WEIGHTS

    size = AutoConfig.from_pretrained(weights, trust_remote_code=False).get_text_config().vocab_size
    found = []
    for path in sorted(weights.glob(WEIGHTS)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and shape[0] >= size:
                    output = "head" in name or "embed_out" in name or "output" in name
                    found.append((output, not ("emb" in name or "wte" in name), shape[0] != size, name, path))
    if not found:
        raise BaseModelError(f"The base has no tensor of {size} input embeddings, so neighbours cannot be told.")
    *_, name, path = min(found)
    with safe_open(path, framework="pt") as file:
        rows: np.ndarray = file.get_tensor(name)[torch.from_numpy(ids)].float().numpy()
    return rows


def _centred(vectors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Unit vectors around the mean of the domains' means, without the direction in which all questions vary most.

    That direction, like the weights of `_vectors`, is from Arora et al. 2017, "A simple but tough-to-beat baseline for
    sentence embeddings": it is about grammar and length. Without it, half as many rows were taken for another domain's
    without being so (math, code, medicine and SQL questions).
    """
    centre = np.mean([each.mean(0) for each in vectors], axis=0)
    moved = [each - centre for each in vectors]
    common = np.linalg.svd(np.concatenate(moved), full_matrices=False)[2][:1]
    moved = [each - each @ common.T @ common for each in moved]
    return [each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-9) for each in moved]


def _nearest(rows: np.ndarray, everything: np.ndarray) -> np.ndarray:
    """Places in `everything`, which begins with `rows`, of each row's NEIGHBOURS nearest by cosine, itself left out."""
    alike = rows @ everything.T
    np.fill_diagonal(alike, -np.inf)
    return np.argsort(-alike, axis=1, kind="stable")[:, :NEIGHBOURS]


def _told_apart(one: np.ndarray, two: np.ndarray) -> float:
    """Leave-one-out accuracy of the neighbours' majority between two domains, both counting the same: 0.5 = chance."""
    both, labels = np.concatenate([one, two]), np.repeat([0, 1], [len(one), len(two)])
    votes = labels[_nearest(both, both)].mean(1) > 0.5
    right = votes == labels
    return round(float((right[labels == 0].mean() + right[labels == 1].mean()) / 2), 4)


# Warnings.

def _warnings(domain: str, report: Mapping[str, Any]) -> Iterator[str]:
    for other, each in report["duplicates"]["domains"].items():
        yield (f"{each['count']:,} rows stand in {other} too, word for word "
               f"({', '.join(f'{count:,} {pair}' for pair, count in each['splits'].items())}).")
    near = report["near_duplicates"]
    if count := near["across_domains"]["count"]:
        where = " or ".join(near["across_domains"]["domains"])
        yield f"{count:,} of {near['compared']:,} rows are nearly a row of {where}."
    if count := near["across_splits"]["count"]:
        yield (f"{count:,} of {near['compared']:,} rows are nearly a row of another split (similarity {ALIKE} or "
               "more): test scores will flatter; a lower prepare.near_duplicate, or a group_by column, parts them.")
    if (neighbours := report["neighbours"]) is None:
        return
    if neighbours["share"] > LOOKS_SHARE:
        where = ", ".join(f"{count} like {other}" for other, count in neighbours["domains"].items())
        yield f"{neighbours['count']:,} of {neighbours['sampled']:,} sampled rows look like another domain's ({where})."
    for other, accuracy in neighbours["told_apart"].items():
        if accuracy < APART:
            yield (f"{domain} and {other} are told apart with an accuracy of {accuracy:.0%} only: one expert may do "
                   "for both, or their rows are mixed up.")
