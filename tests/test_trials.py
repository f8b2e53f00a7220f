"""Chapter trials: identity, store, packs and sweeps, with real worker processes, real kills and real damage."""

import concurrent.futures
import lzma
import math
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest
from pydantic import BaseModel

from lth_companion.lab import executors
from lth_companion.lab import store as T_store
from lth_companion.lab import sweeps as T_sweeps
from lth_companion.lab import trials as T
from lth_companion.lab.store import Store, StoreError
from lth_companion.lab.sweeps import Idle, run
from lth_companion.lab.trials import Trial

HERE = pathlib.Path(__file__).parent


class Logged(Trial):
    "Writes a line for each execution, then does what `action` says; the one that `hold` names waits first."

    kind = "test-logged"
    number: int = 0
    folder: str
    seconds: float = 0.0
    action: str = "ok"
    key: str = ""

    def group_key(self):
        return self.key or self.hash

    def cost(self):
        return max(self.seconds, 0.001)

    @classmethod
    def run_group(cls, trials):
        results = []
        for t in trials:
            with open(pathlib.Path(t.folder) / "executions", "a") as log:
                log.write(f"{t.number} {os.getpid()}\n")
            while held(t.folder) == t.number:
                time.sleep(0.01)
            time.sleep(t.seconds)
            if t.action == "raise":
                raise ValueError(f"number {t.number} is not to be run")
            if t.action == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if t.action == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            results.append({"square": t.number**2, "root": math.sqrt(t.number), "meta": {"pid": os.getpid()}})
        return results


class Threads(Trial):
    "Tells how many threads torch has in the process that runs it."

    kind = "test-threads"
    number: int = 0

    @classmethod
    def run_group(cls, trials):
        import torch

        time.sleep(0.2)
        return [
            {
                "threads": torch.get_num_threads(),
                "omp": os.environ.get("OMP_NUM_THREADS"),
                "store": str(T_store.active_store()),
                "pid": os.getpid(),
            }
            for _ in trials
        ]


def hold(folder, number):
    "Keep a trial from its end: a sweep has not ended when what is to disturb it comes late."
    (new := pathlib.Path(folder) / "hold.new").write_text(str(number))
    new.replace(pathlib.Path(folder) / "hold")  # at once: another sweep may be reading it


def release(folder):
    (pathlib.Path(folder) / "hold").unlink()


def held(folder):
    try:
        return int((pathlib.Path(folder) / "hold").read_text())
    except FileNotFoundError:
        return None


def gate(path):
    "A call that ends when `path` is there."
    while not path.exists():
        time.sleep(0.01)


def kill_holder(folder, store, trials):
    "Kill the worker of the trial that is held, once all that it ran before is stored; its process id."
    log, number = folder / "executions", held(folder)
    until(lambda: log.exists() and number in executions(folder))
    ran = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    pid = dict(ran)[number]
    until(lambda: all(trials[n] in store for n, p in ran if p == pid and n != number))
    os.kill(pid, signal.SIGKILL)
    release(folder)
    return pid


def logged(folder, count, **fields):
    return [Logged(number=n, folder=str(folder), **fields) for n in range(count)]


def executions(folder):
    return [int(line.split()[0]) for line in (folder / "executions").read_text().splitlines()]


def quiet(trials, store, **options):
    return run(trials, store, progress="silent", **options)


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def sweep(folder, store, count=30, seconds=0.05, workers=2, **options):
    "A sweep in a process of its own, as a user's script would run it."
    code = f"""
        import sys; sys.path.insert(0, {str(HERE)!r})
        from test_trials import *
        if __name__ == "__main__":
            print(quiet(logged({str(folder)!r}, {count}, seconds={seconds}), {str(store)!r}, workers={workers}).attrs["ran"])
    """
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    # also where pytest runs in the background
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE.parent,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def shown(claim, tries=5):
    "A claim of speed is shown by one try of some: a busy machine only ever adds."
    return any(claim(n) for n in range(tries))


# ---- identity


class Recipe(BaseModel, frozen=True, extra="forbid"):
    lr: float = 0.1
    steps: int = 100


class Plain(Trial):
    kind = "test-plain"
    density: float
    recipe: Recipe = Recipe()
    layers: dict[str, float] = {}
    name: str = "a"
    either: int | float | str | None = None


def test_identity_is_pinned():
    "A change of this hash would orphan every stored result."
    assert Plain(density=0.5).identity == {"kind": "test-plain", "fields": {"density": 0.5}, "versions": {}}
    assert (
        Plain(density=0.5, recipe=Recipe(lr=0.05), layers={"b": 1, "a": 0.25}).hash
        == "570c5f356ed0b1d8166424eb81fdc4172539559d709717051a8fab07521520de"
    )


