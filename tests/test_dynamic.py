"""Drop and grow against a reference written from the papers, its invariants after every update, and trainings that
go on after a kill.
"""

import json
import math
import os
import pathlib
import signal
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from common import same_training, sentence
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn

from lth_companion.methods import dynamic
from lth_companion.methods.dynamic import (
    METHODS,
    Clock,
    DropGrow,
    Dynamic,
    DynamicError,
    images_until,
    initial_counts,
    initial_masks,
    segments,
    settings,
    sparse_train,
)
from lth_companion.selection import SelectionError, apportion
from lth_companion.tickets import generator, prunable
from lth_companion.training import data as datasets
from lth_companion.training.loop import optimizer, step, train
from lth_companion.training.models import create, initialise
from lth_companion.training.recipe import Recipe

SGD = Recipe(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, batch_size=8, max_epochs=1, patience=None)


class ConvBN(nn.Module):
    "Two convolutions with BatchNorm, the second strided, and a linear layer."

    def __init__(self, channels=1):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = (
            nn.Conv2d(channels, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 12, 3, 2, 1, bias=False),
            nn.BatchNorm2d(12),
        )
        self.fc = nn.Linear(12, 10)

    def forward(self, x):
        return self.fc(self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu().mean((2, 3)))


def network(name, seed=0):
    g = generator(seed, "init")
    if name == "conv-bn":
        return initialise(ConvBN(), g)
    return (
        create("lenet-300-100", (1, 12, 12), 10, g, width=0.1)
        if name == "mlp"
        else create("resnet-20", (3, 8, 8), 10, g, width=0.25)
    )


def images(name, t):
    "Eight images with their classes for step t; a border of zeros, so that many gradients tie at exactly 0."
    g, shape = generator(t, "images"), {"mlp": (1, 12, 12), "conv-bn": (1, 8, 8), "resnet-20": (3, 8, 8)}[name]
    x = torch.randn(8, *shape, generator=g)
    x[..., :2, :] = 0
    return x, torch.randint(10, (8,), generator=g)


# --- the reference: numpy and loops, nothing of the library


def solve(raw, size, total):
    "Shares in proportion to raw * size, none above its size, that sum to `total`: fractions, exact."
    raw = {n: Fraction(r) for n, r in raw.items()}
    full = set()
    while len(full) < len(raw):
        scale = (Fraction(total) - sum(size[n] for n in full)) / sum(raw[n] * size[n] for n in raw if n not in full)
        more = {n for n in raw if n not in full and scale * raw[n] > 1}
        if not more:
            break
        full |= more
    return {n: Fraction(size[n]) if n in full else scale * raw[n] * size[n] for n in raw}


def whole(shares, room, total):
    """Whole numbers near the shares scaled to `total`: rounded down, the largest fractions up, none above its room;
    layers without a share come last.
    """
    some = {n: s for n, s in shares.items() if s > 0 and room[n]}
    part = (
        solve({n: Fraction(s) / room[n] for n, s in some.items()}, room, min(total, sum(room[n] for n in some)))
        if some
        else {}
    )
    got = {n: math.floor(part.get(n, 0)) for n in room}
    order = sorted(part, key=lambda n: got[n] - part[n])
    for n in order[: min(total, sum(room[n] for n in some)) - sum(got.values())]:
        got[n] += 1
    for n in room:
        more = min(room[n] - got[n], total - sum(got.values()))
        got[n] += more
    return got


def erdos_renyi_kernel(shapes, density):
    """Counts by layer: densities as the sum of a layer's dimensions over their product, layers above 1 dense,
    round(density * N) in all.
    """
    size = {n: math.prod(s) for n, s in shapes.items()}
    shares = solve(
        {n: Fraction(sum(s), math.prod(s)) for n, s in shapes.items()}, size, Fraction(density) * sum(size.values())
    )
    return whole(shares, size, round(density * sum(size.values())))


def best(score, among, k):
    "Flat positions of the k largest scores among some positions; of equal ones the first."
    places = np.flatnonzero(among)
    return places[np.argsort(-score[places], kind="stable")[:k]]


def cosine(high, low, p):
    return low + (high - low) * (1 + math.cos(math.pi * p)) / 2


PAPER = {  # start density (None: the final one), drop rate at a fraction of training, growth
    "SET": (None, lambda p: 0.3, "random"),
    "RigL": (None, lambda p: cosine(0.3, 0, p / 0.75) if p < 0.75 else 0, "gradient"),
    "RigL-ITOP": (None, lambda p: cosine(0.5, 0.005, p), "gradient"),
    "SNFS": (None, lambda p: cosine(0.5, 0, p), "average"),
    "GMP": (1.0, lambda p: 0, None),
    "GraNet (s_i=0)": (1.0, lambda p: cosine(0.5, 0.005, p), "gradient"),
    "GraNet (s_i=0.5)": (0.5, lambda p: cosine(0.5, 0.005, p), "gradient"),
}


