"""What a machine's runs of the suite found, one file a machine: benchmarks/results/<machine>.json, a line a run.

A row is kept as [value, low, high]: a median and the range of what it is the median of. The rule: a ratio has
worsened if its median is worse than the median of the last five runs' medians by more than its spread, half its
range now or half their ranges (the median of those), whichever is wider.
"""

import json
import os
import pathlib
import re
import statistics

KEEP, USUAL = 20, 5


def worsened(row, runs, lower_is_better=True):
    """Whether `row` = [value, low, high] is worse than the same row of `runs` (oldest first) by more than the
    spread; and what it was, or None.
    """
    if not runs:
        return False, None
    runs = runs[-USUAL:]

    def half(r):
        return (r[2] - r[1]) / 2

    base, spread = statistics.median(r[0] for r in runs), max(half(row), statistics.median(map(half, runs)))
    return (row[0] - base if lower_is_better else base - row[0]) > spread, base


def machine_file(folder, cpu, cores, torch):
    "Named by what matters to a ratio; no host name."
    name = f"{cpu} {cores} cores torch {torch.partition('+')[0]}"
    return pathlib.Path(folder) / (re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") + ".json")


def read(path):
    "The runs at `path`, oldest first; none where there is no file."
    try:
        return json.loads(pathlib.Path(path).read_text())["runs"]
    except FileNotFoundError:
        return []


def keep(path, machine, run):
    "Add a whole run and forget those before the last `KEEP`; the file is written whole or not at all."
    path, runs = pathlib.Path(path), [*read(path), run][-KEEP:]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in runs)
    new = path.with_suffix(".new")
    new.write_text(f'{{"machine":{json.dumps(machine)},\n"runs":[\n{lines}\n]}}\n')
    os.replace(new, path)
