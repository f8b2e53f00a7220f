"""Readers of what comes from elsewhere, fed with valid files that were altered at random.

    python tests/fuzz.py [TARGET ...] [--inputs 100000] [--seed 0] [--out FILE]

Each target runs in a process of its own with bounded memory, each input against a limit of time. A reader may
return a value or raise the error that it documents; anything else counts as a crash. Exit code 1 if there was a
crash or a hang. An input follows from (seed, target, number): `python tests/fuzz.py idx --only 1234` shows what
became of one.
"""

import argparse
import copy
import csv
import gzip
import hashlib
import io
import json
import lzma
import mmap
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError

from lth_companion.lab import catalogue, claims, cluster_start, provenance, report
from lth_companion.lab.executors import reason
from lth_companion.lab.sparse_trials import SparseTrial
from lth_companion.lab.store import Store, StoreError, _envelope, seal, unseal
from lth_companion.lab.sweeps import Idle
from lth_companion.measures import storage
from lth_companion.measures.storage import Source
from lth_companion.methods.dynamic import DropGrow
from lth_companion.methods.dynamic import settings as dynamic_settings
from lth_companion.methods.pruning import prune
from lth_companion.methods.scorers import ScoreError, magnitude
from lth_companion.methods.stacking import Method, canonical, check_init, scorer
from lth_companion.methods.supermasks import Search, Supermask
from lth_companion.papers.learning_to_learn import TicketTrial
from lth_companion.papers.weight_recycling import SupermaskTrial
from lth_companion.tickets import Ticket, TicketError, generator, prunable
from lth_companion.training import checkpoints as written
from lth_companion.training import formats
from lth_companion.training import loop as training
from lth_companion.training.models import create
from lth_companion.training.recipe import Progress, Recipe

SECONDS, MEMORY = 5, 1 << 31  # for one input: seconds of CPU time, bytes of address space beyond those of the imports
EXPECTED = r"The (pack|stored result|checkpoint) "  # warnings that readers document
ROOT, storage_key = Path(__file__).parent.parent, "lth_companion.storage"
TARGETS = {}


def target(make):
    TARGETS[make.__name__.replace("_", "-")] = make
    return make  # noqa: E702


class Hang(BaseException):
    "Not caught by a reader's `except Exception`."


# --- alterations

