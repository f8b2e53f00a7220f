"""Trials of sparse training and of plasticity: what they hash, what they store, what they cost, and that a kill
changes nothing.
"""

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
from apart import as_near_as_seeds
from common import NETWORK

from lth_companion.lab import sparse_trials as S
from lth_companion.lab import store as engine_store
from lth_companion.lab import trials as engine
from lth_companion.lab.sparse_trials import SparseTrial
from lth_companion.lab.store import Store
from lth_companion.lab.sweeps import run
from lth_companion.methods.dynamic import settings
from lth_companion.papers.granet import PlasticityTrial, granet_settings, plasticity_trial, sparse_trial, table_trials
from lth_companion.training.recipe import Recipe

FEW = Recipe(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, batch_size=128, max_epochs=3, patience=None)
BASE = dict(data="digits", width=0.2, recipe=FEW)


def small(method=None, density=0.1, **fields):
    return SparseTrial(**(BASE | fields), dynamic=settings(method, density, interval=3) if method else None)


def plastic(**fields):
    return PlasticityTrial(**(BASE | dict(epoch=2, after=1) | fields))


# --- what defaults a hash leaves out

FROZEN = NETWORK | {
    "dynamic": None,
    "scorer": None,
    "density": None,
    "rounds": 1,
    "score_images": 128,
    "nudge": 0,
    "dynamic.initial": "erk",
    "dynamic.initial_density": None,
    "dynamic.schedule": "constant",
    "dynamic.begin": 0,
    "dynamic.end": 0.5,
    "dynamic.scope": "global",
    "dynamic.drop": "none",
    "dynamic.drop_rate": 0.5,
    "dynamic.drop_floor": 0.005,
    "dynamic.drop_end": 1,
    "dynamic.growth": "none",
    "dynamic.share": "layer",
    "dynamic.interval": 100,
    "dynamic.exclude_dropped": False,
    "dynamic.regrown": "zero",
}
FROZEN_PLASTICITY = NETWORK | {
    "after": 3,
    "rate": 0,
    "scope": "global",
    "unit": "weight",
    "regenerate": "none",
    "share": 0.5,
}


@pytest.mark.parametrize("kind, frozen", [(SparseTrial, FROZEN), (PlasticityTrial, FROZEN_PLASTICITY)])
def test_the_frozen_defaults_have_not_changed(kind, frozen):
    now = engine.defaults(kind)
    assert {k: now.get(k, "gone") for k in frozen} == frozen


def test_known_hashes():
    s = granet_settings("laptop")["LeNet on MNIST"]
    found = [
        sparse_trial(s, m, 0.02, 100).hash[:12]
        for m in ("dense", "SNIP", "static", "RigL", "GraNet (s_i=0.5)", "GraNet (s_i=0), authors")
    ] + [plasticity_trial(s, 6, 0.9, 100, regenerate="equal").hash[:12]]
    assert found == HASHES


HASHES = [
    "7b3947a42fcc",
    "77c16eb35686",
    "7f94c5133b98",
    "db4e4d459553",
    "f3b9be51e488",
    "3de3a7eb1e22",
    "664f5d7fd1a6",
]

# --- the gpu tier

PACK = pathlib.Path(__file__).parent.parent / "figures" / "gpu" / "granet" / "trials.jsonl.xz"
SEEN = ("GMP", "RigL", "GraNet (s_i=0)", "GraNet (s_i=0.5)", "SET")


def test_the_setting_of_the_gpu_tier_is_that_of_its_packed_trials():
    "VGG-19 ran before the tier was its own: twenty trials, to the hash."
    s = granet_settings("gpu", "cuda")["vgg-19 on cifar10-jpeg"]
    trials = [sparse_trial(s, m, 0.02, seed) for seed in range(100, 104) for m in SEEN]
    assert len({t.hash for t in trials}) == 20 and {t.hash for t in trials} <= set(engine_store.read_pack(PACK)) & {
        t.hash for *_, t in table_trials(s)
    }
    assert [t.hash[:12] for t in trials[:5]] == SEEN_HASHES


SEEN_HASHES = ["0ce469da75c1", "67af90ffbc16", "ddfdd7d6e6dd", "ae01df9731c1", "ca337da04072"]


