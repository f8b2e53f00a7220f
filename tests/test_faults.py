"""Every fault of `faults.py` once, with small sweeps; `make faults` injects each several times, also under `lth
run`.
"""

import math
import os
import pathlib
import random
import subprocess
import warnings

import faults
import pandas as pd
import pytest
from faults import FAULTS, Lab, NotHere, Traced, inject, kept_promise
from test_reproduce import RUN, SHOW, START, TRIALS, clone, write_notebook  # noqa: F401 (clone is a fixture)

from lth_companion.lab import experiments as shared
from lth_companion.lab import plots, reported, statistics
from lth_companion.lab import sweeps as engine_sweeps
from lth_companion.lab.catalogue import disk_mend
from lth_companion.lab.cli import main
from lth_companion.lab.provenance import read_provenance
from lth_companion.lab.store import Store
from lth_companion.lab.sweeps import run
from lth_companion.papers import learning_to_learn_starts

SMALL = {"scheduler": dict(lth=True, notebooks=2, count=6), "nan": dict(diverge=True, count=4, workers=1)}
# that one's workers load torch three times: its parts are tested below
QUICK = [name for name in FAULTS if not name.startswith("swapped")]


@pytest.mark.parametrize("name", QUICK)
def test_fault(name, monkeypatch):
    if name == "scheduler":
        pytest.importorskip("distributed")
    monkeypatch.setattr(FAULTS[name], "lab", dict(count=8, seconds=0.04) | SMALL.get(name, {}))
    try:
        found = inject(FAULTS[name], random.Random(0), lth=False)
    except NotHere as why:
        pytest.skip(str(why))
    assert found and all(kept_promise(FAULTS[name], seen) for seen in found), [
        s for s in found if not kept_promise(FAULTS[name], s)
    ]


def test_the_harness_sees_what_is_lost_run_twice_or_torn(tmp_path):
    "Each of its counts, against a store that was tampered with."

    def tampered(folder, change):
        lab = Lab(tmp_path / folder, count=3, seconds=0, workers=1)
        assert lab.here()[0] == 0
        file = next(lab.runs.glob("results/*/*.json"))
        change(file)
        return faults.check(folder, lab, 0, "", again=lab.here)

    whole = tampered("nothing", lambda f: None)
    assert not whole.bad, whole
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gone, torn = (
            tampered("gone", lambda f: f.unlink()),
            tampered("torn", lambda f: f.write_bytes(f.read_bytes()[:50])),
        )
    assert gone.twice == 1 and torn.twice == 1 and torn.half >= 1
    assert tampered("table", lambda f: (f.parents[3] / "rows.csv").chmod(0o644)).differs == 0


@pytest.mark.parametrize(
    "said, too_many",
    [
        ("begin 1 10, end 1 20", 0),
        ("begin 1 10, begin 2 30, end 2 40", 0),  # the first was killed at work ...
        ("begin 1 10, end 1 20, begin 2 30, end 2 40", 0),  # ... or with its result unwritten
        ("begin 1 10, end 1 20, begin 2 60, end 2 70", 1),  # after it was stored
        ("begin 1 10, end 1 20, begin 2 60", 1),
        ("begin 1 10, begin 2 15, end 1 20, end 2 40", 1),  # side by side
        ("begin 1 10, end 1 20, begin 1 30, end 1 40, begin 1 60, end 1 70, begin 2 80, end 2 90", 2),
    ],
)
def test_runs_too_many_are_counted_off_the_log(said, too_many):
    "Of a result that had been stored at 50."
    events = [
        (what, number, int(pid), int(when)) for number in (6, 7) for what, pid, when in map(str.split, said.split(", "))
    ]
    assert faults.runs_too_many(events, 7, 50) == too_many


def test_no_folder_escapes_the_lock(tmp_path, monkeypatch):
    "One is made between the listing and the locking."
    real, made = subprocess.run, []

    def late(command, **options):
        if not made:
            made.append(tmp_path / "s/results/ab")
            made[0].mkdir(parents=True)
        return real(command, **options)

    monkeypatch.setattr(faults.subprocess, "run", late)
    if os.getuid():
        monkeypatch.setattr(
            pathlib.Path, "chmod", lambda p, mode, chmod=pathlib.Path.chmod: (late(["true"]), chmod(p, mode))
        )
    (tmp_path / "s").mkdir()
    try:
        with faults.locked(tmp_path / "s"):
            for folder in (made[0], made[0].parent, tmp_path / "s"):
                with pytest.raises(PermissionError):
                    (folder / "x").touch()
    except NotHere as why:
        pytest.skip(str(why))
    (made[0] / "x").touch()


# ---- a data file that was swapped


