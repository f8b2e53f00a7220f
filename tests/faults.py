"""What faults do to sweeps: real sweeps in processes of their own, disturbed at seeded moments, then asked again
without the fault.

    python tests/faults.py [NAME ...] [--times N] [--seed N] [--out FILE.csv]

Every injection gets a fresh folder and its own `lth run` (or a script that calls `trials.run`: every second one).
Whether a result was lost or run twice is read off a log that the trials write themselves, and off the store's
files, looked at every few hundredths of a second. The exit code is 1 if anything was lost, run twice or read
half-written, or a table differs.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import ClassVar

import pandas as pd

from lth_companion.lab import cluster_start
from lth_companion.lab import store as engine_store
from lth_companion.lab import sweeps as engine_sweeps
from lth_companion.lab.store import unseal
from lth_companion.lab.trials import Trial

HERE = pathlib.Path(__file__).resolve().parent
# the clock of the files' times, whatever becomes of time.time
now = functools.partial(time.clock_gettime_ns, time.CLOCK_REALTIME)


# ---- what runs


class Traced(Trial):
    """Notes in a log when it begins and ends; takes `seconds`; if `real`, trains a ticket of the thesis, which
    keeps by-products in the store.
    """

    kind: ClassVar[str] = "fault-traced"
    group_size: ClassVar[int] = 2
    number: int
    seconds: float = 0.1
    real: bool = False
    diverge: bool = False  # in place of that a trial of each paper in turn, at an absurd learning rate
    data: str | None = None  # of the trained ticket; the digits if None

    def group_key(self):
        return ""

    def cost(self):
        return self.seconds or 0.001

    @classmethod
    def run_group(cls, trials):
        return [t.result() for t in trials]

    def result(self):
        note("begin", self.number)
        if (wanted := os.environ.get("FAULT_MEMORY", "").split())[1:] == [str(self.number)]:
            exhaust(wanted[0])
        time.sleep(self.seconds)
        while held(self.number):
            time.sleep(0.01)
        row = self.train() if self.real else self.lose() if self.diverge else {"square": self.number**2}
        note("end", self.number)
        return row

    def train(self):
        from lth_companion.papers.learning_to_learn import TicketTrial
        from lth_companion.training.recipe import Recipe

        if self.data:
            tiny_data(self.data)
        trial = TicketTrial(
            data=self.data or "digits",
            scorer="magnitude",
            rounds="I-SS",
            levels=2,
            density=0.1,
            seed=self.number,
            recipe=Recipe(lr=0.1, batch_size=64, max_epochs=2, patience=None),
        )
        row = TicketTrial.run_group([trial])[0]
        return {k: row[k] for k in ("accuracy", "losses", "digest")}

    def lose(self):
        from lth_companion.lab.sparse_trials import SparseTrial
        from lth_companion.methods.dynamic import settings
        from lth_companion.papers import learning_to_learn as experiments
        from lth_companion.papers import weight_correlation as branches
        from lth_companion.papers import weight_recycling as searches
        from lth_companion.training.recipe import Recipe

        common = dict(
            data="digits",
            seed=self.number,
            recipe=Recipe(lr=1e9, momentum=0.9, batch_size=64, max_epochs=3, patience=None),
        )
        trial = [
            lambda: experiments.TicketTrial(scorer="snip", density=0.1, **common),
            lambda: SparseTrial(dynamic=settings("RigL", 0.1, interval=3), **common),
            lambda: branches.BranchTrial(**common),
            lambda: searches.SupermaskTrial(
                search=searches.settings_of("Edge-Popup", 0.3, 4),
                **common | dict(recipe=searches.search_recipe(4, 1e6)),
            ),
        ][self.number % 4]()
        row = type(trial).run_group([trial])[0]
        return {k: row[k] for k in ("accuracy", "losses", "diverged")} | {"kind": type(trial).kind}


def held(number):
    "May trial `number` not end yet?"
    try:
        return pathlib.Path(os.environ["FAULT_LOG"] + ".hold").read_text() == str(number)
    except FileNotFoundError:
        return False


def note(*words):
    "One line, appended in one system call."
    log = os.open(os.environ["FAULT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{' '.join(map(str, words))} {os.getpid()} {now()}\n".encode())
    os.close(log)


def exhaust(way):
    "Ask for memory that the process is not given: Python says so by an exception, C code that does not look dies."
    import resource

    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))  # and it stays so for this process
    if way == "exception":
        bytearray(2**30)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.memset.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    libc.memset(libc.malloc(2**30), 1, 2**30)


def bend_clock(file):
    "From now on this process's `time.time()` is off by the seconds that stand in `file`."
    real, real_ns = time.time, time.time_ns

    def offset():
        return float(file.read_text() or 0)

    time.time, time.time_ns = lambda: real() + offset(), lambda: real_ns() + int(offset() * 1e9)


if os.environ.get("FAULT_CLOCK"):
    bend_clock(pathlib.Path(os.environ["FAULT_CLOCK"]))


def tiny_data(name, relabelled=0):
    """Make a data set of 200 small images known (its checksum too, if its name says so); the content, with the
    first labels changed.
    """
    import torch

    from lth_companion.training import sources

    x, y = (
        (torch.arange(200 * 64).view(200, 1, 8, 8) * 7919 % 251).to(torch.uint8),
        torch.arange(200, dtype=torch.uint8) % 10,
    )
    content = {"train_x": x, "train_y": y.clone(), "test_x": 255 - x, "test_y": y}
    sources.FACTS[name] = sources.Facts(
        name,
        name,
        (1, 8, 8),
        (200, 200),
        10,
        (0.5,),
        (0.5,),
        sources.content_checksum(content) if name == "fault-known" else None,
    )
    content["train_y"][:relabelled] = 9 - content["train_y"][:relabelled]
    return content


def write_tiny_data(name, relabelled=0):
    "Put such a data set into the cache, whole and with a checksum of its own."
    from lth_companion.training import sources

    content = tiny_data(name, relabelled)
    sources.cache_folder().mkdir(parents=True, exist_ok=True)
    sources._write(
        content, dataclasses.replace(sources.facts(name), checksum=None), "made here", sources.cache_path(name)
    )


def script():
    "A user's script."
    print(sweep(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), **json.loads(sys.argv[3])))


def sweep(root, runs, fields, count, workers):
    "Run the trials, write the table; a sentence and an exit code, as `lth` has them, if that cannot be."
    from faults import Traced  # where this file is the program, its own class is not known elsewhere

    try:
        rows = engine_sweeps.run([Traced(number=n, **fields) for n in range(count)], runs, workers, progress="silent")
    except KeyboardInterrupt:
        sys.exit(130)
    except (engine_store.StoreError, cluster_start.ClusterError) as error:
        sys.exit(str(error))
    if failures := rows.attrs["failures"]:
        sys.exit(f"{len(failures)} trials failed: {next(iter(failures.values()))}; the same command tries them again")
    rows.drop(columns="failed").to_csv(root / "rows.csv", index=False)
    return f"{rows.attrs['ran']} run, {rows.attrs['cached']} cached"


NOTEBOOK = """from lth_companion.lab.notebooks import Notebook
from faults import Traced, tiny_data
if data: tiny_data(data)
here = Notebook("faults", {name!r}, tier=tier, device=device, workers=workers, out=out)
rows = here.run([Traced(number=n + {first}, seconds=seconds, real=real, diverge=diverge, data=data or None) for n in range(count)])
here.table(rows.drop(columns="failed"), "rows")
here.finish()"""
PARAMETERS = (
    'tier: str = "smoke"\ndevice: str = "auto"\nworkers: int = 2\nout: str = ""\ncount: int = 14\nseconds: float ='
    ' 0.1\nreal: bool = False\ndiverge: bool = False\ndata: str = ""'
)
LTH = [sys.executable, "-c", "import sys, faults; from lth_companion.lab.cli import main; sys.exit(main())"]


# ---- where it runs


class Lab:
    "A clone with a notebook or two, its store, and the one command that is given again and again."

    def __init__(self, root, lth=False, count=14, workers=2, notebooks=1, **fields):
        self.root, self.lth, self.count, self.workers = pathlib.Path(root), lth, count, workers
        self.fields, self.log, self.runs = (
            {"seconds": 0.1, "real": False} | fields,
            self.root / "log",
            self.root / "runs",
        )
        self.hold = self.root / "log.hold"
        self.environment = os.environ | {
            "FAULT_LOG": str(self.log),
            "LTH_RUNS": str(self.runs),
            "LTH_CACHE": str(self.root / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for name in ("LTH_SCHEDULER", "LTH_PLUGINS", "LTH_DATA"):
            self.environment.pop(name, None)
        self.names = [f"{n + 1:02}_sweep" for n in range(notebooks)]
        self.seen, self.processes = {}, []  # hash -> its file's time, what stood in it and when that was first seen
        folder = self.root / "nbs/papers/faults"
        folder.mkdir(parents=True)
        for n, name in enumerate(self.names):
            cells = [
                ("markdown", f"# {name}"),
                ("code", PARAMETERS),
                ("code", NOTEBOOK.format(name=name, first=n * 100)),
            ]
            cells = [
                {
                    "cell_type": kind,
                    "id": f"c{i}",
                    "metadata": {"tags": ["parameters"]} if text is PARAMETERS else {},
                    "source": text,
                }
                | ({"outputs": [], "execution_count": None} if kind == "code" else {})
                for i, (kind, text) in enumerate(cells)
            ]
            (folder / f"{name}.ipynb").write_text(
                json.dumps(
                    {
                        "cells": cells,
                        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}},
                        "nbformat": 4,
                        "nbformat_minor": 5,
                    }
                )
            )

    def move(self, runs):
        self.runs = runs
        self.environment["LTH_RUNS"] = str(runs)

    def write_data(self, relabelled=0):
        "The sweep's data set in the cache: whole, with a checksum of its own."
        subprocess.run(
            [sys.executable, "-c", f"import faults; faults.write_tiny_data({self.fields['data']!r}, {relabelled})"],
            env=self.environment,
            cwd=HERE,
            check=True,
        )

    def here(self):
        "The sweep in this process: exit code and what was said."
        from unittest import mock

        with mock.patch.dict(os.environ, self.environment):
            try:
                rows = sweep(self.root, self.runs, self.fields, self.count, 1)
            except SystemExit as end:
                return 1, str(end)
        self.look()
        return 0, rows

    def numbers(self):
        return [n + 100 * k for k in range(len(self.names)) for n in range(self.count)]

    def hashes(self):
        return {Traced(number=n, **self.fields).hash: n for n in self.numbers()}

    def command(self, *options):
        if not self.lth:
            return [
                sys.executable,
                "-c",
                "import faults; faults.script()",
                str(self.root),
                str(self.runs),
                json.dumps({"fields": self.fields, "count": self.count, "workers": self.workers}),
            ]
        parameters = [f"{k}={v}" for k, v in (self.fields | {"count": self.count}).items()]
        return [
            *LTH,
            "run",
            "--repo",
            str(self.root),
            "--workers",
            str(self.workers),
            *(w for p in parameters for w in ("-p", p)),
            *options,
        ]

    def start(self, *options, command=None, held=False, **environment):
        """The command, at work, in a session of its own; if `held`, its last trial does not end before `struck()`:
        a fault meant to come midway never comes too late.
        """
        if held:
            self.hold.write_text(str(max(self.numbers())))
        out = open(self.root / f"said-{len(self.processes)}", "w")
        # also where this process is deaf to it
        p = subprocess.Popen(
            command or self.command(*options),
            cwd=HERE,
            env=self.environment | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        p.said = pathlib.Path(out.name)
        self.processes.append(p)
        return p

    def struck(self):
        self.hold.unlink(missing_ok=True)

    def run(self, *options, **environment):
        return self.wait(self.start(*options, **environment))

    def wait(self, p, seconds=180):
        "Its exit code and all that it said; meanwhile the store is watched."
        end = time.monotonic() + seconds
        while p.poll() is None:
            self.look()
            if time.monotonic() > end:
                os.killpg(p.pid, signal.SIGKILL)
                raise AssertionError(f"still at work after {seconds} s: {p.said.read_text()[-1000:]}")
            time.sleep(0.02)
        self.look()
        return p.returncode, p.said.read_text()

    def stored(self):
        "What lies under its final name: hash -> (when, bytes)."
        found = {}
        for file in self.runs.glob("results/*/*.json"):
            with contextlib.suppress(FileNotFoundError):
                found[file.stem] = file.stat().st_mtime_ns, file.read_bytes()
        return found

    def look(self):
        for hash, what in self.stored().items():
            self.seen.setdefault(hash, (*what, now()))

    def events(self):
        return (
            [
                (what, int(number), int(pid), int(when))
                for what, number, pid, when in map(str.split, self.log.read_text().splitlines())
            ]
            if self.log.exists()
            else []
        )

    def begun(self):
        return sum(e[0] == "begin" for e in self.events())

    def until(self, condition, p=None, seconds=120):
        end = time.monotonic() + seconds
        while not condition() and (p is None or p.poll() is None):
            self.look()
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.01)

    def at_work(self, p, rng, most=None):
        "Wait until a random number of trials has begun, and a little longer."
        wanted = rng.randint(1, most or self.count - 4)
        self.until(lambda: self.begun() >= wanted, p)
        time.sleep(rng.uniform(0, self.fields["seconds"]))
        assert p.poll() is None, f"it ended before the fault: {p.said.read_text()[-1000:]}"

    def table(self):
        files = (
            [self.root / "figures/smoke/faults" / name / "rows.csv" for name in self.names]
            if self.lth
            else [self.root / "rows.csv"]
        )
        return [f.read_bytes() if f.exists() else None for f in files]

    def temporary(self):
        return sum(
            p.is_file() and (p.name.startswith(".") or p.suffix == ".part")
            for folder in ("runs", "figures", "cache")
            for p in (self.root / folder).rglob("*")
        )

    def survivors(self):
        "Processes of our trials that outlived the command, after a while of patience."
        pids, end = {e[2] for e in self.events()} - {os.getpid()}, time.monotonic() + 15
        while (left := [p for p in pids if alive(p)]) and time.monotonic() < end:
            time.sleep(0.1)
        return len(left)


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ---- what came of it


@dataclasses.dataclass
class Seen:
    "One injection."

    fault: str
    way: str  # lth run, script, or in one process
    exit_code: int
    last_line: str
    stored: int = 0  # results in the store when the faulted command had ended
    lost: int = 0
    twice: int = 0
    half: int = 0
    differs: int = 0  # tables that are not the undisturbed run's, byte for byte
    again: int = 0  # exit code of the same command without the fault
    unfinished: int = 0  # trials that had begun when the fault struck, but were not stored, and so began again
    temporary: int = 0
    survivors: int = 0

    @property
    def bad(self):
        return self.lost + self.twice + self.half + self.differs + self.survivors + (self.again != 0)


TICK = 10**7  # ns: a file's time is a coarse clock's, so it may lie that long before the writing, but never after it


def runs_too_many(events, number, stored):
    """How often trial `number` was run beside or after the run that was stored by the time `stored`: the last run
    to end by then. Runs that ended before that one began were lost with their process: they are no runs too many.
    """
    begun, runs = {}, []
    for what, n, pid, when in events:
        if n == number and what == "begin":
            begun[pid] = when
            runs.append((when, math.inf))
        elif n == number:
            runs[runs.index((begun[pid], math.inf))] = begun[pid], when
    kept = max((run for run in runs if run[1] <= stored), key=lambda run: run[1], default=(stored, stored))
    return sum((begin, end) != kept and (begin > kept[1] or kept[0] < end < math.inf) for begin, end in runs)


_reference = {}


def reference(lab):
    "The table of an undisturbed run."
    key = lab.lth, lab.count, len(lab.names), json.dumps(lab.fields)
    if key not in _reference:
        with folder() as quiet:
            calm = Lab(quiet, lab.lth, lab.count, lab.workers, len(lab.names), **lab.fields)
            if "data" in lab.fields:
                calm.write_data()
            code, said = calm.run()
            assert code == 0, said
            _reference[key] = calm.table()
    return _reference[key]


def check(fault, lab, code, said, again=None, differs=0):
    "The same command again, without the fault: what was lost, run twice, read half-written?"
    survivors = lab.survivors()
    lab.look()
    after, whole = lab.stored(), lambda h, line: unseal(line, h) is not None
    lab.struck()  # where nobody did: what is left of the disturbed command had to end with its last trial unfinished
    code2, said2 = (again or lab.run)()
    end, events = lab.stored(), lab.events()
    hashes = lab.hashes()
    lost = sum(end.get(h, (0, b""))[1] != line for h, (_, line, _) in lab.seen.items()) + sum(
        not (h in end and whole(h, end[h][1])) for h in hashes
    )
    twice = sum(
        runs_too_many(events, hashes[h], min(when + TICK, saw)) for h, (when, _, saw) in lab.seen.items() if h in hashes
    )
    begun = [number for what, number, _, _ in events if what == "begin"]
    half = sum(not whole(h, line) for found in (lab.seen, after, end) for h, (_, line, *_) in found.items()) + len(
        re.findall("is damaged .cut short", said + said2)
    )
    differs += sum(a != b for a, b in zip(lab.table(), reference(lab), strict=True))
    last = re.sub(r"/\S*faults-\w+", "...", ([line.strip() for line in said.splitlines() if line.strip()] or [""])[-1])
    return Seen(
        fault,
        "lth run" if lab.lth else "script",
        code,
        last,
        len(after),
        lost,
        twice,
        half,
        differs,
        code2,
        len(begun) - len(set(begun)),
        lab.temporary(),
        survivors,
    )


@contextlib.contextmanager
def folder():
    path = tempfile.mkdtemp(prefix="faults-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


FAULTS = {}


class NotHere(RuntimeError):
    "This machine cannot inject that fault."


def fault(name, codes, last):
    "Decorator: `function(lab, rng)` injects once and returns a `Seen`; exit codes and the last line are as promised."

    def add(function):
        function.title, function.codes, function.last, function.lab = name, codes, re.compile(last), {}
        FAULTS[function.__name__] = function
        return function

    return add


# ---- the faults

DONE = r"\d+ trials, \d+ trained now|\d+ run, \d+ cached"
AGAIN = r"the same (command|call) (goes on|tries|runs)|give the same command"


@fault("worker killed (signal 9)", {0}, DONE)
def worker(lab, rng):
    p = lab.start(held=True)
    lab.at_work(p, rng)
    os.kill(lab.events()[-1][2], signal.SIGKILL)
    lab.struck()
    return check(worker.title, lab, *lab.wait(p))


@fault("the whole command killed (signal 9)", {-9}, "")
def command(lab, rng):
    p = lab.start(held=True)
    lab.at_work(p, rng)
    p.kill()
    return check(command.title, lab, *lab.wait(p))


@fault("worker out of memory (MemoryError)", {1}, AGAIN)
def memory(lab, rng):
    return check(memory.title, lab, *lab.wait(lab.start(FAULT_MEMORY=f"exception {rng.randrange(lab.count)}")))


@fault("worker out of memory (it dies)", {1}, AGAIN)
def memory_death(lab, rng):
    return check(memory_death.title, lab, *lab.wait(lab.start(FAULT_MEMORY=f"death {rng.randrange(lab.count)}")))


@fault("two commands on one store", {0}, DONE)
def two(lab, rng):
    first = lab.start(held=True)
    time.sleep(rng.uniform(0, 2))
    second = lab.start()
    time.sleep(rng.uniform(0, 2))
    lab.struck()
    code, last = lab.wait(first)
    code2, last2 = lab.wait(second)
    return check(two.title, lab, code or code2, last2)


@fault("Ctrl-C", {130, -2}, AGAIN)
def ctrl_c(lab, rng, times=1):
    p = lab.start(held=True)
    time.sleep(rng.uniform(0, 1))
    lab.at_work(p, rng)
    for _ in range(times):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGINT)  # as a terminal does: to the whole group
        time.sleep(rng.uniform(0, 0.5))
    lab.struck()
    return check(FAULTS["ctrl_c_twice" if times > 1 else "ctrl_c"].title, lab, *lab.wait(p))


@fault("Ctrl-C, twice", {130, -2}, AGAIN)
def ctrl_c_twice(lab, rng):
    return ctrl_c(lab, rng, 2)


@fault("clock jumps (days ahead and back)", {0}, DONE)
def clock(lab, rng):
    "Meanwhile another shell cleans up, by a clock that is a day ahead."
    offset = lab.root / "offset"
    offset.write_text("0")
    p = lab.start(held=True, FAULT_CLOCK=str(offset))
    lab.until(lambda: lab.begun(), p)
    for jump in itertools.count():
        if jump == 5:
            lab.struck()
        if p.poll() is not None:
            break
        offset.write_text(str(rng.choice([-1, 1]) * rng.uniform(0, 3 * 86400)))
        if rng.random() < 0.1:
            subprocess.run(
                [*LTH, "trials", "clean", "--repo", str(lab.root)],
                env=lab.environment | {"FAULT_CLOCK": str(offset)},
                cwd=HERE,
                capture_output=True,
            )
        lab.look()
        time.sleep(0.05)
    return check(clock.title, lab, *lab.wait(p))


@contextlib.contextmanager
def small_disk(path, megabytes=64):
    "A disk of its own at `path`; NotHere where this machine does not let us mount one."
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "faults", path], capture_output=True
    ).returncode:
        raise NotHere("mounting a small disk needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@fault("disk full (a tmpfs)", {1}, "No space left on device.*free space")
def disk(lab, rng):
    "Store and figures lie on a disk with room for some more files."
    with small_disk(lab.root / "disk") as small:
        (small / "figures").mkdir(), (lab.root / "figures").symlink_to(small / "figures")
        lab.move(small / "runs")
        ballast = small / "ballast"
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        # a ticket is larger than a result
        room = rng.randint(0, lab.count - 2) * (2**20 if lab.fields["real"] else 4096)
        os.truncate(ballast, max(0, ballast.stat().st_size - room))
        code, said = lab.run()
        ballast.unlink()
        return check(disk.title, lab, code, said)


@contextlib.contextmanager
def locked(path):
    "Folders under `path` that take no new file: immutable for root, without permission for others."
    folders, root = [], os.getuid() == 0

    def lock(some, on):
        if not root:
            return [f.chmod(0o555 if on else 0o755) for f in some]
        if subprocess.run(["chattr", "+i" if on else "-i", *some], capture_output=True).returncode and on:
            raise NotHere("this file system has no chattr +i")

    try:
        # again: some were made while others were being locked
        while new := [f for f in (path, *path.rglob("*")) if f.is_dir() and f not in folders]:
            folders += new
            lock(new, True)
        yield
    finally:
        lock(folders, False)


@fault("store turns read-only midway (chattr +i, or chmod)", {1}, "cannot be written .*mend (the|its) permissions")
def read_only(lab, rng):
    p = lab.start(held=True)
    lab.at_work(p, rng)
    with locked(lab.runs):
        lab.struck()
        code, said = lab.wait(p)
    return check(read_only.title, lab, code, said)


@contextlib.contextmanager
def refused(first, error):
    """From its write number `first` on (files, renames, folders) this process may not write; the file at hand is
    half written. Gives the count.
    """
    from unittest import mock

    write, replace, mkdir, count = pathlib.Path.write_bytes, os.replace, pathlib.Path.mkdir, collections.Counter()

    def step(half=lambda: None):
        count["writes"] += 1
        if count["writes"] >= first:
            half()
            raise OSError(error, os.strerror(error))

    def write_bytes(path, data):
        step(lambda: write(path, data[: len(data) // 2]))
        return write(path, data)

    def rename(a, b):
        step()
        return replace(a, b)

    def make(path, *args, **options):
        path.is_dir() or step()
        return mkdir(path, *args, **options)

    with (
        mock.patch.object(pathlib.Path, "write_bytes", write_bytes),
        mock.patch.object(os, "replace", rename),
        mock.patch.object(pathlib.Path, "mkdir", make),
    ):
        yield count


def every_write(lab, error, title):
    """Refuse the first write and all later ones, then the second and all later ones, and so on: a sweep in one
    process, in a fresh folder each time.
    """
    for first in range(1, 1000):
        with folder() as root:
            mine = Lab(root, count=4, seconds=0, real=lab.fields["real"])
            with refused(first, error) as count:
                code, said = mine.here()
            if count["writes"] < first:
                return
            yield dataclasses.replace(check(title, mine, code, said, again=mine.here), way="one process")


@fault("every write in turn: no space left (injected ENOSPC)", {1}, "No space left on device.*free space")
def every_write_full(lab, rng):
    return every_write(lab, errno.ENOSPC, every_write_full.title)


@fault("every write in turn: read-only (injected EROFS)", {1}, "Read-only file system.*mend (the|its) permissions")
def every_write_read_only(lab, rng):
    return every_write(lab, errno.EROFS, every_write_read_only.title)


@contextlib.contextmanager
def dask(lab, port):
    "A scheduler and two workers, by hand; the scheduler's process."
    address = f"tcp://127.0.0.1:{port}"
    commands = [
        [
            sys.executable,
            "-m",
            "distributed.cli.dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--no-dashboard",
        ],
        *[cluster_start.worker_command(address)] * 2,
    ]
    processes = [
        subprocess.Popen(c, env=lab.environment, cwd=lab.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for c in commands
    ]
    try:
        yield processes[0]
    finally:
        for p in processes:
            p.terminate()
        for p in processes:
            p.wait()


@fault("Dask scheduler killed, and started again", {1}, "give the same command")
def scheduler(lab, rng):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = "--scheduler", f"tcp://127.0.0.1:{port}"

    def listens():
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    with dask(lab, port) as process:
        lab.until(listens)
        p = lab.start(*options, held=True)
        lab.at_work(p, rng)
        process.kill()
        code, said = lab.wait(p)
    with dask(lab, port):
        lab.until(listens)
        return check(scheduler.title, lab, code, said, again=lambda: lab.run(*options))


scheduler.lab = dict(lth=True, notebooks=2)


@fault("a trial diverges to NaN", {0}, DONE)
def nan(lab, rng):
    "Each paper's own kind of trial at an absurd learning rate: a result with its epoch, and no failure."
    code, said = lab.run()
    results = [unseal(line, h)["result"] for h, (_, line) in lab.stored().items()]
    silent = sum(
        not (isinstance(r["diverged"], int) and r["diverged"] >= 1 and r["accuracy"] is not None) for r in results
    )
    return check(nan.title, lab, code, said, differs=silent + lab.count - len(results))


nan.lab = dict(diverge=True, count=8, real=False)


@fault("data file swapped midway, its checksum known", {1}, "is damaged .*lth data fetch")
def swapped(lab, rng):
    "Then the workers are killed, so that new ones read the other file."
    lab.write_data(relabelled=100)
    file = lab.root / "cache" / f"{lab.fields['data']}.safetensors"
    file.rename(lab.root / "other")
    lab.write_data()
    p = lab.start(held=True)
    lab.until(lambda: lab.stored(), p)  # the file has been read: swapped before that, it is the sweep's one content
    time.sleep(rng.uniform(0, lab.fields["seconds"]))
    file.rename(lab.root / "ours"), (lab.root / "other").rename(file)
    for pid in {e[2] for e in lab.events()} - {p.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    lab.struck()
    code, said = lab.wait(p)
    (lab.root / "ours").rename(file)
    return check(FAULTS["swapped" if lab.fields["data"] == "fault-known" else "swapped_unknown"].title, lab, code, said)


swapped.lab = dict(real=True, data="fault-known", seconds=0.3)


@fault("data file swapped midway, no checksum known", {1}, "other content.*put the file back")
def swapped_unknown(lab, rng):
    return swapped(lab, rng)


swapped_unknown.lab = dict(real=True, data="fault-unknown", seconds=0.3)


# ---- the table


def inject(function, rng, lth, **fields):
    "The injections of one turn, in a fresh folder; an error where something of the kind cannot be."
    with folder() as root:
        seen = function(Lab(root, **dict(lth=lth, **fields) | function.lab), rng)
        return [seen] if isinstance(seen, Seen) else list(seen)


def kept_promise(function, seen):
    return not seen.bad and seen.exit_code in function.codes and bool(function.last.search(seen.last_line))


def summary(rows):
    "One row a fault."

    def row(fault, found):
        codes = " or ".join(map(str, sorted({s.exit_code for s in found})))
        return {
            "fault": fault,
            "times injected": len(found),
            "results lost": sum(s.lost for s in found),
            "results run twice": sum(s.twice for s in found),
            "half-written results read": sum(s.half for s in found),
            "exit code": codes,
            "last line": next((s.last_line for s in found if s.last_line), ""),
            "tables that differ": sum(s.differs for s in found),
            "begun again": sum(s.unfinished for s in found),
            "temporary files left": sum(s.temporary for s in found),
            "stored at the fault": " ".join(str(s.stored) for s in found),
        }

    return pd.DataFrame([row(f, [s for s in rows if s.fault == f]) for f in dict.fromkeys(s.fault for s in rows)])


def write(table, out):
    "As csv, and as text to read."
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    numbers = table.drop(columns=["last line", "stored at the fault"])
    lines = [
        f"{row.fault}\n    exit code {row['exit code']}: {row['last line'] or '(it said nothing)'}"
        for _, row in table.iterrows()
    ]
    out.with_suffix(".txt").write_text(
        "\n".join(
            [numbers.to_string(index=False), "", "The exit code and last line of the disturbed command", "", *lines]
        )
        + "\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAULTS)}; all if none")
    parser.add_argument(
        "--times", type=int, help="injections of each fault (default: 3; Ctrl-C 10; of every write one)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="train real tickets in every injection, not in every third")
    parser.add_argument("--out", type=pathlib.Path, help="where the table goes, as FILE.csv and FILE.txt")
    options = parser.parse_args()
    rows, wrong = [], 0
    for name in options.names or FAULTS:
        for i in range(1 if name.startswith("every") else options.times or (10 if name == "ctrl_c" else 3)):
            rng, start = random.Random(f"{options.seed} {name} {i}"), time.monotonic()
            try:
                found = inject(
                    FAULTS[name],
                    rng,
                    lth=i % 2 == 0,
                    **({"real": True, "seconds": 0.02} if options.real or i % 3 == 2 else {}),
                )
            except NotHere as why:
                print(f"{FAULTS[name].title}: left out, {why}", flush=True)
                break
            for seen in found:
                good = kept_promise(FAULTS[name], seen)
                print(
                    f"{'good' if good else 'BAD'} {json.dumps(dataclasses.asdict(seen))}"
                    f" {time.monotonic() - start:.1f} s",
                    flush=True,
                )
                wrong += not good
            rows += found
        if options.out:
            write(summary(rows), options.out)  # as it grows: the whole takes a while
    print(summary(rows).to_string(index=False))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
