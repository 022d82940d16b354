"""`moa doctor`: what this machine is, what moa uses of it and why, how many experts fit, and what is wrong.

It changes nothing. A file that is written into the workspace and deleted at once shows whether that can be written, and
what time its disk says; moa's C code is compiled into the user's cache, as at its first use. DVC's remotes are not
asked: that can take minutes.
"""

import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from moa import __version__
from moa.core import git, machine
from moa.core.config import Config, load
from moa.core.errors import MoaError, in_words
from moa.core.paths import Workspace, user_cache
from moa.core.text import table
from moa.reports.domains import size
from moa.workspace.lock import LockHolder
from moa.workspace.pipeline import Pipeline

Found = TypeVar("Found")
GIB = 1 << 30
LEAST_SHARE, LEAST_FREE = 0.05, (GIB, 10 * GIB)   # share of a disk that should be free, with its least and its most
DISK_SKEW = 5.0      # seconds that the disk's clock may differ from this machine's
RECORD_SKEW = 60.0   # seconds that a commit or event may lie ahead: clocks of other machines wrote some of them
ANSWER_SECONDS = 15.0   # timeout of the artifact store
PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong: the name of the check, and what is wrong and what to do as a sentence or two."""

    check: str
    message: str


class Doctor:
    """One examination: `facts` as JSON values, and `problems`."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.problems: list[Problem] = []

    def report(self, check: str, *messages: str | None) -> None:
        """Add a problem for each message that is not None."""
        self.problems += [Problem(check, message) for message in messages if message is not None]

    @contextmanager
    def checking(self, check: str) -> Iterator[None]:
        """Report an error of moa or of the operating system within the block as a problem."""
        try:
            yield
        except MoaError as error:
            self.report(check, str(error))
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            self.report(check, f"The check of {check} failed: {in_words(error)}{place}; mend that, and run `moa "
                               "doctor` again.")


def examine(workspace: Workspace | None, services: Sequence[str] = (), last_event: str | None = None) -> dict[str, Any]:
    """Examine the machine and, if there is one, the workspace.

    Args:
        workspace: None = the machine alone.
        services: a sentence for each server that should answer and does not.
        last_event: time (ISO 8601) of the last entry in the event log.

    Returns:
        The facts, with the `problems`: for `text`, and as JSON.
    """
    doctor = Doctor()
    config: Config | None = None
    if workspace is not None:
        with doctor.checking("parameters"):
            config = load(workspace.params)
    _machine(doctor)
    _disks(doctor, workspace)
    _device(doctor, config)
    if workspace is not None:
        doctor.facts["workspace"] = str(workspace.root)
        _repositories(doctor, workspace, last_event)
        _disk_clock(doctor, workspace)
        _lock(doctor, workspace)
        if config is not None:
            _base(doctor, workspace, config)
            _registry(doctor, workspace, config)
    doctor.report("services", *services)
    return {**doctor.facts, "problems": [asdict(problem) for problem in doctor.problems]}


# The machine.

def _machine(doctor: Doctor) -> None:
    import torch

    cores, threads = machine.cores(), torch.get_num_threads()
    doctor.facts |= {
        "moa": __version__, "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": asdict(cores), "memory": asdict(machine.memory()), "threads": threads}
    doctor.report("threads", thread_problem(threads, cores.count))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def thread_problem(threads: int, cores: int) -> str | None:
    """What is wrong with torch's number of threads."""
    if threads <= cores:
        return None
    return (f"torch computes with {threads} threads and may use {cores} core{'' if cores == 1 else 's'}, which is slow:"
            f" unset {machine.THREADS}, or set it to {cores}.")


def _disks(doctor: Doctor, workspace: Workspace | None) -> None:
    by_device: dict[int, dict[str, Any]] = {}
    with doctor.checking("disk"):
        for name, path in (("workspace", workspace.root) if workspace else ("current folder", Path.cwd()),
                           ("temporary files", Path(tempfile.gettempdir()))):
            usage = shutil.disk_usage(path)
            disk = by_device.setdefault(path.stat().st_dev, {"path": str(path), "holds": [], "total": usage.total,
                                                             "free": usage.free})
            disk["holds"].append(name)
    doctor.facts["disks"] = list(by_device.values())
    for disk in by_device.values():
        doctor.report("disk", disk_problem(disk))