class Plain:
    "SGD and drop-and-grow from the papers' words, on its own flat float64 weights, momentum and masks."

    def __init__(self, method, density, interval, total, weights, masks, seed, rule="zero"):
        self.method, self.density, self.interval, self.total, self.seed, self.rule = (
            method,
            density,
            interval,
            total,
            seed,
            rule,
        )
        self.w = {n: (w * masks[n]).numpy().reshape(-1).copy() for n, w in weights.items()}
        self.m = {n: m.numpy().reshape(-1) == 1 for n, m in masks.items()}
        self.v, self.average = {}, {n: np.zeros_like(w) for n, w in self.w.items()}
        self.last = math.floor(0.5 * total / interval)

    def step(self, t, gradients, draw):
        for n, g in gradients.items():
            g = g.numpy().reshape(-1)
            self.average[n] = 0.9 * self.average[n] + g
            own = np.where(self.m[n], g, 0) + 5e-4 * self.w[n]
            self.v[n] = 0.9 * self.v[n] + own if n in self.v else own.copy()
            self.w[n] = self.w[n] - 0.05 * (own + 0.9 * self.v[n])
        if t % self.interval == 0 and t < self.total:
            self.event(t, {n: np.abs(g.numpy().reshape(-1)) for n, g in gradients.items()}, draw)

    def event(self, t, gradients, draw):
        start, rate, growth = PAPER[self.method]
        j, p = t // self.interval, t / self.total
        if start and j <= self.last:  # prune by magnitude over the network
            d = self.density + (start - self.density) * (1 - j / self.last) ** 3
            size, active = np.concatenate([abs(w) for w in self.w.values()]), np.concatenate(list(self.m.values()))
            kept = np.zeros_like(active)
            kept[best(size, active, round(d * len(active)))] = True
            self.m = dict(zip(self.m, np.split(kept, np.cumsum([len(m) for m in self.m.values()])[:-1])))
        pruned, dropped = {n: m.copy() for n, m in self.m.items()}, {}
        for n, m in self.m.items():  # drop the smallest of each layer
            count = int(m.sum())
            gone = 0 if m.all() else math.ceil(round(rate(p) * count, 9))
            stay = np.zeros_like(m)
            stay[best(abs(self.w[n]), m, count - gone)] = True
            self.m[n], dropped[n] = stay, gone
        alive = {n: m.copy() for n, m in self.m.items()}
        if growth == "average":  # what was freed goes where the average gradients are
            means = {n: float(abs(self.average[n])[m].mean()) if m.any() else 0.0 for n, m in self.m.items()}
            share = whole(means, {n: int((~m).sum()) for n, m in self.m.items()}, sum(dropped.values()))
        else:
            share = dropped
        for n, m in self.m.items():
            if not share[n]:
                continue
            score = (
                gradients[n]
                if growth == "gradient"
                else abs(self.average[n])
                if growth == "average"
                else draw(t, n, len(m))
            )
            m[best(score, ~m, share[n])] = True
        if self.rule == "authors":  # masked after pruning and after growth, not between drop and growth
            alive = {n: m & pruned[n] for n, m in self.m.items()}
        for n in self.w:
            self.w[n], self.v[n] = self.w[n] * alive[n], self.v[n] * alive[n]


# --- one training for all: the library's step and DropGrow, in the open


def begin(model, s, total, seed=0, last=False):
    "A `DropGrow` in charge of the model's masks, and its optimizer."
    if last:
        model.to(memory_format=torch.channels_last)
    masks = initial_masks(model, s, seed)
    weights = list(prunable(model).values())
    own = [torch.empty_like(w, requires_grad=False).copy_(m) for w, m in zip(weights, masks.values())]
    with torch.no_grad():
        for w, m in zip(weights, own):
            w.mul_(m)
    work, opt = DropGrow(s, seed), optimizer(model, SGD)
    work.attach(list(masks), weights, own, opt, total)
    return work, opt


def walk(name, s, total, seed=0, last=False, dtype=torch.float32, observe=None, model=None):
    "Trains step by step; yields (t, work, opt, state before the update, whether it was an event)."
    model = (model or network(name, seed)).to(dtype)
    work, opt = begin(model, s, total, seed, last)
    yield 0, work, opt, None, None
    for t in range(1, total + 1):
        x, y = images(name, t)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        grads = {}

        def see(grads=grads):
            grads.update({n: w.grad.detach().clone() for n, w in zip(work.names, work.weights)})
            work.observe()

        step(model, opt, x.to(dtype), y, work.weights, work.masks, on_gradient=see)
        before = [(w.detach().clone(), momentum(opt, w).clone(), m.clone()) for w, m in zip(work.weights, work.masks)]
        yield t, work, opt, (before, grads), work.update(t)


