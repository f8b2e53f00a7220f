"The statistics against brute force, scipy and simulation; the ledger; the judge."

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lth_companion.lab import claims as c
from lth_companion.lab import statistics
from lth_companion.lab.reported import lookup, welch

numbers = st.floats(-20, 20).map(lambda x: round(x, 2))


def brute_flip(d):
    far = abs(sum(d))
    hits = sum(
        abs(sum(s * x for s, x in zip(signs, d))) >= far - 1e-9 for signs in itertools.product((-1, 1), repeat=len(d))
    )
    return hits / 2 ** len(d)


@settings(max_examples=60)
@given(st.lists(numbers, min_size=1, max_size=9))
def test_sign_flip_equals_brute_force(d):
    p, exact = c.sign_flip(d)
    assert exact and p == pytest.approx(brute_flip(d), abs=1e-12)


def test_sign_flip_of_thirty_is_exact_and_near_the_t_test():
    d = np.random.default_rng(0).normal(0.4, 1, 30)
    p, exact = c.sign_flip(d)
    assert exact and p == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=0.2)
    assert p * 2**30 == pytest.approx(round(p * 2**30), abs=1e-6)  # a count of patterns


def test_sign_flip_beyond_forty_says_that_it_sampled(monkeypatch):
    d = np.random.default_rng(1).normal(0.5, 1, 12)
    exact = c.sign_flip(d)[0]
    monkeypatch.setattr(statistics, "EXACT_UP_TO", 5)
    p, said = c.sign_flip(d)
    assert not said and p == pytest.approx(exact, abs=5 * math.sqrt(exact / 1e6))
    assert c.sign_flip(d) == (p, said)  # seeded
    assert "Monte Carlo" in str(c.paired(d))


def test_paired_against_scipy():
    d = np.random.default_rng(2).normal(1, 2, 17)
    found, reference = c.paired(d), stats.ttest_1samp(d, 0)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert (found.low90, found.high90) == pytest.approx(tuple(reference.confidence_interval(0.90)))
    assert found.sd == pytest.approx(d.std(ddof=1)) and found.n == 17


@pytest.mark.parametrize("n", [1, 2, 5])
def test_no_p_below_six(n):
    assert c.paired(np.arange(n) + 1.0).p is None
    assert c.paired(np.arange(6) + 1.0).p == 2 / 2**6
    assert math.isnan(c.paired([1.0]).low)


@pytest.mark.parametrize("bad", [[], [float("nan")], [1.0, float("inf")], [[1.0], [2.0]]])
def test_paired_refuses(bad):
    with pytest.raises(ValueError, match="finite"):
        c.paired(bad)


def test_paired_interval_covers():
    rng, hits, hits90, trials = np.random.default_rng(3), 0, 0, 1500
    for _ in range(trials):
        found = c.paired(rng.normal(0.7, 1.3, 6))
        hits += found.low <= 0.7 <= found.high
        hits90 += found.low90 <= 0.7 <= found.high90
    assert abs(hits / trials - 0.95) < 0.02 and abs(hits90 / trials - 0.90) < 0.03


def test_sign_flip_keeps_its_level():
    rng = np.random.default_rng(4)
    rate = np.mean([c.sign_flip(rng.normal(0, 1, 8))[0] < 0.05 for _ in range(1500)])
    assert 0.03 < rate < 0.065


def test_welch_covers_and_equals_scipy():
    rng, hits = np.random.default_rng(5), 0
    for _ in range(1500):
        a, b = rng.normal(1, 1, 4), rng.normal(0, 3, 14)
        w = welch(a.mean(), a.std(ddof=1), 4, b.mean(), b.std(ddof=1), 14)
        hits += w["low"] <= 1 <= w["high"]
    assert abs(hits / 1500 - 0.95) < 0.02
    reference = stats.ttest_ind(a, b, equal_var=False)
    assert w["p"] == pytest.approx(reference.pvalue)
    assert (w["low"], w["high"]) == pytest.approx(tuple(reference.confidence_interval()))
    # the starred test of the thesis
    assert welch(a.mean(), a.std(ddof=1), 4, 0.5, 0, 14)["p"] == pytest.approx(stats.ttest_1samp(a, 0.5).pvalue)


