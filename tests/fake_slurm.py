"""A Slurm of one machine: ``sbatch``, ``srun``, ``squeue``, ``scancel``, ``scontrol``, with Slurm's options and words.

Each command is this file under another name. A job is a process of this machine, with Slurm's variables in its
environment; what becomes of it lies in one folder, which tests read. There is no clock: where Slurm would act after
some time (the signal before the time limit, the limit itself), a test says when that is.

What it refuses is what Slurm 24 refuses, in its words, as far as this package's scripts come near it.
"""

from __future__ import annotations

import contextlib
import fcntl
import getopt
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["FakeSlurm", "Job"]

COMMANDS = ("sbatch", "scancel", "scontrol", "squeue", "srun")
FOLDER = "FAKE_SLURM"
"""Environment variable: the folder of a fake Slurm; commands and jobs are told by it."""

LOOK_S = 0.02
NAME = r"[^\s]+"
COUNT = r"[1-9]\d*"
SIZE = r"\d+[KMGT]?B?"
TIME = r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d|UNLIMITED|INFINITE"
ARRAY = r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?"
_AFTER = r"(after|afterany|afterok|afternotok|aftercorr)(:\d+)+"
DEPENDENCY = rf"{_AFTER}(,{_AFTER})*|singleton"
SIGNAL = r"([BR]:)?(SIG)?([A-Z][A-Z0-9]*|\d+)(@\d+)?"

OPTIONS: dict[str, tuple[str, str | None]] = {
    "account": ("A", NAME), "array": ("a", ARRAY), "begin": ("b", NAME), "chdir": ("D", NAME), "comment": ("", r".*"),
    "constraint": ("C", NAME), "cpus-per-task": ("c", COUNT), "dependency": ("d", DEPENDENCY), "error": ("e", NAME),
    "exclude": ("x", NAME), "exclusive": ("", None), "export": ("", NAME), "gres": ("", NAME), "hold": ("H", None),
    "job-name": ("J", r".+"), "kill-on-invalid-dep": ("", r"yes|no"), "licenses": ("L", NAME), "mail-type": ("", NAME),
    "mail-user": ("", NAME), "mem": ("", SIZE), "mem-per-cpu": ("", SIZE), "nice": ("", r"-?\d+"),
    "no-requeue": ("", None), "nodelist": ("w", NAME), "nodes": ("N", rf"{COUNT}(-{COUNT})?"), "ntasks": ("n", COUNT),
    "ntasks-per-node": ("", COUNT), "open-mode": ("", r"append|truncate"), "output": ("o", NAME),
    "parsable": ("", None), "partition": ("p", NAME), "qos": ("q", NAME), "quiet": ("Q", None), "requeue": ("", None),
    "reservation": ("", NAME), "signal": ("", SIGNAL), "switches": ("", NAME), "test-only": ("", None),
    "time": ("t", TIME), "tmp": ("", SIZE), "wait": ("W", None),
}  # fmt: skip
"""Long option of sbatch -> its letter, and what its value looks like; None: it takes none."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

Record = dict[str, Any]


# What tests hold


@dataclass(frozen=True)
class Job:
    """One job, as it is in the folder."""

    folder: Path

    @property
    def id(self) -> int:
        """Its number."""
        return int(self.folder.name)

    @property
    def facts(self) -> Record:
        """What was asked for, and what became of it."""
        facts: Record = json.loads((self.folder / "job.json").read_text())
        return facts

    @property
    def state(self) -> str:
        """In Slurm's words."""
        return str(self.facts["state"])

    @property
    def options(self) -> dict[str, str]:
        """Long options of the script and of the command line."""
        return dict(self.facts["options"])

    @property
    def script(self) -> str:
        """What was submitted."""
        return (self.folder / "slurm_script").read_text()

    def rewrite(self, old: str, new: str) -> None:
        """Change the script of a job that still waits."""
        assert old in self.script
        (self.folder / "slurm_script").write_text(self.script.replace(old, new))

    @property
    def output(self) -> str:
        """What it has printed, on both streams."""
        paths = {self.facts.get("output"), self.facts.get("error")} - {None}
        return "".join(
            Path(str(path)).read_text() for path in sorted(map(str, paths)) if Path(str(path)).is_file()
        )

    def processes(self) -> list[int]:
        """Return the numbers of its processes that live, whatever session they are in."""
        return _processes(self.folder.parents[1], self.id)

    def signal_batch(self, number: signal.Signals) -> None:
        """Send a signal to the batch shell alone, as ``--signal=B:`` does before the time limit."""
        os.kill(int(self.facts["pid"]), number)

    def end_time(self, *, at_once: bool = False) -> None:
        """Let the time limit come: SIGTERM to all processes, then SIGKILL to those that are left; or at once."""
        _change(self.folder, ending="TIMEOUT")
        _signal_all(self.folder, signal.SIGKILL if at_once else signal.SIGTERM)

    def fail_node(self) -> None:
        """Let the node be lost: no process hears of it, and the job waits again where it may be requeued."""
        requeue = "requeue" in self.options
        _change(self.folder, ending="REQUEUE" if requeue else "NODE_FAIL")
        _signal_all(self.folder, signal.SIGKILL)


