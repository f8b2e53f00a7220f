"""A small paper notebook in a temporary clone, run through papermill: what runs again, what does not, and what it
leaves.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest

from lth_companion.lab import execution, provenance
from lth_companion.lab.catalogue import ReproduceError, catalogue, inspect, read_params, select
from lth_companion.lab.execution import Settings, execute
from lth_companion.lab.notebooks import Notebook
from lth_companion.lab.provenance import pack_path, read_provenance, write_table
from lth_companion.lab.report import report, report_lines, report_page

ROOT = Path(__file__).parent.parent

TRIALS = """
import os, time
from lth_companion.lab.trials import Trial

class Tiny(Trial):
    kind = "tiny"
    group_size = 1
    x: int
    seed: int = 0
    sleep: float = 0.0

    @classmethod
    def run_group(cls, trials):
        time.sleep(sum(t.sleep for t in trials))
        for t in trials:
            with open(os.environ["TINY_LOG"], "a") as f: f.write(t.hash + "\\n")
            if t.x < 0: raise ValueError("x must not be negative")
        return [{"accuracy": 90 + t.x + t.seed / 3} for t in trials]

    def cost(self): return 2.0
"""
TITLE = "# Tiny\n> A sentence.\n\nRegenerates: figure 1; table 2\nMinutes: smoke 0.1, laptop 0.2"
PARAMETERS = """tier: str = "smoke"
device: str = "auto"
seeds: list = []
workers: int = 1
out: str = ""
xs: list[int] = [0, 1]
scale: float = 1.0
limit: int | None = None
sleep: float = 0.0"""
START = """from lth_companion.lab.notebooks import Notebook
from tiny_trials import Tiny
here = Notebook("learning_to_learn", "01_tiny", tier=tier, device=device, workers=workers, out=out)"""
RUN = "rows = here.run([Tiny(x=x, seed=s, sleep=sleep) for x in xs for s in (seeds or [100, 101])])"
SHOW = """from matplotlib.figure import Figure
fig = Figure(); fig.subplots().plot(rows.x, rows.accuracy * scale)
here.table(rows[["x", "seed", "accuracy"]], "accuracy")
here.figure(fig, "accuracy")
first, second = (rows[rows.x == x].accuracy.values for x in xs[:2])
here.claim("headline-0.005", differences=second - first, seeds=seeds or [100, 101], noise=0.4)
here.finish()"""


def write_notebook(path, *code, title=TITLE, parameters=PARAMETERS):
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(title),
            nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        ]
    )
    nb.cells += [nbformat.v4.new_code_cell(c) for c in code]
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


class Clone:
    """A folder that looks like a clone, with one notebook and a log of every trial that was really run."""

    def __init__(self, root):
        self.root, self.log = root, root / "log.txt"
        self.notebook = root / "nbs/papers/learning_to_learn/01_tiny.ipynb"
        self.figures = root / "figures/smoke/learning_to_learn/01_tiny"
        self.write()
        (root / "tiny_trials.py").write_text(TRIALS)

    def write(self, *code):
        write_notebook(self.notebook, *(code or (START, RUN, SHOW)))

    def ran(self):
        return self.log.read_text().split() if self.log.exists() else []

    def entry(self):
        return catalogue(self.root)[0]

    def execute(self, params=(), **kw):
        return execute(
            self.entry(), Settings(self.root, workers=1, **kw), read_params(params, [self.entry()])[self.entry().label]
        )


@pytest.fixture
def clone(tmp_path, monkeypatch):
    made = Clone(tmp_path / "clone")
    monkeypatch.setenv("PYTHONPATH", str(made.root))
    monkeypatch.setenv("TINY_LOG", str(made.log))
    monkeypatch.syspath_prepend(str(made.root))
    for name in ("LTH_RUNS", "LTH_DRY_RUN", "LTH_FORCE", "LTH_PLUGINS", "LTH_PACK_EVERY"):
        monkeypatch.delenv(name, raising=False)
    yield made
    sys.modules.pop("tiny_trials", None)


def test_run_skip_rerun_and_byte_equal_outputs(clone):
    first = clone.execute()
    assert first.state == "done", first.text
    assert len(clone.ran()) == 4
    names = {"accuracy.csv", "accuracy.svg", "accuracy.png", "claims.json", "provenance.json"}
    assert {p.name for p in clone.figures.iterdir()} == names
    before = {n: (clone.figures / n).read_bytes() for n in names - {"provenance.json"}}
    assert before["accuracy.csv"] == b"x,seed,accuracy\n0,100,123.333\n0,101,123.667\n1,100,124.333\n1,101,124.667\n"
    made = read_provenance(clone.figures)
    assert (
        made["seeds"] == [100, 101]
        and made["trials"]["count"] == 4
        and made["trained"] == 4
        and made["device"] == "cpu"
    )
    assert made["parameters"]["xs"] == [0, 1] and set(made["outputs"]) == names - {"provenance.json"}
    assert all(hashlib.sha256(before[n]).hexdigest() == sha for n, sha in made["outputs"].items())
    executed = clone.root / "runs/notebooks/smoke/learning_to_learn/01_tiny.ipynb"
    assert "injected-parameters" in executed.read_text()

    assert clone.execute().state == "unchanged"  # nothing to do
    (clone.figures / "accuracy.csv").write_text("x\n")  # an altered output is made again, without a trial
    assert clone.execute().state == "done"
    assert {n: (clone.figures / n).read_bytes() for n in before} == before and len(clone.ran()) == 4

    clone.write(START, RUN, SHOW.replace('"accuracy")\nhere.figure', '"numbers")\nhere.figure'))  # another source
    assert clone.execute().state == "done" and len(clone.ran()) == 4
    assert (clone.figures / "numbers.csv").read_bytes() == before["accuracy.csv"]
    assert not (clone.figures / "accuracy.csv").exists()  # what the older version left is gone

    forced = clone.execute(force=True)
    assert (
        forced.state == "done"
        and len(clone.ran()) == 8
        and (clone.figures / "numbers.csv").read_bytes() == before["accuracy.csv"]
    )


def test_the_gpu_tier_without_a_gpu_is_made_of_what_was_measured(clone, monkeypatch):
    "Trials without a result are refused, or left out and said; what was made of a part is made again."
    from lth_companion.lab.store import Store

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sys.modules.pop("tiny_trials", None)
    from tiny_trials import Tiny

    left = RUN.replace(
        "rows = here.run(",
        "asked = {'all': [(x, Tiny(x=x, seed=s)) for x in xs for s in (seeds or [100,"
        " 101])]}\nprint(here.measured(asked))\nrows = here.run([t for _, t in here.measured(asked)['all']] if scale >"
        " 0 else ",
    )
    clone.write(START, left, 'here.table(rows[["x", "seed", "accuracy"]], "accuracy")\nhere.finish()')
    folder, store = clone.root / "figures/gpu/learning_to_learn/01_tiny", Store(clone.root / "runs")
    none = clone.execute(tier="gpu")
    assert (
        none.state == "failed"
        and "none of 4 trials has a result, and they are a GPU's" in none.text
        and "--device cpu" in none.text
    )
    for seed in (100, 101):
        store.put(Tiny(x=0, seed=seed), {"accuracy": 90.5})
    assert clone.execute(tier="gpu").state == "done"
    assert (folder / "accuracy.csv").read_text() == "x,seed,accuracy\n0,100,90.5\n0,101,90.5\n"
    made = read_provenance(folder)
    assert (
        made["device"] == "cuda" and made["trials"]["count"] == 2 == made["trials"]["missing"] and made["trained"] == 0
    )
    assert (
        "2 of 4 trials have no result yet and need a GPU"
        in (clone.root / "runs/notebooks/gpu/learning_to_learn/01_tiny.ipynb").read_text()
    )
    refused = clone.execute(["scale=-1"], tier="gpu")
    assert refused.state == "failed" and "2 of 4 trials are to be run, and are a GPU's" in refused.text
    planned = clone.execute(tier="gpu", dry_run=True)
    assert planned.state == "planned" and planned.text == "4 trials, 2 cached, about 4 core-seconds"
    assert clone.execute(tier="gpu").state == "done"  # made of a part: there may be more by now
    for seed in (100, 101):
        store.put(Tiny(x=1, seed=seed), {"accuracy": 91.5})
    assert clone.execute(tier="gpu").state == "done" and len((folder / "accuracy.csv").read_text().splitlines()) == 5
    assert (
        "missing" not in read_provenance(folder)["trials"]
        and clone.execute(tier="gpu").state == "unchanged"
        and not clone.ran()
    )
    # a CPU's own
    assert clone.execute(["scale=-1", "xs=5"], tier="gpu", device="cpu").state == "done" and len(clone.ran()) == 2


def test_parameters_reach_the_notebook_and_make_it_run_again(clone):
    assert clone.execute().state == "done"
    second = clone.execute(["xs=0,2", "seeds=[100]", "limit=None"])
    assert second.state == "done" and len(clone.ran()) == 5  # x=0 of seed 100 was there already
    assert (clone.figures / "accuracy.csv").read_text() == "x,seed,accuracy\n0,100,123.333\n2,100,125.333\n"
    assert clone.execute(["xs=0,2", "seeds=100"]).state == "unchanged"


def test_another_out_folder(clone, tmp_path):
    assert clone.execute(out=str(tmp_path / "elsewhere")).state == "done"
    assert (
        tmp_path / "elsewhere/smoke/learning_to_learn/01_tiny/provenance.json"
    ).exists() and not clone.figures.exists()


def test_dry_run_counts_and_writes_nothing(clone):
    plan = clone.execute(dry_run=True)
    assert (plan.state, plan.text) == ("planned", "4 trials, 0 cached, about 8 core-seconds")
    assert not clone.ran() and not (clone.root / "figures").exists() and not (clone.root / "runs/notebooks").exists()
    clone.execute(["xs=0"], out=str(clone.root / "other"))
    assert clone.execute(dry_run=True).text == "4 trials, 2 cached, about 4 core-seconds"
    clone.write(START, RUN, "more = here.run([Tiny(x=9)])", SHOW)  # a second sweep is planned once the first is there
    assert "what later cells add" in clone.execute(dry_run=True).text
    clone.write(START, RUN, SHOW)
    clone.execute()
    assert clone.execute(dry_run=True).text == "4 trials, 4 cached, about 0 core-seconds"


@pytest.mark.parametrize(
    "pair, sentence",
    [
        ("sedes=1", "no chosen notebook has a parameter 'sedes': did you mean 'seeds'?"),
        ("seeds=0,one", "the parameter 'seeds' wants list, not '0,one'"),
        ("scale=nan", "the parameter 'scale' wants float, not 'nan': for example -p scale=1.0"),
        ("xs=1.5", "wants list[int]"),
        ("limit=few", "wants int | None"),
        ("scale", "-p wants name=value"),
        ("tier=laptop", "write --tier laptop"),
    ],
)
def test_bad_parameters(clone, pair, sentence):
    with pytest.raises(ReproduceError) as caught:
        read_params([pair], catalogue(clone.root))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_parameter_known_to_one_of_several_notebooks(clone):
    write_notebook(clone.notebook.with_name("02_other.ipynb"), "1", parameters='tier: str = "smoke"\nk: int = 3')
    entries = catalogue(clone.root)
    assert read_params(["k=4", "xs=7"], entries) == {
        "learning_to_learn/01_tiny": {"xs": [7]},
        "learning_to_learn/02_other": {"k": 4},
    }
    with pytest.raises(ReproduceError, match="'xs'"):
        read_params(["xs=7"], select(entries, ["learning/02"]))


def test_inspect_agrees_with_papermill(clone):
    ours, theirs = inspect(clone.entry()), papermill.inspect_notebook(str(clone.notebook))
    simple = {n: p for n, p in ours.items() if n != "limit"}  # papermill's pattern misses `int | None`
    assert {n: p.annotation for n, p in simple.items()} == {
        n: p["inferred_type_name"] for n, p in theirs.items() if n in simple
    }
    assert {n: repr(p.default) for n, p in simple.items()} == {
        n: p["default"].replace('"', "'") for n, p in theirs.items() if n in simple
    }


def test_notebooks_that_lack_something(clone):
    write_notebook(clone.notebook, "1", parameters="tier = 'smoke'")
    with pytest.raises(ReproduceError, match="lacks its type"):
        inspect(clone.notebook)
    clone.notebook.write_text(nbformat.writes(nbformat.v4.new_notebook()))
    with pytest.raises(ReproduceError, match="no cell with the tag 'parameters'"):
        inspect(clone.notebook)
    clone.notebook.write_text("{")
    with pytest.raises(ReproduceError, match="no readable notebook"):
        catalogue(clone.root)


def test_a_failing_cell(clone):
    clone.write(START, "def broken():\n    raise KeyError('first line\\nsecond line')\nbroken()")
    outcome = clone.execute()
    executed = clone.root / "runs/notebooks/smoke/learning_to_learn/01_tiny.ipynb"
    assert outcome.state == "failed" and executed.exists()
    assert (
        "learning_to_learn/01_tiny failed in cell [" in outcome.text
        and "KeyError" in outcome.text
        and str(executed) in outcome.text
    )
    assert "\n" not in outcome.text and not (clone.figures / "provenance.json").exists()


def test_a_kernel_that_dies(clone):
    clone.write(START, "import os, sys; print('last words', file=sys.__stderr__, flush=True); os.kill(os.getpid(), 9)")
    outcome = clone.execute()
    log = clone.root / "runs/notebooks/smoke/learning_to_learn/01_tiny.log"
    assert (
        outcome.state == "failed"
        and "its kernel" in outcome.text
        and "fewer --workers" in outcome.text
        and str(log) in outcome.text
    )
    assert "\n" not in outcome.text and log.exists()


def test_a_notebook_that_does_not_finish(clone):
    clone.write(START, RUN)
    outcome = clone.execute()
    assert outcome.state == "failed" and "here.finish()" in outcome.text


def test_failing_trials_fail_the_notebook_and_keep_the_others(clone):
    outcome = clone.execute(["xs=0,-1,1"])
    assert outcome.state == "failed" and "2 of 6 trials failed (x must not be negative)" in outcome.text
    assert len(clone.ran()) == 6
    assert clone.execute().state == "done" and len(clone.ran()) == 6  # 0 and 1 were kept


def test_kill_9_then_the_same_command(clone, tmp_path):
    """A sweep killed in the middle goes on where it was; its table equals an uninterrupted one's, byte for byte."""
    command = [
        sys.executable,
        "-c",
        "import sys; from lth_companion.lab.cli import main; sys.exit(main())",
        "run",
        "learning/01",
        "--repo",
        str(clone.root),
        "-p",
        "xs=0,1,2,3,4,5,6,7,8,9",
        "-p",
        "sleep=0.5",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.time() + 90
    while len(clone.ran()) < 3 and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = None
    while (now := len(clone.ran())) != before:
        before = now
        time.sleep(2)  # the kernel and its workers notice and end
    assert 3 <= before < 20, "workers outlived the killed command"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(set(clone.ran())) == 20 and len(clone.ran()) <= 20 + 2  # at most the two in flight are run again
    one = (clone.figures / "accuracy.csv").read_bytes()
    assert clone.execute(["xs=0,1,2,3,4,5,6,7,8,9", "sleep=0.5"], force=True).state == "done"
    assert (clone.figures / "accuracy.csv").read_bytes() == one


def test_a_pack_makes_a_fresh_clone_train_nothing(clone, tmp_path, monkeypatch):
    assert clone.execute(tier="laptop").state == "done"
    laptop = clone.root / "figures/laptop/learning_to_learn"
    pack = pack_path(clone.root / "figures", "laptop", "learning_to_learn")
    assert pack.exists() and len(clone.ran()) == 4
    table, packed = (laptop / "01_tiny/accuracy.csv").read_bytes(), pack.read_bytes()

    monkeypatch.setenv("LTH_RUNS", str(tmp_path / "fresh"))
    for p in (laptop / "01_tiny").iterdir():
        p.unlink()
    assert clone.execute(tier="laptop").state == "done"
    assert (
        len(clone.ran()) == 4
        and (laptop / "01_tiny/accuracy.csv").read_bytes() == table
        and pack.read_bytes() == packed
    )

    other = START.replace("01_tiny", "02_other")  # a second notebook adds its trials to the pack
    write_notebook(
        clone.notebook.with_name("02_other.ipynb"),
        other,
        "rows = here.run([Tiny(x=7), Tiny(x=0, seed=100)])",
        "here.finish()",
    )
    entry = catalogue(clone.root)[1]
    assert execute(entry, Settings(clone.root, tier="laptop", workers=1)).state == "done" and len(clone.ran()) == 5
    from lth_companion.lab.store import read_pack

    assert len(read_pack(pack)) == 5
    clone.execute(["xs=0,9"], tier="laptop")  # x=1 is used by nobody now; x=0 and x=7 are
    assert len(read_pack(pack)) == 2 + 2 + 1


def test_a_long_sweep_packs_as_it_goes(clone, monkeypatch):
    monkeypatch.setenv("LTH_PACK_EVERY", "0.01")
    monkeypatch.setenv("LTH_RUNS", str(clone.root / "runs"))
    monkeypatch.chdir(clone.root)
    import tiny_trials

    here = Notebook("learning_to_learn", "01_tiny", tier="laptop")
    sizes = []
    monkeypatch.setattr(
        here,
        "pack",
        lambda: (
            Notebook.pack(here),
            sizes.append(pack_path(here.figures, "laptop", "learning_to_learn").stat().st_size),
        ),
    )
    here.run([tiny_trials.Tiny(x=x, sleep=0.2) for x in range(6)])
    assert len(sizes) >= 3 and sizes[0] < sizes[-1]


def test_force_trains_shared_trials_once_per_command(clone):
    clone.execute()
    write_notebook(
        clone.notebook.with_name("02_other.ipynb"), START.replace("01_tiny", "02_other"), RUN, "here.finish()"
    )
    forced, settings = str(clone.root / "forced"), Settings(clone.root, workers=1, force=True)
    for entry in catalogue(clone.root):
        assert execute(entry, settings, {}, forced=forced).state == "done"
    assert len(clone.ran()) == 8


def test_a_notebook_opened_without_arguments(clone, monkeypatch):
    """As in JupyterLab: the notebook's own folder, nothing injected."""
    monkeypatch.chdir(clone.notebook.parent)
    out = clone.root / "as_in_lab.ipynb"
    papermill.execute_notebook(
        str(clone.notebook), str(out), kernel_name="python3", progress_bar=False, cwd=str(clone.notebook.parent)
    )
    made = read_provenance(clone.figures)
    assert made["tier"] == "smoke" and made["trials"]["count"] == 4 and (clone.root / "runs/results").is_dir()
    assert any(
        "image/png" in o.get("data", {})
        for c in nbformat.read(out, 4).cells
        if c.cell_type == "code"
        for o in c.outputs
    )
    assert clone.execute().state == "unchanged"  # the command line sees the same provenance


def test_the_kernel_is_this_interpreter(clone, tmp_path, monkeypatch):
    """Even where another kernel is installed under the name python3."""
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    clone.write(
        START,
        f"import sys, os; assert sys.executable == {sys.executable!r} and os.environ['OMP_NUM_THREADS'] == '1',"
        " sys.executable",
        "here.finish()",
    )
    outcome = clone.execute()
    assert outcome.state == "done", outcome.text


def test_report_counts_only_what_provenance_vouches_for(clone):
    clone.execute()
    found = report(clone.root, "smoke")
    row = next(r for r in found.rows if r["claim"] == "headline-0.005")
    assert (
        row["n"] == 2 and row["measured"] == pytest.approx(1.0) and row["verdict"] == "undecided" and not found.left_out
    )
    lines = report_lines(found)
    assert len(lines) == len(found.rows) and all(line.count("\t") == 10 and "\n" not in line for line in lines)
    assert any(line.startswith("undecided\tlearning_to_learn/headline-0.005\t") for line in lines)
    page = report_page(found, catalogue(clone.root))
    assert (
        "src='learning_to_learn/01_tiny/accuracy.svg'" in page
        and "<script" not in page
        and page == report_page(found, catalogue(clone.root))
    )
    claims = clone.figures / "claims.json"
    claims.write_text(claims.read_text().replace("1.0", "9.0"))
    altered = report(clone.root, "smoke")
    assert {r["n"] for r in altered.rows} == {0} and "left out" in altered.left_out[0]


def test_a_claim_that_no_ledger_lists(clone, monkeypatch):
    monkeypatch.chdir(clone.root)
    here = Notebook("learning_to_learn", "01_tiny")
    with pytest.raises(ReproduceError, match="did you mean 'headline-0.005'"):
        here.claim("headline-0.05", [1.0], [100])
    with pytest.raises(ReproduceError, match="no notebook"):
        Notebook("learning_to_learn", "01_tin")
    with pytest.raises(ReproduceError, match="plain file name"):
        here._file("../x.csv")


def test_tables_hide_the_last_bits(tmp_path):
    import pandas as pd

    df = pd.DataFrame({"a": [0.1 + 0.2, 1e-17 - 1e-17, 12345678.0], "b": [[1, 2], None, True]})
    write_table(df, tmp_path / "a.csv")
    write_table(df.assign(a=[0.3, -0.0, 12345678.0]), tmp_path / "b.csv")
    assert (
        (tmp_path / "a.csv").read_bytes()
        == (tmp_path / "b.csv").read_bytes()
        == b'a,b\n0.3,"[1, 2]"\n0,\n1.23457e+07,True\n'
    )
    two = pd.DataFrame(
        [[1.0, 2.0]],
        columns=pd.MultiIndex.from_tuples([("x", "mean"), ("x", "sd")]),
        index=pd.Index(["s"], name="scorer"),
    )
    write_table(two, tmp_path / "c.csv")
    assert (tmp_path / "c.csv").read_text() == "scorer,x mean,x sd\ns,1,2\n"


# ---------------------------------------------------------------- what renders, and what only runs


@pytest.fixture
def copied(tmp_path, monkeypatch):
    "The package, copied: a folder whose modules may be changed."
    import shutil

    folder = tmp_path / "copy" / "lth_companion"
    shutil.copytree(provenance.package_folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    for room in (provenance, execution):
        monkeypatch.setattr(room, "package_folder", lambda: folder)

    def forget():
        [f.cache_clear() for f in (provenance.code_hash, provenance._draws_on, provenance.tables_hash)]

    forget()
    yield folder, forget
    monkeypatch.undo()
    forget()


def test_a_notebook_names_what_it_renders_with(copied):
    named = set(provenance.rendering(ROOT / "nbs/papers/granet/05_table.ipynb"))
    assert {
        "lab.notebooks",
        "lab.provenance",
        "lab.plots",
        "lab.style",
        "lab.claims",
        "lab.trials",
        "papers.granet",
    } <= named
    # 05 imports none of them itself
    assert not {n for n in named if n.startswith("methods.") or n in ("lab.cli", "lab.clusters")}, named


def test_comments_and_what_only_runs_leave_figures_alone(clone, copied):
    folder, forget = copied
    assert clone.execute().state == "done"

    def after(*changes):
        for name, text in changes:
            (folder / name).write_text((folder / name).read_text() + text)
        forget()
        return clone.execute().state

    assert (
        after(
            ("lab/cli.py", "\n# a comment\n"),
            ("lab/clusters.py", "\n# a comment\n"),
            ("lab/trials.py", "\n# a comment\n\n"),
            ("methods/supermasks.py", "\n# a comment\n"),
        )
        == "unchanged"
    )
    assert after(("lab/cli.py", "\nANSWER = 42\n"), ("methods/supermasks.py", "\nANSWER = 42\n")) == "unchanged"
    assert after(("lab/plots.py", "\nANSWER = 42  # but this draws\n")) == "done"
    assert after() == "unchanged" and clone.ran() == clone.ran()[:4]


def test_equal_outputs_keep_their_date(clone):
    clone.execute()
    before = json.loads((clone.figures / "provenance.json").read_text())
    clone.write(START, RUN, SHOW + "  # mended")
    assert clone.execute().state == "done"
    after = json.loads((clone.figures / "provenance.json").read_text())
    assert after["source"] != before["source"] and {k: v for k, v in after.items() if k != "source"} == {
        k: v for k, v in before.items() if k != "source"
    }
    clone.write(START, RUN, SHOW.replace('"accuracy")\nhere.figure', '"numbers")\nhere.figure'))
    time.sleep(1.1)
    assert (
        clone.execute().state == "done"
        and json.loads((clone.figures / "provenance.json").read_text())["date"] > before["date"]
    )


# ---------------------------------------------------------------- from trials alone


def test_rebuild_renders_what_is_there_and_trains_nothing(clone):
    missing = clone.execute(rebuild=True)
    assert (
        missing.state == "failed"
        and "4 of 4 trials are neither in the store nor in a pack, and --rebuild trains none" in missing.text
        and not clone.ran()
    )
    clone.execute()
    before = {p.name: p.read_bytes() for p in clone.figures.iterdir()}
    first, second = clone.execute(rebuild=True), clone.execute(rebuild=True)
    assert (first.state, first.text) == ("done", "rebuilt from 4 trials") and (second.state, second.text) == (
        "unchanged",
        "rebuilt before, and nothing has changed",
    )
    assert {p.name: p.read_bytes() for p in clone.figures.iterdir()} == before and len(clone.ran()) == 4
    (clone.figures / "accuracy.csv").write_text("x\n")
    assert (
        clone.execute(rebuild=True).state == "done"
        and (clone.figures / "accuracy.csv").read_bytes() == before["accuracy.csv"]
    )


@pytest.mark.parametrize(
    "does, cell",
    [
        ("makes", "from lth_companion.training.models import create\ncreate('lenet-300-100')"),
        ("trains", "from lth_companion.training.loop import train\ntrain(None, None)"),
        ("trains", "from lth_companion.training.cohorts import train_cohort\ntrain_cohort([], None)"),
        ("scores", "from lth_companion.methods.stacking import call\ncall(len, None, None)"),
        ("searches", "from lth_companion.methods.supermasks import search\nsearch(None, None, None, None)"),
    ],
)
def test_rebuild_refuses_networks(does, cell):
    code = cell.replace("\n", "; ")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"LTH_REBUILD": "1"}
    )
    assert f"ModelError: A notebook that is rebuilt from its trials {does} no network" in done.stderr


def test_outlines_are_counted_when_rebuilding(monkeypatch):
    from lth_companion.training.costs import dense_flops
    from lth_companion.training.models import create, outline

    expected = dense_flops(create("resnet-20", (3, 32, 32), width=0.25), (3, 32, 32))
    monkeypatch.setenv("LTH_REBUILD", "1")
    assert dense_flops(outline("resnet-20", (3, 32, 32), width=0.25), (3, 32, 32)) == expected