EDGES = (
    0,
    1,
    -1,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
ODD = (
    None,
    True,
    -1,
    0,
    0.5,
    2**31,
    2**63,
    -(10**30),
    10**400,
    1e308,
    "",
    "x",
    "a\0b",
    "\ud800",
    "../../etc/passwd",
    "/etc/passwd",
    "x" * 3000,
    [],
    {},
    [[]],
    {"a": 1},
)
MARKS = {
    "@deep": "[" * 3000 + "]" * 3000,
    "@deeper": '{"a":' * 3000 + "1" + "}" * 3000,
    "@huge": "9" * 5000,
    "@nan": "NaN",
    "@inf": "-Infinity",
    "@exp": "1e999",
    "@twice": '{"hash":"a","hash":"b","a":1,"a":2}',
    "@open": "[",
    "@float": '{"__float__":[]}',
    "@big": '{"__float__":' + "9" * 400 + "}",
    "@text": '{"__float__":"x"}',
}


def altered(rng, raw, pieces=(b"",)):
    "Bytes with one to eight random edits."
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        a, n, what = rng.randrange(len(raw) + 1), rng.choice((1, 1, 2, 4, 8, 40)), rng.randrange(8)
        if what == 0 and raw:
            raw[a % len(raw)] ^= 1 << rng.randrange(8)
        elif what == 1:
            raw[a : a + n] = rng.randbytes(n)
        elif what == 2:
            del raw[a : a + n]
        elif what == 3:
            raw[a:a] = raw[a : a + n] * rng.choice((1, 2, 100))
        elif what == 4:
            size = rng.choice((1, 2, 4, 8))
            raw[a : a + size] = (rng.choice(EDGES) % 256**size).to_bytes(size, rng.choice(("little", "big")))
        elif what == 5:
            raw[a:a] = rng.choice(pieces)
        elif what == 6:
            b = rng.randrange(len(raw) + 1)
            raw[a : a + n], raw[b : b + n] = raw[b : b + n], raw[a : a + n]
        elif rng.random() < 0.3:
            del raw[a:]
    return bytes(raw)


def odd(rng, value):
    "A copy of a JSON value in which one to three places hold something else."
    value = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places, todo = [], [value]
        while todo:
            box = todo.pop()
            for key, inner in box.items() if isinstance(box, dict) else enumerate(box):
                places.append((box, key))
                if isinstance(inner, (dict, list)):
                    todo.append(inner)
        box, key = rng.choice(places)
        what = rng.random()
        if what < 0.6:
            box[key] = copy.deepcopy(rng.choice((*ODD, *MARKS)))
        elif what < 0.75:
            box[key] = copy.deepcopy(rng.choice(places)[0])
        elif box is value:
            pass
        elif isinstance(box, dict):
            box[rng.choice(("x", "../x", "a" * 500, ""))] = box.pop(key)
        elif what < 0.85:
            del box[key]
        else:
            box.insert(key, copy.deepcopy(box[key]))
    return value[0]


def text_of(value) -> str:
    "JSON in which the `MARKS` stand for what `json.dumps` would not write."
    text = json.dumps(value)
    for mark, other in MARKS.items():
        text = text.replace(f'"{mark}"', other)
    return text


def odd_flat(rng, value: dict) -> dict:
    "As `odd`, for a dict that must hold texts alone."
    found = odd(rng, value)
    return (
        {str(k): v if isinstance(v, str) else text_of(v) for k, v in found.items()} if isinstance(found, dict) else {}
    )


def plainly(text):
    return text.encode(errors="replace").decode()  # without lone surrogates, which safetensors does not write


def odd_text(rng, value) -> str:
    return text_of(odd(rng, value))


def file_in(folder, name="file"):
    "A function that writes its bytes to one file and returns the path."
    path = folder / name

    def put(raw):
        path.write_bytes(raw)
        return path  # noqa: E702

    return put


# --- targets: each gives (draw an input, read it, the errors that the reader documents)


@target
def notation(folder):
    words = [
        "snip",
        "synflow",
        "grasp",
        "magnitude",
        "random",
        "once(",
        ")",
        "@train",
        "@eval",
        ">",
        "/",
        ":",
        "saw:",
        "saw*:",
        "standard",
        "U-MS",
        "I-SS",
        " ",
        "  ",
        "\t",
        "\n",
        "",
        "\0",
        "é",
        "(",
        "@",
        "x" * 400,
        " " * 5000,
        "snip>" * 300,
    ]
    valid = ["saw:snip magnitude>synflow U-MS", "standard once(snip)>synflow I-SS", "saw*:grasp@train random U-SS"]

    def draw(rng):
        if rng.random() < 0.5:
            return altered(rng, rng.choice(valid).encode(), [w.encode() for w in words]).decode("latin1")
        return "".join(rng.choices(words, k=rng.randrange(1, 12)))

    def read(text):
        done = 0
        for reader in (Method.parse, scorer, check_init):
            try:
                found = reader(text)
            except ScoreError as error:
                sentence(error)
                continue
            done += 1
            if reader is Method.parse:
                assert Method.parse(str(found)) == found
            if reader is scorer:
                assert scorer(found.name).name == found.name
                canonical(found.name)
        if not done:
            raise ScoreError("refused by all three")

    return draw, read, ScoreError


@target
def trials(folder):
    "Descriptions of trials, sealed lines and packs; half of the altered records are sealed anew, as an attacker would."
    some = [
        TicketTrial(scorer="magnitude>synflow", rounds="I-MS", density=0.1, seed=3),
        SupermaskTrial(search=Supermask(density=0.5)),
        SparseTrial(scorer="snip", density=0.02),
        Idle(number=1, seconds=0.5),
    ]
    fields = [json.loads(t.model_dump_json()) for t in some]
    records = [
        {
            "hash": t.hash,
            "trial": t.identity,
            "result": {"accuracies": [41.5, 0.5], "kept": {"fc1.weight": 3}},
            "meta": {"seconds": 1.0},
        }
        for t in some
    ]
    lines, store = [seal(r) for r in records], folder / "store"

    def line(rng):
        way = rng.randrange(4)
        if way == 0:
            return rng.choice(lines)
        if way == 1:
            return altered(rng, rng.choice(lines), lines)
        return _envelope(
            odd_text(rng, rng.choice(records)).encode() if way == 2 else altered(rng, rng.choice(lines)[86:-2])
        )

    def draw(rng):
        way, i = rng.choice(("fields", "fields", "line", "file", "pack.gz", "pack.xz")), rng.randrange(len(some))
        if way == "fields":
            return (
                way,
                i,
                odd_text(rng, fields[i]) if rng.random() < 0.7 else altered(rng, json.dumps(fields[i]).encode()),
            )
        if way in ("line", "file"):
            return way, i, line(rng)
        raw = b"".join(line(rng) for _ in range(rng.randrange(1, 4)))
        raw = gzip.compress(raw, 1) if way == "pack.gz" else lzma.compress(raw, preset=0)
        return way, i, altered(rng, raw) if rng.random() < 0.4 else raw

    def read(drawn):
        way, i, raw = drawn
        if way == "fields":
            return type(some[i]).model_validate_json(raw).hash
        if way == "line":
            found = unseal(raw, some[i].hash)
        else:
            path = store / "results" / some[i].hash[:2] / f"{some[i].hash}.json" if way == "file" else folder / way
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
            opened = Store(store)
            if way != "file":
                opened.attach(path)
            found = [opened.get(h) for h in opened.hashes()]
            if way == "file" and path.exists():
                path.unlink()
            for bad in (store / "damaged").glob("*"):
                bad.unlink()
        if not found:
            raise StoreError("nothing in it is whole")

    return draw, read, (ValueError, StoreError)


@target
def tickets(folder):
    """All forms of a ticket: bytes, the file's header, the ticket's header, tensors; the compact forms with their
    checksum made anew.
    """
    model = create("lenet-300-100", (1, 4, 4), 3, generator(0, "init"), width=0.02)
    model.requires_grad_(True)
    whole = Ticket.of(model, prune(model, magnitude, 0.4, []))
    work = Search(
        create("lenet-300-100", (1, 4, 4), 3, generator(1, "init"), width=0.02),
        Supermask(density=0.5, change="iterand", frequency=1),
        Recipe(max_epochs=9, patience=None),
        3,
        5,
    )
    for e in (1, 2):
        work.change(e, 9)
    seeded = Ticket.of(work.model, work.put())
    forms = {
        form: Ticket.of(model) if form == "dense" else seeded if form in ("seed", "binary") else whole
        for form in ("plain", *storage.FORMS)
    }
    put, files = file_in(folder), []
    for form, ticket in forms.items():
        source = Source.of(work) if form == "seed" else None
        if form == "plain" or form in storage.possible(ticket, source):
            files.append(ticket.save(folder / form, form, source).read_bytes())
    parsed = [
        (safetensors.torch.load(raw), json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])) for raw in files
    ]
    dtypes = [
        t
        for t in (
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.uint8,
            torch.bool,
            torch.float8_e4m3fn,
            torch.complex64,
        )
    ]

    def changed(rng, tensors):
        tensors = dict(tensors)
        for _ in range(rng.choice((0, 1, 1, 2))):
            name = rng.choice(list(tensors))
            t, what = tensors[name], rng.randrange(7)
            if what == 0:
                tensors[name] = (torch.zeros_like(t, dtype=torch.float32) if t.is_complex() else t).to(
                    rng.choice(dtypes)
                )
            elif what == 1:
                tensors[name] = t.reshape(-1)[: rng.randrange(t.numel() + 1)].clone()
            elif what == 2 and t.numel():
                tensors[name] = torch.full_like(t, rng.choice((0, 1, 255)))
            elif what == 3:
                tensors[rng.choice(("x", "rest/x", *tensors))] = tensors.pop(name)
            elif what == 4:
                tensors[name] = torch.zeros(rng.choice(((0,), (0, 2**40), (1,) * 9, ())))
            elif what == 5 and t.numel() and t.is_floating_point() and t.element_size() > 1:
                tensors[name] = torch.full_like(t, rng.choice((float("nan"), float("inf"), 6e4)))
            elif t.numel():
                tensors[name] = torch.frombuffer(
                    bytearray(rng.randbytes(t.numel() * t.element_size())), dtype=t.dtype
                ).reshape(t.shape)
        return tensors

    def meta_of(rng, meta, tensors):
        meta = dict(meta)
        if storage_key not in meta:
            return meta | (
                {k: odd_text(rng, json.loads(meta[k])) for k in ("names", "rest") if rng.random() < 0.5}
                if rng.random() < 0.7
                else odd_flat(rng, meta)
            )
        header = json.loads(meta[storage_key])
        if rng.random() < 0.8:
            header = odd(rng, header)
        # the checksum as it should be, and for half of them no other fault than what the tensors tell
        if rng.random() < 0.8:
            try:
                header["checksum"] = storage._checksum(tensors, storage._Header.model_validate(header))
            except Exception:
                pass
        return {storage_key: text_of(header)}

    def draw(rng):
        i = rng.randrange(len(files))
        raw, (tensors, header), way = files[i], parsed[i], rng.randrange(4)
        if way == 0:
            return altered(rng, raw, files)
        if way == 1:
            text = odd_text(rng, header).encode()
            return len(text).to_bytes(8, "little") + text + raw[8 + int.from_bytes(raw[:8], "little") :]  # noqa: E702
        tensors = changed(rng, tensors)
        meta = {plainly(k): plainly(v) for k, v in meta_of(rng, header["__metadata__"], tensors).items()}
        return safetensors.torch.save(tensors, meta)

    def read(raw):
        ticket = Ticket.load(put(raw))
        return ticket.density, ticket.digest, ticket.densities, ticket.empty

    return draw, read, TicketError