@dataclass(frozen=True)
class FakeSlurm:
    """A Slurm of one machine in a folder.

    Parameters
    ----------
    folder
        An empty one, or one that is not there. What jobs print is not in it, but where they say.
    """

    folder: Path
    partitions: tuple[str, ...] = ("compute", "long")
    """The first one is the default."""
    accounts: tuple[str, ...] = ("lab",)
    cpus: int = 64
    """Of a node."""
    memory_mb: int = 256_000
    """Of a node."""
    nodes: int = 8

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "jobs").mkdir(exist_ok=True)
        (self.folder / "bin").mkdir(exist_ok=True)
        facts = {k: v for k, v in asdict(self).items() if k != "folder"}
        limits = {"hold": "", "most_jobs": None, "most_running": None, "test": os.getpid()}
        _put(self.folder / "slurm.json", facts | limits)
        (self.folder / "calls").touch()
        for command in COMMANDS:
            shim = self.folder / "bin" / command
            outside = (
                "unset SLURM_JOB_ID; " if command == "sbatch" else ""
            )  # its daemons are no part of a job
            shim.write_text(
                f"#!/bin/sh\n{outside}{FOLDER}={shlex.quote(str(self.folder))} exec "
                f'{shlex.quote(sys.executable)} -IS {shlex.quote(__file__)} {command} "$@"\n'
            )
            shim.chmod(0o755)

    @property
    def bin(self) -> Path:
        """To be put first on the PATH."""
        return self.folder / "bin"

    def without(self, command: str) -> None:
        """Take a command away."""
        (self.bin / command).unlink()

    def hold(self, reason: str) -> None:
        """Let no job begin from now on: squeue tells this reason; an empty one lets them begin."""
        self._set(hold=reason)

    def allow(self, *, jobs: int | None = None, running: int | None = None) -> None:
        """Limit how many jobs may be submitted, or run, at the same time."""
        self._set(most_jobs=jobs, most_running=running)

    def _set(self, **settings: Any) -> None:
        with _locked(self.folder):
            _put(self.folder / "slurm.json", _settings(self.folder) | settings)

    def calls(self, command: str) -> list[list[str]]:
        """Return the arguments of each call of a command, in their order."""
        return [line[1:] for line in self._calls() if line[0] == command]

    def most_wanted(self) -> int:
        """Return how many jobs were wanted at the same time: submitted, and not yet cancelled."""
        changes = (
            1 if command == "sbatch" else -sum(word.isdigit() for word in words)
            for command, *words in self._calls()
            if command in ("sbatch", "scancel")
        )
        return max(accumulate(changes), default=0)

    def _calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    @property
    def jobs(self) -> list[Job]:
        """All that were submitted, in their order."""
        return [
            Job(path) for path in sorted((self.folder / "jobs").iterdir(), key=lambda path: int(path.name))
        ]

    @property
    def active(self) -> list[Job]:
        """Those that wait or run."""
        return [job for job in self.jobs if job.state not in ENDED]

    def processes(self) -> list[int]:
        """Return the numbers of all processes of all jobs that live."""
        return _processes(self.folder)

    def close(self) -> None:
        """End what is left, by force."""
        for job in self.active:
            _cancel(job.folder, signal.SIGKILL)
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(LOOK_S)
        while self.active:  # its keeper writes down that it has ended
            time.sleep(LOOK_S)


