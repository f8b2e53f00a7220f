"""The options of a recipe that are for GPUs. Without one, a stand-in for `capture` runs the step where a graph
would be replayed, so that everything around the graph (warm-up put back, rates, crops, uneven batches, watched
steps, gradients) is tried here.
"""

import functools
import math

import pytest
import torch
from apart import SLACK, as_near, farthest, swept

from lth_companion.methods.dynamic import settings, sparse_train
from lth_companion.tickets import Ticket, generator, prunable
from lth_companion.training import devices
from lth_companion.training.data import Data, load
from lth_companion.training.devices import numerics
from lth_companion.training.loop import Stepper, evaluate, optimizer, train, training_batch
from lth_companion.training.models import create
from lth_companion.training.recipe import Recipe


def images(shape=(3, 32, 32), n=200, device="cpu"):
    g = generator(0, "images", *shape)
    x, y = (
        torch.randint(256, (n + 50, *shape), generator=g, dtype=torch.uint8),
        torch.randint(10, (n + 50,), generator=g),
    )
    x, y, c = x.to(device), y.to(device), shape[0]
    return Data("made", "made", "0", 10, x[:n], y[:n], x[n:], y[n:], x[:0], y[:0], (0.5,) * c, (0.25,) * c)


def recipe(**fields):
    return Recipe(
        **(
            dict(
                lr=0.05,
                momentum=0.9,
                nesterov=True,
                weight_decay=5e-4,
                batch_size=64,
                max_epochs=2,
                patience=None,
                schedule="milestones",
                milestones=(1,),
            )
            | fields
        )
    )


def net(name="conv-2", width=0.125, seed=0):
    return create(name, (3, 32, 32), 10, generator(seed, "init"), width)


def masks(model, density=0.3):
    return {n: (torch.rand(w.shape, generator=generator(1, n)) < density).float() for n, w in prunable(model).items()}


@pytest.fixture
def stand_in(monkeypatch):
    """In place of a GPU: runs for real, as a capture's warm-up; then one run a replay, whose gradients lie where
    those of the capture lay.
    """
    replays, memory, inside, plain = [], {}, [], torch.optim.SGD.zero_grad

    def zero_grad(opt, set_to_none=True):
        if not inside:
            return plain(opt, set_to_none=set_to_none)
        for p in opt.param_groups[0]["params"]:
            p.grad = memory.setdefault(p, torch.zeros_like(p, requires_grad=False)).zero_()

    def capture(f):
        def graph():
            inside.append(1)
            f()
            inside.pop()

        def replay():
            replays.append(1)
            graph()

        for run in (f, f, f, graph):
            run()
        return replay

    monkeypatch.setattr(torch.optim.SGD, "zero_grad", zero_grad)
    monkeypatch.setattr(devices, "capture", capture)
    monkeypatch.setattr(devices, "check_device", lambda *a: None)
    return replays


def same(a, b):
    assert a.losses == b.losses and a.accuracies == b.accuracies and a.ticket.digest == b.ticket.digest
    for part in ("rest", "weights"):
        assert all(torch.equal(getattr(a.ticket, part)[n], t) for n, t in getattr(b.ticket, part).items())
    assert all(torch.equal(a.gradient[n], g) for n, g in b.gradient.items())


