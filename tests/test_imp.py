"Iterative magnitude pruning against torch's own, rewinding to the bit, and sweeps of branches that resume."

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap

import pytest
import torch
from apart import SLACK, as_near_as_seeds
from common import NETWORK
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune as reference

from lth_companion.lab import experiments as shared
from lth_companion.lab import trials as engine
from lth_companion.lab.experiments import network
from lth_companion.lab.store import Store
from lth_companion.lab.sweeps import run
from lth_companion.methods.imp import admm, branch, check_rate, cut, imp, shuffle_masks, smart_masks, spared
from lth_companion.papers import weight_correlation as branches
from lth_companion.papers import weight_correlation_settings
from lth_companion.papers.weight_correlation import BranchTrial, below, dense, make_ticket, rewound, trained
from lth_companion.selection import SelectionError
from lth_companion.tickets import Ticket, TicketError, generator, prunable
from lth_companion.training import data as datasets
from lth_companion.training.cohorts import train_cohort
from lth_companion.training.loop import train
from lth_companion.training.models import ModelError, create
from lth_companion.training.recipe import Recipe

FEW = Recipe(lr=0.1, momentum=0.9, batch_size=128, max_epochs=3, patience=None)


def small(**fields):
    return BranchTrial(**(dict(data="digits", width=0.1, recipe=FEW) | fields))


@pytest.fixture(autouse=True)
def forget():
    shared._recent.clear()


# --- the cut