def test_what_takes_the_first_ten_seeds_takes_fresh_ones():
    from lth_companion.lab.claims import explorations

    (explored,), seeds = explorations("granet", "gpu"), granet_settings("gpu", "cuda")["vgg-19 on cifar10-jpeg"].seeds
    assert seeds == explored.fresh + explored.seeds and seeds[:10] == tuple(range(104, 114))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_gpu_tiers_name_what_a_device_can_do(device):
    "Every trial of a tier validates on both; on a CPU no graph and no bf16."
    from lth_companion.papers import (
        learning_to_learn,
        weight_correlation_settings,
        weight_recycling_settings,
    )

    on_gpu = device == "cuda"
    found = [
        *granet_settings("gpu", device).values(),
        *weight_correlation_settings.correlation_settings("gpu", device).values(),
        *weight_recycling_settings.recycling_settings("gpu", device).values(),
    ]
    assert {(s.recipe.graph, s.recipe.precision, s.recipe.memory_format) for s in found} == {
        (on_gpu, "bf16" if on_gpu else "float32", "channels_last")
    }
    trials = [t for s in granet_settings("gpu", device).values() for *_, t in table_trials(s)] + [
        weight_recycling_settings.table_searches(s)[0][-1] for s in found if hasattr(s, "whole")
    ]
    trials += [weight_correlation_settings.branch_trial(s, "P&F", 3, 0.1, 100) for s in found if hasattr(s, "lrs")] + [
        weight_recycling_settings.trained_trial(s, 100) for s in found if hasattr(s, "whole")
    ]
    trials += [
        learning_to_learn.thesis("standard snip U-MS", 0.005, **learning_to_learn.thesis_size("gpu", device).fields)
    ]
    assert (
        {t.device for t in trials} == {device}
        and {t.recipe.graph for t in trials} == {on_gpu}
        and len({t.kind for t in trials}) == 4
    )


# --- golden trials: `python tests/test_sparse_training.py` writes this machine's results beside those that are known

GOLDEN = [
    small(),
    small("static"),
    small("SET"),
    small("SNFS"),
    small("RigL"),
    small("GMP"),
    small("GraNet (s_i=0)"),
    small("GraNet (s_i=0.5)"),
    SparseTrial(**BASE, scorer="snip", density=0.1),
    plastic(rate=0.9, regenerate="equal"),
    plastic(rate=0.5, unit="filter", scope="uniform"),
]
KNOWN = pathlib.Path(__file__).parent / "golden_sparse.json"


def measured(folder):
    rows = run(GOLDEN, Store(folder), progress="silent")
    assert rows.failed.isna().all(), rows.failed.dropna().iloc[0]
    return [
        {
            k: r[k]
            for k in ("digest", "layers", "losses", "accuracies", "training_flops")
            if isinstance(r[k], (str, dict, list)) or r[k] == r[k]
        }
        for _, r in rows.iterrows()
    ]


def test_golden_trials(tmp_path):
    "Bit for bit on a known fingerprint; elsewhere the counts of exact methods, and the first loss to 1e-4."
    from test_experiments import fingerprint

    known, got = json.loads(KNOWN.read_text()), measured(tmp_path)
    if fingerprint() in known:
        assert got == known[fingerprint()]
    for g, w in zip(got, next(iter(known.values())), strict=True):
        assert sum(g["layers"].values()) == sum(w["layers"].values())
        if "losses" in g:
            assert abs(g["losses"][0] - w["losses"][0]) < 1e-4


# --- one result wherever it is run


def test_a_pool_alone_and_together_give_the_same(tmp_path):
    some = [small(m, seed=s) for s in (0, 1) for m in ("static", "RigL", "GraNet (s_i=0)")] + [
        plastic(rate=r, seed=1) for r in (0.0, 0.5, 0.9)
    ]
    rows = [
        run(some, Store(tmp_path / "a"), progress="silent"),
        run(some, Store(tmp_path / "b"), workers=2, progress="silent"),
    ]
    alone = [run([t], Store(tmp_path / "c"), progress="silent") for t in some]
    for key in ("digest", "accuracies", "plasticity", "kept"):
        assert (
            len(
                {
                    tuple(map(str, values))
                    for values in (
                        rows[0][key],
                        rows[1][key],
                        [r[key].iloc[0] if key in r else math.nan for r in alone],
                    )
                }
            )
            == 1
        )


def test_a_killed_sweep_goes_on(tmp_path):
    "Killed by signal 9 in the middle: what was stored is not trained again, and the table is the same."
    script = textwrap.dedent("""
        import os, signal, sys; sys.path.insert(0, sys.argv[2])
        from test_sparse_training import small; from lth_companion.lab.store import Store; from lth_companion.lab.sweeps import run
        some, seen = [small(m, seed=s) for s in range(3) for m in ("RigL", "GMP")], []
        def done(t, r):
            seen.append(t)
            if len(seen) == 3: os.kill(os.getpid(), signal.SIGKILL)
        run(some, Store(sys.argv[1]), progress="silent", on_done=done)""")
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a"), str(pathlib.Path(__file__).parent)], env=os.environ
    )
    assert ended.returncode == -signal.SIGKILL
    some = [small(m, seed=s) for s in range(3) for m in ("RigL", "GMP")]
    again, whole = (
        run(some, Store(tmp_path / "a"), progress="silent"),
        run(some, Store(tmp_path / "b"), progress="silent"),
    )
    assert (
        again.attrs["ran"] == 3
        and again.digest.tolist() == whole.digest.tolist()
        and again.accuracies.tolist() == whole.accuracies.tolist()
    )