def test_holm_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1 = .02 .03 .06 .04, running maximum .02 .03 .06 .06
    assert c.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert c.holm([0.5, 0.9]) == [1.0, 1.0] and c.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_closure_of_bonferroni(ps):
    "Closed testing: hypothesis i is rejected iff every subset that holds it is, each by Bonferroni."
    for i, adjusted in enumerate(c.holm(ps)):
        others = [j for j in range(len(ps)) if j != i]
        worst = max(
            min(1, (k + 1) * min([ps[i], *(ps[j] for j in chosen)]))
            for k in range(len(ps))
            for chosen in itertools.combinations(others, k)
        )
        assert adjusted == pytest.approx(worst)


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=20))
def test_benjamini_hochberg_equals_scipy(ps):
    assert statistics.benjamini_hochberg(ps) == pytest.approx(list(stats.false_discovery_control(ps)))


def test_noise_floor_is_the_rms_difference_of_two_copies():
    rng = np.random.default_rng(6)
    groups = rng.normal(0, 0.4, (4000, 3)) + rng.normal(90, 5, (4000, 1))
    floor = statistics.noise_floor(groups)
    assert floor.margin == pytest.approx(math.sqrt(np.mean((groups[:, 0] - groups[:, 1]) ** 2)), rel=0.05)
    assert float(floor) == floor.margin and floor.copies == 12000
    with pytest.raises(ValueError, match="two copies"):
        statistics.noise_floor([[1.0], []])


@pytest.mark.parametrize("mean,sd", [(1.0, 1.2), (-0.8, 0.7), (0.5, 1.6)])
def test_n_to_decide_has_eighty_percent_power(mean, sd):
    n = c.n_to_decide(mean, sd)
    d = np.random.default_rng(7).normal(mean, sd, (4000, n))
    power = (stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05).mean()
    assert power > 0.77 and (n == 6 or power < 0.87)


def test_n_to_decide_equivalence_and_ends():
    n = c.n_to_decide(0.05, 1.0, margin=0.6)
    d = np.random.default_rng(8).normal(0.05, 1.0, (4000, n))
    half = stats.t.ppf(0.95, n - 1) * d.std(axis=1, ddof=1) / math.sqrt(n)
    assert 0.75 < (np.abs(d.mean(axis=1)) + half <= 0.6).mean() < 0.87
    assert c.n_to_decide(0.0, 1.0) is None and c.n_to_decide(1.0, 0.0) == 6 and c.n_to_decide(0.0, 0.0) is None
    assert all(c.n_to_decide(m, 1.0) >= c.n_to_decide(m + 0.1, 1.0) for m in np.arange(0.1, 2, 0.1))
    with pytest.raises(ValueError, match="two seeds"):
        c.n_to_decide(1.0, float("nan"))


def test_shrink_is_james_stein_for_equal_variances():
    x, v = np.random.default_rng(9).normal(0, 2, 12), 0.5
    james_stein = x.mean() + (1 - (12 - 3) * v / ((x - x.mean()) ** 2).sum()) * (x - x.mean())
    assert statistics.shrink(x, [v] * 12)["shrunk"].to_numpy() == pytest.approx(james_stein)
    # no more spread than noise: all that k = 4 allows
    assert statistics.shrink([1.0, 1.1, 0.9, 1.0], [5.0] * 4)["weight"].to_numpy() == pytest.approx(2 / 3)
    for bad in ([[1.0, 2.0, 3.0], [1.0] * 3], [[1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 1.0, 1.0]]):
        with pytest.raises(ValueError):
            statistics.shrink(*bad)


def test_shrunk_intervals_cover_and_the_best_row_is_no_longer_flattered():
    rng, covered, flattered, honest = np.random.default_rng(10), [], [], []
    for _ in range(300):
        truth = rng.normal(90, 1, 25)
        v = rng.uniform(0.5, 1.5, 25)
        seen = truth + rng.normal(0, np.sqrt(v))
        fit = statistics.shrink(seen, v)
        best = int(np.argmax(seen))
        covered.append((abs(fit["shrunk"] - truth) < 1.96 * fit["sd"]).mean())
        flattered.append(seen[best] - truth[best])
        honest.append(fit["shrunk"][best] - truth[best])
    assert 0.935 < np.mean(covered) < 0.97
    assert np.mean(flattered) > 0.5 and abs(np.mean(honest)) < 0.3


@given(st.integers(1, 12), st.data())
def test_grim_accepts_every_possible_mean(n, data):
    values = data.draw(st.lists(st.integers(0, 10_000), min_size=n, max_size=n))
    assert statistics.grim(round(sum(values) / n / 100, 4), n)


