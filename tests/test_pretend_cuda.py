"""What a machine without a GPU can know of one: every kind of trial, scorer, method and measure with
`device="cuda"`, on the pretended device of `pretend_cuda.py`, where tensors of both sides do not meet. Results are,
to the bit, those of the same engine on the CPU.
"""

import collections
import importlib
import json
import os
import pathlib
import pkgutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import test_imagenet
import torch
import torch.nn.functional as F
from pretend_cuda import CAPTURING, NAME, Graph, on_cuda, pretended, tensors_in
from test_imagenet import data as images  # noqa: F401 (a fixture)
from torch import nn

import lth_companion
from lth_companion import selection, tickets
from lth_companion.lab import experiments as shared
from lth_companion.lab.sparse_trials import SparseTrial
from lth_companion.lab.store import Store, encode
from lth_companion.lab.sweeps import Idle, run
from lth_companion.lab.trials import KINDS, Trial, dumps
from lth_companion.measures import correlation, diversity, storage
from lth_companion.methods import imp, plasticity, pruning, saw, supermasks
from lth_companion.methods.dynamic import METHODS as DYNAMIC
from lth_companion.methods.dynamic import DropGrow, initial_masks, settings, sparse_train
from lth_companion.methods.scorers import SCORERS
from lth_companion.methods.stacking import call
from lth_companion.methods.stacking import scorer as parse
from lth_companion.methods.supermasks import Supermask, search
from lth_companion.papers import (
    granet as sparse_training,
)
from lth_companion.papers import (
    granet_parallel,
    learning_to_learn_masks,
    learning_to_learn_starts,
    weight_correlation_agreement,
    weight_recycling_watched,
)
from lth_companion.papers import (
    learning_to_learn as experiments,
)
from lth_companion.papers import (
    weight_correlation as branches,
)
from lth_companion.papers import (
    weight_recycling as searches,
)
from lth_companion.tickets import Ticket, generator, prunable
from lth_companion.training import cohorts, costs, devices
from lth_companion.training import loop as training
from lth_companion.training.data import load
from lth_companion.training.loop import evaluate, train
from lth_companion.training.models import create, initialise
from lth_companion.training.recipe import Recipe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device here")
HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
SAME_DEVICE = "Expected all tensors to be on the same device"


@pytest.fixture
def cuda():
    with pretended() as device:
        yield device


def forget():
    "Empty what the library remembers between trials."
    shared._recent.clear()
    for cached in (
        shared.cached_data,
        learning_to_learn_starts._start,
        experiments.pixel_spread,
        shared._same_content,
        sparse_training._dense_run,
    ):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_left():
    "No test finds tensors of the pretended device that another left behind."
    forget()
    yield
    forget()


@pytest.fixture
def one_engine(monkeypatch):
    """On the CPU the engines of a GPU: fixed masks of LeNet by the plain loop, cohorts by the block engine,
    searches with the fixed selection and a rate that is a tensor.
    """
    monkeypatch.setattr(shared, "_in_cohorts", lambda trial: False)
    monkeypatch.setattr(cohorts, "engine", lambda ticket, device="cpu": "block")
    monkeypatch.setattr(supermasks, "on_gpu", lambda device: True)


def plain(value):
    "Results as nested lists of numbers, wherever their tensors are."
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, Ticket):
        return [plain(value.weights), plain(value.masks), plain(value.rest)]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return float(value) if isinstance(value, correlation.Overlap) else value


def both(measure):
    "`measure(device)` on the CPU and on the pretended device must agree to the bit; its value."
    found = plain(measure(torch.device("cpu")))
    with pretended() as device:
        there = measure(device)
        assert dumps(encode(plain(there))) == dumps(encode(found))
    return found


# ---------------------------------------------------------------- the device itself


def test_torch_answers_as_with_one_gpu(cuda):
    assert (
        torch.cuda.is_available()
        and torch.cuda.device_count() == 1
        and torch.cuda.get_device_name() == torch.cuda.get_device_name(cuda) == NAME
    )
    free, total = torch.cuda.mem_get_info()
    assert (
        free == total == torch.cuda.get_device_properties(0).total_memory
        and torch.cuda.memory_allocated() == 0
        and torch.cuda.current_device() == 0
    )
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    with torch.random.fork_rng():
        torch.rand(1)
    for ask in (
        lambda: torch.zeros(1, device="cuda:1"),
        lambda: torch.zeros(1).to(1),
        lambda: torch.cuda.get_device_name(1),
    ):
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            ask()
    with pytest.raises(RuntimeError, match="pretended already"):
        with pretended():
            pass


def test_afterwards_there_is_none_again():
    before = torch.cuda.is_available, torch.autocast.__init__, threading.Thread.run, torch.cuda.Stream
    with pretended():
        assert torch.cuda.is_available()
    assert (
        torch.cuda.is_available,
        torch.autocast.__init__,
        threading.Thread.run,
        torch.cuda.Stream,
    ) == before and not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, device="cuda"),
        lambda: torch.tensor([1.0, 2.0, 3.0], device=0),
        lambda: torch.arange(3.0, device="cuda:0"),
        lambda: torch.ones(3).cuda(),
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.ones(3).to("cuda", torch.float64),
        lambda: torch.ones(3).to(torch.zeros(1, device="cuda")),
        lambda: torch.ones(3).type_as(torch.zeros(1, device="cuda")),
        lambda: torch.as_tensor(np.ones(3), device="cuda"),
        lambda: torch.zeros_like(torch.ones(3), device="cuda"),
        lambda: torch.ones(3, device="cuda")[:2],
        lambda: torch.ones(3, device="cuda").view(3, 1),
        lambda: torch.ones(3, device="cuda") * 2,
        lambda: torch.topk(torch.ones(3, device="cuda"), 2).values,
        lambda: torch.ones(2, 3, device="cuda").unbind()[1],
        lambda: torch.ones(3, device="cuda").new_zeros(2),
        lambda: nn.Parameter(torch.ones(3, device="cuda")),
        lambda: nn.Parameter(torch.ones(3, device="cuda")).data,
        lambda: torch.ones(3, device="cuda").requires_grad_().detach(),
        lambda: torch._foreach_mul([torch.ones(3, device="cuda")], 2.0)[0],
        lambda: torch.ones(3, device="cuda") + torch.tensor(1.0),
        lambda: torch.where(torch.ones(3, device="cuda") > 0, torch.tensor(1.0), -1.0),
        lambda: F.pad(torch.ones(3, device="cuda"), (1, 1)),
        lambda: torch.ones(3, device="cuda").type(torch.float64),
    ],
)
def test_on_the_device(cuda, make):
    t = make()
    assert (
        t.device == cuda
        and t.is_cuda
        and not t.is_cpu
        and t.get_device() == 0
        and "device='cuda:0'" in repr(t)
        and t.type().startswith("torch.cuda.")
    )
    back = t.cpu()
    assert (
        back.device.type == "cpu"
        and not back.is_cuda
        and "cuda" not in repr(back)
        and t.is_cuda
        and back.tolist() == t.tolist()
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3),
        lambda: torch.zeros(3, device="cuda").cpu(),
        lambda: torch.zeros(3, device="cuda").to("cpu"),
        lambda: torch.zeros_like(torch.ones(3, device="cuda"), device="cpu"),
        lambda: torch.tensor([torch.ones((), device="cuda")]),
        lambda: torch.zeros(3).copy_(torch.ones(3, device="cuda")),
        lambda: torch.as_tensor(torch.ones(3, device="cuda"), device="cpu"),
        lambda: torch.broadcast_tensors(torch.ones(3), torch.ones(1, device="cuda"))[0],
        lambda: torch.ones(3).expand_as(torch.ones(2, 3, device="cuda")),
        lambda: torch.ones(5)[torch.ones((), dtype=torch.int64, device="cuda")],
        lambda: torch.from_numpy(np.ones(3)),
        lambda: torch.zeros(2, device="cuda").type(torch.float64).cpu(),
    ],
)
def test_on_the_cpu(cuda, make):
    assert make().device.type == "cpu"


