"""Chapter clusters: real Dask schedulers and workers, started by hand in processes of their own; real kills."""

import os
import pathlib
import platform
import re
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

pytest.importorskip("distributed")
from test_cli import lth
from test_reproduce import clone  # noqa: F401 (clone is a fixture)
from test_searches import BASE
from test_searches import settings as search_settings
from test_sparse_training import BASE as SPARSE
from test_trials import HERE, Logged, Threads, executions, gate, hold, kill_holder, logged, quiet, until

from lth_companion.lab import cluster_start, doctor
from lth_companion.lab import clusters as C
from lth_companion.lab import store as T_store
from lth_companion.lab import sweeps as T_sweeps
from lth_companion.lab.cluster_start import ClusterError, WorkerLost, read_config, start
from lth_companion.lab.clusters import connect
from lth_companion.lab.provenance import read_provenance
from lth_companion.lab.sparse_trials import SparseTrial
from lth_companion.lab.sweeps import Idle
from lth_companion.papers.weight_recycling import SupermaskTrial

# which a worker must not keep
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
    "OMP_NUM_THREADS": "2",
}


class Lab:
    "One scheduler and its workers, by hand."

    def __init__(self, workers=2, nanny=True, **environment):
        self.environment, self.processes, self.nanny = ENVIRONMENT | environment, [], nanny
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.scheduler = self.popen("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")
        until(self.listens)
        for _ in range(workers):
            self.worker()

    def command(self, kind, *options):
        return [sys.executable, "-m", f"distributed.cli.dask_{kind}", *options]

    def listens(self):
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def popen(self, kind, *options):
        p = subprocess.Popen(
            self.command(kind, *options), env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.processes.append(p)
        return p

    def worker(self, *options, nanny=None):
        nanny = self.nanny if nanny is None else nanny
        return self.popen(
            "worker",
            self.address,
            "--nthreads",
            "1",
            "--no-dashboard",
            "--memory-limit",
            "0",
            *([] if nanny else ["--no-nanny"]),
            *options,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        # workers that lose their scheduler first take longer to end
        for group in (
            self.processes[1:],
            self.processes[:1],
        ):
            for p in group:
                p.terminate()
            for p in group:
                try:
                    p.wait(10)
                except subprocess.TimeoutExpired:
                    p.kill()


def together(address, count, **options):
    "A connection with `count` workers admitted."
    there = connect(address, patience=240, **options)
    until(lambda: len(there.hosts) == count, 240)
    return there


def pids(there):
    return [a["pid"] for a in there.client.run(C.admit, there.token, C.facts(), str(there.probe), "cpu", {}).values()]


@pytest.fixture(scope="module")
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture
def two(lab, tmp_path):
    with together(lab.address, 2, root=tmp_path / "s") as there:
        yield there


# ---- the same rows


def same(trials, tmp_path, there, columns):
    far = quiet(trials, tmp_path / "s", executor=there)
    here = quiet(trials, tmp_path / "here")
    assert far["failed"].isna().all(), far["failed"].dropna().iloc[0]
    assert far[columns].to_json() == here[columns].to_json() and far.attrs["ran"] == len(trials)


def test_rows_are_those_of_this_process(two, tmp_path):
    assert T_sweeps.places(two) == 2
    same([Idle(number=n) for n in range(30)], tmp_path, two, ["number", "slept", "hash"])
    table = quiet(logged(tmp_path, 12, key="one"), tmp_path / "s", executor=two)
    assert table["square"].tolist() == [n**2 for n in range(12)] and sorted(executions(tmp_path)) == list(range(12))


def test_trained_rows_are_those_of_this_process(two, tmp_path):
    sparse = [
        SparseTrial(**SPARSE, scorer=scorer, density=0.1, seed=seed)
        for scorer in ("snip", "synflow")
        for seed in (0, 1)
    ]
    same(sparse, tmp_path, two, ["accuracy", "accuracies", "losses", "hash"])
    masks = [
        SupermaskTrial(**BASE, search=search_settings(m), seed=seed)
        for m in ("Edge-Popup", "Biprop+Recycle")
        for seed in (0, 1)
    ]
    same(masks, tmp_path, two, ["accuracy", "losses", "layers", "digest", "hash"])


def test_one_thread_and_the_same_store(two, tmp_path):
    rows = quiet([Threads(number=n) for n in range(6)], tmp_path / "s", executor=two)
    assert set(rows["threads"]) == {1} and set(rows["omp"]) == {"1"} and len(set(rows["pid"])) == 2
    assert set(rows["store"]) == {f"Store('{tmp_path / 's'}')"}
    about = two.about()
    assert (about["engine"], about["workers"], about["scheduler"]) == ("dask", 2, two.address) and about["hosts"]
    assert not list((tmp_path / "s").glob("*.tmp")) or two.probe.exists()


TRAINS = """from lth_companion.lab.notebooks import Notebook
from lth_companion.papers.granet import SparseTrial
here = Notebook("learning_to_learn", "01_tiny", tier=tier, workers=workers, out=out)
rows = here.run([SparseTrial(data="digits", width=.2, recipe=dict(max_epochs=3, patience=None), scorer="snip", density=d, seed=s) for d in (.1, .2) for s in (0, 1)])"""
SHOWS = """from matplotlib.figure import Figure
fig = Figure(); fig.subplots().plot(rows.density, rows.accuracy)
here.table(rows[["density", "seed", "accuracy"]], "accuracy")
here.figure(fig, "accuracy")
here.finish()"""


def test_lth_run_on_a_cluster_writes_the_same_bytes(lab, clone, tmp_path, capsys, monkeypatch):
    "A small notebook that trains; tests/dask_smoke.py does the same with those of the papers."
    clone.write(TRAINS, SHOWS)
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    folders, run = {}, ("run", "learning_to_learn/01", "--repo", clone.root, "--out")
    for name, options in {"pool": ["--workers", "2"], "dask": ["--scheduler", lab.address]}.items():
        monkeypatch.setenv("LTH_RUNS", str(tmp_path / f"runs-{name}"))
        code, out, err = lth(capsys, *run, tmp_path / name, *options)
        assert code == 0, err
        folders[name] = tmp_path / name / "smoke/learning_to_learn/01_tiny"
    assert f"cluster\t{lab.address}\t2 workers" in out and "LTH_SCHEDULER" not in os.environ
    pool, dask = (
        {
            p.name: p.read_bytes()
            for p in f.iterdir()
            if p.suffix in (".csv", ".svg", ".json") and p.name != "provenance.json"
        }
        for f in folders.values()
    )
    assert pool == dask and any(n.endswith(".csv") for n in pool)
    made = {name: read_provenance(f) for name, f in folders.items()}
    assert made["pool"]["trained"] == made["dask"]["trained"] == 4 and made["pool"]["engine"] == {
        "engine": "processes",
        "workers": 2,
    }
    assert made["dask"]["engine"]["engine"] == "dask" and made["dask"]["engine"]["scheduler"] == lab.address
    assert "unchanged" in lth(capsys, *run, tmp_path / "dask")[1]  # who ran it does not matter


def test_a_failing_trial_is_a_row(two, tmp_path):
    rows = quiet(
        logged(tmp_path, 2) + [Logged(number=5, folder=str(tmp_path), action="raise")], tmp_path / "s", executor=two
    )
    assert rows["failed"].tolist() == [None, None, "number 5 is not to be run"]


# ---- death


def test_a_worker_killed_midway(two, tmp_path):
    trials, store = logged(tmp_path, 20, seconds=0.05), T_store.Store(tmp_path / "s")
    hold(tmp_path, 6)
    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_holder, tmp_path, store, trials)
        rows = quiet(trials, store, executor=two)
        killed.result()
    assert rows["square"].tolist() == [n**2 for n in range(20)] and rows["failed"].isna().all()
    # what it had begun once more, what waited behind that once
    assert sorted(executions(tmp_path)) == sorted([*range(20), 6])
    until(lambda: len(two.hosts) == 2)  # its nanny started another, and it was admitted


def test_a_trial_that_kills_its_worker_fails_after_three(two, tmp_path):
    bad = Logged(number=3, folder=str(tmp_path), action="die", key="one")
    rows = quiet(logged(tmp_path, 3, key="one") + [bad], tmp_path / "s", executor=two)
    assert (
        rows["square"].tolist()[:3] == [0, 1, 4]
        and "its worker died three times" in rows["failed"][3]
        and "was lost" in rows["failed"][3]
    )
    assert executions(tmp_path).count(3) == 3, "however soon it dies after the trial before it"
    until(lambda: len(two.hosts) == 2)


def test_what_waits_in_a_worker_that_dies_is_not_to_blame(two, tmp_path):
    bad = Logged(number=30, folder=str(tmp_path), seconds=1, action="die")  # by then the result before it is home
    trials = logged(tmp_path, 30, seconds=0.05)
    rows = quiet(trials[:9] + [bad] + trials[9:], tmp_path / "s", executor=two)
    assert [why is None for why in rows["failed"]] == [True] * 9 + [False] + [
        True
    ] * 21 and "its worker died three times" in rows["failed"][9]
    ran = executions(tmp_path)
    assert ran.count(30) == 3 and sorted(ran) == [*range(30), 30, 30, 30]  # its neighbours once
    until(lambda: len(two.hosts) == 2)


def in_hand(there):
    return sorted(len(hand) for hand in there.hands.values())


def test_a_worker_of_one_thread_has_the_next_call_in_hand(two, tmp_path):
    futures = [two.submit(gate, tmp_path / "open") for _ in range(7)]
    assert in_hand(two) == [2, 2] and len(two.waiting) == 3
    (tmp_path / "open").touch()
    for future in futures:
        assert future.result(60) is None
    until(lambda: in_hand(two) == [0, 0])
    one = two.submit(gate, tmp_path / "late")
    assert in_hand(two) == [0, 1] and two.submit(int, 3).result(60) == 3 and not one.done()  # the free one first
    (tmp_path / "late").touch()
    one.result(60)


def test_all_that_a_lost_worker_had_in_hand_is_lost(two, tmp_path):
    futures = [two.submit(time.sleep, 60) for _ in range(2)] + [two.submit(os.getpid) for _ in range(3)]
    assert in_hand(two) == [2, 2]
    before = set(pids(two))
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    for future in futures[:4]:
        with pytest.raises(WorkerLost, match="was lost"):
            future.result(60)
    assert futures[4].result(60) not in before  # what no worker had
    until(lambda: len(two.hosts) == 2)


def test_a_worker_of_two_threads_runs_one_call_at_a_time(tmp_path):
    with Lab(workers=0) as lab:
        lab.worker("--nthreads", "2")
        with together(lab.address, 1, root=tmp_path) as there:
            futures = [there.submit(gate, tmp_path / "open") for _ in range(3)]
            assert in_hand(there) == [1] and len(there.waiting) == 2
            (tmp_path / "open").touch()
            for future in futures:
                future.result(60)


def test_the_scheduler_killed_midway(tmp_path):
    trials, done = logged(tmp_path, 12, seconds=0.15), []
    with Lab(nanny=False) as first:

        def on_done(trial, result):
            done.append(trial)
            if len(done) == 4:
                first.scheduler.kill()

        there, start_time = together(first.address, 2, root=tmp_path / "s"), time.monotonic()
        with pytest.raises(
            ClusterError,
            match="is gone; what has ended is kept: start it and its workers again, and give the same command",
        ):
            quiet(trials, tmp_path / "s", executor=there, on_done=on_done)
        with pytest.raises(ClusterError, match="is gone"):
            there.submit(int)
        there.shutdown(cancel_futures=True)
        assert time.monotonic() - start_time < 60 and len(T_store.Store(tmp_path / "s").hashes()) == len(done) >= 4
        until(lambda: all(p.poll() is not None for p in first.processes), 30)  # workers end with their scheduler
    with Lab(nanny=False) as second, connect(second.address, root=tmp_path / "s") as there:
        rows = quiet(trials, tmp_path / "s", executor=there)
        assert rows["square"].tolist() == [n**2 for n in range(12)] and rows.attrs["cached"] == len(done)
        # the last worker leaves, without a nanny
        waiting = there.submit(time.sleep, 60)
        there.patience, there.seen = 1, time.monotonic()
        for pid in pids(there):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises((WorkerLost, ClusterError)):
            waiting.result(60)
        until(lambda: there.error)
        assert (
            there.error.startswith(f"No worker has been at the scheduler {second.address} for 1 s")
            and "dask worker" in there.error
        )
    assert len(executions(tmp_path)) <= 12 + 2 * 2  # what each of the two had in hand


def test_what_was_interrupted_does_not_hold_a_worker(lab, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with together(lab.address, 2, root=tmp_path) as there:
            futures, before = [there.submit(time.sleep, 60) for _ in range(3)], set(pids(there))
            until(lambda: all(there.hands.values()))
            raise KeyboardInterrupt
    for future in futures:
        with pytest.raises(CancelledError):
            future.result()
    with together(lab.address, 2, root=tmp_path) as there:
        assert there.submit(int, 3).result(60) == 3 and not before & set(pids(there))
    with pytest.raises(ClusterError, match="was closed"):
        there.submit(int)


# ---- one sentence


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "127.0.0.1:9", "nowhere", "tcp://", "http://x:1"])
def test_nobody_listens(address, tmp_path):
    with pytest.raises(ClusterError, match="No Dask scheduler answers at .*start one") as error:
        connect(address, root=tmp_path)
    assert "\n" not in str(error.value)


