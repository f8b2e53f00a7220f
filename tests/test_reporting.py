"""Reporting long work: the time left, `lth trials status` from another shell while a sweep runs, what failed and
why.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from test_cli import LTH, lth
from test_reproduce import clone, write_notebook  # noqa: F401 (clone is a fixture)
from test_trials import HERE, hold, logged, quiet, release, shown, until

from lth_companion.lab import progress
from lth_companion.lab import sweeps as T_sweeps
from lth_companion.lab.store import Store
from lth_companion.lab.sweeps import Idle, run
from lth_companion.lab.trials import Trial

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
SWEEP = """
import sys
from test_trials import logged, run
if __name__ == "__main__": run(logged(sys.argv[4], int(sys.argv[2]), seconds=.25), sys.argv[1], workers=int(sys.argv[3]), label="paper/01 (smoke)")
"""


class Dear(Trial):
    "Takes three times what it is estimated to take."

    kind = "test-dear"
    number: int

    def cost(self):
        return 0.04

    @classmethod
    def run_group(cls, trials):
        for t in trials:
            time.sleep(3 * t.cost())
        return [{} for t in trials]


@pytest.fixture
def shell(tmp_path, monkeypatch):
    "The lines of `lth trials ...` in another process, on the store in `s`."
    monkeypatch.chdir(tmp_path)

    def ask(*words, code=0):
        done = subprocess.run(
            [*LTH, "trials", *words],
            env=ENVIRONMENT | {"LTH_RUNS": str(tmp_path / "s")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return done.stdout if words[0] == "show" else [line.split("\t") for line in done.stdout.splitlines()]

    return ask


@pytest.fixture
def sweep(tmp_path):
    "Starts a sweep of 0.25 s a trial in another process, whose last trial waits to be released; killed in the end."
    started = []

    def start(count, workers=1):
        (tmp_path / "sweep.py").write_text(SWEEP)
        hold(tmp_path, count - 1)
        started.append(
            subprocess.Popen(
                [
                    sys.executable,
                    str(tmp_path / "sweep.py"),
                    str(tmp_path / "s"),
                    str(count),
                    str(workers),
                    str(tmp_path),
                ],
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        until(lambda: progress.sweeps(Store(tmp_path / "s")), 60)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


# ---- the time left


def left(trials, folder, **options):
    "[(seconds since the start, seconds left as told, trials done)] and how long it took."
    told, start = [], time.monotonic()
    run(
        trials,
        folder,
        progress="silent",
        on_progress=lambda now: told.append((time.monotonic() - start, now["left"], now["done"])),
        **options,
    )
    return told, time.monotonic() - start


@pytest.mark.parametrize("shape", ["equal", "dear ones last"])
def test_the_time_left_is_right_from_the_start(tmp_path, shape):
    "Trials that take what they are estimated to take: before any has ended, and with one long one in flight."
    trials = [Idle(number=n, seconds=0.15) for n in range(18)] + [
        Idle(number=99, seconds=0.15 if shape == "equal" else 1.5)
    ]

    def claim(n):
        told, took = left(trials, tmp_path / str(n))
        assert told[0][2] == 0 and told[-1][1] is None and len(told) > 4
        return all(abs(says - (took - now)) < 0.15 * took for now, says, _ in told[:-1])

    assert shown(claim, 3)


def test_what_has_ended_is_not_still_to_come():
    "The books at every moment: a group that has ended, whose results are being written, costs nothing more."
    group, rest, late = ([Idle(number=n, seconds=10) for n in some] for some in (range(4), range(4, 6), range(6, 7)))
    bar = T_sweeps.Progress(7, 0, 70.0, "silent")

    def left():
        return round(bar.record()["left"], 1)

    assert left() == 70
    bar.begin(group)
    assert left() == 70
    bar.ended(group, 40)
    assert left() == 30
    for _ in group:
        bar.add("ran")
        assert left() == 30
    bar.begin(rest)
    bar.ended(rest)  # lost with its worker: to be run again
    for t in rest:
        bar.again(t)
    assert left() == 30
    bar.add("cached", rest[0].cost())  # by another run
    assert left() == 20
    bar.begin(rest[1:]), bar.ended(rest[1:], 10), bar.add("failed")
    assert left() == 10 and (bar.begin(late), bar.ended(late, 10), left())[2] == 0
    bar.add("ran")
    assert bar.record()["left"] is None


def test_a_group_in_hand_behind_another_has_not_begun(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress, "time", type("Clock", (), {"monotonic": lambda: clock[0]}))
    bar = T_sweeps.Progress(4, 0, 40.0, "silent")
    one, two, three = ([Idle(number=n, seconds=10)] for n in range(3))
    bar.begin(one), bar.begin(two)
    clock[0] += 4
    assert [since for since, _ in bar.flying.values()] == [100, None] and round(bar.record()["left"], 1) == 36
    clock[0] += 6
    bar.ended(one, 10)
    assert bar.flying[two[0].hash][0] == 110 and round(bar.record()["left"], 1) == 30
    bar.workers = 2
    bar.begin(three)
    clock[0] += 4
    assert bar.flying[three[0].hash][0] == 110 and round(bar.record()["left"], 1) == (10 + 6 + 6) / 2


def test_the_time_left_is_corrected_by_what_ended(tmp_path):
    def claim(n):
        told, took = left([Dear(number=n) for n in range(25)], tmp_path / str(n))
        # as estimated, at first
        return told[0][1] == pytest.approx(1, abs=0.01) and all(
            done and abs(says - (took - now)) < 0.15 * took for now, says, done in told[1:-1]
        )

    assert shown(claim, 3)


def test_the_last_group_is_not_shared_out():
    assert progress.time_left(0, [(1, 10)], workers=4) == 9
    assert progress.time_left(40, [(5, 10), (5, 10)], workers=2) == 25 and progress.time_left(0, [], 2, 10, 10) == 0
    assert progress.time_left(0, [(3, 0.0)]) == 0  # a trial that says it costs nothing


def test_one_line_for_a_person():
    now = {
        "done": 37,
        "total": 80,
        "cached": 3,
        "failed": 1,
        "waiting": 0,
        "workers": 2,
        "rate": 42.0,
        "seconds": 49.0,
        "left": 70.0,
    }
    assert (
        progress.progress_text(now) == "37/80 trials (3 cached, 1 failed, 42.0 a minute with 2 workers, 1.2 min left)"
    )
    assert (
        progress.progress_text(now | {"done": 80, "left": None, "workers": 1, "waiting": 0})
        == "80/80 trials (3 cached, 1 failed, 42.0 a minute, 49 s)"
    )
    assert (
        progress.progress_text(now | {"done": 0, "rate": 0.0, "cached": 0, "failed": 0, "waiting": 4})
        == "0/80 trials (about 1.2 min left, waiting for 4 of another run)"
    )


def test_a_long_group_in_this_process_does_not_silence_the_line(tmp_path, capsys, monkeypatch):
    def update(self, update=T_sweeps.Progress.update):
        update(self)
        if self.told is not None and (tmp_path / "hold").exists():
            release(tmp_path)

    monkeypatch.setattr(T_sweeps.Progress, "_tick", quick(T_sweeps.Progress._tick))
    monkeypatch.setattr(T_sweeps.Progress, "update", update)
    hold(tmp_path, 0)
    run(logged(tmp_path, 1), tmp_path, progress="plain")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("0/1 trials (about ") and lines[1].startswith("1/1 trials")


def quick(tick):
    "As though a second were twenty, for the pause between lines."

    def faster(self):
        self.spoke -= 9.5
        tick(self)

    return faster


# ---- from another shell


@pytest.mark.parametrize("workers", [1, 2])
def test_status_from_another_shell(tmp_path, shell, sweep, workers):
    process = sweep(40 * workers, workers)
    until(lambda: progress.sweeps(Store(tmp_path / "s"))[0]["done"] > 4, 60)  # told every two seconds
    (kind, label, text, since, where), *rest = shell("status")
    assert (kind, label, where.split()[0]) == ("running", "paper/01 (smoke)", str(process.pid)) and "s ago)" in since
    done, total = map(int, text.split(" ")[0].split("/"))
    assert (
        0 < done < total == 40 * workers
        and "a minute" in text
        and text.endswith("left)")
        and ("with 2 workers" in text) == (workers == 2)
    )
    assert rest[0][0] == "finished" and done - 12 <= int(rest[0][1]) <= total
    for _ in range(3):
        shell("status")  # does not disturb
    release(tmp_path)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 0
        and not err
        and len(Store(tmp_path / "s").hashes()) == total
        and f"{total}/{total} trials" in out
    )
    assert shell("status")[0][0] == "finished" and not list((tmp_path / "s" / "sweeps").iterdir())


def test_a_sweep_whose_process_is_gone_is_not_running(tmp_path, shell, sweep):
    process, other = sweep(100), sweep(100)
    until(lambda: len(progress.sweeps(Store(tmp_path / "s"))) == 2, 30)
    assert [line[0] for line in shell("status")][:3] == ["running", "running", "finished"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    (kind, *_, where), rest = shell("status")[:2]
    assert kind == "running" and where.split()[0] == str(other.pid) and rest[0] == "finished"
    assert len(list((tmp_path / "s" / "sweeps").iterdir())) == 1  # and its file is gone


def test_an_odd_file_among_the_sweeps_is_no_sweep(tmp_path):
    (tmp_path / "sweeps").mkdir()
    for name, text in {"a": "", "b": "[", "c": "[]", "d": "{}"}.items():
        (tmp_path / "sweeps" / f"{name}.json").write_text(text)
    assert progress.sweeps(Store(tmp_path)) == []


def test_the_own_sweep_is_seen_from_inside(tmp_path):
    seen = []
    quiet(
        [Idle(number=n) for n in range(3)],
        tmp_path,
        label="mine",
        on_done=lambda *_: seen.append(progress.sweeps(Store(tmp_path))),
    )
    assert [[r["label"] for r in found] for found in seen] == [["mine"]] * 3 and progress.sweeps(Store(tmp_path)) == []


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "sweeps").write_text("in the way")
    assert quiet([Idle(number=n) for n in range(3)], tmp_path).attrs["ran"] == 3


# ---- what was explored


def test_the_gpu_tiers_report_shows_what_was_explored(capsys, tmp_path):
    "The five contrasts of the first twenty trials on a GPU, to the digit; no claim is decided by them."
    import shutil

    shutil.copytree(HERE.parent / "figures" / "gpu", tmp_path / "gpu")
    code, out, err = lth(capsys, "report", "--tier", "gpu", "--repo", str(HERE.parent), "--out", str(tmp_path))
    rows = [line.split("\t") for line in out.splitlines()]
    found = {fields[9].split(" (vgg")[0]: fields for fields in rows if fields[0] == "explores"}
    assert code == 0 and {k: f[3:6] for k, f in found.items()} == {
        "GraNet (s_i=0.5) - RigL at density 0.02": ["+1.27", "[0.69, 1.85]", "4"],
        "GraNet (s_i=0) - GMP at density 0.02": ["+0.09", "[-0.25, 0.43]", "4"],
        "GMP - RigL at density 0.02": ["+0.60", "[-1.22, 2.41]", "4"],
        "RigL - SET at density 0.02": ["+0.53", "[0.22, 0.84]", "4"],
        "GraNet (s_i=0.5) - GMP at density 0.02": ["+0.67", "[-0.60, 1.95]", "4"],
    }
    for fields in found.values():
        for text in fields[9:]:
            assert all(
                said in text
                for said in (
                    "vgg-19 on 50,000 cifar10-jpeg images",
                    "20 epochs",
                    "an eighth of its epochs (20 of 160)",
                    "JPEG images",
                    "seeds 104 to 113",
                )
            )
    assert "granet: 5 contrasts explored, which decide nothing" in err
    assert (
        sum(
            int(n)
            for line in err.splitlines()
            if "contrasts" not in line
            for n in re.findall(r"(\d+) (?:reproduced|contradicted|equivalent|undecided|not run)", line)
        )
        == len(rows) - 5
    )
    assert {
        fields[8]
        for fields in rows
        if fields[0] != "not run at this tier" and fields[1].startswith("granet/")
        # CIFAR-10's claims, and CIFAR-100's
    } == {
        "smaller",
        "other",
    }
    # of 14 seeds
    assert all(int(fields[5]) <= 10 for fields in rows if fields[0] != "explores" and fields[1].startswith("granet/"))
    page = (tmp_path / "gpu" / "report.html").read_text()
    assert page.count(">explores</b>") == 5 and "5 contrasts explored, which decide nothing" in page


# ---- what failed


def test_what_failed_and_why(tmp_path, shell, capsys):
    bad = logged(tmp_path, 3, action="raise") + [Idle(number=1)]
    run(bad, tmp_path / "s", progress="plain")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("3 trials failed: number 0 is not to be run (and the like): see lth trials show ")
    hash = line.split()[-1]
    told = json.loads(shell("show", hash))
    assert (
        told["hash"] == bad[0].hash
        and told["failed"] == "number 0 is not to be run"
        and told["trial"]["fields"]["action"] == "raise"
    )
    assert (
        told["traceback"][0].startswith("Traceback")
        and told["traceback"][-1] == "ValueError: number 0 is not to be run"
    )
    lines = shell("status")
    assert ["failed", "3", str(tmp_path / "s" / "failed")] in lines
    assert sorted((line[1], line[3]) for line in lines if line[0] == "failure") == sorted(
        (t.hash[:12], f"number {t.number} is not to be run") for t in bad[:3]
    )


def test_reasons_are_counted():
    failures = {
        f"{n:064x}": why
        for n, why in enumerate(
            ["no memory", "number 3", "number 4", "number 5."] + [f"{c} failed" for c in "abcdefghijk"]
        )
    }
    lines = T_sweeps.failure_lines(failures)
    assert lines[0].startswith("3 trials failed: number 3 (and the like): see lth trials show ") and lines[
        1
    ].startswith("1 trial failed: no memory: see ")
    assert (
        lines[-1] == "3 trials failed for 3 other reasons: see lth trials status"
        and len(lines) == 11
        and not T_sweeps.failure_lines({})
    )


def test_a_note_that_is_no_note_is_left_out(tmp_path):
    quiet(logged(tmp_path, 1, action="raise"), tmp_path / "s")
    (tmp_path / "s" / "failed" / f"{'0' * 64}.txt").write_text("cut sho")
    assert [f["failed"] for f in progress.failures(Store(tmp_path / "s"))] == ["number 0 is not to be run"]


def test_the_brief_report_says_what_was_found(capsys):
    "At most ten lines a paper, each with its numbers; nothing that was not run, nothing that leans on the line before."
    code, out, _ = lth(capsys, "report", "--tier", "laptop", "--brief", "--repo", str(HERE.parent))
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and {
        p: 1 <= sum(line[0] == p for line in lines) <= 10
        for p in ("granet", "learning_to_learn", "weight_correlation", "weight_recycling")
    } == dict.fromkeys(("granet", "learning_to_learn", "weight_correlation", "weight_recycling"), True)
    assert all(
        len(line) == 4
        and line[1] in ("reproduced", "contradicted", "equivalent within m", "undecided")
        and re.search(r"n = \d+$", line[2])
        and not line[3].startswith("The same")
        for line in lines
    )
