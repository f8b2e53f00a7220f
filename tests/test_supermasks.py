"""Supermasks against a reference written from the papers, what changes the frozen weights, and searches that go on
after a kill.
"""

import collections
import copy
import itertools
import math
import os
import signal
import warnings
from fractions import Fraction

import pytest
import torch
from common import same_training, sentence
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch.func import functional_call

from lth_companion.methods import supermasks
from lth_companion.methods.pruning import LayerCollapse
from lth_companion.methods.supermasks import (
    Search,
    Supermask,
    SupermaskError,
    first_scores,
    frozen_weights,
    recycle,
    redraw,
    search,
    subnetwork,
    top_scores,
)
from lth_companion.tickets import generator, prunable
from lth_companion.training import data as datasets
from lth_companion.training.loop import evaluate
from lth_companion.training.models import create
from lth_companion.training.recipe import Recipe

SGD = Recipe(lr=0.1, momentum=0.9, weight_decay=1e-3, batch_size=8, max_epochs=1, patience=None)
# one channel: strides of channels_last that say nothing
SHAPES = {
    "lenet-300-100": (1, 12, 12),
    "conv-2": (1, 12, 12),
    "resnet-20": (3, 8, 8),
}
WIDTHS = {"lenet-300-100": 0.1, "conv-2": 0.125, "resnet-20": 0.25}
METHODS = ["edge-popup", "biprop"]


def network(name="lenet-300-100", dtype=torch.float32, last=False, seed=0):
    "Biases and shifts that are not 0, so that one which is lost or trained shows."
    model = create(name, SHAPES[name], 10, generator(seed, "init"), width=WIDTHS[name]).to(dtype)
    for n, p in model.named_parameters():
        if n not in prunable(model):
            p.data += 0.1 * torch.randn(p.shape, generator=generator(seed, n)).to(dtype)
    return model.to(memory_format=torch.channels_last) if last else model


def images(name, t, n=8, dtype=torch.float32, last=False):
    g = generator(t, "images")
    x = torch.randn(n, *SHAPES[name], generator=g).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x, torch.randint(10, (n,), generator=g)


def momenta(work):
    return {n: work.opt.state[s]["momentum_buffer"].clone() for n, s in work.scores.items()}


def scores(work):
    return {n: s.detach().clone() for n, s in work.scores.items()}


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


# --- the reference: full sorts, and the straight-through functions of the two papers; nothing of the library


def best(sizes, density):
    "A 0/1 mask of the round(density * n) largest; of equal ones the first."
    flat = sizes.flatten()
    mask = torch.zeros_like(flat)
    mask[torch.sort(flat, descending=True, stable=True).indices[: round(density * len(flat))]] = 1
    return mask.reshape(sizes.shape)


class EdgePopup(torch.autograd.Function):
    "Ramanujan et al. 2020: the mask of the best on the way forward, the identity on the way back."

    @staticmethod
    def forward(ctx, sizes, density):
        return best(sizes, density)

    @staticmethod
    def backward(ctx, g):
        return g, None


class Biprop(torch.autograd.Function):
    """Diffenderfer and Kailkhura 2021: the mask times the gain, the mean |w| of what is kept; back through it the
    gradient times |w|.
    """

    @staticmethod
    def forward(ctx, sizes, w, density):
        ctx.save_for_backward(w.abs())
        mask = best(sizes, density)
        return mask * ((w.abs() * mask).sum() / mask.sum() if mask.any() else 0)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None, None


class Plain:
    "A search by autograd and SGD in loops, on contiguous copies."

    def __init__(self, model, frozen, first, density, method, recipe=SGD):
        def plain(t):
            return t.detach().clone(memory_format=torch.contiguous_format)

        self.model, self.method, self.density, self.recipe = (
            copy.deepcopy(model).to(memory_format=torch.contiguous_format),
            method,
            density,
            recipe,
        )
        self.w, self.s, self.v = {n: plain(w) for n, w in frozen.items()}, {n: plain(s) for n, s in first.items()}, {}

    def effective(self, n, s):
        return (
            self.w[n] * EdgePopup.apply(s.abs(), self.density)
            if self.method == "edge-popup"
            else self.w[n].sign() * Biprop.apply(s.abs(), self.w[n], self.density)
        )

    def step(self, x, y):
        leaves = {n: s.clone().requires_grad_() for n, s in self.s.items()}
        loss = torch.nn.functional.cross_entropy(
            functional_call(self.model, {n: self.effective(n, s) for n, s in leaves.items()}, (x.contiguous(),)), y
        )
        self.g = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
        for n, g in self.g.items():
            g = g + self.recipe.weight_decay * self.s[n]
            self.v[n] = self.recipe.momentum * self.v[n] + g if n in self.v else g
            self.s[n] = self.s[n] - self.recipe.lr * (
                g + self.recipe.momentum * self.v[n] if self.recipe.nesterov else self.v[n]
            )
        return float(loss.detach())


