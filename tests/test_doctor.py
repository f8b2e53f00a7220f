"""`lth doctor` on machines that lack something, each made for real: another environment, user, disk, or lock. One
line, with the mend.
"""

import ast
import ctypes
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import venv

import pytest
import typer

from lth_companion.lab import cli, terminal

ROOT = pathlib.Path(__file__).parent.parent
SITE = pathlib.Path(typer.__file__).parent.parent  # of all packages
BROKEN = "raise ImportError('libtorch_cpu.so: cannot open shared object file')"
INSTALL = "pip install -c constraints.txt -e ."


def run(*args, path=(), python=sys.executable, cwd=ROOT, start=(), library=ROOT, **options):
    """(exit code, stdout, stderr) of `lth args` in a process of its own; `path` comes first on PYTHONPATH,
    `library` last; capitals are variables.
    """
    variables = {k: str(options.pop(k)) for k in list(options) if k.isupper()}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LTH_")}
    done = subprocess.run(
        [*start, python, "-m", "lth_companion.lab.cli", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=clean | {"PYTHONPATH": os.pathsep.join(map(str, [*path, library]))} | variables,
        **options,
    )
    assert "Traceback" not in done.stderr and done.returncode >= 0, done.stderr
    return done.returncode, done.stdout, done.stderr


def doctor(*args, **options):
    "What is wrong, and all lines, by what they are about; the exit code and the form of the lines are checked here."
    code, out, err = run("doctor", *args, **options)
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows and all(len(r) == 3 and r[0] in ("ok", "note", "wrong") and r[2] for r in rows) and not err, (out, err)
    wrong = {what: text for state, what, text in rows if state == "wrong"}
    assert code == bool(wrong) and len(wrong) == sum(r[0] == "wrong" for r in rows), out
    return wrong, {what: f"{state} {text}" for state, what, text in rows}


@pytest.fixture
def quick(tmp_path):
    "A torch that cannot be imported: what does not need it is looked at all the same, and in less time."
    return broken_torch(tmp_path / "quick")


def broken_torch(folder, text=BROKEN):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(text)
    return folder


def version_of(folder, name, version):
    "Metadata of another version of an installed package."
    (info := folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def without(folder, *packages):
    "(python, site-packages) of an environment with all but these."
    venv.create(folder / "venv", with_pip=False)
    (folder / "site").mkdir()
    for p in SITE.iterdir():
        if not re.match(rf"({'|'.join(packages)})(?![a-z])", p.name):
            (folder / "site" / p.name).symlink_to(p)
    return dict(python=folder / "venv/bin/python", path=[folder / "site"])


# ---- packages


def test_nothing_is_installed(tmp_path):
    venv.create(tmp_path, with_pip=False)
    for command in ("doctor", "list", "--help"):
        assert run(command, python=tmp_path / "bin/python") == (1, "", f"lth: typer is not installed: {INSTALL}\n")


def test_the_library_is_not_installed(tmp_path, quick):
    machine = without(tmp_path, "lth_companion", "torch", "__editable__")
    (bare := tmp_path / "bare").mkdir()  # a clone that was installed from has lth_companion.egg-info beside the library
    (bare / "lth_companion").symlink_to(ROOT / "lth_companion")
    assert doctor(**machine, cwd=bare, library=bare)[0] == {
        "lth_companion": f"is not installed in this environment: {INSTALL}"
    }


def test_python_is_too_old(tmp_path):
    "As far as it can be told from the version that Python gives, and from the grammar of 3.9."
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.version_info, sys.version = (3, 9, 18, 'final', 0), '3.9.18 (main)'"
    )
    assert run("doctor", path=[tmp_path]) == (
        1,
        "",
        f"lth: Python 3.9.18 is too old: install Python 3.11 or newer, then {INSTALL}\n",
    )
    # the command's module imports the one that looks before any other
    text = pathlib.Path(cli.__file__).read_text()
    first = next(n for n in ast.parse(text, feature_version=(3, 9)).body if isinstance(n, (ast.Import, ast.ImportFrom)))
    assert first.module == terminal.__name__
    text = pathlib.Path(terminal.__file__).read_text()
    ast.parse(text, feature_version=(3, 9))
    least = re.search(r"min_python = (\S+)", (ROOT / "settings.ini").read_text())[1]
    assert (
        f"Python {least} or newer" in text
        and text.index("sys.version_info") < re.search(r"^(import|from) (?!sys)", text, re.M).start()
    )


def test_a_package_is_missing(tmp_path):
    wrong, lines = doctor(**without(tmp_path, "scipy", "torch"))
    assert wrong == {p: f"is not installed: {INSTALL}" for p in ("scipy", "torch")}
    assert all(
        lines[what] == "note not looked at: mend what is wrong above first" for what in ("devices", "scorers", "data")
    )


def test_torch_is_of_another_version(tmp_path, quick):
    wrong, _ = doctor(path=[version_of(tmp_path, "torch", "2.5.0"), quick])
    assert list(wrong) == ["torch"] and re.fullmatch(
        r"2\.5\.0 is not [<>=.,\d]+: " + re.escape(INSTALL), wrong["torch"]
    )


def test_torchvision_is_for_another_torch(tmp_path):
    (tmp_path / "cifar10-jpeg.tar.xz").write_text("looked for, not read")
    wrong, lines = doctor(path=[version_of(tmp_path, "torch", "2.12.0")], LTH_CACHE=tmp_path, LTH_DATA=tmp_path)
    assert lines["cifar10-jpeg"] == f"ok read from {tmp_path}/cifar10-jpeg.tar.xz when first used" and wrong.pop(
        "mnist"
    )
    assert list(wrong) == ["torchvision"] and re.fullmatch(
        r"\S+ wants torch==\S+, and 2\.12\.0 is here: " + re.escape(INSTALL), wrong["torchvision"]
    )


@pytest.mark.parametrize(
    "text, says",
    [
        (BROKEN, "ImportError: libtorch_cpu.so: cannot open shared object file"),
        ("import os; os.kill(os.getpid(), 4)", "its process ends with signal 4"),
        ("raise SystemExit(3)", "its process ends with exit code 3"),
        ("import nowhere", "No module named 'nowhere'"),
    ],
)
def test_torch_does_not_import(tmp_path, text, says):
    wrong, lines = doctor(path=[broken_torch(tmp_path, text)])
    assert (
        list(wrong) == ["torch"]
        and says in wrong["torch"]
        and wrong["torch"].endswith(": pip install --force-reinstall -c constraints.txt torch torchvision")
    )
    assert all(lines[what].startswith("note not looked at") for what in ("devices", "scorers", "data")) and lines[
        "store"
    ].startswith("ok")


def test_commands_without_torch_are_one_sentence(quick):
    assert run("--help", path=[quick])[0] == 0
    for command in (["data", "status"], ["list"]):
        code, out, err = run(*command, path=[quick])
        assert (code, out, err) == (
            1,
            "",
            "lth: libtorch_cpu.so: cannot open shared object file: lth doctor says what is missing\n",
        )


# ---- git, make, the clone


def test_no_git_no_make_no_clone(tmp_path, quick):
    (tmp_path / "bin").mkdir()
    _, lines = doctor(path=[quick], cwd=tmp_path, PATH=tmp_path / "bin")
    assert (
        lines["git"].startswith("note is not here")
        and lines["make"].startswith("note is not here")
        and "install it" in lines["git"]
    )
    assert "is not in a clone" in lines["clone"] and lines["clone"].endswith(
        "change into one or name it with --repo FOLDER"
    )
    _, lines = doctor(path=[quick], PATH=f"{tmp_path / 'bin'}")
    assert "no commit" in lines["clone"]


# ---- data


def test_data(tmp_path):
    (tmp_path / "fashion-mnist.safetensors").write_bytes(b"no tensors" * 100)
    wrong, lines = doctor(LTH_CACHE=tmp_path, LTH_DATA="/no/such/folder")
    assert wrong.pop("LTH_DATA") == "/no/such/folder is no folder: mend or unset LTH_DATA"
    assert wrong.pop("mnist") == "not here: `lth data fetch mnist` gets it"
    damaged = wrong.pop("fashion-mnist")
    assert damaged.startswith(
        f"Fashion-MNIST in {tmp_path}/fashion-mnist.safetensors is damaged ("
    ) and damaged.endswith("`lth data fetch fashion-mnist` mends it.")
    assert (
        not wrong
        and lines["cache"] == f"ok {tmp_path}"
        and lines["digits"].startswith("ok")
        and lines["cifar10"].startswith("note not here")
    )


# ---- folders that cannot be written, also by root


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "clone/nbs/papers/p").mkdir(parents=True)
    return tmp_path / "clone"