@pytest.mark.parametrize(
    "mix",
    [
        lambda c, d: c + d,
        lambda c, d: d * c,
        lambda c, d: d - torch.ones(1),
        lambda c, d: d.add_(c),
        lambda c, d: c.add_(d),
        lambda c, d: torch.tensor(0.0).add_(d.sum()),
        lambda c, d: c @ d,
        lambda c, d: F.linear(d, torch.ones(2, 3)),
        lambda c, d: torch.cat([c, d]),
        lambda c, d: torch.stack([torch.tensor(1.0), d.sum()]),
        lambda c, d: torch.equal(c, d),
        lambda c, d: torch.where(c > 0, d, d),
        lambda c, d: d.index_select(0, torch.tensor([0])),
        lambda c, d: d.masked_fill(c > 0, 0.0),
        lambda c, d: F.cross_entropy(d[None], torch.tensor([0])),
        lambda c, d: torch._foreach_mul_([d], [c]),
        lambda c, d: d.__setitem__(torch.tensor([0, 1]), c[:2]),
        lambda c, d: d.__setitem__(d > 0, c),
        lambda c, d: torch.add(d, d, out=c),
        lambda c, d: torch.lerp(c, d, 0.5),
        lambda c, d: torch.optim.SGD([_with_grad(d)], lr=1.0, fused=True, momentum=0.9),
    ],
)
def test_mixing_raises_what_a_gpu_raises(cuda, mix):
    with pytest.raises(RuntimeError, match=SAME_DEVICE):
        made = mix(torch.ones(3), torch.ones(3, device="cuda"))
        if isinstance(made, torch.optim.Optimizer):
            made.state[made.param_groups[0]["params"][0]]["momentum_buffer"] = torch.zeros(3)
            made.step()


def _with_grad(t):
    p = nn.Parameter(t)
    p.grad = torch.ones_like(p)
    return p


def test_what_else_a_gpu_refuses(cuda):
    t = torch.ones(3, device="cuda")
    for convert in (lambda: t.numpy(), lambda: np.asarray(t), lambda: np.histogram(t), lambda: t[:2].__array__()):
        with pytest.raises(TypeError, match=r"can't convert cuda:0 device type tensor to numpy\. Use Tensor\.cpu\(\)"):
            convert()
    assert t.cpu().numpy().tolist() == t.tolist() == [1, 1, 1] and float(t.sum()) == 3 and bool(t.all())
    for draw in (
        lambda: torch.rand(3, device="cuda", generator=generator(0)),
        lambda: torch.randperm(3, generator=generator(0), device="cuda"),
        lambda: t.normal_(generator=generator(0)),
        lambda: nn.init.kaiming_normal_(t[None], generator=generator(0)),
    ):
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
            draw()
    for cpu, index in ((torch.ones(3), torch.tensor([0], device="cuda")), (torch.ones(3), t > 0)):
        with pytest.raises(
            RuntimeError, match="indices should be either on cpu or on the same device as the indexed tensor"
        ):
            cpu[index]
    p = nn.Parameter(t)
    with pytest.raises(RuntimeError, match="assigned grad has data located on a different device"):
        p.grad = torch.ones(3)


def test_what_may_cross(cuda):
    t, c = torch.zeros(4, device="cuda"), torch.arange(4.0)
    t.copy_(c)
    c.copy_(t)
    t[1:3] = torch.tensor([7.0, 8.0])
    c[:2] = t[2:]
    assert t.tolist() == [0, 7, 8, 3] and c.tolist() == [8, 3, 2, 3] and (t.is_cuda, c.is_cuda) == (True, False)
    t[torch.tensor([0, 1])] = torch.tensor(5.0)  # a number, and indices on the CPU
    assert t[torch.tensor([True, False, True, False])].tolist() == [5, 8] and t[[0, 3]].is_cuda
    torch._foreach_copy_([t], [c])
    assert t.tolist() == c.tolist() and t.is_cuda
    a, b = torch.ones(2), torch.ones(2).cuda()
    a.data = b  # what `Module.to` does to its parameters
    assert a.is_cuda and on_cuda(a) and a.untyped_storage() is b.untyped_storage()


def test_a_copy_is_a_copy(cuda):
    "Nothing written on one side appears on the other."
    c = torch.zeros(2)
    d, e = c.to("cuda"), torch.as_tensor(c, device="cuda")
    d += 1
    e += 2
    assert c.tolist() == [0, 0] and d.tolist() == [1, 1] and d.to("cuda") is d and d.cuda() is d and c.cpu() is c
    back = d.cpu()
    back += 5
    assert d.tolist() == [1, 1]


def test_modules_gradients_and_optimizers(cuda):
    """A network moves with its parameters and buffers, its gradients and momentum lie with it, and it moves back;
    and its training is the CPU's.
    """

    def trained(device):
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
        initialise(net, generator(0)).to(device)
        opt = training.optimizer(net, Recipe(momentum=0.9, nesterov=True, weight_decay=1e-3), tensor_rate=True)
        for i in range(3):
            x, y = torch.randn(8, 1, 8, 8, generator=generator(1, i)).to(device), torch.arange(8, device=device) % 4
            training.step(net, opt, x, y, label_smoothing=0.1)
        return net, opt

    (net, opt), (here, _) = trained(cuda), trained(torch.device("cpu"))
    everything = [
        *net.state_dict().values(),
        *(p.grad for p in net.parameters()),
        *(s["momentum_buffer"] for s in opt.state.values()),
    ]
    assert len(everything) == 9 + 6 + 6 and all(t.device == cuda for t in everything)
    assert plain(net.state_dict()) == plain(here.state_dict()) and plain([p.grad for p in net.parameters()]) == plain(
        [p.grad for p in here.parameters()]
    )
    import copy

    twin = copy.deepcopy(net)
    assert all(t.is_cuda and t is not u for t, u in zip(twin.state_dict().values(), net.state_dict().values()))
    back = net.cpu()
    assert not any(t.is_cuda for t in [*back.state_dict().values(), *(p.grad for p in back.parameters())]) and all(
        p.is_cuda for p in twin.parameters()
    )
    back.load_state_dict(twin.state_dict())  # copies, from the other side
    assert not any(t.is_cuda for t in back.state_dict().values())
    x = torch.ones(2, device="cuda", requires_grad=True)
    w = torch.ones(2, requires_grad=True)
    gx, gw = torch.autograd.grad((x * w.to("cuda") * 3).sum(), [x, w])  # each gradient lies with its tensor
    assert gx.is_cuda and not gw.is_cuda and gw.tolist() == [3, 3]