def momentum(opt, w):
    return opt.state[w]["momentum_buffer"]


@pytest.mark.parametrize("density", [0.1, 0.02])
@pytest.mark.parametrize(
    "method, rule",
    [(m, "zero") for m in PAPER] + [(m, "authors") for m in ("RigL-ITOP", "GraNet (s_i=0)", "GraNet (s_i=0.5)")],
)
@pytest.mark.parametrize("name", ["mlp", "conv-bn", "resnet-20"])
def test_masks_equal_the_reference_after_every_update(name, method, rule, density):
    "In float64 the reference's own SGD is the library's to 1e-12; exact zeros, and so ties, agree exactly."
    total, interval = (30, 3) if density == 0.1 else (31, 2)
    plain, events = None, 0
    start = {n: w.detach().double().clone() for n, w in prunable(network(name)).items()}

    def draw(t, n, k):
        return torch.rand(k, generator=generator(0, "grow", t, n)).numpy()

    for t, work, opt, seen, event in walk(
        name,
        settings(method, density, interval, regrown=rule),
        total,
        dtype=torch.float64,
        last=name == "conv-bn" and density == 0.1,
    ):
        if plain is None:
            shapes = {n: tuple(w.shape) for n, w in start.items()}
            counts = (
                {n: math.prod(s) for n, s in shapes.items()}
                if PAPER[method][0] == 1.0
                else erdos_renyi_kernel(shapes, PAPER[method][0] or density)
            )
            assert counts == {n: int(m.sum()) for n, m in zip(work.names, work.masks)}
            plain = Plain(
                method,
                density,
                interval,
                total,
                start,
                {n: m.contiguous().clone() for n, m in zip(work.names, work.masks)},
                0,
                rule,
            )
            continue
        plain.step(t, {n: g.contiguous() for n, g in seen[1].items()}, draw)
        events += event
        for n, w, m in zip(work.names, work.weights, work.masks):
            assert np.array_equal(m.reshape(-1).numpy() == 1, plain.m[n]), (t, n)
            for ours, theirs in ((w.detach(), plain.w[n]), (momentum(opt, w), plain.v[n])):
                ours = ours.reshape(-1).numpy()
                assert np.allclose(ours, theirs, rtol=0, atol=1e-12 * max(1, abs(theirs).max())), (
                    t,
                    n,
                    abs(ours - theirs).max(),
                )
    expected = {"GMP": total // 2 // interval, "RigL": math.ceil(0.75 * total / interval) - 1}.get(
        method, (total - 1) // interval
    )
    assert events == len(work.history) == expected


# --- the authors' code: counts from a trace of their class, made outside this repository (the file says of which
# version, and how)

TRACE = json.loads((pathlib.Path(__file__).parent / "authors_trace.json").read_text())


@pytest.mark.parametrize("case", TRACE["cases"], ids=lambda c: f"{c['method']}-{c['network']}")
def test_the_authors_rule_is_that_of_their_code(case, monkeypatch):
    """By layer and event, the weights kept, those that are not 0, and those with momentum.

    Theirs cuts the number to keep to a whole one and prunes what equals the smallest of those too; with their
    totals in place of the exact ones, nothing is left to differ.
    """
    expected = {e["t"]: {k: e[k] for k in ("kept", "alive", "moving")} for e in case["events"]}
    totals = (sum(e["kept"]) for e in case["events"])
    s, got = settings(case["method"], TRACE["density"], TRACE["interval"], regrown="authors"), {}
    for t, work, opt, _, _ in walk(case["network"], s, TRACE["steps"], dtype=torch.float64):
        if t == 0:
            # the first masks are the same on both sides
            monkeypatch.setattr(dynamic, "count", lambda density, n: next(totals))
        if t in expected:
            parts = dict(kept=work.masks, alive=work.weights, moving=[momentum(opt, w) for w in work.weights])
            got[t] = {k: [int(torch.count_nonzero(x)) for x in part] for k, part in parts.items()}
    assert got == expected


# --- invariants