def test_equal_values_have_one_identity():
    assert Plain(density=1).hash == Plain(density=1.0).hash == Plain(density=np.float64(1)).hash
    assert Plain(density=1, either=2).hash == Plain(density=1, either=2.0).hash
    assert Plain(density=1, recipe={"lr": 0.1}).hash == Plain(density=1).hash
    assert Plain(density=1, layers={"a": 1, "b": 2}).hash == Plain(density=1, layers={"b": 2, "a": 1}).hash
    assert len({Plain(density=1, either=e).hash for e in (None, 0, 1, "1", 0.1, "0.1")}) == 6


def test_later_fields_change_nothing(monkeypatch):
    monkeypatch.delitem(T.KINDS, "test-plain")

    class Grown(Recipe):
        momentum: float = 0.0

    class Later(Trial):
        kind = "test-plain"
        density: float
        recipe: Grown = Grown()
        layers: dict[str, float] = {}
        name: str = "a"
        either: int | float | str | None = None
        extra: list[int] = [1, 2]

    for fields in (
        {"density": 0.5},
        {"density": 1, "recipe": {"lr": 0.01}},
        {"density": 1, "name": "b", "layers": {"x": 0.5}},
    ):
        assert Later(**fields).hash == Plain(**fields).hash
    assert Later(density=1, extra=[1]).hash != Later(density=1).hash
    assert T.defaults(Later) == {
        "recipe": {},
        "layers": {},
        "name": "a",
        "either": None,
        "extra": [1, 2],
        "recipe.lr": 0.1,
        "recipe.steps": 100,
        "recipe.momentum": 0,
    }


def test_versions_count_only_where_used():
    class Versioned(Trial):
        kind = "test-versioned"
        scorer: str = "snip"

        def components(self):
            return {"data": 1} | ({"grasp": 2} if self.scorer == "grasp" else {})

    old = Versioned().hash, Versioned(scorer="grasp").hash
    Versioned.components = lambda self: {"data": 1} | ({"grasp": 3} if self.scorer == "grasp" else {})
    assert Versioned().hash == old[0] and Versioned(scorer="grasp").hash != old[1]


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"density": math.nan}, "density is nan"),
        ({"density": math.inf}, "density is inf"),
        ({"density": 1, "recipe": {"lr": math.nan}}, "recipe.lr is nan"),
        ({"density": 1, "layers": {"fc": -math.inf}}, "layers.fc is -inf"),
        ({"density": "x"}, "density"),
        ({"density": 1, "sed": 3}, "sed: Extra inputs are not permitted"),
        ({}, "density: Field required"),
    ],
)
def test_refused(fields, says):
    with pytest.raises(ValueError) as error:
        Plain(**fields)
    assert says in T_sweeps.reason(error.value) and "\n" not in T_sweeps.reason(error.value)


def test_subclass_of_a_nested_model_is_refused():
    class Other(Recipe):
        lr: float = 0.2

    with pytest.raises(ValueError, match="rebuilt"):
        Plain(density=1, recipe=Other()).hash


def test_frozen_and_copied():
    trial = Plain(density=0.5)
    trial.hash
    with pytest.raises(ValueError):
        trial.density = 1
    assert trial.model_copy(update={"density": 0.25}).hash == Plain(density=0.25).hash
    with pytest.raises(ValueError):
        trial.model_copy(update={"density": math.nan})


def test_a_kind_is_taken_once():
    with pytest.raises(TypeError, match="already taken by .*:Idle"):
        type("Thief", (Trial,), {"kind": "idle", "__module__": __name__, "__qualname__": "Thief"})
    assert T.KINDS["idle"] is Idle


# ---- the store