# State in the folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _put(path: Path, facts: Record) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(facts))
    new.rename(path)


def _settings(slurm: Path) -> Record:
    settings: Record = json.loads((slurm / "slurm.json").read_text())
    return settings


def _facts(folder: Path) -> Record:
    facts: Record = json.loads((folder / "job.json").read_text())
    return facts


def _change(folder: Path, when: str = "", **facts: Any) -> bool:
    """Change a job's facts, if it is in a state; tell whether it was."""
    with _locked(folder.parents[1]):
        before = _facts(folder)
        if when and before["state"] != when:
            return False
        if facts.get("state") == "RUNNING" and not _room(folder.parents[1]):
            return False
        _put(folder / "job.json", before | facts)
    return True


def _room(slurm: Path) -> bool:
    """Tell whether a further job may run."""
    most = _settings(slurm)["most_running"]
    return (
        most is None or sum(_facts(path)["state"] == "RUNNING" for path in (slurm / "jobs").iterdir()) < most
    )


def _processes(slurm: Path, job: int | None = None) -> list[int]:
    """Return the processes whose environment says that they belong to a job, as a cgroup would."""
    wanted = {f"{FOLDER}={slurm}".encode()} | ({f"SLURM_JOB_ID={job}".encode()} if job else set())
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            variables = set(path.read_bytes().split(b"\0"))
            if wanted <= variables and any(v.startswith(b"SLURM_JOB_ID=") for v in variables):
                found.append(int(path.parts[2]))
    return sorted(found)