CASES = {m: dict(method=m) for m in METHODS} | {
    "authors' regrowth": dict(method="GraNet (s_i=0.5)", regrown="authors"),
    "excluded": dict(method="GraNet (s_i=0.5)", exclude_dropped=True),
    "excluded, RigL": dict(method="RigL-ITOP", exclude_dropped=True),
    "excluded, SNFS": dict(method="SNFS", exclude_dropped=True),
    "layer, dense": dict(method="GraNet (s_i=0)", scope="layer"),
    "layer, ERK": dict(method="GraNet (s_i=0.5)", scope="layer"),
    "uniform": dict(method="SET", initial="uniform"),
    "layer, uniform": dict(method="GraNet (s_i=0.5)", initial="uniform", scope="layer"),
    "late and short": dict(method="GraNet (s_i=0)", begin=0.2, end=0.8),
    "authors' schedule": dict(method="GMP", schedule="authors"),
    "random, dense": dict(method="GraNet (s_i=0)", growth="random"),
    "momentum in place": dict(method="RigL-ITOP", growth="momentum"),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("density", [0.3, 0.07])
def test_after_every_update(case, density, last):
    "Counts, zeros and history, recomputed from the masks before and after."
    s, total = settings(density=density, interval=2, **CASES[case]), 25
    n, clock = sum(w.numel() for w in prunable(network("conv-bn")).values()), Clock(s, total)
    count = round(s.start_density * n)
    for t, work, opt, seen, event in walk("conv-bn", s, total, last=last):
        now = [m.clone() for m in work.masks]
        if t == 0:
            assert sum(int(m.sum()) for m in now) == count
            start, ever = now, [m.bool() for m in now]
            continue
        d, had = clock.density(t) if event else None, count
        if d is not None:
            count = round(d * n)
        assert event == clock.is_event(t) and sum(int(m.sum()) for m in now) == count
        for w, m in zip(work.weights, now):
            assert not w.detach()[m == 0].any() and not momentum(opt, w)[m == 0].any()
        if not event:
            continue
        regrown, record = [], work.history[-1]
        ever = [e | m.bool() for e, m in zip(ever, now)]
        for p, m, (was, v, before) in zip(work.weights, now, seen[0]):
            w, u, new, both = p.detach(), momentum(opt, p), (m == 1) & (before == 0), (m == 1) & (before == 1)
            back, stayed = both & (w != was), both & (w == was) & (was != 0)  # dropped and regrown; never touched
            assert not w[new | back].any() and not u[new | back].any()
            assert torch.equal(u[stayed], v[stayed])
            regrown.append(int(back.sum()))
        if s.exclude_dropped or s.growth == "none":
            assert sum(regrown) == 0
        if s.regrown == "authors":
            assert sum(regrown) <= had - count  # what comes back as 0 was pruned, not dropped
        assert record == dict(
            t=t,
            kept=[int(m.sum()) for m in now],
            gone=[int(((m == 0) & (b == 1)).sum()) for m, (_, _, b) in zip(now, seen[0])],
            new=[int(((m == 1) & (b == 0)).sum()) for m, (_, _, b) in zip(now, seen[0])],
            seen=[int(e.sum()) for e in ever],
            first=[int((m * b).sum()) for m, b in zip(now, start)],
        )
    assert count == round((density if s.schedule != "authors" else clock.density((clock.last - 1) * 2)) * n)


def test_under_authors_what_the_drop_took_keeps_value_and_momentum_and_what_the_schedule_pruned_does_not():
    def first_event(regrown):
        for _t, work, opt, seen, event in walk("conv-bn", settings("GraNet (s_i=0.5)", 0.2, 2, regrown=regrown), 20):
            if event:
                return work, opt, seen[0]

    (zero, zo, before), (keep, ko, _) = first_event("zero"), first_event("authors")
    all_sizes = torch.cat([(was.abs() * mask).reshape(-1) for was, _, mask in before])
    # of those that the schedule leaves
    smallest = all_sizes.sort(descending=True).values[round(zero.clock.density(2) * len(all_sizes)) - 1]
    from_drop = from_pruning = 0
    for ours, theirs, (was, v, mask), m, same in zip(zero.weights, keep.weights, before, zero.masks, keep.masks):
        assert torch.equal(m, same)
        w, u, left = ours.detach(), theirs.detach(), was.abs() >= smallest
        back = (m == 1) & (mask == 1) & (w == 0) & (was != 0)
        dropped, pruned = back & left, back & ~left
        assert not momentum(zo, ours)[back].any() and not u[pruned].any() and not momentum(ko, theirs)[pruned].any()
        assert torch.equal(u[dropped], was[dropped]) and torch.equal(momentum(ko, theirs)[dropped], v[dropped])
        assert torch.equal(u[(m == 1) & ~back], w[(m == 1) & ~back])
        from_drop, from_pruning = from_drop + int(dropped.sum()), from_pruning + int(pruned.sum())
    assert from_drop > 5 and from_pruning > 5


@budget(max_examples=40)
@given(
    st.sampled_from(["SET", "RigL-ITOP", "SNFS", "GMP", "GraNet (s_i=0)", "GraNet (s_i=0.5)"]),
    st.sampled_from(["global", "layer"]),
    st.sampled_from(["erk", "uniform"]),
    st.floats(0.01, 0.5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_counts_are_exact_whatever_the_weights_and_gradients(method, scope, initial, density, exclude, tied, seed):
    "Without a network: weights and gradients drawn anew, many of them tied where asked."
    fields = dict(scope=scope, exclude_dropped=exclude and method != "GMP") | (
        dict(initial=initial) if METHODS[method].get("initial") != "dense" else {}
    )
    s, total, g = settings(method, density, 1, **fields), 12, generator(seed, "draws")

    def draw(shape):
        return torch.randn(shape, generator=g).round() if tied else torch.randn(shape, generator=g)

    model = nn.ModuleDict(
        {"a": nn.Linear(31, 17), "b": nn.Conv2d(5, 7, 3), "c": nn.Linear(7, 13), "d": nn.Linear(13, 3)}
    )
    work, opt = begin(model, s, total, seed)
    n = sum(w.numel() for w in work.weights)
    count = round(s.start_density * n)
    for t in range(1, total + 1):
        for w, m in zip(work.weights, work.masks):
            w.data.copy_(draw(w.shape) * m)
            w.grad = draw(w.shape)
        work.observe()
        if work.update(t) and work.clock.density(t) is not None:
            count = round(work.clock.density(t) * n)
        assert sum(int(m.sum()) for m in work.masks) == count, t
    assert count == round(density * n)


def test_layerwise_pruning_keeps_the_exact_total_though_a_layers_share_may_rise():
    """Whole numbers in falling proportions can rise by one in a layer (the Alabama paradox): what it cannot give
    the others must.
    """
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"a": nn.Linear(20, 30), "b": nn.Conv2d(7, 16, 3), "c": nn.Linear(16, 13), "d": nn.Linear(13, 5)}
    )
    n = sum(w.numel() for w in prunable(model).values())
    for k in range(60, 900, 7):
        work, _ = begin(model, settings("GMP", k / n, 1, scope="layer"), 40)
        for t in range(1, 40):
            if work.update(t) and (d := work.clock.density(t)) is not None:
                assert sum(int(m.sum()) for m in work.masks) == round(d * n), (k, t)


@pytest.mark.parametrize("method", ["SET", "RigL", "SNFS"])
def test_a_dense_network_drops_nothing(method):
    for _t, work, _opt, seen, event in walk("conv-bn", settings(method, 1.0, 2), 9):
        assert all(bool(m.all()) for m in work.masks)
        if event:
            assert (
                all(torch.equal(w.detach(), was) for w, (was, _, _) in zip(work.weights, seen[0]))
                and sum(work.history[-1]["gone"]) == 0
            )


def test_excluded_positions_limit_what_a_nearly_dense_layer_drops():
    "Density .9 leaves 10 % free: no more than those can grow, so no more are dropped."
    for t, work, _opt, seen, event in walk(
        "conv-bn", settings("RigL-ITOP", 0.9, 2, initial="uniform", exclude_dropped=True), 7
    ):
        if event:
            for m, (_, _, before), new in zip(work.masks, seen[0], work.history[-1]["new"]):
                kept = int(before.sum())
                assert new == min(math.ceil(work.clock.drop(t) * kept), before.numel() - kept) and int(m.sum()) == kept
                assert t > 2 or new == before.numel() - kept  # at first the free places are the limit


def test_layerwise_pruning_follows_the_proportions_of_the_start():
    for initial, fields in (("erk", dict(method="GraNet (s_i=0.5)")), ("uniform", dict(method="GraNet (s_i=0)"))):
        _, work, *_ = list(walk("resnet-20", settings(density=0.05, interval=3, scope="layer", **fields), 16))[-1]
        shapes = {n: tuple(w.shape) for n, w in zip(work.names, work.weights)}
        want = (
            erdos_renyi_kernel(shapes, 0.05)
            if initial == "erk"
            else {n: 0.05 * math.prod(s) for n, s in shapes.items()}
        )
        assert all(abs(int(m.sum()) - want[n]) <= 1 for n, m in zip(work.names, work.masks))


def test_the_authors_schedule_ends_too_dense_and_the_exact_one_does_not():
    "Six events before half of 26 steps: theirs leaves out the last, and stays at d + (1 - d) / 6^3."

    def final(schedule, method):
        _, work, *_ = list(walk("mlp", settings(method, 0.1, 2, schedule=schedule), 26))[-1]
        return sum(int(m.sum()) for m in work.masks)

    n = sum(w.numel() for w in prunable(network("mlp")).values())
    for method in ("GMP", "GraNet (s_i=0)"):
        assert final("cubic", method) == round(0.1 * n)
        assert final("authors", method) == round((0.1 + 0.9 / 6**3) * n) > 1.04 * round(0.1 * n)


# --- whole numbers in proportion

shares = st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(1e-6, 1e3)), st.integers(0, 50)), min_size=1, max_size=8)