@target
def checkpoints(folder):
    "Checkpoints of a training with changing masks and of a search, sealed anew."
    recipe, put, key = Recipe(max_epochs=9, patience=None), file_in(folder), {"k": 1}

    def net():
        return create("lenet-300-100", (1, 4, 4), 3, generator(0, "init"), width=0.02)

    model, searched = net(), net()
    opt, weights = training.optimizer(model, recipe), prunable(model)
    masks = [torch.ones_like(w, requires_grad=False) for w in weights.values()]
    grow = DropGrow(dynamic_settings("RigL", 0.5, 1), 0)
    grow.attach(list(weights), list(weights.values()), masks, opt, 90)
    training.step(model, opt, torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), list(weights.values()), masks)
    work = Search(searched, Supermask(density=0.5), recipe, 3, 5)
    cases = [(model, opt, masks, grow), (searched, work.opt, None, work)]
    raws, records = [], [[1.5, 40.0], [1.25, 50.0]]
    for case in cases:
        written.keep(folder / "c", *case, key, records)
        raws.append((folder / "c").read_bytes())  # noqa: E702
    parsed = [
        (safetensors.torch.load(raw), json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"])
        for raw in raws
    ]

    def draw(rng):
        i = rng.randrange(2)
        if rng.random() < 0.3:
            return i, altered(rng, raws[i])
        tensors, meta = dict(parsed[i][0]), dict(parsed[i][1])
        for _ in range(rng.randrange(3)):
            name = rng.choice(list(tensors))
            tensors[name] = rng.choice(
                (
                    tensors[name].double(),
                    tensors[name] * 2,
                    tensors[name].reshape(-1)[:2].clone(),
                    torch.zeros(0),
                    torch.zeros(3, 3, dtype=torch.int64),
                )
            )
            if rng.random() < 0.3:
                tensors[rng.choice(("x", "model/x", "masks/x"))] = tensors.pop(name)
        if rng.random() < 0.8:
            name = rng.choice(("records", "sparsity", "records", "key"))
            meta[name] = odd_text(rng, json.loads(meta[name]))  # noqa: E702
        return i, safetensors.torch.save(tensors, meta | {"sha256": written._seal(tensors, meta)})

    def read(drawn):
        i, raw = drawn
        found = written.resume(put(raw), *cases[i], key)
        run = Progress(recipe, 3)
        for record in found:
            run.epoch(*record)
        if not found:
            raise ValueError("begun anew.")

    return draw, read, ValueError


@target
def idx(folder):
    raw = [
        b"\0\0\x08\x03" + struct.pack(">III", 3, 4, 5) + bytes(range(60)),
        b"\0\0\x08\x01" + struct.pack(">I", 7) + bytes(7),
    ]
    plain, packed = file_in(folder, "a"), file_in(folder, "b.gz")

    def draw(rng):
        inner = altered(rng, rng.choice(raw), raw) if rng.random() < 0.7 else rng.choice(raw)
        if rng.random() < 0.5:
            return False, inner
        return True, altered(rng, gzip.compress(inner, 1), raw) if rng.random() < 0.7 else gzip.compress(inner, 1)

    def read(drawn):
        packed(drawn[1]) if drawn[0] else plain(drawn[1])
        return formats.read_idx(folder / ("b" if drawn[0] else "a")).sum()  # noqa: E702

    return draw, read, ValueError


@target
def cifar(folder):
    "Pickled batches, of Python 2 and of 3, altered as bytes and step by step."
    x, labels, put = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), [3, 7], file_in(folder)
    batches = [
        {b"data": x, b"labels": labels},
        {"data": x, "fine_labels": labels, "filenames": ["a.png", "b.png"]},
        {b"data": np.asfortranarray(x), b"labels": labels},
    ]
    raws = [pickle.dumps(b, protocol=p).replace(x.tobytes(), x.tobytes()) for b in batches for p in (0, 2, 4, 5)]
    steps = [
        b"cos\nsystem\n",
        b"(Vtouch PWNED\ntR",
        b"\x81",
        b"R",
        b"b",
        b"r\xff\xff\xff\x7f",
        b"q\xff",
        b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
        b"0",
        b"2",
        b"(",
        b"l",
        b"d",
        b"t",
        b"\x85",
        b"\x86",
        b"]",
        b"}",
        b"e",
        b"u",
        b"s",
        b"h\0",
        b"h\x01",
        b"h\x05",
        b"\x94",
        b"\x93",
        b"cnumpy\ndtype\n",
        b"cnumpy\nndarray\n",
        b"c_codecs\nencode\n",
        b"K\x01",
        b"N",
        b"\x8d" + b"\xff" * 8,
        b"\x95" + b"\xff" * 8,
        b"B\xff\xff\xff\xff",
        b".",
    ]
    heads = [r.find(x.tobytes()[:50]) for r in raws]

    def draw(rng):
        i = rng.randrange(len(raws))
        if rng.random() < 0.4 and heads[i] > 0:
            return altered(rng, raws[i][: heads[i]], steps) + raws[i][heads[i] :]  # all but the pixels
        if rng.random() < 0.2:
            return b"\x80\x02" + b"".join(rng.choices(steps, k=rng.randrange(30))) + b"."
        return altered(rng, raws[i], steps)

    def read(raw):
        return len(formats.read_cifar_batch(put(raw))[1])

    return draw, read, ValueError


