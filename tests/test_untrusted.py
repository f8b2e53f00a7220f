"""Files from elsewhere: nothing in them is run, each bad one gets one sentence of its reader, and none costs more
memory or time than its size explains.
"""

import ast
import faulthandler
import gzip
import io
import json
import lzma
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from lth_companion.lab import catalogue, claims, cluster_start, provenance, report
from lth_companion.lab import store as trials_store
from lth_companion.lab import sweeps as trials_sweeps
from lth_companion.lab.catalogue import ReproduceError
from lth_companion.lab.claims import ClaimError
from lth_companion.lab.cluster_start import ClusterError
from lth_companion.lab.store import Store, StoreError, read_pack, seal, unseal, write_pack
from lth_companion.lab.sweeps import Idle
from lth_companion.lab.trials import dumps
from lth_companion.measures import storage
from lth_companion.methods.scorers import ScoreError
from lth_companion.methods.stacking import Method, check_init, scorer
from lth_companion.methods.supermasks import Supermask
from lth_companion.papers import granet_parallel
from lth_companion.tickets import Ticket, TicketError, generator, prunable
from lth_companion.training import checkpoints, data, formats, sources
from lth_companion.training import loop as training
from lth_companion.training.models import create
from lth_companion.training.recipe import Recipe
from lth_companion.training.sources import DataError

ROOT = Path(__file__).parent.parent


def one_sentence(error):
    text = str(error.value if hasattr(error, "value") else error)
    assert text.strip() and "\n" not in text and len(text) < 1500, text[:300]
    return text


# ---------------------------------------------------------------- what the sources may not contain

EVALUATES = {"eval", "exec", "compile", "__import__", "execfile"}
BANNED = re.compile(
    r"(torch\.(load|hub|jit\.load|package)|(pickle|_pickle|dill|cloudpickle|marshal|joblib)\.(load|loads|Unpickler)|pickle\.Unpickler|shelve\.open|(pd|pandas)\.(read_pickle|eval)|"
    r"(np|numpy)\.(load|fromregex)|yaml\.(load|load_all|full_load|unsafe_load|unsafe_load_all|Loader|FullLoader|UnsafeLoader)|os\.(system|popen)|"
    r"subprocess\.(getoutput|getstatusoutput)|shutil\.unpack_archive|runpy\.run_path|code\.interact)|.*\.(extract|extractall|read_pickle)"
)


def dangers(source):
    "What in `source` could run, or write where, what a file says."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EVALUATES:
            found.add(node.func.id)
        if isinstance(node, ast.Attribute) and BANNED.fullmatch(text := ast.unparse(node)):
            found.add(text)
        if isinstance(node, ast.keyword) and ast.unparse(node) in (
            "shell=True",
            "allow_pickle=True",
            "weights_only=False",
        ):
            found.add(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve", "joblib", "dill"):
            found |= {
                f"from {node.module} import {a.name}"
                for a in node.names
                if a.name in ("load", "loads", "Unpickler", "open")
            }
    return found


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)",
        "exec(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.save(f, allow_pickle=True)",
        "pd.read_pickle(f)",
        "joblib.load(f)",
        "yaml.load(f)",
        "yaml.unsafe_load(f)",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "tar.extractall(p)",
        "zipfile.ZipFile(f).extractall()",
        "pickle.loads(x)",
        "from pickle import loads",
        "marshal.loads(x)",
    ],
)
def test_the_search_for_dangers_finds_them(line):
    assert dangers(line)


ALLOWED = {"formats": {"pickle.Unpickler"}, "cluster_start": {"yaml.load"}}  # each with a test of its own below


@pytest.mark.parametrize("path", sorted((ROOT / "lth_companion").rglob("*.py")), ids=lambda p: p.stem)
def test_no_module_runs_what_a_file_says(path):
    assert dangers(path.read_text()) == ALLOWED.get(path.stem, set())


def test_yaml_is_read_by_a_safe_loader():
    tree = ast.parse((ROOT / "lth_companion/lab/cluster_start.py").read_text())
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "yaml.load")
    (loader,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == ast.unparse(call.args[1]))
    assert list(map(ast.unparse, loader.bases)) == ["yaml.SafeLoader"] and [n.name for n in loader.body] == [
        "flatten_mapping"
    ]


def test_what_is_imported_by_name_is_not_named_by_a_file():
    "`import_module` takes a constant, a variable of the environment, or a class of the process that asked."
    found = {
        (p.stem, ast.unparse(n.args[0]))
        for p in (ROOT / "lth_companion").rglob("*.py")
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("import_module")
    }
    # the last: a table of constants
    assert found == {
        ("tickets", "_FORMS"),
        ("scorers", "name"),
        ("trials", "module"),
        ("__init__", "f'{__name__}.{_WHERE[name]}'"),
    }


