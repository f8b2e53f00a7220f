"Overlap measures: against plain counting, their chance level against enumeration, scipy and simulation."

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lth_companion.measures.correlation import (
    Overlap,
    OverlapError,
    cosine,
    hamming,
    intersection_law,
    jaccard,
    matching,
    overlap,
    pearson,
    sign_agreement,
)
from lth_companion.selection import SelectionError
from lth_companion.tickets import generator

bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)


def two_masks(pairs, cut):
    "Two masks of one or two layers from pairs of bits."
    parts = {"a": pairs[:cut], "b": pairs[cut:]}
    return tuple(
        {n: torch.tensor([float(p[side]) for p in part]) for n, part in parts.items() if part} for side in (0, 1)
    )


def random_masks(sizes, kept, *purpose):
    g, masks = generator(0, *purpose), {}
    for n, size in sizes.items():
        masks[n] = torch.zeros(size)
        masks[n][torch.randperm(size, generator=g)[: kept[n]]] = 1
    return masks


# ---------------------------------------------------------------- values


@given(bits, st.integers(0, 30))
def test_values_are_those_of_plain_sets(pairs, cut):
    a, b = two_masks(pairs, cut)
    one, two = ({i for i, p in enumerate(pairs) if p[side]} for side in (0, 1))
    assert float(hamming(a, b)) == pytest.approx(len(one ^ two) / len(pairs))
    assert float(matching(a, b)) == pytest.approx(100 - 100 * len(one ^ two) / len(pairs))
    if one | two:
        assert float(jaccard(a, b)) == pytest.approx(len(one & two) / len(one | two))
    else:
        with pytest.raises(OverlapError, match="empty"):
            jaccard(a, b)


@given(bits, st.integers(0, 30))
def test_measures_are_symmetric(pairs, cut):
    a, b = two_masks(pairs, cut)
    for measure in (hamming, matching) + ((jaccard,) if any(x or y for x, y in pairs) else ()):
        x, y = measure(a, b), measure(b, a)
        assert (x.value, x.null_mean, x.null_sd) == pytest.approx((y.value, y.null_mean, y.null_sd))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_of_mask(dtype):
    masks = [
        {n: m.to(t) for n, m in random_masks({"w": 90}, {"w": 30}, k).items()}
        for k, t in enumerate((dtype, torch.float32))
    ]
    plain = [random_masks({"w": 90}, {"w": 30}, k) for k in (0, 1)]
    assert float(jaccard(*masks)) == float(jaccard(*plain)) and 0 < float(jaccard(*plain)) < 1


# ---------------------------------------------------------------- chance


@given(bits, st.integers(0, 3))
def test_the_null_is_the_mean_over_all_placements(pairs, cut):
    "Every placement of b within its layers, counted one by one."
    pairs = pairs[:8]
    a, b = two_masks(pairs, cut)
    if not any(x or y for x, y in pairs):
        return
    layers = [(m.numel(), int(m.sum())) for m in b.values()]
    moved = []
    for choice in itertools.product(*(itertools.combinations(range(n), k) for n, k in layers)):
        placed = {name: torch.zeros(n) for name, (n, _) in zip(b, layers)}
        for name, places in zip(b, choice):
            placed[name][list(places)] = 1
        moved.append(placed)
    for measure in (jaccard, hamming, matching):
        every = np.array([float(measure(a, m)) for m in moved])
        null = measure(a, b)
        assert null.null_mean == pytest.approx(every.mean(), abs=1e-9) and null.null_sd == pytest.approx(
            every.std(), abs=1e-7
        )


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_one_layer_is_hypergeometric(n, x, y):
    a, b = round(x * n), round(y * n)
    values, p = intersection_law([(n, a, b)])
    assert p.sum() == pytest.approx(1) and (p >= 0).all()
    assert p == pytest.approx(stats.hypergeom(n, a, b).pmf(values), abs=1e-11)


def test_layers_add():
    counts = [(50, 20, 10), (30, 5, 29), (7, 0, 3), (4, 4, 2), (1, 1, 1), (0, 0, 0)]
    values, p = intersection_law(counts)
    want = np.ones(1)
    for n, a, b in counts:
        want = np.convolve(want, [stats.hypergeom(n, a, b).pmf(k) if n else 1.0 for k in range(min(a, b) + 1)])
    got = np.zeros(len(want))
    got[values] = p
    assert got == pytest.approx(want, abs=1e-12)