@pytest.mark.parametrize("model", ["lenet-300-100", "conv-2"])
def test_five_rounds_agree_with_torch_prune_on_the_same_trained_weights(model):
    """Weights change between rounds as by training; torch is asked for our counts, global, and its masks are ours
    entry by entry.
    """
    net = create(model, (1, 28, 28), 10, generator(0, "init"), width=0.25)
    theirs = create(model, (1, 28, 28), 10, generator(0, "init"), width=0.25)
    modules = [(m, "weight") for m in theirs.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    start, total, masks = Ticket.of(net), sum(w.numel() for w in prunable(net).values()), None
    for i in range(1, 6):
        g = generator(i, "training")
        moved = {n: w + 0.05 * torch.randn(w.shape, generator=g) for n, w in start.weights.items()}
        masks = cut(moved, check_rate(0.2, i), masks, scope="global")
        kept = sum(int(m.sum()) for m in masks.values())
        assert kept == round(0.8**i * total)
        before = total if i == 1 else round(0.8 ** (i - 1) * total)
        with torch.no_grad():
            for (m, _), w in zip(modules, moved.values()):
                (m.weight_orig if hasattr(m, "weight_orig") else m.weight).copy_(w)
        for m, _ in modules:
            for hook in m._forward_pre_hooks.values():
                hook(m, None)  # weight = weight_orig * mask
        reference.global_unstructured(modules, pruning_method=reference.L1Unstructured, amount=before - kept)
        for (m, _), ours in zip(modules, masks.values()):
            assert torch.equal(m.weight_mask, ours)


@settings(max_examples=50)
@given(
    rate=st.floats(0.05, 0.9),
    level=st.integers(0, 8),
    scope=st.sampled_from(["layer", "global"]),
    seed=st.integers(0, 99),
)
def test_cuts_are_exact_and_nested(rate, level, scope, seed):
    g = generator(seed, "w")
    weights = {"a": torch.randn(13, 7, generator=g), "b": torch.randn(40, 3, generator=g)}
    first = cut(weights, check_rate(rate, level), scope=scope) if check_rate(rate, level) * 91 >= 1 else None
    if first is None:
        return
    counts = [int(m.sum()) for m in first.values()]
    assert (
        sum(counts) == round((1 - rate) ** level * 211)
        if scope == "global"
        else counts == [round((1 - rate) ** level * n) for n in (91, 120)]
    )
    if min(counts) < 2:
        return
    second = cut(
        {n: torch.randn(w.shape, generator=g) for n, w in weights.items()}, check_rate(rate, level + 1), first, scope
    )
    assert all((b <= a).all() for a, b in zip(first.values(), second.values()))


def test_a_spared_layer_stays_dense_and_does_not_count():
    net = create("conv-2", (1, 28, 28), 10, generator(0, "init"), width=0.25)
    w = prunable(net)
    assert spared(w) == (next(iter(w)),) and spared(prunable(create("lenet-300-100"))) == ()
    masks = cut(w, 0.1, scope="global", spare=spared(w))
    first, *rest = masks.values()
    assert bool(first.all()) and sum(int(m.sum()) for m in rest) == round(0.1 * sum(m.numel() for m in rest))


def test_controls_keep_the_counts():
    w = {n: p.detach() for n, p in prunable(create("lenet-300-100", generator=generator(0, "init"))).items()}
    m = cut(w, 0.2)
    mixed = shuffle_masks(m, generator(0, "s"))
    assert [int(x.sum()) for x in mixed.values()] == [int(x.sum()) for x in m.values()] and not torch.equal(
        mixed["fc1.weight"], m["fc1.weight"]
    )
    smart = smart_masks(w, 0.2, generator(0, "s"))
    assert abs(sum(int(x.sum()) for x in smart.values()) - round(0.2 * 266_200)) <= 2
    assert torch.equal(smart["fc1.weight"], smart_masks(w, 0.2, generator(0, "s"))["fc1.weight"])


# --- training from a point of the schedule


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def test_a_run_from_a_saved_point_sees_the_same_batches_and_rates(digits):
    """Without momentum the optimizer has no memory: then the second half from its saved start is the whole run, to
    the bit.
    """
    recipe = FEW.model_copy(update=dict(momentum=0.0, schedule="milestones", milestones=(1, 2)))
    net = network(small(recipe=recipe))
    start = Ticket.of(net)
    whole = train(start.apply(network(small())), digits, recipe, start.masks, seed=3, save_at=(0, 17, 24))
    assert whole.saved[0].digest == start.digest
    for begin in (17, 24):  # in the middle of an epoch, and at the start of one
        half = train(whole.saved[begin].apply(network(small())), digits, recipe, start.masks, seed=3, begin=begin)
        assert half.ticket.digest == whole.ticket.digest and half.iterations == whole.iterations - begin
        assert half.accuracies == whole.accuracies[begin // 12 :]
    early = train(start.apply(network(small())), digits, recipe, start.masks, seed=3, save_at=(17,), until=17)
    assert early.saved[17].digest == whole.saved[17].digest and early.epochs == 1


@pytest.mark.parametrize("engine_name", ["sparse", "block"])
def test_cohorts_follow_the_schedule_and_begin_where_they_are_told(digits, engine_name):
    recipe = Recipe(
        lr=0.2,
        momentum=0.9,
        max_epochs=6,
        patience=None,
        weight_decay=1e-3,
        schedule="milestones",
        milestones=(2, 4),
        warmup=1,
    )
    net = network(small()).double()
    t = Ticket.of(
        net, {n: (torch.rand(w.shape, generator=generator(0, n)) < 0.3).double() for n, w in prunable(net).items()}
    )
    t = branch(Ticket(*({n: v.double() for n, v in part.items()} for part in (t.weights, t.masks, t.rest))), t.masks)
    for begin in (0, 30):
        want = train(t.apply(network(small()).double()), digits, recipe, t.masks, seed=1, begin=begin)
        got = train_cohort([t], digits, recipe, 1, begin=begin, force_engine=engine_name)[0]
        for n in want.ticket.weights:
            assert torch.allclose(want.ticket.weights[n], got.ticket.weights[n], atol=1e-9)
        assert want.iterations == got.iterations and len(want.losses) == len(got.losses)


def test_augmented_runs_see_the_same_crops_after_rewinding():
    data = datasets.load("digits")
    recipe = Recipe(lr=0.1, batch_size=128, max_epochs=2, patience=None, augment="crop-flip")
    net = network(small())
    start = Ticket.of(net)
    whole = train(net, data, recipe, start.masks, save_at=(5,))
    half = train(whole.saved[5].apply(network(small())), data, recipe, start.masks, begin=5)
    assert half.ticket.digest == whole.ticket.digest


def test_batch_norm_statistics_travel_with_a_ticket(tmp_path):
    from lth_companion.training.loop import evaluate

    data = Colours()

    def make():
        return create("resnet-20", data.shape, 10, generator(0, "init"), width=0.125)

    result = train(make(), data, Recipe(lr=0.05, momentum=0.9, max_epochs=1, patience=None, batch_size=32))
    path = result.ticket.save(tmp_path / "t.safetensors")
    assert evaluate(Ticket.load(path).apply(make()), data) == (result.losses[-1], result.accuracies[-1])


class Colours:
    "64 colour images of 16x16, of the data chapter's interface."

    name = id = "colours"
    shape = (3, 16, 16)
    classes = 10

    def __init__(self):
        g = generator(0, "colours")
        self.train_x, self.train_y = (
            torch.randint(0, 256, (64, 3, 16, 16), generator=g, dtype=torch.uint8),
            torch.arange(64) % 10,
        )
        self.test_x, self.test_y = self.train_x[:32], self.train_y[:32]
        self.val_x, self.val_y = self.test_x[:0], self.test_y[:0]

    def normalise(self, x):
        return x.float() / 255 - 0.5

    def batch(self, x, y, i, augment=None, generator=None):
        return self.normalise(x[i]), y[i]


@pytest.mark.parametrize(
    "fields", [dict(label_smoothing=0.1), dict(memory_format="channels_last"), dict(schedule="cosine", warmup=1)]
)
def test_recipes_train_masked_convolutions_and_pruned_weights_stay_zero(fields):
    data, recipe = (
        Colours(),
        Recipe(
            lr=0.05,
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-3,
            batch_size=32,
            max_epochs=3,
            patience=None,
            **fields,
        ),
    )
    net = create("resnet-20", data.shape, 10, generator(0, "init"), width=0.125)
    masks = cut(prunable(net), 0.3, spare=spared(prunable(net)))
    result = train(net, data, recipe, masks)
    for n, w in result.ticket.weights.items():
        assert (w[masks[n] == 0] == 0).all() and (w[masks[n] == 1] != 0).any()
    assert result.losses[-1] != result.losses[0] and all(math.isfinite(v) for v in result.losses)


# --- branches


def test_levels_rewind_to_the_bit_and_a_level_repeats_itself(tmp_path):
    levels = [small()] + [small(masks="imp", level=i) for i in (1, 2, 3)]
    rows = run(levels, Store(tmp_path / "a"), progress=False)
    assert rows.failed.isna().all()
    total = [w.numel() for w in prunable(network(small())).values()]
    assert list(rows.kept) == [sum(round(0.8**i * n) for n in total) for i in range(4)]
    start = Ticket.of(network(small()))
    ticket, _ = make_ticket(levels[3])
    for n, w in ticket.weights.items():
        assert torch.equal(w, start.weights[n])
    alone = type(levels[3]).model_validate_json(engine.dumps(levels[3].identity["fields"]))  # as from its file
    shared._recent.clear()
    again = run([alone], Store(tmp_path / "b"), progress=False).iloc[0]
    for key in ("digest", "losses", "accuracies", "with_init", "with_trained"):
        assert again[key] == rows.iloc[3][key]


def test_rewinding_takes_the_weights_of_the_dense_run(tmp_path):
    t = small(masks="imp", level=1, start="rewound", rewind=17)
    whole = train(network(t), datasets.load("digits"), FEW, Ticket.of(network(t)).masks, seed=0, save_at=(17,))
    assert rewound(t).digest == whole.saved[17].digest
    row = run([t], Store(tmp_path), progress=False).iloc[0]
    assert row.failed is None and row.iterations == 36 - 17
    levels = run(
        [small(masks="imp", level=2, start="rewound", reset="rewound", rewind=17)], Store(tmp_path), progress=False
    )
    assert levels.failed.isna().all()


def test_fine_tuning_is_learning_rate_rewinding_to_epoch_0():
    t = small(masks="imp", level=2, start="trained")
    ticket, _ = make_ticket(t)
    tuned = branches.fit(t, [ticket])[0].ticket
    by_hand = train(
        trained(dense(t)).apply(network(t)), datasets.load("digits"), FEW, ticket.masks, seed=0, begin=0
    ).ticket
    assert tuned.digest == by_hand.digest


def test_iterative_learning_rate_rewinding_goes_on_from_the_level_below():
    t = small(masks="imp", level=2, start="previous", reset="previous")
    ticket, _ = make_ticket(t)
    under = trained(below(t))
    for n, w in ticket.weights.items():
        assert torch.equal(w, under.weights[n])


def test_the_loop_and_the_trials_are_one_algorithm():
    def fit(ticket, level):
        return train(ticket.apply(network(small())), datasets.load("digits"), FEW, ticket.masks, seed=0).ticket

    by_loop = {i: t for i, t, _ in imp(fit, Ticket.of(network(small())), levels=2)}
    assert by_loop[2].digest == make_ticket(small(masks="imp", level=2))[0].digest


def test_a_diverged_run_is_a_result_and_is_trained_once(tmp_path, monkeypatch):
    "What is cut from it fails in a sentence, now and in a later process, without training it again."
    wild, trained_levels = Recipe(lr=1e30, batch_size=128, max_epochs=3, patience=None), []
    plain = branches._train_level
    monkeypatch.setattr(branches, "_train_level", lambda t: trained_levels.append(t.level) or plain(t))
    trials = (
        [small(recipe=wild)]
        + [small(recipe=wild, masks="imp", level=i) for i in (1, 2)]
        + [small(recipe=wild, masks="one-shot", level=1)]
    )
    rows = run(trials, Store(tmp_path), progress=False)
    assert rows["diverged"][0] == 1 and rows["failed"][0] is None and trained_levels.count(0) == 1, trained_levels
    for why in rows["failed"][1:]:
        assert why.startswith("The dense run of seed 0 diverged in epoch 1, so nothing can be cut from it")
    shared._recent.clear(), trained_levels.clear()
    assert (
        run(trials, Store(tmp_path), progress=False)["failed"].tolist() == rows["failed"].tolist()
        and 0 not in trained_levels
    )


SWEEP = """
    import os, sys
    from lth_companion.papers import weight_correlation as branches
    from lth_companion.lab.store import Store
    from lth_companion.lab.sweeps import run
    from lth_companion.training.recipe import Recipe
    plain = branches._train_level
    def counted(t):
        out = plain(t)
        with open(os.environ["COUNT"], "a") as f: f.write(f"{t.level}\\n"); f.flush()
        if os.environ.get("DIE") == str(t.level): os.kill(os.getpid(), 9)
        return out
    branches._train_level = counted
    few = Recipe(lr=.1, momentum=.9, batch_size=128, max_epochs=2, patience=None)
    rows = run([branches.BranchTrial(data="digits", width=.1, recipe=few, masks="imp" if i else "dense", level=i) for i in range(7)], Store(sys.argv[1]), progress=False)
    print(rows.digest.tolist())
"""


def test_a_sweep_killed_at_level_3_of_6_resumes_at_level_3(tmp_path):
    """Killed when level 3 has trained and before it is kept: levels 0 to 2 are not trained again, and the results
    are those of a run in peace.
    """

    def go(store, die=""):
        env = os.environ | {"COUNT": str(tmp_path / store) + ".count", "DIE": die, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SWEEP), str(tmp_path / store)],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )

    assert go("killed", "3").returncode == -signal.SIGKILL
    second, peace = go("killed"), go("peace")
    assert second.returncode == peace.returncode == 0, second.stderr
    assert (tmp_path / "killed.count").read_text().split() == ["0", "1", "2", "3", "3", "4", "5", "6"]
    assert second.stdout == peace.stdout