def test_result_comes_back_as_it_was(tmp_path):
    store, trial = Store(tmp_path), Plain(density=1)
    store.put(
        trial,
        {
            "losses": np.array([0.1, np.nan]),
            "best": float("-inf"),
            "n": np.int64(3),
            "word": "nan",
            "deep": {"a": [(1, 2)]},
        },
    )
    got = store.get(trial)
    assert got["losses"][0] == 0.1 and math.isnan(got["losses"][1]) and got["best"] == -math.inf
    assert (got["n"], got["word"], got["deep"]) == (3, "nan", {"a": [[1, 2]]})
    assert (
        trial in store
        and store.hashes() == [trial.hash]
        and Plain(density=2) not in store
        and store.get(Plain(density=2)) is None
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b[:-1],
        lambda b: os.urandom(300),
        *[
            lambda b, at=at: b[: int(at * len(b))] + bytes([b[int(at * len(b))] ^ 1]) + b[int(at * len(b)) + 1 :]
            for at in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999)
        ],
    ],
)
def test_damage_is_found_reported_and_mended(tmp_path, change):
    trials = logged(tmp_path, 3)
    before = quiet(trials, tmp_path / "s")
    store = Store(tmp_path / "s")
    damage(store._path("results", trials[1].hash), change)
    with pytest.warns(UserWarning, match="is damaged .* computed again"):
        after = quiet(trials, store)
    assert after.attrs["ran"] == 1 and executions(tmp_path) == [0, 1, 2, 1]
    assert after.to_csv() == before.to_csv() and len(list((tmp_path / "s/damaged").iterdir())) == 1


def test_a_result_under_another_name_is_not_read(tmp_path):
    store, (a, b) = Store(tmp_path), (Plain(density=0.25), Plain(density=0.5))
    store.put(a, {"x": 1})
    path = store._path("results", b.hash)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(store._path("results", a.hash).read_bytes())
    with pytest.warns(UserWarning, match="damaged"):
        assert store.get(b) is None
    assert store.get(a) == {"x": 1}


@pytest.mark.parametrize("where", ["file", "/proc/store", "locked"])
def test_unwritable_store(tmp_path, where):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    if where == "locked" and os.getuid() == 0:
        pytest.skip("root may write anywhere")
    for root in (tmp_path / where, tmp_path / where / "deeper"):
        with pytest.raises(StoreError, match="cannot be written .* LTH_RUNS") as error:
            quiet(logged(tmp_path, 1), root)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executions").exists()  # said before any work