@pytest.mark.parametrize(
    "name, says",
    [
        ("fault-known", "is damaged .*`lth data fetch fault-known` mends it"),
        ("fault-unknown", "other content than the results in .*put the file back"),
    ],
)
def test_a_swapped_data_file_is_refused(name, says, tmp_path, monkeypatch):
    for variable, value in {"LTH_CACHE": tmp_path / "cache", "FAULT_LOG": tmp_path / "log"}.items():
        monkeypatch.setenv(variable, str(value))
    trials = [Traced(number=n, seconds=0, real=True, data=name) for n in range(2)]
    faults.write_tiny_data(name)
    first = run(trials[:1], tmp_path / "s", progress="silent")
    assert first.failed.isna().all(), first.failed[0]
    faults.write_tiny_data(name, relabelled=100)
    for cached in (shared.cached_data, learning_to_learn_starts._start):
        cached.cache_clear()  # a new worker
    refused = run(trials, tmp_path / "s", progress="silent")
    assert refused.failed[0] is None and pd.Series(refused.failed[1]).str.contains(says).all(), refused.failed[1]
    faults.write_tiny_data(name)
    shared.cached_data.cache_clear()
    assert run(trials, tmp_path / "s", progress="silent").attrs["ran"] == 1


# ---- clocks


def test_a_cleaner_with_another_clock_costs_nothing(tmp_path, monkeypatch):
    "`lth trials clean` removes a temporary file between its writing and its renaming."
    monkeypatch.setenv("LTH_RUNS", str(tmp_path / "s"))
    real, cleaned = engine_sweeps.os.replace, []

    def replace(a, b):
        if not cleaned:
            cleaned.append(a)
            monkeypatch.setattr(engine_sweeps.time, "time", lambda now=engine_sweeps.time.time: now() + 86400)
            assert main(["trials", "clean"]) == 0 and not a.exists()
        return real(a, b)

    monkeypatch.setattr(engine_sweeps.os, "replace", replace)
    Store(tmp_path / "s").put(engine_sweeps.Idle(), {"slept": 0})
    assert cleaned and Store(tmp_path / "s").get(engine_sweeps.Idle()) == {"slept": 0}


# ---- means


def test_a_mean_says_what_it_leaves_out():
    rows = pd.DataFrame(
        dict(scorer=["a"] * 3 + ["b"] * 3, density=0.1, seed=[0, 1, 2] * 2, accuracy=[90, math.nan, 92, 80, 81, 82.0])
    )
    assert reported.summary(rows, ["scorer"]).left_out.tolist() == [1, 0]
    assert "left_out" not in reported.summary(rows[rows.scorer == "b"], ["scorer"])
    with pytest.warns(UserWarning, match="seed 1 left out: {'scorer': 'a'} has no accuracy there"):
        assert statistics.differences(rows, {"scorer": "a"}, {"scorer": "b"}) == ([10, 10], [0, 2])
    for fig in (
        plots.accuracy_vs_density(rows),
        plots.strip(rows),
        plots.heatmap(rows, row="scorer", column="density"),
    ):
        assert "1 of 6 runs have no value and are left out" in [t.get_text() for t in fig.axes[0].texts]
        assert not [t for t in plots.strip(rows.fillna(85)).axes[0].texts]


def test_disk_mend():
    assert (
        "free space" in disk_mend(OSError(28, "x"))
        and "LTH_RUNS" in disk_mend("cell [3]: [Errno 30] y")
        and disk_mend(ValueError("28")) == disk_mend(OSError(2, "z")) == ""
    )


# ---- what diverged, in a paper notebook

LOSING = """
class Losing(Tiny):
    kind = "losing"
    @classmethod
    def run_group(cls, trials): return [r | {"diverged": 2 if t.x == t.seed - 100 else None} for t, r in zip(trials, super().run_group(trials))]
"""


def test_what_diverged_is_listed_beside_the_tables(clone):
    (clone.root / "tiny_trials.py").write_text(TRIALS + LOSING)
    lost = RUN.replace("Tiny(", "Losing(") + "\nrows = rows[rows.seed != 100]"
    clone.write(
        START.replace("import Tiny", "import Losing"), lost, SHOW.replace("seeds=seeds or [100, 101]", "seeds=[101]")
    )
    outcome = clone.execute()
    assert outcome.state == "done", outcome.text
    listed = pd.read_csv(clone.figures / "diverged.csv")
    assert listed[["kind", "seed", "epoch"]].values.tolist() == [["losing", s, 2] for s in listed.seed] and sorted(
        listed.seed
    ) == [100, 101]
    assert "diverged.csv" in read_provenance(clone.figures)["outputs"]
    assert "not counted here, with a run that diverged: seed 100" in (clone.figures / "claims.json").read_text()
    clone.write()
    assert (
        clone.execute().state == "done"
        and not (clone.figures / "diverged.csv").exists()
        and "not counted" not in (clone.figures / "claims.json").read_text()
    )


def test_a_run_ends_with_its_cluster(clone, capsys, monkeypatch):
    "The later notebooks are not begun: each would fail by itself."
    for name in ("02_other", "03_other"):
        write_notebook(clone.notebook.with_name(f"{name}.ipynb"), START.replace("01_tiny", name), RUN, "here.finish()")
    clone.write(
        START,
        "from lth_companion.lab.clusters import ClusterError\nraise ClusterError('The scheduler is gone: start it"
        " again, and give the same command')",
    )
    assert main(["run", "--repo", str(clone.root), "--workers", "1"]) == 1
    out, err = capsys.readouterr()
    assert out.count("failed") == 1 and "02_other" not in out and "The scheduler is gone" in err
    assert (
        err.splitlines()[-1]
        == "lth: 1 of 3 notebooks failed, 2 not begun without the cluster: what is finished is kept; mend what is said"
        " above and give the same command again"
    )
