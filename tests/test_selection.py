"Selection: exact count, one rule for ties, monotone in density, blind to scale; held against a plain sort."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lth_companion.selection import SelectionError, count, erk, keep_top, smart_ratio, uniform
from lth_companion.tickets import generator

values = st.lists(st.integers(-4, 4), min_size=1, max_size=60)  # few distinct values: ties everywhere
densities = st.floats(1e-3, 1.0)


def reference(flat, k):
    "The k largest of a list; among equals the first."
    keep = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k]
    return [1.0 if i in set(keep) else 0.0 for i in range(len(flat))]


def layers(flat, cut):
    cut = min(cut, len(flat))
    parts = {"a": flat[:cut], "b": flat[cut:]}
    return {n: torch.tensor(p, dtype=torch.float32) for n, p in parts.items() if p}


@given(values, densities, st.integers(0, 60))
def test_equals_a_sort_with_ties_by_position(flat, density, cut):
    masks = keep_top(layers(flat, cut), density)
    assert torch.cat(list(masks.values())).tolist() == reference(flat, count(density, len(flat)))


@given(values, densities, st.integers(0, 60))
def test_by_layer_equals_a_sort_of_each(flat, density, cut):
    scores = layers(flat, cut)
    for name, mask in keep_top(scores, density, scope="layer").items():
        assert mask.tolist() == reference(scores[name].tolist(), count(density, scores[name].numel()))


@given(values, st.tuples(densities, densities))
def test_a_larger_density_keeps_what_a_smaller_one_kept(flat, pair):
    small, large = (keep_top({"a": torch.tensor(flat, dtype=torch.float32)}, d)["a"] for d in sorted(pair))
    assert bool((small <= large).all())


@given(values, densities, st.sampled_from([2.0**k for k in range(-20, 21)]))
def test_scale_does_not_matter(flat, density, scale):
    s = torch.tensor(flat, dtype=torch.float32)
    assert torch.equal(keep_top({"a": s}, density)["a"], keep_top({"a": s * scale}, density)["a"])


@given(values, densities, st.integers(0, 5))
def test_seeded_ties_keep_the_same_values_and_count(flat, density, seed):
    s = torch.tensor(flat, dtype=torch.float32)
    plain, drawn = keep_top({"a": s}, density)["a"], keep_top({"a": s}, density, generator=generator(seed, "ties"))["a"]
    assert sorted(s[plain == 1].tolist()) == sorted(s[drawn == 1].tolist())


def test_seeded_ties_are_drawn_evenly():
    "Of ten equal scores each is kept about half of the time."
    kept = sum(keep_top({"a": torch.zeros(10)}, 0.5, generator=generator(s, "ties"))["a"] for s in range(400)) / 400
    assert float((kept - 0.5).abs().max()) < 0.12  # 4.8 standard errors


@given(values.filter(lambda v: len(v) > 1), densities, st.integers(0, 59))
def test_nan_is_refused_wherever_it_stands(flat, density, at):
    s = torch.tensor(flat, dtype=torch.float32)
    s[at % len(flat)] = float("nan")
    if count(density, len(flat)):
        with pytest.raises(SelectionError, match="NaN"):
            keep_top({"a": s}, density)


def test_minus_infinity_is_never_kept():
    s = torch.tensor([1.0, -torch.inf, 0.0, -torch.inf])
    assert keep_top({"a": s}, 0.5)["a"].tolist() == [1, 0, 1, 0]
    with pytest.raises(SelectionError, match="smaller density"):
        keep_top({"a": s}, 0.75)


@pytest.mark.parametrize("density", [0, 9, -1, float("nan"), float("inf"), "much", None])
def test_a_bad_density_is_one_sentence(density):
    with pytest.raises(SelectionError, match="fraction of weights kept") as e:
        keep_top({"a": torch.ones(3)}, density)
    assert "\n" not in str(e.value)


def test_half_precision_is_compared_in_float32():
    s = torch.linspace(0, 1, 1000).to(torch.bfloat16)
    mask = keep_top({"a": s}, 0.3)["a"]
    assert mask.dtype == torch.bfloat16 and int(mask.float().sum()) == 300


def test_the_sizes_that_peers_miscount():
    assert count(0.1, 1528) == 153 and count(0.005, 266_200) == 1331 and count(1.0, 7) == 7


