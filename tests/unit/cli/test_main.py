"""The command line: fast to import, and one sentence for what the user can mend."""

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from moa.cli import main
from moa.cli.app import Place
from moa.core.errors import RECORDS_WANTED, DataError, ErrorRecord, PipelineError, reported

HEAVY = ("torch", "transformers", "prefect", "mlflow", "dvc", "peft", "datasets", "pydantic", "networkx",
         "jinja2")
PARAMS = ("prompt: {}\nprepare: {}\ntrain: {}\nassemble: {}\nevaluate: {}\n"
          "base: {source: 'path:x'}\ndomains: {math: {metric: exact}}\n")


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moa", *words], cwd=cwd, capture_output=True, text=True)


def test_help_imports_nothing_heavy() -> None:
    script = f"import sys, moa.cli.main; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_local_flow_and_the_policy_import_no_prefect_and_no_torch() -> None:
    script = ("import sys, flows.launch, flows.steps.stage_order, flows.prefect_server; "
              "print([name for name in ('torch', 'transformers', 'prefect', 'mlflow', 'peft') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in main.app.registered_commands:
        assert command.callback is not None
        assert f" {command.name or command.callback.__name__} " in done.stdout
    assert " domain " in done.stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("moa ")


@pytest.mark.parametrize(("params", "words", "code", "sentence"), [
    (None, ["plan"], 2, "moa: No workspace at"),
    ("base: [", ["plan"], 1, "moa: params.yaml is not valid YAML"),
    (PARAMS + "tain: {}\n", ["plan"], 1, "moa: params.yaml: unknown key 'tain'"),
    (PARAMS.replace("math", "a/b"), ["run", "--local"], 1, "a domain name is lower-case"),
    (PARAMS, ["prepare", "--domain", "law"], 1, "moa: No domain 'law' in params.yaml; its domains are math."),
    (PARAMS, ["run", "--local"], 2, "is not set up for DVC: run `git init && dvc init` there first."),
    (PARAMS, ["plan", "--domain", "law"], 1, "moa: No domain 'law'"),
])
def test_one_sentence_and_an_exit_code(tmp_path: Path, params: str | None, words: list[str], code: int,
                                       sentence: str) -> None:
    if params is not None:
        (tmp_path / "params.yaml").write_text(params)
        (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    done = run(*words, cwd=tmp_path)
    assert sentence in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert done.returncode == code


@pytest.mark.parametrize("words", [["--workspace", "DIR", "plan"], ["plan", "--workspace", "DIR"],
                                   ["domain", "list", "--workspace", "DIR"]])
def test_workspace_option(tmp_path: Path, words: list[str]) -> None:
    done = run(*(str(tmp_path) if word == "DIR" else word for word in words), cwd=Path(__file__).parent)
    assert done.returncode == 2 and f"No workspace at {tmp_path}" in done.stderr


def ended_by(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(Place, "workspace", fail)
    monkeypatch.setattr(sys, "argv", ["moa", "plan"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code


@pytest.mark.parametrize(("error", "code"), [(PipelineError("No."), 1), (KeyboardInterrupt(), 130)])
def test_what_ends_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                             error: BaseException, code: int) -> None:
    assert ended_by(error, monkeypatch) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("moa: ") and not printed.out


def test_the_number_of_threads_is_limited_before_a_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(main.machine, "configure_threads", lambda: calls.append("limited"))
    monkeypatch.setattr(main, "app", lambda **_: calls.append("ran"))
    main.main()
    assert calls == ["limited", "ran"]


def sqlite_error(path: Path, statement: str, *, pages: int | None = None) -> sqlite3.Error:
    """The error of a statement, in a database that may grow to so many pages."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        if pages:
            database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(sqlite3.Error) as caught:
            database.execute(statement)
    return caught.value


def test_a_full_disk_is_a_number_and_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    full = sqlite_error(tmp_path / "full", "CREATE TABLE a AS SELECT zeroblob(100000)", pages=2)
    for error in (full, OSError(28, "No room"), OSError(5, "Broken")):
        assert ended_by(error, monkeypatch) == 1
        assert capsys.readouterr().err.startswith("moa: The disk cannot be written to (")
    for bug in (sqlite_error(tmp_path / "other", "SELECT * FROM disk"), OSError(2, "No disk")):
        with pytest.raises(type(bug), match="disk"):
            ended_by(bug, monkeypatch)


def test_a_parent_gets_the_error_as_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ours = DataError("It cannot be read.")
    ours.__cause__ = OSError(5, "Broken")
    monkeypatch.setenv(RECORDS_WANTED, "json")
    for error, expected in (
            (ours, {"error": "DataError", "errno": 5, "message": "It cannot be read."}),
            (PipelineError("alpha: No.", cause=ErrorRecord("No.", "TrainingError")),
             {"error": "TrainingError", "errno": None, "message": "alpha: No."}),
            (OSError(28, "No room"), {"error": "OSError", "errno": 28, "message":
                                      "The disk cannot be written to ([Errno 28] No room): free some space and run the "
                                      "command again."}),
            (ZeroDivisionError("by zero"), {"error": "ZeroDivisionError", "errno": None,
                                            "message": "ZeroDivisionError: by zero"})):
        try:
            ended_by(error, monkeypatch)
        except ZeroDivisionError:
            assert isinstance(error, ZeroDivisionError)
        record = reported(capsys.readouterr().out)
        assert record is not None and record.as_dict() == expected


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Place, "workspace", fail)
    monkeypatch.setattr(sys, "argv", ["moa", "plan"])
    with pytest.raises(ZeroDivisionError):
        main.main()
