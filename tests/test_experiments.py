"The thesis's kind of trial: what defines it, that it repeats itself, and that each quirk has its switch."
import json, pathlib, platform
import pytest, torch
from lth_companion.papers import learning_to_learn as experiments
from lth_companion.lab import trials as engine
from lth_companion.papers.learning_to_learn import CLEAN, TicketTrial, find_masks, level_densities, make_ticket, thesis, thesis_size
from lth_companion.methods.scorers import ScoreError
from lth_companion.tickets import generator
from lth_companion.training.loop import Recipe
from lth_companion.lab.store import Store
from lth_companion.lab.sweeps import run

SHORT = Recipe(max_epochs=3, patience=None)
HERE = pathlib.Path(__file__).parent

def on_digits(method="standard snip U-MS", density=.05, **fields): return thesis(method, density, data="digits", recipe=fields.pop("recipe", SHORT), **fields)

# The defaults that hashes leave out. They are frozen: a new field adds a line, a changed line would orphan every stored result.
FROZEN = {
    "data": "mnist", "train_size": None, "validation": 0, "model": "lenet-300-100", "init": "standard", "saw_reading": "as coded",
    "saw_images": None, "saw_shuffled": False, "scorer": "snip", "rounds": "U-MS", "shots": 10, "score_images": 100, "revive": True,
    "ties": "seeded", "weights": "same", "mask_edit": "none", "pretrain": 0, "levels": 10, "level_schedule": "linear", "last_rewind": False,
    "stale_gradient": True, "nudge": 0, "histograms": False, "seed": 0, "device": "cpu",
    "recipe.optimizer": "sgd", "recipe.lr": .1, "recipe.momentum": 0., "recipe.nesterov": False, "recipe.weight_decay": 0., "recipe.batch_size": 64,
    "recipe.max_epochs": 100, "recipe.min_epochs": 0, "recipe.patience": 5, "recipe.stop_on": "test", "recipe.augment": None}

def test_the_frozen_defaults_have_not_changed():
    now = engine.defaults(TicketTrial)
    assert {k: v for k, v in now.items() if k in FROZEN and k != "recipe"} == FROZEN
    assert set(now) - {"recipe"} >= set(FROZEN)

def test_known_hashes():
    "The identity of three trials, so that nothing changes it unseen."
    want = json.loads((HERE / "golden.json").read_text())["hashes"]
    assert {t.method + f" {t.density:g} {t.seed}": t.hash for t in KNOWN} == want

KNOWN = [thesis("standard snip U-MS", .005, seed=100, recipe=Recipe(min_epochs=30)), thesis("saw:snip magnitude>synflow U-MS", .01, recipe=Recipe(min_epochs=30)),
         thesis("standard synflow I-MS", .005, seed=101, recipe=Recipe(min_epochs=30))]

# --- golden trials

GOLDEN = {
    "snip": on_digits(), "saw": on_digits("saw:snip random>synflow U-MS"), "grasp": on_digits("standard grasp U-SS", .1),
    "frozen": on_digits("standard once(snip)>synflow U-MS", .02, seed=3), "levels": on_digits("standard magnitude I-SS", .1, levels=3)}

def fingerprint(): return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {vendor()}"
def vendor():
    try: return next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("vendor_id"))
    except (OSError, StopIteration): return platform.processor()

def measured():
    rows = run(list(GOLDEN.values()))
    return {n: {"digest": r.digest, "kept": r.layers, "losses": r.losses, "accuracies": r.accuracies} for n, (_, r) in zip(GOLDEN, rows.iterrows())}

def test_golden_trials():
    "Bit for bit on a known fingerprint; elsewhere the masks exactly and the first losses to 1e-4."
    want, got = json.loads((HERE / "golden.json").read_text()), measured()
    known = want["results"].get(fingerprint())
    if known: assert got == known
    any_machine = next(iter(want["results"].values()))
    for n in GOLDEN:
        assert got[n]["kept"] == any_machine[n]["kept"]
        assert got[n]["losses"][0] == pytest.approx(any_machine[n]["losses"][0], abs=1e-4)

