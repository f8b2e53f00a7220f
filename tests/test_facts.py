"""Trials of what a figure needs besides trainings: shapes, rankings, agreements of weight sets, watched searches,
gains. What they hash and say, and that company changes nothing.
"""

import json
import math
import pathlib
import tempfile

import numpy as np
import pytest
import torch
from common import NETWORK

from lth_companion.lab import experiments as shared
from lth_companion.lab import trials as engine
from lth_companion.lab.experiments import ShapesTrial, initial, network, shapes_of
from lth_companion.lab.store import Store
from lth_companion.lab.sweeps import run
from lth_companion.methods.imp import cut
from lth_companion.methods.supermasks import drawn, first_scores, top_scores
from lth_companion.papers import weight_correlation as branches
from lth_companion.papers.weight_correlation import BranchTrial, RankingsTrial, trained
from lth_companion.papers.weight_correlation_agreement import CHANGES, AgreementTrial, renumbered, sides, thirds
from lth_companion.papers.weight_correlation_settings import schedule_of
from lth_companion.papers.weight_recycling import SupermaskTrial, search_recipe, settings_of, unpacked
from lth_companion.papers.weight_recycling_watched import GainTrial, WatchedTrial
from lth_companion.tickets import Ticket, generator
from lth_companion.training.models import create
from lth_companion.training.recipe import Recipe

FEW = Recipe(lr=0.1, momentum=0.9, batch_size=128, max_epochs=3, patience=None)


def pair(**fields):
    return AgreementTrial(**(dict(data="digits", width=0.1, recipe=FEW) | fields))


def dense(**fields):
    return BranchTrial(**(dict(data="digits", width=0.1, recipe=FEW) | fields))


def watched(method="EP+Recycle", kind=WatchedTrial, **fields):
    more = dict(origins=(2, 4)) if kind is WatchedTrial else {}
    return kind(
        **(
            dict(
                data="digits",
                width=0.1,
                recipe=search_recipe(4, 0.6, batch_size=32),
                search=settings_of(method, 0.4, 4),
                record=(2, 4),
            )
            | more
            | fields
        )
    )


def gains(method="Biprop, constant", **fields):
    return GainTrial(**(dict(shape=(1, 8, 8), width=0.2, search=settings_of(method, 0.1, 4), masks=3) | fields))


def go(trials, folder, **keywords):
    rows = run(trials, Store(folder), progress="silent", **keywords)
    assert rows.failed.isna().all(), rows.failed.dropna().iloc[0]
    return rows


# --- what defaults a hash leaves out, and what it holds

RECIPE = {"batch_size": 128, "momentum": 0.9, "patience": None}
SHAPES = {"model": "lenet-300-100", "shape": [1, 28, 28], "classes": 10, "width": 1}
FROZEN = {
    ShapesTrial: SHAPES,
    RankingsTrial: SHAPES | {"p": 0.2, "pairs": 100, "seed": 0},
    GainTrial: SHAPES | {"masks": 10, "seed": 0},
    AgreementTrial: (
        NETWORK
        | {
            "recipe": RECIPE,
            "left": "initial",
            "right": "trained",
            "other": None,
            "change": "none",
            "noise": 0,
            "density": 1,
            "shuffled": False,
            "p": [0.2],
        }
    ),
    WatchedTrial: (
        NETWORK
        | {
            "recipe": RECIPE | {"weight_decay": 1e-4},
            "trained": None,
            "record": [],
            "weight_seed": None,
            "score_seed": None,
            "origins": [],
        }
    ),
}


@pytest.mark.parametrize("kind", list(FROZEN), ids=lambda kind: kind.kind)
def test_the_frozen_defaults_have_not_changed(kind):
    now = engine.defaults(kind)
    assert {k: now.get(k, "gone") for k in FROZEN[kind]} == FROZEN[kind]


def test_known_hashes():
    laptop = dict(train_size=5000, recipe=schedule_of(15, 0.1), seed=100)
    found = [
        ShapesTrial(model="resnet-20", shape=(3, 32, 32)),
        RankingsTrial(pairs=150, seed=100),
        AgreementTrial(**laptop),
        AgreementTrial(**laptop, left="trained", change="in a circle", p=(0.05, 0.2)),
        watched(),
        gains(),
    ]
    assert [t.hash[:12] for t in found] == HASHES


HASHES = ["5f9c77dc6510", "25c20819d598", "12117604f2c2", "f0cbb05705cf", "88e50ebb3ce1", "fb2cbd8caf9d"]