def test_the_law_of_a_large_network():
    "Sixty layers of a million weights: moments equal the closed forms, whatever the convolution."
    counts = [(10**6, 50_000 + 7000 * k, 200_000 - 3000 * k) for k in range(60)]
    values, p = intersection_law(counts)
    laws = [stats.hypergeom(*c) for c in counts]
    mean, variance = sum(law.mean() for law in laws), sum(law.var() for law in laws)
    assert values @ p == pytest.approx(mean, rel=1e-9)
    assert (values - values @ p) ** 2 @ p == pytest.approx(variance, rel=1e-6)


def test_chance_of_jaccard_is_not_the_ratio_of_expectations():
    "Exact for a ratio: two of four against two of four give 0, 1/3 and 1 with probabilities 1/6, 4/6 and 1/6."
    a = {"w": torch.tensor([1.0, 1.0, 0.0, 0.0])}
    null = jaccard(a, a)
    assert null.null_mean == pytest.approx(2 / 9 + 1 / 6) and null.null_mean != pytest.approx(1 / 3, abs=0.02)
    assert null.null_sd == pytest.approx(math.sqrt(4 / 6 / 9 + 1 / 6 - (2 / 9 + 1 / 6) ** 2))


def test_layer_counts_are_fixed():
    "Two masks that agree only on keeping one small layer whole stand at chance."
    sizes, kept = {"big": 5000, "small": 40}, {"big": 50, "small": 40}
    found = jaccard(random_masks(sizes, kept, 1), random_masks(sizes, kept, 2))
    assert float(found) > 0.25 and abs(found.z) < 4
    pooled = jaccard(*({"all": torch.cat(list(random_masks(sizes, kept, k).values()))} for k in (1, 2)))
    assert pooled.z > 20


@pytest.mark.parametrize("measure", [jaccard, hamming, matching])
def test_null_against_simulation(measure):
    sizes, kept = {"fc1": 3000, "fc2": 400, "fc3": 40}, {"fc1": 50, "fc2": 80, "fc3": 20}
    found = [measure(random_masks(sizes, kept, "a", k), random_masks(sizes, kept, "b", k)) for k in range(400)]
    null, values = found[0], np.array([float(f) for f in found])
    assert abs(values.mean() - null.null_mean) < 4 * null.null_sd / 20
    assert values.std(ddof=1) / null.null_sd == pytest.approx(1, abs=0.15)  # 4 standard errors


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_null_of_weights_against_simulation(scope):
    g, shapes = generator(0, "simulated"), {"a": (40, 30), "b": (30, 10)}

    def draw():
        return {n: torch.randn(s, generator=g) for n, s in shapes.items()}

    found = [overlap(draw(), draw(), 0.1, scope) for _ in range(400)]
    z = np.array([f.z for f in found])
    assert abs(z.mean()) < 0.2 and z.std(ddof=1) == pytest.approx(1, abs=0.15)
    if scope == "layer":
        assert found[0].null_mean == pytest.approx(0.1) and len({f.null_mean for f in found}) == 1


SMALL = {"conv": (12, 3, 3), "fc": (30, 41), "out": (9, 7)}  # 108, 1230 and 63 weights: rounding and N - 1 both show


def normal(g, shapes=SMALL):
    return {n: torch.randn(s, generator=g) for n, s in shapes.items()}


def holds(found, null_mean, null_sd):
    "The acceptance of R_p: mean within three standard errors of the exact null, standard deviation within 5 % of it."
    values = np.array([float(f) for f in found])
    assert abs(values.mean() - null_mean) < 3 * null_sd / len(values) ** 0.5
    assert values.std(ddof=1) / null_sd == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("p", [0.1, 0.37])
@pytest.mark.parametrize("form", ["dense-dense", "sparse-sparse", "sparse-dense"])
def test_r_p_of_independent_rankings(form, p):
    "2,000 draws. A binomial null, or N for N - 1 in one small layer, would be refused in the standard deviation."
    g = generator(2, "rankings")
    mask = {n: (torch.rand(s, generator=g) < 0.6).float() for n, s in SMALL.items()}

    def one():
        a, b = normal(g), normal(g)
        if form == "dense-dense":
            return overlap(a, b, p)
        if form == "sparse-sparse":
            return overlap(
                {n: w * mask[n] for n, w in a.items()}, {n: w * mask[n] for n, w in b.items()}, p, masks=mask
            )
        drawn = {n: torch.rand(w.shape, generator=g) < 0.6 for n, w in a.items()}  # a mask of its own in each draw
        return overlap({n: w * drawn[n] for n, w in a.items()}, b, p)

    found = [one() for _ in range(2000)]
    sizes = [int(m.sum()) if form == "sparse-sparse" else m.numel() for m in mask.values()]
    laws, scale = [stats.hypergeom(n, round(p * n), round(p * n)) for n in sizes], p * sum(sizes)
    mean, sd = sum(law.mean() for law in laws) / scale, math.sqrt(sum(law.var() for law in laws)) / scale
    assert {(f.null_mean, f.null_sd) for f in found} == {(found[0].null_mean, found[0].null_sd)}
    assert (found[0].null_mean, found[0].null_sd) == pytest.approx((mean, sd), rel=1e-12)
    binomial = math.sqrt(sum(round(p * n) * p * (1 - p) for n in sizes)) / scale
    assert abs(binomial / sd - 1) > 0.05  # the tolerance tells them apart
    holds(found, mean, sd)


