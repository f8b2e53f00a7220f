"""ImageNet training over several processes: masks equal on all ranks and to one process, the command from start to
result, a kill, bad input.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from lth_companion.methods.dynamic import DropGrow, initial_masks, settings
from lth_companion.papers import granet_imagenet as I
from lth_companion.papers import granet_parallel, granet_training
from lth_companion.tickets import Ticket, prunable
from lth_companion.training.costs import positions

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four classes of 24 training images, 32x32: a bright bar whose direction and place tell the class. 23
    validation images, so that no two ranks have equally many.
    """
    root, rng = tmp_path_factory.mktemp("imagenet") / "data", np.random.default_rng(0)
    for part, n in (("train", 24), ("val", 6)):
        for c in range(4):
            (root / part / f"n{c}").mkdir(parents=True)
            for i in range(n - (part == "val" and c == 3)):
                x = rng.integers(0, 120, (32, 32, 3))
                bar = slice(4, 10) if c % 2 else slice(20, 26)
                x[(slice(None), bar) if c < 2 else (bar,)] += 130
                Image.fromarray(x.astype("uint8")).save(root / part / f"n{c}" / f"{i:02d}.png")
    return root


# ---------------------------------------------------------------- ranks

WANTED = ["SET", "RigL", "SNFS", "GMP", "GraNet (s_i=0)", "GraNet (s_i=0.5)"]


def network(name, dtype):
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # the global generator must not matter
    return I.build(name, 32, 4, seed=3, width=0.125 if name == "conv-2" else 0.25).to(dtype)


def one(data, world, method="GraNet (s_i=0.5)", name="conv-2", dtype=torch.float64, epochs=2, batch=16, **kw):
    """Train on `batch` images a step over all ranks, 6 or 5 steps an epoch, an event every 2: masks after each
    event, final weights, records.
    """
    train, val = granet_parallel.open_folder(data, 32, seed=3)
    net, events = network(name, dtype), []

    def note(t, masks):
        return events.append((t, [m.clone() for m in masks]))

    run = granet_training.fit(
        net,
        train,
        val,
        granet_training.paper_recipe(batch, epochs / 100, lr=0.05, warmup=1),
        settings(method, 0.1, 2, end=0.6),
        3,
        world,
        on_event=note,
        **kw,
    )
    return {
        "events": events,
        "weights": net.state_dict(),
        "records": run.records,
        "history": run.work.history,
        "start": run.start,
        "kept": run.kept,
    }


class Stop(Exception):
    pass


def resumed(data, world, folder):
    "A run of two epochs, and the same stopped after one and gone on with."
    kw = dict(name="resnet-20", dtype=torch.float32, method="SNFS", batch=18)

    def stop(e, record):
        if world.size > 1:
            dist.barrier()  # rank 0 has written
        raise Stop

    whole = one(data, world, **kw, checkpoint=Path(folder) / "whole")
    try:
        one(data, world, **kw, checkpoint=Path(folder) / "part", on_epoch=stop)
    except Stop:
        pass
    return {"whole": whole, "again": one(data, world, **kw, checkpoint=Path(folder) / "part")}


def tampered(data, world):
    "One rank loses a weight in an event: what the ranks say."
    update = DropGrow.update

    def wrong(self, t):
        if changed := update(self, t):
            if world.rank == 1 and t == 4:
                kept = self.masks[0].view(-1).nonzero()[0]
                self.masks[0].view(-1)[kept] = 0
        return changed

    DropGrow.update = wrong
    try:
        one(data, world, epochs=1)
    except granet_parallel.ImagenetError as e:
        return str(e)
    finally:
        DropGrow.update = update


def work(rank, size, data, folder, jobs):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = granet_parallel.World(rank, size)
    for name, f, kw in jobs:
        torch.save(f(data, world, **kw), f"{folder}/{name}-{rank}")
    dist.destroy_process_group()


def together(size, data, folder, jobs):
    "Each job's results, a list over ranks."
    mp.spawn(work, (size, data, str(folder), jobs), nprocs=size)
    return {name: [torch.load(f"{folder}/{name}-{r}", weights_only=False) for r in range(size)] for name, *_ in jobs}


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory):
    jobs = [(m, one, {"method": m}) for m in WANTED]
    jobs += [("norm", one, dict(name="resnet-20", dtype=torch.float32)), ("tampered", tampered, {})]
    return together(2, data, tmp_path_factory.mktemp("pair"), jobs)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("method", WANTED + ["norm"])
