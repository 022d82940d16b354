"""Many clients at once get several times the tokens that one gets at a time, and the same answers.

    .venv/bin/python benchmarks/serve.py --clients 64 --seconds 60

Starts `moa serve` over the champion of the current workspace, or else over a small mixture of the default base that is
built under .moa/bench/serve on first use (two quickstart domains, little training: speed and sameness do not depend on
it). Half of the one-at-a-time measurement comes before the concurrent one and half after, so that a slow moment of the
machine touches both. Greedy answers to the same prompts must be equal; the server runs in float32, where
rounding seldom decides between two tokens.

The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from common import REPOSITORY, goal, machine, pick_device, real_workspace
from ruamel.yaml import YAML

from flows import release
from moa import base, config, corpus, experts, rows
from moa.assemble import assemble
from moa.config import Config
from moa.errors import MoaError
from moa.quickstart import write
from moa.registry import Registry
from moa.workspace import Workspace

DOMAINS = ("math", "sql")
PROMPTS = 64


@dataclass
class Phase:
    """What some clients got in some time."""

    seconds: float = 0.0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    answers: dict[int, set[str]] = field(default_factory=dict)   # by prompt
    failed: list[str] = field(default_factory=list)

    def add(self, prompt: int, reply: httpx.Response, seconds: float) -> None:
        if reply.status_code != 200:
            self.failed.append(f"{reply.status_code} {reply.text[:200]}")
            return
        body = reply.json()
        self.tokens += body["usage"]["completion_tokens"]
        self.latencies.append(seconds)
        self.answers.setdefault(prompt, set()).add(body["choices"][0]["message"]["content"])

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def figures(self) -> dict[str, float]:
        return {"tokens/s": self.rate, "answers": len(self.latencies), "failed": len(self.failed),
                "median latency, s": statistics.median(self.latencies), "longest, s": max(self.latencies)}


def main() -> None:
    args = arguments()
    workspace, settings = released()
    prompts = [row.prompt for number in range(PROMPTS) for domain in [sorted(settings.domains)[number
               % len(settings.domains)]] for row in [_row(workspace, domain, number // len(settings.domains))]]
    with serving(workspace, args) as url:
        bodies = [{"messages": messages, "max_tokens": args.tokens} for messages in prompts]
        load(url, bodies, 1, 2.0)   # warm
        alone = load(url, bodies, 1, args.seconds / 2)
        together = load(url, bodies, args.clients, args.seconds)
        load(url, bodies, 1, args.seconds / 2, into=alone)
        with httpx.Client(timeout=None) as client:
            rows_a_batch = batch_rows(client, url)
            for prompt in sorted(together.answers.keys() - alone.answers.keys()):   # asked together only
                check = Phase()
                check.add(prompt, client.post(url, json=bodies[prompt]), 0)
                alone.answers |= check.answers
    wrong = sum(len(answers | alone.answers[prompt]) > 1 for prompt, answers in together.answers.items())
    ratio = together.rate / alone.rate
    for name, phase in (("one at a time", alone), (f"{args.clients} clients", together)):
        print(f"{name:<14} {phase.rate:7.1f} tokens/s, {len(phase.latencies)} answers, median latency "
              f"{statistics.median(phase.latencies):.2f} s, failed {len(phase.failed)} {phase.failed[:1] or ''}")
    failed = len(alone.failed) + len(together.failed)
    goals = [goal("throughput over one at a time", ratio, 3.0, ratio >= 3), goal("wrong answers", wrong, 0, not wrong),
             goal("failed requests", failed, 0, not failed)]
    for each in goals:
        print(f"{each['name']}: {each['value']:.3g} (goal {each['goal']:g}){'' if each['met'] else ', missed'}")
    figures = {"machine": machine(pick_device(dtype=args.dtype)), "clients": args.clients, "seconds": args.seconds,
               "tokens": args.tokens, "rows a batch": rows_a_batch, "prompts compared": len(together.answers),
               "one at a time": alone.figures(), "together": together.figures()}
    print(json.dumps({"benchmark": "serve", "figures": figures, "goals": goals}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="of either measurement")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--dtype", default="float32", help="of the server's base")
    return parser.parse_args()


# What is served.

def released() -> tuple[Workspace, Config]:
    """The current workspace if it has a champion, else the benchmark's own."""
    own = Workspace(REPOSITORY / ".moa" / "bench" / "serve")
    try:
        candidates = [Workspace.find(), own]
    except MoaError:
        candidates = [own]
    for workspace in candidates:
        if workspace.params.is_file():
            settings = config.load(workspace.params)
            registry = Registry(workspace, settings)
            if registry.exists() and registry.champion():
                return workspace, settings
    return make(own)