def _signal_all(folder: Path, number: signal.Signals) -> None:
    for pid in _processes(folder.parents[1], int(folder.name)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _cancel(folder: Path, number: signal.Signals = signal.SIGTERM) -> None:
    if _change(folder, "PENDING", state="CANCELLED", reason="None"):
        return
    if _change(folder, "RUNNING", ending="CANCELLED"):
        _signal_all(folder, signal.SIGCONT)
        _signal_all(folder, number)


# sbatch


def _fail(*lines: str, code: int = 1) -> NoReturn:
    print(*lines, sep="\n", file=sys.stderr)
    raise SystemExit(code)


def _parsed(command: str, arguments: list[str], whole: bool) -> tuple[dict[str, str], list[str]]:
    """Return long options and the rest, or end as getopt_long does."""
    letters = "".join(letter + (":" if value else "") for letter, value in OPTIONS.values() if letter)
    names = [name + ("=" if value else "") for name, (_, value) in OPTIONS.items()]
    try:
        pairs, rest = getopt.getopt(arguments, letters, names)
    except getopt.GetoptError as error:
        dashes = "--" if len(error.opt) > 1 else "-"
        kind = "unrecognized option" if "not recognized" in error.msg else "option requires an argument --"
        _fail(f"{command}: {kind} '{dashes}{error.opt}'", f'Try "{command} --help" for more information')
    if rest and not whole:
        pass  # as Slurm does: what follows on a line of directives is left out
    long = {f"-{letter}": name for name, (letter, _) in OPTIONS.items() if letter}
    options = {}
    for key, value in pairs:
        name = long.get(key, key[2:])
        form = OPTIONS[name][1]
        if form and not re.fullmatch(form, value):
            if form == COUNT:
                _fail(f'{command}: error: Invalid numeric value "{value}" for --{name}.')
            _fail(f"{command}: error: Invalid --{name} specification")
        options[name] = value
    return options, rest


def _directives(text: str) -> list[str]:
    """Return the words of all #SBATCH lines before the first command."""
    words = []
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            words += shlex.split(line.removeprefix("#SBATCH"), comments=True)
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return words


def _sbatch(slurm: Path, arguments: list[str]) -> None:
    options, rest = _parsed("sbatch", arguments, whole=True)
    if rest:
        path = Path(rest[0])
        if not path.is_file():
            _fail(f"sbatch: error: Unable to open file {path}")
        text = path.read_text()
    else:
        text = sys.stdin.read()
    if not text.startswith("#!"):
        _fail(
            "sbatch: error: This does not look like a batch script.  The first",
            "sbatch: error: line must start with #! followed by the path to an interpreter.",
            "sbatch: error: For instance: #!/bin/sh",
        )
    if "\r\n" in text:
        _fail(
            "sbatch: error: Batch script contains DOS line breaks (\\r\\n)",
            "sbatch: error: instead of expected UNIX line breaks (\\n).",
        )
    options = _parsed("sbatch", _directives(text), whole=False)[0] | options
    with _locked(slurm):
        _check(slurm, options)
        if "test-only" in options:
            start = "2024-01-01T00:00:00"
            _fail(
                f"sbatch: Job 1 to start at {start} using 1 processors on nodes node1 in partition compute",
                code=0,
            )
        jobs = _entered(slurm, options, text, rest)
    first = jobs[0].name
    if "parsable" in options:
        print(first)
    elif "quiet" not in options:
        print(f"Submitted batch job {first}")
    sys.stdout.flush()
    for job in jobs:
        _keep_in_background(job)
    if "wait" in options:
        while any(_facts(job)["state"] not in ENDED for job in jobs):
            time.sleep(LOOK_S)
        raise SystemExit(
            max(_facts(job).get("code") or int(_facts(job)["state"] != "COMPLETED") for job in jobs)
        )


def _check(slurm: Path, options: dict[str, str]) -> None:
    """Refuse what the controller refuses."""
    settings = _settings(slurm)

    def refuse(reason: str, *before: str) -> NoReturn:
        failed = (
            "allocation failure" if "test-only" in options else "sbatch: error: Batch job submission failed"
        )
        _fail(*before, f"{failed}: {reason}")

    if (partition := options.get("partition")) and not set(partition.split(",")) <= set(
        settings["partitions"]
    ):
        refuse("Invalid partition name specified", f"sbatch: error: invalid partition specified: {partition}")
    if (account := options.get("account")) and account not in settings["accounts"]:
        refuse("Invalid account or account/partition combination specified")
    if "mem" in options and _megabytes(options["mem"]) > settings["memory_mb"]:
        refuse(
            "Memory specification can not be satisfied",
            "sbatch: error: Memory specification can not be satisfied",
        )
    active = [path for path in (slurm / "jobs").iterdir() if _facts(path)["state"] not in ENDED]
    if settings["most_jobs"] is not None and len(active) >= settings["most_jobs"]:
        refuse("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)")
    nodes = int(options.get("nodes", "1").split("-")[0])
    if int(options.get("cpus-per-task", 1)) > settings["cpus"] or nodes > settings["nodes"]:
        refuse(
            "Requested node configuration is not available",
            "sbatch: error: CPU count per node can not be satisfied",
        )
    for job in re.findall(r"\d+", options.get("dependency", "")):
        if not (slurm / "jobs" / job).is_dir():
            refuse("Job dependency problem")


def _megabytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMGT]?)B?", text).groups()  # type: ignore[union-attr]
    return int(int(number) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[unit])