def test_grim_refuses_by_brute_force():
    for n in (3, 4, 7):
        possible = {round(k / (100 * n), 4) for k in range(0, 100 * n + 1)}
        means = [round(k / 10**4, 4) for k in range(0, 10**4, 7)]
        assert [statistics.grim(m, n) for m in means] == [m in possible for m in means]
    with pytest.raises(ValueError):
        statistics.grim(90.0, 0)


# the ledger

LEDGER = c.ledger("learning_to_learn")
BY_ID = {claim.id: claim for claim in LEDGER}


@pytest.mark.parametrize("claim", [x for x in LEDGER if x.left and x.reported is not None], ids=lambda x: x.id)
def test_reported_differences_are_those_of_the_table(claim):
    from lth_companion.methods.stacking import Method

    sides = []
    for method in (claim.left, claim.right):
        m = Method.parse(method)
        sides.append(
            lookup("learning_to_learn", init=m.init, scorer=m.scorer, rounds=m.rounds, density=claim.density).accuracy
        )
    assert claim.reported == pytest.approx(sides[0] - sides[1], abs=0.0051)


def test_ledger_has_every_claim_of_the_issue():
    wanted = [
        "headline-0.005",
        "headline-significant",
        "headline-0.004",
        "headline-0.007",
        "headline-0.01",
        "iterative-magnitude",
        "iterative-snip",
        "iterative-synflow",
        "iterative-imp",
        "first-stage-headline",
        "saw-synflow",
        "saw-magnitude",
        "saw-grasp",
        "saw-snip",
        "order-snip-synflow",
        "stacking-adds",
        "factorial-mask",
        "factorial-weights",
        "freezing-snip",
        "redraw-fixed",
        "beat-0.005",
        "beat-0.005-fashion",
    ]
    assert set(wanted) <= set(BY_ID)
    assert BY_ID["headline-0.005"].reported == 2.03 and BY_ID["headline-0.005"].seeds_from == 100
    assert [BY_ID[f"saw-{s}"].direction for s in ("synflow", "magnitude", "grasp", "snip")] == [">", ">", "<", "<"]
    assert all("smoke" not in BY_ID[i].tiers for i in BY_ID if i.startswith("iterative"))
    assert all(x.reported is None for x in LEDGER if x.budget == "fixed 30 epochs")


ENTRY = '[[claim]]\nid = "a"\nstatement = "s"\nwhere = "w"\nstatistic = "t"\nnotebook = "01"\nfamily = "f"\n'


@pytest.mark.parametrize(
    "text,said",
    [
        (ENTRY + ENTRY, "twice"),
        (ENTRY + "nonsense = 1\n", "nonsense"),
        (ENTRY + 'direction = "up"\n', "direction"),
        (ENTRY + "reported = nan\n", "reported"),
        (ENTRY + 'source = "RECALLED"\nreported = 1.0\n', "must not state"),
        (ENTRY + 'same_contrast = "b"\n', "does not list"),
        ("[[claim", "not valid TOML"),
    ],
)
def test_ledger_refuses(tmp_path, text, said):
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(c.ClaimError, match=said) as error:
        c.ledger("x", file)
    assert "\n" not in str(error.value)


# the judge


def make(mean, sd, n, first=100, claim="headline-0.005", **kw):
    x = np.arange(n) - (n - 1) / 2
    d = mean + sd * x / x.std(ddof=1) if n > 1 else np.array([mean])
    return c.Measurement(claim=claim, differences=d, seeds=range(first, first + n), **kw)


@pytest.mark.parametrize(
    "found,word",
    [
        (make(1.5, 1, 20, noise=0.6), "reproduced"),
        (make(-1.5, 1, 20, noise=0.6), "contradicted"),
        (make(0.05, 0.5, 20, noise=0.6), "equivalent within m"),
        (make(0.3, 1.5, 20, noise=0.6), "undecided"),
        (make(3, 0.1, 5, noise=0.6), "undecided"),
        (make(1.5, 1, 20, first=0, noise=0.6), "undecided"),
        (make(0.3, 0.2, 20, noise=0.6), "reproduced"),
        (make(0.3, 0.2, 20), "reproduced"),
        (None, "not run at this tier"),
        (c.Measurement(claim="headline-0.005"), "not run at this tier"),
    ],
)
def test_verdicts(found, word):
    verdict = c.judge(BY_ID["headline-0.005"], found)
    assert verdict.word == word and word in c.VERDICTS
    assert verdict.text.startswith(word.replace(" m", " 0.60 points") if word.startswith("equi") else word)


