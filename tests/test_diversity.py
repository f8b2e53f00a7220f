"""Diversity of masks and functions: against plain counting and loops, chance against simulation, the published
numbers, paths and bad input.
"""

import copy
import itertools
import json
import math
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from lth_companion.measures.correlation import Overlap, OverlapError, hamming, jaccard, matching
from lth_companion.measures.diversity import (
    DiversityError,
    barrier,
    by_layer,
    disagreement,
    distances,
    embed,
    ensemble,
    independent_disagreement,
    interpolated,
    logits,
    pair,
    path,
    published_jaccard,
    random_distance,
    random_scores,
    within_deciles,
)
from lth_companion.methods.supermasks import Supermask, search, top_scores
from lth_companion.tickets import generator, prunable
from lth_companion.training import data as datasets
from lth_companion.training.loop import evaluate
from lth_companion.training.models import create
from lth_companion.training.recipe import Recipe

quick = budget(max_examples=50)
# kept by a, kept by b, magnitude
bits = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 6)), min_size=1, max_size=40)


def random_masks(sizes, kept, *purpose):
    g, masks = generator(0, *purpose), {n: torch.zeros(size) for n, size in sizes.items()}
    for n, m in masks.items():
        m.view(-1)[torch.randperm(m.numel(), generator=g)[: kept[n]]] = 1
    return masks


def layers(rows, cut, *columns):
    "The columns of rows as tensors of one or two layers."
    parts = {"a": rows[:cut], "b": rows[cut:]}
    return tuple({n: torch.tensor([float(r[c]) for r in part]) for n, part in parts.items() if part} for c in columns)


def sentence(error):
    assert "\n" not in str(error.value) and ". " not in str(error.value) and str(error.value).endswith(".")


# ---------------------------------------------------------------- masks: values


@quick
@given(bits, st.integers(0, 40))
def test_the_published_total_is_the_intersection_over_intersection_plus_union(rows, cut):
    a, b = layers(rows, cut, 0, 1)
    both, either = sum(x and y for x, y, _ in rows), sum(x or y for x, y, _ in rows)
    if not either:
        with pytest.raises(DiversityError, match="empty"):
            published_jaccard(a, b)
    else:
        assert (
            published_jaccard(a, b)
            == pytest.approx(both / (both + either))
            == pytest.approx(float(jaccard(a, b)) / (1 + float(jaccard(a, b))))
        )


@pytest.mark.parametrize(
    "density, corrected, published, chance, match",
    [
        (0.5, 0.3402, 0.2539, 0.3333, 50.0),
        (0.5, 0.4069, 0.2892, 0.3333, 50.0),
        (0.25, 0.1498, 0.1303, 0.1429, 62.5),
        (0.25, 0.2189, 0.1796, 0.1429, 62.5),
    ],
)
def test_published_numbers(density, corrected, published, chance, match):
    "Facts 5.8: the totals agree with J/(1+J) within the rounding of both, and chance is k/(2-k) and k^2+(1-k)^2."
    low, high = ((j / (1 + j)) for j in (corrected - 5e-5, corrected + 5e-5))
    assert low - 5e-5 <= published <= high + 5e-5
    n = 400_000
    a, b = (random_masks({"w": n}, {"w": round(density * n)}, "published", side) for side in "ab")
    assert (
        jaccard(a, b).null_mean == pytest.approx(density / (2 - density), abs=1e-5) == pytest.approx(chance, abs=6e-5)
    )
    assert matching(a, b).null_mean == pytest.approx(100 * (density**2 + (1 - density) ** 2)) == pytest.approx(match)
    assert published_jaccard(a, b) == pytest.approx(density / 2, abs=0.002)