def test_what_listens_is_no_scheduler(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "ANSWER", 0.5)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ClusterError, match="No Dask scheduler answers at .*timed out"),
    ):
        connect(f"tcp://127.0.0.1:{silent.getsockname()[1]}", root=tmp_path)
    with pytest.raises(ClusterError, match="names no certificates"):
        connect("tls://127.0.0.1:9", root=tmp_path)


def test_no_workers(tmp_path):
    with (
        cluster_start._scheduler("127.0.0.1") as empty,
        pytest.raises(ClusterError, match="No worker has been at the scheduler .* for 1 s"),
    ):
        connect(empty.scheduler_address, root=tmp_path, patience=1)


def test_dask_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    for ask in (lambda: connect("tcp://127.0.0.1:9"), lambda: start("local")):
        with pytest.raises(ClusterError, match=r"pip install -c constraints.txt -e .\[cluster\]"):
            ask()


@pytest.mark.parametrize(
    "name, value, says",
    [("lth_companion", "0" * 12, "start it again from the same clone"), ("torch", "1.0", "has torch .*, here is 1.0")],
)
def test_a_worker_with_other_code_is_refused(lab, tmp_path, monkeypatch, name, value, says):
    monkeypatch.setattr(C, "facts", lambda: real() | {name: value}) if (real := C.facts) else None
    said = []
    with pytest.raises(ClusterError, match=f"The worker tcp.*{says}"):
        connect(lab.address, root=tmp_path, say=said.append)
    assert said and all(line.endswith("It gets no work.") for line in said)


