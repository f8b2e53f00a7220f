"""The committed figures of the thesis's notebooks are drawn from their trials alone: with an empty store, without any data set, and where
making, scoring, pruning, searching or training a network raises, every table and picture comes out as it is committed."""
import os, pathlib, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAPER = "learning_to_learn"
COMMITTED = ROOT / "figures" / "laptop" / PAPER
NOTEBOOKS = sorted(p.parent.name for p in COMMITTED.glob("*/provenance.json"))
LTH = [sys.executable, "-m", "lth_companion.lab.cli"]

GUARD = '''
import importlib
REFUSED = {  # module -> names, each module before those that import from it
    "lth_companion.training.data": ["load"], "lth_companion.training.models": ["create"], "lth_companion.training.loop": ["train", "step"],
    "lth_companion.methods.stacking": ["call"], "lth_companion.methods.pruning": ["prune"], "lth_companion.training.cohorts": ["train_cohort"],
    "lth_companion.methods.supermasks": ["search"]}

def refusing(name):
    def refuse(*args, **keywords): raise RuntimeError(f"{name} was called while a figure was drawn: give its number to a trial")
    return refuse

for module, names in REFUSED.items():
    for name in names: setattr(importlib.import_module(module), name, refusing(f"{module}.{name}"))
'''

@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    "An environment in which every Python process refuses networks and finds neither results nor data."
    folder = tmp_path_factory.mktemp("guard")
    (folder / "sitecustomize.py").write_text(GUARD)
    own = {name: str(tmp_path_factory.mktemp(name.lower())) for name in ("LTH_RUNS", "LTH_CACHE", "LTH_DATA")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LTH_")}
    return kept | own | {"LTH_REBUILD": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}

CALLS = """
from lth_companion.methods.scorers import snip
from lth_companion.papers.learning_to_learn import StartTrial, datasets, find_masks, prune, start, thesis, train_cohort
from lth_companion.training.models import create
trial = thesis("standard snip U-MS", .1, data="digits")
for call in (lambda: create("lenet-300-100"), lambda: datasets.load("digits"), lambda: prune(None, snip, .1, []), lambda: train_cohort([], None),
             lambda: find_masks(trial, model=0), lambda: start(trial), lambda: StartTrial.run_group([StartTrial(data="digits")])):
    try: print("went through", call())
    except RuntimeError as error: print(error)
"""

def test_the_guard_refuses(guarded):
    done = subprocess.run([sys.executable, "-c", CALLS], env=guarded, capture_output=True, text=True, timeout=120)
    said = done.stdout.splitlines()
    assert len(said) == 7 and all("was called while a figure was drawn" in line for line in said), done.stdout + done.stderr

def files(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "provenance.json"}

@pytest.fixture(scope="module")
def rendered(guarded, tmp_path_factory):
    "The folder of all that the notebooks wrote, and what the two commands that ran them said, side by side."
    out = tmp_path_factory.mktemp("figures")
    def render(names):
        done = subprocess.run([*LTH, "run", *(f"{PAPER}/{n}" for n in names), "--tier", "laptop", "--rebuild", "--repo", str(ROOT), "--out", str(out), "--workers", "1"],
                              env=guarded, capture_output=True, text=True)
        return done.stdout + done.stderr
    with ThreadPoolExecutor(2) as pool: said = list(pool.map(render, (NOTEBOOKS[::2], NOTEBOOKS[1::2])))
    return out / "laptop" / PAPER, "\n".join(said)

@pytest.mark.slow
@pytest.mark.timeout(600)      # all notebooks are rendered in the first one's time: about 80 s on two idle cores
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_table_and_picture_comes_from_trials(rendered, name):
    folder, said = rendered
    assert (folder / name / "provenance.json").exists(), said[-2000:]
    now, committed = files(folder / name), files(COMMITTED / name)
    assert set(now) == set(committed) and len(now) > 3
    assert not [n for n in now if now[n] != committed[n]], said[-500:]

def test_all_notebooks_are_here():
    assert len(NOTEBOOKS) == 7