def test_verdict_text_says_what_is_needed():
    claim = BY_ID["headline-0.005"]
    few = c.judge(claim, make(1.5, 1, 5, noise=0.6, data="mnist, 6,000 images"))
    assert "exploratory" in few.text and few.holm_p is None and "p =" not in few.text and "6,000 images" in few.text
    assert f"n = {c.n_to_decide(1.5, 1, 0.6)} would decide" in few.text
    assert (
        "inside the interval" in c.judge(claim, make(2.0, 1, 20)).text
        and "outside the interval" in c.judge(claim, make(0.9, 1, 20)).text
    )
    assert c.judge(claim, make(1.5, 1, 1)).n_needed is None


def test_not_worse_is_tested_against_the_margin():
    claim = BY_ID["iterative-synflow"].model_copy(update={"confirmatory": False})

    def judge(mean, **kw):
        return c.judge(claim, make(mean, 0.3, 12, claim=claim.id, **kw)).word

    assert (
        judge(0.2, noise=0.6) == "reproduced"
        and judge(-1.5, noise=0.6) == "contradicted"
        and judge(-0.6, noise=0.6) == "undecided"
    )
    # not worse by more than the margin, and on the wrong side of 0
    assert judge(-0.2, noise=0.6) == "equivalent within m"
    assert judge(1.0) == "undecided"  # no margin known


def test_equality_claim():
    claim = BY_ID["headline-0.005"].model_copy(update={"direction": "="})
    assert c.judge(claim, make(0.0, 0.3, 12, noise=0.6)).word == "reproduced"
    assert c.judge(claim, make(2.0, 0.3, 12, noise=0.6)).word == "contradicted"


def test_a_certain_difference_below_the_noise_of_one_run_says_so():
    verdict = c.judge(BY_ID["headline-0.005"], make(0.3, 0.2, 20, noise=0.6))
    assert verdict.word == "reproduced" and "smaller than the noise floor of one run (0.60 points)" in verdict.text
    assert "noise floor" not in c.judge(BY_ID["headline-0.005"], make(1.5, 1, 20, noise=0.6)).text


def test_an_interval_that_covers_zero_decides_nothing():
    "Nineteen small gains and one large: the flips are sure of the sign, the interval of nothing."
    verdict = c.judge(
        BY_ID["headline-0.005"],
        c.Measurement(claim="headline-0.005", differences=[0.5] * 19 + [40.0], seeds=range(100, 120), noise=0.6),
    )
    assert verdict.holm_p < 0.001 and verdict.paired.low < 0 and verdict.word == "undecided"


def test_equal_masks_are_equivalent_within_nothing():
    claim = BY_ID["stacking-adds"]
    verdict = c.judge(claim, c.Measurement(claim=claim.id, differences=[0.0] * 8, seeds=range(8), noise=0.0))
    assert verdict.word == "equivalent within m" and "within 0.00 points" in verdict.text


def test_judge_all_corrects_within_families_only():
    headline = [x for x in LEDGER if x.family == "headline"]
    found = [
        make(m, 1, 12, claim=i)
        for i, m in [
            ("headline-0.005", 1.0),
            ("headline-0.004", 0.9),
            ("headline-0.007", 0.75),
            ("headline-0.01", 0.65),
        ]
    ]
    other = make(0.65, 1, 12, claim="redraw")
    verdicts = {v.claim.id: v for v in c.judge_all(LEDGER, [*found, other])}
    raw = [c.paired(m.differences).p for m in found]
    assert [verdicts[m.claim].holm_p for m in found] == pytest.approx(c.holm(raw))
    assert verdicts["redraw"].holm_p == pytest.approx(c.paired(other.differences).p)  # alone in its family
    assert verdicts["headline-significant"].holm_p == verdicts["headline-0.005"].holm_p  # read again, not counted again
    assert len(headline) == 5 and list(verdicts) == [x.id for x in LEDGER]