def make(workspace: Workspace) -> tuple[Workspace, Config]:
    print(f"building a mixture in {workspace.root.relative_to(REPOSITORY)}", file=sys.stderr, flush=True)
    shutil.rmtree(workspace.root, ignore_errors=True)
    workspace.root.mkdir(parents=True)
    groups: dict[str, Any] = {
        "base": {"source": f"path:{os.path.relpath(real_workspace().base, workspace.root)}"},
        "prompt": {"system": "", "max_tokens": 1024}, "quickstart": [], "assemble": {}, "evaluate": {}, "prepare": {},
        "domains": {domain: {"metric": "rouge_l"} for domain in DOMAINS},
        "train": {"rank": 8, "alpha": 16.0, "epochs": 1, "rows_per_epoch": 8, "validation_rows": 4}}
    with workspace.params.open("w", encoding="utf-8") as file:
        YAML().dump(groups, file)
    shutil.copyfile(REPOSITORY / "dvc.yaml", workspace.root / "dvc.yaml")
    settings = config.load(workspace.params)
    before = Path.cwd()
    os.chdir(workspace.root)
    try:
        base.fetch(workspace, settings.base)
        for domain in DOMAINS:
            write(domain, workspace.raw(domain))
            corpus.prepare(workspace, settings, domain)
        experts.train(workspace, settings, DOMAINS)
        assemble(workspace, settings)
        registered = release.register_mixture(workspace, settings, release.register_experts(workspace, settings))
        release.promote(workspace, settings, registered.version, "benchmark")
    finally:
        os.chdir(before)
    return workspace, settings


def _row(workspace: Workspace, domain: str, number: int) -> rows.Row:
    found = rows.read(workspace.corpus(domain), "test")
    return found[number % len(found)]


@contextmanager
def serving(workspace: Workspace, args: argparse.Namespace) -> Iterator[str]:
    """The address of a server that ends with the block."""
    command = [sys.executable, "-m", "moa", "serve", "--port", "0", "--max-batch", str(args.clients),
               "--max-waiting", str(2 * args.clients)]
    environment = {key: value for key, value in os.environ.items() if key != "MOA_API_KEY"}
    process = subprocess.Popen(command, cwd=workspace.root, text=True, stdout=subprocess.PIPE,
                               env={**environment, "MOA_DTYPE": args.dtype})
    try:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        if not line:
            raise SystemExit("The server did not start; its reason is above.")
        yield f"{line[-1]}/chat/completions"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


# Load.

def load(url: str, bodies: list[dict[str, Any]], clients: int, seconds: float, into: Phase | None = None) -> Phase:
    """Keep so many clients asking for so long, each its next prompt once it has an answer."""
    print(f"{clients} client{'s' * (clients > 1)}, {seconds:g} s", file=sys.stderr, flush=True)
    phase = Phase() if into is None else into
    numbers = iter(range(sum(map(len, phase.answers.values())), 1 << 62))
    turn = threading.Lock()
    began = time.monotonic()

    def work() -> None:
        with httpx.Client(timeout=None) as client:
            while time.monotonic() - began < seconds:
                with turn:
                    prompt = next(numbers) % len(bodies)
                start = time.monotonic()
                reply = client.post(url, json=bodies[prompt])
                with turn:
                    phase.add(prompt, reply, time.monotonic() - start)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    phase.seconds += time.monotonic() - began   # to the last answer, which counts
    return phase


def batch_rows(client: httpx.Client, url: str) -> float:
    """Mean rows of a batch, those of single requests left out as far as a count of them goes."""
    lines = client.get(url.replace("/v1/chat/completions", "/metrics")).text.splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    singles = values['moa_batch_rows_bucket{le="1.0"}']
    return (values["moa_batch_rows_sum"] - singles) / max(values["moa_batch_rows_count"] - singles, 1)


if __name__ == "__main__":
    main()