def cannot_write(clone, path, says, **options):
    "One line each for store and figures, and nothing is left behind."
    before = sorted(clone.rglob("*"))
    wrong, _ = doctor("--repo", clone, path=[path], **options)
    assert wrong.pop("store") == f"cannot write in {clone}/runs ({says}): set LTH_RUNS to a folder that you may write"
    assert wrong.pop("figures") == f"cannot write in {clone}/figures ({says}): give lth run --out FOLDER"
    assert list(wrong) == ["torch"] and sorted(clone.rglob("*")) == before


def test_no_permission(clone, quick):
    clone.chmod(0o555)
    # root gives up CAP_DAC_OVERRIDE
    cannot_write(clone, quick, "Permission denied", preexec_fn=lambda: ctypes.CDLL(None).prctl(24, 1, 0, 0, 0))


def test_no_room(clone, quick):
    "The system refuses every byte of a file."

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    cannot_write(clone, quick, "File too large", preexec_fn=limit)


def test_a_file_is_in_the_way(clone, quick):
    for name in ("runs", "figures"):
        (clone / name).write_text("")
    cannot_write(clone, quick, "Not a directory")


@pytest.mark.parametrize(
    "prepare, says",
    [
        ("cat /dev/zero > {0}/fill 2> /dev/null", "No space left on device"),
        ("mount -o remount,ro {0}", "Read-only file system"),
    ],
)
def test_a_disk_that_is_full_or_read_only(clone, quick, prepare, says):
    script = (
        f"mount -t tmpfs -o size=128k none {clone} && mkdir -p {clone}/nbs/papers/p && {{ {prepare.format(clone)}; exec"
        ' "$@"; }'
    )
    start = ["unshare", "--mount", "bash", "-c", script, "bash"]
    if not shutil.which("unshare") or subprocess.run([*start, "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    cannot_write(clone, quick, says, start=start)


# ---- locks


def test_a_lock(tmp_path, quick):
    code = (
        "import sys, time; from lth_companion.lab.store import Store; from lth_companion.lab.sweeps import Idle; s ="
        " Store(sys.argv[1]); s.check_writable(); s.claim(Idle(number=1)); print('has it', flush=True); time.sleep(600)"
    )

    def look():
        return doctor(path=[quick], LTH_RUNS=tmp_path / "s")[1].get("claims", "")

    assert look() == ""
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "s"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as holder:
        try:
            assert holder.stdout.readline() == "has it\n"
            assert (
                look() == f"note process {holder.pid} is running trials of this store: others wait for those; kill -INT"
                f" {holder.pid} ends it"
            )
            holder.send_signal(signal.SIGSTOP)
            assert (
                look()
                == f"wrong process {holder.pid} is stopped and keeps its trials from others: kill -CONT {holder.pid}"
                f" lets it go on, kill -9 {holder.pid} ends it"
            )
        finally:
            holder.kill()
    assert look() == ""


# ---- the cluster


def test_no_dask(tmp_path):
    machine = without(tmp_path, "distributed", "dask", "dask_jobqueue")
    machine["path"].insert(0, broken_torch(tmp_path / "quick"))
    mend = "pip install -c constraints.txt -e '.[cluster]'"
    assert doctor(**machine)[1]["cluster"] == f"note without distributed and dask_jobqueue: {mend}"
    assert doctor(**machine, LTH_SCHEDULER="tcp://127.0.0.1:9")[0]["cluster"].endswith(mend)


def test_a_scheduler_that_does_not_answer(tmp_path, quick):
    pytest.importorskip("distributed")
    wrong, _ = doctor(path=[quick], LTH_SCHEDULER="tcp://127.0.0.1:9")
    assert (
        wrong["cluster"].startswith("No Dask scheduler answers at tcp://127.0.0.1:9 (")
        and "start one" in wrong["cluster"]
    )
    (tmp_path / "c.yaml").write_text("slurm: {worker: 3}")
    assert "slurm.worker: Extra inputs" in doctor(path=[quick], LTH_CLUSTER_CONFIG=tmp_path / "c.yaml")[0]["cluster"]


# ---- GPUs


def test_a_machine_without_a_gpu_has_one_line_each_for_device_mps_and_bf16():
    lines = doctor()[1]
    assert (
        lines["device"] == "note no CUDA device; tiers smoke and laptop do not need one"
        and lines["MPS"] == "note no GPU to share"
    )
    assert re.match("(ok|note) on this processor: (AMX|AVX-512|no units|this system)", lines["bf16"])


@pytest.mark.parametrize(
    "tool, says",
    [
        (
            None,
            "note nvidia-cuda-mps-control is not here, so processes would take turns on the GPU and one is the default",
        ),
        (
            "exit 1",
            (
                "note does not run, so processes would take turns on the GPU and one is the default; export"
                " CUDA_MPS_PIPE_DIRECTORY=/tmp/nvidia-mps; nvidia-cuda-mps-control -d starts it, echo quit |"
                " nvidia-cuda-mps-control ends it"
            ),
        ),
        ("exit 0", "ok runs: processes share the GPU"),
    ],
    ids=["absent", "ended", "runs"],
)
def test_a_pretended_gpu_and_its_mps(tmp_path, tool, says):
    (tmp_path / "control").touch()
    if tool:
        (program := tmp_path / "nvidia-cuda-mps-control").write_text(f"#!/bin/sh\n{tool}\n")
        program.chmod(0o755)
    lines = doctor(
        path=[ROOT / "tests" / "pretended"],
        LTH_PRETEND_CUDA="1",
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        CUDA_MPS_PIPE_DIRECTORY=tmp_path,
    )[1]
    assert lines["device"].startswith("ok ") and "GiB" in lines["device"] and lines["MPS"].startswith(says)
    assert lines["bf16"].endswith("on the GPU bf16 with channels_last under a graph is fastest")