def test_a_full_disk_loses_nothing_finished(tmp_path, monkeypatch):
    real, written = os.replace, []

    def full(a, b):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(b)
        real(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space left on device"):
        quiet(logged(tmp_path, 6), tmp_path / "s")
    monkeypatch.undo()
    assert not list((tmp_path / "s").rglob("*.tmp"))
    assert quiet(logged(tmp_path, 6), tmp_path / "s").attrs["cached"] == 3


def test_memo(tmp_path):
    store = Store(tmp_path)
    assert store.memo("tickets", {"digest": "ab", "lr": 0.1}) is None
    store.memo_put("tickets", {"digest": "ab", "lr": 0.1}, {"accuracy": [1.5, math.nan]})
    assert store.memo("tickets", {"lr": 0.1, "digest": "ab"})["accuracy"][0] == 1.5
    assert (
        store.memo("tickets", {"lr": 0.2, "digest": "ab"}) is store.memo("others", {"lr": 0.1, "digest": "ab"}) is None
    )
    assert store.hashes() == []
    with pytest.raises(ValueError, match="namespace"):
        store.memo("../x", 1)
    damage(next((tmp_path / "memo").rglob("*.json")), lambda b: b.replace(b"1.5", b"2.5"))
    with pytest.warns(UserWarning, match="damaged"):
        assert store.memo("tickets", {"digest": "ab", "lr": 0.1}) is None


# ---- packs


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_packs_of_equal_results_are_byte_equal(tmp_path, suffix):
    trials = logged(tmp_path, 40)
    quiet(trials, tmp_path / "a")
    quiet(random.Random(0).sample(trials, 40), tmp_path / "b", workers=2)
    packs = [tmp_path / f"{s}.jsonl.{suffix}" for s in "ab"]
    for store, pack in zip("ab", packs):
        assert Store(tmp_path / store).pack(pack) == 40
    assert packs[0].read_bytes() == packs[1].read_bytes()
    reader = Store(tmp_path / "c")
    assert reader.attach(packs[0]) == 40
    table = quiet(trials, reader)
    assert table.attrs["cached"] == 40 and table.to_csv() == quiet(trials, tmp_path / "a").to_csv()
    reader.pack(tmp_path / f"again.{suffix}", trials)
    assert (tmp_path / f"again.{suffix}").read_bytes() == packs[0].read_bytes()
    assert not (tmp_path / "c").exists()  # a pack is only read


def test_force_skips_packs_and_store(tmp_path):
    trials = logged(tmp_path, 3)
    quiet(trials, tmp_path / "a")
    Store(tmp_path / "a").pack(tmp_path / "p.xz", trials[:2])
    reader = Store(tmp_path / "b")
    reader.attach(tmp_path / "p.xz")
    assert quiet(trials, reader).attrs["ran"] == 1
    assert quiet(trials, reader, force=True).attrs["ran"] == 3 and executions(tmp_path) == [0, 1, 2, 2, 0, 1, 2]
    with pytest.raises(StoreError, match="1 of 1 trials to pack have no result"):
        reader.pack(tmp_path / "q.xz", ["0" * 64])


def test_a_damaged_pack_gives_what_is_whole(tmp_path):
    store, trials = (
        Store(tmp_path / "a"),
        [Plain(density=d, layers={str(i): random.random() for i in range(50)}) for d in range(1, 301)],
    )
    for t in trials:
        store.put(t, {"x": [random.random() for _ in range(50)]})
    pack = tmp_path / "p.xz"
    store.pack(pack)
    whole = pack.read_bytes()

    def attach(data):
        pack.write_bytes(data)
        fresh = Store(tmp_path / "b")
        with pytest.warns(UserWarning, match="pack .* is damaged: .* git checkout"):
            count = fresh.attach(pack)
        assert all(fresh.get(t) in (None, store.get(t)) for t in trials)
        return count

    assert 0 < attach(whole[: len(whole) // 2]) < 300
    middle = len(whole) // 2
    assert 0 < attach(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]) < 300
    assert attach(b"not a pack") == 0
    lines = lzma.decompress(whole).splitlines(keepends=True)
    lines[7] = lines[7].replace(b'"x":[0', b'"x":[1')
    assert attach(lzma.compress(b"".join(lines))) == 299
    with pytest.raises(StoreError, match="restore it"):
        Store(tmp_path).attach(tmp_path / "missing.xz")


# ---- running


def test_rows_in_the_order_asked(tmp_path):
    trials = logged(tmp_path, 4)
    table = quiet([trials[2], trials[0], trials[2], trials[3]], tmp_path / "s")
    assert table["number"].tolist() == [2, 0, 2, 3] and table["square"].tolist() == [4, 0, 4, 9]
    assert list(table.columns) == ["number", "folder", "seconds", "action", "key", "root", "square", "hash", "failed"]
    assert {k: table.attrs[k] for k in ("distinct", "cached", "ran", "failed")} == {
        "distinct": 3,
        "cached": 0,
        "ran": 3,
        "failed": 0,
    }
    assert len(quiet([], tmp_path / "s")) == 0
    meta = Store(tmp_path / "s").record(trials[0])["meta"]
    assert meta["pid"] == os.getpid() and meta["seconds"] >= 0 and "date" in meta


def test_nested_fields_and_clashing_keys(tmp_path):
    class Clash(Trial):
        kind = "test-clash"
        density: float
        recipe: Recipe = Recipe()

        @classmethod
        def run_group(cls, trials):
            return [{"density": t.density / 2, "loss": math.nan} for t in trials]

    for _ in range(2):
        table = quiet([Clash(density=0.5)], tmp_path)
        assert list(table.columns) == [
            "density",
            "recipe.lr",
            "recipe.steps",
            "result.density",
            "loss",
            "hash",
            "failed",
        ]
        assert table["result.density"][0] == 0.25 and math.isnan(table["loss"][0]) and table["failed"][0] is None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_trial_fails_alone_and_is_tried_again(tmp_path, workers):
    trials = logged(tmp_path, 9, key="one")
    trials[4] = trials[4].model_copy(update={"action": "raise"})
    table = quiet(trials, tmp_path / "s", workers=workers)
    assert table["failed"].tolist() == [None] * 4 + ["number 4 is not to be run"] + [None] * 4
    assert table["square"].dropna().tolist() == [0, 1, 4, 9, 25, 36, 49, 64] and table.attrs["failures"] == {
        trials[4].hash: "number 4 is not to be run"
    }
    assert "Traceback" in (tmp_path / "s/failed" / f"{trials[4].hash}.txt").read_text()
    again = quiet(trials, tmp_path / "s", workers=workers)
    assert (again.attrs["cached"], again.attrs["failed"]) == (8, 1)


@pytest.mark.parametrize(
    "gives, says",
    [([{}, {}], "2 results for 1 trials"), ([{"x": object()}], "not JSON"), ([3], "get"), (None, "NoneType")],
)
def test_bad_results_are_failures(tmp_path, gives, says):
    class Bad(Trial):
        kind = "test-bad"

        @classmethod
        def run_group(cls, trials):
            return gives

    assert says in quiet([Bad()], tmp_path)["failed"][0]


def test_workers_have_one_thread_and_know_the_store(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    table = quiet([Threads(number=n) for n in range(4)], tmp_path, workers=2)
    assert table["threads"].tolist() == [1] * 4 and table["omp"].tolist() == ["1"] * 4
    assert os.getpid() not in set(table["pid"]) and "OMP_NUM_THREADS" not in os.environ
    assert set(table["store"]) == {f"Store('{tmp_path}')"}
    assert set(quiet([Threads()], tmp_path, force=True)["store"]) == {"None"} and T_store.active_store() is None


def test_one_thread_in_process_too(tmp_path):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert quiet([Threads(number=9)], tmp_path)["threads"][0] == 1 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_worker_that_dies_costs_only_its_trial(tmp_path):
    trials = logged(tmp_path, 12, key="one", seconds=0.01)
    trials[5] = trials[5].model_copy(update={"action": "die"})
    table = quiet(trials, tmp_path / "s", workers=2)
    assert [n for n, why in enumerate(table["failed"]) if why] == [5] and "died three times" in table["failed"][5]
    assert table["square"].isna().sum() == 1
    ran = executions(tmp_path)
    assert ran.count(5) == 3 and max(ran.count(n) for n in range(12) if n != 5) <= 2
    assert trials[5] not in Store(tmp_path / "s")


def test_a_killed_worker_is_replaced(tmp_path):
    trials, store = logged(tmp_path, 24, seconds=0.05), Store(tmp_path / "s")
    hold(tmp_path, 6)
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_holder, tmp_path, store, trials)
        table = quiet(trials, store, workers=2)
        assert killed.result() != os.getpid()
    assert table["failed"].isna().all() and table["square"].tolist() == [n**2 for n in range(24)]
    assert sorted(executions(tmp_path)) == sorted([*range(24), 6])  # the trial in flight, once more


def test_workers_that_cannot_start_say_so(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from lth_companion.lab.sweeps import Idle, run\nrun([Idle(number=n) for n in range(2)],"
        f" {str(tmp_path / 's')!r}, workers=2)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
    )
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(
        "RuntimeError: The worker processes cannot start: in a script"
    )


def test_sweep_killed_and_resumed(tmp_path):
    """kill -9 of the parent: workers end by themselves, finished trials are not run again, the table is the
    uninterrupted one's.
    """
    hold(tmp_path, 39)
    process, store = sweep(tmp_path, tmp_path / "s", count=40, seconds=0.1), Store(tmp_path / "s")
    until(lambda: len(store.hashes()) >= 8)
    process.kill()
    process.wait()
    workers = {int(line.split()[1]) for line in (tmp_path / "executions").read_text().splitlines()}
    until(lambda: not any(map(alive, workers)))
    release(tmp_path)
    finished, started = set(store.hashes()), executions(tmp_path)
    assert 8 <= len(finished) < 40
    trials = logged(tmp_path, 40, seconds=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing half-written is found
        table = quiet(trials, store, workers=2)
    assert table.attrs["cached"] == len(finished) and table.attrs["ran"] == 40 - len(finished)
    resumed = executions(tmp_path)[len(started) :]
    assert sorted(resumed) == [t.number for t in trials if t.hash not in finished]
    assert table.to_csv() == quiet(trials, tmp_path / "fresh", workers=2).to_csv()


def test_two_runs_on_one_store(tmp_path):
    "Nothing is lost, and nothing is run twice."
    (tmp_path / "a").mkdir()
    both = [sweep(tmp_path, tmp_path / "s", count=40, seconds=0.1, workers=w) for w in (2, 1)]
    output = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0], output
    assert sorted(executions(tmp_path)) == list(range(40))
    assert sum(int(out) for out, _ in output) == 40
    assert quiet(logged(tmp_path, 40, seconds=0.1), tmp_path / "s").attrs["cached"] == 40


def test_a_killed_run_gives_its_claims_back(tmp_path):
    process = sweep(tmp_path, tmp_path / "s", count=2, seconds=600, workers=2)
    until(lambda: (tmp_path / "executions").exists() and len(executions(tmp_path)) == 2)
    store, trials = Store(tmp_path / "s"), logged(tmp_path, 2, seconds=600)
    assert not store.claim(trials[0]) and store.claim("f" * 64) and store.claim("f" * 64, on=False)
    process.kill()
    process.wait()
    assert store.claim(trials[0]) and store.claim(trials[1])
    for t in trials:
        store.claim(t, on=False)


@pytest.fixture
def ctrl_c():
    "Ctrl-C as in the foreground; as it was afterwards."
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a run puts it back
    signal.signal(signal.SIGINT, old)


def test_interrupt_inside_a_trial(tmp_path, ctrl_c):
    trials = logged(tmp_path, 6)
    trials[3] = trials[3].model_copy(update={"action": "interrupt", "seconds": 0.01})
    trials = trials[:3] + trials[4:] + [trials[3]]
    with pytest.raises(KeyboardInterrupt):
        quiet(trials, tmp_path / "s")
    assert executions(tmp_path) == [3] and Store(tmp_path / "s").hashes() == []  # dearest first
    assert quiet(trials[:5], tmp_path / "s").attrs["ran"] == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupt_keeps_what_ended(tmp_path, workers, capsys, ctrl_c):
    trials, seen = logged(tmp_path, 30, seconds=0.05), []

    def stop(trial, result):
        seen.append(trial.number)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        quiet(trials, tmp_path / "s", workers=workers, on_done=stop)
    assert f"Interrupted: {len(seen)} of 30 trials are stored" in capsys.readouterr().err
    assert len(Store(tmp_path / "s").hashes()) == len(set(seen)) == len(seen) >= 5
    if workers == 2:
        assert time.monotonic() - start < 20
    assert quiet(trials, tmp_path / "s").attrs["cached"] == len(seen)


def test_ctrl_c_at_random_moments(tmp_path):
    "In another process, by the signal that a terminal sends: nothing stored is lost, nothing finished is run again."
    generator = random.Random(1)
    for _ in range(4):
        hold(tmp_path, 99)
        process = sweep(tmp_path, tmp_path / "s", count=100, seconds=0.05)
        before = len(Store(tmp_path / "s").hashes())
        until(lambda before=before: len(Store(tmp_path / "s").hashes()) > before)
        time.sleep(generator.uniform(0, 0.3))
        process.send_signal(signal.SIGINT)
        release(tmp_path)
        _, error = process.communicate(timeout=120)
        assert process.returncode != 0 and "the same call goes on from there" in error
    table = quiet(logged(tmp_path, 100, seconds=0.05), tmp_path / "s", workers=2)
    ran = executions(tmp_path)
    assert (
        table["square"].tolist() == [n**2 for n in range(100)]
        and len(ran) <= 100 + 4 * 2
        and set(ran) == set(range(100))
    )


def test_a_class_of_a_notebook_cell_runs_here_and_says_so(tmp_path, capsys):
    class Cell(Trial):
        kind = "test-cell"
        number: int

        @classmethod
        def run_group(cls, trials):
            return [{"pid": os.getpid()} for _ in trials]

    table = quiet([Cell(number=n) for n in range(3)] + logged(tmp_path, 3), tmp_path / "s", workers=2)
    assert set(table["pid"].dropna()) == {os.getpid()} and table["square"].dropna().tolist() == [0, 1, 4]
    assert (
        capsys.readouterr().err == "Some trials run in this process: Cell is defined in a notebook cell or function.\n"
    )


class Picky(Logged):
    kind = "test-picky"

    def here_only(self):
        return "it is of the moment" if self.number == 1 else ""


def test_here_only(tmp_path, capsys):
    trials = [Picky(number=n, folder=str(tmp_path)) for n in range(3)]
    quiet(trials, tmp_path / "s", workers=2)
    pids = [Store(tmp_path / "s").record(t)["meta"]["pid"] for t in trials]
    assert [p == os.getpid() for p in pids] == [False, True, False] and "it is of the moment" in capsys.readouterr().err


def test_a_worker_with_other_code_refuses():
    trial = Logged(folder=".")
    (outcome,) = executors.run_there("test_trials:Logged", [("0" * 64, T.dumps(trial.description()))])
    assert "install the same code on every machine" in outcome["failed"]
    (outcome,) = executors.run_there("no_such_module:Logged", [(trial.hash, T.dumps(trial.description()))])
    assert "no_such_module" in outcome["failed"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: concurrent.futures.ThreadPoolExecutor(3),
        lambda: concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")),
    ],
)
def test_any_executor(tmp_path, make):
    with make() as executor:
        table = quiet(logged(tmp_path, 12), tmp_path / "s", executor=executor)
        assert table["square"].tolist() == [n**2 for n in range(12)] and executor.submit(int, 3).result() == 3


def test_a_given_executor_that_breaks_says_so(tmp_path):
    trials = logged(tmp_path, 3)
    trials[2] = trials[2].model_copy(update={"action": "die"})
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        with pytest.raises(RuntimeError, match="executor has lost its workers"):
            quiet(trials, tmp_path / "s", executor=executor)
    assert quiet(trials[:2], tmp_path / "s").attrs["cached"] == 2


def test_dask(tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert T_sweeps.places(client.get_executor()) == 2
        table = quiet(logged(tmp_path, 12, key="one"), tmp_path / "s", executor=client.get_executor())
    assert table["square"].tolist() == [n**2 for n in range(12)] and table["failed"].isna().all()
    assert table.to_csv() == quiet(logged(tmp_path, 12, key="one"), tmp_path / "t").to_csv()


@pytest.mark.parametrize(
    "count, workers, sizes",
    [
        (16, 1, [16]),
        (16, 2, [8, 8]),
        (20, 2, [10, 10]),
        (48, 2, [16, 16, 8, 8]),
        (5, 2, [3, 2]),
        (1, 4, [1]),
        (32, 4, [8, 8, 8, 8]),
        (0, 2, []),
    ],
)
def test_groups(count, workers, sizes):
    trials = logged(".", count, key="one")
    parts = T_sweeps.groups(trials, workers)
    assert sorted(map(len, parts), reverse=True) == sizes
    assert sorted(t.number for p in parts for t in p) == list(range(count))


def test_groups_dearest_first_and_keys_apart():
    trials = logged(".", 3, key="a", seconds=1) + logged(".", 3, key="b", seconds=5) + [Idle(seconds=2)]
    parts = T_sweeps.groups(trials)
    assert [(type(p[0]).__name__, len(p)) for p in parts] == [("Logged", 3), ("Logged", 3), ("Idle", 1)] and parts[0][
        0
    ].key == "b"


def test_progress_lines(tmp_path, capsys, monkeypatch):
    quiet(logged(tmp_path, 2), tmp_path / "s")
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(T_sweeps.time, "monotonic", lambda: next(clock))
    run(logged(tmp_path, 40), tmp_path / "s", progress="plain")
    lines = capsys.readouterr().out.splitlines()
    assert (
        5 < len(lines) < 38
        and lines[-1].startswith("40/40 trials (2 cached, ")
        and all("left" in line for line in lines[:-1])
    )
    run(logged(tmp_path, 40), tmp_path / "s")
    assert capsys.readouterr().out == ""  # nothing to do, nothing to show


def test_progress_bar(tmp_path):
    run(logged(tmp_path, 3), tmp_path / "s", progress="bar")


def test_estimate(tmp_path):
    trials = logged(tmp_path, 4, seconds=0.01)
    quiet(trials[:1], tmp_path / "s")
    assert T_sweeps.estimate(trials + trials, tmp_path / "s") == {
        "trials": 8,
        "distinct": 4,
        "cached": 1,
        "to_run": 3,
        "core_seconds": pytest.approx(0.03),
    }


# ---- cost


def test_torch_is_not_imported():
    code = "import sys, lth_companion.lab.trials; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent).stdout
        == "False\n"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_overhead_of_a_trial(tmp_path, workers):
    def claim(n):
        trials, times = [Idle(number=n) for n in range(400)], []
        quiet(trials, tmp_path / str(n), workers=workers, on_done=lambda *_: times.append(time.perf_counter()))
        return (times[-1] - times[20]) / (len(times) - 21) < 0.005  # seconds a trial, workers up

    assert shown(claim)


def test_a_large_store_is_listed_fast(tmp_path):
    store, line = Store(tmp_path), T_store.seal({"hash": "", "trial": {}, "result": {"x": 1}})
    for n in range(10_000):
        T_store.write_file(store._path("results", T.digest(n)), line)

    def claim(_):
        start = time.perf_counter()
        assert len(store.hashes()) == 10_000
        return time.perf_counter() - start < 1  # 100,000 in ten seconds

    assert shown(claim)


# ---- small groups share a call


class Caller(concurrent.futures.Executor):
    """Runs what it is given here, as an executor whose call is worth `worth` seconds of work; `calls` are the
    trials of each; `lose` of the first are lost.
    """

    def __init__(self, worth, lose=0):
        self.worth, self.lose, self.calls, self._max_workers = worth, lose, [], 2

    def submit(self, fn, parts, plugins, root):
        self.calls.append([len(rows) for _, rows in parts])
        future = concurrent.futures.Future()
        if len(self.calls) <= self.lose:
            future.set_exception(RuntimeError("gone"))
        else:
            future.set_result(fn(parts, plugins, root))
        return future


def test_small_groups_share_a_call(tmp_path):
    trials = [Idle(number=n) for n in range(60)] + [Idle(number=n, seconds=0.1) for n in range(3)]
    many, one = Caller(0.05), Caller(0.0)
    rows = quiet(trials, tmp_path / "a", executor=many)
    assert (
        rows.drop(columns="failed").equals(quiet(trials, tmp_path / "b", executor=one).drop(columns="failed"))
        and rows["failed"].isna().all()
    )
    assert many.calls[:3] == [[1]] * 3 and one.calls == [[1]] * 63  # the dear ones go alone
    sizes = [len(c) for c in many.calls]
    # few calls, small at the end
    assert sum(sizes) == 63 and max(sizes) == 15 and sizes[-4:] == [1] * 4 and len(sizes) < 25, sizes
    dearer = Caller(0.05)
    quiet([Idle(number=n, seconds=0.009) for n in range(60)], tmp_path / "c", executor=dearer)
    assert max(map(len, dearer.calls)) == 5  # at most what a call is worth


def test_of_a_lost_call_each_trial_is_run_alone(tmp_path):
    lost = Caller(0.05, lose=1)
    rows = quiet(logged(tmp_path, 40), tmp_path / "s", executor=lost)
    assert (
        rows["square"].tolist() == [n**2 for n in range(40)]
        and rows["failed"].isna().all()
        and sorted(executions(tmp_path)) == list(range(40))
    )
    first = len(lost.calls[0])
    assert first == 10 and lost.calls.count([1]) >= first and rows.attrs["ran"] == 40


class Early(concurrent.futures.ThreadPoolExecutor):
    "Two workers that may have their next group in hand; `open` are the groups under way at each call."

    ahead = 0.1

    def __init__(self):
        super().__init__(2)
        self.open, self.futures = [], []

    def submit(self, fn, *args):
        self.open.append(1 + sum(not f.done() for f in self.futures))
        self.futures.append(super().submit(fn, *args))
        return self.futures[-1]


def test_a_worker_has_its_next_group_in_hand_where_groups_are_short(tmp_path):
    short, dear = ([Idle(number=n, seconds=seconds) for n in range(count)] for seconds, count in ((0.03, 12), (0.1, 6)))
    with Early() as pool:
        quiet(short, tmp_path, executor=pool)
    assert max(pool.open) == 4 and max(pool.open[-2:]) < 4, pool.open  # towards the end none waits behind another
    with Early() as pool:
        quiet(dear, tmp_path, executor=pool)
    assert max(pool.open) == 2, pool.open
    with Early() as pool:
        quiet(
            [Idle(number=n + 100, seconds=0.03) for n in range(30)] + [Idle(number=200, seconds=0.2)],
            tmp_path,
            executor=pool,
        )
    # none waits behind the long one, which comes first
    assert max(pool.open[:3]) <= 2 and max(pool.open) == 4, pool.open
    Early.ahead = 0
    try:
        with Early() as pool:
            quiet([Idle(number=n + 300, seconds=0.03) for n in range(8)], tmp_path, executor=pool)
    finally:
        Early.ahead = 0.1
    assert max(pool.open) == 2


def test_what_was_lost_once_has_its_worker_to_itself(tmp_path):
    "It waits behind nothing, and nothing behind it."

    class Losing(Early):
        def submit(self, fn, described, *rest):
            calls.append([hash for _, group in described for hash, _ in group])
            if len(calls) != 3:
                return super().submit(fn, described, *rest)
            self.open.append(0)
            gone = concurrent.futures.Future()
            gone.set_exception(RuntimeError("its worker is gone"))
            return gone

    calls, trials = [], [Idle(number=n, seconds=0.03) for n in range(20)]
    with Losing() as pool:
        rows = quiet(trials, tmp_path, executor=pool)
    again = [n for n, call in enumerate(calls) if calls[2][0] in call][1]
    assert rows["failed"].isna().all() and calls[again] == calls[2]
    assert max(pool.open) == 4 and pool.open[again] <= 2 and pool.open[again + 1] <= 2, pool.open


def test_plugins_are_looked_for_once_a_process(monkeypatch):
    from lth_companion.methods import scorers

    called, trial = [], Idle(number=7)
    monkeypatch.setattr(scorers, "load_plugins", lambda: called.append(1))
    for _ in range(3):
        assert (
            "result"
            in executors.run_there("lth_companion.lab.sweeps:Idle", [(trial.hash, T.dumps(trial.identity["fields"]))])[
                0
            ]
        )
    assert called == [1]


def test_a_pool_that_is_given_is_used_in_its_whole_width(tmp_path):
    with T_sweeps.Workers(2) as pool:
        assert T_sweeps.places(pool) == 2
        rows = quiet([Threads(number=n) for n in range(6)], tmp_path, executor=pool)
        assert len(set(rows["pid"])) == 2