def test_the_same_trial_twice_alone_and_in_company():
    own = [GOLDEN["snip"], on_digits("standard synflow U-MS"), on_digits("standard random U-SS")]
    a, b = run(own), run(own[::-1])
    for t in own:
        x, y = (rows[rows.hash == t.hash].iloc[0] for rows in (a, b))
        assert (x.digest, x.losses, x.accuracies) == (y.digest, y.losses, y.accuracies)

# --- equal tickets share a training

def test_a_ticket_that_was_trained_is_not_trained_again(tmp_path, monkeypatch):
    counted, real = [], experiments.train_cohort
    monkeypatch.setattr(experiments, "train_cohort", lambda tickets, *a, **k: counted.extend(tickets) or real(tickets, *a, **k))
    store = Store(tmp_path)
    first = run([on_digits("standard synflow U-MS"), on_digits("standard magnitude>synflow U-MS")], store=store)
    assert len(counted) == 1 and first.digest.nunique() == 1 and first.accuracy.nunique() == 1
    later = run([on_digits("standard synflow>magnitude U-MS")], store=store)
    assert len(counted) == 1 and later.accuracy[0] == first.accuracy[0] and later.losses[0] == first.losses[0]
    run([on_digits("standard synflow U-MS", seed=1)], store=store)
    assert len(counted) == 2

def test_a_damaged_trained_ticket_is_trained_again(tmp_path):
    store, trial = Store(tmp_path), on_digits("standard magnitude I-SS", .1, levels=2)
    first = run([trial], store=store)
    files = sorted((tmp_path / "tickets").glob("*.safetensors"))
    assert files
    files[0].write_bytes(files[0].read_bytes()[:-50])
    again = run([trial.model_copy(update={"density": .2})], store=store)      # its first level shares the dense training
    assert again.failed.isna().all() and again.level_accuracy[0][0] == first.level_accuracy[0][0]

# --- the fields do what they say

def test_seeds_and_streams():
    a, b = make_ticket(on_digits())[0], make_ticket(on_digits(seed=1))[0]
    assert a.digest != b.digest
    c = make_ticket(on_digits("standard magnitude U-MS"))[0]
    assert all(torch.equal(a.weights[n], c.weights[n]) for n in a.weights)            # one seed, one initialisation

@pytest.mark.parametrize("field", [dict(score_images=50), dict(shots=3), dict(pretrain=20), dict(mask_edit="inverted"), dict(init="saw:snip"), dict(init="saw*:snip"),
                                   dict(init="saw:snip", saw_shuffled=True), dict(init="saw:snip", saw_images=50), dict(weights="gaussian"), dict(weights="shuffled"), dict(weights="saw:synflow"), dict(nudge=1), dict(validation=200), dict(train_size=500)])
def test_each_field_changes_the_ticket_or_its_training(field):
    plain, other = on_digits(), on_digits().model_copy(update=field)
    assert plain.hash != other.hash
    if set(field) - {"validation", "train_size"}: assert make_ticket(plain)[0].digest != make_ticket(other)[0].digest
    else: assert run([plain]).losses[0] != run([other]).losses[0]

def test_weights_change_under_an_unchanged_mask():
    base = make_ticket(on_digits("saw:snip synflow U-MS"))[0]
    for w in ("standard", "gaussian", "shuffled"):
        t = make_ticket(on_digits("saw:snip synflow U-MS", weights=w))[0]
        assert all(torch.equal(t.masks[n], base.masks[n]) for n in base.masks)
        if w == "shuffled":
            for n, v in t.weights.items(): assert torch.equal(v[t.masks[n] == 1].sort().values, base.weights[n][t.masks[n] == 1].sort().values)
        if w == "standard": assert all(torch.equal(v, make_ticket(on_digits())[0].weights[n]) for n, v in t.weights.items())

def test_saw_mask_is_the_once_stack_up_to_the_shift():
    "synflow on saw:snip is once(snip)>synflow where both read the same images."
    a = find_masks(on_digits("saw:snip synflow U-MS", density=.05))
    b = find_masks(on_digits("standard once(snip)>synflow U-MS", density=.05, score_images=None))
    assert sum(int((a[n] != b[n]).sum()) for n in a) <= 4