GOLDEN = {
    "shapes": ShapesTrial(model="resnet-20", shape=(3, 32, 32), width=0.5),
    "rankings": RankingsTrial(width=0.1, pairs=5),
    "agreement": pair(p=(0.2, 0.5)),
    "circle": pair(left="trained", change="in a circle"),
    "masked": pair(left="fresh", density=0.5, shuffled=True),
    "noise": pair(right="initial", noise=0.5),
    "watched": watched(),
    "gains": gains(),
}
KNOWN = pathlib.Path(__file__).parent / "golden_facts.json"


def measured(folder):
    go(GOLDEN.values(), folder)
    return {n: Store(folder).get(t) for n, t in GOLDEN.items()}


def test_golden_facts(tmp_path):
    "Bit for bit on a known fingerprint; elsewhere what no last bit decides exactly, and shares nearly."
    from test_experiments import fingerprint

    known, got = json.loads(KNOWN.read_text()), measured(tmp_path)
    if fingerprint() in known:
        assert got == known[fingerprint()]
    want = next(iter(known.values()))
    assert (
        got["shapes"] == want["shapes"]
        and got["gains"]["layers"] == want["gains"]["layers"]
        and got["watched"]["kept"] == want["watched"]["kept"]
    )
    assert got["rankings"]["shared"] == pytest.approx(want["rankings"]["shared"], abs=2)
    for n in ("agreement", "circle", "masked", "noise"):
        assert got[n]["remaining"]["0.2"][1:] == want[n]["remaining"]["0.2"][1:]  # chance follows from counts
        assert got[n]["remaining"]["0.2"][0] == pytest.approx(want[n]["remaining"]["0.2"][0], abs=0.05)


def test_alone_in_company_and_by_workers(tmp_path):
    trials = [
        *GOLDEN.values(),
        pair(other=5),
        pair(left="trained", change="units renumbered", seed=3),
        watched("Biprop+IteRand"),
    ]
    go(trials, tmp_path / "together"), go(trials[::-1], tmp_path / "pool", workers=2)
    for t in trials:
        shared._recent.clear()
        go([t], tmp_path / t.hash)
        alone, together, pool = (Store(tmp_path / folder).get(t) for folder in (t.hash, "together", "pool"))
        assert alone == together == pool and alone, t


# --- shapes and rankings


@pytest.mark.parametrize(
    "model, shape, width",
    [
        ("lenet-300-100", (1, 28, 28), 0.5),
        ("conv-2", (3, 32, 32), 0.25),
        ("resnet-20", (3, 32, 32), 0.5),
        ("mobilenet-v2", (3, 32, 32), 0.25),
    ],
)
def test_shapes_are_those_of_the_network_and_nothing_is_drawn(model, shape, width):
    state = torch.get_rng_state()
    (row,) = ShapesTrial.run_group([ShapesTrial(model=model, shape=shape, width=width, classes=7)])
    assert torch.equal(state, torch.get_rng_state())
    ticket = Ticket.of(create(model, shape, 7, generator(0, "init"), width))
    assert row["layers"] == [[n, list(w.shape)] for n, w in ticket.weights.items()] and row["weights"] == sum(
        w.numel() for w in ticket.weights.values()
    )
    assert row["rest_bits"] == sum(8 * t.element_size() * t.numel() for t in ticket.rest.values()) > 0


def test_shapes_of_a_trial():
    assert shapes_of(dense(data="cifar100", model="resnet-20", width=0.5)) == ShapesTrial(
        model="resnet-20", shape=(3, 32, 32), classes=100, width=0.5
    )


def test_rankings_count_what_sets_have_in_common():
    (row,) = RankingsTrial.run_group([RankingsTrial(width=0.1, p=0.3, pairs=4, seed=2)])
    draw, shared = generator(2, "rankings"), []
    sizes = [math.prod(s) for _, s in ShapesTrial.run_group([ShapesTrial(width=0.1)])[0]["layers"]]
    for _ in range(4):
        a, b = (
            [
                set(torch.randn(n, generator=draw).abs().argsort(descending=True)[: round(0.3 * n)].tolist())
                for n in sizes
            ]
            for _ in range(2)
        )
        shared.append(sum(len(x & y) for x, y in zip(a, b)))
    assert row["shared"] == shared and row["overlaps"] == pytest.approx(
        [k / (0.3 * sum(sizes)) for k in shared], abs=1e-8
    )


# --- two weight sets