@target
def cifar_jpeg(folder):
    "The archive of images: its compression, its members, the images in it."
    from PIL import Image

    put, level = file_in(folder, "a.tar.xz"), lambda i: np.full((32, 32, 3), i, np.uint8)

    def jpeg(i):
        stream = io.BytesIO()
        Image.fromarray(level(i)).save(stream, "JPEG")
        return stream.getvalue()  # noqa: E702

    images = [jpeg(i) for i in (0, 128, 255)]

    def archive(members):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name, content, kind, link in members:
                info = tarfile.TarInfo(name)
                info.size, info.type, info.linkname = len(content), kind, link
                tar.addfile(info, io.BytesIO(content))
        return stream.getvalue()

    valid = [
        ("train/cat/0000.jpg", images[0], tarfile.REGTYPE, ""),
        ("train/dog/0001.jpg", images[1], tarfile.REGTYPE, ""),
        ("test/cat/0000.jpg", images[2], tarfile.REGTYPE, ""),
    ]
    names, kinds = (
        [
            "../x",
            "/etc/x",
            "train/cat/0002.jpg",
            "train/../../x.jpg",
            "train",
            "x" * 300,
            "test/dog/0009.jpg",
        ],
        [b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"L", b"K", b"x", b"g", b"S"],
    )

    def draw(rng):
        members = list(valid)
        if rng.random() < 0.5:
            members.insert(
                rng.randrange(4),
                (
                    rng.choice(names),
                    rng.choice(images),
                    rng.choice(kinds),
                    rng.choice(("", "/etc/passwd", "train/cat/0000.jpg")),
                ),
            )
        if rng.random() < 0.5:
            i = rng.randrange(len(members))
            members[i] = (members[i][0], altered(rng, members[i][1]), *members[i][2:])  # noqa: E702
        raw = archive(members)
        if rng.random() < 0.4:
            raw = altered(rng, raw, [raw[:512]])
        raw = lzma.compress(raw, preset=0)
        return altered(rng, raw) if rng.random() < 0.2 else raw

    def read(raw):
        return formats.read_cifar_jpegs(put(raw))["train_x"].sum()

    return draw, read, ValueError