def test_functional_calls_autocast_and_meta(cuda):
    net = nn.Linear(3, 2).cuda()
    out = torch.func.functional_call(
        net, {n: torch.ones_like(p) for n, p in net.named_parameters()}, (torch.ones(1, 3, device="cuda"),)
    )
    assert out.is_cuda and out.tolist() == [[4, 4]]
    with torch.autocast("cuda", torch.bfloat16):
        assert net(torch.ones(1, 3, device="cuda")).dtype == torch.bfloat16
    assert (
        torch.zeros(2, device="meta").device.type == "meta"
        and torch.zeros(2, device="cuda").to("meta").device.type == "meta"
    )
    with torch.device("cuda"):
        assert torch.zeros(2).is_cuda
    with pytest.raises(RuntimeError, match=SAME_DEVICE):
        net(torch.ones(1, 3))


def test_files_of_the_device(cuda, tmp_path):
    "safetensors and the library's tickets fetch for themselves; what is read lies on the CPU."
    from safetensors.torch import load_file, save_file

    t = torch.arange(3.0, device="cuda")
    save_file({"t": t}, tmp_path / "t.safetensors")
    assert load_file(tmp_path / "t.safetensors")["t"].tolist() == [0, 1, 2]
    ticket = Ticket.of(create("lenet-300-100", (1, 8, 8), width=0.1).cuda())
    assert all(m.is_cuda for m in ticket.masks.values())
    read = Ticket.load(ticket.save(tmp_path / "ticket"))
    assert read.digest == ticket.digest and not any(t.is_cuda for t in tensors_in(read.weights))


def test_threads_pretend_too(cuda):
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(2, device="cuda") + 1))
    thread.start()
    thread.join()
    assert found[0].device == cuda and on_cuda(found[0])


# ---------------------------------------------------------------- graphs


def test_a_replay_works_on_what_the_tensors_hold_then(cuda):
    x, seen = torch.ones(3, device="cuda"), {}

    def f():
        seen["out"] = (x * 2).sum()

    replay = devices.capture(f)  # the library's own: three runs first
    out = seen["out"]
    x.fill_(5.0)
    replay()
    assert out.tolist() == 30 and out is seen["out"]  # the result lies where the capture's lay
    x = torch.zeros(3, device="cuda")
    replay()
    assert out.tolist() == 30  # another tensor of the same name is none of the graph's


def test_numbers_and_python_are_those_of_the_capture(cuda):
    state, calls = {"rate": 1.0}, []
    w = torch.zeros(2, device="cuda")

    def f():
        calls.append(1)
        w.add_(torch.ones_like(w), alpha=state["rate"])

    replay = devices.capture(f)
    assert len(calls) == 4 and w.tolist() == [4, 4]
    state["rate"] = 100.0
    replay()
    assert w.tolist() == [5, 5] and len(calls) == 4


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: float(t.sum()),
        lambda t: bool((t > 0).any()),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
        lambda t: torch.nonzero(t),
        lambda t: t[t > 0],
        lambda t: t.__setitem__(t > 0, t.clone()),
        lambda t: torch.equal(t, t),
        lambda t: t.copy_(torch.zeros(3)),
        lambda t: torch.zeros(3).copy_(t),
        lambda t: torch.zeros(3).to("cuda"),
        lambda t: torch.tensor([1.0], device="cuda"),
        lambda t: t.unique(),
        lambda t: torch.cuda.synchronize(),
        lambda t: selection.top_masks([t], 1),
    ],
)
def test_nothing_waits_in_a_capture(cuda, wait):
    t = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match=CAPTURING):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            wait(t)
    assert not torch.cuda.is_current_stream_capturing()
    wait(t)  # outside it may


def test_what_a_capture_allows(cuda):
    t = torch.ones(3, device="cuda")
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        t[t > 0] = 0.0  # a masked fill
        selection.top_fixed(t, 1)
        torch.zeros(2, device="cuda")
        t.to(torch.float64)
        t.device
        len(t)
    t.fill_(4.0)
    graph.replay()
    assert t.tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        torch.cuda.CUDAGraph().replay()
    with pytest.raises(RuntimeError, match=CAPTURING):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                pass


@pytest.mark.parametrize(
    "forgets", [dict(), dict(rate=True), dict(masks=True)], ids=["nothing", "the rate", "the masks"]
)
def test_a_step_that_is_no_graphs_step_is_found(cuda, monkeypatch, forgets):
    """A rate read as a number, or masks put in place of others, are what the capture saw: the replayed training
    differs from the eager one. The library's own step forgets nothing.
    """
    data, recipe = (
        load("digits", "cuda", 256),
        Recipe(
            lr=0.0625,
            momentum=0.5,
            batch_size=64,
            max_epochs=3,
            patience=None,
            schedule="milestones",
            milestones=(1,),
            gamma=0.5,
        ),
    )
    if "rate" in forgets:
        monkeypatch.setattr(training, "set_rate", lambda opt, lr: [group.update(lr=lr) for group in opt.param_groups])
    results = []
    for graph in (False, True):
        net = create("lenet-300-100", (1, 8, 8), generator=generator(0), width=0.1).cuda()
        work = DropGrow(settings("SET", 0.3, interval=3))
        if "masks" in forgets:
            monkeypatch.setattr(
                work,
                "_write",
                lambda new, alive, work=work: work.masks.__setitem__(
                    slice(None), [n.view(m.shape).float() for n, m in zip(new, work.masks)]
                ),
            )
        results.append(
            train(
                net,
                data,
                recipe.model_copy(update={"graph": graph}),
                initial_masks(net, work.settings),
                sparsity=work,
            )
        )
    eager, graphed = results
    assert (plain(eager.ticket) == plain(graphed.ticket)) == (not forgets) and (eager.losses == graphed.losses) == (
        not forgets
    )


# ---------------------------------------------------------------- the start-up file


