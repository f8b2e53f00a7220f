"Overlap measures: against plain counting, their chance level against enumeration, scipy and simulation."
import itertools, math
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from scipy import stats
from lth_companion.correlation import Overlap, OverlapError, hamming, intersection_law, jaccard, matching, overlap
from lth_companion.selection import SelectionError
from lth_companion.tickets import generator

bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)

def two_masks(pairs, cut):
    "Two masks of one or two layers from pairs of bits."
    parts = {"a": pairs[:cut], "b": pairs[cut:]}
    return tuple({n: torch.tensor([float(p[side]) for p in part]) for n, part in parts.items() if part} for side in (0, 1))

def random_masks(sizes, kept, *purpose):
    g, masks = generator(0, *purpose), {}
    for n, size in sizes.items():
        masks[n] = torch.zeros(size)
        masks[n][torch.randperm(size, generator=g)[:kept[n]]] = 1
    return masks

# ---------------------------------------------------------------- values

@given(bits, st.integers(0, 30))
def test_values_are_those_of_plain_sets(pairs, cut):
    a, b = two_masks(pairs, cut)
    one, two = ({i for i, p in enumerate(pairs) if p[side]} for side in (0, 1))
    assert float(hamming(a, b)) == pytest.approx(len(one ^ two) / len(pairs))
    assert float(matching(a, b)) == pytest.approx(100 - 100 * len(one ^ two) / len(pairs))
    if one | two: assert float(jaccard(a, b)) == pytest.approx(len(one & two) / len(one | two))
    else:
        with pytest.raises(OverlapError, match="empty"): jaccard(a, b)

@given(bits, st.integers(0, 30))
def test_measures_are_symmetric(pairs, cut):
    a, b = two_masks(pairs, cut)
    for measure in (hamming, matching) + ((jaccard,) if any(x or y for x, y in pairs) else ()):
        x, y = measure(a, b), measure(b, a)
        assert (x.value, x.null_mean, x.null_sd) == pytest.approx((y.value, y.null_mean, y.null_sd))

@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_of_mask(dtype):
    masks = [{n: m.to(t) for n, m in random_masks({"w": 90}, {"w": 30}, k).items()} for k, t in enumerate((dtype, torch.float32))]
    plain = [random_masks({"w": 90}, {"w": 30}, k) for k in (0, 1)]
    assert float(jaccard(*masks)) == float(jaccard(*plain)) and 0 < float(jaccard(*plain)) < 1

# ---------------------------------------------------------------- chance

@given(bits, st.integers(0, 3))
def test_the_null_is_the_mean_over_all_placements(pairs, cut):
    "Every placement of b within its layers, counted one by one."
    pairs = pairs[:8]
    a, b = two_masks(pairs, cut)
    if not any(x or y for x, y in pairs): return
    layers = [(m.numel(), int(m.sum())) for m in b.values()]
    moved = []
    for choice in itertools.product(*(itertools.combinations(range(n), k) for n, k in layers)):
        placed = {name: torch.zeros(n) for name, (n, _) in zip(b, layers)}
        for name, places in zip(b, choice): placed[name][list(places)] = 1
        moved.append(placed)
    for measure in (jaccard, hamming, matching):
        every = np.array([float(measure(a, m)) for m in moved])
        null = measure(a, b)
        assert null.null_mean == pytest.approx(every.mean(), abs=1e-9) and null.null_sd == pytest.approx(every.std(), abs=1e-7)

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
    for n, a, b in counts: want = np.convolve(want, [stats.hypergeom(n, a, b).pmf(k) if n else 1. for k in range(min(a, b) + 1)])
    got = np.zeros(len(want)); got[values] = p
    assert got == pytest.approx(want, abs=1e-12)

def test_the_law_of_a_large_network():
    "Sixty layers of a million weights: moments equal the closed forms, whatever the convolution."
    counts = [(10**6, 50_000 + 7000 * k, 200_000 - 3000 * k) for k in range(60)]
    values, p = intersection_law(counts)
    laws = [stats.hypergeom(*c) for c in counts]
    mean, variance = sum(l.mean() for l in laws), sum(l.var() for l in laws)
    assert values @ p == pytest.approx(mean, rel=1e-9)
    assert (values - values @ p) ** 2 @ p == pytest.approx(variance, rel=1e-6)

def test_chance_of_jaccard_is_not_the_ratio_of_expectations():
    "Exact for a ratio: two of four against two of four give 0, 1/3 and 1 with probabilities 1/6, 4/6 and 1/6."
    a = {"w": torch.tensor([1., 1., 0., 0.])}
    null = jaccard(a, a)
    assert null.null_mean == pytest.approx(2 / 9 + 1 / 6) and null.null_mean != pytest.approx(1 / 3, abs=.02)
    assert null.null_sd == pytest.approx(math.sqrt(4 / 6 / 9 + 1 / 6 - (2 / 9 + 1 / 6) ** 2))