def test_a_worker_older_than_its_files_is_started_anew(lab, tmp_path):
    def grow_old():
        "Runs on a worker: it remembers other code than is in its files."
        import lth_companion.lab.clusters as there

        there.facts()["lth_companion"] = "an older one"  # the cached dict itself

    with together(lab.address, 2, root=tmp_path) as there:
        before = set(pids(there))
    with together(lab.address, 2, root=tmp_path) as there:
        there.client.run(grow_old)
    with together(lab.address, 2, root=tmp_path) as there:
        assert not before & set(pids(there)) and there.submit(int, 3).result(60) == 3


def test_a_worker_without_the_store_or_a_gpu_is_refused(lab, tmp_path, monkeypatch):
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(ClusterError, match="has no CUDA device"):
            connect(lab.address, root=tmp_path, device="cuda")
    there = together(lab.address, 2, root=tmp_path)
    found = C.admit("token", C.facts(), "/no/such/folder/probe", "cpu", {})["problem"]
    assert found.startswith("cannot use the store /no/such/folder (No such file") and "LTH_RUNS" in found
    (tmp_path / "probe").write_text("another's")
    assert "sees another folder" in C.admit("token", C.facts(), str(tmp_path / "probe"), "cpu", {})["problem"]
    there.shutdown()
    assert not list(tmp_path.glob(".*.tmp"))  # the probe is gone