def _tasks(array: str) -> list[int]:
    """Return the task numbers of ``--array``."""
    numbers: set[int] = set()
    for piece in array.partition("%")[0].split(","):
        first, last, step = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", piece).groups()  # type: ignore[union-attr]
        numbers |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return sorted(numbers)


def _entered(slurm: Path, options: dict[str, str], text: str, rest: list[str]) -> list[Path]:
    """Put jobs into the queue: one, or one a task of an array."""
    tasks: list[int | None] = [*_tasks(options["array"])] if "array" in options else [None]
    jobs = []
    number = 1 + max((int(path.name) for path in (slurm / "jobs").iterdir()), default=0)
    for place, task in enumerate(tasks):
        folder = slurm / "jobs" / str(number + place)
        entering = slurm / "entering"  # whoever lists jobs sees whole ones
        entering.mkdir()
        (entering / "slurm_script").write_text(text)
        (entering / "slurm_script").chmod(0o755)
        facts = {
            "id": number + place, "options": options, "arguments": rest[1:], "state": "PENDING", "reason": "None",
            "name": options.get("job-name", Path(rest[0]).name if rest else "sbatch"), "task": task,
            "array": None if task is None else number, "tasks": tasks, "restarts": 0, "ending": "",
            "chdir": str(Path(options.get("chdir", Path.cwd())).absolute()),
            "environment": dict(os.environ) if options.get("export", "ALL").startswith("ALL") else {},
        }  # fmt: skip
        _put(entering / "job.json", facts)
        entering.rename(folder)
        jobs.append(folder)
    return jobs


# Jobs


def _keep_in_background(job: Path) -> None:
    """Be the daemon of a job, in a process of its own, which outlives sbatch."""
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    try:
        while _begun(job):
            if not _ended(job, _started(job)):
                break
    finally:
        os._exit(0)


def _begun(job: Path) -> bool:
    """Wait until a job may begin; tell whether it does."""
    slurm = job.parents[1]
    while True:
        _end_without_test(job)
        facts = _facts(job)
        if facts["state"] != "PENDING":
            return False
        reason = _settings(slurm)["hold"] or _dependency(slurm, facts)
        if not reason and "hold" in facts["options"]:
            reason = "JobHeldUser"
        if not reason:
            if _change(job, "PENDING", state="RUNNING", reason="None", ending=""):
                return True
            reason = "Resources" if _facts(job)["state"] == "PENDING" else ""
        if reason and reason != facts["reason"]:
            _change(job, reason=reason)
        time.sleep(LOOK_S)


def _end_without_test(job: Path) -> None:
    """End a job by force when the process whose Slurm this is was killed: nobody else does."""
    if not Path(f"/proc/{_settings(job.parents[1])['test']}").exists():
        _cancel(job, signal.SIGKILL)


def _dependency(slurm: Path, facts: Record) -> str:
    """Return the reason for which a job still waits."""
    for kind, ids in re.findall(r"(\w+):([\d:]+)", facts["options"].get("dependency", "")):
        for number in ids.split(":"):
            others = [_facts(path) for path in (slurm / "jobs").iterdir()]
            states = [o["state"] for o in others if int(number) in (o["id"], o["array"])]
            if any(state not in ENDED for state in states):
                return "Dependency"
            if kind == "afterok" and any(state != "COMPLETED" for state in states):
                return "DependencyNeverSatisfied"
    return ""


def _named(pattern: str, facts: Record) -> str:
    array = facts["array"] or facts["id"]
    values = {
        "j": facts["id"],
        "J": facts["id"],
        "A": array,
        "a": facts["task"] or 0,
        "x": facts["name"],
        "N": "node1",
    }
    text = re.sub(r"%(\d*)([jJAaxN])", lambda m: str(values[m[2]]).zfill(int(m[1] or 0)), pattern)
    return str(Path(facts["chdir"], text))


