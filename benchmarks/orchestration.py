"""What moa costs beside the steps themselves: plan, no-op run, one changed domain and cold run, with many domains.

    .venv/bin/python benchmarks/orchestration.py --domains 8 64 256

The pipeline is the one that `moa init` writes, in a git and DVC workspace. Only the commands are replaced: by one that
writes what the step would write, a few bytes, in some hundredths of a second. Every run is a process, as people start
it: with a Prefect server of its own, or with --local; once more with its release asked of the registry, too. The same
commands are timed bare, as many side by side, and all trainings in one process, as moa runs them:

    overhead of a step = (changed or cold run - no-op run - the same commands bare) / steps that ran

`dvc repro` does the same on a copy; it has no server, so it stands against --local. The last line is one JSON object.
"""

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from common import finish, goal, interleave, machine, pick_device, ratio

from moa.core.paths import Workspace
from moa.core.subprocesses import environment
from moa.data import corpus
from moa.workspace.init import init
from moa.workspace.pipeline import Pipeline

Seconds = dict[str, list[float]]   # by system, of every repeat

WORKERS = 2
NO_OP_SECONDS, STEP_SECONDS, SLOWER = 15.0, 1.5, 1.0
BARE, LOCAL, SERVER, RELEASED, DVC = "bare", "moa --local", "moa", "moa, released", "dvc repro"
CHANGED_STEPS = 4   # prepare, train, assemble, evaluate
PYTHON = [sys.executable, "-IS", "steps.py"]

STEPS = '''
import hashlib, json, pathlib, shutil, sys

step, domains = sys.argv[1], sys.argv[3::2] or [""]
data, base = pathlib.Path("data"), {"source": "path:nowhere", "digest": "b" * 64}

def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

def write(folder, **files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))

def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())

def experts():
    return {path.name: manifest(path)["digest"] for path in sorted((data / "experts").iterdir()) if path.is_dir()}

for domain in domains:
    if step == "base":
        write(data / "base" / "model", config={})
        (data / "base" / "manifest.json").write_text(json.dumps(base))
    elif step == "prepare":
        text = (data / "raw" / domain / "rows.txt").read_text()
        write(data / "corpora" / domain, manifest={"digest": digest(text), "rows": {"train": 10}})
        shutil.copyfile("test.parquet", data / "corpora" / domain / "test.parquet")
    elif step == "train":
        corpus = manifest(data / "corpora" / domain)["digest"]
        write(data / "experts" / domain, manifest={
            "digest": digest([domain, corpus]), "corpus": corpus, "base": base, "rank": 8, "alpha": 16.0,
            "targets": ["q"], "train": {}, "best_epoch": 1, "curve": []})
    elif step == "assemble":
        write(data / "mixture", manifest={
            "digest": digest(experts()), "base": base, "labels": list(experts()), "experts": experts(),
            "router": {"digest": "r" * 64, "rule": "early"}})
        (data / "mixture" / "router.safetensors").touch()   # is copied when the release is promoted
    elif step == "evaluate":
        figures = {"loss": 1.0, "perplexity": 2.7, "score": 0.5}
        write(data / "reports", summary={"domains": {name: {"base": figures} for name in experts()},
                                         "routing": {"accuracy": 1.0, "abstention": 0.0}})
'''

# `moa`, but for the question whether an expert is the one that these inputs give: no training wrote these. "steps"
# leaves out what follows the last step, which for a changed mixture would ask both releases for answers.
DRIVER = """
import sys, flows.steps.session, moa.experts.train
from moa.cli.main import app
moa.experts.train.finished = lambda *_: True
if sys.argv.pop(1) == "steps":
    flows.steps.session._release_hooks = lambda *_: []
app()
"""