@given(st.floats(0.001, 1.0))
@settings(max_examples=50)
def test_erk_totals_the_density_and_stays_below_one(density):
    shapes = {"a": (64, 3, 3, 3), "b": (128, 64, 3, 3), "c": (10, 128)}
    got = erk(shapes, density)
    total = sum(got[n] * np.prod(s) for n, s in shapes.items()) / sum(np.prod(s) for s in shapes.values())
    assert total == pytest.approx(density, rel=1e-9) and max(got.values()) <= 1 + 1e-12
    assert uniform(shapes, density) == dict.fromkeys(shapes, density)


RESNET = (
    {"conv1": (16, 3, 3, 3)}
    | {f"conv{i}": (16, 16, 3, 3) for i in range(2, 8)}
    | {"down": (32, 16, 3, 3), "conv9": (32, 32, 3, 3), "fc": (10, 32)}
)


@given(st.floats(1e-4, 1.0), st.sampled_from([0.1, 0.3, 1.0]), st.booleans(), st.integers(1, 10))
def test_smart_ratio_totals_the_density_and_stays_within_0_and_1(density, last, vgg, layers):
    shapes = dict(list(RESNET.items())[-layers:])
    got, size = smart_ratio(shapes, density, last, vgg), {n: np.prod(s) for n, s in shapes.items()}
    assert list(got) == list(shapes) and 0 < min(got.values()) and max(got.values()) <= 1
    assert sum(got[n] * size[n] for n in got) == pytest.approx(density * sum(size.values()), rel=1e-9)
    body = [got[n] for n in list(shapes)[:-1]]
    assert all(x >= y for x, y in zip(body, body[1:]))  # falls with depth


def smart_reference(sizes, density, vgg):
    "Su et al.'s ratios by bisection on the scale, for densities at which 0.3 of the last layer can stand."
    L, low, high = len(sizes), 0.0, 100.0
    ratio = [((L - layer + 1) ** 2 + (L - layer + 1)) / (layer**2 if vgg else 1) for layer in range(1, L)]
    for _ in range(200):
        gamma = (low + high) / 2
        kept = 0.3 * sizes[-1] + sum(min(1, gamma * r) * n for r, n in zip(ratio, sizes))
        low, high = (gamma, high) if kept < density * sum(sizes) else (low, gamma)
    return [min(1, gamma * r) for r in ratio] + [0.3]


@pytest.mark.parametrize("vgg", [False, True])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9])
def test_smart_ratio_is_the_papers(density, vgg):
    "Layers that would exceed 1 included; ten layers, so the first has 10^2 + 10 and the ninth 2^2 + 2."
    got = smart_ratio(RESNET, density, vgg=vgg)
    assert list(got.values()) == pytest.approx(
        smart_reference([np.prod(s) for s in RESNET.values()], density, vgg), rel=1e-9
    )
    if density == 0.02 and not vgg:
        assert got["conv1"] / got["conv9"] == pytest.approx(110 / 6)


def test_smart_ratio_at_the_ends():
    shapes = {"a": (10, 10), "b": (10, 10), "fc": (10, 10)}
    assert smart_ratio(shapes, 0.1)["fc"] == pytest.approx(0.15)  # half of 30 kept, not 30
    assert smart_ratio(shapes, 0.2)["fc"] == pytest.approx(0.3)
    assert smart_ratio(shapes, 0.95) == pytest.approx({"a": 1, "b": 1, "fc": 0.85})
    assert smart_ratio(shapes, 1.0) == {"a": 1.0, "b": 1.0, "fc": 1.0} and smart_ratio({"fc": (3, 4)}, 0.25) == {
        "fc": 0.25
    }
    kept = keep_top(
        {n: torch.rand(s, generator=generator(0, n)) for n, s in shapes.items()},
        smart_ratio(shapes, 0.2),
        scope="layer",
    )
    assert {n: int(m.sum()) for n, m in kept.items()} == {"a": 20, "b": 10, "fc": 30}
    for bad in ((0, 0.3), (9, 0.3), (0.5, 0), (0.5, 30), (float("nan"), 0.3)):
        with pytest.raises(SelectionError, match="fraction of weights kept"):
            smart_ratio(shapes, *bad)