def python(code, pretend="1", **environment):
    "What a Python says that starts with the folder `pretended` on its path."
    path = os.pathsep.join([str(HERE / "pretended"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "LTH_PRETEND_CUDA": pretend, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not done.returncode, done.stderr
    return done.stdout.split()


def test_the_start_up_file_pretends_when_torch_comes(tmp_path):
    # and a process without torch has paid nothing
    assert python("import sys; print('torch' in sys.modules, 'pretend_cuda' in sys.modules)") == [
        "False",
        "False",
    ]
    assert python(
        "import importlib.util; importlib.util.find_spec('torch'); import torch, pretend_cuda;"
        " print(torch.cuda.is_available(), torch.ones(2).cuda().device, pretend_cuda.on_cuda(torch.ones(2,"
        " device='cuda') + 1))"
    ) == ["True", "cuda:0", "True"]
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.other = 'too'")
    both = os.pathsep.join([str(HERE / "pretended"), str(tmp_path)])
    # off; and what it hides runs
    assert python("import torch; print(torch.cuda.is_available(), other)", pretend="0", PYTHONPATH=both) == [
        "False",
        "too",
    ]


# ---------------------------------------------------------------- every kind of trial


def kinds() -> dict:
    "The library's own kinds of trials: all of its modules are imported, so that a new one is here by itself."
    for module in pkgutil.walk_packages(lth_companion.__path__, "lth_companion."):
        importlib.import_module(module.name)
    return {kind: c for kind, c in sorted(KINDS.items()) if c.__module__.partition(".")[0] == "lth_companion"}


R = Recipe(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, batch_size=64, max_epochs=2, patience=None)
LENET = dict(data="digits", train_size=160, width=0.1, recipe=R)
CONV = LENET | dict(
    model="conv-2",
    width=0.0625,
    recipe=R.model_copy(update=dict(memory_format="channels_last", augment="crop-flip", label_smoothing=0.1)),
)
RESNET = CONV | dict(model="resnet-20", width=0.125)
HELD_OUT = dict(validation=40, recipe=R.model_copy(update=dict(stop_on="validation")))
DYNAMIC_OPTIONS = {
    "authors": dict(regrown="authors"),
    "authors' schedule": dict(schedule="authors", end=0.9),
    "by layer": dict(scope="layer"),
    "uniform": dict(initial="uniform"),
    "excluded": dict(exclude_dropped=True),
}


def sparse_examples():
    T = SparseTrial
    found = {
        "dense": T(**LENET),
        "dense conv-2": T(**CONV),
        "dense resnet-20": T(**RESNET),
        "static, held out": T(**LENET | HELD_OUT, dynamic=settings("static", 0.2)),
        "nudged": T(**LENET, scorer="snip", density=0.1, nudge=2),
    }
    found |= {
        f"{s}": T(**LENET, scorer=s, density=0.1, rounds=3 if s == "synflow" else 1)
        for s in SCORERS
        if SCORERS[s].__module__.startswith("lth_companion")
    } | {
        "snip conv-2": T(**CONV, scorer="snip", density=0.2),
        "stacked": T(**LENET, scorer="magnitude>synflow", density=0.1),
    }
    found |= {m: T(**LENET, dynamic=settings(m, 0.2, interval=2)) for m in DYNAMIC} | {
        f"{m} conv-2": T(**CONV, dynamic=settings(m, 0.2, interval=2)) for m in ("SNFS", "GraNet (s_i=0.5)")
    }
    return (
        found
        | {
            name: T(**LENET, dynamic=settings("GraNet (s_i=0.5)", 0.2, **(dict(interval=1) | options)))
            for name, options in DYNAMIC_OPTIONS.items()
        }
        | {"RigL, nudged": T(**LENET, dynamic=settings("RigL", 0.2, interval=2), nudge=1)}
    )


def branch_examples():
    T, tuned, found = branches.BranchTrial, dict(admm_epochs=2, rate=0.5), {"dense": branches.BranchTrial(**LENET)}
    for start in ("init", "fresh", "trained", "rewound", "previous"):
        rewind = dict(rewind=2) if start == "rewound" else {}
        found |= {
            f"{masks} {start}": T(**LENET, **tuned, **rewind, masks=masks, level=2, start=start)
            for masks in ("imp", "one-shot", "admm", "smart-ratio")
            if start != "previous" or masks == "imp"
        }
    found |= {
        f"imp reset {reset}": T(
            **LENET, masks="imp", level=2, rate=0.5, reset=reset, **(dict(rewind=2) if reset == "rewound" else {})
        )
        for reset in ("rewound", "previous")
    }
    found |= {
        "shuffled": T(**LENET, masks="imp", level=1, shuffled=True),
        "nudged": T(**LENET, masks="imp", level=1, nudge=3),
        "global": T(**LENET, masks="one-shot", level=1, scope="global"),
    }
    found |= {
        "conv-2": T(**CONV, masks="imp", level=1, rate=0.5),
        "conv-2 admm, first too": T(**CONV, masks="admm", level=1, rate=0.5, admm_epochs=1, spare_first=False),
    }
    return found | {"resnet-20": T(**RESNET, masks="one-shot", level=1, rate=0.5, start="rewound", rewind=2)}


def plasticity_examples():
    T = sparse_training.PlasticityTrial
    found = {"nothing": T(**CONV, epoch=1, after=1)} | {
        f"{scope} {how}": T(**CONV, epoch=e, after=1, rate=0.6, scope=scope, regenerate=how)
        for e, (scope, how) in zip(
            (1, 2, 1, 2, 1, 2), [(s, h) for s in ("global", "uniform") for h in ("none", "equal", "authors")]
        )
    }
    return (
        found
        | {
            f"filters {scope} {how}": T(**CONV, epoch=2, after=1, rate=0.5, scope=scope, unit="filter", regenerate=how)
            for scope in ("global", "uniform")
            for how in ("none", "equal")
        }
        | {"LeNet": T(**LENET, epoch=1, after=1, rate=0.9, regenerate="equal")}
    )


def supermask_examples():
    T, S, r = (
        searches.SupermaskTrial,
        searches.settings_of,
        dict(recipe=R.model_copy(update=dict(nesterov=False, max_epochs=3))),
    )
    found = {
        m: T(**LENET | r, search=S(m, 0.3, 3).model_copy(update={"frequency": 1}), record=(1, 3))
        for m in searches.METHODS
    }
    found |= {
        f"conv-2 {m}": T(**CONV | dict(width=0.125), search=S(m, 0.3, 2).model_copy(update={"frequency": 1}))
        for m in ("EP+hybrid", "Biprop+IteRand, authors")
    }
    return found | {
        "trained": T(**LENET | r, search=S("Edge-Popup", 0.3, 2), trained=R),
        "seeds": T(**LENET | r, search=S("Biprop", 0.3, 2), weight_seed=5, score_seed=6),
        "held out": T(**LENET | HELD_OUT, search=S("Edge-Popup", 0.3, 2)),
        "NaN": T(**LENET | dict(recipe=R.model_copy(update=dict(lr=1e30))), search=S("Edge-Popup", 0.3, 2)),
        "resnet-20": T(**RESNET, search=S("EP+Recycle", 0.3, 2)),
    }


def ensemble_examples():
    T, S = searches.EnsembleTrial, searches.settings_of
    return {
        vary: T(
            **LENET,
            search=S("Edge-Popup", 0.3, 2),
            vary=vary,
            members=2,
            snapshots=(0, 1, 2),
            paths=vary != "weights",
            points=3,
        )
        for vary in ("scores", "weights", "order")
    } | {
        "Biprop": T(**LENET, search=S("Biprop", 0.3, 2), members=3, paths=2, points=3),
        "recycled": T(**CONV, search=S("EP+Recycle", 0.3, 2).model_copy(update={"frequency": 1}), members=2),
    }


FOUND = dict(data="digits", train_size=160, score_images=50, density=0.05, shots=3)


def ticket_examples():
    T, few = (
        experiments.TicketTrial,
        FOUND | dict(levels=2, recipe=Recipe(batch_size=64, max_epochs=3, min_epochs=2, patience=1)),
    )
    fields = {
        f"{s} {r}": dict(scorer=s, rounds=r, stale_gradient=stale)
        for r, s, stale in (
            ("U-SS", "magnitude", True),
            ("U-MS", "snip", True),
            ("I-SS", "grasp", True),
            ("I-MS", "grasp", True),
            ("I-SS", "snip", False),
            ("I-MS", "magnitude>synflow", True),
        )
    }
    fields |= {
        "saw": dict(init="saw:snip", saw_images=50),
        "saw*, absolute": dict(init="saw*:grasp", saw_images=50, saw_reading="absolute"),
        "saw, shuffled": dict(init="saw:magnitude", saw_shuffled=True),
    }
    fields |= {
        "once": dict(scorer="once(snip)>synflow"),
        "train mode": dict(scorer="snip@train", rounds="U-SS"),
        "all images": dict(scorer="synflow-std", score_images=None),
    }
    fields |= {
        "clean": experiments.CLEAN | dict(rounds="I-SS", level_schedule="exponential"),
        "histograms": dict(histograms=True),
        "histograms by level": dict(histograms=True, rounds="I-SS"),
    }
    fields |= {"pretrained": dict(pretrain=3), "nudged": dict(nudge=2), "held out": HELD_OUT, "wide": dict(density=0.5)}
    fields |= {f"{w} weights": dict(weights=w) for w in ("gaussian", "shuffled", "saw:magnitude")} | {
        f"{m} mask": dict(mask_edit=m) for m in ("shuffled", "inverted", "random")
    }
    return {name: T(**few | f) for name, f in fields.items()}


def start_examples():
    T = learning_to_learn_starts.StartTrial
    return {
        f"{init}": T(data="digits", train_size=160, init=init, saw_images=50)
        for init in ("standard", "saw:snip", "saw*:grasp")
    } | {
        "shuffled": T(data="digits", train_size=160, init="saw:magnitude", saw_shuffled=True),
        "absolute": T(data="digits", train_size=160, init="saw*:grasp", saw_reading="absolute"),
    }


def mask_examples():
    T = learning_to_learn_masks.MaskTrial
    return {
        f"{s} {r}": T(**FOUND | dict(scorer=s, rounds=r))
        for s in ("magnitude", "snip", "grasp", "synflow", "magnitude>synflow")
        for r in ("U-SS", "U-MS")
    } | {
        "scaled": T(**FOUND | dict(scales=(1.0, 2.0, 0.5))),
        "another network": T(**FOUND | dict(network=7)),
        "pixels": T(**FOUND | dict(pixels=True)),
        "no revival": T(**FOUND | dict(revive=False)),
    }


def overlap_examples():
    T, M = learning_to_learn_masks.OverlapTrial, learning_to_learn_masks.MaskTrial
    pairs = {
        s: (M(**FOUND | dict(scorer=s)), M(**FOUND | dict(scorer="magnitude")))
        for s in ("snip", "grasp", "synflow", "random")
    }
    return {s: T(left=a, right=b) for s, (a, b) in pairs.items()} | {
        "exchanged": T(left=pairs["snip"][0], right=pairs["synflow"][0], exchanges=3)
    }


def images_examples():
    return {
        f"{n} {dull}": learning_to_learn_masks.ImagesTrial(data="digits", train_size=n, dull=dull)
        for n in (160, 80, 40)
        for dull in (0.1, 0.5)
    }


def shapes_examples():
    T = shared.ShapesTrial
    return {
        f"{m} {w}": T(model=m, shape=(3, 32, 32), width=w) for m in ("conv-2", "resnet-20") for w in (0.25, 0.5)
    } | {"LeNet": T()}


def rankings_examples():
    return {f"{p} {pairs}": branches.RankingsTrial(p=p, pairs=pairs) for p in (0.1, 0.2, 0.5) for pairs in (1, 3)}


def agreement_examples():
    T = weight_correlation_agreement.AgreementTrial
    found = {
        f"{left} {right}": T(**LENET, left=left, right=right)
        for left in ("initial", "trained", "fresh")
        for right in ("initial", "trained")
    }
    found |= {
        change: T(**LENET, left="trained", change=change)
        for change in ("units renumbered", *weight_correlation_agreement.CHANGES)
    }
    return found | {
        "another run": T(**LENET, left="trained", other=1),
        "noise": T(**LENET, left="trained", noise=0.5),
        "masked": T(**LENET, density=0.2),
        "shuffled": T(**LENET, density=0.2, shuffled=True),
    }


def watched_examples():
    T, S, r = (
        weight_recycling_watched.WatchedTrial,
        searches.settings_of,
        dict(recipe=R.model_copy(update=dict(nesterov=False, max_epochs=3))),
    )
    return {
        m: T(**LENET | r, search=S(m, 0.3, 3).model_copy(update={"frequency": 1}), record=(1, 3), origins=(2, 3))
        for m in searches.METHODS
    }


def gain_examples():
    return {
        f"{d} {n}": weight_recycling_watched.GainTrial(search=searches.settings_of("Biprop", d, 1), masks=n)
        for d in (0.1, 0.2, 0.5)
        for n in (1, 3)
    }


EXAMPLES = {
    "network-shapes": shapes_examples,
    "rankings": rankings_examples,
    "agreement": agreement_examples,
    "supermask-watched": watched_examples,
    "gain-rounding": gain_examples,
    "images": images_examples,
    "ticket-start": start_examples,
    "ticket-masks": mask_examples,
    "ticket-overlap": overlap_examples,
    "sparse": sparse_examples,
    "branch": branch_examples,
    "plasticity": plasticity_examples,
    "supermask": supermask_examples,
    "ensemble": ensemble_examples,
    "ticket": ticket_examples,
    "idle": lambda: {"idle": Idle(number=1)},
}


def test_no_kind_of_trial_is_forgotten():
    "A new kind gets examples here, with every setting that takes another way through its code."
    assert sorted(EXAMPLES) == list(kinds()), "give EXAMPLES a function of the new kind"
    for kind, make in EXAMPLES.items():
        assert all(type(t) is kinds()[kind] for t in make().values()) and (kind == "idle" or len(make()) >= 5)


def there(trial):
    "The same trial, and those it is of, on the GPU."
    of = {name: there(value) for name, value in trial if isinstance(value, Trial)}
    return trial.model_copy(update=of | ({"device": "cuda"} if "device" in type(trial).model_fields else {}))


def results(trials, folder):
    "Results and failures by the trials' names, run as a sweep is, in a store of their own."
    forget()
    store = Store(folder)
    names = {t.hash: name for name, t in trials.items()}
    rows = run(trials.values(), store, progress="silent")
    return {names[t.hash]: dumps(encode(store.get(t))) for t in trials.values() if t in store}, {
        names[h]: why for h, why in rows.attrs["failures"].items()
    }


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_trial_runs_there(kind, one_engine, tmp_path):
    "And gives, to the bit, what the CPU gives."
    trials = EXAMPLES[kind]()
    here, failed = results(trials, tmp_path / "cpu")
    assert len(here) == len(trials) and not failed, failed
    with pretended():
        found, failed = results({name: there(t) for name, t in trials.items()}, tmp_path / "cuda")
    assert not failed, failed
    assert not (odd := [name for name in trials if found[name] != here[name]]), odd


def test_searches_are_equal_without_the_same_options_too(tmp_path):
    "With a rate that a float32 holds: the CPU's own selection and a rate that is a number."

    def make(m):
        return searches.SupermaskTrial(
            **LENET | dict(recipe=R.model_copy(update=dict(lr=0.0625, nesterov=False))),
            search=searches.settings_of(m, 0.3, 2),
        )

    trials = {m: make(m) for m in searches.METHODS}
    here, _ = results(trials, tmp_path / "cpu")
    with pretended():
        found, _ = results({name: there(t) for name, t in trials.items()}, tmp_path / "cuda")
    assert found == here and len(found) == len(searches.METHODS)


def test_taking_the_masks_way_back_fails_static_dense_and_branch_trials(monkeypatch, tmp_path):
    """Masks that stay where they were, as before `check_masks` moved them: the kinds that fail are those that
    failed on a GPU, and the thesis's levels, whose masks go on from level to level.
    """

    def as_given(masks, model):
        tickets._check_masks(masks, {n: p.shape for n, p in prunable(model).items()})
        return masks

    plain_check, post = tickets.check_masks, Ticket.__post_init__

    def stay(ticket):
        given = dict(ticket.masks)
        post(ticket)
        for n, m in given.items():
            ticket.masks[n] = m.detach().clone().to(ticket.weights[n].dtype)

    for module in [
        m
        for name, m in sys.modules.items()
        if name.startswith("lth_companion") and getattr(m, "check_masks", None) is plain_check
    ]:
        monkeypatch.setattr(module, "check_masks", as_given)
    monkeypatch.setattr(Ticket, "__post_init__", stay)
    failing, expected = [], []
    for kind in kinds():
        trials = EXAMPLES[kind]()
        with pretended():
            _, failed = results({name: there(t) for name, t in trials.items()}, tmp_path / kind)
        assert all(why.startswith(SAME_DEVICE) for why in failed.values()), failed
        failing += [f"{kind} {name}" for name in failed]
        fixed = {
            "sparse": lambda t: not t.changing,
            "branch": lambda t: True,
            "agreement": lambda t: "trained" in (t.left, t.right),
            "ticket": lambda t: t.rounds[0] == "I",
        }.get(kind, lambda t: False)
        expected += [f"{kind} {name}" for name, t in trials.items() if fixed(t)]
    assert sorted(failing) == sorted(expected)
    assert {
        "sparse dense",
        "sparse static",
        "sparse snip",
        "branch dense",
        "branch imp init",
        "branch admm trained",
    } <= set(failing) and not {"sparse RigL", "sparse GMP"} & set(failing)


# ---------------------------------------------------------------- the recipes of a GPU

GPU = dict(graph=True, precision="bf16", memory_format="channels_last")
# a graph's rate is float32: here both are the same number
EXACT = Recipe(lr=0.0625, momentum=0.5, batch_size=64, max_epochs=2, patience=None)


def gpu_examples():
    "One trial or two of every kind that trains."
    conv, S = CONV | dict(recipe=EXACT.model_copy(update=dict(augment="crop-flip"))), searches.settings_of
    return {
        "sparse": [
            SparseTrial(**conv, scorer="snip", density=0.2),
            SparseTrial(**conv, dynamic=settings("GraNet (s_i=0.5)", 0.2, interval=2)),
        ],
        "branch": [
            branches.BranchTrial(**conv, masks="imp", level=1),
            branches.BranchTrial(**conv, masks="admm", level=1, admm_epochs=1),
        ],
        "plasticity": [sparse_training.PlasticityTrial(**conv, epoch=1, after=1, rate=0.5, regenerate="equal")],
        "supermask": [
            searches.SupermaskTrial(**conv, search=S("EP+Recycle", 0.3, 2).model_copy(update={"frequency": 1})),
            searches.SupermaskTrial(**conv, search=S("Biprop", 0.3, 2), trained=EXACT),
        ],
        "ensemble": [searches.EnsembleTrial(**conv, search=S("Biprop", 0.3, 2), members=2, paths=1, points=3)],
        "agreement": [weight_correlation_agreement.AgreementTrial(**conv, left="trained", right="initial")],
        "supermask-watched": [
            weight_recycling_watched.WatchedTrial(**conv, search=S("Biprop", 0.3, 2), record=(1,), origins=(2,))
        ],
        "ticket": [
            experiments.TicketTrial(
                data="digits", train_size=160, density=density, rounds=rounds, levels=2, recipe=EXACT
            )
            for rounds, density in (("U-MS", 0.05), ("I-SS", 0.3))
        ],
    }


# masks alone inherit a recipe, and refuse all but the plain one
TRAIN = {k: c for k, c in kinds().items() if "recipe" in c.model_fields and k != "ticket-masks"}


@pytest.mark.parametrize("kind", TRAIN)
def test_every_kind_takes_the_recipes_of_a_gpu(kind, tmp_path, monkeypatch, cuda):
    "A graph, bf16 and channels_last: rehearsed by the tape, and to the bit what the same steps give one by one."
    replays, plain_replay = [], Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda graph: (replays.append(1), plain_replay(graph)))
    eager, graphed = (
        {
            f"{i}": t.model_copy(
                update={"device": "cuda", "recipe": t.recipe.model_copy(update=GPU | {"graph": graph})}
            )
            for i, t in enumerate(gpu_examples()[kind])
        }
        for graph in (False, True)
    )
    want, failed = results(eager, tmp_path / "eager")
    assert not failed and not replays, failed
    found, failed = results(graphed, tmp_path / "graph")
    # 160 images are two whole batches and the rest, twice; a step before an event is eager
    assert not failed and len(replays) >= 3 * len(graphed), (
        failed,
        len(replays),
    )
    assert found == want and len(found) == len(graphed)


@pytest.mark.parametrize("option", [dict(graph=True), dict(precision="tf32")])
def test_options_of_a_gpu_are_taken_with_it_alone(option):
    for T in TRAIN.values():
        more = {
            "ticket": dict(density=0.1),
            "plasticity": dict(epoch=1),
            "supermask": dict(search=Supermask(density=0.1)),
            "ensemble": dict(search=Supermask(density=0.1)),
            "supermask-watched": dict(search=Supermask(density=0.1)),
        }.get(T.kind, {})
        assert T(recipe=R.model_copy(update=option), device="cuda", **more).recipe.model_dump()[[*option][0]]
        with pytest.raises(ValueError, match='needs a CUDA device.*use device="cuda"'):
            T(recipe=R.model_copy(update=option), **more)


# ---------------------------------------------------------------- every scorer, method and measure


def network(device, name="conv-2", width=0.125, seed=0):
    return create(name, (1, 8, 8), generator=generator(seed, "init"), width=width).to(device)


def some_masks(model, density=0.4, device=None):
    return {
        n: (torch.rand(w.shape, generator=generator(1, n)) < density).float().to(device or w.device)
        for n, w in prunable(model).items()
    }


@pytest.mark.parametrize(
    "name",
    [
        *(s for s in sorted(SCORERS) if SCORERS[s].__module__.startswith("lth_companion")),
        "snip@train",
        "snip>synflow",
        "once(grasp)>magnitude",
    ],
)
def test_every_scorer(name):
    "Alone and under masks of either side."

    def scored(device):
        net, data = network(device), load("digits", device, 160)
        batches = data.scoring_batches(60, generator(0, "batch"), 40)

        def keep(**k):
            return some_masks(net, 0.6, **k)

        def score(masks):
            return call(parse(name), net, batches, masks=masks, generator=generator(0, "scores"))

        found = [score(None), score(keep()), score(keep(device="cpu"))]
        assert all(t.device.type == device.type for t in tensors_in(found))
        pruned = [
            pruning.prune(net, name, 0.2, batches, rounds=2, generator=generator(0, "scores"), masks=m)
            for m in (None, keep(), keep(device="cpu"))
        ]
        assert plain(pruned[1]) == plain(pruned[2])
        return [
            found,
            pruned,
            saw.saw(name)(net, batches, generator=generator(0, "scores")) if not name.startswith("random") else None,
        ]

    both(scored)


def test_the_stale_gradient_of_grasp_comes_from_either_side():
    def scored(device):
        net, data = network(device), load("digits", device, 160)
        stale = {n: torch.ones(w.shape) for n, w in prunable(net).items()}
        return SCORERS["grasp"](
            net, data.scoring_batches(60, generator(0)), masks=some_masks(net, device="cpu"), stale=stale
        )

    both(scored)


@pytest.mark.parametrize("method", DYNAMIC)
def test_every_dynamic_method(method, tmp_path):
    "From its own masks, with a checkpoint that another run goes on from."

    def trained(device):
        data, recipe, out = (
            load("digits", device, 160),
            R.model_copy(update=dict(augment="crop-flip", max_epochs=3)),
            [],
        )
        for file in (None, tmp_path / f"{device.type}"):
            net = network(device)
            if file:  # stopped after an epoch, and gone on with in a new network

                def stop(model, result):
                    if result.epochs == 2:
                        raise InterruptedError

                with pytest.raises(InterruptedError):
                    sparse_train(net, data, recipe, settings(method, 0.2, interval=2), on_epoch=stop, checkpoint=file)
                net = network(device)
            result, work = sparse_train(net, data, recipe, settings(method, 0.2, interval=2), checkpoint=file)
            assert all(
                t.device.type == device.type
                for t in tensors_in([result.ticket.weights, result.ticket.masks, result.gradient])
            )
            out.append([result.losses, result.accuracies, result.ticket, work.history])
        return out

    both(trained)


@pytest.mark.parametrize("method", searches.METHODS)
def test_every_search(method, one_engine, tmp_path):
    def searched(device):
        made, data, out = (
            searches.settings_of(method, 0.3, 3).model_copy(update={"frequency": 1}),
            load("digits", device, 160),
            [],
        )
        for file in (None, tmp_path / device.type):
            result, work = search(
                network(device, "lenet-300-100", 0.1),
                data,
                R.model_copy(update=dict(nesterov=False)),
                made,
                checkpoint=file,
            )
            # from the end of the file
            again, _ = search(
                network(device, "lenet-300-100", 0.1),
                data,
                R.model_copy(update=dict(nesterov=False)),
                made,
                checkpoint=file,
            )
            assert plain(again.ticket) == plain(result.ticket)
            out.append([result.losses, result.ticket, work.put(), work.scores, work.frozen, work.origin])
        return out

    both(searched)


def test_masks_and_data_of_the_other_side():
    "Tickets and masks from anywhere reach the model; a data set may stay on the CPU."

    def trained(device):
        here, away = load("digits", device, 160), load("digits", "cpu", 160)
        start = Ticket.of(network("cpu"), some_masks(network("cpu")))
        out = []
        for data in (here, away):
            result = train(start.apply(network(device)), data, R, start.masks, save_at=(2,))
            found, _ = search(network(device), data, R, Supermask(density=0.3))
            out.append([result.losses, result.ticket, result.saved[2], found.losses, evaluate(network(device), data)])
        assert plain(out[0]) == plain(out[1])
        return out[0]

    def same(device):
        return trained(device)[:3]  # a search has another rate on a GPU

    both(same)


def test_iterative_pruning_and_admm():
    def pruned(device):
        data = load("digits", device, 160)

        def fit(ticket, level):
            return train(ticket.apply(network(device)), data, R, ticket.masks).ticket

        levels = list(imp.imp(fit, Ticket.of(network("cpu")), 2, 0.4))
        mixed = list(imp.imp(fit, Ticket.of(network(device)), 1, 0.4, "global"))
        masks, notes = imp.admm(network(device), data, R, 0.3, epochs=2, stages=2)
        return [
            levels,
            mixed,
            masks,
            notes,
            imp.shuffle_masks(masks, generator(0)),
            imp.random_masks(masks, {n: 3 for n in masks}, generator(0)),
            imp.smart_masks(prunable(network(device)), 0.3, generator(0)),
        ]

    both(pruned)


def test_plasticity():
    def measured(device):
        data, net = load("digits", device, 160), network(device)
        whole = train(net, data, R, save_at=(3,))
        ticket, gradients = whole.saved[3], plasticity.dense_gradients(net, data, R, 0, 1)
        out = [gradients]
        for cut, how in (
            (plasticity.prune_once, "authors"),
            (plasticity.prune_once, "equal"),
            (plasticity.prune_filters, "equal"),
        ):
            masks, survivors = cut(ticket, 0.5, "uniform", how, gradients)
            result = plasticity.continue_for(
                network(device), ticket, whole.velocities[3], masks, survivors, data, R, 0, 1, 1
            )
            out.append([masks, survivors, result.losses, result.ticket])
        return out

    both(measured)


def test_every_measure_of_masks_and_weights():
    "With the second side where the first is, and on the CPU."

    def measured(device):
        a, b = (
            Ticket.of(n := network(device, seed=s), {k: m.to(device) for k, m in keep.items()})
            for s, keep in ((0, some_masks(network("cpu"))), (1, some_masks(network("cpu", seed=1), 0.6)))
        )
        out = []
        for move in (lambda d: d, lambda d: {n: t.cpu() for n, t in d.items()}):
            masks, weights = move(b.masks), move(b.weights)
            out.append(
                [
                    f(a.masks, masks)
                    for f in (
                        correlation.jaccard,
                        correlation.hamming,
                        correlation.matching,
                        diversity.published_jaccard,
                    )
                ]
                + [diversity.by_layer(a.masks, masks), diversity.pair(a.masks, masks, weights)]
                + [
                    f(a.weights, weights, move(a.masks))
                    for f in (correlation.cosine, correlation.pearson, correlation.sign_agreement)
                ]
                + [correlation.overlap(a.weights, weights, 0.2, scope) for scope in ("layer", "global")]
                + [
                    correlation.overlap(a.weights, weights, 0.2, masks=move(a.masks)),
                    *correlation.both_overlaps(a.effective, weights, 0.1, move(a.masks)),
                    diversity.within_deciles(a.masks, masks, weights),
                    diversity.distances([a.masks, masks]),
                ]
            )
        assert plain(out[0]) == plain(out[1])
        return out[0] + [
            a.kept,
            a.density,
            a.densities,
            a.empty,
            a.digest,
            a.effective,
            selection.keep_top(a.weights, 0.3),
            selection.keep_top(a.weights, 0.3, "layer"),
            selection.keep_top({n: w.abs().round() for n, w in a.weights.items()}, 0.3, generator=generator(0)),
            costs.positions(network(device), (1, 8, 8)),
            costs.dense_flops(network(device), (1, 8, 8)),
        ]

    both(measured)


@pytest.mark.parametrize("method", ["Edge-Popup", "Biprop"])
def test_every_measure_of_a_search(method, one_engine, tmp_path):
    def measured(device):
        data, made = load("digits", device, 160), searches.settings_of(method, 0.3, 2)
        (one, a), (two, b) = (
            search(network(device, "lenet-300-100", 0.1), data, R, made, seed, weight_seed=0) for seed in (0, 1)
        )
        outs = [diversity.logits(w.model, data) for w in (a, b)]
        ticket, source = one.ticket, storage.Source.of(a)
        forms = {}
        for form in storage.possible(ticket, source):
            read = Ticket.load(ticket.save(tmp_path / f"{device.type}-{form}", form, source))
            forms[form] = (
                storage.bits(ticket, form, source),
                read.digest == ticket.digest,
                storage.payload(tmp_path / f"{device.type}-{form}"),
            )
        assert {"values", "seed"} <= set(forms)
        return [
            outs,
            diversity.disagreement(*outs),
            diversity.ensemble(outs, data.test_y),
            diversity.path(a, b, data, 3),
            diversity.path(a, diversity.random_scores(a.scores, generator(0)), data, 3),
            diversity.interpolated(a.scores, b.scores, 0.5, 0.3),
            forms,
            storage.mask_bound(ticket),
            searches.packed(a.put()),
            [supermasks.recycle(w, s, 0.2) for w, s in zip(a.frozen.values(), a.scores.values())],
            [evaluate(a.model, data, split) for split in ("test", "train")],
        ]

    both(measured)


def test_cohorts_of_tickets_on_the_device(monkeypatch):
    def trained(device):
        recipe, data = Recipe(batch_size=64, max_epochs=4, patience=1), load("digits", device, 160)
        made = [
            Ticket.of(n := network(device, "lenet-300-100", 1.0, s), some_masks(n, d))
            for s, d in ((0, 0.5), (1, 0.05), (2, 0.02))
        ]
        return [
            [r.losses, r.ticket, r.gradient] for r in cohorts.train_cohort(made, data, recipe, force_engine="block")
        ]

    both(trained)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_imagenet_training(images, monkeypatch):
    "Its loop, for one process: events, evaluation, and the network's own draws."
    made = test_imagenet.network

    def trained(device):
        monkeypatch.setattr(test_imagenet, "network", lambda name, dtype: made(name, dtype).to(device))
        return test_imagenet.one(images, granet_parallel.World(device=device), dtype=torch.float32)

    both(trained)


# ---------------------------------------------------------------- a pool, and a kill


def test_a_pool_of_four_loses_nothing_and_runs_nothing_twice(tmp_path, monkeypatch):
    "Twenty trials on the pretended device; the worker of one that is midway is killed."
    log = tmp_path / "log"
    monkeypatch.setenv("PRETENDED_LOG", str(log))
    monkeypatch.setenv("LTH_PRETEND_CUDA", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE / "pretended"), str(ROOT)]))
    monkeypatch.syspath_prepend(str(HERE / "pretended"))
    from pretended_sweep import OnDevice, hold

    trials, store, victim, killed = [OnDevice(seed=s) for s in range(20)], Store(tmp_path / "runs"), 9, []
    hold(victim).touch()

    def lines():
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    def on_done(trial, result):
        if not killed and (
            begun := [int(pid) for what, seed, pid in lines() if (what, seed) == ("begin", str(victim))]
        ):
            os.kill(begun[0], signal.SIGKILL)
            killed.append((begun[0], {seed for what, seed, _ in lines() if what == "end"}))
            hold(victim).unlink()

    rows = run(trials, store, workers=4, progress="silent", on_done=on_done)
    # nothing lost
    assert len(killed) == 1 and rows.failed.isna().all() and rows.attrs["ran"] == 20 and all(t in store for t in trials)
    begun, ended = (
        collections.Counter(int(seed) for what, seed, _ in lines() if what == word) for word in ("begin", "end")
    )
    pid, before = killed[0]
    # nothing run twice: the one that was killed began twice, and ended once
    assert begun == {s: 1 + (s == victim) for s in range(20)} and ended == {s: 1 for s in range(20)}
    assert (
        before
        and str(victim) not in before
        and len({p for _, _, p in lines()}) == 5
        and all(store.get(t)["gpu"] == NAME for t in trials)
    )
    told = log.read_text()
    again = run(trials, store, workers=4, progress="silent")
    assert again.attrs["cached"] == 20 and log.read_text() == told
    with pretended():
        assert OnDevice.run_group([trials[victim]])[0] == store.get(trials[victim])