@target
def parameters(folder):
    "Notebooks of the clone and texts for `-p`: nothing in them is run."
    notebook = sorted((ROOT / "nbs" / "papers" / "learning_to_learn").glob("01_*.ipynb"))[0]
    cells = [
        c
        for c in json.loads(notebook.read_text())["cells"]
        if c["cell_type"] == "markdown" or "parameters" in c["metadata"].get("tags", ())
    ][:2]
    cell = next(c for c in cells if c["cell_type"] == "code")
    extra = (
        "\nx: int | None = None\ny: list[float] = [.5]\nz: Literal['a', 1, -1] = 'a'\nw: dict[str, int] = {}\nv:"
        " Optional[tuple[int, ...]] = (1,)\nu: float = 1e3\nt: bool = True\n"
    )
    source, put = "".join(cell["source"]) + extra, file_in(folder, "a.ipynb")
    good = catalogue.read_entry(notebook)
    known = catalogue.inspect(put(json.dumps({"cells": [{**cell, "source": source}]}).encode()))
    words = [
        "0",
        "1",
        "-",
        "1e999",
        "nan",
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        ",",
        "'",
        '"',
        ":",
        "9" * 5000,
        "__import__('os').system('touch PWNED')",
        "(" * 300,
        "[" * 5000,
        "-" * 5000,
        "None",
        "true",
        "\\",
        "\n",
        "\0",
        "é",
        "lambda: 0",
        "a.b",
        "1_0",
        "0x",
        "int",
        "str",
        " | ",
        "Literal",
        "=",
        " = ",
        "\nq: int = 1",
        "#",
    ]
    pieces = [w.encode() for w in words]

    def draw(rng):
        if rng.random() < 0.5:
            return (
                "value",
                rng.choice(list(known)),
                (
                    "".join(rng.choices(words, k=rng.randrange(5)))
                    if rng.random() < 0.7
                    else altered(rng, b"[0, 1, 2.5]", pieces).decode("latin1")
                ),
            )
        altered_source = altered(rng, source.encode(), pieces).decode("latin1")
        if rng.random() < 0.6:
            return "cell", "", json.dumps({"cells": [{**cell, "source": altered_source}]}).encode()
        raw = json.dumps({"cells": [cells[0], {**cell, "source": source}]})
        return (
            "notebook",
            "",
            odd_text(rng, json.loads(raw)).encode() if rng.random() < 0.6 else altered(rng, raw.encode(), pieces),
        )

    def read(drawn):
        way, name, raw = drawn
        if way == "value":
            return catalogue.convert(known[name], raw)
        path = put(raw)
        catalogue.read_entry(path), provenance.source_hash(path)
        for p in catalogue.inspect(path).values():
            catalogue.convert(p, p.default)

    assert good.title
    return draw, read, catalogue.ReproduceError


