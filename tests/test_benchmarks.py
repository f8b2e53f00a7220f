"""benchmarks/: the rule that flags a ratio, the history's bounds, and which runs enter it. (The benchmarks
themselves: make bench.)
"""

import importlib.util
import json
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import history  # noqa: E402

STEADY = [[1.00, 0.95, 1.05], [1.02, 0.97, 1.07], [0.99, 0.94, 1.04]]


@pytest.mark.parametrize(
    "row, runs, lower, worse",
    [
        ([1.10, 1.05, 1.15], STEADY, True, True),  # beyond the usual by more than half of any range
        ([1.04, 0.99, 1.09], STEADY, True, False),  # within it
        ([1.10, 0.90, 1.30], STEADY, True, False),  # as far, but the run itself was noisy
        ([1.10, 1.05, 1.15], [[1.0, 0.8, 1.2]] * 3, True, False),  # as far, but it always was noisy
        ([0.80, 0.75, 0.85], STEADY, True, False),  # better
        ([0.80, 0.75, 0.85], STEADY, False, True),  # where more is better, worse
        ([1.10, 1.05, 1.15], STEADY, False, False),
        ([1.10, 1.05, 1.15], [], True, False),  # nothing to compare with
        ([4, 4, 4], [[3, 3, 3]] * 2, True, True),  # a count has no spread: one more is worse
        ([3, 3, 3], [[3, 3, 3]] * 2, True, False),
        ([1.10, 1.05, 1.15], [[1.0, 0.95, 1.05]] * 4 + [[2.0, 1.95, 2.05]], True, True),  # one odd run does not hide it
        # the last five say what is usual
        (
            [1.10, 1.05, 1.15],
            [[0.5, 0.45, 0.55]] * 20 + [[1.1, 1.05, 1.15]] * 5,
            True,
            False,
        ),
    ],
)
def test_the_rule(row, runs, lower, worse):
    assert history.worsened(row, runs, lower)[0] is worse


def test_a_history_is_short_and_a_line_a_run(tmp_path):
    path = tmp_path / "results" / "m.json"
    rows = {f"a-benchmark-{n}": [1.234, 1.111, 1.345] for n in range(60)}
    for n in range(30):
        history.keep(path, {"cpu": "x"}, {"date": str(n), "rows": rows})
    runs = history.read(path)
    assert [r["date"] for r in runs] == [str(n) for n in range(10, 30)] and runs[0]["rows"] == rows
    assert (
        len(path.read_text().splitlines()) == 20 + 3
        and path.stat().st_size < 100_000
        and not list(path.parent.glob("*.new"))
    )
    assert history.read(tmp_path / "none.json") == []


def test_a_machine_is_named_by_what_matters():
    assert (
        history.machine_file("results", "AMD EPYC 7763 64-Core (R)", 2, "2.13.0+cpu").as_posix()
        == "results/amd-epyc-7763-64-core-r-2-cores-torch-2.13.0.json"
    )


@pytest.fixture
def suite(tmp_path, monkeypatch):
    "benchmarks/run.py with two benchmarks of made-up values and a folder of its own."
    spec = importlib.util.spec_from_file_location("benchmark_suite", FOLDER / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    run.RESULTS, run.values = tmp_path, {"a": [1.0, 1.1, 0.9], "b": [2.0, 2.1, 1.9]}
    run.SUITE = {n: lambda quick, n=n: run.note(f"{n}-row", "made up", run.Ratio(run.values[n]), 3) for n in "ab"}

    def go(*args):
        for kept in (run.ROWS, run.PAST, run.WORSE):
            kept.clear()
        run.main(args)
        return [len(json.loads(p.read_text())["runs"]) for p in tmp_path.glob("*.json")]

    run.go = go
    return run


def test_only_whole_runs_enter_the_history(suite, capsys):
    assert suite.go("a") == suite.go("--quick") == [] and "stays as it is" in capsys.readouterr().out
    assert suite.go() == [1] and suite.go() == [2]
    suite.values["a"] = [1.5, 1.45, 1.55]
    capsys.readouterr()
    assert suite.go("a") == [2]  # it is compared, though
    out = capsys.readouterr().out
    assert (
        "ok   WORSE than 1.000 a-row" in out
        and "1.500 [1.450, 1.550] of 3" in out
        and "worse than before by more than the spread: a-row" in out
    )
    row = suite.history.read(next(suite.RESULTS.glob("*.json")))[-1]
    assert row["rows"] == {"a-row": [1.0, 0.9, 1.1], "b-row": [2.0, 1.9, 2.1]} and set(row) == {
        "date",
        "commit",
        "load",
        "rows",
    }


def test_a_missed_bound_is_an_exit_code(suite):
    suite.values["b"] = [4.0, 4.1, 3.9]
    with pytest.raises(SystemExit, match="missed: b-row"):
        suite.go()