def test_levels_are_linear_and_the_last_prunes_most():
    d = level_densities(thesis("standard magnitude I-SS", .005))
    assert len(d) == 10 and d[0] == pytest.approx(.9005) and d[-1] == pytest.approx(.005) and d[-2] / d[-1] > 20
    e = level_densities(thesis("standard magnitude I-SS", .8**10, level_schedule="exponential"))
    assert [b / a for a, b in zip(e, e[1:])] == pytest.approx([.8] * 9)

def test_the_last_level_is_rewound_only_when_asked():
    from lth_companion.papers.learning_to_learn import run_levels
    faithful = on_digits("standard magnitude I-SS", .1, levels=2)
    _, t, _, notes = run_levels(faithful)
    _, r, _, _ = run_levels(faithful.model_copy(update={"last_rewind": True}))
    start = make_ticket(faithful.model_copy(update={"rounds": "U-SS"}))[0]
    assert all(torch.equal(r.weights[n], start.weights[n]) for n in r.weights) and not r.rest["fc1.bias"].any() and t.rest["fc1.bias"].any()
    assert all(torch.equal(t.masks[n], r.masks[n]) for n in t.masks) and t.digest != r.digest and len(notes["level_accuracy"]) == 2

def test_the_stale_gradient_moves_grasp_and_nothing_else():
    for name, moves in (("grasp", True), ("snip", False)):
        trial = on_digits(f"standard {name} I-SS", .2, levels=2)
        a, b = run([trial, trial.model_copy(update={"stale_gradient": False})]).digest
        assert (a != b) == moves

def test_clean_rules_never_revive():
    rows = run([on_digits(f"standard {s} U-MS", .05, **CLEAN) for s in ("grasp", "snip", "synflow")])
    assert all(set(r) == {0} for r in rows.revived)
    assert any(set(r) != {0} for r in run([on_digits("standard grasp U-MS", .05)]).revived)

def test_a_bad_trial_is_refused_in_one_sentence():
    for fields, word in ((dict(density=0), "density"), (dict(density=float("nan")), "density|finite"), (dict(density=.1, scorer="snpi"), "snip"), (dict(density=.1, init="snip"), "saw:snip"),
                         (dict(density=.1, rounds="U"), "U-SS"), (dict(density=.1, sped=3), "sped"), (dict(density=.1, weights="fresh"), "initialisation")):
        with pytest.raises(ValueError, match=word): TicketTrial(**fields)

def test_a_plugin_scorer_enters_the_hash_by_its_source(tmp_path):
    from lth_companion.methods.scorers import SCORERS, register
    @register("probe-scorer")
    def probe(model, batches=None): return {n: p.detach() for n, p in experiments.prunable(model).items()}
    try:
        first = on_digits("standard probe-scorer>synflow U-MS").hash
        @register("probe-scorer", replace=True)
        def other(model, batches=None): return {n: -p.detach() for n, p in experiments.prunable(model).items()}
        assert on_digits("standard probe-scorer>synflow U-MS").hash != first
    finally: del SCORERS["probe-scorer"]

def test_sizes_of_the_tiers():
    assert thesis_size("smoke").fields["train_size"] == 6000 and len(thesis_size("smoke").seeds) == 2
    assert min(thesis_size("laptop").fresh) == 100 and len(thesis_size("laptop").fresh) == 20
    assert thesis_size("paper").fields["recipe"] == Recipe() and thesis_size("gpu", "cuda").fields["device"] == "cuda"
    assert thesis_size("laptop", seeds=[7]).seeds == [7]

if __name__ == "__main__":      # python tests/test_experiments.py: adds this machine's numbers to golden.json
    file = HERE / "golden.json"
    known = json.loads(file.read_text()) if file.exists() else {"results": {}}
    known["hashes"] = {t.method + f" {t.density:g} {t.seed}": t.hash for t in KNOWN}
    known["results"][fingerprint()] = measured()
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