def test_an_agreement_is_that_of_the_branch(tmp_path):
    rows, dense_row = go([pair(p=branches.P)], tmp_path), go([dense()], tmp_path).iloc[0]
    assert rows.accuracy[0] == pytest.approx(dense_row.accuracy, abs=1e-4)
    for p, (value, mean, sd) in rows.remaining[0].items():
        assert [round(value, 6), round(mean, 6), round(sd, 6)] == dense_row.with_init["remaining"][p]
    for measure in ("sign", "pearson", "cosine"):
        assert [round(v, 6) for v in rows[measure][0]] == pytest.approx(dense_row.with_init[measure], abs=2e-6)


def test_a_masked_side_counts_as_by_hand(tmp_path):
    trial = pair(left="fresh", density=0.5, p=(0.2, 0.4))
    row = go([trial], tmp_path).iloc[0]
    end, fresh = trained(dense()).weights, initial(dense(), "fresh").weights
    mask = cut(end, 0.5)

    def top(w, n):
        return set(w.flatten().abs().argsort(descending=True)[:n].tolist())

    for p in (0.2, 0.4):
        N = sum(w.numel() for w in end.values())
        both = sum(
            len(top(fresh[n] * mask[n], round(p * w.numel())) & top(w, round(p * w.numel()))) for n, w in end.items()
        )
        value, chance, sd, given, given_sd = row["all"][f"{p:g}"]
        assert (
            value == pytest.approx(both / (p * N), abs=1e-9)
            and chance == pytest.approx(p, abs=0.01)
            and given == pytest.approx(p / 0.5, abs=0.02)
            and sd > 0
            and given_sd > 0
        )
    assert go([trial.model_copy(update={"shuffled": True})], tmp_path)["all"][0]["0.2"][0] < 0.3 < row["all"]["0.2"][0]
    assert "network" not in row  # the whole network is ranked for dense sides


def test_places_by_layer_input_and_network(tmp_path):
    row = go([pair()], tmp_path).iloc[0]
    parts = {n: (size, value) for n, size, value, *_ in row.parts}
    layers = [n for n, _ in ShapesTrial.run_group([shapes_of(dense())])[0]["layers"]]
    assert (
        list(parts)[:3] == layers
        and parts["fc1.weight, dark"][0] + parts["fc1.weight, lit"][0] == parts["fc1.weight"][0]
    )
    N = sum(parts[n][0] for n in layers)
    assert sum(parts[n][0] * parts[n][1] for n in layers) / N == pytest.approx(row.remaining["0.2"][0], abs=2e-3)
    # small layers have larger weights
    assert (
        np.sum(row.thirds) == N
        and row.thirds[0][0] > row.thirds[0][2]
        and row.network["0.2"][1] > row.remaining["0.2"][1]
    )
    assert -1 <= row.inputs <= 1 and go([pair(left="trained")], tmp_path).inputs[0] == 1


W = {"a": torch.randn(30, 20, generator=generator(1, "w")), "b": torch.randn(10, 30, generator=generator(2, "w"))}


def alike(x, y):
    return torch.equal(x.flatten().sort().values, y.flatten().sort().values)