def near(a, b, most=1e-6):
    for n in b:
        assert float((a[n] - b[n]).detach().abs().max()) <= most * max(1, float(b[n].detach().abs().max())), n


# --- masks and gradients


@budget(max_examples=200)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=60), st.floats(1e-3, 1))
def test_masks_keep_the_largest_and_of_equal_ones_the_first(values, density):
    "Many ties, those of a score with its negative among them; from k = 0 to k = n."
    for s in (torch.tensor(values, dtype=torch.float32) / 4, torch.tensor(values, dtype=torch.float64)):
        got = top_scores({"a": s}, density)["a"]
        k, want = round(density * len(values)), [0.0] * len(values)
        for i in sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]:
            want[i] = 1.0
        assert got.dtype == s.dtype and got.tolist() == best(s.abs(), density).tolist() == want


@pytest.mark.parametrize("shape", [(50, 40, 3, 3), (16, 1, 5, 5), (32, 1200), (24, 12, 1, 1)], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["", "ties"])
def test_masks_of_layers_of_every_form(shape, tied):
    """Sizes on both sides of the one from which the selection samples; channels_last gives zeros and ones too, in
    its own format.
    """
    s, w = (torch.randn(shape, generator=generator(i, "draw")) for i in range(2))
    if tied:
        s = s.round(decimals=1)
    for density, form in itertools.product(
        (1e-6, 0.1, 0.5, 0.9, 1.0), [torch.contiguous_format, torch.channels_last][: len(shape) // 2]
    ):
        got = top_scores({"a": s.contiguous(memory_format=form)}, density)
        assert torch.equal(got["a"], best(s.abs(), density)) and got["a"].is_contiguous(memory_format=form)
        mine = [subnetwork({"a": w.contiguous(memory_format=form)}, got, m)["a"] for m in METHODS]
        near(
            dict(enumerate(mine)),
            {0: w * EdgePopup.apply(s.abs(), density), 1: w.sign() * Biprop.apply(s.abs(), w, density)},
        )


CASES = [
    (name, last, density)
    for name in SHAPES
    for last in (False, True)
    if not (last and name == "lenet-300-100")
    for density in (0.3, 1.0)
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name, last, density",
    CASES + [("lenet-300-100", False, 0.004), ("lenet-300-100", False, 0.996), ("conv-2", True, 0.004)],
)
@pytest.mark.parametrize("batch, tied", [(8, False), (8, True), (1, False)], ids=["", "ties", "batch-1"])
def test_masks_and_gradients_of_a_step(method, name, last, density, batch, tied):
    dtype = torch.float64 if last else torch.float32  # convolutions of the two formats round differently
    model = network(name, dtype, last)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if density > 0.01 else "ignore")
        work = Search(model, Supermask(density=density, method=method, weights="normal"), SGD, 1, 2)
    if tied:
        for s in work.scores.values():
            s.data.mul_(20 * math.sqrt(s.numel() / len(s))).round_().div_(20)  # about one in twenty is 0
        assert any(bool((s == 0).any()) for s in work.scores.values())
    reference = Plain(model, work.frozen, work.scores, density, method)
    before = scores(work)
    assert any(bool((s < 0).any()) for s in before.values())
    counts = {n: round(density * s.numel()) for n, s in before.items()}
    assert density > 0.01 or 0 in counts.values()
    assert density < 0.99 or any(k == before[n].numel() for n, k in counts.items())
    masks = work.put()
    for n, s in before.items():
        assert torch.equal(masks[n], best(s.abs(), density)) and int(masks[n].sum()) == counts[n]
        near({n: prunable(model)[n]}, {n: reference.effective(n, reference.s[n])})
    x, y = images(name, 0, batch, dtype, last)
    loss = work.step(x, y)
    assert abs(float(loss) - reference.step(x, y)) <= 1e-6 * max(1, float(loss))
    near({n: s.grad for n, s in work.scores.items()}, reference.g)
    assert any(bool(g.any()) for g in reference.g.values())
    if tied:
        assert all(not s.grad[before[n] == 0].any() for n, s in work.scores.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name, last, recipe, dtype",
    [
        ("lenet-300-100", False, SGD, torch.float32),
        ("lenet-300-100", False, SGD.model_copy(update=dict(nesterov=True, lr=1.0)), torch.float64),
        ("conv-2", False, SGD, torch.float64),
        ("conv-2", True, SGD, torch.float64),
        ("resnet-20", False, SGD, torch.float64),
        ("resnet-20", True, SGD.model_copy(update=dict(nesterov=True)), torch.float64),
    ],
)
def test_ten_steps(method, name, last, recipe, dtype):
    "Scores, momentum, masks and losses; all that is no weight stays as it is, running statistics apart."
    model = network(name, dtype, last)
    start = {n: t.clone() for n, t in model.state_dict().items()}
    work = Search(model, Supermask(density=0.3, method=method, weights="normal"), recipe, 1, 2)
    reference, frozen, first = (
        Plain(model, work.frozen, work.scores, 0.3, method, recipe),
        {n: w.clone() for n, w in work.frozen.items()},
        work.put(),
    )
    most = 1e-6 if dtype == torch.float32 else 1e-10
    for t in range(10):
        x, y = images(name, t, dtype=dtype, last=last)
        assert abs(float(work.step(x, y)) - reference.step(x, y)) < most * 10
        near(work.scores, reference.s, most)
        near(momenta(work), reference.v, most)
    masks, last_masks = work.put(), {n: best(s.abs(), 0.3) for n, s in reference.s.items()}
    assert equal(masks, last_masks) and equal(work.frozen, frozen) and work.step_number == 10
    assert any(not torch.equal(masks[n], first[n]) for n in masks)
    buffers, weights = dict(model.named_buffers()), prunable(model)
    for n, t in model.state_dict().items():
        if n in weights:
            continue
        if n in buffers:
            assert t.dtype != dtype or not torch.equal(t, start[n])
            near({n: t.double()}, {n: dict(reference.model.named_buffers())[n].double()}, most)
        else:
            assert torch.equal(t, start[n]) and not dict(model.named_parameters())[n].requires_grad, n
    assert (name == "resnet-20") == bool(buffers)