# ---------------------------------------------------------------- a notebook of each paper

NOTEBOOKS = {
    "learning_to_learn": "01_baselines",
    "granet": "06_ablations",
    "weight_correlation": "02_initial_and_trained",
    "weight_recycling": "05_small",
}


def test_each_paper_has_its_notebook():
    assert set(NOTEBOOKS) == {p.name for p in (ROOT / "nbs/papers").iterdir() if list(p.glob("[0-9]*.ipynb"))}


@pytest.mark.slow
@pytest.mark.parametrize("paper", NOTEBOOKS)
def test_a_notebook_runs_there(paper, tmp_path):
    "Through papermill, with one seed: kernel and workers have the device from the start-up file."
    notebook = NOTEBOOKS[paper]
    environment = os.environ | {
        "LTH_RUNS": str(tmp_path / "runs"),
        "LTH_PRETEND_CUDA": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE / "pretended"), str(ROOT)]),
    }
    command = [
        sys.executable,
        "-m",
        "lth_companion.lab.cli",
        "run",
        f"{paper}/{notebook}",
        "--tier",
        "smoke",
        "--device",
        "cuda",
        "--workers",
        "2",
        "--out",
        str(tmp_path / "figures"),
        "-p",
        "seeds=100",
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert not done.returncode, done.stdout + done.stderr
    folder = tmp_path / "figures" / "smoke" / paper / notebook
    told = json.loads((folder / "provenance.json").read_text())
    assert (
        told["device"] == told["parameters"]["device"] == "cuda"
        and told["machine"]["gpu"] == NAME
        and told["parameters"]["workers"] == 2
        and told["trained"] == told["trials"]["count"] > 0
    )
    for end in ("svg", "png", "csv"):
        assert [name for name in told["outputs"] if name.endswith(end) and (folder / name).stat().st_size], end
    store = Store(tmp_path / "runs")
    trials = [store.record(h)["trial"] for h in store.hashes()]
    # kinds that only draw or count (a network's shapes, a ranking) name no device: they are the same everywhere
    named = [t["fields"].get("device") for t in trials if "device" in KINDS[t["kind"]].model_fields]
    assert named and set(named) == {"cuda"}