KEEPS = {  # what a change leaves of a layer
    "shuffled within layers": lambda w, v: alike(w, v),
    "signs drawn anew": lambda w, v: torch.equal(w.abs(), v.abs()),
    "magnitudes shuffled": lambda w, v: torch.equal(w.sign(), v.sign()) and alike(w.abs(), v.abs()),
    "layers scaled": lambda w, v: torch.allclose(v / w, (v / w).mean()),
    "magnitudes cubed": lambda w, v: torch.allclose(v, w**3),
    "signs flipped": lambda w, v: torch.equal(v, -w),
    "one sd added": lambda w, v: torch.allclose(v - w, w.std()),
    "shuffled across layers": lambda w, v: v.shape == w.shape,
    "in a circle": lambda w, v: thirds({"": w}, {"": v})[0][2] < 0.02 * w.numel(),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_changes(name):
    changed = CHANGES[name](W, 3)
    assert all(KEEPS[name](W[n], changed[n]) and not torch.equal(W[n], changed[n]) for n in W)
    assert all(torch.equal(changed[n], CHANGES[name](W, 3)[n]) for n in W)
    everything = [torch.cat([x.flatten() for x in ws.values()]) for ws in (W, changed)]
    assert alike(*everything) == (name in ("shuffled within layers", "shuffled across layers"))


def test_thirds_count_pairs():
    assert np.array(thirds(W, W)).diagonal().sum() == 900 and np.allclose(
        np.array(thirds(W, CHANGES["shuffled within layers"](W, 0))), 100, atol=40
    )


def test_renumbered_units_change_no_output():
    net = network(dense(width=0.2))
    ticket, x = Ticket.of(net), torch.rand(7, 1, 8, 8, generator=generator(0, "x"))
    want, other = net(x), renumbered(ticket, 1)
    assert torch.allclose(other.apply(net)(x), want, atol=1e-5)
    assert all(not torch.equal(other.weights[n], ticket.weights[n]) for n in ticket.weights)
    with pytest.raises(ValueError, match="fully connected"):
        renumbered(Ticket({"c": torch.ones(2, 2, 3, 3)}, {"c": torch.ones(2, 2, 3, 3)}), 0)


def test_sides_stand_for_what_they_name():
    shared._recent.clear()
    left, right = sides(pair(left="fresh", right="initial", other=4))
    assert left.digest == initial(dense(), "fresh").digest and right.digest == initial(dense(seed=4)).digest
    left, right = sides(pair(right="initial", noise=2.0, seed=1))
    spread = (right.weights["fc1.weight"] - left.weights["fc1.weight"]).std() / left.weights["fc1.weight"].std()
    assert float(spread) == pytest.approx(2, rel=0.1)


# --- searches and gains


def test_a_watched_search_is_the_search(tmp_path):
    for method in ("Edge-Popup", "EP+Recycle", "Biprop+IteRand"):
        seen, plain = go([watched(method)], tmp_path).iloc[0], go([watched(method, SupermaskTrial)], tmp_path).iloc[0]
        assert all(seen[k] == plain[k] for k in ("accuracies", "losses", "digest", "kept", "layers", "bits", "empty"))
        assert {e: m for e, m in seen.recorded.items() if e != "0"} == plain.recorded
        shapes = dict(ShapesTrial.run_group([shapes_of(watched())])[0]["layers"])
        moved, kept = unpacked(seen.origins_at["4"]["moved"], shapes), unpacked(seen.recorded["4"], shapes)
        assert {n: int((moved[n] & kept[n]).sum()) for n in shapes} == {n: v["moved"] for n, v in seen.layers.items()}
        assert not any(m.any() for m in unpacked(seen.origins_at["0"]["moved"], shapes).values()) and seen.rebuilt == (
            method == "Edge-Popup"
        )


def test_the_start_and_the_signs_are_the_drawn_ones(tmp_path):
    trial = watched("Biprop+Recycle", weight_seed=5, score_seed=6)
    row = go([trial], tmp_path).iloc[0]
    shapes = {n: tuple(s) for n, s in ShapesTrial.run_group([shapes_of(trial)])[0]["layers"]}
    first = top_scores(first_scores(network(trial), 6), 0.4)
    for n, m in unpacked(row.recorded["0"], shapes).items():
        assert torch.equal(m, first[n].bool())
    for n, m in unpacked(row.origins_at["0"]["positive"], shapes).items():
        assert torch.equal(m, drawn(shapes[n], trial.search, 5, n) > 0)
    assert all(
        v["places"] + row.layers[n]["moved"] >= row.layers[n]["kept"] >= v["places"]
        and 1 <= v["most"] <= row.layers[n]["kept"]
        for n, v in row.stem.items()
    )


def test_gains_are_rounding_where_weights_are_constant():
    constant, normal = (GainTrial.run_group([gains(m)])[0] for m in ("Biprop, constant", "Biprop"))
    assert (
        constant["layers"] == ["fc1.weight", "fc2.weight", "fc3.weight"]
        and 0 < max(constant["float32"]) < 1e-5
        and max(constant["float64"]) < 1e-13
    )
    weights, scores = (
        drawn((60, 64), gains().search, 0, "fc1.weight").double(),
        first_scores(create("lenet-300-100", (1, 8, 8), width=0.2), 0),
    )
    kept = weights[top_scores(scores, 0.1)["fc1.weight"].bool()].abs()
    assert min(normal["float64"]) > 0.05 and float((kept.mean() - kept).abs().max() / weights.abs().max()) < 1e-13


# --- bad input, one sentence each


@pytest.mark.parametrize(
    "bad, said",
    [
        (lambda: pair(shuffled=True), "density below 1"),
        (lambda: pair(noise=1.0, change="signs flipped"), "one way"),
        (lambda: pair(p=()), "must name"),
        (lambda: pair(p=(1.5,)), "at most 1"),
        (lambda: watched(trained=FEW), "leave trained out"),
        (lambda: watched(origins=(0,)), "outside 1 to 4"),
        (lambda: watched(record=(5,)), "outside 1 to 4"),
    ],
)
def test_refusals(bad, said):
    with pytest.raises(ValueError, match=said):
        bad()


if __name__ == "__main__":  # python tests/test_facts.py: adds this machine's results
    from test_experiments import fingerprint

    torch.set_num_threads(1)
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        known[fingerprint()] = measured(folder)
    KNOWN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