def test_masks_of_a_given_jaccard_index():
    "Two masks built to share .3402 and .4069 of what either keeps print the published totals."
    for j, said in ((0.34025, 0.2539), (0.4069, 0.2892)):
        both = round(20_000 * j)
        rest = 20_000 - both
        a, b = torch.zeros(2, 50_000)
        a[:both] = b[:both] = 1
        a[both : both + rest // 2] = 1
        b[both + rest // 2 : 20_000] = 1
        assert round(published_jaccard({"w": a}, {"w": b}), 4) == said


@quick
@given(bits, st.integers(0, 40))
def test_by_layer_is_each_layer_alone(rows, cut):
    a, b = layers(rows, cut, 0, 1)
    found = by_layer(a, b)
    assert list(found) == [n for n in a if bool(a[n].any() or b[n].any())]
    for n, r in found.items():
        x, y = set(a[n].nonzero().flatten().tolist()), set(b[n].nonzero().flatten().tolist())
        assert r["jaccard"].value == pytest.approx(len(x & y) / len(x | y)) and r["matching"].value == pytest.approx(
            100 - 100 * len(x ^ y) / len(a[n])
        )


# ---------------------------------------------------------------- deciles


def plain_strata(weights, parts):
    "Rank by rank: equal magnitudes get the highest rank among them."
    size = weights.abs().flatten().tolist()
    return [parts * (sum(v <= u for v in size) - 1) // len(size) for u in size]


@quick
@given(bits, st.integers(0, 40), st.integers(1, 10))
def test_deciles_against_all_placements(rows, cut, parts):
    "Every placement of b within its strata, counted one by one."
    rows = [(x, y, w + 1) for x, y, w in rows[:8]]
    a, b, w = layers(rows, cut, 0, 1, 2)
    if not any(x or y for x, y, _ in rows):
        return
    strata = [(n, s) for n in w for s in plain_strata(w[n], parts)]
    x, y = (torch.cat(list(m.values())).bool().tolist() for m in (a, b))
    groups = [[i for i, s in enumerate(strata) if s == key] for key in dict.fromkeys(strata)]
    every = []
    for choice in itertools.product(*(itertools.combinations(g, sum(y[i] for i in g)) for g in groups)):
        kept = {i for c in choice for i in c}
        own = {i for i, k in enumerate(x) if k}
        every.append(len(own & kept) / len(own | kept))
    found = within_deciles(a, b, w, parts)
    assert found.value == float(jaccard(a, b))
    assert found.null_mean == pytest.approx(np.mean(every), abs=1e-9) and found.null_sd == pytest.approx(
        np.std(every), abs=1e-7
    )


def test_deciles_of_distinct_weights_are_tenths():
    w = {"w": torch.randn(1003, generator=generator(0, "w"))}
    s = plain_strata(w["w"], 10)
    assert sorted(np.bincount(s)) == [100] * 7 + [101] * 3
    top = {"w": torch.tensor([float(i == 9) for i in s])}
    r = within_deciles(top, top, w)
    # chance has no choice left
    assert (r.value, r.null_mean, r.null_sd) == (
        1.0,
        pytest.approx(1.0),
        pytest.approx(0.0, abs=1e-9),
    )


def tilted(weights, k, *purpose):
    "Masks that keep a weight by its magnitude and by luck."
    return {
        n: (w.abs() * torch.rand(w.shape, generator=generator(k, n, *purpose)) > 0.3).float()
        for n, w in weights.items()
    }


def resampled(masks, strata, rng):
    "As many as `masks` keeps in each stratum, in random places of it."
    out = {}
    for n, m in masks.items():
        flat, new = m.flatten().numpy(), np.zeros(m.numel(), dtype=np.float32)
        for s in np.unique(strata[n]):
            at = np.flatnonzero(strata[n] == s)
            new[rng.permutation(at)[: int(flat[at].sum())]] = 1
        out[n] = torch.from_numpy(new).view(m.shape)
    return out


def spread(values, null):
    "Mean within 3 standard errors, standard deviation within 5 %."
    assert abs(np.mean(values) - null.null_mean) < 3 * null.null_sd / len(values) ** 0.5
    assert np.std(values, ddof=1) == pytest.approx(null.null_sd, rel=0.05)


@pytest.mark.parametrize("two", [False, True])
def test_deciles_against_simulation(two):
    g = generator(1, "simulated")
    w = {"fc1": torch.randn(30, 20, generator=g), "fc2": torch.randn(10, 9, generator=g)}
    v = {n: torch.randn(x.shape, generator=g) for n, x in w.items()} if two else w
    a, b = tilted(w, 0), tilted(v, 1)
    null = within_deciles(a, b, (w, v) if two else w, 5)
    strata = {n: np.array(plain_strata(w[n], 5)) + (10 * np.array(plain_strata(v[n], 5)) if two else 0) for n in w}
    rng, found = np.random.default_rng(3), []
    for _ in range(2000):
        x, y = (torch.cat([m.flatten() for m in resampled(side, strata, rng).values()]).bool() for side in (a, b))
        found.append(float((x & y).sum() / (x | y).sum()))
    spread(found, null)


def test_plain_chance_against_simulation():
    sizes, kept = {"fc1": (20, 30), "fc2": (90,)}, {"fc1": 300, "fc2": 9}
    draws = [random_masks({n: s for n, s in sizes.items()}, kept, "chance", k) for k in range(4000)]
    x = torch.stack([torch.cat([m.flatten() for m in d.values()]) for d in draws]).numpy().astype(bool)
    both, either = (x[:2000] & x[2000:]).sum(1), (x[:2000] | x[2000:]).sum(1)
    p = pair(draws[0], draws[1], digits=12)
    spread(both / either, Overlap(*p["jaccard"]))
    spread(100 * (x[:2000] == x[2000:]).mean(1), Overlap(*p["matching"]))
    one = slice(0, 600)
    spread(
        (x[:2000, one] & x[2000:, one]).sum(1) / (x[:2000, one] | x[2000:, one]).sum(1), Overlap(*p["layers"]["fc1"])
    )
    assert np.mean([(p != q).mean() for p, q in zip(x[:2000], x[2000:])]) == pytest.approx(
        random_distance(draws[0], {n: kept[n] / draws[0][n].numel() for n in kept}), abs=0.002
    )


def test_a_taste_for_large_weights_is_chance_within_deciles():
    w = {"fc1": torch.randn(100, 300, generator=generator(0, "taste"))}
    a, b = tilted(w, 0), tilted(w, 1)
    assert jaccard(a, b).z > 20 and abs(within_deciles(a, b, w, 50).z) < 4
    v = {"fc1": torch.randn(100, 300, generator=generator(1, "taste"))}  # other weights: no overlap to explain
    c = tilted(v, 2)
    assert abs(jaccard(a, c).z) < 4 and abs(within_deciles(a, c, (w, v)).z) < 4


@quick
@given(bits, st.integers(0, 40))
def test_signed_constants_have_one_stratum_a_layer(rows, cut):
    a, b = layers(rows, cut, 0, 1)
    if not any(x or y for x, y, _ in rows):
        return
    w = {n: 0.3 * (torch.arange(len(m)) % 2 * 2.0 - 1) for n, m in a.items()}
    assert within_deciles(a, b, w) == jaccard(a, b)


# ---------------------------------------------------------------- one pair


def test_a_pair_is_json_and_all_of_the_above():
    w = {"fc1": torch.randn(40, 30, generator=generator(0, "w")), "fc2": torch.randn(50, generator=generator(1, "w"))}
    a, b = tilted(w, 0), tilted(w, 1)
    p = pair(a, b, w, digits=9)
    assert json.loads(json.dumps(p)) == p and list(p) == ["matching", "jaccard", "published", "layers", "deciles"]
    for key, r in (("matching", matching(a, b)), ("jaccard", jaccard(a, b)), ("deciles", within_deciles(a, b, w))):
        assert p[key] == pytest.approx([r.value, r.null_mean, r.null_sd], abs=1e-9)
    assert p["published"] == pytest.approx(published_jaccard(a, b), abs=1e-9)
    assert {n: v[0] for n, v in p["layers"].items()} == pytest.approx(
        {n: float(jaccard({n: a[n]}, {n: b[n]})) for n in a}, abs=1e-9
    )
    assert pair(a, b)["deciles"] is None and pair(a, b)["jaccard"][0] == round(float(jaccard(a, b)), 6)


def test_channels_last_masks_equal_contiguous_ones():
    g, last = generator(0, "last"), torch.channels_last
    w = {"conv": torch.randn(8, 4, 3, 3, generator=g), "fc": torch.randn(5, 6, generator=g)}
    a, b = tilted(w, 0), tilted(w, 1)

    def turn(d):
        return {n: x.to(memory_format=last) if x.ndim == 4 else x for n, x in d.items()}

    assert not turn(a)["conv"].is_contiguous()
    assert pair(turn(a), b, turn(w)) == pair(a, turn(b), w) == pair(a, b, w)
    assert torch.equal(distances([turn(a), b]), distances([a, b]))
    s, r = ({n: torch.randn(x.shape, generator=generator(k, n)) for n, x in w.items()} for k in (0, 1))
    for t in (0.0, 0.4, 1.0):
        plain, mixed = (top_scores(interpolated(x, y, t, 0.3), 0.3) for x, y in ((s, r), (turn(s), r)))
        assert all(torch.equal(plain[n], mixed[n]) for n in w)
    for n, x in random_scores(turn(s), generator(5)).items():
        assert torch.equal(x, random_scores(s, generator(5))[n]) and (x.ndim < 4 or x.is_contiguous(memory_format=last))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float64])
def test_any_dtype_of_mask(dtype):
    w = {"w": torch.randn(300, generator=generator(0, "w"))}
    a, b = tilted(w, 0), tilted(w, 1)
    other = {n: m.to(dtype) for n, m in a.items()}
    assert pair(other, b, w) == pair(a, b, w) and torch.equal(distances([other, b]), distances([a, b]))


# ---------------------------------------------------------------- functions


@quick
@given(st.integers(1, 5), st.integers(1, 12), st.integers(2, 5), st.integers(0, 10**6))
def test_ensembles_against_loops(members, images, classes, seed):
    g = torch.Generator().manual_seed(seed)
    # integers: many ties among votes and labels
    outs = [torch.randint(-3, 4, (images, classes), generator=g).float() for _ in range(members)]
    y = torch.randint(classes, (images,), generator=g)
    e, y = ensemble(outs, y), y.tolist()
    labels = [[max(range(classes), key=lambda c: (float(o[i, c]), -c)) for i in range(images)] for o in outs]

    def share(right):
        return 100 * sum(right) / len(right)

    each = [share([row[i] == y[i] for i in range(images)]) for row in labels]
    p = [
        [
            sum(math.exp(float(o[i, c])) / sum(math.exp(float(v)) for v in o[i]) for o in outs) / members
            for c in range(classes)
        ]
        for i in range(images)
    ]
    assert e["members"] == pytest.approx(each) and e["mean"] == pytest.approx(sum(each) / members)

    def best(keys):
        return max(range(classes), key=lambda c: tuple(round(k, 9) for k in keys[c]) + (-c,))

    clear = [len({round(v, 9) for v in row}) == classes for row in p]  # equal probabilities: order of summation decides
    if all(clear):
        assert e["ensemble"] == pytest.approx(share([best([(v,) for v in row]) == t for row, t in zip(p, y)])) and e[
            "gain"
        ] == pytest.approx(e["ensemble"] - e["mean"])
        assert e["vote"] == pytest.approx(
            share(
                [
                    best([(sum(row[i] == c for row in labels), p[i][c]) for c in range(classes)]) == y[i]
                    for i in range(images)
                ]
            )
        )
    assert e["oracle"] == pytest.approx(share([any(row[i] == y[i] for row in labels) for i in range(images)]))
    pairs = list(itertools.combinations(range(members), 2))
    if not pairs:
        assert e["disagreement"] is e["independent"] is None
    else:
        assert e["disagreement"] == pytest.approx(
            np.mean([share([labels[i][k] != labels[j][k] for k in range(images)]) for i, j in pairs])
        )
        assert e["disagreement"] == pytest.approx(np.mean([disagreement(outs[i], outs[j]) for i, j in pairs]))
        assert e["independent"] == pytest.approx(
            np.mean([independent_disagreement(each[i], each[j], classes) for i, j in pairs])
        )
    json.dumps(e)


def test_independent_classifiers_disagree_as_often_as_the_formula_says():
    rng, n = np.random.default_rng(0), 400_000
    for p, q, classes in ((0.9, 0.7, 10), (0.5, 0.2, 4), (0.3, 0.3, 2)):
        y = rng.integers(classes, size=n)
        a, b = (np.where(rng.random(n) < k, y, (y + rng.integers(1, classes, size=n)) % classes) for k in (p, q))
        assert 100 * (a != b).mean() == pytest.approx(independent_disagreement(100 * p, 100 * q, classes), abs=0.3)


@pytest.fixture(scope="module")
def mnist():
    return datasets.load("mnist", train_size=1000, validation=200)


@pytest.mark.parametrize("name, width", [("lenet-300-100", 0.1), ("resnet-20", 0.25)])
def test_logits_are_those_of_evaluate_and_leave_the_model(mnist, name, width):
    net = create(name, generator=generator(0, "init"), width=width)
    net.train()
    inner = next(m for m in net.modules() if not list(m.children()))
    inner.eval()  # one module frozen by hand
    modes, state = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    out = logits(net, mnist, "val", 64)
    assert (out.shape, out.dtype, out.requires_grad) == ((200, 10), torch.float32, False)
    assert modes == [m.training for m in net.modules()] and all(
        torch.equal(v, state[n]) for n, v in net.state_dict().items()
    )
    loss, accuracy = evaluate(net, mnist, "val")
    assert 100 * float((out.argmax(1) == mnist.val_y).double().mean()) == pytest.approx(accuracy)
    assert float(torch.nn.functional.cross_entropy(out, mnist.val_y)) == pytest.approx(loss, rel=1e-4)


def test_logits_put_the_mode_back_after_an_error(mnist):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 10)).train()
    with pytest.raises(RuntimeError):
        logits(net, mnist)
    assert all(m.training for m in net.modules())