def test_layer_counts_are_fixed():
    "Two masks that agree only on keeping one small layer whole stand at chance."
    sizes, kept = {"big": 5000, "small": 40}, {"big": 50, "small": 40}
    found = jaccard(random_masks(sizes, kept, 1), random_masks(sizes, kept, 2))
    assert float(found) > .25 and abs(found.z) < 4
    pooled = jaccard(*({"all": torch.cat(list(random_masks(sizes, kept, k).values()))} for k in (1, 2)))
    assert pooled.z > 20

@pytest.mark.parametrize("measure", [jaccard, hamming, matching])
def test_null_against_simulation(measure):
    sizes, kept = {"fc1": 3000, "fc2": 400, "fc3": 40}, {"fc1": 50, "fc2": 80, "fc3": 20}
    found = [measure(random_masks(sizes, kept, "a", k), random_masks(sizes, kept, "b", k)) for k in range(400)]
    null, values = found[0], np.array([float(f) for f in found])
    assert abs(values.mean() - null.null_mean) < 4 * null.null_sd / 20
    assert values.std(ddof=1) / null.null_sd == pytest.approx(1, abs=.15)      # 4 standard errors

@pytest.mark.parametrize("scope", ["layer", "global"])
def test_null_of_weights_against_simulation(scope):
    g, shapes = generator(0, "simulated"), {"a": (40, 30), "b": (30, 10)}
    draw = lambda: {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    found = [overlap(draw(), draw(), .1, scope) for _ in range(400)]
    z = np.array([f.z for f in found])
    assert abs(z.mean()) < .2 and z.std(ddof=1) == pytest.approx(1, abs=.15)
    if scope == "layer": assert found[0].null_mean == pytest.approx(.1) and len({f.null_mean for f in found}) == 1

# ---------------------------------------------------------------- R_p

def test_r_p_is_equation_1():
    "A ratio of sums over layers of different size, not a mean of ratios."
    a = {"x": torch.tensor([4., -3., 2., 1.]), "y": torch.tensor([1., 2., 3., 4., 5., 6., 7., -8.])}
    b = {"x": torch.tensor([4., 3., 2., 1.]), "y": torch.tensor([8., 7., 6., 5., 4., 3., 2., 1.])}
    assert float(overlap(a, b, .5)) == (2 + 0) / (.5 * 12)
    assert float(overlap(a, b, .75)) == pytest.approx((3 + 4) / (.75 * 12))

def test_scope_global_takes_the_largest_of_all():
    a = {"x": torch.tensor([10., 9., 8.]), "y": torch.tensor([1., 2., 3.])}
    b = {"x": torch.tensor([1., 2., 3.]), "y": torch.tensor([10., 9., 8.])}
    assert float(overlap(a, b, .5, "global")) == 0 and float(overlap(a, a, .5, "global")) == 1
    assert overlap(a, b, .5, "global").null_mean == 0          # what each keeps lies in different layers
    assert float(overlap(a, b, 1 / 3)) == 0 and float(overlap(a, b, 1.)) == 1

@given(st.integers(0, 10**6), st.floats(.01, 1))
def test_sign_and_scale_do_not_matter(seed, p):
    g = generator(seed, "scale")
    a, b = ({"u": torch.randn(20, generator=g), "v": torch.randn(6, 5, generator=g)} for _ in range(2))
    if round(p * 20) + round(p * 30) == 0: return
    other = {"u": -4 * b["u"], "v": b["v"] / 8}
    assert overlap(a, b, p) == overlap(a, other, p) == overlap(b, a, p)
    assert float(overlap(a, a, p)) == pytest.approx((round(p * 20) + round(p * 30)) / (p * 50))

# ---------------------------------------------------------------- refusals

def test_refusals():
    a, w = {"x": torch.tensor([1., 0.])}, {"x": torch.randn(40, generator=generator(0, "w"))}
    with pytest.raises(OverlapError, match="nothing"): jaccard({}, {})
    with pytest.raises(OverlapError, match="Only one side has y"): hamming(a, a | {"y": a["x"]})
    with pytest.raises(OverlapError, match=r"\(2,\).*\(3,\)"): jaccard(a, {"x": torch.zeros(3)})
    with pytest.raises(OverlapError, match="other than 0 and 1"): matching(w, w)
    with pytest.raises(OverlapError, match="smaller p"): overlap(w, {"x": w["x"] * (w["x"] > 0)}, .9)
    with pytest.raises(SelectionError, match="NaN"): overlap(w, {"x": w["x"] * math.nan}, .5)
    for p in (0, 9, -1, math.nan):
        with pytest.raises(SelectionError): overlap(w, w, p)
    with pytest.raises(OverlapError, match="cannot be kept"): intersection_law([(10, 3, -1)])

def test_converts_to_float():
    found = Overlap(.5, .25, .05)
    assert float(found) == .5 and found.z == pytest.approx(5) and np.mean([float(found)] * 2) == .5
    assert "0.5" in str(found) and "0.25" in str(found)