@target
def settings_files(folder):
    "Clusters in YAML, ledgers in TOML, measurements and provenances in JSON."
    yaml, toml = (
        (ROOT / "lth_companion" / "tables" / name).read_bytes() for name in ("clusters.yaml", "claims/granet.toml")
    )
    yaml = b"\n".join(line.split(b"#")[0].rstrip() for line in yaml.splitlines() if line.split(b"#")[0].strip())
    toml = b"[[claim]]".join(toml.split(b"[[claim]]")[:3])
    pieces = [
        b"[" * 3000,
        b"&a [*a]",
        b"<<: *a",
        b"!!python/object/apply:os.system ['touch PWNED']",
        b"!!timestamp x",
        b"2001-99-99",
        b"!!bool x",
        b"!!int x",
        b"9" * 5000,
        b"? ",
        b"- ",
        b": ",
        b"[[claim]]",
        b"=",
        b"{",
        b'"""',
        b"a.b.c = 1\n",
        b"nan",
        b"\xff",
    ]
    folder_of = folder / "smoke" / "granet" / "01_x"
    folder_of.mkdir(parents=True)  # noqa: E702
    y, t, known = file_in(folder, "c.yaml"), file_in(folder, "l.toml"), claims.ledger("granet")
    measured = {known[0].id: {"claim": known[0].id, "differences": [1.0, 2.0], "seeds": [0, 1], "noise": 0.5}}
    made = {
        "parameters": {"tier": "smoke"},
        "code": {"modules": "x"},
        "outputs": {"claims.json": "x", "a.svg": "y"},
        "trials": {"count": 3},
        "device": "cpu",
    }

    def draw(rng):
        way = rng.randrange(4)
        if way < 2:
            return way, altered(rng, (yaml, toml)[way], pieces), b""
        found = odd_text(rng, measured).encode() if rng.random() < 0.7 else json.dumps(measured).encode()
        own = copy.deepcopy(made)
        own["outputs"]["claims.json"] = hashlib.sha256(found).hexdigest()  # noqa: E702
        return way, found, (odd_text(rng, own) if rng.random() < 0.5 else json.dumps(own)).encode()

    def read(drawn):
        way, a, b = drawn
        if way == 0:
            return cluster_start.read_config(y(a))
        if way == 1:
            return claims.explorations("granet", "gpu", t(a))  # which reads its claims first
        (folder_of / "claims.json").write_bytes(a), (folder_of / "provenance.json").write_bytes(b)
        claims.judge_all(
            known, report.measurements(folder / "smoke" / "granet")[0], claims.explorations("granet", "gpu")
        )
        (
            provenance.unchanged(type("E", (), {"path": notebook})(), {}, "cpu", folder_of),
            report.figures_html(folder_of, folder / "smoke", ()),
        )

    notebook = file_in(folder, "n.ipynb")(b'{"cells": []}')
    return draw, read, (cluster_start.ClusterError, claims.ClaimError, catalogue.ReproduceError)


