"""A stranger with three bodies of rows and no repository: every command as typed, with a tiny base and all else real.
And what the commands say to those who mistype."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny

ROWS = 120


def moa(*words: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-m", "moa", *words], cwd=cwd, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == status, f"{words}: {done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def answer_of(number: int) -> str:
    return f"It is {number * 37 % 1000}."


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and three files of three formats."""
    folder = tmp_path_factory.mktemp("desk")
    tiny.base(folder / "tiny-base")
    with (folder / "Fragen & Antworten.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "answer"])
        writer.writerows([number, f"law: which article is number {number}, {number * 7919 % 997}?", answer_of(number)]
                         for number in range(ROWS))
    pq.write_table(pa.table({
        "instruction": [f"medicine: what dose is {number * 7919 % 997} of {number}?" for number in range(ROWS)],
        "output": [answer_of(number) for number in range(ROWS)]}), folder / "medicine.parquet")
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(ROWS):
            turns = [{"role": "system", "content": "You help."},
                     {"role": "user", "content": f"support: my order {number} is late"},
                     {"role": "assistant", "content": f"Since {number * 7919 % 997} days?"},
                     {"role": "user", "content": f"Yes, order {number} of {number * 7919 % 997}."},
                     {"role": "assistant", "content": answer_of(number)}]
            print(json.dumps({"messages": turns}), file=file)
    return folder


@pytest.fixture(scope="module")
def workspace(desk: Path) -> Path:
    """What the stranger has made by now: a workspace with three domains, made from elsewhere with --workspace."""
    said = moa("init", "work", "--base", "path:tiny-base", cwd=desk)
    assert "is a workspace now" in said.stdout and "moa domain add NAME FILE" in said.stdout
    (desk / "deep" / "er").mkdir(parents=True)
    added = moa("domain", "add", "law", "../../Fragen & Antworten.csv", "--map", "instruction=question,output=answer",
                "--workspace", "../../work", cwd=desk / "deep" / "er")
    assert "New domain law: 1 file added." in added.stdout and "from Fragen & Antworten.csv" in added.stdout
    moa("--workspace", "work", "domain", "add", "medicine", "medicine.parquet", cwd=desk)
    moa("domain", "add", "support", "../chats.jsonl", "--metric", "final_number", cwd=desk / "work")
    return desk / "work"


def listed(workspace: Path) -> dict[str, Any]:
    return {each["name"]: each for each in json.loads(moa("domain", "list", "--json", cwd=workspace).stdout)["domains"]}


def test_from_nothing_to_an_answer(workspace: Path) -> None:
    plan = json.loads(moa("plan", "--json", cwd=workspace / "data").stdout)   # a workspace is found upwards
    assert plan["experts"] == ["law", "medicine", "support"]
    subprocess.run(["git", "add", "."], cwd=workspace, check=True)
    staged = subprocess.run(["git", "diff", "--cached", "--name-only"], cwd=workspace, check=True, capture_output=True,
                            text=True).stdout.split()
    assert set(staged) == {".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitignore", "data/.gitignore",
                           "data/README.md", "data/raw/law.dvc", "data/raw/medicine.dvc", "data/raw/support.dvc",
                           "dvc.yaml", "params.yaml", "prefect.yaml"}
    ran = moa("run", "--local", cwd=workspace)
    assert "routing accuracy" in ran.stdout and "champion is version 1" in ran.stdout
    reply = json.loads(moa("ask", "law: which article is number 3, 827?", "--json", cwd=workspace).stdout)
    assert reply["release"] == 1 and isinstance(reply["answer"], str)
    domains = listed(workspace)
    assert {each["steps"]["train"] for each in domains.values()} == {"fresh"}
    for each in domains.values():
        rows = each["rows"]
        assert rows["read"] == ROWS == rows["kept"] + rows["rejected"] + rows["duplicates"]
        assert rows["train"] and rows["validation"] and rows["test"] and each["expert"]["validation_loss"] > 0
    said = moa("domain", "show", "law", cwd=workspace).stdout
    assert "from Fragen & Antworten.csv" in said and "release 1 answers with this expert" in said
    assert "instruction=question, output=answer" in said
    gone = moa("domain", "remove", "support", "--yes", cwd=workspace)
    assert "2 other domains untouched" in gone.stdout
    plan = json.loads(moa("plan", "--json", cwd=workspace).stdout)
    assert {step["name"] for step in plan["stale"]} == {"assemble", "evaluate"} and plan["router"]
    assert "@support" not in (workspace / "dvc.lock").read_text() and not (workspace / "data/corpora/support").exists()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


GOOD = '{"instruction": "a?", "output": "b"}\n'


@pytest.fixture
def at(tmp_path: Path) -> Path:
    """A workspace with the domain law, and files to add, good and bad."""
    (tmp_path / "base").mkdir()
    write(tmp_path / "good.jsonl", GOOD)
    write(tmp_path / "other.jsonl", '{"instruction": "c?", "output": "d"}\n')
    write(tmp_path / "notes.txt", "hello")
    write(tmp_path / "table.csv", "q,a\n1,2\n")
    write(tmp_path / "empty.csv", "q,a\n")
    write(tmp_path / "broken.parquet", "PAR1")
    write(tmp_path / "folder/readme.md", "hello")
    (tmp_path / "hollow").mkdir()
    moa("init", "w", "--base", f"path:{tmp_path / 'base'}", cwd=tmp_path)
    moa("domain", "add", "law", "../good.jsonl", cwd=tmp_path / "w")
    text = (tmp_path / "w/params.yaml").read_text()
    (tmp_path / "w/params.yaml").write_text(text.replace("quickstart: []", "quickstart: [math]"))
    return tmp_path / "w"


MISTAKES = [   # words behind `moa domain`, exit status, the beginning or a part of the sentence
    ("add tax ../nowhere.jsonl", 2,
     "There is no file or folder ../nowhere.jsonl; a source is a .jsonl, .json, .csv, .tsv, .parquet file, a "
     "folder of these, or hub:OWNER/NAME@REVISION."),
    ("add tax ../notes.txt", 2,
     "../notes.txt is not of a known format; files end with .jsonl, .json, .csv, .tsv, .parquet."),
    ("add tax ../hollow", 2,
     "The folder ../hollow holds no .jsonl, .json, .csv, .tsv, .parquet file and nothing else."),
    ("add tax ../folder", 2,
     "The folder ../folder holds no .jsonl, .json, .csv, .tsv, .parquet file, only readme.md."),
    ("add tax ..", 2,
     ".. is, or holds, the workspace's own data/"),
    ("add tax", 2,
     "Name at least one file, folder or hub:OWNER/NAME@REVISION with rows of tax."),
    ("add tax ../empty.csv", 1,
     "empty.csv has no rows."),
    ("add tax ../broken.parquet", 1,
     "broken.parquet is not a Parquet file that can be read"),
    ("add tax ../table.csv", 1,
     "table.csv: none of its first 1 rows can be used, most often (1) because of: instruction is missing. Its "
     "columns are q, a; say which holds what, for instance --map instruction=q,output=a."),
    ("add tax ../table.csv --map instruction=question,output=a", 1,
     "table.csv has no column 'question', which --map instruction names; its columns are q, a."),
    ("add tax ../table.csv --map question=q", 2,
     "--map has no key 'question'; it has instruction, input, output, system, messages."),
    ("add tax ../table.csv --map instruction=q,instruction=a", 2,
     "--map names instruction twice"),
    ("add tax ../table.csv --map q", 2,
     "--map q is not understood; write KEY=COLUMN,..., such as"),
    ("add tax ../table.csv --template {question} --map output=a", 1,
     "table.csv has no column 'question', which --template {question} names; its columns are q, a."),
    ("add tax ../table.csv --template {q --map output=a", 2,
     "--template '{q' is not understood"),
    ("add tax ../table.csv --template hello --map output=a", 2,
     "--template 'hello' names no column"),
    ("add tax ../table.csv --template {q} --map instruction=q,output=a", 2,
     "--template and --map instruction contradict each other"),
    ("add tax ../table.csv --map instruction=q,output=a --group-by topic", 1,
     "table.csv has no column 'topic', which --group-by names; its columns are q, a."),
    ("add tax ../good.jsonl --metric rouge", 1,
     "No metric 'rouge'; there are "),
    ("add tax ../good.jsonl --split test", 2,
     "--revision, --split and --subset belong to data sets of a hub"),
    ("add tax hub:a/b/c@main", 2,
     "The source hub:a/b/c@main is not understood; write hub:OWNER/NAME@REVISION."),
    ("add tax hub:a/b@one --revision two", 2,
     "hub:a/b@one and --revision two contradict each other"),
    ("add tax hub:a/b@main", 1,
     "The data set a/b cannot be fetched: HF_HUB_OFFLINE is set"),
    ("add math ../good.jsonl", 2,
     "The rows of math are generated by quickstart@math: add yours under another name, or run `moa domain remove "
     "math` first."),
    ("add base ../good.jsonl", 2,
     "'base' cannot be the name of a domain: 'base' has a meaning of its own; reserved names: all, base, forced, "
     "none, routed."),
    ("add ../x ../good.jsonl", 2,
     "'../x' cannot be the name of a domain: a domain name is lower-case letters"),
    ("add law ../other.jsonl --metric exact", 2,
     "params.yaml reads law with metric: rouge_l, and --metric says exact; leave --metric out, or edit domains.law"
     " in params.yaml."),
    ("add law ../other.jsonl --map output=answer", 2,
     "params.yaml reads law with map: not set, and --map says output=answer"),
    ("show tax", 1,
     "No domain 'tax' in params.yaml; its domains are law."),
    ("remove tax --yes", 1,
     "No domain 'tax' in params.yaml; its domains are law."),
    ("remove ../../base --yes", 2,
     "'../../base' cannot be the name of a domain"),
    ("remove law", 2,
     "Removing a domain asks first, and there is no terminal: run `moa domain remove law --yes`."),
]


def test_one_sentence_and_nothing_changed(at: Path) -> None:
    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in at.rglob("*")
                if path.is_file() and not {".git", "tmp", ".moa"} & set(path.relative_to(at).parts)}

    before = files()
    for words, status, sentence in MISTAKES:
        done = moa("domain", *words.split(), cwd=at, status=status)
        assert done.stderr.startswith("moa: ") and sentence in done.stderr, f"{words}: {done.stderr}"
        assert done.stderr.count("\n") == 1 and not done.stdout, f"{words}: {done.stderr}"
        assert files() == before, words


def test_outside_a_workspace_and_in_an_empty_one(tmp_path: Path) -> None:
    assert "or make one with `moa init`" in moa("domain", "list", cwd=tmp_path, status=2).stderr
    (tmp_path / "base").mkdir()
    moa("init", "--base", "path:base", cwd=tmp_path)
    assert moa("domain", "list", cwd=tmp_path).stdout.startswith("There are no domains yet: add one with")
    assert "domains    none" in moa("status", cwd=tmp_path).stdout
    for words in (["plan"], ["run"], ["run", "--local"], ["ask", "Hello?"]):
        done = moa(*words, cwd=tmp_path, status=1)
        assert done.stderr == "moa: params.yaml has no domain yet: add one with `moa domain add NAME FILE`.\n"