@budget(max_examples=300)
@given(shares, st.floats(0, 1))
def test_apportion_sums_fits_and_stays_within_one(layers, part):
    room = {str(i): r for i, (_, r) in enumerate(layers)}
    total = int(part * sum(room.values()))
    given_ = {str(i): s for i, (s, _) in enumerate(layers)}
    got = apportion(given_, room, total)
    assert list(got) == list(room) and sum(got.values()) == total and all(0 <= got[n] <= room[n] for n in room)
    some = {n: s for n, s in given_.items() if s > 0 and room[n]}
    if not some:
        return
    quota = solve({n: Fraction(s) / room[n] for n, s in some.items()}, room, min(total, sum(room[n] for n in some)))
    assert all(abs(got[n] - quota[n]) < 1 + 1e-6 for n in some)
    if total <= sum(room[n] for n in some):
        assert all(got[n] == 0 for n in room if n not in some)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.data())
def test_apportion_leaves_whole_shares_alone(sizes, data):
    "Shares that are whole numbers within their room already come back as they are."
    room = dict(enumerate(sizes))
    want = {n: data.draw(st.integers(0, r)) for n, r in room.items()}
    assert apportion({n: float(w) for n, w in want.items()}, room, sum(want.values())) == want


def test_apportion_ties_go_to_the_first_and_too_much_is_refused():
    assert apportion({"b": 1.0, "a": 1.0, "c": 1.0}, {"b": 9, "a": 9, "c": 9}, 4) == {"b": 2, "a": 1, "c": 1}
    assert apportion({"a": 2.0, "b": 1.0}, {"a": 10**7, "b": 10**7}, 9_000_001) == {"a": 6_000_001, "b": 3_000_000}
    for total in (-1, 4):
        with pytest.raises(SelectionError, match="ask for fewer") as e:
            apportion({"a": 1.0}, {"a": 3}, total)
        sentence(e)