def disk_problem(disk: Mapping[str, Any]) -> str | None:
    """What is wrong with an entry of `disks`: 5 % of it should be free, but at least 1 GiB and at most 10 GiB."""
    wanted = min(max(LEAST_SHARE * disk["total"], LEAST_FREE[0]), LEAST_FREE[1])
    if disk["free"] >= wanted:
        return None
    cure = ("delete what you do not need; `dvc gc --workspace` and deleting .moa/cache free what moa keeps"
            if "workspace" in disk["holds"] else "delete what you do not need, or name another folder in TMPDIR")
    return (f"The disk at {disk['path']} ({', '.join(disk['holds'])}) has {size(disk['free'])} of "
            f"{size(disk['total'])} free: {cure}.")


def _device(doctor: Doctor, config: Config | None) -> None:
    import torch

    from moa.base.device import pick_device

    doctor.facts |= {"cards": [], "driver": driver(), "cuda": torch.version.cuda, "device": None}
    try:
        doctor.facts["cards"] = cards()
        with doctor.checking("device"):
            device = pick_device(config.execution.devices if config is not None else "auto")
            doctor.facts["device"] = asdict(device)
            _compiler(doctor, device.device, device.dtype)
            doctor.report("device", driver_problem(doctor.facts["driver"], len(doctor.facts["cards"]), device.reason,
                                                   os.environ.get("CUDA_VISIBLE_DEVICES")))
    except RuntimeError as error:   # torch's
        doctor.report("device", f"torch cannot use the CUDA devices ({in_words(error)}): see what `nvidia-smi` says, "
                                "or name cpu in execution.devices.")


def cards() -> list[dict[str, Any]]:
    """The CUDA devices that torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        found.append({"device": f"cuda:{index}", "name": properties.name, "total": total, "free": free,
                      "capability": f"{properties.major}.{properties.minor}"})
    return found


def driver() -> str | None:
    """The version of NVIDIA's driver, as nvidia-smi says it; None without a driver or a card."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def driver_problem(driver: str | None, cards: int, reason: str, visible: str | None) -> str | None:
    """What is wrong where there is a driver and torch sees no card, unless the user hides the cards or names the CPU.

    Args:
        driver: version of the driver.
        cards: number of cards that torch sees.
        reason: of the device that was picked.
        visible: the variable CUDA_VISIBLE_DEVICES.
    """
    if driver is None or cards or visible is not None or "chosen by auto" not in reason:
        return None
    return (f"NVIDIA's driver {driver} is here and torch {_version('torch')} sees no card, so the CPU computes: "
            "install a torch that is built for CUDA, or a driver that is new enough for it.")


def _compiler(doctor: Doctor, device: str, dtype: str) -> None:
    """Which of moa's C libraries compute in the device's dtype, compiled if they were not."""
    from moa.base.kernels import build

    reason = build.unavailable()
    if reason is None and device != "cpu":
        reason = "moa's C code computes on CPUs alone"
    elif reason is None and dtype not in ("bfloat16", "float32"):
        reason = f"moa's C code does not compute {dtype}"
    libraries = [name for name in build.NAMES if build.library_for(name, f"torch.{dtype}")] if reason is None else []
    doctor.facts["compiler"] = {"path": build.compiler(), "libraries": libraries, "reason": reason}
    missing = sorted(set(build.NAMES) - set(libraries)) if reason is None else []
    if missing and dtype == "bfloat16" and "avx512_bf16" not in build.cpu():
        doctor.facts["compiler"]["reason"] = "this CPU has no instructions for bfloat16"
    elif missing:
        doctor.report("compiler", f"{build.compiler()} could not build moa's C code ({', '.join(missing)}), and torch "
                                  f"computes the same more slowly: see that {user_cache()} can be written, or name "
                                  "another compiler in CC.")


# The workspace.

def _repositories(doctor: Doctor, workspace: Workspace, last_event: str | None) -> None:
    """git and DVC are there, and no record is from the future."""
    records: dict[str, float] = {}
    with doctor.checking("git"):
        git.run(workspace.root, "--version")   # raises where git is missing
        if git.has_commits(workspace.root):
            records["newest commit"] = float(git.run(workspace.root, "log", "-1", "--format=%ct"))
    with doctor.checking("dvc"):
        Pipeline(workspace)   # raises where the workspace is not set up for DVC
    with suppress(ValueError):   # no event, or a line that a person edited
        records["last entry of the event log"] = datetime.fromisoformat(last_event or "").timestamp()
    doctor.report("clock", *(future_problem(name, at, time.time()) for name, at in records.items()))