def _started(job: Path) -> subprocess.Popen[bytes] | None:
    facts = _facts(job)
    options = facts["options"]
    output = _named(options.get("output", "slurm-%A_%a.out" if facts["array"] else "slurm-%j.out"), facts)
    error = _named(options["error"], facts) if "error" in options else output
    mode = "ab" if options.get("open-mode") == "append" else "wb"
    command = [str(job / "slurm_script"), *facts["arguments"]]
    try:
        with open(output, mode) as first, open(error, "ab" if error == output else mode) as second:
            process = subprocess.Popen(
                command, cwd=facts["chdir"], env=_environment(job, facts), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=first, stderr=second,
            )  # fmt: skip
    except OSError:  # as in Slurm: where a folder is missing, the job fails without a word
        _change(job, output=output, error=error)
        return None
    _change(job, output=output, error=error, pid=process.pid)
    if _facts(job)["ending"]:  # cancelled in between
        _signal_all(job, signal.SIGTERM)
    return process


def _environment(job: Path, facts: Record) -> dict[str, str]:
    options = facts["options"]
    cpus = options.get("cpus-per-task")
    nodes = options.get("nodes", "1").split("-")[0]
    variables = {
        FOLDER: str(job.parents[1]), "SLURM_JOB_ID": facts["id"], "SLURM_JOBID": facts["id"],
        "SLURM_JOB_NAME": facts["name"], "SLURM_SUBMIT_DIR": facts["chdir"], "SLURM_CPUS_ON_NODE": cpus or 1,
        "SLURM_JOB_CPUS_PER_NODE": cpus or 1, "SLURM_CPUS_PER_TASK": cpus, "SLURM_NTASKS": options.get("ntasks", nodes),
        "SLURM_JOB_NUM_NODES": nodes, "SLURM_NNODES": nodes, "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "SLURMD_NODENAME": "node1", "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0,
        "SLURM_MEM_PER_NODE": _megabytes(options["mem"]) if "mem" in options else None,
        "SLURM_JOB_PARTITION": options.get("partition", "compute"), "SLURM_JOB_ACCOUNT": options.get("account"),
        "SLURM_RESTART_COUNT": facts["restarts"] or None,
    }  # fmt: skip
    if facts["array"]:
        tasks = facts["tasks"]
        variables |= {
            "SLURM_ARRAY_JOB_ID": facts["array"], "SLURM_ARRAY_TASK_ID": facts["task"],
            "SLURM_ARRAY_TASK_COUNT": len(tasks), "SLURM_ARRAY_TASK_MIN": tasks[0], "SLURM_ARRAY_TASK_MAX": tasks[-1],
        }  # fmt: skip
    environment = facts["environment"] or {"PATH": os.environ["PATH"]}
    for pair in facts["options"].get("export", "").split(",")[1:]:
        variables[pair.partition("=")[0]] = pair.partition("=")[2]
    inherited = {k: v for k, v in environment.items() if not k.startswith("SLURM_")}
    return inherited | {name: str(value) for name, value in variables.items() if value is not None}


def _ended(job: Path, process: subprocess.Popen[bytes] | None) -> bool:
    """Wait for a job's end, write it down, and tell whether it waits for its turn again."""
    while process is not None and process.returncode is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        _end_without_test(job)
    code = 1 if process is None else process.returncode
    while _processes(job.parents[1], int(job.name)):  # nothing of a job stays
        _signal_all(job, signal.SIGKILL)
        time.sleep(LOOK_S)
    facts = _facts(job)
    if facts["ending"] == "REQUEUE":
        _change(job, state="PENDING", reason="BeginTime", restarts=facts["restarts"] + 1)
        return True
    state = facts["ending"] or ("COMPLETED" if code == 0 else "FAILED")
    _change(job, state=state, code=code if code >= 0 else 128 - code)
    return False


# The other commands


