"The papers' numbers: complete, on one vocabulary, and joined without loss."

import math
import pathlib

import numpy as np
import pandas as pd
import pytest

from lth_companion.lab import reported as r

KEYS = ["init", "scorer", "rounds", "density"]


def test_every_table_is_package_data_and_every_file_is_listed():
    folder = pathlib.Path(r.__file__).parent.parent / "tables" / "reported"
    listed = {name for tables in r.TABLES.values() for name in tables.values()}
    assert {f.name for f in folder.glob("*.csv")} == listed
    for paper, tables in r.TABLES.items():
        for table in tables:
            assert len(r.reported(paper, table))


def test_no_row_is_lost():
    for paper, tables in r.TABLES.items():
        for table, name in tables.items():
            lines = (
                (pathlib.Path(r.__file__).parent.parent / "tables" / "reported" / name).read_text().strip().splitlines()
            )
            assert len(r.reported(paper, table)) == len(lines) - 1


def test_densities_are_fractions_kept():
    for paper in r.papers():
        density = r.reported(paper)["density"]
        assert density.dtype == float and density.between(0, 1).all() and (density > 0).all()
    dense = r.reported("granet").query("density == 1")
    assert len(dense) == 5 and 0.1 in set(r.reported("granet")["density"])  # exactly 0.1


@pytest.mark.parametrize(
    "method,density,mean",
    [
        ("standard snip U-MS", 0.005, 89.83),
        ("standard synflow U-MS", 0.005, 88.89),
        ("standard magnitude U-MS", 0.005, 64.17),
        ("standard grasp U-SS", 0.005, 77.90),
        ("standard random>synflow U-MS", 0.005, 90.46),
        ("saw:snip magnitude>synflow U-MS", 0.005, 91.86),
        ("standard magnitude I-SS", 0.01, 95.79),
        ("bi-modal random>synflow U-MS", 0.005, 91.06),
    ],
)
def test_rows_of_the_facts_file(method, density, mean):
    init, scorer, rounds = method.split()
    assert r.lookup(
        "learning_to_learn", init=init, scorer=scorer, rounds=rounds, density=density
    ).accuracy == pytest.approx(mean, abs=0.0051)


@pytest.mark.parametrize(
    "keys,said",
    [
        (dict(init="standard", scorer="snpi", rounds="U-MS", density=0.005), "scorer='snip'"),
        (dict(init="snip", scorer="snip", rounds="U-MS", density=0.005), "init='saw:snip'"),
        (dict(init="standard", scorer="snip", rounds="U-MS", density=0.0051), "density=0.005"),
        (dict(scorer="snip"), "give more of"),
        (dict(sorer="snip"), "did you mean 'scorer'"),
    ],
)
def test_lookup_says_what_is_nearest(keys, said):
    with pytest.raises(r.ReportedError, match=said) as error:
        r.lookup("learning_to_learn", **keys)
    assert "\n" not in str(error.value)


def test_unknown_paper_or_table():
    with pytest.raises(r.ReportedError, match="did you mean 'granet'"):
        r.reported("granett")
    with pytest.raises(r.ReportedError, match="'overlap'"):
        r.reported("weight_correlation", "nothing")


def trials(n=5):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            dict(init="standard", scorer=s, rounds="U-MS", density=d, seed=i, accuracy=rng.normal(90, 1))
            for s in ("snip", "synflow", "once(snip)>synflow")
            for d in (0.005, 0.01)
            for i in range(n)
        ]
    )


def test_beside_keeps_every_measured_row_in_order():
    measured = r.summary(trials(), KEYS)
    both = r.beside(measured, "learning_to_learn", on=KEYS)
    assert both[KEYS].equals(measured[KEYS]) and (both["n"] == 5).all()
    known = both["scorer"] != "once(snip)>synflow"
    assert both.loc[known, "reported"].notna().all() and both.loc[~known, ["reported", "difference", "low"]].isna().all(
        axis=None
    )
    row = both.iloc[0]
    reference = r.welch(row.measured, row.sd, 5, 89.8271, 2.728393, 14)
    assert (row.difference, row.low, row.high) == pytest.approx(
        (reference["difference"], reference["low"], reference["high"]), abs=1e-4
    )


def test_beside_joins_densities_that_differ_in_the_last_bit():
    measured = r.summary(trials().assign(density=0.1 * 0.05), KEYS)  # 0.005000000000000001
    assert r.beside(measured, "learning_to_learn", on=KEYS)["reported"].notna().sum() == 2


def test_beside_refuses_an_ambiguous_join():
    with pytest.raises(r.ReportedError, match="several"):
        r.beside(r.summary(trials(), ["scorer", "density"]), "learning_to_learn", on=["scorer", "density"])
    with pytest.raises(r.ReportedError, match="did you mean"):
        r.beside(r.summary(trials(), KEYS), "learning_to_learn", on=["scorers"])


def test_one_seed_has_no_interval():
    both = r.beside(r.summary(trials(1), KEYS), "learning_to_learn", on=KEYS)
    assert both["sd"].isna().all() and both["low"].isna().all() and both["difference"].notna().any()


def test_beside_a_paper_that_states_no_runs():
    rows = pd.DataFrame(
        {
            "dataset": "cifar-10",
            "network": "vgg-19",
            "method": "SNIP",
            "density": [0.1] * 3,
            "accuracy": [93.0, 94.0, 95.0],
        }
    )
    both = r.beside(
        r.summary(rows, ["dataset", "network", "method", "density"]),
        "granet",
        on=["dataset", "network", "method", "density"],
    )
    assert both["reported"].item() == 93.63 and math.isnan(both["low"].item())


def test_welch_needs_a_variance():
    assert math.isnan(r.welch(1, 0.1, 3, 2, math.nan, 1)["p"]) and math.isnan(
        r.welch(1, 0.1, 3, 2, math.nan, math.nan)["low"]
    )
    constant = r.welch(11.35, 0.0, 9, 11.35, 0.0, 9)
    assert constant["low"] == constant["high"] == 0 and math.isnan(constant["p"])