def test_ranks_hold_the_same_masks_and_weights(pair, method):
    "After every event, bit for bit; BatchNorm does not change that."
    a, b = pair[method]
    assert [t for t, _ in a["events"]] == [t for t, _ in b["events"]] and len(a["events"]) >= 3
    for (_, x), (_, y) in zip(a["events"], b["events"]):
        assert same(x, y)
    assert all(torch.equal(a["weights"][n], b["weights"][n]) for n in a["weights"])
    assert a["records"] == b["records"] and a["history"] == b["history"]


@pytest.mark.parametrize("method", WANTED)
def test_two_ranks_are_one_process_with_the_whole_batch(pair, data, method):
    two, alone = pair[method][0], one(data, granet_parallel.World(), method)
    for (t, x), (u, y) in zip(two["events"], alone["events"], strict=True):
        assert t == u and same(x, y), f"masks differ after iteration {t}"
    moved = sum(sum(event["gone"]) for event in two["history"])
    assert moved > 100 and two["start"] == alone["start"] and two["kept"] == alone["kept"]
    for n, w in alone["weights"].items():
        assert float((w - two["weights"][n]).abs().max()) < 1e-9
    for (loss, top), (own, right) in zip(two["records"], alone["records"]):  # 23 images over two ranks, each once
        assert abs(loss - own) < 1e-9 and top == right and abs(top * 23 / 100 - round(top * 23 / 100)) < 1e-9


def test_a_mask_that_differs_stops_every_rank(pair):
    for said in pair["tampered"]:
        assert "differ after iteration 4" in said and "last checkpoint" in said


def test_three_ranks_resume_bit_for_bit(data, tmp_path):
    "With three, the order in which gradients are summed shows in the last bit."
    for found in together(3, data, tmp_path, [("resumed", resumed, {"folder": str(tmp_path)})])["resumed"]:
        a, b = found["whole"], found["again"]
        assert a["records"] == [tuple(r) for r in b["records"]] and a["history"] == b["history"]
        assert all(torch.equal(a["weights"][n], b["weights"][n]) for n in a["weights"])
        assert [t for t, _ in b["events"]] == [t for t, _ in a["events"] if t > 5]  # 5 steps an epoch