def test_judge_all_refuses():
    with pytest.raises(c.ClaimError, match="did you mean 'headline-0.005'"):
        c.judge_all(LEDGER, [make(1, 1, 6, claim="headline-0.05")])
    with pytest.raises(c.ClaimError, match="measured twice"):
        c.judge_all(LEDGER, [make(1, 1, 6)] * 2)
    with pytest.raises(c.ClaimError, match="twice, which would"):
        c.judge_all(LEDGER, [dict(claim="redraw", differences=[1, 1], seeds=[3, 3])])
    with pytest.raises(c.ClaimError, match="in points"):
        c.judge(BY_ID["redraw"], make(1, 1, 6, claim="redraw", unit="percent"))
    with pytest.raises(c.ClaimError, match="cannot judge"):
        c.judge(BY_ID["redraw"], make(1, 1, 6))


# what was explored

GRANET = c.ledger("granet")
EXPLORED = c.Exploration(
    tier="gpu",
    seeds=range(100, 104),
    fresh=range(104, 114),
    claims=["granet-erk-over-rigl-98"],
    distance="an eighth of the epochs",
)


def erk(differences, first=100, **kw):
    return c.Measurement(
        claim="granet-erk-over-rigl-98",
        differences=differences,
        seeds=range(first, first + len(differences)),
        note="20 epochs",
        data="VGG-19",
        **kw,
    )


def about(verdicts):
    return [v for v in verdicts if v.claim.id == "granet-erk-over-rigl-98"]


def test_explored_seeds_decide_nothing():
    "However clear: not alone, and not together with fresh ones."
    for odd in (-50.0, 50.0):
        verdict, apart = about(
            c.judge_all(GRANET, [erk([odd, odd + 1, odd, odd + 2] + [1.0, 1.2, 0.8, 1.1, 0.9, 1.05])], [EXPLORED])
        )
        assert (verdict.word, verdict.paired.n, verdict.paired.mean) == ("reproduced", 6, pytest.approx(6.05 / 6)) and (
            apart.word,
            apart.paired.n,
        ) == ("explores", 4)
    alone, apart = about(c.judge_all(GRANET, [erk([5.0] * 3 + [5.1])], [EXPLORED]))
    assert alone.word == "not run at this tier" and apart.holm_p is None and apart.word not in c.VERDICTS
    few, _ = about(c.judge_all(GRANET, [erk([5.0, 5.1] * 4)], [EXPLORED]))
    assert few.word == "undecided" and few.paired.n == 4  # fresh, and too few
    assert (
        len(about(c.judge_all(GRANET, [erk([1.0, 2.0] * 3, first=104)], [EXPLORED])))
        == 1
        == len(about(c.judge_all(GRANET, [], [EXPLORED])))
    )


def test_explored_seeds_enter_no_family():
    rest = [make(1.0, 1.0, 10, first=104, claim=i) for i in ("gmp-over-rigl", "rigl-over-set")]

    def ps(more, explored):
        return [
            v.holm_p
            for v in c.judge_all(GRANET, rest + more, explored)
            if v.claim.id in ("gmp-over-rigl", "rigl-over-set")
        ]

    assert (
        ps([erk([9.0, 9.1, 9.2, 9.0])], [EXPLORED])
        == ps([], [])
        != ps([erk([9.0, 9.1, 9.2, 9.0, 9.0, 9.3], first=104)], [EXPLORED])
    )


def test_an_exploration_names_its_contrast_and_its_setting():
    verdict, apart = about(
        c.judge_all(GRANET, [erk([1.0, 1.2, 0.8, 1.0] + [1.0, 1.2, 0.8, 1.1, 0.9, 1.05])], [EXPLORED])
    )
    assert (
        apart.text
        == "explores (on VGG-19); +1.00 points [0.74, 1.26], n = 4; 20 epochs; an eighth of the epochs; decided by"
        " seeds 104 to 113"
    )
    assert (
        apart.statement
        == "GraNet (s_i=0.5) - RigL at density 0.02 (VGG-19; 20 epochs; an eighth of the epochs; decided by seeds 104"
        " to 113)"
    )
    assert verdict.statement == verdict.claim.statement and verdict.text.endswith("20 epochs; an eighth of the epochs")
    table = c.verdict_table(c.judge_all(GRANET, [erk([1.0, 1.2, 0.8, 1.0])], [EXPLORED]))
    assert (
        table.verdict.tolist()[-1] == "explores"
        and table.statement.tolist()[-1] == apart.statement
        and len(table) == len(GRANET) + 1
    )


