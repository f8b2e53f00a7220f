"""Benchmarks of sweeps: what workers add, what the store costs, what a trial that does nothing costs. Started by
run.py.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from lth_companion.lab import cluster_start, clusters
from lth_companion.lab.executors import Workers
from lth_companion.lab.progress import groups
from lth_companion.lab.sparse_trials import SparseTrial
from lth_companion.lab.store import Store
from lth_companion.lab.sweeps import Idle, run
from lth_companion.methods.dynamic import settings
from lth_companion.papers.learning_to_learn import TicketTrial
from lth_companion.training.recipe import Recipe


def quietly(trials, root, **options):
    "Seconds that a sweep takes."
    start = time.perf_counter()
    rows = run(trials, root, progress="silent", **options)
    assert rows.failed.isna().all(), rows.failed.dropna().iloc[0]
    return time.perf_counter() - start


def cohorts(seeds):
    "Groups of six tickets of LeNet-300-100 that train together, 4 epochs of 4,000 images of MNIST."
    return [
        TicketTrial(
            train_size=4000, density=d, scorer=s, rounds="U-SS", seed=x, recipe=Recipe(max_epochs=4, patience=None)
        )
        for x in seeds
        for d in (0.05, 0.005)
        for s in ("snip", "magnitude", "random")
    ]


def convolutions(seeds):
    "Groups of one and two networks Conv-2 of an eighth of the width on 1,000 images of MNIST."
    common = dict(
        model="conv-2",
        width=0.125,
        train_size=1000,
        recipe=Recipe(max_epochs=1, patience=None, momentum=0.9, lr=0.05, batch_size=64),
    )
    return [
        SparseTrial(**common, seed=x, **how)
        for x in seeds
        for how in (
            dict(scorer="snip", density=0.1),
            dict(scorer="magnitude", density=0.1),
            dict(dynamic=settings("RigL", 0.1, 5)),
        )
    ]


KINDS = {"cohort": (cohorts, 40), "convolution": (convolutions, 10)}  # and how many seeds


def by_hand(kind, seeds):
    """A process of its own that has imported everything and run one group; then it runs these seeds' trials in
    process, as often as it is told, and says how long each took.
    """
    code = (
        "import sys, sweeps, tempfile\n"
        f"make, seeds = sweeps.KINDS[{kind!r}][0], {list(seeds)}\n"
        "def once(seeds):\n"
        "    with tempfile.TemporaryDirectory() as root: return sweeps.quietly(make(seeds), root)\n"
        "once([1000]); print('ready', flush=True)\n"
        "for line in sys.stdin: print(once(seeds), flush=True)"
    )
    environment = os.environ | cluster_start.worker_environment(
        {
            "PYTHONPATH": os.pathsep.join(
                [str(pathlib.Path(__file__).parent), cluster_start.worker_environment()["PYTHONPATH"]]
            )
        }
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def hand(kind, seeds):
    """Two independent processes, each with every second seed; gives a function that has both run and returns the
    seconds until the last was done.
    """
    both = [by_hand(kind, seeds[i::2]) for i in range(2)]

    def once():
        start = time.perf_counter()
        for p in both:
            p.stdin.write("go\n")
            p.stdin.flush()
        for p in both:
            float(p.stdout.readline())
        return time.perf_counter() - start

    try:
        for p in both:
            assert p.stdout.readline() == "ready\n"
        yield once
    finally:
        for p in both:
            p.kill()
            p.wait()


@contextlib.contextmanager
def dask(workers, root):
    "A scheduler and workers, each a process started by hand; gives the executor."
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:

        def start(*command):
            p = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=os.environ | cluster_start.worker_environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(lambda: (p.terminate(), p.wait()))

        file = pathlib.Path(scratch, "scheduler.json")
        start(
            "distributed.cli.dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            str(file),
        )
        for _ in range(workers):
            start(
                "distributed.cli.dask_worker",
                "--scheduler-file",
                str(file),
                "--nthreads",
                "1",
                "--no-dashboard",
                "--memory-limit",
                "0",
            )
        end = time.monotonic() + 120
        while not file.exists() or not file.read_text():
            if time.monotonic() > end:
                raise SystemExit("benchmarks: the Dask scheduler does not start")
            time.sleep(0.1)
        with clusters.connect(json.loads(file.read_text())["address"], root=root, patience=120) as there:
            while len(there.hosts) < workers:
                time.sleep(0.1)
            yield there


ENGINES = {"pool": lambda workers, root: Workers(workers), "dask": dask}


def warm(engine, make, root):
    "Every worker has imported what it needs and read the data."
    with tempfile.TemporaryDirectory(dir=root) as store:
        quietly(make([1000, 2000]), store, executor=engine)


def scaling(note, Ratio, quick):
    """Two workers against two processes started by hand, each of which runs half of the same trials; all have
    started and are warm. One worker: as many trials a minute.
    """
    for kind, (make, count) in KINDS.items():
        seeds = range(2 if quick else count)
        trials, rounds = make(seeds), 1 if quick else 3
        about = f"{len(trials)} trials in {len(groups(trials, 2))} groups"
        with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
            names = iter(range(10_000))

            def fresh(names=names):
                return pathlib.Path(root, f"store-{next(names)}")

            base, engines = (
                stack.enter_context(hand(kind, seeds)),
                {n: stack.enter_context(e(2, root)) for n, e in ENGINES.items()},
            )
            for engine in engines.values():
                warm(engine, make, root)
            found = {n: [] for n in engines}
            for _ in range(rounds):
                for n, engine in engines.items():
                    found[n].append((base(), quietly(trials, fresh(), executor=engine)))
        for n, pairs in found.items():
            with tempfile.TemporaryDirectory() as root, ENGINES[n](1, root) as one:
                warm(one, make, root)
                alone = quietly(make(seeds[::2]), pathlib.Path(root, "store"), executor=one)

            def rate(count, s):
                return 60 * count / s

            detail = (
                f"{about}; trials a minute: {rate(len(trials), statistics.median(s for _, s in pairs)):,.0f} with two"
                f" workers, {rate(len(make(seeds[::2])), alone):,.0f} with one,"
                f" {rate(len(trials), statistics.median(h for h, _ in pairs)):,.0f} by hand with two; started and warm"
            )
            note(
                f"sweep-{kind}-{n}",
                f"two workers ({'process pool' if n == 'pool' else 'Dask'}) on a {kind} sweep, as a share of two"
                " processes started by hand",
                Ratio([h / s for h, s in pairs]),
                0.95 if n == "pool" else 0.9,
                low=True,
                detail=detail,
            )


RESULT = {
    "accuracies": [90.12 + n / 100 for n in range(30)],
    "losses": [0.712345 - n / 1000 for n in range(30)],
    "accuracy": 91.5,
    "digest": "0" * 64,
    "diverged": None,
    "engine": "sparse",
    "epochs": 25,
    "iterations": 23450,
    "kept": 1331,
    "layers": {"fc1.weight": 1019, "fc2.weight": 277, "fc3.weight": 35},
    "revived": list(range(9)),
}
META = {
    "seconds": 1.5,
    "group": 16,
    "date": "2026-01-01T00:00:00Z",
    "host": "node",
    "machine": "x86_64",
    "python": "3.11.9",
    "torch": "2.13.0",
    "numpy": "2.3.0",
}


def store(note, Ratio, quick):
    """A store of tickets' results as a laptop's runs leave them (1.3 kB each): list, look up, report; `lth trials
    status`; attach a pack of as many.
    """
    for n in (1000, 10_000) if quick else (10_000, 100_000):
        trials = [
            TicketTrial(density=d, seed=s, recipe=Recipe(min_epochs=30))
            for s in range(n // 4)
            for d in (0.5, 0.1, 0.01, 0.005)
        ]
        making = sum(1e6 * seconds(lambda t=t: t.hash) for t in trials[:1000]) / 1000
        hashes = [t.hash for t in trials]
        with tempfile.TemporaryDirectory() as root:
            there, bound = Store(root), max(1, 10 * n / 100_000)
            for t in trials:
                there.put(t, RESULT, META)
            jobs = {
                "listed": lambda: Store(root).hashes(),
                "looked-up": lambda there=there, trials=trials: [t in there for t in trials],
                "reported": lambda trials=trials: run(trials, root, progress="silent"),
            }
            spent = {what: [seconds(job) for _ in range(3)] for what, job in jobs.items()}
            assert len(there.hashes()) == len(set(hashes)) == n
            spent["status"] = [
                seconds(
                    lambda: subprocess.run(
                        [sys.executable, "-c", "from lth_companion.lab.cli import main; main(['trials', 'status'])"],
                        cwd=root,
                        check=True,
                        capture_output=True,
                        env=os.environ
                        | {"LTH_RUNS": root, "PYTHONPATH": cluster_start.worker_environment()["PYTHONPATH"]},
                    )
                )
                for _ in range(3)
            ]
            pack = seconds(lambda there=there: there.pack(f"{root}/all.jsonl.xz"))
            spent["pack-attached"] = [
                seconds(lambda: Store(f"{root}/empty").attach(f"{root}/all.jsonl.xz")) for _ in range(3)
            ]
        details = {
            "reported": f"to make and to hash the descriptions, the caller's part, takes {making:.0f} us each",
            "pack-attached": f"written once in {pack:.1f} s",
        }
        both = Ratio([a + b for a, b in zip(spent["listed"], spent["reported"])])
        for what, found in spent.items():
            note(
                f"store-{n}-{what}",
                f"seconds: {n:,} trials {what.replace('-', ' ')}",
                Ratio(found),
                bound if what != "status" else max(bound, 3),
                detail=details.get(what, ""),
            )
        note(f"store-{n}", f"seconds: {n:,} trials listed and reported", both, bound)


def seconds(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


def overhead(note, Ratio, quick):
    """What a trial costs beyond its work, in milliseconds of the worker that has it: trials that do nothing, and
    trials of 0.1 s; in this process and with two workers that have started.
    """
    n, rounds = (100, 3) if quick else (500, 5)

    def measure(root, work, workers=1, **options):
        names, count = iter(range(1000)), n if not work else n // 5

        def once():
            return 1000 * (
                workers
                * quietly(
                    [Idle(number=i, seconds=work) for i in range(count)],
                    pathlib.Path(root, f"store-{work}-{next(names)}"),
                    **options,
                )
                / count
                - work
            )

        once()
        return Ratio([once() for _ in range(rounds)])

    for work, which in ((0, "does nothing"), (0.1, "takes 0.1 s, beyond that")):
        mark = "-busy" if work else ""
        with tempfile.TemporaryDirectory() as root:
            note(
                f"trial-overhead{mark}-ms",
                f"milliseconds a trial that {which}, in this process",
                measure(root, work),
                5,
            )
        for name, engine in ENGINES.items():
            with tempfile.TemporaryDirectory() as root, engine(2, root) as there:
                for started in [there.submit(time.sleep, 0.3) for _ in range(2)]:
                    started.result()
                note(
                    f"trial-overhead-{name}{mark}-ms",
                    f"milliseconds of a worker a trial that {which}, two workers ({name})",
                    measure(root, work, 2, executor=there),
                    5,
                )