def test_given_the_mask_chance_knows_the_mask():
    "Weights drawn anew under a magnitude mask of b: far above p against all places, at chance within the mask."
    g = generator(0, "given")
    b = normal(g)
    mask = {n: (w.abs() > 0.7).float() for n, w in b.items()}
    found = [overlap({n: w * mask[n] for n, w in normal(g).items()}, b, 0.3, given=mask) for _ in range(2000)]
    assert len({(f.null_mean, f.null_sd) for f in found}) == 1
    holds(found, found[0].null_mean, found[0].null_sd)
    plain = overlap({n: w * mask[n] for n, w in normal(g).items()}, b, 0.3)
    assert plain.null_mean == pytest.approx(0.3, abs=0.005) and found[0].null_mean > 0.55 and plain.z > 10


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("measure", [sign_agreement, pearson, cosine])
def test_values_permuted_within_layers(measure, masked):
    "2,000 permutations of skewed weights whose layers differ in mean and scale, some of them 0."
    g = generator(1, "permuted")

    def make():
        return {
            n: k * (w + 0.4 * k).exp().sub(1.2) * (torch.rand(w.shape, generator=g) < 0.9)
            for k, (n, w) in enumerate(normal(g).items(), 1)
        }

    a, b = make(), make()
    mask = {n: (torch.rand(w.shape, generator=g) < 0.5).float() for n, w in a.items()} if masked else None

    def permuted():
        out = {}
        for n, w in b.items():
            out[n] = w.clone().flatten()
            places = torch.arange(w.numel()) if mask is None else mask[n].flatten().nonzero().flatten()
            out[n][places] = out[n][places[torch.randperm(len(places), generator=g)]]
            out[n] = out[n].reshape(w.shape)
        return out

    found, null = [measure(a, permuted(), mask) for _ in range(2000)], measure(a, b, mask)
    assert all((f.null_mean, f.null_sd) == pytest.approx((null.null_mean, null.null_sd), rel=1e-6) for f in found)
    holds(found, null.null_mean, null.null_sd)


tiny = st.lists(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=4), min_size=1, max_size=2
)


@settings(max_examples=30)
@given(tiny)
def test_moments_over_all_permutations(layers):
    "Every permutation within every layer, ties and zeros included, counted one by one."
    a, b = ({str(i): torch.tensor([float(p[side]) for p in law]) for i, law in enumerate(layers)} for side in (0, 1))
    orders = list(itertools.product(*(itertools.permutations(range(len(law))) for law in layers)))
    moved = [{n: w[list(o)] for (n, w), o in zip(b.items(), order)} for order in orders]
    for measure in (sign_agreement, pearson, cosine):
        try:
            null = measure(a, b)
        except OverlapError as e:
            assert measure is not sign_agreement and re.search("are 0|are equal", str(e))
            continue
        every = np.array([float(measure(a, m)) for m in moved])
        assert null.null_mean == pytest.approx(every.mean(), abs=1e-9) and null.null_sd == pytest.approx(
            every.std(), abs=1e-7
        )


# ---------------------------------------------------------------- values of signs, correlation and cosine