# --- trainings that go on after a kill

TRAINING = Recipe(
    lr=0.05,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    batch_size=64,
    max_epochs=5,
    patience=None,
    augment="crop-flip",
    schedule="milestones",
    milestones=(2, 4),
)
EVERY = {"GraNet (s_i=0.5)": 5, "SET": 7, "SNFS": 7}  # an epoch of 512 images has 8 steps


def small():
    return datasets.load("digits", train_size=512)


def trained(method, checkpoint=None, **kw):
    model = network("conv-bn")
    result, work = sparse_train(
        model, small(), TRAINING, settings(method, 0.15, EVERY[method]), 3, checkpoint=checkpoint, save_at=(40,), **kw
    )
    return model, result, work


def dies(method, path):
    "In a process of its own: killed in the third of five epochs' ends, before its checkpoint is written."
    torch.set_num_threads(1)
    trained(method, path, on_epoch=lambda model, result: result.epochs == 3 and os.kill(os.getpid(), signal.SIGKILL))


def same(a, b):
    (net, result, work), (net2, result2, work2) = a, b
    same_training((net, result), (net2, result2))
    assert (
        work.history == work2.history
        and all(torch.equal(x, y) for x, y in zip(work.masks, work2.masks))
        and all(torch.equal(x, y) for x, y in zip(work.seen, work2.seen))
    )
    assert result.velocities[40] and all(
        torch.equal(v, result2.velocities[40][n]) for n, v in result.velocities[40].items()
    )


@pytest.mark.parametrize("method", list(EVERY))
def test_a_killed_training_goes_on_and_ends_bit_equal(method, tmp_path, killed):
    path, epochs = killed(method, tmp_path / "c.safetensors"), []
    resumed = trained(method, path, on_epoch=lambda model, result: epochs.append(result.epochs))
    assert epochs == [3, 4, 5]
    peace = trained(method)
    assert len(peace[2].history) >= 5 and not any(tmp_path.glob("*.part"))
    same(resumed, peace)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="starts anew"):
        anew = trained(method, path)
    same(anew, peace)
    with warnings.catch_warnings():  # a finished one has nothing left to train
        warnings.simplefilter("error")
        ready, calls = network("conv-bn"), []
        result, work = sparse_train(
            ready,
            small(),
            TRAINING,
            settings(method, 0.15, EVERY[method]),
            3,
            checkpoint=path,
            on_epoch=lambda *a: calls.append(a),
        )
    assert (
        not calls
        and result.ticket.digest == peace[1].ticket.digest
        and result.accuracies == peace[1].accuracies
        and work.history == peace[2].history
    )


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path, short = tmp_path / "c", TRAINING.model_copy(update=dict(max_epochs=2, schedule="constant", milestones=()))

    def go(recipe=short, s=settings("SET", 0.15, 3), seed=3):
        return sparse_train(network("conv-bn"), small(), recipe, s, seed, checkpoint=path)

    go()
    for change in (
        dict(recipe=short.model_copy(update=dict(lr=0.1))),
        dict(s=settings("SET", 0.15, 4)),
        dict(s=settings("RigL", 0.15, 3)),
        dict(seed=4),
    ):
        with pytest.raises(ValueError, match="another training; remove it") as e:
            go(**change)
        sentence(e)
    with pytest.raises(ValueError, match="another training"):
        train(network("conv-bn"), small(), short, seed=3, checkpoint=path)