def test_the_ledger_of_granet_says_what_was_explored():
    (explored,) = c.explorations("granet", "gpu")
    assert explored.seeds == (100, 101, 102, 103) and explored.fresh == tuple(range(104, 114))
    by_id = {x.id: x for x in GRANET}
    assert [(by_id[i].left, by_id[i].right, by_id[i].density, "gpu" in by_id[i].tiers) for i in explored.claims] == [
        (a, b, 0.02, True)
        for a, b in (
            ("GraNet (s_i=0.5)", "RigL"),
            ("GraNet (s_i=0)", "GMP"),
            ("GMP", "RigL"),
            ("RigL", "SET"),
            ("GraNet (s_i=0.5)", "GMP"),
        )
    ]
    # at the laptop tier its trials had been run before it was written
    assert by_id["granet-erk-over-gmp"].tiers == ("gpu",)
    assert c.explorations("granet", "laptop") == c.explorations("learning_to_learn", "gpu") == []


SEEN = '[[exploration]]\ntier = "gpu"\nseeds = [1]\nfresh = [2]\nclaims = ["a"]\ndistance = "none"\n'


@pytest.mark.parametrize(
    "text,said",
    [
        (ENTRY + SEEN.replace('"a"', '"b"'), "which x does not list"),
        (ENTRY + SEEN.replace("fresh = [2]", "fresh = [2, 1]"), "seed 1 was explored"),
        (ENTRY + SEEN.replace("seeds = [1]", "seeds = []"), "seeds"),
        (ENTRY + SEEN.replace("gpu", "desk"), "tier"),
        (ENTRY + SEEN + "more = 1\n", "more"),
        (ENTRY + "[exploration]\na = 1\n", "lists no explorations"),
    ],
)
def test_explorations_refuse(tmp_path, text, said):
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(c.ClaimError, match=said) as error:
        c.explorations("x", "gpu", file)
    assert "\n" not in str(error.value)
    file.write_text(ENTRY + SEEN)
    assert [e.seeds for e in c.explorations("x", "gpu", file)] == [(1,)] and c.explorations("x", "paper", file) == []


def test_verdict_table_holds_every_claim():
    table = c.verdict_table(c.judge_all(LEDGER, [make(1, 1, 12)]))
    assert len(table) == len(LEDGER) and set(table["verdict"]) <= set(c.VERDICTS)
    row = table.set_index("claim").loc["headline-0.005"]
    assert row["n"] == 12 and row["low"] < row["measured"] < row["high"]


def test_differences_pair_by_seed():
    import pandas as pd

    rows = pd.DataFrame({"scorer": list("aabb"), "seed": [1, 2, 2, 3], "accuracy": [1.0, 2.0, 5.0, 7.0]})
    assert statistics.differences(rows, {"scorer": "b"}, {"scorer": "a"}) == ([3.0], [2])
    with pytest.raises(ValueError, match="several"):
        statistics.differences(pd.concat([rows, rows]), {"scorer": "b"}, {"scorer": "a"})


@pytest.mark.parametrize(
    "data, tier, far",
    [
        ("", "laptop", "same"),
        ("", "smoke", "smaller"),
        ("vgg-19 on 50,000 cifar10-jpeg images", "gpu", "smaller"),
        ("vgg-19 at width 0.5 on 3,000 cifar10 images", "gpu", "smaller"),
        ("LeNet-300-100 on 20,000 MNIST images", "laptop", "other"),
        ("vgg-19 on 50,000 cifar100 images", "gpu", "other"),
        ("vgg-11 on 50,000 cifar10 images", "gpu", "other"),
    ],
)
def test_how_far_from_its_setting_a_claim_was_measured(data, tier, far):
    claim = BY_ID["headline-0.005"].model_copy(update=dict(data="cifar10", model="vgg-19"))
    assert c.distance(claim, data, tier) == far


def test_who_says_it():
    for paper in ("learning_to_learn", "granet", "weight_correlation", "weight_recycling"):
        for claim in c.ledger(paper):
            assert claim.says in c.SAYS and (claim.says == "ours") == (claim.source == "OURS")
            if claim.reported is not None:
                assert claim.says == "paper"
    rows = c.verdict_table(
        [c.judge(BY_ID["headline-0.005"], make(1.0, 0.3, 12, noise=0.6)), c.judge(BY_ID["headline-0.005"], None)]
    )
    assert (
        rows.says.tolist() == ["paper"] * 2
        and rows.distance[0] == "same"
        and rows.distance[1] is None
        or rows.distance.isna()[1]
    )