# ---------------------------------------------------------------- the step as a graph
@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(augment="crop-flip"),
        dict(momentum=0.0, nesterov=False),
        dict(memory_format="channels_last"),
        dict(batch_size=50),
    ],
)
def test_a_replayed_step_is_the_eager_step(stand_in, fields):
    data, r = images(), recipe(**fields)
    results = []
    for graph in (False, True):
        model = net("resnet-20", 0.25)
        results.append(train(model, data, r.model_copy(update={"graph": graph}), masks(model), save_at=(3, 5)))
    eager, graphed = results

    def close(a, b):
        return torch.allclose(a, b, rtol=1e-4, atol=1e-6)  # the rate is float32 in a graph, and a double beside it

    assert all(close(a, b) for a, b in zip(eager.ticket.weights.values(), graphed.ticket.weights.values()))
    # running statistics: the warm-up left no trace
    assert all(close(eager.ticket.rest[n], graphed.ticket.rest[n]) for n in eager.ticket.rest)
    assert all(close(eager.gradient[n], graphed.gradient[n]) for n in eager.gradient)
    assert all(
        close(eager.velocities[t][n], graphed.velocities[t][n]) for t in eager.velocities for n in eager.velocities[t]
    )
    assert torch.allclose(torch.tensor(eager.losses), torch.tensor(graphed.losses), rtol=1e-4)
    assert len(stand_in) == 2 * (200 // r.batch_size)  # whole batches alone


def test_rates_that_are_exact_give_equal_bits(stand_in):
    # floats of few bits: nothing is rounded
    data, r = (
        images(),
        recipe(lr=0.0625, gamma=0.5, momentum=0.5, weight_decay=0.0),
    )
    results = [train(model := net(), data, r.model_copy(update={"graph": g}), masks(model)) for g in (False, True)]
    same(*results)


@pytest.mark.parametrize("method", ["RigL", "SNFS", "GraNet (s_i=0.5)"])
def test_graphs_and_masks_that_change(stand_in, method):
    data, r = images(), recipe(max_epochs=4, schedule="constant", milestones=())
    found = []
    for graph in (False, True):
        result, work = sparse_train(
            net(), data, r.model_copy(update={"graph": graph}), settings(method, 0.2, interval=3), seed=1
        )
        found.append((result, work))
    (a, one), (b, two) = found
    assert (
        one.history
        and [e["kept"] for e in one.history] == [e["kept"] for e in two.history]
        and one.done == two.done == 16
    )
    assert a.ticket.kept == b.ticket.kept and torch.allclose(torch.tensor(a.losses), torch.tensor(b.losses), rtol=1e-3)
    for n, m in b.ticket.masks.items():
        assert (b.ticket.weights[n][m == 0] == 0).all()
    whole = 3 * 4
    # SNFS reads every gradient
    assert len(stand_in) == (0 if method == "SNFS" else whole - sum(work.wants(t) and t % 4 != 0 for t in range(1, 17)))


def test_a_gradient_from_before_is_not_left_behind(stand_in):
    "After a replay the parameters carry the graph's gradients, whatever an eager step left there."
    data, r = images(n=192), recipe(graph=True, max_epochs=1, schedule="constant", milestones=())
    model, data3 = net(), images(n=192)
    opt = optimizer(model, r)
    stepper = Stepper(model, opt, data, r)
    parts = torch.arange(192).split(64)
    stepper(parts[0])
    stepper(parts[1], watched=True)
    stepper(parts[2])
    grads = [p.grad.clone() for p in model.parameters()]
    model2 = net()
    opt2 = optimizer(model2, recipe(max_epochs=1, schedule="constant", milestones=()))
    plain = Stepper(model2, opt2, data3, recipe(max_epochs=1, schedule="constant", milestones=()))
    for p in parts:
        plain(p)
    assert all(torch.allclose(g, p.grad, rtol=1e-3, atol=1e-6) for g, p in zip(grads, model2.parameters()))


def test_options_that_the_device_lacks():
    data = images()
    for fields, what in ((dict(graph=True), "graph=True"), (dict(precision="tf32"), "tf32")):
        with pytest.raises(ValueError, match=f"{what}.*needs a CUDA device.*leave the option out"):
            train(net(), data, recipe(**fields))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_batch_as_the_recipe_wants_it(layout):
    data, indices = images(), torch.tensor([7, 3, 150])
    x, y = training_batch(
        data, indices, recipe(memory_format=layout, augment="crop-flip"), torch.float64, generator(0, "crops")
    )
    want, targets = data.batch(data.train_x, data.train_y, indices, "crop-flip", generator(0, "crops"))
    assert x.dtype == torch.float64 and torch.equal(x, want.double()) and torch.equal(y, targets)
    assert x.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last") != x.is_contiguous()


def test_until_the_start_trains_nothing():
    model = net()
    before = Ticket.of(model).digest
    assert train(model, images(), recipe(), until=0, save_at=(0,)).saved[0].digest == before == Ticket.of(model).digest


# ---------------------------------------------------------------- what else goes through a graph
def test_cohorts_replayed_are_cohorts(stand_in):
    "The block engine under `graph`: a member that leaves, and an uneven last batch."
    from lth_companion.training.cohorts import train_cohort

    data, tickets = load("digits", train_size=300), []
    for seed, density in ((0, 0.5), (1, 0.05), (2, 0.01)):
        model = create("lenet-300-100", (1, 8, 8), generator=generator(seed, "init"))
        tickets.append(Ticket.of(model, masks(model, density)))
    r = Recipe(lr=0.0625, momentum=0.5, batch_size=64, max_epochs=12, patience=1)
    eager, graphed = (
        train_cohort(tickets, data, r.model_copy(update={"graph": g}), force_engine="block") for g in (False, True)
    )
    assert len({e.stopped for e in eager}) > 1 and stand_in
    for a, b in zip(eager, graphed):
        assert a.stopped == b.stopped
        same(a, b)


@pytest.mark.parametrize(
    "method, change",
    [
        ("edge-popup", "none"),
        ("edge-popup", "recycle"),
        ("biprop", "none"),
        ("biprop", "iterand-all"),
        ("edge-popup", "hybrid"),
    ],
)
@pytest.mark.parametrize(
    "fields",
    [{}, dict(augment="crop-flip", memory_format="channels_last"), dict(momentum=0.0, nesterov=False)],
    ids=["plain", "augmented", "no momentum"],
)
def test_a_replayed_search_is_the_eager_search(stand_in, method, change, fields):
    """Selection, gradients and the scores' step in the graph; changes of the frozen weights between epochs outside;
    an uneven last batch.
    """
    from lth_companion.methods.supermasks import Supermask, search

    data, settings = images(), Supermask(density=0.3, method=method, change=change, frequency=1, rate=0.2)
    r = recipe(**(dict(max_epochs=3, schedule="cosine", milestones=()) | fields))

    def one(graph):
        model, masks = net("resnet-20", 0.25), []
        result, work = search(
            model,
            data,
            r.model_copy(update={"graph": graph}),
            settings,
            on_epoch=lambda w, _: masks.append({n: m.clone() for n, m in w.put().items()}),
        )
        return result, work, masks

    (a, one_work, one_masks), (b, two_work, two_masks) = one(False), one(True)
    # the last batch of an epoch is uneven and eager
    assert len(stand_in) >= 2 * 3 and one_work.step_number == two_work.step_number == int(two_work.clock) + 1 == 12
    assert b.losses == pytest.approx(a.losses, rel=1e-4)
    for x, y in zip(one_masks, two_masks):
        apart = sum(int((x[n] != y[n]).sum()) for n in x)
        # here a rate of float32 stands beside a double; on a GPU both are float32
        assert apart <= 2e-4 * sum(m.numel() for m in x.values()), apart
        assert {n: int(m.sum()) for n, m in x.items()} == {n: int(m.sum()) for n, m in y.items()}


def test_a_replayed_search_names_the_step_of_a_nan(stand_in):
    from lth_companion.methods.supermasks import Supermask, SupermaskError, search

    said = []
    for graph in (False, True):
        with pytest.raises(SupermaskError) as error:
            search(
                net("lenet-300-100", 1.0),
                images(),
                recipe(lr=1e30, graph=graph, milestones=(), schedule="constant", batch_size=20),
                Supermask(density=0.5),
            )
        said.append((str(error.value), error.value.result.losses))
    assert said[0] == said[1] and "After step" in said[0][0], said


@pytest.mark.parametrize("k", [0, 1, 7, 500, 999, 1000])
def test_the_fixed_selection_is_the_selection(k):
    from lth_companion.selection import top_fixed, top_masks

    for i, ties in enumerate((1, 5, 1000)):
        s = (
            (torch.rand(1000, generator=generator(i, "scores")) * ties).floor()
            if ties != 1
            else torch.rand(1000, generator=generator(i, "scores"))
        )
        assert torch.equal(top_fixed(s, k), top_masks([s], k)[0]) and int(top_fixed(s, k).sum()) == k


def test_a_graph_wants_its_images_on_its_own_side(stand_in):
    from types import SimpleNamespace

    from lth_companion.training.devices import check_graph

    model, data = net(), SimpleNamespace(train_y=torch.zeros(1, device="meta"))
    check_graph(recipe(), model, data)
    with pytest.raises(ValueError, match="from the meta to the cpu; load the data"):
        check_graph(recipe(graph=True), model, data)


def test_what_cannot_be_combined_is_refused():
    from lth_companion.methods.supermasks import Supermask, search
    from lth_companion.training.cohorts import train_cohort

    data = images((1, 28, 28))
    ticket = Ticket.of(create("lenet-300-100"))
    for fields, what in ((dict(compile=True), "compile=False"), (dict(precision="bf16"), "leave precision='bf16' out")):
        with pytest.raises(ValueError, match=what):
            train_cohort([ticket], data, Recipe(**fields))
    with pytest.raises(ValueError, match="not compiled"):
        search(net(), images(), recipe(compile=True), Supermask(density=0.5))


# ---------------------------------------------------------------- precision and compilation
def test_bf16_is_near_and_keeps_float32_weights():
    data = images()
    plain, half = (train(m := net(), data, recipe(precision=p), masks(m)) for p in ("float32", "bf16"))
    assert all(w.dtype == torch.float32 for w in half.ticket.weights.values()) and plain.losses != half.losses
    assert torch.allclose(torch.tensor(plain.losses), torch.tensor(half.losses), rtol=0.05)
    for n, m in half.ticket.masks.items():
        assert (half.ticket.weights[n][m == 0] == 0).all()


def test_compiled_steps_are_near(monkeypatch):
    calls, real = [], torch.compile
    # the compiler's own speed is not tried here
    monkeypatch.setattr(torch, "compile", lambda model, **k: calls.append(k) or real(model, backend="aot_eager", **k))
    data = images()
    plain, fast = (train(m := net(), data, recipe(compile=c), masks(m)) for c in (False, True))
    assert calls == [dict(dynamic=False)] and torch.allclose(
        torch.tensor(plain.losses), torch.tensor(fast.losses), rtol=1e-4
    )


def test_switches_are_put_back(monkeypatch):
    "What `numerics` sets on a GPU is as it was afterwards; the switches exist on every build of torch."
    monkeypatch.setattr(devices, "check_device", lambda *a: None)

    def switches():
        return (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)

    found = switches()  # another test may have set them
    # torch's own defaults
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = (
        True,
        False,
    )
    for precision, want in (("float32", False), ("tf32", True), ("bf16", False)):
        with pytest.raises(ZeroDivisionError):
            with numerics(Recipe(precision=precision), "cuda"):
                assert switches() == (want, want)
                with torch.backends.cudnn.flags(enabled=True):
                    pass  # what torch.compile reads: mixed switches are an error
                1 / 0
        assert switches() == before
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = found


def test_options_are_part_of_the_identity():
    from lth_companion.lab.trials import changed_fields

    assert (
        changed_fields(Recipe(graph=True, precision="bf16")) == {"graph": True, "precision": "bf16"}
        and changed_fields(Recipe()) == {}
    )
    with pytest.raises(ValueError):
        Recipe(precision="fp8")
    with pytest.raises(ValueError):
        Recipe(together=2)  # how many stand beside each other is no property of a trial


# ---------------------------------------------------------------- on a GPU
@functools.cache
def truth(name, width):
    """Losses of a run in float64 on the CPU, and those of its float32: as it is, and with the first, middle or last
    layer moved by 1e-7.
    """

    def losses(moved=None, dtype=torch.float32):
        model = net(name, width).to(dtype)
        m = masks(model)
        if moved is not None:
            with torch.no_grad():
                list(prunable(model).values())[moved].mul_(1 + 1e-7)
        return train(model, images(n=640), FORTY_STEPS, m).losses

    layers = len(prunable(net(name, width)))
    return losses(dtype=torch.float64), [losses(), *(losses(i) for i in (0, layers // 2, layers - 1))]


FORTY_STEPS = recipe(lr=0.01, max_epochs=2, batch_size=32, schedule="constant", milestones=())


@pytest.mark.gpu
@pytest.mark.parametrize("name, width", [("lenet-300-100", 1.0), ("conv-2", 0.5), ("resnet-20", 0.5)])
@pytest.mark.parametrize("options", [{}, dict(graph=True)], ids=["eager", "graph"])
def test_a_gpu_rounds_as_a_cpu_does(name, width, options):
    """Float32 over 40 steps: losses as near to a float64 run's as a CPU's, or as the rounding of the longest sum
    (Higham and Mary 2019); masks kept, pruned weights 0.
    """
    reference, own = truth(name, width)
    model = net(name, width)
    m = masks(model)
    # masks from the CPU
    gpu = train(model.cuda(), images(n=640, device="cuda"), FORTY_STEPS.model_copy(update=options), m)
    longest = max(w[0].numel() for w in prunable(model).values())
    # the rounding of one sum: sqrt(n) units of the last place
    as_near(gpu.losses, reference, own, floor=longest**0.5 * torch.finfo(torch.float32).eps * reference[0])
    for n, t in gpu.ticket.masks.items():
        assert torch.equal(t.cpu(), m[n]) and (gpu.ticket.weights[n][t == 0] == 0).all()


@pytest.mark.gpu
def test_one_graph_after_another():
    """Two networks in turn, each under a graph of its own, and each once more beside the other's graph: to the same
    losses as alone.
    """
    data, r = images(n=640, device="cuda"), recipe(graph=True, augment="crop-flip")

    def losses(seed):
        return train(net("resnet-20", 0.5, seed).cuda(), data, r, seed=seed).losses

    alone = [losses(0), losses(0), losses(1), losses(1)]
    noise = max(farthest(alone[1], alone[0]), farthest(alone[3], alone[2]))  # cuDNN may add in any order
    model = net("resnet-20", 0.5).cuda()
    model.train()
    kept = Stepper(model, optimizer(model, r), data, r)
    kept(torch.arange(64, device="cuda"), data.draw("crop-flip", 64).cuda())  # a graph that stays alive
    for seed, before in ((0, alone[0]), (1, alone[2])):
        assert farthest(losses(seed), before) <= SLACK * noise + 1e-6
    kept(torch.arange(64, device="cuda"), data.draw("crop-flip", 64).cuda())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
def test_processes_side_by_side_give_what_one_gives(tmp_path):
    "Four workers on one GPU, graphs in each; under MPS if it runs."
    from lth_companion.lab.sparse_trials import SparseTrial
    from lth_companion.methods.dynamic import settings as method

    r = recipe(graph=True, memory_format="channels_last", batch_size=128, max_epochs=4, milestones=(2,))
    trials = [
        SparseTrial(data="digits", model="conv-2", width=0.25, recipe=r, device="cuda", seed=s, **m)
        for s in (0, 1)
        for m in (
            {},
            dict(dynamic=method("RigL", 0.1, interval=5)),
            dict(dynamic=method("static", 0.1)),
            dict(scorer="snip", density=0.1),
        )
    ]
    alone, again, four = (
        swept(trials, tmp_path / "a"),
        swept(trials, tmp_path / "b"),
        swept(trials, tmp_path / "c", workers=4),
    )
    noise = max(farthest(x, y) for x, y in zip(alone.losses, again.losses))
    for x, y in zip(alone.losses, four.losses):
        assert farthest(y, x) <= SLACK * noise + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "fields",
    [
        dict(precision="tf32"),
        dict(precision="bf16", memory_format="channels_last"),
        dict(precision="bf16", memory_format="channels_last", graph=True),
    ],
    ids=str,
)
def test_every_option_learns_on_a_gpu(fields):
    "Forty steps on 64 images bring the training loss below a chance answer's, ln 10."
    data = images(n=64, device="cuda")
    model = net("resnet-20", 0.5).cuda()
    result = train(model, data, recipe(max_epochs=40, schedule="constant", milestones=(), **fields))
    assert result.diverged is None and evaluate(model, data, "train")[0] < math.log(10) / 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv-2", "resnet-20"])
@pytest.mark.parametrize("method", ["Edge-Popup", "EP+Recycle", "Biprop", "Biprop+IteRand, authors", "EP+hybrid"])
def test_a_graphed_search_is_the_eager_search_to_the_bit(name, method):
    from lth_companion.methods.supermasks import search
    from lth_companion.papers.weight_recycling import settings_of

    data = images(n=320, device="cuda")

    def one(graph):
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            r = recipe(
                lr=0.1,
                max_epochs=3,
                schedule="cosine",
                milestones=(),
                batch_size=64,
                augment="crop-flip",
                memory_format="channels_last",
                graph=graph,
            )
            result, work = search(net(name, 0.25).cuda(), data, r, settings_of(method, 0.3, 3, frequency=1))
        return result.losses, {
            **{f"{n} scores": s.detach() for n, s in work.scores.items()},
            **work.frozen,
            **{f"{n} mask": m for n, m in work.put().items()},
        }

    (a, eager), (b, again), (c, graphed) = one(False), one(False), one(True)
    assert a == b and all(torch.equal(t, again[n]) for n, t in eager.items()), (
        "two eager searches differ: this device is not deterministic here"
    )
    assert a == c and all(torch.equal(t, graphed[n]) for n, t in eager.items())
