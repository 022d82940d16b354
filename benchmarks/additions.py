"""What a release gains or loses when a domain is added, or an old one gets new data: corpora, experts and their losses.

    .venv/bin/python benchmarks/additions.py --pool report --shared ../shared/data

Part one computes, once, everything that the additions are drawn from, with the real base and the corpora of one pool of
benchmarks/corpora.py. Each piece is kept in .moa/cache/benchmarks/additions by the digest of what it depends on, so that
an interrupted run goes on where it stopped. In this order, or the steps that --steps names:

    features   of the prompts of every row, at the levels that the rule `early` may read
    experts    one for each corpus, co-trained by the product's own code on few rows
    losses     of every test row under every expert and under the base; `--nearest K` has the K likeliest experts alone
    harm       experts that a gate should refuse, and their losses

`world` returns what is there. Shapes: N rows, L levels, D hidden size, S systems.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import REPOSITORY, machine, pick_device, real_base
from corpora import SPLITS, Pool, Row, Split, corpora, split
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa.base.encoding import ChatEncoder
from moa.base.load import Base
from moa.core import code_version, digests
from moa.mixture.calibration import DEEPEST
from moa.mixture.router import features

CACHE = REPOSITORY / ".moa" / "cache" / "benchmarks" / "additions"
SYSTEM, PROMPT_TOKENS = "", 1024   # as in the product's params.yaml


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# The world: all that the additions are drawn from.

@dataclass(frozen=True)
class Part:
    """The rows of one split of a corpus, and the features of their prompts."""

    rows: list[Row]
    features_NLD: Tensor   # float16

    @property
    def groups(self) -> list[str]:
        return [row.group for row in self.rows]


@dataclass(frozen=True)
class Known:
    """A corpus by split."""

    name: str
    kin: tuple[str, ...]
    parts: dict[Split, Part]


@dataclass(frozen=True)
class World:
    """The corpora of one pool, by name."""

    pool: Pool
    corpora: dict[str, Known]


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(dict(tensors), temporary)
    temporary.replace(path)


def _setting(base: Base) -> dict[str, object]:
    """What every cached piece depends on."""
    return {"base": base.pin.digest, "dtype": base.device.dtype, "system": SYSTEM, "max_tokens": PROMPT_TOKENS}


# Features.

def depth_of(base: Base) -> int:
    """Number of levels up to the deepest one that `early` may read, as `calibrate` counts them."""
    return int((base.model.config.num_hidden_layers - 1) * DEEPEST) + 1


def feature_path(base: Base, rows: Sequence[Row]) -> Path:
    key = digests.of_json(_setting(base) | {"code": code_version.of_modules("moa.mixture.router"),
                                            "depth": depth_of(base), "prompts": [row.prompt for row in rows]})
    return CACHE / "features" / f"{key[:32]}.safetensors"


def compute_features(base: Base, encoder: ChatEncoder, splits: Mapping[str, Mapping[Split, list[Row]]]) -> None:
    """Compute the features that are not cached; `further`, which is the largest split, last."""
    todo = [(name, part, rows) for last in (False, True) for name, parts in splits.items()
            for part, rows in parts.items() if (part == "further") == last and rows]
    todo = [one for one in todo if not feature_path(base, one[2]).is_file()]
    for count, (name, part, rows) in enumerate(todo):
        start = time.perf_counter()
        ids = [encoder.prompt([{"role": "user", "content": row.prompt}])[-PROMPT_TOKENS:] for row in rows]
        found_NLD = features(base.model, ids, depth_of(base)).half()
        assert found_NLD.isfinite().all(), f"features of {name} exceed float16"
        _save(feature_path(base, rows), {"features": found_NLD})
        seconds = time.perf_counter() - start
        progress(f"features {count + 1} of {len(todo)}: {name}, {part}, {len(rows)} rows, {seconds:.1f} s, "
                 f"{sum(map(len, ids)) / seconds:.0f} tokens/s")


def read_features(base: Base, rows: Sequence[Row]) -> Tensor:
    if not rows:
        return torch.zeros(0, depth_of(base), base.model.config.hidden_size, dtype=torch.float16)
    return load_file(feature_path(base, rows))["features"]


def write_index(base: Base, pool: Pool, kin: Mapping[str, Sequence[str]],
                splits: Mapping[str, Mapping[Split, list[Row]]]) -> Path:
    """A JSON file from which the features can be read without the base and the corpora."""
    path = CACHE / f"{pool}.json"
    content = {name: {"kin": list(kin[name]), "splits": {
        part: {"features": str(feature_path(base, rows).relative_to(CACHE)) if rows else None,
               "rows": [row.id for row in rows], "groups": [row.group for row in rows],
               "prompts": [row.prompt for row in rows]} for part, rows in parts.items()}}
               for name, parts in splits.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pool": pool, "depth": depth_of(base), "corpora": content}), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", choices=("choose", "report"), default="report")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--seed", type=int, default=0, help="of the experts and of what is drawn")
    parser.add_argument("--steps", nargs="+", choices=("features", "experts", "losses", "harm"),
                        default=["features", "experts", "losses", "harm"])
    args = parser.parse_args()
    found = corpora(args.shared, args.pool)
    base = real_base(pick_device())
    progress(str(machine(base.device)))
    encoder = ChatEncoder(base.tokenizer, SYSTEM, PROMPT_TOKENS)
    splits = {corpus.name: split(corpus, base.tokenizer) for corpus in found}
    progress(f"{args.pool}: {len(splits)} corpora, " + ", ".join(
        f"{sum(len(parts[part]) for parts in splits.values())} {part}" for part in SPLITS) + " rows")
    if "features" in args.steps:
        compute_features(base, encoder, splits)
        progress(f"index: {write_index(base, args.pool, {corpus.name: corpus.kin for corpus in found}, splits)}")


if __name__ == "__main__":
    main()
