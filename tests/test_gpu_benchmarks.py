"""The GPU's benchmarks, rehearsed on the CPU: every line of them runs, with graphs replaced by the step they would
replay.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from test_training import stand_in  # noqa: F401  (the fixture)

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("BENCH_DEVICE", "cpu")
    import gpu

    return gpu


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "not measured" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["training", "searches", "stacks", "compiled", "table"])
def test_every_part_runs(name, gpu, stand_in, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(torch, "compile", lambda model, **k: model)
    gpu.PARTS[name](quick=True)
    out = capsys.readouterr().out
    rows = [json.loads(text[4:]) for text in out.splitlines() if text.startswith("row ")]
    assert all(r["rate"] > 0 for r in rows) and (len(rows) >= 3 or name in ("compiled", "table"))
    assert "thesis" in out if name == "table" else rows
    assert stand_in or name in ("compiled", "table")


def test_members_work_in_one_window(gpu, capsys):
    gpu.several(True, "sharing time", [2])  # an eager search: a CPU has no graphs
    row = json.loads(capsys.readouterr().out.split("row ")[1])
    assert row["side"] == "2 processes sharing time" and row["rate"] > 0


def test_a_part_that_hangs_costs_no_other(gpu, monkeypatch, tmp_path, capsys):
    script = tmp_path / "hangs.py"
    script.write_text(
        'import sys, time\nprint(\'row {"what": "a", "how": "b", "side": "1", "ms": 1.0, "rate": 50.0}\','
        " flush=True)\ntime.sleep(60 if sys.argv[2] == 'mps' else 0)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setitem(gpu.LIMITS, "mps", 2)
    began = time.monotonic()
    rows, well = gpu.part("mps", False, {("a", "b", "1"): 100.0})
    assert not well and len(rows) == 1 and time.monotonic() - began < 20
    assert gpu.part("training", False, {}) == (rows, True)
    out = capsys.readouterr().out
    assert "HUNG mps" in out and "0.50" in out


def test_every_rate_that_is_known_has_a_row(gpu):
    """The rates of one H200 stand beside what is measured: each row of the table that one process or eight under
    MPS gave is measured again.
    """
    source = gpu.RATES if gpu.RATES.exists() else None
    if source is None:
        pytest.skip("the table is not here yet")
    known, text = gpu.known(), (BENCHMARKS / "gpu.py").read_text()
    assert len(known) >= 20 and all(w.split(" (")[0].rsplit(" ", 1)[0] in text for w, _, _ in known)


@pytest.mark.gpu
def test_on_a_gpu():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "training", "searches", "--quick"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert done.returncode == 0 and done.stdout.count("\n") >= 7, done.stdout + done.stderr