def test_results_from_a_pack_bring_no_tickets_and_branches_train_them_again(tmp_path):
    levels = [small(), small(masks="imp", level=1)]
    first = Store(tmp_path / "a")
    run(levels, first, progress=False)
    first.pack(tmp_path / "p.jsonl.xz")
    second = Store(tmp_path / "b")
    second.attach(tmp_path / "p.jsonl.xz")
    shared._recent.clear()
    more = [*levels, small(masks="imp", level=1, start="fresh")]
    got, want = run(more, second, progress=False), run(more, first, progress=False)
    assert (
        got.attrs["ran"] == 1
        and got.digest.tolist() == want.digest.tolist()
        and got.losses.tolist() == want.losses.tolist()
    )


def test_a_damaged_ticket_is_made_anew(tmp_path):
    store = Store(tmp_path)
    run([small()], store, progress=False)
    file = next((tmp_path / "tickets").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    shared._recent.clear()
    assert run([small(masks="one-shot", level=2)], store, progress=False).failed.isna().all()
    Ticket.load(file)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["lenet-300-100", "conv-2"])
def test_branches_on_cuda_agree_with_the_cpu(tmp_path, model):
    """The first level's masks as near to those of a float64 run as the CPU's; accuracies no farther apart than two
    seeds.
    """

    def make(device, seed):
        levels = [
            BranchTrial(
                data="digits",
                model=model,
                width=0.25,
                recipe=FEW,
                device=device,
                seed=seed,
                masks="imp" if i else "dense",
                level=i,
            )
            for i in range(3)
        ]
        return (
            levels
            + [
                levels[2].model_copy(update=dict(start=s, rewind=20 if s == "rewound" else 0))
                for s in ("fresh", "trained", "rewound")
            ]
            + [levels[2].model_copy(update=dict(masks="admm"))]
        )

    cpu, cuda = as_near_as_seeds(make, tmp_path)
    assert cpu.kept.tolist() == cuda.kept.tolist()

    def first(trial, double=False):
        net = network(trial)
        start = Ticket.of(net).weights
        trained = train(
            net.double() if double else net, datasets.load("digits", device=trial.device), FEW, seed=trial.seed
        ).ticket
        return {
            n: m.cpu()
            for n, m in cut({n: w.cpu() for n, w in trained.weights.items()}, 0.8, spare=spared(start)).items()
        }

    exact = first(make("cpu", 0)[0], double=True)

    def apart(trial):
        return sum(int((first(trial)[n] != m).sum()) for n, m in exact.items())

    assert apart(make("cuda", 0)[0]) <= SLACK * apart(make("cpu", 0)[0]) + 2