def main() -> None:
    args = arguments()
    facts = {**machine(pick_device("cpu")), "python": sys.version.split()[0],
             **{name: version(name) for name in ("dvc", "prefect", "mlflow")}}
    print(facts, flush=True)
    figures: dict[int, dict[str, Seconds]] = {}
    for count in args.domains:
        with tempfile.TemporaryDirectory(prefix="moa-orchestration-") as folder:
            os.environ["DVC_SITE_CACHE_DIR"] = str(Path(folder) / "site")
            figures[count] = measure(Path(folder), count, args)
    goals = judge(figures)
    finish("orchestration", {"machine": facts, "workers": WORKERS, "repeats": args.repeats, "domains": figures}, goals)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    systems = [LOCAL, SERVER, RELEASED, DVC]
    parser.add_argument("--domains", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold-repeats", type=int, default=1, help="of the cold run, the longest")
    parser.add_argument("--systems", nargs="+", choices=systems, default=systems, metavar="SYSTEM",
                        help=f"what to measure beside the bare steps: {', '.join(systems)}")
    parser.add_argument("--dvc-cold", type=int, default=64, metavar="N",
                        help="most domains for which dvc repro is timed cold; its time grows with their square")
    args = parser.parse_args()
    if LOCAL not in args.systems:
        parser.error(f"--systems: {LOCAL!r} is what the others are held against.")
    return args


# The workspace.

def make(root: Path, count: int) -> tuple[Workspace, list[str]]:
    """A workspace that was never built, as `moa init` and `moa domain add` leave it, and the names of its domains."""
    import pyarrow.parquet as pq

    base = root.parent / "nowhere"
    base.mkdir()
    init(root, f"path:{base}", root.parent)
    workspace = Workspace(root)
    names = [f"domain-{number:03}" for number in range(count)]
    domains = "".join(f"  {name}:\n    metric: rouge_l\n" for name in names)
    workspace.params.write_text(workspace.params.read_text().replace("domains: {}\n", f"domains:\n{domains}"))
    pipeline = root / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().replace("cmd: moa ", f"cmd: {' '.join(PYTHON)} "))
    (root / "steps.py").write_text(STEPS)
    row = corpus.Row("0" * 32, ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}), 1, 1)
    pq.write_table(corpus.table([row]), root / "test.parquet")
    change(workspace, {name: name for name in names})
    Pipeline(workspace).snapshot()   # leaves the digests of moa's code, which DVC reads
    return workspace, names


def change(workspace: Workspace, texts: dict[str, str]) -> None:
    """Give domains new rows, versioned as `moa domain add` does."""
    for name, text in texts.items():
        workspace.raw(name).mkdir(parents=True, exist_ok=True)
        (workspace.raw(name) / "rows.txt").write_text(text)
    call(workspace, [sys.executable, "-m", "dvc", "add", "-q", *(f"data/raw/{name}" for name in texts)])


# The measurement.