# --- the hunt


def sentence(error):
    "One line that is not endless; pydantic's own errors are made one by `trials.reason`."
    error = reason(error) if isinstance(error, ValidationError) else error
    assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 1500, (
        f"no sentence: {str(error)[:200]!r}"
    )


class State:
    "What a child tells: it is read even if the child was killed."

    fields = ("at", "accepted", "refused", "crashes", "hangs", "slowest_ns", "slowest", "base_kb")

    def __init__(self):
        self.memory = mmap.mmap(-1, 8 * len(self.fields))

    def __getitem__(self, name):
        return struct.unpack_from("<Q", self.memory, 8 * self.fields.index(name))[0]

    def __setitem__(self, name, value):
        struct.pack_into("<Q", self.memory, 8 * self.fields.index(name), value)


def hung(*_):
    raise Hang


def child(name, seed, numbers, state, report):
    "Try the inputs `numbers` in this process."
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as folder:
        os.chdir(folder)
        draw, read, documented = TARGETS[name](Path(folder))
        quiet()
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
        signal.signal(signal.SIGPROF, hung)
        state["base_kb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in numbers:
            state["at"] = i
            given, problem = draw(random.Random(f"{seed}/{name}/{i}")), None
            start = time.process_time_ns()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                read(given)
                state["accepted"] += 1  # noqa: E702
            except documented as error:
                state["refused"] += 1
                try:
                    sentence(error)
                except AssertionError as odd_one:
                    problem = odd_one
            except Hang as error:
                state["hangs"] += 1
                problem = error  # noqa: E702
            except BaseException as error:
                problem = error
            signal.setitimer(signal.ITIMER_PROF, 0)
            if (took := time.process_time_ns() - start) > state["slowest_ns"]:
                state["slowest_ns"], state["slowest"] = took, i
            if os.path.exists("PWNED"):
                os.remove("PWNED")
                problem = AssertionError("something in it was run")  # noqa: E702
            if problem is not None:
                if not isinstance(problem, Hang):
                    state["crashes"] += 1
                report(
                    f"{name} {i}: {type(problem).__name__}: {' '.join(str(problem).split())[:200]} at"
                    f" {' < '.join(f'{Path(f.filename).name}:{f.lineno}' for f in reversed(traceback.extract_tb(problem.__traceback__)[-4:]))}\n"
                )


def quiet():
    "Warnings are errors, but for those that readers document and those of Python's own compiler."
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", EXPECTED, UserWarning)
    for kind in (SyntaxWarning, DeprecationWarning):
        warnings.simplefilter("ignore", kind)


def hunt(name, inputs, seed=0, patience=60) -> dict:
    "One row of the table; a child that dies is one crash, and the next goes on behind the input that killed it."
    state, peak, crashed, stuck, begin = State(), 0, 0, 0, 0
    while begin < inputs:
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            try:
                child(name, seed, range(begin, inputs), state, lambda line: os.write(1, line.encode(errors="replace")))
            except BaseException:
                traceback.print_exc()
                os._exit(3)  # noqa: E702
            os._exit(0)
        at, since, done = -1, time.monotonic(), (0, 0, None)
        while not done[0]:
            time.sleep(0.05)
            done = os.wait4(pid, os.WNOHANG)
            if state["at"] != at:
                at, since = state["at"], time.monotonic()
            elif time.monotonic() - since > patience:
                os.kill(pid, signal.SIGKILL)
                stuck += 1
                since = time.monotonic()  # noqa: E702
        peak, begin = max(peak, done[2].ru_maxrss), inputs
        if done[1]:
            begin = state["at"] + 1
            if os.waitstatus_to_exitcode(done[1]) == 3:
                raise SystemExit(f"the target {name} does not start")
            print(f"{name} {state['at']}: ended with {os.waitstatus_to_exitcode(done[1])}", flush=True)
            crashed += 1
    return {
        "target": name,
        "inputs": inputs,
        "accepted": state["accepted"],
        "refused": state["refused"],
        "crashes": state["crashes"] + crashed - stuck,
        "hangs": state["hangs"] + stuck,
        "slowest_ms": round(state["slowest_ns"] / 1e6, 1),
        "slowest_input": state["slowest"],
        "peak_mb": peak // 1024,
        "of_imports_mb": state["base_kb"] // 1024,
    }


def main(args=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="try this one input in this process and show what it is")
    parser.add_argument("--out", type=Path, help="write the table here as CSV")
    asked = parser.parse_args(args)
    if odd_ones := set(asked.targets) - set(TARGETS):
        parser.error(f"no target {odd_ones.pop()!r}: choose from {', '.join(TARGETS)}")
    if asked.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            draw, read, _ = TARGETS[asked.targets[0]](Path(folder))
            given = draw(random.Random(f"{asked.seed}/{asked.targets[0]}/{asked.only}"))
            print(repr(given)[:3000])
            print(read(given))
        return 0
    rows = []
    for name in asked.targets or TARGETS:
        rows.append(hunt(name, asked.inputs, asked.seed))
        if len(rows) == 1:
            print("\t".join(rows[0]))
        print("\t".join(map(str, rows[-1].values())), flush=True)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        with asked.out.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)  # noqa: E702
    return int(any(r["crashes"] or r["hangs"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