def cell_sources(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "\n".join(line for line in "".join(cell["source"]).splitlines() if not re.match(r"\s*%\w", line))


def test_no_notebook_or_script_runs_what_a_file_says():
    notebooks = sorted((ROOT / "nbs").rglob("*.ipynb"))
    assert len(notebooks) > 40
    for path in notebooks:
        if "runs" in path.relative_to(ROOT).parts:
            continue
        allowed = ALLOWED.get({"00_formats": "formats", "02_cluster_start": "cluster_start"}.get(path.stem), set())
        for source in cell_sources(path):
            assert not re.search(r"^\s*!", source, re.MULTILINE), f"{path.name} runs a shell command"
            assert dangers(source) <= allowed, (path.name, source[:200])
    for path in [*(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "setup.py"]:
        named = {
            "test_data.py": {"pickle.loads", "np.load", "os.system"},
            "test_imagenet.py": {"torch.load", "weights_only=False"},
        }.get(path.name, set())  # what it forbids; what its own processes wrote
        if path != Path(__file__):
            assert dangers(path.read_text()) == named, path.name


# ---------------------------------------------------------------- a process with bounded memory and time


def within(function, memory=1 << 30, seconds=30):
    """What `function()` gave, as text, in a process that may take `memory` bytes more than this one, and `seconds`
    of CPU time.
    """
    inward, outward = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
            try:
                text = f"{function()!r}"
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(outward, text.encode(errors="replace")[:60_000])
        finally:
            os._exit(0)
    os.close(outward)
    with os.fdopen(inward, "rb") as pipe:
        text = pipe.read().decode()
    assert os.waitpid(pid, 0)[1] == 0, "it took too long, or died"
    return text


# ---------------------------------------------------------------- every reader against every kind of wrong file


class Touch:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def torch_file(payload):
    stream = io.BytesIO()
    torch.save(payload, stream)
    return stream.getvalue()


def header_only(header):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return len(text).to_bytes(8, "little") + text


WRONG = {
    "empty": b"",
    "zeros": bytes(5000),
    "text": b"hello\n",
    "no utf-8": b"\xff\xfe" * 40,
    "html": b"<!doctype html><html>404</html>",
    **{f"pickle {p}": pickle.dumps(Touch(), protocol=p) for p in (0, 2, 5)},
    "pickle in a list": pickle.dumps([1, {"a": Touch()}]),
    "torch": torch_file({"a": Touch()}),
    "torch weights": torch_file({"a": torch.ones(3)}),
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000,
    "closed deep list": b"[" * 5000 + b"]" * 5000,
    "number": b"9" * 10**6,
    "wrapped number": b'{"a": ' + b"9" * 10**6 + b"}",
    "NaN": b'{"a": NaN}',
    "list": b"[1, 2]",
    "null": b"null",
    "twice": b'{"hash": "a", "hash": "b", "cells": [], "cells": {}}',
    "long key": b'{"' + b"k" * 10**6 + b'": 1}',
    "cells": b'{"cells": [{"cell_type": "code", "source": 5, "metadata": []}]}',
    "safetensors of a size": (2**63).to_bytes(8, "little") + b"{}",
    "safetensors of nothing": header_only({}),
    "safetensors of null": header_only(b"null"),
    "safetensors, deep": header_only(b"[" * 5000),
    "safetensors outside": header_only({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "gzip": gzip.compress(b"x" * 1000),
    "gzip cut": gzip.compress(b"x" * 1000)[:20],
    "xz": lzma.compress(b"x"),
    "xz cut": lzma.compress(os.urandom(1000))[:500],
    "zip": b"PK\x05\x06" + bytes(18),
    "yaml tag": b"!!python/object/apply:os.system ['touch PWNED']\n",
    "toml": b"claim = 5\n",
    "python": b"import os; os.system('touch PWNED')\n",
}


def network():
    return create("lenet-300-100", (1, 4, 4), 3, generator(0, "init"), width=0.02)


def a_checkpoint(path):
    model = network()
    return checkpoints.resume(path, model, training.optimizer(model, Recipe()), None, None, {})


def a_result(path):
    trial = Idle(number=7)
    at = path.parent / "s" / "results" / trial.hash[:2] / f"{trial.hash}.json"
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_bytes(path.read_bytes())
    with pytest.warns(UserWarning, match="damaged .* computed again") as told:
        found = Store(path.parent / "s").get(trial)
    assert found is None and not at.exists()  # set aside
    raise StoreError(str(told[0].message))


def a_pack(end):
    def read(path):
        packed = path.with_suffix(end)
        packed.write_bytes(path.read_bytes())
        found = read_pack(packed)
        assert not found
        raise StoreError("empty")

    return read


def a_checked_data_set(path):
    return sources._read(sources.facts("mnist"), path)


def a_provenance(path):
    folder = path.parent / "p"
    folder.mkdir(exist_ok=True)
    (folder / "provenance.json").write_bytes(path.read_bytes())
    found = provenance.read_provenance(folder)
    assert not found or all(isinstance(found.get(k, {}), dict) for k in ("parameters", "code", "outputs", "trials"))
    raise ReproduceError("empty")


def a_measurement(path):
    import hashlib

    folder = path.parent / "smoke" / "granet" / "01_x"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "claims.json").write_bytes(path.read_bytes())
    (folder / "provenance.json").write_text(
        json.dumps({"outputs": {"claims.json": hashlib.sha256(path.read_bytes()).hexdigest()}})
    )
    return claims.judge_all(claims.ledger("granet"), report.measurements(folder.parent)[0])


READERS = {
    "ticket": (Ticket.load, TicketError),
    "payload": (storage.payload, TicketError),
    "checkpoint": (a_checkpoint, UserWarning),
    "data set": (a_checked_data_set, DataError),
    "result": (a_result, StoreError),
    "pack xz": (a_pack(".xz"), (StoreError, UserWarning)),
    "pack gz": (a_pack(".gz"), (StoreError, UserWarning)),
    "IDX": (formats.read_idx, ValueError),
    "CIFAR batch": (formats.read_cifar_batch, ValueError),
    "CIFAR jpeg": (formats.read_cifar_jpegs, ValueError),
    "MNIST wheel": (formats.read_mnist_wheel, ValueError),
    "notebook": (catalogue.inspect, ReproduceError),
    "cluster": (cluster_start.read_config, ClusterError),
    "ledger": (lambda path: claims.ledger("granet", path), ClaimError),
    "explorations": (lambda path: claims.explorations("granet", "gpu", path), ClaimError),
    "provenance": (a_provenance, ReproduceError),
    "measurement": (a_measurement, (ClaimError, ReproduceError)),
}
# no settings; no claims; no tensors
FITS = {
    ("cluster", "empty"),
    ("cluster", "null"),
    ("ledger", "empty"),
    ("explorations", "empty"),
    ("payload", "safetensors of nothing"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reader", READERS)
def test_a_wrong_file_gets_one_sentence(reader, tmp_path, monkeypatch):
    read, error = READERS[reader]
    monkeypatch.chdir(tmp_path)
    for name, raw in WRONG.items():
        path = tmp_path / "file"
        path.write_bytes(raw)
        start = time.process_time()
        if (reader, name) in FITS:
            read(path)
        else:
            try:
                found = read(path)
            except error as told:
                one_sentence(told)
            except BaseException as other:
                raise AssertionError(f"{reader} met {name} with {type(other).__name__}: {str(other)[:200]}") from other
            else:
                pytest.fail(f"{reader} took {name} for {str(found)[:100]}")
        assert time.process_time() - start < 10, name
        assert not (tmp_path / "PWNED").exists(), name


# ---------------------------------------------------------------- notation


@pytest.mark.parametrize(
    "text",
    [
        " " * 10**6,
        "saw:snip" + " " * 10**6 + "snip U-MS",
        ">" * 10**6,
        "snip>" * 10**5,
        "once(" * 10**5,
        "\0",
        "\ud800",
        "snip\nU-MS",
    ],
)
def test_long_notations_are_refused_at_once(text):
    start = time.process_time()
    for read in (scorer, check_init, Method.parse):
        with pytest.raises(ScoreError) as error:
            read(text)
        one_sentence(error)
    assert time.process_time() - start < 1


def test_an_initialisation_that_is_no_text():
    for odd in (5, None, ["snip"]):
        with pytest.raises(ScoreError):
            check_init(odd)


# ---------------------------------------------------------------- trials, results, packs


def record(trial, **changes):
    return {"hash": trial.hash, "trial": trial.identity, "result": {"slept": 0.0}} | changes


def envelope(text):
    return trials_store._envelope(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    "result",
    [
        '{"__float__": ' + "9" * 400 + "}",
        '{"a": {"__float__": {}}}',
        '{"a": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"a": ' + "9" * 10**6 + "}",
        "[1]",
        "5",
        "null",
        '"x"',
    ],
)
def test_a_sealed_line_of_odd_content_is_none(result):
    trial = Idle(number=3)
    line = envelope(f'{{"hash":"{trial.hash}","result":{result},"trial":{dumps(trial.identity)}}}')
    assert trials_store.opened(line) and unseal(line, trial.hash) is None


def test_a_trial_of_odd_fields():
    for text in (
        '{"number": 1, "number": 2}',
        '{"seconds": ' + "9" * 10**5 + "}",
        '{"seconds": 1e999}',
        '{"seconds": NaN}',
        "[" * 10**5,
        '{"number": ' + "9" * 10**6 + "}",
        '{"' + "k" * 10**6 + '": 1}',
        "\0",
    ):
        try:
            assert Idle.model_validate_json(text).hash == Idle(number=2).hash
        except ValueError as error:
            assert len(trials_sweeps.reason(error)) <= 500 and "\n" not in trials_sweeps.reason(error)


def test_a_density_beyond_all_floats():
    for density in (10**400, -(10**400)):
        with pytest.raises(ValueError) as error:
            Supermask(density=density)
        assert (
            "fraction of weights kept" in trials_sweeps.reason(error.value)
            and len(trials_sweeps.reason(error.value)) <= 500
        )


def test_keys_of_a_pack_are_hashes(tmp_path, monkeypatch):
    "A key such as ../../x would be looked up as a file, found damaged, and moved."
    outside, pack, good = tmp_path / "precious.json", tmp_path / "pack.gz", Idle(number=1)
    outside.write_text("mine")
    climb = ("../../../" + str(outside.with_suffix("")).lstrip("/")).rjust(64, "/")[-64:]
    keys = ["../" * 21 + "x", climb, "\xff" * 64, "é" * 32, "a" * 63 + "/", "A" * 64]
    lines = [envelope(b'{"hash":"' + key.encode("latin1") + b'","result":{},"trial":{}}') for key in keys]
    pack.write_bytes(gzip.compress(b"".join([*lines, seal(record(good))])))
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="1 trials in it are whole"):
        assert list(read_pack(pack)) == [good.hash]
    store = Store(tmp_path / "a" / "b" / "c")
    with pytest.warns(UserWarning, match="damaged"):
        store.attach(pack)
    for hash in store.hashes():
        store.get(hash)
    assert outside.read_text() == "mine"


def bomb(path, gigabytes=12):
    "A file of a few MB that unpacks to many GB."
    one = bytes(1 << 26)
    raw = lzma.compress(one, preset=1) if path.suffix == ".xz" else gzip.compress(one, 6)
    path.write_bytes(raw * (gigabytes << 4))
    return path


@pytest.mark.parametrize("end", ["xz", "gz"])
def test_a_pack_that_is_a_bomb(end, tmp_path, monkeypatch):
    monkeypatch.setattr(trials_store, "LARGEST", 1 << 27)
    path = bomb(tmp_path / f"p.{end}")
    assert path.stat().st_size < 15_000_000
    # growing, a bytearray may be there twice
    text = within(lambda: read_pack(path), memory=5 * trials_store.LARGEST // 2)
    assert (
        text.startswith("StoreError: ") and "unpacks to more than" in text and "remove it" in text and "\n" not in text
    )


def test_no_pack_is_written_that_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(trials_store, "LARGEST", 500)
    some = [record(Idle(number=n)) for n in range(3)]
    with pytest.raises(StoreError, match="fewer trials"):
        write_pack(tmp_path / "p.gz", some)
    assert not any(tmp_path.iterdir())
    write_pack(tmp_path / "p.gz", some[:1])
    assert len(read_pack(tmp_path / "p.gz")) == 1


@pytest.mark.filterwarnings("ignore:The pack")
def test_an_xz_header_that_asks_for_4_gb(tmp_path):
    # the old format, its dictionary 4 GB
    (tmp_path / "p.xz").write_bytes(b"\x5d\xff\xff\xff\xff" + b"\xff" * 8 + bytes(100))
    text = within(lambda: read_pack(tmp_path / "p.xz"))
    assert text == "{}"


@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder", "loop"])
def test_no_result_is_a_device(kind, tmp_path):
    trial, store = Idle(number=5), Store(tmp_path)
    path = store._path("results", trial.hash)
    path.parent.mkdir(parents=True)
    {
        "pipe": lambda: os.mkfifo(path),
        "zeros": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path.name),
    }[kind]()
    if kind in ("pipe", "zeros"):
        with pytest.warns(UserWarning, match="damaged"):
            assert store.get(trial) is None
    else:
        with pytest.raises(StoreError) as error:
            store.get(trial)
        one_sentence(error)


# ---------------------------------------------------------------- tickets


def plain(path, names=None, rest="[]", **tensors):
    tensors = tensors or {"weights/a": torch.ones(2, 2), "masks/a": torch.tensor([240], dtype=torch.uint8)}
    path.write_bytes(
        safetensors.torch.save(
            tensors, {"format": "lth_companion.ticket", "version": "1", "names": names or '["a"]', "rest": rest}
        )
    )
    return path


def test_a_plain_ticket_of_odd_content(tmp_path):
    path, mask = tmp_path / "t", torch.tensor([240], dtype=torch.uint8)
    assert Ticket.load(plain(path)).density == 1
    for names in (
        '["a", "a"]',
        '"a"',
        '{"a": 1}',
        "5",
        "null",
        "[1]",
        "[[]]",
        '["b"]',
        '["\\ud800"]',
        "[" * 10**5,
        "9" * 10**5,
        '["a\\u0000"]',
        "[]",
    ):
        with pytest.raises(TicketError) as error:
            Ticket.load(plain(path, names))
        one_sentence(error)
    for weights in (
        torch.ones(2, 2).to(torch.float8_e4m3fn),
        torch.ones(2, 2, dtype=torch.complex64),
        torch.full((2, 2), float("nan")),
        torch.ones(0, 2),
    ):
        with pytest.raises(TicketError) as error:
            Ticket.load(plain(path, **{"weights/a": weights, "masks/a": mask if weights.numel() else mask[:0]}))
        one_sentence(error)


def test_a_name_given_many_times_is_not_read_many_times(tmp_path):
    big = {"weights/a": torch.ones(1 << 20), "masks/a": torch.full((1 << 17,), 255, dtype=torch.uint8)}
    path = plain(tmp_path / "t", json.dumps(["a"] * 10**6), **big)
    assert "TicketError" in within(lambda: Ticket.load(path), seconds=10)


def compact(path, tensors, **header):
    h = storage._Header.model_validate({"form": "seed", "digest": "x", "settings": {"density": 0.5}, **header})
    h = h.model_copy(update={"checksum": storage._checksum(tensors, h)})
    path.write_bytes(safetensors.torch.save(tensors, {"lth_companion.storage": json.dumps(h.model_dump(mode="json"))}))
    return path


def test_a_seed_that_draws_for_days(tmp_path):
    "2^17 weights, each of another draw of all 2^17: a file of 0.6 MB that asks for 17 billion random numbers."
    n, width = 1 << 17, 34
    codes = storage.pack_bits(np.arange(n, dtype=np.int64) * (n + 1) % (n * n), width)
    every = storage.pack_bits(np.ones(n, dtype=np.int64), 1)
    path = compact(
        tmp_path / "t",
        {"log/from/a": codes, "log/moved/a": every, "seed": torch.zeros(1, dtype=torch.int64)},
        layers=[{"name": "a", "shape": [512, 256], "dtype": "float32", "full": True, "log": "place"}],
        draws=list(range(n)),
    )
    text = within(lambda: Ticket.load(path), seconds=10)
    assert text.startswith("TicketError") and "more draws than are made" in text


def test_a_search_of_too_many_draws_is_not_written_as_a_seed(monkeypatch):
    from lth_companion.measures.storage import Source, StorageError, pack, possible
    from lth_companion.methods.supermasks import Search

    work = Search(network(), Supermask(density=0.5), Recipe(), 3, 5)
    ticket = Ticket.of(work.model, work.put())
    assert "seed" in possible(ticket, Source.of(work))
    monkeypatch.setattr(storage, "_DRAWN", ticket.masks["fc1.weight"].numel())
    with pytest.raises(StorageError, match="more draws than a reader makes"):
        pack(ticket, "seed", Source.of(work))
    assert "seed" not in possible(ticket, Source.of(work))


@pytest.mark.parametrize(
    "layer",
    [
        {"shape": [2**39] * 8},
        {"shape": [2**24 + 1], "full": True},
        {"shape": [0, 2**39]},
        {"shape": []},
        {"shape": [5], "full": True},
    ],
)
def test_a_header_that_promises_much(layer, tmp_path):
    path = compact(
        tmp_path / "t", {"seed": torch.zeros(1, dtype=torch.int64)}, layers=[{"name": "a", "dtype": "float32", **layer}]
    )
    assert within(lambda: Ticket.load(path)).startswith("TicketError")


# ---------------------------------------------------------------- checkpoints: sealed, of this training, and wrong

KEY, RECIPE = {"k": 1}, Recipe(max_epochs=5, patience=None)


def trained():
    model = network()
    opt, weights = training.optimizer(model, RECIPE), list(prunable(model).values())
    masks = [torch.ones_like(w, requires_grad=False) for w in weights]
    training.step(model, opt, torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), weights, masks)
    return model, opt, masks


def resealed(path, tensors=None, drop=(), **meta):
    checkpoints.keep(path, *trained(), None, KEY, [[1.5, 40.0]])
    raw = path.read_bytes()
    held = safetensors.torch.load(raw)
    meta = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"] | meta
    held = {n: t for n, t in (held | (tensors or {})).items() if n not in drop}
    path.write_bytes(safetensors.torch.save(held, meta | {"sha256": checkpoints._seal(held, meta)}))
    return path


@pytest.mark.parametrize(
    "change",
    [
        dict(drop=["model/fc1.weight"]),
        dict(tensors={"model/x": torch.ones(1)}),
        dict(tensors={"model/fc1.weight": torch.ones(1)}),
        dict(drop=["masks/fc1.weight"]),
        dict(tensors={"velocity/fc1.weight": torch.ones(77)}),
        dict(tensors={"masks/fc1.weight": torch.full_like(network().fc1.weight.detach(), 7)}),
        dict(records="5"),
        dict(records='"ab"'),
        dict(records="[5]"),
        dict(records="[[1.5]]"),
        dict(records='[["a", "b"]]'),
        dict(records="[[" + "9" * 400 + ", 1.5]]"),
        dict(records='{"a": 1}'),
    ],
    ids=str,
)
def test_a_sealed_checkpoint_of_odd_content_is_refused(change, tmp_path):
    with pytest.raises(ValueError, match="remove it, and training starts anew") as error:
        checkpoints.resume(resealed(tmp_path / "c", **change), *trained(), None, KEY)
    one_sentence(error)


def test_a_good_checkpoint_is_read(tmp_path):
    assert checkpoints.resume(resealed(tmp_path / "c"), *trained(), None, KEY) == [[1.5, 40.0]]


def test_a_good_checkpoint_is_read_whatever_the_order_of_names_in_the_file(tmp_path):
    "safetensors gives names in the order of the alphabet, ResNet-20 has another."

    def going():
        model = create("resnet-20", (3, 8, 8), 3, generator(0, "init"), width=0.125)
        assert list(prunable(model)) != sorted(prunable(model))
        return (
            model,
            training.optimizer(model, RECIPE),
            [torch.rand_like(w).round().detach() for w in prunable(model).values()],
        )

    model, opt, masks = going()
    checkpoints.keep(tmp_path / "c", model, opt, masks, None, KEY, [[1.5, 40.0]])
    again, other, read = going()
    assert checkpoints.resume(tmp_path / "c", again, other, read, None, KEY) == [[1.5, 40.0]] and all(
        map(torch.equal, masks, read)
    )


@pytest.mark.parametrize("meta", [dict(key="[" * 10**5), dict(records="9" * 10**5), dict(sparsity="{")])
def test_a_checkpoint_that_cannot_be_parsed_is_begun_anew(meta, tmp_path):
    with pytest.warns(UserWarning, match="starts anew"):
        assert checkpoints.resume(resealed(tmp_path / "c", **meta), *trained(), None, KEY) == []


@pytest.mark.parametrize("extra", ["5", "{}", '{"done": "x", "history": []}', '{"done": 1, "history": 5}'])
def test_a_checkpoint_with_an_odd_state_of_masks_is_refused(extra, tmp_path):
    from lth_companion.methods.dynamic import DropGrow, settings

    def going():
        model, opt, masks = trained()
        work = DropGrow(settings("RigL", 0.5, 1), 0)
        work.attach(list(prunable(model)), list(prunable(model).values()), masks, opt, 90)
        return model, opt, masks, work

    path, case = tmp_path / "c", going()
    checkpoints.keep(path, *case, KEY, [[1.5, 40.0]])
    raw = path.read_bytes()
    tensors, meta = (
        safetensors.torch.load(raw),
        json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"] | {"sparsity": extra},
    )
    assert checkpoints.resume(path, *going(), KEY)
    path.write_bytes(safetensors.torch.save(tensors, meta | {"sha256": checkpoints._seal(tensors, meta)}))
    with pytest.raises(ValueError, match="remove it, and training starts anew"):
        checkpoints.resume(path, *going(), KEY)


# ---------------------------------------------------------------- data


def test_gz_of_an_idx_that_is_altered_in_the_middle(tmp_path):
    raw = bytearray(gzip.compress(b"\0\0\x08\x01" + (5000).to_bytes(4, "big") + os.urandom(5000)))
    for at in (10, 11, 15, 40, 2000, len(raw) - 6):
        (tmp_path / "a.gz").write_bytes(raw[:at] + b"\xff\xff\xff" + raw[at + 3 :])
        with pytest.raises(ValueError) as error:
            formats.read_idx(tmp_path / "a")
        one_sentence(error)


@pytest.mark.parametrize(
    "axes",
    [
        bytes([255]) + b"\0\0\0\1" * 255,
        bytes([255]) + b"\0\0\0\0" * 255,
        b"\4" + b"\0\0\0\0" + b"\xff\xff\xff\xff" * 3,
        b"\3" + b"\xff" * 12,
        b"\3\0\0",
    ],
    ids=len,
)
def test_an_idx_of_odd_axes(axes, tmp_path):
    (tmp_path / "a").write_bytes(b"\0\0\x08" + axes + b"\7")
    assert within(lambda: formats.read_idx(tmp_path / "a")).startswith(("ValueError", "array"))


def test_an_idx_that_is_a_pipe_or_a_device(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        formats.read_idx(tmp_path / "a")
    (tmp_path / "b").symlink_to("/dev/zero")
    (tmp_path / "c.gz").symlink_to("/dev/zero")
    for name in "bc":
        with pytest.raises((ValueError, FileNotFoundError)):
            formats.read_idx(tmp_path / name)


def laughs(levels=30):
    inner = ["ha"]
    for _ in range(levels):
        inner = [inner] * 10
    return pickle.dumps(inner, protocol=2)


PICKLES = {
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "memo as text": b"\x80\x02Np2147483647\n.",
    "text made bytes often": (
        b"\x80\x02c_codecs\nencode\nq\x01X"
        + (1 << 20).to_bytes(4, "little")
        + b"a" * (1 << 20)
        + b"q\x02X\x06\0\0\0latin1q\x030]("
        + b"h\x01h\x02h\x03\x86R" * 20_000
        + b"e."
    ),
    "colliding numbers": (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0c" + (k * (2**61 - 1)).to_bytes(12, "little") + b"N" for k in range(40_000))
        + b"u."
    ),
    "many steps": b"\x80\x02](" + b"N" * (1 << 21) + b"e.",
    "bytes of a size": b"\x80\x04\x8e" + (1 << 45).to_bytes(8, "little") + b".",
    "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.",
    "long": b"\x80\x02\x8b" + (1 << 24).to_bytes(4, "little") + b"\1" * (1 << 24) + b".",
    "digits": b"L" + b"9" * 10**6 + b"L\n.",
    "recursive": b"\x80\x02]q\0h\0a.",
    "deep": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"Pabc\n.",
    "instance": b"(ios\nsystem\n.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch PWNED\x85R.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_cost_much(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = within(lambda: formats.read_arrays(PICKLES[name]), seconds=20)
    assert (
        text.startswith("ValueError: not a pickle of arrays") and "\n" not in text and not (tmp_path / "PWNED").exists()
    )


def test_shared_lists_are_read_once(tmp_path):
    (tmp_path / "b").write_bytes(laughs())
    assert within(lambda: formats.read_cifar_batch(tmp_path / "b"), seconds=10).startswith("ValueError")


def tar_xz(path, *members, raw=b""):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(lzma.compress(stream.getvalue() + raw, preset=0))
    return path


def member(name, kind=tarfile.REGTYPE, link="", content=b""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, content


def jpeg(width=32, height=32, declared=None):
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "JPEG")
    raw = bytearray(stream.getvalue())
    if declared:
        at = raw.index(b"\xff\xc0") + 5
        raw[at : at + 4] = declared[1].to_bytes(2, "big") + declared[0].to_bytes(2, "big")
    return bytes(raw)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "odd",
    [
        member("train/cat/../../../x.jpg"),
        member("/train/cat/0001.jpg"),
        member("train/cat/0001.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        member("train/cat/0001.jpg", tarfile.LNKTYPE, "/etc/passwd"),
        member("train/cat/0001.jpg", tarfile.CHRTYPE),
        member("train/cat/0001.jpg", tarfile.BLKTYPE),
        member("train/cat/0001.jpg", tarfile.FIFOTYPE),
        member("train/cat/0001.jpg", content=jpeg(declared=(65500, 65500))),
        member("train/cat/0001.jpg", content=jpeg(declared=(12000, 10000))),
        member("train/cat/0001.jpg", content=jpeg()[:300]),
        member("train/cat/0001.jpg", content=jpeg(40, 40)),
        member("train/cat/0001.jpg", content=pickle.dumps(Touch())),
        member("train/cat/0001.jpg", content=b"\x89PNG\r\n\x1a\n" + bytes(99)),
        member("train/cat/0001.jpg", tarfile.CONTTYPE, content=b"x"),
    ],
    ids=lambda m: f"{m[0].name[-12:]}-{m[0].type}-{len(m[1])}",
)
def test_an_archive_with_an_odd_member(odd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tar_xz(
        tmp_path / "a.tar.xz",
        member("train/cat/0000.jpg", content=jpeg()),
        odd,
        member("test/cat/0000.jpg", content=jpeg()),
    )
    with pytest.raises(ValueError) as error:
        formats.read_cifar_jpegs(path)
    one_sentence(error)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.xz"]


def header_block(info):
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", ["folders", "long name", "pax", "names of names"])
def test_an_archive_that_is_a_bomb(kind, tmp_path):
    folder, long, pax = tarfile.TarInfo("train"), tarfile.TarInfo("././@LongLink"), tarfile.TarInfo("././@PaxHeader")
    folder.type, long.type, pax.type = tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE
    long.size = pax.size = 8 << 30
    path, one = tmp_path / "a.tar.xz", lzma.compress(bytes(1 << 26), preset=0)
    if kind == "folders":
        path.write_bytes(lzma.compress(header_block(folder) * (1 << 16), preset=0) * 300)  # 10 GB
    elif kind == "names of names":
        long.size = 1
        path.write_bytes(lzma.compress((header_block(long) + bytes(512)) * 5000, preset=0))
    else:
        path.write_bytes(lzma.compress(header_block(long if kind == "long name" else pax), preset=0) + one * 150)
    assert path.stat().st_size < 3_000_000
    text = within(lambda: formats.read_cifar_jpegs(path), memory=3 << 29, seconds=60)
    assert text.startswith("ValueError: ") and "\n" not in text, text


def test_a_wheel_that_was_exchanged(tmp_path):
    "No member of it is opened before its checksum is right, so a bomb in it never unpacks."
    with zipfile.ZipFile(tmp_path / "w.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle.dumps(Touch())))
    with pytest.raises(ValueError, match="not the wheel"):
        formats.read_mnist_wheel(tmp_path / "w.whl")
    (tmp_path / "big.whl").symlink_to("/dev/zero")
    assert within(lambda: formats.read_mnist_wheel(tmp_path / "big.whl")).startswith("ValueError")


def test_bad_data_are_passed_over_in_one_sentence(tmp_path, monkeypatch):
    "Through `load`, as a user meets them: every source is named with what is wrong with it."
    monkeypatch.setenv("LTH_DATA", str(tmp_path / "own"))
    monkeypatch.setenv("LTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    for folder in ("MNIST/raw", "cifar-10-batches-py"):
        (own / folder).mkdir(parents=True)
    gz = bytearray(gzip.compress(os.urandom(3000)))
    gz[20:30] = b"\xff" * 10
    (own / "MNIST/raw/train-images-idx3-ubyte.gz").write_bytes(gz)
    (own / "cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps(Touch()))
    tar_xz(own / "cifar10-jpeg.tar.xz", member("train/cat/0001.jpg", content=jpeg(declared=(65500, 65500))))
    for name in ("mnist", "cifar10", "cifar10-jpeg"):
        with pytest.raises(DataError, match="passed over") as error:
            data.load(name)
        one_sentence(error)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "raw",
    [jpeg(declared=(65500, 65500)), jpeg()[:200], pickle.dumps(Touch()), b"\x89PNG\r\n\x1a\n" + bytes(200), b""],
    ids=len,
)
def test_an_odd_image_in_an_image_folder(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "a.jpg").write_bytes(raw)
    train, _ = granet_parallel.open_folder(tmp_path, 32)
    with pytest.raises(granet_parallel.ImagenetError, match="restore it or remove it") as error:
        train[0]
    one_sentence(error)
    assert not (tmp_path / "PWNED").exists()


# ---------------------------------------------------------------- clusters, ledgers, reports


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch PWNED']",
        "!!python/name:os.system",
        "local: !!python/object/new:os.system ['touch PWNED']",
        "wait: 2001-99-99",
        "wait: !!timestamp x",
        "wait: !!bool x",
        "wait: !!int x",
        "wait: !!float x",
        "? [a]\n: 1",
        "[" * 60_000,
        "wait: " + "9" * 5000,
        "a: &a [*a]",
        "wait: *b",
        "- 1",
        "5: 6",
        "wait: 1\n" * 10 + "wait: [",
        "local:\n  <<: {workers: 2}",
        "\ufeffwait: [1]",
        "wait: 1e999999\nlocal: 3",
    ],
    ids=lambda t: t[:30],
)
def test_an_odd_cluster_configuration(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ClusterError) as error:
        cluster_start.read_config(tmp_path / "c.yaml")
    one_sentence(error)
    assert not (tmp_path / "PWNED").exists()


def test_merge_keys_do_not_multiply(tmp_path):
    lines = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    assert within(lambda: cluster_start.read_config(tmp_path / "c.yaml"), seconds=10).startswith("ClusterError")


@pytest.mark.parametrize(
    "text",
    [
        "claim = 5",
        "claim = [1]",
        "claim = ['x']",
        "[claim]\nid = 1",
        "a = " + "[" * 5000,
        "a = " + "9" * 5000,
        "[[claim]]\nid = 1e400",
        "[[claim]]\n" + "a." * 5000 + "b = 1",
        "\0",
        "[[claim]]\nid = 2001-99-99",
    ],
    ids=lambda t: t[:20],
)
def test_an_odd_ledger(text, tmp_path):
    (tmp_path / "l.toml").write_text(text)
    with pytest.raises(ClaimError) as error:
        claims.ledger("granet", tmp_path / "l.toml")
    one_sentence(error)
    with pytest.raises(ClaimError):
        claims.ledger("granet", tmp_path)


def test_an_odd_provenance_counts_as_none(tmp_path):
    notebook = tmp_path / "n.ipynb"
    notebook.write_text('{"cells": []}')
    entry = type("Entry", (), {"path": notebook})()
    for text in (
        '{"code": []}',
        '{"outputs": ["../../etc/passwd"]}',
        '{"trials": 5}',
        '{"parameters": "x"}',
        "[" * 10**5,
        '{"a": ' + "9" * 10**5 + "}",
        '{"outputs": null}',
    ):
        (tmp_path / "provenance.json").write_text(text)
        assert provenance.read_provenance(tmp_path) == {} and not provenance.unchanged(entry, {}, "cpu", tmp_path)


def test_the_report_shows_names_and_does_not_run_them(tmp_path):
    folder = tmp_path / "granet" / "01_x"
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(
        json.dumps(
            {
                "outputs": {'"><script>alert(1)</script>.svg': "x", "javascript:alert(1).csv": "y"},
                "device": "<script>",
                "code": {"version": "<script>"},
                "trials": {"count": "<script>"},
            }
        )
    )
    page = report.figures_html(folder, tmp_path, ())
    assert "<script" not in page and "'javascript:" not in page


# ---------------------------------------------------------------- notebooks and parameters

CODE = "__import__('os').system('touch PWNED')"


def notebook(path, source, tags=("parameters",)):
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": source, "metadata": {"tags": list(tags)}}]}))
    return path


@pytest.mark.parametrize(
    "line",
    [
        f"x: int = {CODE}",
        f"x: {CODE} = 1",
        f"x: '{CODE}' = 1".replace("'os'", '"os"').replace("'touch PWNED'", '"touch PWNED"'),
        f"x: list[{CODE}] = 1",
        "x: ().__class__.__base__.__subclasses__() = 1",
        "x: [int for int in (1,)] = 1",
        "x: (lambda: 0)() = 1",
        "x: 9**9**9 = 1",
        "x: int = 9**9**9",
        "x: int = [0] * 10**9",
        "x: int",
        "x = 1",
        f"x = {CODE}",
        "x: f'{1}' = 1",
        "x: int = f'{1}'",
        "x: unknown = 1",
        "x: int.real = 1",
        "x: Literal[int] | dict[a] = 1",
        "x: int = " + "(" * 5000,
        "x: int = " + "-" * 50_000 + "1",
        "x: int = " + "9" * 10_000,
        "x: " + "list[" * 500 + "int" + "]" * 500 + " = 1",
        "x: " + "int | " * 20_000 + "int = 1",
        "x: int = 1\0",
        "x: int = \ud800",
        "x: int = {[]: 1}",
        "x: int = " + "a." * 30_000 + "b",
        "é" * 200_000,
        "%%bash\ntouch PWNED",
    ],
    ids=lambda t: t[:40],
)
def test_an_odd_parameters_cell_is_read_without_running_it(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = within(lambda: catalogue.inspect(notebook(tmp_path / "n.ipynb", line)), seconds=20)
    assert text.startswith("ReproduceError: ") and "\n" not in text and len(text) < 1500, text[:300]
    assert not (tmp_path / "PWNED").exists()


def test_types_are_read_as_they_were(tmp_path):
    import typing

    written = {
        "a: int | None = None": int | None,
        "b: list[float] = [1.5]": list[float],
        "c: Literal['x', 1, -1] = 'x'": typing.Literal["x", 1, -1],
        "d: dict[str, list[int]] = {}": dict[str, list[int]],
        "e: Optional[tuple[int, ...]] = None": typing.Optional[tuple[int, ...]],  # noqa: UP045
        "f: 'int' = 1": int,
        "g: Union[int, str] = 1": typing.Union[int, str],  # noqa: UP007
        "h: None = None": None,
        "i: tuple[()] = ()": tuple[()],
        "j: list = []": list,
    }
    found = catalogue.inspect(notebook(tmp_path / "n.ipynb", "\n".join(written)))
    assert [p.type for p in found.values()] == list(written.values())


@pytest.mark.parametrize(
    "written", ["tuple[int, int, ...]", "tuple[1, ...]", "list[1]", "Literal[1.5, 'a']", "dict[int]"]
)
def test_a_type_that_is_none_is_named(written, tmp_path):
    with pytest.raises(ReproduceError) as error:
        entry = catalogue.Entry("p", "n", notebook(tmp_path / "n.ipynb", f"x: {written} = 1"))
        assert catalogue.read_params(["x=zzz"], [entry])
    assert "x" in one_sentence(error)


@pytest.mark.parametrize(
    "value",
    [
        CODE,
        f"{CODE}; x=1",
        "[" * 10**5,
        "-" * 10**5 + "1",
        "9" * 10**6,
        "nan",
        "1e999",
        "{[]: 1}",
        "\0",
        "é" * 10**5,
        "lambda: 0",
        '"\n' + CODE,
        "(" * 199 + ")" * 199,
        "1," * 10**4 + CODE,
    ],
)
def test_a_value_that_is_code_stays_text(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = catalogue.Entry(
        "p", "n", notebook(tmp_path / "n.ipynb", "n: int = 1\nmany: list[int] = []\nword: str = ''")
    )
    for name in ("n", "many")[: 1 if value[0] == "(" else 2]:  # empty brackets are an empty list
        text = within(lambda name=name: catalogue.read_params([f"{name}={value}"], [entry]), seconds=20)
        assert text.startswith("ReproduceError") and "\n" not in text, text[:300]
    assert catalogue.read_params([f"word={value}"], [entry])["p/n"]["word"] == value
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "value",
    ['"; import os; os.system("touch PWNED") #', '\\"; x #', "\n" + CODE, "'''" + CODE + "'''", "\\", "{x}", "\x00"],
)
def test_papermill_writes_a_text_as_a_text(value):
    from papermill.translators import PythonTranslator

    body = ast.parse(PythonTranslator.codify({"word": value, "more": {"k": [value]}})).body
    assert [ast.literal_eval(node.value) for node in body] == [value, {"k": [value]}]


@pytest.mark.parametrize(
    "text",
    [
        "# " + " " * 10**5 + "x",
        "\n" * 10**6,
        "minutes" + ":" * 10**6,
        "# a\n> b\nminutes: " + "a" * 10**6,
        "minutes: smoke " + "9" * 10**6,
        "#" * 10**6,
        "regenerates: " + ";" * 10**6,
        "minutes" * 10**5,
    ],
)
def test_a_long_first_cell_is_read_in_linear_time(text, tmp_path):
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": text}]}))
    start = time.process_time()
    catalogue.read_entry(tmp_path / "n.ipynb")
    assert time.process_time() - start < 2


# ---------------------------------------------------------------- the fuzzer, in its short form


def test_fuzz_in_short(tmp_path):
    table = tmp_path / "fuzz.csv"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz.py", "--inputs", "1000", "--out", table],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(",") for line in table.read_text().splitlines()]
    # each target accepts some and refuses some
    assert len(rows) == 10 and all(row[1] == "1000" and int(row[2]) > 20 and int(row[3]) > 20 for row in rows[1:])


def test_the_fuzzer_counts_what_goes_wrong(monkeypatch, capfd):
    sys.path.insert(0, str(ROOT / "tests"))
    import fuzz

    def broken(folder):
        """Of 40 inputs: a crash of the interpreter, an exception, a hang, a file made, one that runs out of memory,
        an error of many lines.
        """

        def read(i):
            if i == 3:
                faulthandler.disable()
                os.kill(os.getpid(), signal.SIGSEGV)
            if i == 5:
                raise KeyError("x")
            if i == 7:
                while True:
                    pass
            if i == 9:
                (folder / "PWNED").touch()
            if i == 11:
                return bytes(fuzz.MEMORY + (1 << 30))
            if i == 13:
                raise TicketError("two\nlines")
            raise TicketError("refused; mend it.")

        return (lambda rng: rng.number), read, TicketError

    monkeypatch.setattr(fuzz.random, "Random", lambda text: type("R", (), {"number": int(text.rpartition("/")[2])})())
    monkeypatch.setitem(fuzz.TARGETS, "broken", broken)
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    row = fuzz.hunt("broken", 40)
    assert (row["crashes"], row["hangs"], row["inputs"], row["accepted"]) == (5, 1, 40, 0), capfd.readouterr().out
