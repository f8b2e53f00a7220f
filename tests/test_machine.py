"""What a machine has: MPS by a control program of the test's own, bf16 by a /proc/cpuinfo of its own; estimates
against what an H200 needed.
"""

import os
import stat

import pytest

from lth_companion.lab import machine
from lth_companion.papers.granet import _sparse_setting, granet_settings, sparse_trial
from lth_companion.papers.weight_recycling_settings import recycling_settings, table_searches
from lth_companion.training.recipe import Recipe


@pytest.fixture
def tool(tmp_path, monkeypatch):
    "A control program that does what is asked, and a pipe as the daemon leaves it."

    def put(script, pipe=True):
        path = tmp_path / machine.MPS_TOOL
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        (tmp_path / "pipe").mkdir(exist_ok=True)
        (tmp_path / "pipe" / "control").touch() if pipe else (tmp_path / "pipe" / "control").unlink(missing_ok=True)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "pipe"))

    return put


@pytest.mark.parametrize(
    "script, pipe, found",
    [
        ('read x; test "$x" = get_server_list', True, (True, True)),
        ("echo 'Cannot find MPS control daemon process'; exit 1", True, (True, False)),
        ("echo 'Cannot find MPS control daemon process'", True, (True, False)),
        ("exit 0", False, (True, False)),
        ("sleep 60", True, (True, False)),
    ],
    ids=["runs", "ended", "ended, politely", "never started", "hangs"],
)
def test_mps_is_asked(tool, script, pipe, found):
    tool(script, pipe)
    assert machine.mps(patience=1) == found


def test_workers_on_a_gpu(tool, monkeypatch, tmp_path):
    tool("exit 0")
    assert [machine.gpu_workers(c) for c in (1, 2, 8, 64)] == [1, 2, 8, 8]
    tool("exit 1")
    assert machine.gpu_workers(16) == 1
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert machine.mps() == (False, False) and machine.gpu_workers(16) == 1


@pytest.mark.parametrize(
    "text, found",
    [
        ("flags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n", "amx"),
        ("flags : fpu avx2 avx512_bf16\n", "avx512"),
        ("model name : x\nflags : avx2\n", "none"),
        ("Features : asimd\n", None),
        (None, None),
    ],
)
def test_bf16_is_read_from_the_flags(tmp_path, monkeypatch, text, found):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.bf16_units() == found and machine.BF16[found]


def test_estimates_are_near_what_an_h200_needed():
    """Ten VGG-19 trials side by side took 127 to 145 s, 13.6 s of the device each (../shared/gpu/README.md); alone
    the device makes three quarters of that.
    """
    best = dict(augment="crop-flip", memory_format="channels_last", precision="bf16", graph=True)
    s = _sparse_setting(
        "vgg-19 on cifar10-jpeg",
        dict(data="cifar10-jpeg", model="vgg-19", device="cuda"),
        20,
        (0.02,),
        (100,),
        1,
        (),
        **best,
    )
    costs = [sparse_trial(s, m, 0.02, 100).cost() for m in ("dense", "GMP", "RigL", "SNIP")]
    assert all(13.6 / 2 < c < 13.6 * 2 for c in costs), costs
    plain = sparse_trial(
        s,
        "RigL",
        0.02,
        100,
        fields=dict(
            recipe=s.recipe.model_copy(update=dict(precision="float32", memory_format="contiguous", graph=False))
        ),
    )
    assert plain.cost() > 5 * costs[2]


def test_estimates_are_in_a_sane_order():
    shape, best = (3, 32, 32), Recipe(patience=None, precision="bf16", memory_format="channels_last", graph=True)

    def rate(model, width=1.0, r=best, task="training"):
        return machine.gpu_rate(model, width, shape, r, task)

    assert rate("resnet-50") < rate("resnet-18") < rate("vgg-19") and rate("vgg-19", 0.25) >= rate("vgg-19")
    assert rate("conv-6", task="search") < rate("conv-6") and rate("conv-2", r=Recipe(), task="search") < rate(
        "conv-2", task="search"
    )
    assert all(t.cost() > 0 for s in recycling_settings("gpu", "cuda").values() for *_, t in table_searches(s))


def test_what_is_left_on_the_table_is_said_once_all_is_known():
    s = granet_settings("smoke", "cuda")["conv-2 on MNIST"]
    plain = [sparse_trial(s, m, 0.1, 100) for m in ("dense", "RigL")]
    assert machine.left_on_the_table(plain).startswith(
        "2 trials train on the GPU without"
    ) and "2.2 to 5.7 times" in machine.left_on_the_table(plain)
    best = s.recipe.model_copy(update=dict(precision="bf16", memory_format="channels_last", graph=True))
    assert machine.left_on_the_table([t.model_copy(update={"recipe": best}) for t in plain]) == ""
    assert (
        machine.left_on_the_table([sparse_trial(granet_settings("smoke")["conv-2 on MNIST"], "dense", 1.0, 100)]) == ""
    )