def test_a_worker_without_the_code_is_refused(lab, tmp_path):
    "Its Python finds everything but lth_companion; the others go on."
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text("import sys; sys.modules['lth_companion'] = None")
    said = []
    with together(lab.address, 2, root=tmp_path, say=said.append) as there:
        bare = subprocess.Popen(
            [*lab.command("worker", lab.address), "--no-nanny"],
            env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "blocked")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until(lambda: said, 240)
        finally:
            bare.kill()
            bare.wait()
        assert (
            "cannot run lth_companion (" in said[0]
            and "ModuleNotFoundError" in said[0]
            and said[0].endswith("install the same code on every machine. It gets no work.")
        )
        assert (
            len(there.hosts) == 2
            and quiet([Idle(number=n) for n in range(4)], tmp_path / "s", executor=there).attrs["ran"] == 4
        )


@pytest.mark.parametrize(
    "text, says",
    [
        ("ssh: {host: [a]}", "ssh.host: Extra inputs"),
        ("slurm: {workers: many}", "slurm.workers: Input should be"),
        ("a: [", "is no YAML file"),
        ("- 1", "holds no sections"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, text, says):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ClusterError, match=says) as error:
        read_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_the_example_holds_the_defaults():
    import yaml

    assert read_config(cluster_start.EXAMPLE) == cluster_start.Configuration()
    written = yaml.safe_load(cluster_start.EXAMPLE.read_text())
    assert set(written) == set(cluster_start.Configuration.model_fields)
    for name in cluster_start.KINDS:
        assert set(written[name]) == set(type(getattr(cluster_start.Configuration(), name)).model_fields)


def test_the_readme_has_a_configuration_that_is_read(tmp_path):
    [text] = re.findall(r"```yaml\n(.*?)```", (HERE.parent / "README.md").read_text(), re.S)
    (tmp_path / "lab.yaml").write_text(text)
    found = read_config(tmp_path / "lab.yaml")
    assert found.ssh.hosts == ["node1", "node2"] and found.slurm.walltime == "08:00:00" and found.ssh.workers == 16


# ---- clusters that we start; ssh and sbatch are stand-ins that run the command here


def stand_in(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{textwrap.dedent(text)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("kind", cluster_start.KINDS)
def test_start(kind, tmp_path, monkeypatch):
    stand_in(tmp_path, "ssh", 'echo "$@" >> $(dirname $0)/calls; exec bash -c "${@: -1}"')
    stand_in(
        tmp_path,
        "sbatch",
        'cd $(dirname $0); cp "$1" job; echo $$ >> calls; setsid bash job > log 2>&1 & echo "Submitted batch job $!"',
    )
    stand_in(tmp_path, "scancel", 'for j in "$@"; do kill -- -$j 2>/dev/null; done; exit 0')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "c.yaml").write_text(
        "environment: {EXTRA: a b}\nwait: 240\nlocal: {workers: 1}\nssh: {hosts: [one, two], address: 127.0.0.1}\n"
        "slurm: {workers: 1, memory: 1GB, interface: lo, queue: long}\n"
    )
    monkeypatch.setenv("LTH_CLUSTER_CONFIG", str(tmp_path / "c.yaml"))
    with start(kind) as started, connect(started, root=tmp_path / "s") as there:
        until(lambda: len(there.hosts) == 1 + (kind == "ssh"), 240)
        assert {there.submit(os.getenv, k).result() for k in ("EXTRA", "OMP_NUM_THREADS")} == {"a b", "1"}
        processes = pids(there)
        assert quiet([Idle(number=n) for n in range(4)], tmp_path / "s", executor=there).attrs["ran"] == 4
    until(lambda: not any(pathlib.Path(f"/proc/{p}").exists() for p in processes), 30)
    if kind == "ssh":
        assert [line.split()[:3] for line in sorted((tmp_path / "calls").read_text().splitlines())] == [
            ["-o", "BatchMode=yes", h] for h in ("one", "two")
        ]
    if kind == "slurm":
        assert "#SBATCH -p long" in (tmp_path / "job").read_text() and "gres" not in (tmp_path / "job").read_text()


def test_a_gpu_to_each_worker(monkeypatch):
    started = []
    monkeypatch.setattr(cluster_start, "_scheduler", lambda *a: type("S", (), {"scheduler_address": "tcp://h:1"}))
    monkeypatch.setattr(
        cluster_start, "Started", lambda cluster, wait, commands, environment=None: started.append(commands)
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    start("local", cluster_start.Configuration(), "cuda")
    start("ssh", cluster_start.Configuration(ssh={"hosts": ["a", "b"], "gpus": 2}), "cuda")
    local, ssh = started
    assert [c[1] for c in local] == ["CUDA_VISIBLE_DEVICES=2", "CUDA_VISIBLE_DEVICES=5"]
    assert [(c[3], f"CUDA_VISIBLE_DEVICES={n}" in c[4]) for c, n in zip(ssh, (0, 1, 0, 1))] == [
        ("a", True),
        ("a", True),
        ("b", True),
        ("b", True),
    ]
    assert "--gres=gpu:1" in cluster_start.slurm_options(cluster_start.Configuration(), "cuda")["job_extra_directives"]


@pytest.mark.parametrize(
    "kind, text, says",
    [
        ("pbs", "", "choose one of local, ssh, slurm"),
        ("ssh", "", "names no hosts"),
        ("slurm", "", "sbatch is not here"),
        ("ssh", "ssh: {hosts: [one], address: 127.0.0.1}", "No worker could be started .*no such host one"),
    ],
)
def test_what_cannot_be_started_is_one_sentence(kind, text, says, tmp_path, monkeypatch):
    stand_in(tmp_path, "ssh", "echo no such host one >&2; exit 255")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ClusterError, match=says) as error:
        with start(kind, tmp_path / "c.yaml") as started:
            connect(started, root=tmp_path)
    assert "\n" not in str(error.value)


# ---- the command line


@pytest.mark.parametrize(
    "options, says",
    [
        (["--scheduler", "tcp://127.0.0.1:9"], "No Dask scheduler answers at tcp://127.0.0.1:9"),
        (["--cluster", "pbs"], "there is no kind of cluster 'pbs'"),
        (["--scheduler", "tcp://127.0.0.1:9", "--cluster", "local"], "one of the two"),
        (["--cluster-config", "x.yaml"], "goes with --cluster"),
        (["--cluster", "ssh", "--cluster-config", "x.yaml"], "x.yaml cannot be read"),
    ],
)
def test_lth_run_says_what_is_wrong(capsys, monkeypatch, tmp_path, options, says):
    monkeypatch.chdir(HERE.parent)
    code, out, err = lth(capsys, "run", "weight_recycling/01", "--out", tmp_path, *options)
    assert code == 1 and says in err and err.count("lth: ") == 1 and "Traceback" not in err and not out


def test_doctor_names_the_workers(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("LTH_SCHEDULER", lab.address)
    monkeypatch.setenv("LTH_RUNS", str(tmp_path))
    [(state, what, text)] = doctor._check_cluster("")
    assert (state, what) == ("ok", "cluster") and re.fullmatch(
        rf"{lab.address}, [12] workers on {platform.node()}", text
    )
