"""The smoke tier through a Dask scheduler and two workers started by hand: byte for byte the process pool's tables
and figures?

    python tests/dask_smoke.py                              every notebook with a smoke tier
    python tests/dask_smoke.py granet weight_recycling/03   some of them
    python tests/dask_smoke.py --kill granet/05             a worker is killed at work, with a nanny and without

One line a notebook and a verdict; where anything differs the exit code is 1, and the folder with all outputs is kept.
"""

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from distributed import Client
from test_clusters import Lab
from test_trials import until

from lth_companion.lab.catalogue import catalogue, select
from lth_companion.lab.provenance import read_provenance
from lth_companion.lab.store import Store

ROOT = pathlib.Path(__file__).parent.parent
LTH = [sys.executable, "-c", "from lth_companion.lab.cli import main; raise SystemExit(main())"]


class Regenerated:
    """One notebook, by `lth run` in a process of its own, with its own store and figures; `midway(process, store)`
    is called while it runs.
    """

    def __init__(self, label, folder, *options, midway=None):
        self.store, start = Store(folder / "runs"), time.monotonic()
        with open(folder / "log", "w+") as log:
            process = subprocess.Popen(
                [*LTH, "run", label, "--tier", "smoke", "--repo", ROOT, "--out", folder, *options],
                stdout=log,
                stderr=log,
                env=os.environ
                | {
                    "LTH_RUNS": str(self.store.root),
                    "LTH_SCHEDULER": "",
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                },
            )
            if midway:
                midway(process, self.store)
            self.code, self.seconds = process.wait(), time.monotonic() - start
            log.seek(0)
            self.said = log.read().strip().splitlines()[-1:]
        figures = folder / "smoke" / label
        self.files = {p.name: p.read_bytes() for p in figures.glob("*") if p.suffix in (".csv", ".svg")}
        self.about = read_provenance(figures) if self.code == 0 else {}


def problem(pool, dask):
    "What is wrong with what Dask made, or ''."
    for name, made in {"pool": pool, "dask": dask}.items():
        if made.code:
            return f"{name}: exit code {made.code}: {' '.join(made.said)}"
    differ = sorted(n for n in pool.files | dask.files if pool.files.get(n) != dask.files.get(n))
    if differ or not pool.files:
        return f"differ: {', '.join(differ) or 'no files'}"
    if pool.about["trained"] != dask.about["trained"]:
        return f"trained {pool.about['trained']} trials, and {dask.about['trained']} on Dask"
    if dask.about["trained"] and dask.about["engine"]["engine"] != "dask":
        return f"ran on {dask.about['engine']}"
    return ""


class Killing:
    "Kills (signal 9) the process of a worker that is at work, once `count` results are there."

    def __init__(self, lab, count):
        self.lab, self.count, self.pid = lab, count, None

    def __call__(self, process, store):
        with Client(self.lab.address, set_as_default=False) as client:
            until(lambda: len(client.ncores()) == 2)

            def busy():
                return [address for address, tasks in client.processing().items() if tasks]

            until(lambda: process.poll() is not None or (len(store.hashes()) >= self.count and busy()), 3600)
            if process.poll() is None and (at_work := busy()):
                self.pid = client.run(os.getpid, workers=at_work[:1])[at_work[0]]
                os.kill(self.pid, signal.SIGKILL)
                until(lambda: len(client.ncores()) == 1, 30)

    def problem(self):
        if self.pid is None:
            return "no worker was killed: none was at work midway"
        with Client(self.lab.address, set_as_default=False) as client:
            if self.lab.nanny:
                until(lambda: len(client.ncores()) == 2)
            elif len(client.ncores()) != 1:
                return "the killed worker is back, without a nanny"
        return ""


def with_a_kill(label, folder, pool):
    "The same notebook twice on clusters of which one worker dies: (name, Regenerated, what is wrong)."
    for name, nanny in {"nanny": True, "no-nanny": False}.items():
        with Lab(nanny=nanny) as lab:
            kill = Killing(lab, pool.about.get("trained", 0) // 3)
            (there := folder / name / label).mkdir(parents=True)
            made = Regenerated(label, there, "--scheduler", lab.address, midway=kill)
            yield f"killed, {name}", made, problem(pool, made) or kill.problem()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", metavar="PAPER[/NOTEBOOK]")
    parser.add_argument("--kill", action="store_true", help="kill a worker midway")
    args = parser.parse_args()
    labels = [e.label for e in select(catalogue(ROOT), args.notebooks) if "smoke" in e.tiers]
    folder, bad, done = pathlib.Path(tempfile.mkdtemp(prefix="dask-smoke-")), 0, 0
    with Lab(workers=0 if args.kill else 2) as lab:
        for label in labels:
            # a killed worker must have something in hand: no trial of another notebook's
            own = label if args.kill else label.split("/")[0]
            pool_folder, dask_folder = folder / "pool" / own, folder / "dask" / own
            for f in (pool_folder, dask_folder):
                f.mkdir(parents=True, exist_ok=True)
            pool = Regenerated(label, pool_folder, "--workers", "2")
            if args.kill:
                outcomes = with_a_kill(label, folder, pool)
            else:
                outcomes = [
                    ("dask", made := Regenerated(label, dask_folder, "--scheduler", lab.address), problem(pool, made))
                ]
            for name, made, wrong in outcomes:
                bad, done = bad + bool(wrong), done + 1
                print(
                    label,
                    name,
                    wrong or "equal",
                    f"{len(made.files)} files",
                    f"{made.about.get('trained', 0)} trials",
                    f"pool {pool.seconds:.0f} s, dask {made.seconds:.0f} s",
                    sep="\t",
                    flush=True,
                )
    print(
        f"{done - bad} of {done}: every table and figure byte-equal to the process pool's"
        + (f"; all outputs are in {folder}" if bad else "")
    )
    if not bad:
        shutil.rmtree(folder)
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