@pytest.mark.parametrize("at", [13, 16])
def test_momentum_buffers_make_a_continuation_the_whole_run(at):
    "Static masks, BatchNorm and crops; in the middle of an epoch and at the start of one."
    model = network("conv-bn")
    masks = initial_masks(model, settings("static", 0.3))
    whole_run = train(model, small(), TRAINING, masks, seed=3, save_at=(at, 40))
    half = train(
        whole_run.saved[at].apply(network("conv-bn", 9)),
        small(),
        TRAINING,
        whole_run.saved[at].masks,
        seed=3,
        begin=at,
        velocity=whole_run.velocities[at],
        save_at=(40,),
    )
    assert half.ticket.digest == whole_run.ticket.digest and half.accuracies == whole_run.accuracies[at // 8 :]
    assert all(torch.equal(v, half.velocities[40][n]) for n, v in whole_run.velocities[40].items())
    without = train(
        whole_run.saved[at].apply(network("conv-bn", 9)), small(), TRAINING, whole_run.saved[at].masks, seed=3, begin=at
    )
    assert without.ticket.digest != whole_run.ticket.digest


# --- bad input


@pytest.mark.parametrize(
    "make, mend",
    [
        (lambda: settings("GMP", 9), "above 0 and at most 1"),
        (lambda: settings("GMP", float("nan")), "above 0 and at most 1"),
        (lambda: settings("GMP", 0), "above 0 and at most 1"),
        (lambda: settings("GraNet (s_i=0.5)", 0.1, initial_density=9), "above 0 and at most 1"),
        (lambda: settings("GraNet (s_i=0.5)", 0.8), "start at 0.8 or above"),
        (lambda: settings("GraNet (s_i=0)", 0.1, initial_density=0.5), 'choose initial="erk"'),
        (lambda: settings("RigL", 0.1, initial_density=0.5), 'choose schedule="cubic"'),
        (lambda: settings("GMP", 0.1, begin=0.5, end=0.5), "end later"),
        (lambda: settings("GMP", 0.1, drop="cosine"), "give both or neither"),
        (lambda: settings("RigL", 0.1, growth="none"), "give both or neither"),
        (lambda: settings("RigL", 0.1, share="momentum"), "give both"),
        (lambda: settings("Rigl", 0.1), "it is one of"),
        (lambda: Clock(settings("RigL", 0.1, 100), 100), "below 100"),
        (lambda: Clock(settings("SET", 0.1, 101), 100), "below 100"),
        (lambda: Clock(settings("GMP", 0.1, 100), 150), "at most 37"),
        (lambda: Clock(settings("GMP", 0.1, 40, schedule="authors"), 150), "at most 37"),
    ],
)
def test_bad_settings_are_one_sentence_that_names_the_mend(make, mend):
    with pytest.raises(ValueError) as e:
        make()
    assert mend in sentence(e)


def test_the_interval_that_an_error_names_works():
    for total in (20, 57, 150):
        for begin_, end in ((0.0, 0.5), (0.25, 0.75), (0.5, 0.9)):
            for kind in ("cubic", "authors"):
                s = settings("GMP", 0.1, total - 1, schedule=kind, begin=begin_, end=end)
                with pytest.raises(DynamicError) as e:
                    Clock(s, total)
                Clock(s.model_copy(update=dict(interval=int(sentence(e).split("at most ")[1].rstrip(".")))), total)


def test_fields_out_of_range_and_unknown_ones_are_refused():
    for bad in (
        dict(interval=0),
        dict(drop="constant", growth="random", drop_rate=1.5),
        dict(speed=3),
        dict(drop_end=0.0),
    ):
        with pytest.raises(ValueError):
            Dynamic(density=0.1, **bad)
    s = settings("RigL", 0.1)
    with pytest.raises(ValueError):
        s.density = 0.2
    assert all(settings(m, 0.1, 100).density == 0.1 for m in METHODS)


def test_masked_gradients_and_missing_ones_are_refused():
    """RigL reads the gradients before they are masked; both mistakes are caught at the first event, and nothing has
    changed.
    """
    for late in (True, False):
        model = network("conv-bn")
        work, opt = begin(model, settings("RigL", 0.2, 2), 10)
        before = [m.clone() for m in work.masks]

        def masked_first(work=work):
            for w, m in zip(work.weights, work.masks):
                w.grad.mul_(m)
            work.observe()

        with pytest.raises(DynamicError, match="before masking" if late else "after backward") as e:
            for t in (1, 2):
                step(
                    model,
                    opt,
                    *images("conv-bn", t),
                    work.weights,
                    work.masks,
                    on_gradient=masked_first if late else None,
                )
                work.update(t)
        sentence(e)
        assert t == 2 and all(torch.equal(a, b) for a, b in zip(before, work.masks))


def test_a_dense_network_has_no_masked_gradients_to_miss():
    "At the first event of a dense start every gradient is active; growth must not take that for a mistake."
    _, work, *_ = list(walk("mlp", settings("GraNet (s_i=0)", 0.1, 2), 9))[-1]
    assert len(work.history) == 4


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.8, 0.97, 0.999, 1.0])
def test_erk_above_one_is_solved(density):
    "Small layers are dense from low densities on; the total is exact all the same, and equals the reference's."
    for shapes in (
        {n: tuple(w.shape) for n, w in prunable(network(name)).items()} for name in ("mlp", "conv-bn", "resnet-20")
    ):
        got, size = initial_counts(shapes, "erk", density), {n: math.prod(s) for n, s in shapes.items()}
        assert sum(got.values()) == round(density * sum(size.values())) and all(0 <= got[n] <= size[n] for n in size)
        assert got == erdos_renyi_kernel(shapes, density)
    assert density < 0.8 or any(got[n] == size[n] for n in size)