def test_a_long_trial_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(SparseTrial, "cost", lambda t: 1000.0)
    trial, kept = small("GraNet (s_i=0.5)"), []
    plain = S.train

    def dies(**job):
        def stop(model, result):
            if result.epochs == 2 and len(kept) == 1:
                raise KeyboardInterrupt

        kept.append(job["checkpoint"])
        return plain(**job, on_epoch=stop)

    monkeypatch.setattr(S, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        run([trial], Store(tmp_path / "a"), progress="silent")
    assert kept[0].exists()
    got, want = (
        run([trial], Store(tmp_path / "a"), progress="silent"),
        run([trial], Store(tmp_path / "b"), progress="silent"),
    )
    assert (
        got.digest.tolist() == want.digest.tolist()
        and got.history.tolist() == want.history.tolist()
        and got.losses.tolist() == want.losses.tolist()
    )
    assert not kept[0].exists()


# --- costs


def test_the_multiples_are_those_of_the_masks(tmp_path):
    rows = run(
        [small(), small("static"), small("RigL"), small("GMP"), small("SNFS")], Store(tmp_path), progress="silent"
    )
    dense, static, rigl, gmp, snfs = rows.training_flops
    # an MLP: every weight is used once an image
    assert dense == 1 and static == pytest.approx(rows.inference_flops[1], abs=1e-6)
    assert static < rigl < snfs < 1 and static < gmp < 1
    assert rows.inference_flops[1:].tolist() == pytest.approx([0.1] * 4, abs=1e-3)


# --- divergence, and bad input


def test_a_diverged_run_is_a_result(tmp_path):
    wild = Recipe(lr=1e6, momentum=0.9, batch_size=128, max_epochs=3, patience=None)
    rows = run(
        [small("GraNet (s_i=0)", recipe=wild), plastic(recipe=wild, epoch=3, rate=0.5)],
        Store(tmp_path),
        progress="silent",
    )
    assert rows.failed.isna().all() and rows.diverged.notna().all()


@pytest.mark.parametrize(
    "bad, said",
    [
        (lambda: small("RigL", density=9), "fraction of weights kept"),
        (lambda: SparseTrial(scorer="snip"), "go together"),
        (lambda: SparseTrial(scorer="snpi", density=0.1), "snip"),
        (lambda: SparseTrial(dynamic=settings("SET", 0.1), scorer="snip", density=0.1), "not from both"),
        (lambda: small(recipe=Recipe()), "patience"),
        (lambda: plastic(epoch=9), "earlier"),
        (lambda: plastic(rate=1.0), "fraction of present"),
        (lambda: plastic(rate=0.0, regenerate="equal"), "rate 0"),
        (lambda: plastic(rate=0.5, unit="filter", regenerate="authors"), "equal"),
        (lambda: settings("Rigl", 0.1), "RigL"),
        (lambda: sparse_trial(granet_settings("smoke")["conv-2 on MNIST"], "granet", 0.1, 0), "GraNet"),
    ],
)
def test_bad_input(bad, said):
    with pytest.raises((ValueError, LookupError)) as error:
        bad()
    assert said in str(error.value)


def test_an_interval_that_never_comes_fails_in_one_sentence(tmp_path):
    rows = run(
        [small().model_copy(update=dict(dynamic=settings("RigL", 0.1, interval=5000)))],
        Store(tmp_path),
        progress="silent",
    )
    assert "give an interval below" in rows.failed[0]


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["lenet-300-100", "conv-2"])
def test_methods_on_cuda_agree_with_the_cpu(tmp_path, model):
    """Counts equal, accuracies no farther apart than two seeds, whatever the method; dense and pruned before
    training among them.
    """

    def make(device, seed):
        base = dict(data="digits", model=model, width=0.25, recipe=FEW, device=device, seed=seed)
        return (
            [SparseTrial(**base), SparseTrial(**base, scorer="snip", density=0.1)]
            + [
                SparseTrial(**base, dynamic=settings(m, 0.1, interval=5))
                for m in ("static", "SET", "SNFS", "RigL", "GMP", "GraNet (s_i=0.5)")
            ]
            + [PlasticityTrial(**base, epoch=2, after=1, rate=0.9, regenerate="equal")]
        )

    cpu, cuda = as_near_as_seeds(make, tmp_path, ("accuracy", "after_accuracy"))
    assert cpu.kept.tolist() == cuda.kept.tolist()


if __name__ == "__main__":
    from test_experiments import fingerprint

    torch.set_num_threads(1)
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        known[fingerprint()] = measured(folder)
    KNOWN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