@given(st.integers(0, 10**6))
def test_signs_pearson_and_cosine_equal_numpy(seed):
    g = generator(seed, "values")
    a, b = normal(g, {"u": (4, 5), "v": (7,)}), normal(g, {"u": (4, 5), "v": (7,)})
    x, y = (np.concatenate([w.double().numpy().ravel() for w in s.values()]) for s in (a, b))
    assert float(sign_agreement(a, b)) == (np.sign(x) == np.sign(y)).mean()
    assert float(cosine(a, b)) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert float(pearson({"u": a["u"]}, {"u": b["u"]})) == pytest.approx(np.corrcoef(x[:20], y[:20])[0, 1])
    u, v = (np.concatenate([(w - w.mean()).double().numpy().ravel() for w in s.values()]) for s in (a, b))
    assert float(pearson(a, b)) == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v), abs=1e-6)
    assert float(pearson(a, {n: 3 * w + k for k, (n, w) in enumerate(a.items())})) == pytest.approx(1, abs=1e-2)
    for measure in (sign_agreement, cosine, pearson):
        assert float(measure(a, a)) == pytest.approx(1) and measure(a, b).value == pytest.approx(measure(b, a).value)


@pytest.mark.parametrize(
    "measure", [sign_agreement, pearson, cosine, lambda a, b, masks: overlap(a, b, 0.3, masks=masks)]
)
def test_masks_leave_the_remaining_weights_and_nothing_else(measure):
    """What stands at pruned places (NaN even) does not matter, nor does a layer without weights left; a bool mask
    will do.
    """
    g = generator(3, "remaining")
    a, b = normal(g), normal(g)
    mask = {n: torch.rand(w.shape, generator=g) < 0.5 for n, w in a.items()} | {
        "out": torch.zeros(9, 7, dtype=torch.bool)
    }
    spoilt = {n: torch.where(mask[n], w, torch.nan) for n, w in b.items()}
    kept = [{n: w[mask[n]] for n, w in s.items() if n != "out"} for s in (a, b)]
    assert measure(a, spoilt, mask) == measure(a, b, {n: m.float() for n, m in mask.items()}) == measure(*kept, None)


# ---------------------------------------------------------------- R_p


def test_r_p_is_equation_1():
    "A ratio of sums over layers of different size, not a mean of ratios."
    a = {"x": torch.tensor([4.0, -3.0, 2.0, 1.0]), "y": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0])}
    b = {"x": torch.tensor([4.0, 3.0, 2.0, 1.0]), "y": torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])}
    assert float(overlap(a, b, 0.5)) == (2 + 0) / (0.5 * 12)
    assert float(overlap(a, b, 0.75)) == pytest.approx((3 + 4) / (0.75 * 12))


def test_scope_global_takes_the_largest_of_all():
    a = {"x": torch.tensor([10.0, 9.0, 8.0]), "y": torch.tensor([1.0, 2.0, 3.0])}
    b = {"x": torch.tensor([1.0, 2.0, 3.0]), "y": torch.tensor([10.0, 9.0, 8.0])}
    assert float(overlap(a, b, 0.5, "global")) == 0 and float(overlap(a, a, 0.5, "global")) == 1
    assert overlap(a, b, 0.5, "global").null_mean == 0  # what each keeps lies in different layers
    assert float(overlap(a, b, 1 / 3)) == 0 and float(overlap(a, b, 1.0)) == 1


@given(st.integers(0, 10**6), st.floats(0.01, 1))
def test_sign_and_scale_do_not_matter(seed, p):
    g = generator(seed, "scale")
    a, b = ({"u": torch.randn(20, generator=g), "v": torch.randn(6, 5, generator=g)} for _ in range(2))
    if round(p * 20) + round(p * 30) == 0:
        return
    other = {"u": -4 * b["u"], "v": b["v"] / 8}
    assert overlap(a, b, p) == overlap(a, other, p) == overlap(b, a, p)
    assert float(overlap(a, a, p)) == pytest.approx((round(p * 20) + round(p * 30)) / (p * 50))