def call(workspace: Workspace, command: Sequence[str]) -> float:
    """Seconds of a process that must succeed."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=workspace.root, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return time.perf_counter() - began


def bare(workspace: Workspace, names: Sequence[str], first: Sequence[str] = ()) -> float:
    """Seconds of the steps of `names` and what follows them, with nothing around."""
    def step(*words: str) -> None:
        call(workspace, [*PYTHON, *words])

    began = time.perf_counter()
    for name in first:
        step(name)
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda name: step("prepare", "--domain", name), names))
    step("train", *(word for name in names for word in ("--domain", name)))
    for last in ("assemble", "evaluate"):
        step(last)
    return time.perf_counter() - began


def commands(wanted: Iterable[str]) -> dict[str, list[str]]:
    """What is run, by system."""
    driver = [sys.executable, "-c", DRIVER]
    known = {LOCAL: [*driver, "steps", "run", "--local"], SERVER: [*driver, "steps", "run"],
             RELEASED: [*driver, "all", "run"], DVC: [sys.executable, "-m", "dvc", "repro", "-q"]}
    return {name: known[name] for name in known if name in wanted}


def measure(folder: Path, count: int, args: argparse.Namespace) -> dict[str, Seconds]:
    """Seconds, by what there was to do."""
    template, names = make(folder / "template", count)
    systems = commands(args.systems)
    places = {name: Workspace(folder / name.replace(" ", "")) for name in (BARE, *systems)}
    news = itertools.count()

    def cold(name: str) -> float:
        shutil.rmtree(places[name].root, ignore_errors=True)
        shutil.copytree(template.root, places[name].root, symlinks=True)
        return bare(places[name], names, ["base"]) if name == BARE else call(places[name], systems[name])

    def changed(name: str) -> float:
        number = next(news)
        domain = names[number % count]
        change(places[name], {domain: f"news {number}"})
        return bare(places[name], [domain]) if name == BARE else call(places[name], systems[name])

    def timed(what: str, run: Callable[[str], float], names: Iterable[str], repeats: int) -> Seconds:
        def once(name: str) -> float:
            seconds = round(run(name), 3)
            print(f"  {seconds:8.2f} s  {count} domains, {what}, {name}", file=sys.stderr, flush=True)
            return seconds
        return interleave({name: lambda name=name: once(name) for name in names}, repeats, warmups=0)

    slow = {DVC} if count > args.dvc_cold else set()
    found = {"cold": timed("cold", cold, [name for name in places if name not in slow], args.cold_repeats)}
    for name in slow & systems.keys():
        shutil.copytree(places[LOCAL].root, places[name].root, symlinks=True)
    found["no-op"] = timed("no-op", lambda name: call(places[name], systems[name]), systems, args.repeats)
    found["changed"] = timed("one changed", changed, [name for name in places if name != RELEASED], args.repeats)
    found["plan"] = timed("plan", lambda name: call(places[name], [sys.executable, "-m", "moa", "plan", "--json"]),
                          [LOCAL], args.repeats)
    return found


# What it comes to.

def judge(figures: dict[int, dict[str, Seconds]]) -> list[dict[str, object]]:
    """Print the medians, and give the goals."""
    goals = []
    for count, found in figures.items():
        print(f"\n{count} domains, median seconds")
        for what, systems in found.items():
            print(f"  {what:<8}" + "".join(f"  {name} {statistics.median(systems[name]):.2f}"
                                           for name in (BARE, LOCAL, SERVER, RELEASED, DVC) if name in systems))
        for name, own in found["no-op"].items():
            if name != DVC:
                value = statistics.median(own)
                goals.append(goal(f"{count} domains, no-op, {name}: seconds", value, NO_OP_SECONDS,
                                  value < NO_OP_SECONDS))
        for what, steps in (("changed", CHANGED_STEPS), ("cold", 2 * count + 3)):
            for name in [name for name in (LOCAL, SERVER) if name in found["no-op"]]:
                value = overhead(found, what, name, steps)
                goals.append(goal(f"{count} domains, {what}, {name}: seconds a step beside the step", value,
                                  STEP_SECONDS, value < STEP_SECONDS))
        for what in ("no-op", "changed", "cold"):
            if DVC in found[what]:
                value = ratio(found[what][LOCAL], found[what][DVC])
                goals.append(goal(f"{count} domains, {what}: {LOCAL} over {DVC}", value, SLOWER, value <= SLOWER))
    for fewer, more in itertools.pairwise(sorted(figures)):
        value = ratio(figures[more]["plan"][LOCAL], figures[fewer]["plan"][LOCAL])
        goals.append(goal(f"plan: {more} domains over {fewer}", value, more / fewer, value <= more / fewer))
    print()
    for each in goals:
        print(f"{each['name']}: {each['value']:.2f} (goal {each['goal']:.2f}, {'met' if each['met'] else 'MISSED'})")
    return goals


def overhead(found: dict[str, Seconds], what: str, name: str, steps: int) -> float:
    """Seconds of each of `steps` steps beside its own, median over the repeats."""
    return statistics.median((whole - nothing - own) / steps for whole, nothing, own in zip(
        found[what][name], found["no-op"][name], found[what][BARE], strict=False))   # cold has fewer repeats


if __name__ == "__main__":
    main()
