"""Many clients at once get several times the tokens that one gets at a time, and the same answers.

    .venv/bin/python benchmarks/serve.py --clients 64 --seconds 60 --streams 0.5 --swap

Starts `moa serve` over the champion of the current workspace, or else over a small mixture of the default base that is
built under .moa/bench/serve on first use (two quickstart domains, little training: speed and sameness do not depend on
it). Half of the one-at-a-time measurement comes before the concurrent one and half after, so that a slow moment of the
machine touches both. Greedy answers to the same prompts must be equal; the server runs in float32, where
rounding seldom decides between two tokens.

With --streams a part of the clients reads its answers as they are written. With --swap, which needs the benchmark's own
workspace, another release becomes champion in the middle of the concurrent measurement, and the first one again in the
end: no request may fail, and each answer must be that of the release which it names.

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
from common import REPOSITORY, finish, goal, machine, pick_device
from real import real_workspace
from ruamel.yaml import YAML

from flows.steps import release
from moa.base import pin
from moa.core import config
from moa.core.config import Config
from moa.core.errors import MoaError
from moa.core.paths import Workspace
from moa.data import corpus, prepare
from moa.data.quickstart.generate import write
from moa.experts import train
from moa.mixture.assemble import assemble
from moa.release.registry import Registry

DOMAINS = ("math", "sql")
PROMPTS = 64


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int
    release: str
    first: float | None   # seconds to the first text of a stream


@dataclass
class Phase:
    """What some clients got in some time."""

    seconds: float = 0.0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    answers: dict[tuple[str, int], set[str]] = field(default_factory=dict)   # by release and prompt
    failed: list[str] = field(default_factory=list)

    def add(self, prompt: int, reply: Reply | str, seconds: float) -> None:
        if isinstance(reply, str):
            self.failed.append(reply)
            return
        self.tokens += reply.tokens
        self.latencies.append(seconds)
        self.firsts += [] if reply.first is None else [reply.first]
        self.answers.setdefault((reply.release, prompt), set()).add(reply.text)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def figures(self) -> dict[str, float]:
        waits = {"streams": len(self.firsts), "median wait for a stream's first text, s": statistics.median(self.firsts)
                 } if self.firsts else {}
        return {"tokens/s": self.rate, "answers": len(self.latencies), "failed": len(self.failed),
                "median latency, s": statistics.median(self.latencies), "longest, s": max(self.latencies), **waits}


def main() -> None:
    args = arguments()
    workspace, settings = released(args.swap)
    prompts = [row.prompt for number in range(PROMPTS) for domain in [sorted(settings.domains)[number
               % len(settings.domains)]] for row in [_row(workspace, domain, number // len(settings.domains))]]
    bodies = [{"messages": messages, "max_tokens": args.tokens} for messages in prompts]
    with serving(workspace, args) as url, httpx.Client(timeout=None) as client:
        load(url, bodies, 1, 2.0)   # warm
        alone = load(url, bodies, 1, args.seconds / 2)
        middle = threading.Timer(args.seconds / 2, champion, (workspace, settings, 2)) if args.swap else None
        together = load(url, bodies, args.clients, args.seconds, args.streams, during=middle)
        load(url, bodies, 1, args.seconds / 2, into=alone)
        rows_a_batch = batch_rows(client, url)
        compare(client, url, bodies, together, alone)
        if args.swap:
            champion(workspace, settings, 1)
            wait_for(client, url, 1)
            compare(client, url, bodies, together, alone)
    unknown = together.answers.keys() - alone.answers.keys()
    wrong = sum(len(answers | alone.answers.get(asked, set())) > 1 for asked, answers in together.answers.items())
    ratio = together.rate / alone.rate
    for name, phase in (("one at a time", alone), (f"{args.clients} clients", together)):
        print(f"{name:<14} {phase.rate:7.1f} tokens/s, {len(phase.latencies)} answers, median latency "
              f"{statistics.median(phase.latencies):.2f} s, failed {len(phase.failed)} {phase.failed[:1] or ''}")
    failed, releases = len(alone.failed) + len(together.failed), sorted({name for name, _ in together.answers})
    goals = [goal("throughput over one at a time", ratio, 3.0, ratio >= 3), goal("wrong answers", wrong, 0, not wrong),
             goal("answers compared with none", len(unknown), 0, not unknown),
             goal("failed requests", failed, 0, not failed)]
    if args.swap:
        goals.append(goal("releases that answered under load", len(releases), 2, len(releases) == 2))
    for each in goals:
        print(f"{each['name']}: {each['value']:.3g} (goal {each['goal']:g}){'' if each['met'] else ', missed'}")
    figures = {"machine": machine(pick_device(dtype=args.dtype)), "clients": args.clients, "seconds": args.seconds,
               "tokens": args.tokens, "share of streams": args.streams, "releases": releases,
               "rows a batch": rows_a_batch, "prompts compared": len(together.answers),
               "one at a time": alone.figures(), "together": together.figures()}
    finish("serve", figures, goals)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="of either measurement")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--streams", type=float, default=0.0, help="share of the clients that stream")
    parser.add_argument("--swap", action="store_true", help="another champion in the middle")
    parser.add_argument("--dtype", default="float32", help="of the server's base")
    return parser.parse_args()


# What is served.

def released(twice: bool) -> tuple[Workspace, Config]:
    """The current workspace if it has a champion, else the benchmark's own; that one where two releases are needed."""
    own = Workspace(REPOSITORY / ".moa" / "bench" / ("swap" if twice else "serve"))
    try:
        candidates = [own] if twice else [Workspace.find(), own]
    except MoaError:
        candidates = [own]
    for workspace in candidates:
        if workspace.params.is_file():
            settings = config.load(workspace.params)
            registry = Registry(workspace, settings)
            if registry.exists() and registry.champion():
                return workspace, settings
    return make(own, 2 if twice else 1)