# --- what defaults a hash leaves out

FROZEN = NETWORK | {
    "masks": "dense",
    "level": 0,
    "rate": 0.2,
    "scope": "layer",
    "spare_first": True,
    "reset": "init",
    "start": "init",
    "rewind": 0,
    "shuffled": False,
    "admm_epochs": 8,
    "admm_rho": 0.1,
    "nudge": 0,
    "recipe.schedule": "constant",
    "recipe.milestones": [],
    "recipe.gamma": 0.1,
    "recipe.warmup": 0,
    "recipe.label_smoothing": 0,
    "recipe.memory_format": "contiguous",
}


def test_the_frozen_defaults_have_not_changed():
    now = engine.defaults(BranchTrial)
    assert {k: now[k] for k in FROZEN} == FROZEN


def test_known_hashes():
    s = weight_correlation_settings.correlation_settings("laptop")["LeNet on MNIST"]
    assert [
        weight_correlation_settings.branch_trial(s, kind, level, 0.1, 100).hash[:12]
        for kind, level in (("dense", 0), ("WT", 8), ("ADMM P&F", 3), ("rewind", 14))
    ] == HASHES


HASHES = ["dfce1847b9ae", "a0b56ae5387a", "76ea8cae5713", "b7701383100a"]

# Golden trials: `python tests/test_imp.py` writes this machine's results beside those that are known.
GOLDEN = [
    small(),
    small(masks="imp", level=2, recipe=FEW),
    small(masks="imp", level=2, start="fresh"),
    small(masks="admm", level=4, start="trained"),
    small(masks="smart-ratio", level=4),
]
KNOWN = pathlib.Path(__file__).parent / "golden_branches.json"