def test_loader_processes_change_nothing(data):
    train, _ = granet_parallel.open_folder(data, 32, seed=1)
    batches = [
        list(granet_parallel.training_batches(train, 2, 12, granet_parallel.World(1, 2), 1, workers))
        for workers in (0, 2)
    ]
    assert len(batches[0]) == 4
    for (x, y), (u, v) in zip(*batches, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    other = next(iter(granet_parallel.training_batches(train, 3, 12, granet_parallel.World(1, 2), 1)))
    assert not torch.equal(other[0], batches[0][0][0])


# ---------------------------------------------------------------- the command


def words(data, out, **other):
    "The command's options for 3 epochs of a tiny ResNet."
    options = {
        "data": data,
        "method": "GraNet (s_i=0.5)",
        "density": 0.2,
        "out": out,
        "model": "resnet-20",
        "width": 0.25,
        "image-size": 32,
        "batch": 8,
        "multiplier": 0.03,
        "warmup": 1,
        "interval": 2,
        "end": 0.5,
        "workers": 0,
        "device": "cpu",
        "seed": 5,
    } | other
    return [
        w
        for name, value in options.items()
        if value is not None
        for w in ((f"--{name}",) if value is True else (f"--{name}", str(value)))
    ]


def torchrun(*args):
    "Two processes under torchrun."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    done = torchrun("-m", "lth_companion.papers.granet_imagenet", *words(data, out))
    assert not done.returncode, done.stderr
    return out, done.stdout, json.loads((out / "result.json").read_text())


def test_torchrun_leaves_a_correct_result(finished, data):
    out, said, found = finished
    lines = said.splitlines()
    # once, not once a rank
    assert [line.split("\t")[0] for line in lines if line.startswith("epoch")] == [
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
    ]
    assert any(line.startswith("note: 2 x 8 = 16 images") or "learning rate stays 0.1" in line for line in lines)
    ticket, net = Ticket.load(out / "ticket.safetensors"), I.build("resnet-20", 32, 4, 5, 0.25)
    ticket.apply(net)
    assert ticket.kept == found["kept"] and sum(ticket.kept.values()) == round(
        0.2 * sum(w.numel() for w in prunable(net).values())
    )
    _, val = granet_parallel.open_folder(data, 32)
    loss, top = granet_parallel.evaluate(net, val)
    assert top == found["top1_last"] == found["epochs"][-1]["top1"] and abs(loss - found["epochs"][-1]["loss"]) < 1e-5
    tops = [e["top1"] for e in found["epochs"]]
    assert found["top1_best"] == max(tops) == tops[found["best_epoch"] - 1] and found["diverged"] is None
    # milestones 1 and 2; warm-up over the first epoch
    assert np.allclose([e["lr"] for e in found["epochs"]], [0.05, 0.01, 0.001])
    assert found["iterations"] == 18 and [h["t"] for h in found["history"]] == list(range(2, 18, 2))
    assert (
        found["provenance"]["processes"] == 2
        and found["provenance"]["backend"] == "gloo"
        and found["provenance"]["torch"] == torch.__version__
    )
    assert found["numerics"] == {"bf16": False, "tf32": False, "deterministic": False} and found["data"]["val"] == 23


def test_costs_step_by_step(finished):
    "Training FLOPs added up over single steps, from what the file says."
    _, _, found = finished
    net = I.build("resnet-20", 32, 4, 5, 0.25)
    uses, size = positions(net, (3, 32, 32)), {n: w.numel() for n, w in prunable(net).items()}

    def cost(kept):
        return sum(2 * uses[n] * k for n, k in kept.items())

    kept, total, events = (
        {n: int(m.sum()) for n, m in initial_masks(net, settings("GraNet (s_i=0.5)", 0.2), 5).items()},
        0,
        {h["t"]: h["kept"] for h in found["history"]},
    )
    for t in range(1, 19):
        total += 2 * cost(kept) + cost(size if t in events else kept)
        if t in events:
            kept = dict(zip(size, events[t]))
    assert kept == found["kept"]
    assert math.isclose(found["flops"]["training"], total / (18 * 3 * cost(size)), rel_tol=1e-12)
    assert math.isclose(found["flops"]["inference"], cost(kept) / cost(size), rel_tol=1e-12) and found["flops"][
        "dense_inference"
    ] == cost(size)


def test_killed_after_an_epoch_the_same_command_ends_with_the_same_file(finished, data, tmp_path):
    "Rank 0 is killed once it has written its first checkpoint; torchrun starts both ranks again with the same command."
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text("""import os, signal, sys
from lth_companion.papers import granet_imagenet as I
say, first = I.say, os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
def last_words(line):
    say(line)
    if first and line.startswith('epoch 1/') and os.environ['RANK'] == '0': os.kill(os.getpid(), signal.SIGKILL)
I.say = last_words
sys.exit(I.main())
""")
    done = torchrun("--max-restarts=1", str(script), *words(data, out))
    assert not done.returncode, done.stderr
    assert [line.split("\t")[0] for line in done.stdout.splitlines() if line.startswith("epoch")] == [
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
    ]
    assert done.stdout.count("note: BatchNorm") == 2  # two starts
    assert (out / "result.json").read_bytes() == (finished[0] / "result.json").read_bytes()
    assert Ticket.load(out / "ticket.safetensors").digest == Ticket.load(finished[0] / "ticket.safetensors").digest


def test_one_process_and_options(data, tmp_path):
    """bfloat16 and channels_last by name, loader processes, a dense run; the same again finds everything done,
    another seed is refused.
    """

    def args(**kw):
        return words(
            data,
            tmp_path,
            method="static",
            density=1,
            bf16=True,
            workers=2,
            batch=16,
            multiplier=0.01,
            **{"channels-last": True} | kw,
        )

    assert I.main(args()) == 0
    found, text = json.loads((tmp_path / "result.json").read_text()), (tmp_path / "result.json").read_bytes()
    assert (
        found["numerics"]["bf16"]
        and found["recipe"]["memory_format"] == "channels_last"
        and found["provenance"]["backend"] is None
    )
    assert (found["density_got"], found["flops"]["training"], found["flops"]["inference"], found["history"]) == (
        1,
        1,
        1,
        [],
    )
    assert I.main(args()) == 0 and (tmp_path / "result.json").read_bytes() == text
    assert I.main(args(seed=6)) == 1


def test_bfloat16_is_not_float32(data):
    train, val = granet_parallel.open_folder(data, 32)
    runs = [
        granet_training.fit(
            I.build("resnet-20", 32, 4, 0, 0.25),
            train,
            val,
            granet_training.paper_recipe(32, 0.01),
            settings("static", 0.5),
            bf16=on,
        )
        for on in (False, True)
    ]
    a, b = (r.records[0][0] for r in runs)
    assert a != b and abs(a - b) < 0.2 * a


def test_a_divergence_is_recorded(data, tmp_path):
    assert I.main(words(data, tmp_path, lr=1e30, model="conv-2", width=0.125, batch=16)) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert (
        found["diverged"] == 1 and found["epochs"][0]["loss"] is None and not (tmp_path / "ticket.safetensors").exists()
    )


# ---------------------------------------------------------------- bad input


def copy(data, root, *without):
    "A copy of the folder (links) without some parts."
    for path in sorted(data.rglob("*.png")):
        to = root / path.relative_to(data)
        if any(str(path.relative_to(data)).startswith(w) for w in without):
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        to.symlink_to(path)
    return root


BAD = {
    "no folder": (dict(data="nowhere"), "There is no folder nowhere"),
    "unknown method": (dict(method="GraNet"), "GraNet (s_i=0.5)"),
    "density": (dict(density=20), "fraction of weights kept"),
    "model": (dict(model="resnet-200", width=None), "did you mean 'resnet-20'"),
    "width of resnet50": (dict(model="resnet50"), "no width multiplier"),
    "batch": (dict(batch=97), "fill no batch of 97; give a smaller --batch"),
    "interval": (dict(interval=4000), "never comes in a training of 36"),
    "image size": (dict(**{"image-size": 0}), "number of pixels"),
    "multiplier": (dict(multiplier=0), "0.01 or more"),
    "rate": (dict(lr=-1), "lr: Input should be greater than 0"),
    "device": (dict(device="gpu"), "auto, cpu or cuda"),
    "missing option": (dict(density=None), "Missing option '--density'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_one_sentence(case, data, tmp_path, capsys):
    options, said = dict(BAD[case][0]), BAD[case][1]
    out = tmp_path / "out"
    assert I.main(words(options.pop("data", data), out, **options)) != 0
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1 and "Traceback" not in error
    assert not (out / "result.json").exists()


@pytest.mark.parametrize(
    "without, said",
    [
        (["train"], "has no folder train/"),
        (["val"], "has no folder val/"),
        (["val/n2"], "different classes (n2 in one only)"),
        (["train/n1", "val/n1", "val/n3"], "different classes (n3 in one only)"),
    ],
)
def test_a_folder_that_is_not_one(without, said, data, tmp_path, capsys):
    root = copy(data, tmp_path / "data", *without)
    assert I.main(words(root, tmp_path / "out")) == 1
    assert said in capsys.readouterr().err


def test_empty_folders(data, tmp_path, capsys):
    root = copy(data, tmp_path / "data", "val")
    (root / "val").mkdir()
    assert I.main(words(root, tmp_path / "out")) == 1 and "holds no folder of a class" in capsys.readouterr().err
    for c in range(4):
        (root / "val" / f"n{c}").mkdir()
    assert I.main(words(root, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert "val has classes without images (n0, n1, n2, n3)" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(workers, data, tmp_path, capsys):
    root = copy(data, tmp_path / "data")
    (root / "val" / "n2" / "03.png").unlink()
    (root / "val" / "n2" / "03.png").write_bytes(b"no image")
    assert I.main(words(root, tmp_path / "out", workers=workers, multiplier=0.01)) == 1
    error = capsys.readouterr().err
    assert "n2/03.png is no readable image" in error and len(error.splitlines()) == 1


def test_an_output_folder_that_cannot_be(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert I.main(words(data, tmp_path / "file" / "out")) == 1
    assert "name another folder with --out" in capsys.readouterr().err


def test_another_training_in_the_same_folder(data, tmp_path, capsys):
    assert I.main(words(data, tmp_path, multiplier=0.01)) == 0
    capsys.readouterr()
    for other in (dict(density=0.3), dict(width=0.5), dict(interval=3)):
        assert I.main(words(data, tmp_path, multiplier=0.01, **other)) == 1
        assert "is the checkpoint of another training" in capsys.readouterr().err


def test_a_mistake_is_said_once_a_machine(data, tmp_path, capsys, monkeypatch):
    for name, value in dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    assert I.main(words(data / "train", tmp_path)) == 1 and capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first process of the second machine
    assert I.main(words(data / "train", tmp_path)) == 1 and "no folder train/" in capsys.readouterr().err


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(granet_parallel.ImagenetError, match="--nproc_per_node=2"):
        granet_parallel.choose_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert granet_parallel.choose_device() == torch.device("cpu")
    with pytest.raises(granet_parallel.ImagenetError, match="--device cpu"):
        granet_parallel.choose_device("cuda")


def test_help_has_an_example(capsys):
    assert I.main(["--help"]) == 0
    assert "Example: torchrun --standalone" in " ".join(capsys.readouterr().out.split())