def test_sparse_and_sparse_is_equation_1_over_what_is_left():
    a = {"x": torch.tensor([9.0, 8.0, 1.0, 2.0, 3.0, 4.0]), "y": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    b = {"x": torch.tensor([0.0, 9.0, 4.0, 3.0, 2.0, 1.0]), "y": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    masks = {"x": torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), "y": torch.tensor([0.0, 1.0, 1.0, 0.0])}
    assert float(overlap(a, b, 0.5, masks=masks)) == (0 + 0) / (0.5 * 6) and float(overlap(a, a, 0.5, masks=masks)) == 1
    assert overlap(a, b, 0.5, masks=masks).null_mean == pytest.approx((2 * 2 / 4 + 1 * 1 / 2) / 3)
    # round(.25 * 6) = 2, both hold the 8
    assert float(overlap(a, b, 0.25, masks={"x": torch.ones(6), "y": torch.zeros(4)})) == 1 / 1.5
    # no layer has a weight at this p: no value, no chance
    assert overlap(a, b, 0.1, masks=masks) == Overlap(0.0, 0.0, 0.0)


@pytest.mark.parametrize("scope", ["layer", "global"])
@given(st.integers(0, 10**6), st.floats(0.05, 0.9), st.floats(0.05, 1))
def test_the_largest_p_named_is_one_that_works(scope, seed, density, p):
    g = generator(seed, "largest")
    b = normal(g, {"u": (9, 11), "v": (47,)})
    a = {n: w * (torch.rand(w.shape, generator=g) < density) for n, w in b.items()}
    try:
        overlap(a, b, p, scope)
    except OverlapError as e:
        if named := float(re.search(r"at most ([\d.e-]+)\)", str(e))[1]):
            overlap(a, b, named, scope)
            with pytest.raises(OverlapError):
                overlap(a, b, named + 0.03, scope)
        assert named < p


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("p", [0, 9, -1, 1.0001, math.nan, "much", None])
def test_a_bad_p_is_one_sentence(p):
    w = {"x": torch.randn(40, generator=generator(0, "w"))}
    with pytest.raises(SelectionError, match="p of R_p is .* above 0 and at most 1") as e:
        overlap(w, w, p)
    assert "\n" not in str(e.value)


def test_bad_masks_and_values_are_one_sentence_each():
    w = {"x": torch.randn(4, 5, generator=generator(0, "w"))}
    measures = (sign_agreement, pearson, cosine, lambda a, b, masks=None: overlap(a, b, 0.5, masks=masks))
    for measure in measures:
        for masks, said in (
            ({"x": torch.ones(5, 4)}, r"\(5, 4\)"),
            ({"x": 0.5 * torch.ones(4, 5)}, "other than 0 and 1"),
            ({"x": torch.full((4, 5), math.nan)}, "other than 0 and 1"),
            ({"y": torch.ones(4, 5)}, "has a mask and no weights"),
            ({"x": torch.zeros(4, 5)}, "nothing to compare"),
            ({}, "one mask a layer"),
        ):
            with pytest.raises(OverlapError, match=said) as e:
                measure(w, w, masks)
            assert "\n" not in str(e.value)
        with pytest.raises((OverlapError, SelectionError), match="NaN"):
            measure(w, {"x": w["x"] * math.nan})
        with pytest.raises(OverlapError, match="Only one side"):
            measure(w, {"z": w["x"]})
    for measure in measures[:3]:
        with pytest.raises(OverlapError, match="infinite"):
            measure({"x": w["x"] / 0}, w)
    with pytest.raises(OverlapError, match="are 0"):
        cosine(w, {"x": 0 * w["x"]})
    with pytest.raises(OverlapError, match="are equal"):
        pearson(w, {"x": torch.full((4, 5), 0.1)})
    with pytest.raises(OverlapError, match="pass one of them"):
        overlap(w, w, 0.5, masks={"x": torch.ones(4, 5)}, given={"x": torch.ones(4, 5)})
    with pytest.raises(OverlapError, match="masked weights first"):
        overlap(w, w, 0.5, given={"x": torch.zeros(4, 5)})


def test_refusals():
    a, w = {"x": torch.tensor([1.0, 0.0])}, {"x": torch.randn(40, generator=generator(0, "w"))}
    with pytest.raises(OverlapError, match="nothing"):
        jaccard({}, {})
    with pytest.raises(OverlapError, match="Only one side has y"):
        hamming(a, a | {"y": a["x"]})
    with pytest.raises(OverlapError, match=r"\(2,\).*\(3,\)"):
        jaccard(a, {"x": torch.zeros(3)})
    with pytest.raises(OverlapError, match="other than 0 and 1"):
        matching(w, w)
    with pytest.raises(OverlapError, match="smaller p"):
        overlap(w, {"x": w["x"] * (w["x"] > 0)}, 0.9)
    with pytest.raises(SelectionError, match="NaN"):
        overlap(w, {"x": w["x"] * math.nan}, 0.5)
    for p in (0, 9, -1, math.nan):
        with pytest.raises(SelectionError):
            overlap(w, w, p)
    with pytest.raises(OverlapError, match="cannot be kept"):
        intersection_law([(10, 3, -1)])


def test_converts_to_float():
    found = Overlap(0.5, 0.25, 0.05)
    assert float(found) == 0.5 and found.z == pytest.approx(5) and np.mean([float(found)] * 2) == 0.5
    assert "0.5" in str(found) and "0.25" in str(found)