def make(workspace: Workspace, releases: int) -> tuple[Workspace, Config]:
    """A workspace whose first release is champion; each further one has experts that were trained on more rows."""
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
        pin.fetch(workspace, settings.base)
        for domain in DOMAINS:
            write(domain, workspace.raw(domain))
            prepare.prepare(workspace, settings, domain)
        for number in range(1, releases + 1):
            groups["train"]["rows_per_epoch"] = 8 * number
            with workspace.params.open("w", encoding="utf-8") as file:
                YAML().dump(groups, file)
            settings = config.load(workspace.params)
            train.train(workspace, settings, DOMAINS)
            assemble(workspace, settings)
            release.register_mixture(workspace, settings, release.register_experts(workspace, settings))
        champion(workspace, settings, 1)
    finally:
        os.chdir(before)
    return workspace, settings


def champion(workspace: Workspace, settings: Config, version: int) -> None:
    release.promote(workspace, settings, version, "benchmark")


def _row(workspace: Workspace, domain: str, number: int) -> corpus.Row:
    found = corpus.read(workspace.corpus(domain), "test")
    return found[number % len(found)]


@contextmanager
def serving(workspace: Workspace, args: argparse.Namespace) -> Iterator[str]:
    """The address of a server that ends with the block."""
    command = [sys.executable, "-m", "moa", "serve", "--port", "0", "--poll", "1", "--max-batch", str(args.clients),
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

def load(url: str, bodies: list[dict[str, Any]], clients: int, seconds: float, streams: float = 0.0,
         into: Phase | None = None, during: threading.Timer | None = None) -> Phase:
    """Keep so many clients asking for so long, each its next prompt once it has an answer.

    With something that happens `during`, until another release has answered, too, or ten times as long.
    """
    print(f"{clients} client{'s' * (clients > 1)}, {seconds:g} s", file=sys.stderr, flush=True)
    phase = Phase() if into is None else into
    numbers = iter(range(len(phase.latencies), 1 << 62))
    turn = threading.Lock()
    began = time.monotonic()

    def on() -> bool:
        passed = time.monotonic() - began
        with turn:
            swapped = during is None or len({name for name, _ in phase.answers}) > 1
        return passed < (seconds if swapped else 10 * seconds)

    def work(streaming: bool) -> None:
        with httpx.Client(timeout=None) as client:
            while on():
                with turn:
                    prompt = next(numbers) % len(bodies)
                start = time.monotonic()
                reply = (streamed if streaming else whole)(client, url, bodies[prompt])
                with turn:
                    phase.add(prompt, reply, time.monotonic() - start)

    threads = [threading.Thread(target=work, args=(number < streams * clients,)) for number in range(clients)]
    for thread in [*threads, *([during] if during else [])]:
        thread.start()
    for thread in threads:
        thread.join()
    phase.seconds += time.monotonic() - began   # to the last answer, which counts
    if during is not None:
        during.join()
    return phase


def whole(client: httpx.Client, url: str, body: dict[str, Any]) -> Reply | str:
    try:
        reply = client.post(url, json=body)
    except httpx.HTTPError as error:
        return repr(error)
    if reply.status_code != 200:
        return f"{reply.status_code} {reply.text[:200]}"
    said = reply.json()
    return Reply(said["choices"][0]["message"]["content"], said["usage"]["completion_tokens"],
                 reply.headers["X-Moa-Release"], None)


def streamed(client: httpx.Client, url: str, body: dict[str, Any]) -> Reply | str:
    began, first, text, tokens, ended = time.monotonic(), None, "", None, False
    try:
        with client.stream("POST", url, json={**body, "stream": True, "stream_options": {"include_usage": True}}
                           ) as reply:
            for line in reply.iter_lines() if reply.status_code == 200 else ():
                ended = line == "data: [DONE]"
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        return str(chunk["error"]["message"])
                    piece = "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
                    first = time.monotonic() - began if piece and first is None else first
                    text, tokens = text + piece, chunk.get("usage", {}).get("completion_tokens", tokens)
                if ended:
                    break
    except httpx.HTTPError as error:
        return repr(error)
    if not ended or tokens is None:
        return f"{reply.status_code}, a stream that did not end"
    return Reply(text, tokens, reply.headers["X-Moa-Release"], first)


def compare(client: httpx.Client, url: str, bodies: list[dict[str, Any]], together: Phase, alone: Phase) -> None:
    """Ask alone what the release that serves now was asked together only."""
    check = Phase()
    check.add(0, whole(client, url, bodies[0]), 0)
    serves = next(iter(check.answers))[0]
    for name, prompt in sorted(together.answers.keys() - alone.answers.keys()):
        if name == serves:
            check.add(prompt, whole(client, url, bodies[prompt]), 0)
    for asked, answers in check.answers.items():
        alone.answers.setdefault(asked, set()).update(answers)
    alone.failed += check.failed


def wait_for(client: httpx.Client, url: str, version: int) -> None:
    """Until that release serves."""
    health = url.replace("/v1/chat/completions", "/healthz")
    while not client.get(health).json()["release"].endswith(f"/{version}"):
        time.sleep(0.2)


def batch_rows(client: httpx.Client, url: str) -> float:
    """Mean rows of a batch, those of single requests left out as far as a count of them goes."""
    lines = client.get(url.replace("/v1/chat/completions", "/metrics")).text.splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    singles = values['moa_batch_rows_bucket{le="1.0"}']
    return (values["moa_batch_rows_sum"] - singles) / max(values["moa_batch_rows_count"] - singles, 1)


if __name__ == "__main__":
    main()
