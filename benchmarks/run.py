"""Ratios, each against a base measured in the same run, variants in turn; medians with the spread of paired ratios.

python benchmarks/run.py [NAME ...] [--quick] [--json FILE]     (make bench: all)
A whole run is added to benchmarks/results/<machine>.json; a partial or a quick one is only compared with what stands
there (history.py has the rule: WORSE marks a ratio that worsened by more than its spread). Exit code 1 if a ratio
misses its bound. One thread; the machine should be otherwise idle.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
import argparse
import collections
import copy
import json
import math
import pathlib
import statistics
import sys
import time

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
from lth_companion.lab.execution import cores
from lth_companion.lab.provenance import code_version, machine
from lth_companion.methods import dynamic, supermasks
from lth_companion.methods.imp import cut
from lth_companion.methods.pruning import prune
from lth_companion.papers.learning_to_learn import make_ticket, thesis
from lth_companion.selection import _threshold, keep_top
from lth_companion.tickets import Ticket, generator, prunable
from lth_companion.training import data as datasets
from lth_companion.training import sources
from lth_companion.training.cohorts import engine, train_cohort
from lth_companion.training.loop import optimizer, step, train
from lth_companion.training.models import create
from lth_companion.training.recipe import Recipe

sys.path.insert(0, os.path.dirname(__file__))
import history
import sweeps

Row = collections.namedtuple("Row", "name what value low high bound lower holds detail")
ROWS, PAST = [], []


class Ratio(float):
    "The median of what was found, with its spread: the range, or what is given."

    def __new__(cls, found, value=None, spread=None):
        self = super().__new__(cls, statistics.median(found) if value is None else value)
        self.spread, self.n = spread or (min(found), max(found)), len(found)
        return self


def note(name, what, value, bound, low=False, detail=""):
    "Keep and print one row; `low`: the bound is a lower one."
    holds, (a, b) = value >= bound if low else value <= bound, getattr(value, "spread", (value, value))
    worse, was = history.worsened((value, a, b), [r["rows"][name] for r in PAST if name in r["rows"]], not low)
    ROWS.append(Row(name, what, float(value), float(a), float(b), bound, low, bool(holds), detail))
    spread = f" [{a:.3f}, {b:.3f}] of {value.n}" if isinstance(value, Ratio) else ""
    print(
        f"{'ok  ' if holds else 'MISS'} {f'WORSE than {was:.3f} ' if worse else ''}{name:34s} {value:8.3f}{spread}"
        f" (bound {'>=' if low else '<='} {bound:g})  {what}{'; ' + detail if detail else ''}",
        flush=True,
    )
    if worse:
        WORSE.append(name)


WORSE, RESULTS = [], pathlib.Path(__file__).parent / "results"


def seconds(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


def paired(a, b, rounds):
    "The ratios time(a)/time(b), run in turn; one warm-up each."
    a(), b()
    ratios, base = [], []
    for _ in range(rounds):
        x, y = seconds(a), seconds(b)
        ratios.append(x / y)
        base.append(y)
    return Ratio(ratios), f"base {statistics.median(base) * 1000:.1f} ms"


def interleaved(a, b, pairs):
    """The ratios time(a)/time(b) of pairs run in turn, each first in every second pair, and the upper end of the
    bootstrap's 95 % interval of their median.
    """
    a(), b()
    ratios = np.array([seconds(a) / seconds(b) if i % 2 else 1 / (seconds(b) / seconds(a)) for i in range(pairs)])
    low, high = np.quantile(
        np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1), (0.025, 0.975)
    )
    return ratios, Ratio(ratios, high, (low, high))


class Count(TorchDispatchMode):
    "Counts ATen operations that do something (views and detach are free)."

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += f.overloadpacket._qualified_op_name not in ("aten::detach", "aten::view", "aten::t")
        return f(*args, **(kwargs or {}))


def lenet(seed=0):
    return create("lenet-300-100", generator=generator(seed, "init"))


def ops(quick):
    "A masked step against the dense one, in ATen operations and in time; what is pruned stays 0."
    x, y = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))

    def setup(masked):
        net = lenet()
        masks = (
            {n: (torch.rand(w.shape, generator=generator(0, n)) < 0.05).float() for n, w in prunable(net).items()}
            if masked
            else None
        )
        if masked:
            Ticket.of(net, masks).apply(net)
        opt = optimizer(net, Recipe(momentum=0.9, weight_decay=5e-4))
        args = (list(prunable(net).values()), list(masks.values())) if masked else ()
        step(net, opt, x, y, *args)
        return net, opt, args, masks

    counts = []
    for masked in (False, True):
        net, opt, args, _ = setup(masked)
        with Count() as c:
            step(net, opt, x, y, *args)
        counts.append(c.n)
    note(
        "masked-step-operations",
        f"extra ATen operations of a masked LeNet-300-100 step ({counts[0]} dense)",
        counts[1] - counts[0],
        3,
    )
    net, opt, args, masks = setup(True)
    for _ in range(100):
        step(net, opt, x, y, *args)
    worst = max(
        max(
            float(w.detach()[masks[n] == 0].abs().max()),
            float(opt.state[w]["momentum_buffer"][masks[n] == 0].abs().max()),
        )
        for n, w in prunable(net).items()
    )
    note("pruned-stays-zero", "largest pruned weight or momentum after 100 steps with momentum and decay", worst, 0)
    (a, ao, aa, _), (b, bo, *_) = setup(True), setup(False)
    ratio, detail = paired(
        lambda: [step(a, ao, x, y, *aa) for _ in range(30)],
        lambda: [step(b, bo, x, y) for _ in range(30)],
        5 if quick else 15,
    )
    note("masked-step-time", "time of a masked step over a dense one", ratio, 1.25, detail=detail)


def selection(quick):
    "The threshold of 11 M scores, and all of keep_top, against torch.kthvalue."
    n = 11_200_000
    scores, k = torch.rand(n, generator=generator(0, "scores")), 560_000
    want = float(scores.kthvalue(n - k + 1).values)
    assert _threshold([scores], k)[0] == want
    rounds = 3 if quick else 7

    def base():
        return scores.kthvalue(n - k + 1)

    ratio, detail = paired(lambda: _threshold([scores], k), base, rounds)
    note(
        "threshold-of-11M",
        "finding the k-th largest of 11.2 M float32, over torch.kthvalue",
        ratio,
        0.15,
        detail=detail,
    )
    layers = dict(
        zip(
            "abcdefgh",
            scores.split(
                [
                    64 * 27,
                    36864,
                    589824,
                    2359296,
                    2359296,
                    1179648,
                    2359296,
                    n - 64 * 27 - 36864 - 589824 - 3 * 2359296 - 1179648,
                ]
            ),
        )
    )
    ratio, detail = paired(lambda: keep_top(layers, 0.05), base, rounds)
    note("keep_top-of-11M", "keep_top of 11.2 M scores in eight layers, over torch.kthvalue", ratio, 0.4, detail=detail)


def straightforward_synflow(net, density, rounds, shape):
    """SynFlow as it is usually written: each round makes the weights absolute, multiplies masks in, scores,
    restores, sorts.
    """
    net, masks = copy.deepcopy(net).eval(), {n: torch.ones_like(p) for n, p in prunable(net).items()}
    for e in range(1, rounds + 1):
        signs = {n: t.sign() for n, t in net.state_dict().items() if t.is_floating_point()}
        with torch.no_grad():
            for t in net.state_dict().values():
                t.abs_()
        net.zero_grad()
        kept = {n: p.detach().clone() for n, p in prunable(net).items()}
        with torch.no_grad():
            for n, p in prunable(net).items():
                p.mul_(masks[n])
        net(torch.ones(1, *shape)).sum().backward()
        scores = {n: (p.grad * p).detach().abs() for n, p in prunable(net).items()}
        with torch.no_grad():
            for n, p in prunable(net).items():
                p.copy_(kept[n])
            for n, t in net.state_dict().items():
                if n in signs:
                    t.mul_(signs[n])
        flat = torch.cat([s.flatten() for s in scores.values()])
        k = round((1 - density ** (e / rounds)) * flat.numel())
        if k >= 1:
            threshold, _ = torch.kthvalue(flat, k)
            masks = {n: torch.where(s <= threshold, torch.zeros(()), torch.ones(())) for n, s in scores.items()}
    return masks


def synflow(quick):
    "SynFlow with 100 rounds against the straightforward implementation above; nearly the same masks."
    net, batch = lenet(), [(torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long))]
    ours, theirs = prune(net, "synflow", 0.05, batch, rounds=100), straightforward_synflow(net, 0.05, 100, (1, 28, 28))
    differ = sum(int((ours[n] != theirs[n]).sum()) for n in ours)
    ratio, detail = paired(
        lambda: prune(net, "synflow", 0.05, batch, rounds=100),
        lambda: straightforward_synflow(net, 0.05, 100, (1, 28, 28)),
        3 if quick else 5,
    )
    note(
        "synflow-100-rounds",
        "SynFlow with 100 rounds on LeNet-300-100 over the straightforward one",
        ratio,
        0.5,
        detail=f"{differ} of 266,200 mask entries differ; {detail}",
    )


def cohort(quick):
    "The 16 tickets of one real laptop seed at 0.005, as the sweep groups them, against the dense masked loop."
    try:
        data = datasets.load("mnist")
    except datasets.DataError as e:
        sys.exit(f"benchmarks: {e}")
    methods = [
        "snip",
        "synflow",
        "random>synflow",
        "once(snip)>synflow",
        "once(random)>synflow",
        "snip>synflow",
        "synflow>snip",
        "magnitude>snip",
        "grasp>magnitude",
        "magnitude>grasp",
        "grasp>synflow",
        "synflow>grasp",
        "magnitude",
        "grasp",
        "random",
        "snip>snip",
    ]
    tickets = [make_ticket(thesis(f"standard {m} U-MS", 0.005, seed=100))[0] for m in methods]
    assert len({t.digest for t in tickets}) == 16 and {engine(t) for t in tickets} == {"sparse"}
    recipe, images = Recipe(max_epochs=1, patience=None), len(data.train_y)

    def dense_loop():  # one network after another; two stand for sixteen, all steps cost the same
        for t in tickets[:2]:
            net = lenet()
            train(t.apply(net), data, recipe, t.masks)

    rounds = 1 if quick else 3
    train_cohort(tickets[:1], data, recipe), dense_loop()
    ratios, rates = [], []
    for _ in range(rounds):
        a, b = seconds(lambda: train_cohort(tickets, data, recipe)), seconds(dense_loop)
        ratios.append((16 * images / a) / (2 * images / b))
        rates.append((16 * images / a, 2 * images / b))
    fast, slow = (statistics.median(r) for r in zip(*rates))
    note(
        "cohort-of-16",
        "network-images/s of 16 tickets at density 0.005 over the dense masked loop",
        Ratio(ratios),
        3,
        low=True,
        detail=f"{fast:,.0f} against {slow:,.0f}",
    )
    alone = [images / seconds(lambda: train_cohort(tickets[1:2], data, recipe)) for _ in range(rounds)]
    note(
        "ticket-alone",
        "the same engine with one ticket, over the dense masked loop",
        Ratio([a / slow for a in alone]),
        3,
        low=True,
        detail=f"{statistics.median(alone):,.0f} images/s",
    )


def crossing(quick):
    "Where the sparse loop and the dense masked step cross, for the choice in cohorts.SPARSE_BELOW."
    data = datasets.load("mnist", train_size=12_800)
    net, recipe = lenet(), Recipe(max_epochs=1, patience=None)
    batch = data.scoring_batches(100, generator(0, "batch"))
    for density in (0.05, 0.1, 0.2, 0.3):
        t = Ticket.of(net, prune(net, "snip", density, batch))
        ratio, detail = paired(
            lambda t=t: train_cohort([t], data, recipe, force_engine="sparse"),
            lambda t=t: train_cohort([t], data, recipe, force_engine="dense"),
            1 if quick else 3,
        )
        note(
            f"sparse-over-dense-{density:g}",
            f"time of the sparse engine over the dense one at density {density:g}",
            ratio,
            1.5 if density <= 0.2 else 99,
            detail=detail,
        )


def loader(quick):
    """Crop, flip and normalise batches of resident uint8 images against torchvision's usual pipeline, one process,
    one thread.
    """
    torchvision = sources.import_torchvision()
    from PIL import Image

    known, n, size = sources.facts("cifar10"), 2560, 128
    x, y = (
        torch.randint(256, (n, *known.shape), dtype=torch.uint8, generator=generator(0, "images")),
        torch.arange(n) % 10,
    )
    data = datasets.Data("random", "random", "", 10, x, y, x[:0], y[:0], x[:0], y[:0], known.mean, known.std)
    t = torchvision.transforms
    steps = t.Compose(
        [t.RandomCrop(32, padding=4), t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize(known.mean, known.std)]
    )
    arrays, labels = x.permute(0, 2, 3, 1).contiguous().numpy(), y.tolist()

    class Usual(torch.utils.data.Dataset):  # as torchvision.datasets.CIFAR10 does it
        def __len__(self):
            return n

        def __getitem__(self, i):
            return steps(Image.fromarray(arrays[i])), labels[i]

    order = generator(0, "order")
    usual = torch.utils.data.DataLoader(Usual(), batch_size=size, shuffle=True, generator=order)

    def theirs():
        for _ in usual:
            pass

    def ours():
        for part in torch.randperm(n, generator=order).split(size):
            data.batch(x, y, part, "crop-flip", order)

    got, want = data.batch(x, y, torch.arange(size)), t.Compose(steps.transforms[2:])  # without the random steps: equal
    assert torch.allclose(got[0], torch.stack([want(Image.fromarray(a)) for a in arrays[:size]]), atol=1e-5)
    ratio, detail = paired(theirs, ours, 3 if quick else 9)
    note(
        "loader-ratio",
        f"images/s of {n:,} random 32x32 images in batches of {size}, cropped and flipped, over torchvision's PIL"
        " pipeline",
        ratio,
        15,
        low=True,
        detail=detail,
    )


def resnet(quick):
    """A masked ResNet-20 step against the dense one where operations cost more than arithmetic: 8x8 images, a
    quarter of the width, batches of 8.
    """
    x, y = torch.randn(8, 3, 8, 8, generator=generator(0, "x")), torch.arange(8)

    def setup(masked):
        net = create("resnet-20", (3, 32, 32), 10, generator(0, "init"), width=0.25)
        masks = cut(prunable(net), 0.1) if masked else None
        if masked:
            Ticket.of(net, masks).apply(net)
        opt, args = (
            optimizer(net, Recipe(momentum=0.9, weight_decay=5e-4)),
            ((list(prunable(net).values()), list(masks.values())) if masked else ()),
        )
        step(net, opt, x, y, *args)
        with Count() as c:
            step(net, opt, x, y, *args)
        return (lambda: [step(net, opt, x, y, *args) for _ in range(5)]), c.n

    (a, more), (b, base) = setup(True), setup(False)
    ratios, upper = interleaved(a, b, 50 if quick else 200)
    note("resnet-20-operations", f"extra ATen operations of a masked ResNet-20 step ({base} dense)", more - base, 3)
    note(
        "resnet-20-masked-step",
        "time of a masked ResNet-20 step over a dense one: upper end of the 95 % interval of the median",
        upper,
        1.03,
        detail=f"median {np.median(ratios):.3f} of {len(ratios)} interleaved pairs",
    )


def sorted_event(weights, momenta, masks, grads, density, rate):
    """Prune, drop and grow as public implementations do: a full sort of the network's magnitudes, then two of every
    layer; masks, weights and momentum in place.
    """
    flat = torch.cat([w.abs().flatten() for w in weights])
    threshold = flat.sort().values[flat.numel() - int(density * flat.numel())]
    for w, v, m, g in zip(weights, momenta, masks, grads):
        m.copy_(w.abs() >= threshold)
        w.mul_(m)
        kept = int(m.sum())
        gone = math.ceil(rate * kept)
        order = w.abs().flatten().sort().indices
        m.view(-1)[order[: m.numel() - kept + gone]] = 0
        w.mul_(m)
        v.mul_(m)
        order = (g.abs() * (m == 0)).flatten().sort(descending=True).indices
        m.view(-1)[order[:gone]] = 1


def dynamic_update(quick):
    """One GraNet event, reading the gradients included, on ResNet-18 (11.2 M weights) in the middle of its
    schedule, against full sorts.
    """
    net, s = (
        create("resnet-18", generator=generator(0, "init"), shape=(3, 32, 32)),
        dynamic.settings("GraNet (s_i=0)", 0.1, 100),
    )
    work, weights, opt = dynamic.DropGrow(s), list(prunable(net).values()), optimizer(net, Recipe(momentum=0.9))
    clock, at = dynamic.Clock(s, 5000), 1000
    masks = list(keep_top({n: w.detach().abs() for n, w in prunable(net).items()}, clock.density(at - 100)).values())
    g = generator(0, "gradients")
    for w, m in zip(weights, masks):
        w.data.mul_(m)
        w.grad = torch.randn(w.shape, generator=g)
        opt.state[w]["momentum_buffer"] = torch.randn(w.shape, generator=g) * m
    work.attach(list(prunable(net)), weights, masks, opt, 5000)
    momenta, grads = [opt.state[w]["momentum_buffer"] for w in weights], [w.grad for w in weights]
    start = [t.detach().clone() for t in (*weights, *momenta, *masks)]

    def anew():
        with torch.no_grad():
            for t, was in zip((*weights, *momenta, *masks), start):
                t.copy_(was)
        work.done = at - 1

    def ours():
        work.observe()
        assert work.update(at)

    @torch.no_grad()
    def theirs():
        sorted_event([w.data for w in weights], momenta, masks, grads, clock.density(at), clock.drop(at))

    found = []
    for event in (ours, theirs):  # also the warm-up: nearly the same masks
        anew()
        event()
        found.append([m.clone() for m in masks])
    differ, n = sum(int((a != b).sum()) for a, b in zip(*found)), sum(m.numel() for m in masks)
    ratios, base = [], []
    for _ in range(5 if quick else 15):
        anew()
        x = seconds(ours)
        anew()
        y = seconds(theirs)
        ratios.append(x / y)
        base.append(y)
    note(
        "dynamic-update",
        f"a GraNet event of {n:,} weights over one by full sorts",
        Ratio(ratios),
        0.25,
        detail=f"{differ} mask entries differ; base {statistics.median(base) * 1000:.0f} ms",
    )


def dynamic_training(quick):
    """100 steps with one GraNet event in them against 100 steps with static masks: LeNet-300-100, batches of 128
    (the laptop tier's).
    """
    pairs = 50 if quick else 100
    x, y = torch.randn(128, 1, 28, 28, generator=generator(0, "x")), torch.arange(128) % 10
    s = dynamic.settings("GraNet (s_i=0.5)", 0.05, 100, end=1.0)

    def setup(changing):
        net = lenet()
        masks, opt = (
            dynamic.initial_masks(net, s),
            optimizer(net, Recipe(lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)),
        )
        Ticket.of(net, masks).apply(net)
        weights, masks, work, t = list(prunable(net).values()), list(masks.values()), dynamic.DropGrow(s), 0
        if changing:
            work.attach(list(prunable(net)), weights, masks, opt, 100 * (pairs + 2))

        def stretch():
            nonlocal t
            for _ in range(100):
                step(net, opt, x, y, weights, masks, on_gradient=work.observe if changing else None)
                t += 1
                if changing:
                    work.update(t)

        return stretch, work

    (a, work), (b, _) = setup(True), setup(False)
    ratios, upper = interleaved(a, b, pairs)
    assert len(work.history) == pairs + 1
    note(
        "dynamic-training",
        "time of 100 steps of LeNet-300-100 with one event over 100 with static masks: upper end of the 95 % interval"
        " of the median",
        upper,
        1.05,
        detail=f"median {np.median(ratios):.3f} of {pairs} interleaved pairs",
    )


def conv6(changing):
    """A function that makes one training step of Conv-6 on a batch (x, y): of the scores of half of it
    (Edge-Popup), or of its weights.
    """
    net, recipe = create("conv-6", (3, 32, 32), 10, generator(0, "init")), Recipe(momentum=0.9, weight_decay=1e-4)
    if changing:
        work = supermasks.Search(net, supermasks.Supermask(density=0.5), recipe)
        return work.step, work
    opt = optimizer(net, recipe)
    return (lambda x, y: step(net, opt, x, y)), net


def batch_of(n):
    return torch.randn(n, 3, 32, 32, generator=generator(0, "x")), torch.arange(n) % 10


def supermask_step(quick):
    "An Edge-Popup step of Conv-6 (2.26 M weights) against the dense step, both with momentum and decay, batches of 32."
    (ours, _), (dense, _), (x, y) = conv6(True), conv6(False), batch_of(32)
    ratios, upper = interleaved(lambda: ours(x, y), lambda: dense(x, y), 30 if quick else 100)
    note(
        "supermask-step",
        "time of an Edge-Popup step of Conv-6 over a dense one, batches of 32: upper end of the 95 % interval of the"
        " median",
        upper,
        1.10,
        detail=f"median {np.median(ratios):.3f} of {len(ratios)} interleaved pairs",
    )


def sorted_masks(scores, density):
    """Masks of the largest |s| of each layer as public implementations make them: a full sort, zeros and ones
    written through it.
    """
    masks = {}
    for n, s in scores.items():
        order, out = s.detach().abs().flatten().sort().indices, torch.empty(s.numel())
        cut = s.numel() - round(density * s.numel())
        out[order[:cut]], out[order[cut:]] = 0, 1
        masks[n] = out.view(s.shape)
    return masks


def supermask_selection(quick):
    """Selection of half, and of a tenth, of the scores of Conv-6 against full sorts by layer; its share of a step
    at batch 128.
    """
    step_, work = conv6(True)
    n, rounds = sum(s.numel() for s in work.scores.values()), 5 if quick else 15
    for density in (0.5, 0.1):
        a, b = supermasks.top_scores(work.scores, density), sorted_masks(work.scores, density)
        differ = sum(int((a[k] != b[k]).sum()) for k in a)  # tied scores alone
        assert all(a[k].sum() == b[k].sum() for k in a) and differ < n / 1000
        ratio, detail = paired(
            lambda density=density: supermasks.top_scores(work.scores, density),
            lambda density=density: sorted_masks(work.scores, density),
            rounds,
        )
        note(
            f"supermask-selection-{density:g}",
            f"selecting {density:g} of {n:,} scores over full sorts by layer",
            ratio,
            0.10,
            detail=f"{differ} mask entries differ; {detail}",
        )
    x, y = batch_of(128)
    share, detail = paired(lambda: supermasks.top_scores(work.scores, 0.5), lambda: step_(x, y), 3 if quick else 15)
    note(
        "supermask-selection-share",
        "selection's share of an Edge-Popup step of Conv-6, batches of 128",
        share,
        0.05,
        detail=detail,
    )


def imp(quick):
    "What a level of IMP costs beyond its training: the cut, the rewinding, R_p and its chance, the files."
    import tempfile

    from lth_companion.lab.store import Store
    from lth_companion.lab.sweeps import run
    from lth_companion.papers import weight_correlation as branches
    from lth_companion.papers import weight_correlation_settings

    trained, plain = [], branches.fit

    def timed(*args, **kw):
        t = time.perf_counter()
        out = plain(*args, **kw)
        trained.append(time.perf_counter() - t)
        return out

    s = weight_correlation_settings.correlation_settings("laptop")["LeNet on MNIST"]
    branches.fit = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            store, shares = Store(folder), []
            run([weight_correlation_settings.branch_trial(s, "dense", 0, 0.1, 0)], store, progress="silent")
            for level in range(1, 3 if quick else 6):
                trial = [weight_correlation_settings.branch_trial(s, "WT", level, 0.1, 0)]
                total = seconds(lambda trial=trial: run(trial, store, progress="silent"))
                shares.append(1 - trained[-1] / total)
    finally:
        branches.fit = plain
    note(
        "imp-level-overhead",
        "share of a level of IMP (LeNet-300-100 on 20,000 images, 15 epochs) that is not training",
        Ratio(shares),
        0.02,
        detail=f"levels of {statistics.median(trained):.1f} s",
    )


def overhead(quick):
    sweeps.overhead(note, Ratio, quick)


def store(quick):
    sweeps.store(note, Ratio, quick)


def scaling(quick):
    sweeps.scaling(note, Ratio, quick)


SUITE = {
    f.__name__.replace("_", "-"): f
    for f in (
        ops,
        selection,
        synflow,
        cohort,
        crossing,
        loader,
        resnet,
        dynamic_update,
        dynamic_training,
        supermask_step,
        supermask_selection,
        imp,
        overhead,
        store,
        scaling,
    )
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SUITE, []], help=f"of {', '.join(SUITE)}; none: all")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller sizes")
    parser.add_argument("--json", help="also write the rows here")
    args = parser.parse_args(argv)
    here, code = machine(), code_version(pathlib.Path(__file__).parent.parent)
    here |= {"cores": cores(), "torch": torch.__version__}
    path, load = history.machine_file(RESULTS, here["cpu"], here["cores"], torch.__version__), os.getloadavg()[0]
    PAST.extend(history.read(path))
    print(
        f"{here['cpu']}, {here['cores']} cores, {here['capability']}, torch {torch.__version__}, one thread;"
        f" {len(PAST)} earlier runs; load"
        f" {load:.1f}{'' if load < 0.5 else ': this machine is busy, which moves the ratios'}",
        flush=True,
    )
    for name in args.names or SUITE:
        SUITE[name](args.quick)
    rows = {r.name: [float(f"{x:.4g}") for x in (r.value, r.low, r.high)] for r in ROWS}
    if args.json:
        pathlib.Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(args.json).write_text(
            json.dumps({"machine": here, "rows": [r._asdict() for r in ROWS]}, indent=1) + "\n"
        )
    if args.names or args.quick:
        print(f"not a whole run: {path.name} stays as it is")
    else:
        history.keep(
            path,
            here,
            {
                "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
                "commit": f"{(code['commit'] or '')[:12]}{'+' * bool(code['modified'])}",
                "load": round(load, 2),
                "rows": rows,
            },
        )
        print(f"added to {path}")
    if WORSE:
        print(f"worse than before by more than the spread: {', '.join(WORSE)}")
    missed = [r.name for r in ROWS if not r.holds]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}; run again on an idle machine")


if __name__ == "__main__":
    main()