def _named_jobs(slurm: Path, text: str) -> list[Path]:
    """Return the folders of jobs, of array tasks (``7_2``) or of a whole array."""
    number, _, task = text.partition("_")
    jobs = [(path, _facts(path)) for path in (slurm / "jobs").iterdir()]
    return [
        path
        for path, facts in jobs
        if (int(number) == facts["id"] and not task)
        or (int(number) == facts["array"] and (not task or int(task) == facts["task"]))
    ]


def _scancel(slurm: Path, arguments: list[str]) -> None:
    pairs, ids = getopt.gnu_getopt(
        arguments, "s:n:u:bf", ["signal=", "name=", "user=", "me", "batch", "full", "quiet"]
    )
    options = {key.lstrip("-"): value for key, value in pairs}
    name = options.get("name", options.get("n"))
    if not ids and (name or {"me", "u", "user"} & options.keys()):
        ids = [p.name for p in (slurm / "jobs").iterdir() if name in (None, _facts(p)["name"])]
    text = options.get("s", options.get("signal", "")).removeprefix("SIG")
    code = 0
    for number in ids:
        jobs = _named_jobs(slurm, number)
        if not jobs:
            print(
                f"scancel: error: Kill job error on job id {number}: Invalid job id specified",
                file=sys.stderr,
            )
            code = 1
        for job in jobs:
            if not text:
                _cancel(job)
            elif "batch" in options or "b" in options:
                os.kill(_facts(job)["pid"], signal.Signals[f"SIG{text}"])
            else:
                _signal_all(job, signal.Signals[f"SIG{text}"])
    raise SystemExit(code)


FORMATS: dict[str, tuple[str, Callable[[Record], Any]]] = {
    "i": ("JOBID", lambda f: f"{f['array']}_{f['task']}" if f["array"] else f["id"]),
    "A": ("JOBID", lambda f: f["id"]),
    "j": ("NAME", lambda f: f["name"]),
    "T": ("STATE", lambda f: f["state"]),
    "t": ("ST", lambda f: {"PENDING": "PD", "RUNNING": "R"}.get(f["state"], f["state"][:2])),
    "r": ("REASON", lambda f: f["reason"]),
    "R": ("NODELIST(REASON)", lambda f: f"({f['reason']})" if f["state"] == "PENDING" else "node1"),
    "P": ("PARTITION", lambda f: f["options"].get("partition", "compute")),
    "u": ("USER", lambda f: "user"),
    "M": ("TIME", lambda f: "0:00"),
    "D": ("NODES", lambda f: f["options"].get("nodes", "1")),
}


def _squeue(slurm: Path, arguments: list[str]) -> None:
    names = ["noheader", "jobs=", "format=", "name=", "user=", "me", "states=", "array"]
    try:
        pairs, _ = getopt.gnu_getopt(arguments, "hj:o:n:u:t:r", names)
    except getopt.GetoptError as error:
        _fail(f"squeue: unrecognized option '--{error.opt}'", 'Try "squeue --help" for more information')
    long = {"h": "noheader", "j": "jobs", "o": "format", "n": "name", "t": "states"}
    options = {long.get(key.lstrip("-"), key.lstrip("-")): value for key, value in pairs}
    jobs = [path for path in (slurm / "jobs").iterdir() if _facts(path)["state"] not in ENDED]
    if "jobs" in options:
        ids = options["jobs"].split(",")
        named = [path for number in ids for path in _named_jobs(slurm, number)]
        if not named and len(ids) == 1:
            _fail("slurm_load_jobs error: Invalid job id specified")
        jobs = [path for path in jobs if path in named]
    facts = sorted((_facts(path) for path in jobs), key=lambda f: f["id"])
    if "name" in options:
        facts = [f for f in facts if f["name"] in options["name"].split(",")]
    if "states" in options:
        facts = [f for f in facts if f["state"] in options["states"].split(",")]
    line = options.get("format", "%.18i %.9P %.8j %.8u %.2t %.10M %.6D %R")

    def filled(value: Callable[[str], Any]) -> str:
        def one(match: re.Match[str]) -> str:
            text = str(value(match[3]))
            width = int(match[2] or 0)
            return (text.rjust(width) if match[1] else text.ljust(width))[: width or None]

        return re.sub(r"%(\.?)(\d*)([a-zA-Z])", one, line)

    if "noheader" not in options:
        print(filled(lambda key: FORMATS[key][0]))
    for one in facts:
        print(filled(lambda key, one=one: FORMATS[key][1](one)))  # type: ignore[misc]