def future_problem(name: str, at: float, now: float) -> str | None:
    """What is wrong where a record's time lies ahead of this machine's clock."""
    if at - now <= RECORD_SKEW:
        return None
    return (f"The {name} is from {_time(at)}, and this machine's clock says {_time(now)}: set the clock (a time server "
            "keeps it right), or wait, if another clock was wrong.")


def _disk_clock(doctor: Doctor, workspace: Workspace) -> None:
    folder = workspace.local if workspace.local.is_dir() else workspace.root
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            before = time.time()
            file.write(b"moa")
            file.flush()
            written, after = os.fstat(file.fileno()).st_mtime, time.time()
    except OSError as error:
        doctor.report("write", f"The workspace cannot be written ({in_words(error)}): make {folder} writable for this "
                               "user, or free some space.")
        return
    doctor.report("clock", skew_problem(written, before, after))


def skew_problem(written: float, before: float, after: float) -> str | None:
    """What is wrong with the time of a file that was written between two readings of this machine's clock."""
    ahead = max(written - after, 0.0) or min(written - before, 0.0)
    if abs(ahead) <= DISK_SKEW:
        return None
    return (f"The clock of the workspace's disk is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this "
            "machine's, so rows that arrive seem too new or too old: set both clocks by the same time server.")


def _lock(doctor: Doctor, workspace: Workspace) -> None:
    holder = LockHolder.of(workspace)
    with doctor.checking("lock"):
        record, state = holder.read(), holder.state()
        doctor.facts["lock"] = {"state": state, **{key: (record or {}).get(key) for key in ("pid", "since", "seen")}}
        if record is not None and state == "silent":
            doctor.report("lock", f"The process {record['pid']} has held the workspace's lock since {record['since']} "
                                  f"and gave no sign since {record.get('seen')}: it is stopped or blocked; end it, and "
                                  "`moa run` goes on with its work.")


def _base(doctor: Doctor, workspace: Workspace, config: Config) -> None:
    """The fetched base is the one that is pinned, and how many experts fit beside it."""
    from moa.base.load import load_tokenizer
    from moa.base.pin import pin, verify
    from moa.experts import capacity

    doctor.facts |= {"base": None, "experts": None}
    if not workspace.base_manifest.is_file():
        return
    with doctor.checking("base"):
        pinned = pin(workspace)
        doctor.facts["base"] = {"source": pinned.source, "parameters": pinned.parameters, "digest": pinned.digest}
        # The hub's cache may lack the weights, and `verify` would download them.
        if config.base.source.startswith("hub:") and pinned.source.startswith("hub:"):
            load_tokenizer(workspace)
        else:
            verify(workspace, config.base)
        if (device := doctor.facts["device"]) is None:
            return
        on_card = next((card for card in doctor.facts["cards"] if card["device"] == _indexed(device["device"])), None)
        sizes = capacity.sizes(capacity.skeleton(workspace.base), config.train.rank, config.train.targets,
                               _bytes_of(device["dtype"]), shared=on_card is None)
        free = on_card["free"] if on_card else machine.memory().free
        doctor.facts["experts"] = {
            "rank": config.train.rank, "base_bytes": sizes.base, "free_bytes": free,
            **{use: {"bytes": each, "fit": sizes.fits(free, each)}
               for use, each in (("serving", sizes.serving), ("training", sizes.training))}}
        doctor.report("memory", memory_problem(doctor.facts["experts"], device["device"]))