# ---------------------------------------------------------------- distances and maps


@quick
@given(bits, st.integers(0, 40))
def test_distances_against_counting(rows, cut):
    masks = list(layers(rows, cut, 0, 1)) * 2
    d = distances(masks)
    flat = [torch.cat(list(m.values())).tolist() for m in masks]
    want = [[sum(x != y for x, y in zip(a, b)) / len(a) for b in flat] for a in flat]
    assert (
        d.dtype == torch.float64
        and torch.allclose(d, torch.tensor(want, dtype=torch.float64), atol=1e-12)
        and not d.diagonal().any()
    )


def test_distances_of_long_layers_are_exact_and_quick():
    masks = [{"w": torch.rand(500, 532, generator=generator(k, "long")) < 0.9} for k in range(60)]
    start = time.process_time()
    d = distances(masks)
    took = time.process_time() - start  # of this process: the machine may be busy
    assert d[3, 7].item() == pytest.approx(float((masks[3]["w"] ^ masks[7]["w"]).double().mean()), abs=1e-15)
    assert took < 3
    full = {"w": torch.ones(2**24 + 3, dtype=torch.uint8)}
    part = {"w": full["w"].clone()}
    part["w"][5] = 0
    assert distances([full, part])[0, 1].item() == 1 / (2**24 + 3)  # float32 could not count these