def _scontrol(slurm: Path, arguments: list[str]) -> None:
    match arguments:
        case ["requeue", number]:
            for job in _named_jobs(slurm, number):
                state = _facts(job)["state"]
                if state == "PENDING":
                    _fail(f"Job has already finished or is pending for job {number}")
                if "no-requeue" in _facts(job)["options"]:
                    _fail(f"Requested operation is presently disabled for job {number}")
                _change(job, ending="REQUEUE")
                _signal_all(job, signal.SIGTERM)
        case ["show", "hostnames", *_]:
            nodes = re.search(r"\[1-(\d+)\]", os.environ.get("SLURM_JOB_NODELIST", "node[1-1]"))
            print(*(f"node{n + 1}" for n in range(int(nodes[1]) if nodes else 1)), sep="\n")
        case _:
            _fail(f"invalid keyword: {' '.join(arguments)}")


STEP = {
    "ntasks": "n:", "nodes": "N:", "cpus-per-task": "c:", "ntasks-per-node": ":", "kill-on-bad-exit": ":",
    "overlap": "",
    "exact": "", "mem": ":", "relative": "r:", "nodelist": "w:", "output": "o:", "label": "l", "export": ":",
    "unbuffered": "u", "exclusive": "",
}  # fmt: skip


def _srun(slurm: Path, arguments: list[str]) -> None:
    """Run a step of a job: so many processes, each with its number."""
    if "SLURM_JOB_ID" not in os.environ:
        _fail("srun: error: this fake Slurm runs steps of jobs only")
    letters = "".join(form for form in STEP.values() if form.rstrip(":"))
    try:
        pairs, command = getopt.getopt(
            arguments, letters, [n + ("=" if f.endswith(":") else "") for n, f in STEP.items()]
        )
    except getopt.GetoptError as error:
        _fail(f"srun: unrecognized option '--{error.opt}'", 'Try "srun --help" for more information')
    long = {f"-{form[0]}": name for name, form in STEP.items() if form.rstrip(":")}
    options = {long.get(key, key[2:]): value for key, value in pairs}
    if shutil.which(command[0]) is None:
        _fail(f"slurmstepd: error: execve(): {command[0]}: No such file or directory", code=2)
    count = int(options.get("ntasks", options.get("nodes", os.environ["SLURM_NTASKS"])))
    processes = [
        subprocess.Popen(
            command,
            env=os.environ
            | {"SLURM_PROCID": str(n), "SLURM_NTASKS": str(count), "SLURM_NODEID": str(n), "SLURM_LOCALID": "0",
               "SLURM_CPUS_PER_TASK": options.get("cpus-per-task", "1")},
        )
        for n in range(count)
    ]  # fmt: skip

    def forward(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    codes = [process.wait() for process in processes]
    raise SystemExit(max(code if code >= 0 else 128 - code for code in codes))


if __name__ == "__main__":
    _slurm = Path(os.environ[FOLDER])
    with _locked(_slurm), (_slurm / "calls").open("a") as _calls:
        _calls.write(json.dumps(sys.argv[1:]) + "\n")
    {"sbatch": _sbatch, "scancel": _scancel, "squeue": _squeue, "scontrol": _scontrol, "srun": _srun}[
        sys.argv[1]
    ](_slurm, sys.argv[2:])