def test_a_search_is_the_same_in_either_memory_format():
    "Whole searches in float64: two epochs with recycling and new draws between them, evaluation included."

    def found(form):
        recipe = SGD.model_copy(update=dict(max_epochs=2, batch_size=64, memory_format=form, augment="crop-flip"))
        model = create("resnet-20", (1, 8, 8), 10, generator(0, "init"), width=0.25).double()
        return search(model, small(128), recipe, Supermask(density=0.3, change="hybrid", frequency=1, rate=0.4), 5)

    (a, one), (b, two) = found("contiguous"), found("channels_last")
    near(two.scores, one.scores, 1e-9)
    assert equal(one.frozen, two.frozen) and equal(a.ticket.masks, b.ticket.masks) and a.accuracies == b.accuracies
    assert any(w.dim() == 4 and not w.is_contiguous() for w in two.frozen.values())


# --- the first weights and scores


@pytest.mark.parametrize("weights", ["constant", "normal"])
@pytest.mark.parametrize("scaled", [False, True])
def test_frozen_weights_have_the_variance_of_their_fan_in(weights, scaled):
    model = create("conv-2", (3, 16, 16), width=0.5)
    for w in frozen_weights(model, Supermask(density=0.25, weights=weights, scaled=scaled), 3).values():
        sd = math.sqrt(2 / math.prod(w.shape[1:])) * (2 if scaled else 1)
        share = float((w > 0).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(w.numel())
        if weights == "constant":
            assert torch.allclose(w.abs(), torch.tensor(sd), rtol=1e-6) and len(w.unique()) == 2
        else:
            assert abs(float(w.double().std()) / sd - 1) < 5 / math.sqrt(2 * w.numel())


def test_scores_start_uniform_with_both_signs():
    for s in first_scores(create("conv-2", (3, 16, 16), width=0.5), 3).values():
        bound = 1 / math.sqrt(math.prod(s.shape[1:]))  # Kaiming uniform with a = sqrt(5)
        assert s.abs().max() <= bound and abs(float(s.double().std()) / bound * math.sqrt(3) - 1) < 5 / math.sqrt(
            s.numel()
        )
        assert abs(float((s > 0).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(s.numel())


# --- recycling


def recycled(weights, sizes, k, source):
    """By lists: the k worst places take, in ascending order of score, the values of the k best (or of the k next);
    of tied scores the first is the better one.
    """
    rank, out = sorted(range(len(sizes)), key=lambda i: (sizes[i], -i)), list(weights)
    for to, at in zip(rank[:k], rank[len(rank) - k :] if source == "best" else rank[k : 2 * k]):
        out[to] = weights[at]
    return out


@budget(max_examples=200)
@given(
    st.permutations(range(40)),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from(["best", "next-lowest"]),
    st.integers(0, 9),
)
def test_recycling_is_the_copy_in_order(order, n, percent, source, seed):
    w = torch.randperm(n, generator=generator(seed)).float() - n / 2 - 0.25  # all distinct
    s = torch.tensor([i for i in order if i < n]).float() + 1
    s = s * torch.where(torch.rand(n, generator=generator(seed, "signs")) < 0.5, -1.0, 1.0)
    k, kept = percent * n // 100, s.clone()
    got = recycle(w, s, percent / 100, source)
    assert got.tolist() == recycled(w.tolist(), s.abs().tolist(), k, source) and torch.equal(s, kept)
    assert int((got != w).sum()) == k and set(got.tolist()) <= set(w.tolist()) and len(set(got.tolist())) == n - k
    before, after = w.tolist(), got.tolist()
    worst = sorted(range(n), key=lambda i: abs(float(s[i])))[:k]
    # order-preserving
    assert all(
        float(s[before.index(after[i])].abs()) < float(s[before.index(after[j])].abs())
        for i, j in itertools.pairwise(worst)
    )


@pytest.mark.parametrize("n", [1, 2, 3, 10, 20, 50, 97, 100, 200, 300, 1000, 2560, 65536, 1048576])
def test_the_count_is_the_floor_of_the_decimal_product(n, monkeypatch):
    "Where floats fall short: .29 * 100 is 28.999..., and must be 29."
    seen = []

    class Spy:  # of the sorted places only the slice's bound is of interest
        def flip(self, *a):
            return self

        def __getitem__(self, part):
            seen.append(part.stop if part.start is None else -part.start)
            raise StopIteration

    monkeypatch.setattr(supermasks.torch, "argsort", lambda *a, **kw: Spy())
    some = torch.zeros(1).expand(n)
    for percent in range(1, 51):
        k, seen[:] = int(Fraction(percent, 100) * n), []
        if k:
            with pytest.raises(StopIteration):
                recycle(some, some, percent / 100)
        else:
            recycle(some, some, percent / 100)
        assert seen == [k] * bool(k), percent
    assert math.floor(0.29 * 100) == 28


@pytest.mark.parametrize("change", ["recycle", "next-lowest"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_recycling_within_a_search_touches_frozen_weights_alone(change, last):
    work = Search(
        network("conv-2", last=last),
        Supermask(density=0.2, weights="normal", change=change, frequency=1, rate=0.3),
        SGD,
        1,
        2,
    )
    for t in range(3):
        work.step(*images("conv-2", t, last=last))
    before, s, v, form = (
        {n: w.clone() for n, w in work.frozen.items()},
        scores(work),
        momenta(work),
        {n: w.stride() for n, w in work.frozen.items()},
    )
    masks = work.put()
    values = {n: set(w.flatten().tolist()) for n, w in before.items()}
    assert work.change(1, 9)
    assert equal(scores(work), s) and equal(momenta(work), v) and equal(work.put(), masks) and work.step_number == 3
    for n, w in work.frozen.items():
        k = 3 * w.numel() // 10
        want = recycled(
            before[n].flatten().tolist(), s[n].abs().flatten().tolist(), k, "best" if change == "recycle" else change
        )
        assert w.flatten().tolist() == want and w.stride() == form[n]
        # .3 <= 1 - .2: only pruned places
        assert int((w != before[n]).sum()) == k and not ((w != before[n]) & (masks[n] == 1)).any()
        sources = set(w[w != before[n]].tolist())
        if change == "recycle":
            # .3 >= .2: all that are kept, and some pruned ones
            assert set(before[n][masks[n] == 1].tolist()) <= sources
        else:
            assert not set(before[n][masks[n] == 1].tolist()) & sources
    work.step(*images("conv-2", 4, last=last))  # goes on with the new ones
    for e in range(2, 6):
        work.change(e, 9)
        now = {n: set(w.flatten().tolist()) for n, w in work.frozen.items()}
        assert all(now[n] <= values[n] for n in now) and (e > 2 or any(now[n] < values[n] for n in now))
        values = now


def test_above_the_pruned_share_kept_weights_are_overwritten_too():
    work = Search(network(), Supermask(density=0.8, weights="normal", change="recycle", frequency=1, rate=0.5), SGD)
    before, masks = {n: w.clone() for n, w in work.frozen.items()}, work.put()
    work.change(1, 2)
    for n, w in work.frozen.items():
        assert int(((w != before[n]) & (masks[n] == 1)).sum()) == w.numel() // 2 - (w.numel() - round(0.8 * w.numel()))


# --- new draws


def drawn(
    change,
    method="edge-popup",
    density=0.5,
    rate=0.1,
    seeds=(1, 2),
    epoch=1,
    weights="normal",
    given_scores=None,
    name="conv-2",
    last=False,
):
    "A search's weights before and after one change, its masks, scores, and itself."
    work = Search(
        network(name, last=last),
        Supermask(density=density, method=method, weights=weights, change=change, frequency=1, rate=rate),
        SGD,
        *seeds,
    )
    if given_scores:
        for n, s in work.scores.items():
            s.data.copy_(given_scores[n])
    before, masks, s = {n: w.clone() for n, w in work.frozen.items()}, work.put(), scores(work)
    assert work.change(epoch, 99) and equal(scores(work), s) and equal(work.put(), masks)
    return before, work.frozen, masks, s, work


def binomial(count, n, p):
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-9


def test_redraw_by_loops():
    g = generator(0, "redraw")
    w, fresh, draws = (torch.rand(200, generator=g) for _ in range(3))
    mask = (torch.rand(200, generator=g) < 0.4).float()
    for gain in (None, 0.3):
        want = [
            (
                float(a)
                if d >= 0.25
                else (float(a) if gain is None else float(gain * a + (1 - gain) * b))
                if m
                else float(b)
            )
            for a, b, d, m in zip(w, fresh, draws, mask)
        ]
        near({0: redraw(w, fresh, mask, 0.25, draws, gain)}, {0: torch.tensor(want)})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rate", [0.1, 0.7, 1.0])
def test_iterand_draws_pruned_weights_anew_with_its_probability(method, rate):
    before, after, masks, _, work = drawn("iterand", method, 0.3, rate)
    for n, w in after.items():
        changed, pruned = w != before[n], masks[n] == 0
        assert not (changed & ~pruned).any() and binomial(int(changed.sum()), int(pruned.sum()), rate), n
        new = w[changed].double()
        sd = math.sqrt(2 / math.prod(w.shape[1:]))
        if len(new) > 30:
            assert abs(float(new.std()) / sd - 1) < 5 / math.sqrt(2 * len(new)) and abs(
                float(new.mean())
            ) < 5 * sd / math.sqrt(len(new))


def test_iterand_keeps_to_the_two_values_of_constant_weights():
    before, after, masks, *_ = drawn("iterand", density=0.3, rate=1.0, weights="constant")
    for n, w in after.items():
        assert set(w.flatten().tolist()) <= set(before[n].flatten().tolist())
        pruned = masks[n] == 0
        assert binomial(int((w != before[n]).sum()), int(pruned.sum()), 0.5)  # half of the draws have the old sign


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_iterand_all_mixes_kept_weights_with_the_gain(last):
    """The draws do not depend on the scores: a search whose mask is the complement shows the fresh values of the
    kept places.
    """
    before, after, masks, s, _ = drawn("iterand-all", "biprop", 0.5, 0.4, last=last)
    # the smallest become the largest; layers of even size, no ties at the middle
    flipped = {n: -1 / v for n, v in s.items()}
    _, other, complement, _, _ = drawn("iterand", "edge-popup", 0.5, 0.4, given_scores=flipped, last=last)
    _, pruned_only, _, _, _ = drawn("iterand", "edge-popup", 0.5, 0.4, given_scores=s, last=last)
    for n, w in after.items():
        kept, gain = masks[n] == 1, float(before[n][masks[n] == 1].abs().mean())
        assert torch.equal(complement[n], 1 - masks[n]) and 0 < gain < 1
        assert torch.equal(w[~kept], pruned_only[n][~kept])
        fresh, touched = other[n], other[n] != before[n]
        assert binomial(int(touched.sum()), int(kept.sum()), 0.4) and torch.equal(
            touched & kept, (w != before[n]) & kept
        )
        near({n: w[kept & touched]}, {n: gain * before[n][kept & touched] + (1 - gain) * fresh[kept & touched]})


def test_hybrid_recycles_and_draws_each_at_half_the_rate():
    before, after, masks, s, _ = drawn("hybrid", density=0.4, rate=0.4)
    for n, w in after.items():
        copied = torch.tensor(
            recycled(before[n].flatten().tolist(), s[n].abs().flatten().tolist(), w.numel() // 5, "best")
        ).view(w.shape)
        changed, pruned = w != copied, masks[n] == 0
        assert (
            not (changed & ~pruned).any()
            and binomial(int(changed.sum()), int(pruned.sum()), 0.2)
            and bool(changed.any())
        )


@pytest.mark.parametrize("change", ["iterand", "iterand-all", "hybrid"])
def test_draws_follow_from_weight_seed_and_epoch(change):
    _, a, masks, s, _ = drawn(change, "biprop")
    torch.manual_seed(7)
    _, again, *_ = drawn(change, "biprop")
    assert equal(a, again)
    for other in (dict(epoch=2), dict(seeds=(3, 2), given_scores=s)):
        _, b, *_ = drawn(change, "biprop", **other)
        assert not any(torch.equal(a[n], b[n]) for n in a)
    if change == "iterand":
        _, b, theirs, *_ = drawn(change, "biprop", seeds=(1, 9))  # another score seed: the same draws where both prune
        for n in a:
            both = (masks[n] == 0) & (theirs[n] == 0)
            assert both.any() and torch.equal(a[n][both], b[n][both])


def test_layers_draw_independently():
    model = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.Linear(50, 50))
    work = Search(model, Supermask(density=0.5, weights="normal", change="iterand", frequency=1, rate=0.5), SGD)
    before = [w.clone() for w in work.frozen.values()]
    assert not torch.equal(*before) and not torch.equal(*work.scores.values())
    work.change(1, 2)
    a, b = ((w != was).flatten() for w, was in zip(work.frozen.values(), before))
    assert binomial(int((a & b).sum()), 2500, 0.0625)


# --- when


@pytest.mark.parametrize("change", ["recycle", "next-lowest", "iterand", "iterand-all", "hybrid", "none"])
@pytest.mark.parametrize("frequency, epochs", [(1, 4), (2, 6), (2, 7), (3, 3), (10, 3)])
def test_changes_come_after_every_f_epochs_but_the_last(change, frequency, epochs, monkeypatch):
    "What the loop asks for and what then happens; a search's own frozen weights tell."
    seen, ask = [], Search.change

    def spy(work, epoch, last):
        before = {n: w.clone() for n, w in work.frozen.items()}
        did = ask(work, epoch, last)
        assert did == (not equal(before, work.frozen))
        if did:
            seen.append(epoch)
        return did

    monkeypatch.setattr(Search, "change", spy)
    monkeypatch.setattr(supermasks, "evaluate", lambda model, data: (1.0, 10.0))
    s = Supermask(
        density=0.5,
        method="biprop" if change == "iterand-all" else "edge-popup",
        weights="normal",
        change=change,
        frequency=frequency,
        rate=0.5,
    )
    search(network8(), small(16), SGD.model_copy(update=dict(max_epochs=epochs, batch_size=16)), s)
    assert seen == ([] if change == "none" else [e for e in range(1, epochs) if e % frequency == 0])
    if change != "none":
        work = Search(network8(), s, SGD)
        assert [e for e in range(-2, 9) if ask(work, e, 8)] == [e for e in range(1, 8) if e % frequency == 0]


def test_an_early_stop_changes_nothing_after_its_last_epoch(monkeypatch):
    calls = []
    monkeypatch.setattr(Search, "change", lambda work, epoch, last: calls.append(epoch))
    losses = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(supermasks, "evaluate", lambda model, data: (next(losses), 10.0))
    result, _ = search(
        network8(),
        small(16),
        SGD.model_copy(update=dict(max_epochs=9, patience=2)),
        Supermask(density=0.5, change="recycle", frequency=1),
    )
    assert result.epochs == 3 and calls == [1, 2]


# --- seeds


def small(n=256):
    return datasets.load("digits", train_size=n)


def network8(name="lenet-300-100", seed=0):
    return create(name, (1, 8, 8), 10, generator(seed, "init"), width=WIDTHS[name])


def test_weight_seed_score_seed_and_order_are_independent(monkeypatch):
    seen, batch = [], datasets.Data.batch

    def spy(self, x, y, indices, *a, **kw):
        seen.append(indices.tolist())
        return batch(self, x, y, indices, *a, **kw)

    monkeypatch.setattr(datasets.Data, "batch", spy)
    recipe = SGD.model_copy(update=dict(max_epochs=2, batch_size=16))
    Run = collections.namedtuple("Run", "frozen first order ticket")

    def run(seed=0, **kw):
        seen.clear()
        result, work = search(network8(), small(64), recipe, Supermask(density=0.5, weights="normal"), seed, **kw)
        return Run(
            {n: w.clone() for n, w in work.frozen.items()},
            first_scores(network8(), work.seed[1]),
            list(seen),
            result.ticket,
        )

    base = run(0, weight_seed=0, score_seed=0)
    assert (
        len(base.order) == 8 and sorted(sum(base.order[:4], [])) == list(range(64)) and base.order[:4] != base.order[4:]
    )
    default = run(0)
    assert (
        equal(base.frozen, default.frozen)
        and base.order == default.order
        and base.ticket.digest == default.ticket.digest
    )
    scored = [run(0, weight_seed=0, score_seed=i) for i in (1, 2)]
    for other in scored:
        assert equal(base.frozen, other.frozen) and base.order == other.order
        assert not equal(base.first, other.first) and base.ticket.digest != other.ticket.digest
    weighted, ordered = run(0, weight_seed=5, score_seed=0), run(5, weight_seed=0, score_seed=0)
    assert (
        not any(torch.equal(weighted.frozen[n], base.frozen[n]) for n in base.frozen)
        and equal(weighted.first, base.first)
        and weighted.order == base.order
    )
    assert equal(ordered.frozen, base.frozen) and equal(ordered.first, base.first) and ordered.order != base.order
    seeded = run(5)
    assert (
        equal(seeded.frozen, weighted.frozen) and seeded.order == ordered.order and not equal(seeded.first, base.first)
    )


def test_first_scores_do_not_depend_on_the_model_and_are_not_the_weights():
    """Another initialisation of the model changes nothing of a search but its biases; weights and scores of one
    seed are not correlated.
    """
    s = Supermask(density=0.5, weights="normal")
    assert equal(frozen_weights(network(seed=0), s, 4), frozen_weights(network(seed=1), s, 4)) and equal(
        first_scores(network(seed=0), 4), first_scores(network(seed=1), 4)
    )
    for n, w in frozen_weights(network(), s, 4).items():
        r = torch.corrcoef(torch.stack([w.flatten(), first_scores(network(), 4)[n].flatten()]))[0, 1]
        assert abs(float(r)) < 5 / math.sqrt(w.numel())


# --- searches that go on after a kill

HUNT = Recipe(
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    batch_size=64,
    max_epochs=6,
    patience=None,
    augment="crop-flip",
    schedule="cosine",
)
EVERY = {
    "recycle": Supermask(density=0.3, change="recycle", frequency=2, rate=0.3),
    "biprop": Supermask(density=0.3, method="biprop", weights="normal", change="hybrid", frequency=2, rate=0.4),
}


def hunt(name, checkpoint=None, **kw):
    model = network8("resnet-20")
    result, work = search(
        model,
        small(),
        HUNT.model_copy(update=dict(memory_format="channels_last" if name == "biprop" else "contiguous")),
        EVERY[name],
        3,
        score_seed=4,
        checkpoint=checkpoint,
        **kw,
    )
    return model, result, work


def dies(name, path):
    """In a process of its own: killed between the recyclings after epochs 2 and 4, at the end of the fourth, before
    its checkpoint is written.
    """
    torch.set_num_threads(1)
    hunt(name, path, on_epoch=lambda model, result: result.epochs == 4 and os.kill(os.getpid(), signal.SIGKILL))


def same(a, b):
    (net, result, work), (net2, result2, work2) = a, b
    same_training((net, result), (net2, result2))
    assert (
        equal(scores(work), scores(work2))
        and equal(work.frozen, work2.frozen)
        and equal(momenta(work), momenta(work2))
        and work.step_number == work2.step_number == 24
    )


@pytest.mark.parametrize("name", list(EVERY))
def test_a_killed_search_goes_on_and_ends_bit_equal(name, tmp_path, killed):
    path, epochs = killed(name, tmp_path / "c.safetensors"), []
    resumed = hunt(name, path, on_epoch=lambda model, result: epochs.append(result.epochs))
    assert epochs == [4, 5, 6]
    peace = hunt(name)
    assert not any(tmp_path.glob("*.part")) and not equal(
        peace[2].frozen, frozen_weights(network8("resnet-20"), EVERY[name], 3)
    )
    same(resumed, peace)
    with warnings.catch_warnings():  # a finished one has nothing left to do
        warnings.simplefilter("error")
        calls = []
        ready = hunt(name, path, on_epoch=lambda *a: calls.append(a))
    assert not calls
    same(ready, peace)
    with pytest.raises(ValueError, match="another training; remove it") as e:
        search(
            network8("resnet-20"),
            small(),
            HUNT,
            EVERY[name].model_copy(update=dict(rate=0.1)),
            3,
            score_seed=4,
            checkpoint=path,
        )
    sentence(e)


def test_a_damaged_checkpoint_is_begun_anew(tmp_path):
    path, short = tmp_path / "c", SGD.model_copy(update=dict(max_epochs=2, batch_size=16))

    def go():
        return search(
            network8(), small(32), short, Supermask(density=0.5, change="recycle", frequency=1), 3, checkpoint=path
        )

    result, work = go()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="starts anew"):
        again, other = go()
    assert result.ticket.digest == again.ticket.digest and equal(work.frozen, other.frozen)


def test_a_checkpoint_of_another_search_is_refused(tmp_path):
    path, short, base = (
        tmp_path / "c",
        SGD.model_copy(update=dict(max_epochs=2, batch_size=16)),
        Supermask(density=0.5, change="recycle", frequency=1),
    )

    def go(settings=base, recipe=short, seed=3, model=0, n=32, **kw):
        return search(network8(seed=model), small(n), recipe, settings, seed, checkpoint=path, **kw)

    go()
    for other in (
        dict(settings=base.model_copy(update=dict(change="hybrid"))),
        dict(settings=base.model_copy(update=dict(frequency=2))),
        dict(settings=base.model_copy(update=dict(density=0.4))),
        dict(settings=base.model_copy(update=dict(method="biprop"))),
        dict(settings=base.model_copy(update=dict(weights="normal"))),
        dict(recipe=short.model_copy(update=dict(lr=0.2))),
        dict(seed=4),
        dict(weight_seed=4),
        dict(score_seed=4),
        dict(model=1),
        dict(n=48),
    ):
        with pytest.raises(ValueError, match="another training; remove it") as e:
            go(**other)
        sentence(e)
    go()


# --- what comes back


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["lenet-300-100", "resnet-20"])
def test_the_ticket_is_the_network_that_was_evaluated(method, name):
    result, work = search(
        network8(name),
        small(),
        SGD.model_copy(update=dict(max_epochs=2, batch_size=32)),
        Supermask(density=0.3, method=method, weights="normal", change="recycle", frequency=1),
        3,
    )
    net = result.ticket.apply(network8(name, 9))
    loss, accuracy = evaluate(net, small())
    assert (loss, accuracy) == (result.losses[-1], result.accuracies[-1]) != evaluate(network8(name, 9), small())
    for n, w in work.frozen.items():
        m, kept = result.ticket.masks[n], result.ticket.weights[n]
        assert int(m.sum()) == round(0.3 * m.numel()) and not kept[m == 0].any()
        if method == "edge-popup":
            assert torch.equal(kept[m == 1], w[m == 1])
        else:
            assert len(kept[m == 1].abs().unique()) == 1 and torch.equal(kept[m == 1].sign(), w[m == 1].sign())


# --- bad input


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(change="recycle", rate=0.51), "at most 0.5"),
        (dict(change="next-lowest", rate=0.6), "at most 0.5"),
        (dict(change="hybrid", rate=0.6), "at most 0.5"),
        (dict(change="recycle", rate=0.5000001), "at most 0.5"),
        (dict(change="iterand", rate=1.1), "at most 1"),
        (dict(change="iterand-all", method="biprop", rate=2), "at most 1"),
        (dict(change="iterand-all"), 'choose change="iterand"'),
        (dict(rate=0), "greater than 0"),
        (dict(rate=-0.1), "greater than 0"),
        (dict(rate=math.nan), "finite"),
        (dict(rate=math.inf), "finite"),
        (dict(frequency=0), "greater than or equal to 1"),
        (dict(frequency=-3), "greater than or equal to 1"),
        (dict(frequency=2.5), "integer"),
        (dict(density=9), "at most 1"),
        (dict(density=0), "above 0"),
        (dict(density=-0.1), "above 0"),
        (dict(density=math.nan), "nan"),
        (dict(density="half"), "half"),
        (dict(method="edgepopup"), "edge-popup"),
        (dict(weights="uniform"), "normal"),
        (dict(change="recycling"), "recycle"),
        (dict(speed=1), "not permitted"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(bad, says):
    with pytest.raises(ValueError, match=says) as e:
        Supermask(**{"density": 0.5} | bad)
    sentence(e)


def test_settings_are_frozen_and_their_limits_are_allowed():
    with pytest.raises(ValueError, match="frozen"):
        Supermask(density=0.5).density = 0.4
    for good in (
        dict(change="recycle", rate=0.5),
        dict(change="iterand", rate=1.0),
        dict(density=1.0),
        dict(frequency=1),
    ):
        Supermask(**{"density": 0.5} | good)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_left_empty_is_warned_of_by_name(method):
    "144 x 30, 30 x 10 and 10 x 10 weights."
    for density, empty in ((0.004, "of fc3.weight;"), (0.001, "of fc2.weight, fc3.weight;")):
        with pytest.warns(LayerCollapse, match=empty) as seen:
            work = Search(network(), Supermask(density=density, method=method), SGD)
        assert (
            len(seen) == 1
            and "\n" not in str(seen[0].message)
            and ". " not in str(seen[0].message).rstrip(".")
            and str(density) in str(seen[0].message)
        )
        for t in range(3):
            # it still runs, and gives no NaN by a gain of 0 / 0
            assert torch.isfinite(work.step(*images("lenet-300-100", t)))
        assert not work.put()["fc3.weight"].any() and not network_weights(work)["fc3.weight"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Search(network(), Supermask(density=0.006), SGD)


def network_weights(work):
    return {n: w.detach() for n, w in zip(work.names, work.own)}


def test_a_search_warns_of_an_empty_layer_once():
    with pytest.warns(LayerCollapse, match="fc3") as seen:
        search(network8(), small(16), SGD.model_copy(update=dict(max_epochs=2)), Supermask(density=0.004))
    assert len([w for w in seen if w.category is LayerCollapse]) == 1


@pytest.mark.parametrize(
    "name, layer", [("lenet-300-100", "fc2.weight"), ("conv-2", "linears.0.weight"), ("conv-2", "convs.1.weight")]
)
def test_a_nan_score_stops_the_search_with_step_and_layer(name, layer):
    work = Search(network(name), Supermask(density=0.3), SGD)
    for t in range(3):
        work.step(*images(name, t))
    work.scores[layer].data.view(-1)[5] = math.nan
    with pytest.raises(SupermaskError, match=f"After step 3: .*{layer} is NaN; lower the learning rate") as e:
        work.step(*images(name, 3))
    sentence(e)


def test_a_search_that_diverges_says_so():
    "Scores beyond the largest float: infinite after one step, NaN after two; images that are NaN do it in one."
    with pytest.raises(SupermaskError, match=r"^After step \d+: A score of \S+\.weight is NaN") as e:
        search(network8(), small(64), SGD.model_copy(update=dict(lr=1e38, weight_decay=0.1)), Supermask(density=0.3))
    sentence(e)
    work, (x, y) = Search(network(), Supermask(density=0.3), SGD), images("lenet-300-100", 0)
    work.step(x * math.nan, y)
    with pytest.raises(SupermaskError, match="After step 1: A score of fc1.weight is NaN"):
        work.put()


def test_nan_scores_in_a_selection_alone():
    for s in ([1.0, math.nan], [math.nan] * 3):
        with pytest.raises(SupermaskError, match="fc is NaN") as e:
            top_scores({"fc": torch.tensor(s)}, 0.5)
        sentence(e)
    big = torch.rand(20_000)
    big[17] = math.nan
    with pytest.raises(SupermaskError, match="second is NaN"):
        top_scores({"first": torch.rand(5), "second": big}, 0.5)
