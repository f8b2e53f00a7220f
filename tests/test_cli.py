"""The command line: exit codes, one-sentence errors, plain lines where there is no terminal."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from test_reproduce import clone, write_notebook  # noqa: F401 (clone is a fixture)
from test_trials import shown

from lth_companion.lab.cli import main

LTH = [sys.executable, "-c", "import sys; from lth_companion.lab.cli import main; sys.exit(main())"]
COMMANDS = [
    "list",
    "run",
    "report",
    "doctor",
    "data status",
    "data fetch",
    "trials status",
    "trials show",
    "trials export",
    "trials clean",
]


def lth(capsys, *args):
    "(exit code, stdout, stderr) of `lth args`, in this process."
    capsys.readouterr()
    code = main([str(a) for a in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def sentence(err):
    "The error, which must be one line without a traceback."
    lines = [line for line in err.splitlines() if line.startswith("lth: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(capsys, command):
    code, out, err = lth(capsys, *command.split(), "--help")
    assert code == 0 and f"Example: lth {command}" in " ".join(out.split())


@pytest.mark.parametrize("args", [[], ["data"], ["trials"], ["--help"]])
def test_a_bare_command_shows_its_help(capsys, args):
    code, out, err = lth(capsys, *args)
    assert code == 0 and "Usage: lth" in out


def test_version(capsys):
    from lth_companion import __version__

    assert lth(capsys, "--version")[:2] == (0, f"lth_companion {__version__}\n")


def test_help_is_fast():
    def claim(_):
        start = time.perf_counter()
        subprocess.run([*LTH, "--help"], check=True, capture_output=True)
        return time.perf_counter() - start < 0.5

    assert shown(claim)


@pytest.mark.parametrize(
    "args, expected",
    [
        (["runn"], "No such command 'runn'"),
        (["run", "--tear", "smoke"], "No such option"),
        (["data", "fetch"], "Missing argument"),
        (["run", "--workers", "0"], "--workers"),
        (["run", "--tier", "labtop"], "did you mean 'laptop'?"),
        (["report", "--tier", "smoek"], "did you mean 'smoke'?"),
        (["run", "lerning_to_learn"], "did you mean 'learning_to_learn'?"),
        (["run", "learning/99"], "there is no notebook '99'"),
        (["run", "learning/01_tiny", "--tier", "paper"], "does not run at tier paper: choose one of smoke, laptop"),
        (["run", "-p", "sedes=1"], "did you mean 'seeds'?"),
        (["run", "-p", "seeds=a"], "wants list, not 'a': for example -p seeds=0,1,2"),
        (["run", "--device", "tpu"], "choose auto, cpu or cuda"),
        (["run", "--out", "/proc/nowhere/figures"], "name another folder with --out"),
        (["data", "fetch", "mnits"], "mnist"),
        (["trials", "show", "zz"], "begins 0 of 0 hashes"),
        (["trials", "export", "x.json"], "x.jsonl.xz"),
        (["trials", "export", "x.jsonl.xz"], "holds no finished trial"),
    ],
)
def test_bad_input_is_one_sentence(clone, capsys, monkeypatch, args, expected):
    monkeypatch.chdir(clone.root)
    code, out, err = lth(capsys, *args)
    assert code != 0 and expected in sentence(err)
    assert not clone.ran() and not (clone.root / "figures/smoke").exists()


def test_cuda_without_one(clone, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = lth(capsys, "run", "--device", "cuda", "--repo", clone.root)
    assert code == 1 and "no CUDA device" in sentence(err) and "--device cpu" in sentence(err) and not clone.ran()


def test_unwritable_store_and_no_clone(clone, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LTH_RUNS", str(tmp_path / "file" / "runs"))
    code, _, err = lth(capsys, "run", "--repo", clone.root)
    assert code == 1 and "cannot write in" in sentence(err) and "LTH_RUNS" in sentence(err) and not clone.ran()
    monkeypatch.chdir(tmp_path)
    code, _, err = lth(capsys, "run")
    assert code == 1 and "--repo FOLDER" in sentence(err)


def test_debug_shows_the_traceback(clone, capsys, monkeypatch):
    monkeypatch.setenv("LTH_DEBUG", "1")
    code, _, err = lth(capsys, "run", "--tier", "x", "--repo", clone.root)
    assert code == 1 and "Traceback" in err


def test_list(clone, capsys, monkeypatch):
    code, out, err = lth(capsys, "list", "--repo", clone.root)
    lines = [line.split("\t") for line in out.splitlines()]
    assert (
        code == 0
        and ["notebook", "learning_to_learn/01_tiny", "figure 1; table 2", "smoke 0.1 min, laptop 0.2 min", "Tiny"]
        in lines
    )
    assert ["scorer", "snip", "version 1", "lth_companion"] in lines


def test_list_shows_a_plugin_of_this_folder(clone, capsys, monkeypatch):
    from lth_companion.methods import scorers

    (clone.root / "my_scorer.py").write_text(
        "import torch\nfrom lth_companion.methods.scorers import register\n\n@register('mine', version=7)\ndef"
        " mine(model, batches, *, masks=None, mode='eval', generator=None):\n    from lth_companion.tickets import"
        " prunable\n    return {n: p.detach().abs() for n, p in prunable(model).items()}\n"
    )
    monkeypatch.chdir(clone.root)
    monkeypatch.setenv("LTH_PLUGINS", "my_scorer")
    try:
        assert "scorer\tmine\tversion 7\tmy_scorer" in lth(capsys, "list")[1]
    finally:
        scorers.SCORERS.pop("mine", None)
    monkeypatch.setenv("LTH_PLUGINS", "no_such_module")
    code, _, err = lth(capsys, "list")
    assert code == 1 and "no_such_module" in sentence(err)


def test_run_then_report(clone, capsys, monkeypatch):
    monkeypatch.chdir(clone.root)
    code, out, err = lth(capsys, "run", "learning/01", "--dry-run")
    assert code == 0 and out.splitlines()[-1] == "total\t4 trials, 0 cached, about 8 core-seconds" and not clone.ran()

    code, out, err = lth(capsys, "run", "learning/01", "--workers", "2", "-p", "scale=2")
    assert code == 0, err
    assert re.fullmatch(
        r"learning_to_learn/01_tiny\tdone in \d+ s\t4 trials, 4 trained now\tfigures/smoke/learning_to_learn/01_tiny\n",
        out,
    )
    assert lth(capsys, "run", "learning/01", "-p", "scale=2.0")[1].startswith("learning_to_learn/01_tiny\tunchanged")
    assert len(clone.ran()) == 4

    code, out, err = lth(capsys, "report", "--tier", "smoke")
    lines = out.splitlines()
    from lth_companion.lab.claims import VERDICTS

    assert code == 0 and lines and all(line.split("\t")[0] in VERDICTS and line.count("\t") == 10 for line in lines)
    assert sum(line.startswith("undecided\tlearning_to_learn/headline-0.005\t") for line in lines) == 1
    assert (clone.root / "figures/smoke/report.html").exists() and "report.html" in err
    code, out, err = lth(capsys, "report", "--json")  # only smoke has run: that is the default here
    rows = json.loads(out)
    assert len(rows) == len(lines) and {r["tier"] for r in rows} == {"smoke"}
    assert all(r["says"] in ("paper", "reconstructed", "ours") and r["distance"] in ("smaller", None) for r in rows)

    code, out, err = lth(capsys, "trials", "status")
    assert code == 0 and out.splitlines()[0].split("\t")[:2] == ["finished", "4"]
    hash = clone.ran()[0]
    code, out, err = lth(capsys, "trials", "show", hash[:10])
    assert code == 0 and json.loads(out)["hash"] == hash and json.loads(out)["trial"]["kind"] == "tiny"
    code, out, err = lth(capsys, "trials", "export", clone.root / "mine.jsonl.xz")
    assert code == 0 and out.startswith("4 trials in")
    (clone.root / "runs/damaged").mkdir()
    (clone.root / "runs/damaged/x").write_text("x")
    assert lth(capsys, "trials", "clean")[1].startswith("1 files removed")
    assert "finished\t4" in lth(capsys, "trials", "status")[1]
    assert lth(capsys, "trials", "clean", "--all", "--yes")[0] == 0
    assert "finished\t0" in lth(capsys, "trials", "status")[1]


def test_one_failing_notebook_does_not_stop_the_next(clone, capsys):
    write_notebook(clone.notebook.with_name("00_broken.ipynb"), "1/0")
    code, out, err = lth(capsys, "run", "--repo", clone.root, "--workers", "1")
    assert code == 1 and "00_broken\tfailed" in out and "01_tiny\tdone" in out
    assert (
        "ZeroDivisionError: division by zero" in err
        and "runs/notebooks/smoke/learning_to_learn/00_broken.ipynb" in err
        and "1 of 2 notebooks failed" in err
    )


def test_relative_folders_mean_the_callers(clone, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LTH_RUNS", "my_runs")
    code, out, err = lth(capsys, "run", "--repo", clone.root, "--out", "my_figures", "--workers", "1", "-p", "xs=0,1")
    assert code == 0, err
    assert len(list((tmp_path / "my_runs/results").rglob("*.json"))) == 4
    assert (tmp_path / "my_figures/smoke/learning_to_learn/01_tiny/accuracy.svg").exists()
    assert {p.name for p in clone.notebook.parent.iterdir()} == {"01_tiny.ipynb"}


def test_interrupt(clone):
    "Ctrl-C: one sentence, exit code 130, what is finished is kept."
    # a job in the background of a script is started deaf to it
    process = subprocess.Popen(
        [
            *LTH,
            "run",
            "--repo",
            str(clone.root),
            "-p",
            f"xs={','.join(map(str, range(30)))}",
            "-p",
            "sleep=0.4",
            "--workers",
            "1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 60
    while len(clone.ran()) < 2 and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "every finished trial is kept" in err and "Traceback" not in err, err
    assert len(list((clone.root / "runs/results").rglob("*.json"))) >= 2


def test_two_at_once_on_one_store(clone):
    command = [*LTH, "run", "--repo", str(clone.root), "-p", "xs=0,1,2,3,4,5", "-p", "sleep=0.3", "--workers", "1"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], ends
    assert len(clone.ran()) == len(set(clone.ran())) == 12  # nothing lost, nothing run twice
    assert clone.figures.joinpath("accuracy.csv").read_text().count("\n") == 13


def test_data_and_doctor(clone, capsys, monkeypatch):
    code, out, err = lth(capsys, "data", "status")
    assert code == 0 and any(line.startswith("digits\there\t") for line in out.splitlines())
    code, out, err = lth(capsys, "data", "fetch", "digits")
    assert code == 0 and out.startswith("digits\there\t")
    code, out, err = lth(capsys, "doctor", "--repo", clone.root)
    states = {line.split("\t")[0] for line in out.splitlines()}
    assert states <= {"ok", "note", "wrong"} and code == ("wrong" in states) and "1 paper notebooks" in out
    monkeypatch.setenv("LTH_DATA", "/nowhere")
    code, out, err = lth(capsys, "doctor", "--repo", clone.root)
    assert code == 1 and "wrong\tLTH_DATA\t/nowhere is no folder: mend or unset LTH_DATA" in out


def test_doctor_on_a_machine_that_lacks_things(clone, capsys, monkeypatch, tmp_path):
    import importlib.metadata as metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "torch" else real(name))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LTH_RUNS", str(tmp_path / "file/runs"))
    monkeypatch.setenv("LTH_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("LTH_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code, out, err = lth(capsys, "doctor")
    lines = {line.split("\t")[1]: line for line in out.splitlines()}
    assert code == 1 and "wrong\ttorch\t1.0 is not" in lines["torch"] and "pip install" in lines["torch"]
    assert (
        lines["store"].startswith("wrong")
        and "LTH_RUNS" in lines["store"]
        and "lth data fetch mnist" in lines["mnist"]
        and lines["clone"].startswith("note")
    )