def _indexed(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _bytes_of(dtype: str) -> int:
    import torch

    return int(getattr(torch, dtype).itemsize)


def memory_problem(experts: Mapping[str, Any], device: str) -> str | None:
    """What is wrong where the base or one expert does not fit; `experts` as in the facts."""
    if experts["training"]["fit"]:
        return None
    return (f"{size(experts['free_bytes'])} of memory are free ({device}), the base takes "
            f"{size(experts['base_bytes'])}, and an expert in training {size(experts['training']['bytes'])}: end other "
            "programs, lower train.rank, or use a machine with more memory.")


def _registry(doctor: Doctor, workspace: Workspace, config: Config) -> None:
    """MLflow answers, and its artifact store has the champion's files."""
    from moa.release import mlflow_client
    from moa.release.registry import Registry

    doctor.facts["mlflow"] = {"address": mlflow_client.shown(mlflow_client.uri(workspace)), "champion": None}
    registry = Registry(workspace, config)
    if registry.private and not (workspace.mlflow / "mlflow.db").exists():
        return   # the first release makes it
    with doctor.checking("mlflow"):
        champion = registry.champion()
        if champion is None:
            return
        doctor.facts["mlflow"]["champion"] = champion.version
        try:
            found = within(ANSWER_SECONDS, lambda: registry.lists_files(champion))
        except MoaError:
            raise
        except Exception as error:   # of the artifact store's own client, such as botocore
            doctor.report("artifacts", f"MLflow's artifact store cannot be read ({in_words(error)}), so the champion, "
                                       f"version {champion.version}, cannot be loaded: see that the store runs and "
                                       "that this user has its keys.")
            return
        if not found:
            doctor.report("artifacts", "MLflow's artifact store has no file of the champion, version "
                                       f"{champion.version}: restore the store from a backup, or register it again "
                                       "with `moa run`.")


def within(seconds: float, call: Callable[[], Found]) -> Found:
    """The result of `call`, in a thread that is abandoned after so many seconds. Raises TimeoutError then."""
    results: list[Found] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:   # handed to the caller
            errors.append(error)

    thread = threading.Thread(target=work, name="moa-doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


# As text.

def text(facts: Mapping[str, Any]) -> str:
    """The facts of `examine` as a table, and a line for each problem."""
    packages = ", ".join(f"{name} {found or 'missing'}" for name, found in facts["packages"].items())
    rows = [("moa", f"{facts['moa']}, Python {facts['python']}, {packages}"), ("system", facts["system"]),
            ("cores", _cores_text(facts)), ("memory", _memory_text(facts["memory"])),
            *((("disk", f"{size(disk['free'])} of {size(disk['total'])} free at {disk['path']} "
                        f"({', '.join(disk['holds'])})")) for disk in facts["disks"])]
    if device := facts["device"]:
        rows += [("device", f"{device['device']} in {device['dtype']}: {device['reason']}"),
                 ("compiler", _compiler_text(facts["compiler"]))]
    rows += [("card", f"{card['device']} {card['name']}, {size(card['free'])} of {size(card['total'])} free, compute "
                      f"capability {card['capability']}") for card in facts["cards"]] or [("card", "none")]
    rows += [("driver", f"{facts['driver']}, torch built for CUDA {facts['cuda']}")] if facts["driver"] else []
    if "workspace" in facts:
        rows += [("workspace", facts["workspace"]), *_workspace_rows(facts)]
    wrong = [f"WRONG  {problem['message']}" for problem in facts["problems"]] or ["Nothing is wrong."]
    return "\n".join([table(rows), "", *wrong])


def _cores_text(facts: Mapping[str, Any]) -> str:
    cores = facts["cores"]
    plural = "" if facts["threads"] == 1 else "s"
    return f"{cores['count']}{_limited(cores, str)}; torch uses {facts['threads']} thread{plural}"


def _memory_text(memory: Mapping[str, Any]) -> str:
    return f"{size(memory['total'])}{_limited(memory, size)}, {size(memory['free'])} free"


def _limited(facts: Mapping[str, Any], shown: Callable[[Any], str]) -> str:
    """What the host has, and what limits this process to less; empty where nothing does."""
    return "" if facts["limit"] == machine.HOST else f" of the host's {shown(facts['host'])} (limit: {facts['limit']})"


def _compiler_text(compiler: Mapping[str, Any]) -> str:
    if compiler["libraries"]:
        return f"{compiler['path']}; C code for {', '.join(compiler['libraries'])}"
    return f"{compiler['path'] or 'none'}; torch computes" + (f": {compiler['reason']}" if compiler["reason"] else "")


def _workspace_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "base" in facts:
        base = facts["base"]
        yield "base", (f"{base['source']}, {base['parameters']:,} parameters" if base
                       else "not fetched yet: `moa base`, or the next `moa run`, fetches it")
    if experts := facts.get("experts"):
        for use, each in (("serve", experts["serving"]), ("train", experts["training"])):
            yield f"experts to {use}", (f"at most {each['fit']:,} of rank {experts['rank']}, {size(each['bytes'])} "
                                        f"each, beside {size(experts['base_bytes'])} of the base")
    if registry := facts.get("mlflow"):
        champion = registry["champion"]
        yield "mlflow", f"{registry['address']}, {f'champion: version {champion}' if champion else 'no champion'}"
    if (lock := facts.get("lock")) and lock["state"] != "free":
        run = f"pid {lock['pid']}, since {lock['since']}"
        yield "lock", {"at work": f"a run is at work ({run})", "silent": f"held, without a sign of life ({run})",
                       "killed": f"free: a run was killed ({run}), and the next goes on with its work"}[lock["state"]]
