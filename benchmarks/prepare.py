"""How time and memory of `prepare` grow with a corpus, from ten thousand to two million generated rows.

    .venv/bin/python benchmarks/prepare.py [--rows 10000,100000,500000,2000000] [--tokenizer-rows 20000]

Each size runs in a process of its own, whose peak memory is read when it ends, workers included. Rows have about 40
words; one in twenty is a copy of an earlier row, one in twenty a near-duplicate, one in a hundred cannot be used.
Tokenization and the chat template are left out (each row counts its words), and measured apart with the default base's
tokenizer. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import finish, goal
from real import real_workspace

from moa.base.encoding import ChatEncoder
from moa.base.load import load_tokenizer
from moa.base.pin import BasePin
from moa.core.config import BaseParams, Config, Domain
from moa.core.paths import Workspace
from moa.data import prepare

ROWS_A_SECOND, GIBIBYTES = 20_000, 2.0
NAME = "generated"
CONFIG = Config(base=BaseParams(source="path:none"), domains={NAME: Domain(metric="exact")})


class Words:
    """In place of the tokenizer: a token a word, no template."""

    max_tokens = 1024

    class tokenizer:   # as Encoder has it
        all_special_tokens = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

    def rendered(self, messages: Sequence[dict[str, str]]) -> Sequence[dict[str, str]]:
        return messages

    def lengths(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[tuple[int, int]]:
        return [(sum(message["content"].count(" ") + 1 for message in talk if message["role"] != "assistant"),
                 sum(message["content"].count(" ") + 1 for message in talk if message["role"] == "assistant"))
                for talk in conversations]


def generate(path: Path, rows: int) -> None:
    """The same rows for the same number."""
    chosen = random.Random(rows)
    words = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "ne", "pu", "ra", "si", "to") for b in "bdfgklmnprst"
             for c in ("an", "el", "is", "or", "un", "ay", "ex", "ov")]
    earlier: list[tuple[str, str]] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            fate = chosen.random()
            if fate < 0.01:
                file.write('{"instruction": "no answer"}\n')
                continue
            if fate < 0.11 and earlier:
                question, answer = chosen.choice(earlier)
                if fate > 0.06:
                    answer += " indeed"
            else:
                question = f"{number} {' '.join(chosen.choices(words, k=chosen.randint(10, 30)))}?"
                answer = " ".join(chosen.choices(words, k=chosen.randint(5, 30)))
            if fate > 0.99:
                earlier.append((question, answer))
            file.write(json.dumps({"instruction": question, "output": answer}) + "\n")


def measured(root: Path) -> dict[str, Any]:
    """In a process of its own: prepare the corpus under `root`."""
    prepare.pin = lambda _: BasePin("none", "w", "t", "c", "d", 1, "None")
    began, cpu = time.perf_counter(), time.process_time()
    manifest = prepare.prepare(Workspace(root), CONFIG, NAME, Words())   # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": seconds, "cpu seconds": time.process_time() - cpu, "GiB": peak / 1024**2,
            "rows": manifest["rows"]}


def tokenizing(rows: int) -> float:
    """Rows a second of template and tokenizer of the default base, in prepare's own batches."""
    encoder = ChatEncoder(load_tokenizer(real_workspace()), "", 1024)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        generate(path, rows)
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if "output" in line]
    talks = [[{"role": "user", "content": record["instruction"]}, {"role": "assistant", "content": record["output"]}]
             for record in records]
    began = time.perf_counter()
    for begin in range(0, len(talks), prepare.BATCH):
        encoder.lengths([encoder.rendered(talk) for talk in talks[begin:begin + prepare.BATCH]])
    return len(talks) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,500000,2000000")
    parser.add_argument("--tokenizer-rows", type=int, default=20_000, help="0 = leave tokenization out altogether")
    parser.add_argument("--folder", type=Path, help="where the corpora are written; needs 2 GiB")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one)))
        return
    machine = {"cores": os.cpu_count(), **{name: version(name) for name in ("pyarrow", "rensa", "numpy")}}
    print(machine, flush=True)
    figures: dict[str, Any] = {"machine": machine, "sizes": {}}
    for rows in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            raw = Workspace(Path(folder)).raw(NAME)
            raw.mkdir(parents=True)
            generate(raw / "rows.jsonl", rows)
            done = subprocess.run([sys.executable, __file__, "--one", folder], check=True, stdout=subprocess.PIPE,
                                  text=True)
        found = figures["sizes"][rows] = json.loads(done.stdout.splitlines()[-1])
        found["rows a second"] = rows / found["seconds"]
        counted = found["rows"]
        assert counted["read"] == rows == counted["kept"] + counted["rejected"] + counted["duplicates"]
        print(f"{rows:>9,} rows  {found['seconds']:7.1f} s  {found['rows a second']:8,.0f} rows/s  "
              f"{found['GiB']:.2f} GiB  kept {counted['kept']:,}, rejected {counted['rejected']:,}, duplicates "
              f"{counted['duplicates']:,} ({counted['near_duplicates']:,} near)", flush=True)
    largest = figures["sizes"][max(figures["sizes"])]
    if args.tokenizer_rows:
        figures["tokenized rows a second"] = tokenizing(args.tokenizer_rows)
        print(f"template and tokenizer of the default base: {figures['tokenized rows a second']:,.0f} rows/s")
    speed = largest["rows a second"]
    goals = [goal("rows a second at the largest size", speed, ROWS_A_SECOND, speed >= ROWS_A_SECOND),
             goal("GiB at the largest size", largest["GiB"], GIBIBYTES, largest["GiB"] <= GIBIBYTES)]
    finish("prepare", figures, goals)


if __name__ == "__main__":
    main()