# --- nothing else changes


def test_static_masks_train_bit_equal_with_and_without_dropgrow():
    s = settings("static", 0.2)
    for fields in (dict(), dict(memory_format="channels_last")):
        recipe = TRAINING.model_copy(update=dict(max_epochs=2, schedule="constant", milestones=()) | fields)
        masks = initial_masks(network("conv-bn"), s, 3)
        plain = train(network("conv-bn"), small(), recipe, masks, seed=3)
        result, work = sparse_train(network("conv-bn"), small(), recipe, s, 3)
        assert result.ticket.digest == plain.ticket.digest and result.losses == plain.losses and work.history == []


def test_runs_repeat_themselves_and_seeds_differ():
    def go(seed):
        return sparse_train(
            network("conv-bn"),
            small(),
            TRAINING.model_copy(update=dict(max_epochs=1, schedule="constant", milestones=())),
            settings("SET", 0.2, 3),
            seed,
        )[0].ticket.digest

    assert go(1) == go(1) != go(2)


def test_nan_leaves_the_masks_alone():
    model = network("conv-bn")
    work, opt = begin(model, settings("GraNet (s_i=0.5)", 0.1, 2), 20)
    for t in (1, 2):
        step(model, opt, *images("conv-bn", t), work.weights, work.masks, on_gradient=work.observe)
        if t == 2:
            work.weights[1].data[0, 0, 0, 0] = float("nan")
        before = [m.clone() for m in work.masks]
        assert work.update(t) is False
        assert all(torch.equal(a, b) for a, b in zip(before, work.masks)) and work.history == []


@pytest.mark.parametrize("method", list(METHODS))
def test_a_diverging_training_ends_with_the_epoch(method):
    wild = TRAINING.model_copy(update=dict(lr=1e30))
    result, work = sparse_train(
        create("lenet-300-100", (1, 8, 8), width=0.1, generator=generator(0, "init")),
        small(),
        wild,
        settings(method, 0.2, 3),
        0,
    )
    assert result.diverged == 1 and result.epochs == 1 and result.ticket is None


def test_segments_add_up():
    first, history = {"a": 10, "b": 4}, [{"t": t, "kept": [10 - t // 3, 4]} for t in (3, 6, 9)]
    parts = segments(
        history, first, 12, lambda t: images_until(t, 250, 100), Clock(settings("RigL", 0.1, 3, drop_end=0.7), 12)
    )
    assert sum(p[0] for p in parts) == images_until(12, 250, 100) == 1000
    # events at the end of an epoch of 3 steps, 50 images in the last; none drops after t = 8.4
    assert [p[2] for p in parts] == [
        50,
        50,
        0,
        0,
    ]
    assert [p[1]["a"] for p in parts] == [10, 9, 8, 7]
    assert [p[2] for p in segments(history, first, 12, lambda t: 10 * t, Clock(settings("SNFS", 0.1, 3), 12))] == [
        30,
        30,
        30,
        30,
    ]
    assert segments([], first, 12, lambda t: 10 * t) == [(120, first, 0)]