def test_random_distance_is_the_mean_of_hamming():
    like = {"fc1": torch.zeros(30, 40), "fc2": torch.zeros(70)}
    a, b = {"fc1": 0.3, "fc2": 0.9}, {"fc1": 0.25, "fc2": 0.0}
    x, y = (
        random_masks({n: w.shape for n, w in like.items()}, {n: round(d[n] * like[n].numel()) for n in like}, str(d))
        for d in (a, b)
    )
    assert random_distance(like, a, b) == pytest.approx(hamming(x, y).null_mean, abs=1e-12)
    assert random_distance(like, 0.5) == pytest.approx(0.5) and random_distance(like, 1.0) == 0


def far(x):
    return np.linalg.norm(x[:, None] - x[None], axis=-1)


@quick
@given(st.integers(2, 8), st.integers(0, 10**6))
def test_points_of_the_plane_come_back(m, seed):
    d = far(np.random.default_rng(seed).normal(size=(m, 2)))
    x, stress = embed(d)
    assert stress < 0.02 and np.abs(far(x) - d).max() < 0.1 * d.max() and np.abs(x.mean(0)).max() < 1e-5
    spread = x.T @ x
    assert abs(spread[0, 1]) < 1e-4 * (1 + spread[0, 0]) and spread[0, 0] >= spread[1, 1] - 1e-9 and x[0, 0] >= 0
    assert stress == pytest.approx(math.sqrt(((d - far(x)) ** 2).sum() / (far(x) ** 2).sum()), abs=1e-5)


