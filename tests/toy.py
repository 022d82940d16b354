"""A workspace with real git and DVC whose stages have moa's names and take milliseconds.

`control.json` names the stages that fail (`fail`), those that fail with an error of moa's (`errors`: by stage, the
records that its processes print), and those that wait until it no longer names them (`hold`);
`runs.log` has a line for each step that ran. Neither is a dependency of a stage.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from moa.core.paths import Workspace

STEPS = '''
import argparse, json, os, pathlib, shutil, sys, time
step, *rest = sys.argv[1:]
parser = argparse.ArgumentParser()
parser.add_argument("--domain", action="append", default=[])
domains = parser.parse_args(rest).domain or [""]
def orders():
    return json.loads(pathlib.Path("control.json").read_text())

control = orders()
data = pathlib.Path("data")

def write(folder, content):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(content))

def read(folder):
    return json.loads((folder / "manifest.json").read_text())["value"]

failed = []
with open("runs.log", "a") as log:
    print(f"{step} {','.join(domains)} {os.getpid()}", file=log)
for domain in domains:
    name = f"{step}@{domain}" if domain else step
    while name in orders().get("hold", []):
        time.sleep(0.05)
    for record in control.get("errors", {}).get(name, []):
        print("::moa-error::" + json.dumps(record))
        print("Traceback, or whatever else a program prints at its end")
    if name in control.get("errors", {}) or name in control.get("fail", []):
        failed.append(domain or step)
        continue
    if step == "base":
        (data / "base").mkdir(parents=True, exist_ok=True)
        (data / "base" / "manifest.json").write_text(json.dumps({"value": "base"}))
    elif step == "prepare":
        text = (data / "raw" / domain / "rows.txt").read_text().strip()
        write(data / "corpora" / domain, {"value": text, "rows": {"train": 10}})
    elif step == "train":
        if (data / "experts" / domain / "manifest.json").exists():
            print("already there", domain)
        write(data / "experts" / domain, {"value": read(data / "corpora" / domain).upper()})
    elif step == "assemble":
        write(data / "mixture", {"value": sorted(read(p) for p in (data / "experts").iterdir() if p.is_dir())})
    elif step == "evaluate":
        write(data / "reports", {"value": len(read(data / "mixture"))})
if failed:
    sys.exit(f"moa: No luck with {', '.join(failed)}.")
'''

PIPELINE = """
stages:
  base:
    cmd: python steps.py base
    params: [base]
    outs: [data/base/manifest.json]
  prepare:
    foreach: ${domains}
    do:
      cmd: python steps.py prepare --domain ${key}
      deps: ["data/raw/${key}", data/base/manifest.json]
      params: [prepare]
      outs: ["data/corpora/${key}"]
  train:
    foreach: ${domains}
    do:
      cmd: python steps.py train --domain ${key}
      deps: ["data/corpora/${key}", data/base/manifest.json]
      params: [train]
      outs: ["data/experts/${key}"]
  assemble:
    cmd: python steps.py assemble
    deps: [data/corpora, data/experts]
    params: [assemble, domains]
    outs: [data/mixture]
  evaluate:
    cmd: python steps.py evaluate
    deps: [data/mixture]
    params: [evaluate]
    outs: [data/reports]
"""

PARAMS = """
base: {source: "path:nowhere"}
domains:
  math: {metric: exact}
  sql: {metric: exact}
prompt: {}
prepare: {validation: 0.1}
train: {rank: 8}
assemble: {rule: early}
evaluate: {generate_rows: 20}
execution: {workers: 2, devices: [cpu]}
"""


def make(root: Path) -> Workspace:
    """A new toy workspace that was never built."""
    root.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(root)
    (root / "steps.py").write_text(STEPS)
    (root / "dvc.yaml").write_text(PIPELINE)
    workspace.params.write_text(PARAMS)
    (root / ".gitignore").write_text(".moa/\nruns.log\ncontrol.json*\n")
    for domain in ("math", "sql"):
        add_rows(workspace, domain, domain)
    control(workspace)
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True, env=environment)
    return workspace


def add_rows(workspace: Workspace, domain: str, text: str) -> None:
    """Write `text` as the raw rows of a domain."""
    workspace.raw(domain).mkdir(parents=True, exist_ok=True)
    (workspace.raw(domain) / "rows.txt").write_text(text + "\n")


def add_domain(workspace: Workspace, domain: str) -> None:
    """Add a domain with rows to params.yaml."""
    add_rows(workspace, domain, domain)
    text = workspace.params.read_text()
    workspace.params.write_text(text.replace("domains:\n", f"domains:\n  {domain}: {{metric: exact}}\n"))


def control(workspace: Workspace, **orders: object) -> None:
    """Replace control.json: `fail` and `hold` are lists of stages."""
    new = workspace.root / "control.json.tmp"   # renamed, because a step that waits reads the file all the time
    new.write_text(json.dumps(orders))
    new.replace(workspace.root / "control.json")


def runs(workspace: Workspace) -> list[str]:
    """The steps that ran since the last call, sorted, such as "train math,sql"."""
    log = workspace.root / "runs.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(line.rsplit(" ", 1)[0].strip() for line in lines)


def finished(workspace: Workspace, config: object, domain: str) -> bool:
    """Stands in for `moa.experts.train.finished`."""
    expert, corpus = (json.loads((folder / "manifest.json").read_text())["value"]
                      for folder in (workspace.expert(domain), workspace.corpus(domain)))
    return bool(expert == corpus.upper())


def value(folder: Path) -> object:
    """The value in the manifest of a toy artifact."""
    return json.loads((folder / "manifest.json").read_text())["value"]
