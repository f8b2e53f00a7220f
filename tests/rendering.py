"""Render committed notebooks where a network cannot be had: an empty store, no data set, and every way to make,
score, prune, search or train one raises. For `test_render_alone`; `python tests/rendering.py PAPER/NOTEBOOK ...`
does it by hand and says what differs.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).parent.parent
LTH = [sys.executable, "-m", "lth_companion.lab.cli"]

GUARD = """
import importlib
REFUSED = {  # module -> names, each module before those that import from it
    "lth_companion.training.data": ["load"], "lth_companion.training.models": ["create"], "lth_companion.training.loop": ["train", "evaluate", "step"],
    "lth_companion.methods.stacking": ["call"], "lth_companion.methods.pruning": ["prune"], "lth_companion.training.cohorts": ["train_cohort"],
    "lth_companion.methods.supermasks": ["search", "first_scores", "drawn"]}

def refusing(name):
    def refuse(*args, **keywords): raise RuntimeError(f"{name} was called while a figure was drawn: give its number to a trial")
    return refuse

for module, names in REFUSED.items():
    for name in names: setattr(importlib.import_module(module), name, refusing(f"{module}.{name}"))
"""


def guarded(folder) -> dict:
    """An environment in which every Python process refuses networks and finds neither results nor data; its files
    lie in `folder`.
    """
    folder = pathlib.Path(folder)
    (folder / "sitecustomize.py").write_text(GUARD)
    own = {name: str(folder / name.lower()) for name in ("LTH_RUNS", "LTH_CACHE", "LTH_DATA")}
    for path in own.values():
        os.makedirs(path, exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LTH_")}
    return kept | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def render(names, environment, out) -> str:
    "Run notebooks (PAPER/NOTEBOOK) from the committed packs into `out`, two side by side; what the commands said."

    def run(some):
        command = [
            *LTH,
            "run",
            *some,
            "--tier",
            "laptop",
            "--rebuild",
            "--repo",
            str(ROOT),
            "--out",
            str(out),
            "--workers",
            "1",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        return "\n".join(pool.map(run, [part for part in (names[::2], names[1::2]) if part]))


def differing(name, out) -> list[str]:
    "The tables and pictures of a notebook that are missing, or not as committed, byte for byte."
    now, committed = (
        {p.name: p.read_bytes() for p in (folder / "laptop" / name).glob("*") if p.name != "provenance.json"}
        for folder in (pathlib.Path(out), ROOT / "figures")
    )
    return sorted(n for n in now.keys() | committed.keys() if now.get(n) != committed.get(n))


def refusals(code, environment) -> list[str]:
    "The lines that `code` prints under the guard."
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout.splitlines()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(render(sys.argv[1:], guarded(scratch), scratch + "/figures"))
        for name in sys.argv[1:]:
            print(name, differing(name, scratch + "/figures") or "as committed")