def measured(folder):
    rows = run(GOLDEN, Store(folder), progress=False)
    return [
        {"digest": r.digest, "layers": r.layers, "losses": r.losses, "with_init": r.with_init}
        for _, r in rows.iterrows()
    ]


def test_golden_branches(tmp_path):
    "Bit for bit on a known fingerprint; elsewhere the counts exactly and the first loss to 1e-4."
    from test_experiments import fingerprint

    known, got = json.loads(KNOWN.read_text()), measured(tmp_path)
    if fingerprint() in known:
        assert got == known[fingerprint()]
    for g, w in zip(got, next(iter(known.values())), strict=True):
        assert g["layers"] == w["layers"] and abs(g["losses"][0] - w["losses"][0]) < 1e-4


# --- bad input, one sentence each


@pytest.mark.parametrize(
    "bad, said",
    [
        (lambda: check_rate(20, 1), "fraction"),
        (lambda: check_rate(0.2, 1.5), "level"),
        (lambda: cut(prunable(create("lenet-300-100")), 9), "above 0"),
        (lambda: rewound(small(masks="imp", level=1, start="rewound", rewind=10_000)), "end of training"),
        (lambda: train(network(small()), datasets.load("digits"), FEW, begin=36), "rewind to an earlier"),
        (lambda: branch(Ticket.of(network(small())), Ticket.of(network(small(width=0.2))).masks), "shape"),
        (lambda: weight_correlation_settings.correlation_settings("laptop") and network(small(model="vgg-11")), "32"),
        (lambda: small(masks="imp", level=0), "level"),
        (lambda: small(level=2), "level"),
        (lambda: small(recipe=Recipe()), "patience"),
        (lambda: Recipe(schedule="milestones"), "milestones"),
        (lambda: Recipe(schedule="milestones", milestones=(9, 5)), "rise"),
        (lambda: Recipe(max_epochs=5, warmup=5), "warmup"),
        (lambda: Recipe(label_smoothing=1.0), "less than 1"),
        (lambda: admm(network(small()), datasets.load("digits"), FEW, 0.5, epochs=2, stages=4), "stages"),
    ],
)
def test_bad_input(bad, said):
    with pytest.raises((ValueError, SelectionError, TicketError, ModelError)) as error:
        bad()
    assert said in str(error.value)


@pytest.mark.parametrize("p", [0, -1, 1.5, math.nan])
def test_a_bad_p(p):
    from lth_companion.measures.correlation import overlap

    w = Ticket.of(network(small())).weights
    with pytest.raises(SelectionError, match="p of R_p"):
        overlap(w, w, p)


if __name__ == "__main__":
    from test_experiments import fingerprint

    torch.set_num_threads(1)
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        known[fingerprint()] = measured(folder)
    KNOWN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