def test_a_map_repeats_and_has_no_warnings():
    d = distances([{"w": torch.rand(400, generator=generator(k, "map")) < 0.5} for k in range(12)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = embed(d), embed(d.numpy())
    assert one[0].tobytes() == two[0].tobytes() and one[1] == two[1] > 0.2  # independent masks fit no plane
    x, s = embed(d, seed=1)
    assert abs(s - one[1]) < 0.01
    assert (np.round(x, 6) == x).all() and one[0][0, 0] > 0 and one[0][0, 1] > 0


def test_maps_of_few_or_equal_points():
    assert embed([[0.0]])[0].tolist() == [[0.0, 0.0]] and embed(np.zeros((3, 3)))[1] == 0
    x, stress = embed([[0.0, 2.0], [2.0, 0.0]])
    assert np.abs(x - [[1.0, 0.0], [-1.0, 0.0]]).max() < 1e-5 and stress < 1e-5
    twice = embed([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])[0]
    assert np.abs(twice[0] - twice[1]).max() < 1e-2


# ---------------------------------------------------------------- paths

values = st.lists(st.tuples(st.integers(-30, 30), st.integers(-30, 30)), min_size=1, max_size=30)


@quick
@given(values, st.floats(0.05, 1), st.floats(0, 1))
def test_interpolated_scores_against_a_loop(rows, density, t):
    a, b = ({"w": torch.tensor([float(r[k]) for r in rows])} for k in (0, 1))
    k, n = round(density * len(rows)), len(rows)
    sides, bad = [], False
    for s in (a, b):
        size = sorted((abs(v) for v in s["w"].tolist()), reverse=True)
        top = size[k - 1] if 0 < k < n else 1.0
        bad |= top == 0
        sides.append([abs(v) / top if top else 0.0 for v in s["w"].tolist()])
    if bad:
        with pytest.raises(DiversityError, match="no scale"):
            interpolated(a, b, t, density)
        return
    found = interpolated(a, b, t, density)
    assert found["w"].tolist() == pytest.approx([(1 - t) * x + t * y for x, y in zip(*sides)], abs=1e-12)
    for end, s in ((0, a), (1, b)):
        assert torch.equal(
            top_scores(interpolated(a, b, end, density), density)["w"].float(), top_scores(s, density)["w"]
        )
    assert int(top_scores(found, density)["w"].sum()) == k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [1.0001, 1.9])
def test_ends_are_exact_for_neighbouring_floats(dtype, start):
    "Scores one unit in the last place apart: a lower one never reaches the threshold by rounding."
    s = torch.full((4001,), start, dtype=dtype)
    for i in range(1, len(s)):
        s[i] = torch.nextafter(s[i - 1], torch.tensor(2.0, dtype=dtype))
    s, other = (
        s[torch.randperm(len(s), generator=generator(0, "order"))],
        {"w": torch.rand(len(s), generator=generator(0, "other"))},
    )
    for density in (0.1, 0.5, 0.777):
        t = s.sort(descending=True).values[round(density * len(s)) - 1]
        for ends in (({"w": s}, other, 0.0), (other, {"w": s}, 1.0)):
            assert torch.equal(top_scores(interpolated(*ends, density), density)["w"].bool(), s >= t)


def test_random_scores_keep_values_and_forget_places():
    s = {
        "a": torch.randn(40, 50, generator=generator(0, "a")),
        "b": torch.randn(7, generator=generator(0, "b")).requires_grad_(),
    }
    r, again = random_scores(s, generator(1)), random_scores(s, generator(1))
    for n in s:
        assert (
            torch.equal(r[n].flatten().sort().values, s[n].detach().flatten().sort().values)
            and torch.equal(r[n], again[n])
            and not r[n].requires_grad
        )
    assert abs(jaccard(top_scores(s, 0.3), top_scores(r, 0.3)).z) < 4


RECIPE = Recipe(lr=0.1, momentum=0.9, batch_size=128, max_epochs=1, patience=None)


def found(mnist, score_seed, model="conv-2", width=0.0625, weight_seed=0, **fields):
    net = create(model, generator=generator(0, "init"), width=width)
    return search(
        net, mnist, RECIPE, Supermask(**{"density": 0.4, **fields}), weight_seed=weight_seed, score_seed=score_seed
    )[1]


@pytest.fixture(scope="module")
def small(mnist):
    return replace(mnist, test_x=mnist.test_x[:500], test_y=mnist.test_y[:500])


@pytest.mark.parametrize(
    "fields", [dict(), dict(method="biprop", weights="normal"), dict(model="resnet-20", width=0.125)], ids=str
)
def test_paths_end_in_the_searches_and_leave_the_models(small, fields):
    a, b = found(small, 0, **fields), found(small, 1, **fields)
    states = [copy.deepcopy(w.model.state_dict()) for w in (a, b)]
    way = path(a, b, small, 3)
    assert way["t"] == [0, 0.5, 1] and {len(v) for v in way.values()} == {3}
    for i, w in ((0, a), (2, b)):
        assert (way["loss"][i], way["accuracy"][i]) == evaluate(w.model, small)
    masks = [top_scores(w.scores, 0.4) for w in (a, b)]
    middle = top_scores(interpolated(a.scores, b.scores, 0.5, 0.4), 0.4)
    assert way["distance"] == [0, float(hamming(masks[0], middle)), float(hamming(*masks))]
    for w, state in zip((a, b), states):
        assert all(torch.equal(v, state[n]) for n, v in w.model.state_dict().items())
    if not fields:  # the middle, by hand
        net = copy.deepcopy(a.model)
        with torch.no_grad():
            for n, p in prunable(net).items():
                p.copy_(a.frozen[n] * middle[n])
        assert (way["loss"][1], way["accuracy"][1]) == evaluate(net, small)
        drawn = random_scores(b.scores, generator(0, "end"))
        to = path(a, drawn, small, 2)
        assert to["loss"][0] == way["loss"][0] and to["distance"][1] == pytest.approx(
            random_distance(masks[0], 0.4), abs=0.1
        )
        json.dumps(way)


def test_the_model_is_put_back_after_an_error(small):
    a, b = found(small, 0), found(small, 1)
    state = copy.deepcopy(a.model.state_dict())
    b.scores[a.names[-1]].data.fill_(math.nan)
    with pytest.raises(DiversityError, match="NaN") as e:
        path(a, b, small, 3)
    sentence(e)
    assert all(torch.equal(v, state[n]) for n, v in a.model.state_dict().items())


def test_searches_that_cannot_be_joined(small):
    a = found(small, 0)
    for other in (
        found(small, 1, weight_seed=1),
        search(
            create("conv-2", generator=generator(0, "init"), width=0.0625),
            small,
            RECIPE.model_copy(update=dict(max_epochs=2)),
            Supermask(density=0.4, change="recycle", frequency=1),
            weight_seed=0,
            score_seed=1,
        )[1],
    ):
        with pytest.raises(DiversityError, match="frozen=search_a.frozen") as e:
            path(a, other, small)
        sentence(e)
    for fields in (dict(density=0.5), dict(method="biprop")):
        with pytest.raises(DiversityError, match="one method and density") as e:
            path(a, found(small, 1, **fields), small)
        sentence(e)
    again = search(
        create("conv-2", generator=generator(0, "init"), width=0.0625),
        small,
        RECIPE,
        Supermask(density=0.4),
        weight_seed=7,
        score_seed=1,
        frozen=a.frozen,
    )[1]
    assert len(path(a, again, small, 2)["t"]) == 2  # the mend that the message names


@quick
@given(st.lists(st.floats(-100, 100), min_size=3, max_size=12), st.data())
def test_barriers_against_a_loop(v, data):
    steps = data.draw(st.lists(st.floats(0.1, 1), min_size=len(v) - 1, max_size=len(v) - 1))
    t = [sum(steps[:i]) for i in range(len(v))]
    above = [v[i] - (v[0] + (v[-1] - v[0]) * t[i] / t[-1]) for i in range(1, len(v) - 1)]
    assert barrier(v, t) == pytest.approx(max(above), abs=1e-9) and barrier(v, t, "accuracy") == pytest.approx(
        max(-x for x in above), abs=1e-9
    )
    even = [i / (len(v) - 1) for i in range(len(v))]
    assert barrier(v) == pytest.approx(barrier(v, even), abs=1e-9)


def test_the_sign_of_a_barrier():
    assert barrier([0.0, 1.0, 0.0]) == 1 and barrier([0.0, -1.0, 0.0]) == -1
    assert barrier([90.0, 80.0, 90.0], of="accuracy") == 10 and barrier([90.0, 95.0, 90.0], of="accuracy") == -5


# ---------------------------------------------------------------- bad input

M, N, W = (
    {"w": torch.tensor([1.0, 0.0, 1.0])},
    {"w": torch.tensor([0.0, 0.0, 1.0])},
    {"w": torch.tensor([3.0, 1.0, 2.0])},
)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: published_jaccard({"w": torch.zeros(3)}, {"w": torch.zeros(3)}), DiversityError, "empty"),
        (lambda: pair(M, {"v": M["w"]}), OverlapError, "Only one side"),
        (lambda: by_layer(M, W), OverlapError, "other than 0 and 1"),
        (lambda: within_deciles(M, N, {"w": torch.ones(2)}), OverlapError, "shape"),
        (lambda: within_deciles(M, N, W, 0), DiversityError, "at least 1"),
        (lambda: within_deciles(M, N, {"w": W["w"] * math.nan}), DiversityError, "NaN"),
        (lambda: within_deciles(M, N, {"w": W["w"] * M["w"]}), DiversityError, "search.frozen"),
        (lambda: within_deciles(N, N, (W, {"w": W["w"] * N["w"]})), DiversityError, "search.frozen"),
        (lambda: disagreement(torch.zeros(3), torch.zeros(3)), DiversityError, "one row an image"),
        (lambda: disagreement(torch.zeros(3, 2), torch.zeros(4, 2)), DiversityError, "one split"),
        (lambda: disagreement(torch.full((3, 2), math.nan), torch.zeros(3, 2)), DiversityError, "diverged"),
        (lambda: ensemble([], torch.zeros(1)), DiversityError, "no members"),
        (lambda: ensemble([torch.zeros(3, 2), torch.zeros(3, 4)], torch.zeros(3)), DiversityError, "one split"),
        (lambda: ensemble([torch.zeros(3, 2)], torch.zeros(4)), DiversityError, "one split"),
        (lambda: independent_disagreement(101, 50, 10), DiversityError, "0 to 100"),
        (lambda: independent_disagreement(50, 50, 1), DiversityError, "2 classes"),
        (lambda: distances([]), DiversityError, "no masks"),
        (lambda: distances([M, W]), DiversityError, "other than 0 and 1"),
        (lambda: distances([M, {"w": torch.ones(4)}]), OverlapError, "shape"),
        (lambda: random_distance(M, 9), DiversityError, "fraction kept"),
        (lambda: random_distance(M, {"v": 0.5}), DiversityError, "one density a layer"),
        (lambda: embed([[0.0, 1.0]]), DiversityError, "no distances"),
        (lambda: embed([[0.0, 1.0], [2.0, 0.0]]), DiversityError, "no distances"),
        (lambda: embed([[0.0, math.nan], [math.nan, 0.0]]), DiversityError, "no distances"),
        (lambda: embed([[1.0, 1.0], [1.0, 1.0]]), DiversityError, "no distances"),
        (lambda: interpolated(W, W, 1.5, 0.5), DiversityError, "from 0 to 1"),
        (lambda: interpolated(W, {"v": W["w"]}, 0.5, 0.5), OverlapError, "Only one side"),
        (lambda: interpolated(W, {"w": torch.tensor([1.0, math.inf, 2.0])}, 0.5, 0.5), DiversityError, "infinite"),
        (lambda: barrier([1.0, 2.0]), DiversityError, "at least three"),
        (lambda: barrier([1.0, 2.0, 3.0], [0.0, 1.0]), DiversityError, "one t a value"),
        (lambda: barrier([1.0, 2.0, 3.0], [0.0, 0.0, 1.0]), DiversityError, "increasing"),
        (lambda: barrier([1.0, math.inf, 3.0]), DiversityError, "diverged"),
        (lambda: barrier([1.0, 2.0, 3.0], of="points"), DiversityError, "accuracy"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, says):
    with pytest.raises(error, match=says) as e:
        call()
    sentence(e)


def test_bad_calls_on_searches(small):
    a = found(small, 0)
    with pytest.raises(DiversityError, match="at least 2") as e:
        path(a, a, small, 1)
    sentence(e)
    with pytest.raises(DiversityError, match="no val images") as e:
        logits(a.model, datasets.load("mnist", train_size=100), "val")
    sentence(e)
