"""Scorers: the published numbers, from another route; and a model that is bit for bit as before, in both modes,
with BatchNorm.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lth_companion.methods.pruning import prune
from lth_companion.methods.scorers import SCORERS, ScoreError, grasp, lookup, magnitude, random, register, snip, synflow
from lth_companion.methods.stacking import Method, canonical, once, scorer, stack
from lth_companion.tickets import generator, prunable


class Net(nn.Module):
    "Convolution, BatchNorm, a shortcut, dropout-free: what scoring must leave alone."

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.deep, self.fc = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(4 * 16, 3)

    def forward(self, x):
        h = torch.relu(self.bn(self.conv(x)))
        return self.fc((h + torch.relu(self.deep(h))).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        model.bn.bias.normal_()
    return model


@pytest.fixture
def batch():
    return [(torch.randn(6, 1, 4, 4, generator=generator(0, "x")), torch.arange(6) % 3)]


NAMES = [
    "random",
    "magnitude",
    "snip",
    "grasp",
    "synflow",
    "synflow-std",
    "snip>synflow",
    "random>grasp",
    "once(snip)>synflow",
    "snip@train>grasp@train",
]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_bit_for_bit_as_before(net, batch, name, mode, masked):
    net.train()
    net.bn.eval()  # a mode of each kind
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    before, modes, grad = (
        copy.deepcopy(net.state_dict()),
        [m.training for m in net.modules()],
        net.fc.weight.grad.clone(),
    )
    masks = (
        {n: (torch.rand(p.shape, generator=generator(1, n)) < 0.5).float() for n, p in prunable(net).items()}
        if masked
        else None
    )
    state = torch.get_rng_state()
    scores = scorer(name)(net, batch, masks=masks, mode=mode, generator=generator(0, "scores"))
    assert list(scores) == list(prunable(net)) and all(scores[n].shape == p.shape for n, p in prunable(net).items())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert (
        [m.training for m in net.modules()] == modes
        and torch.equal(net.fc.weight.grad, grad)
        and net.conv.weight.grad is None
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_random_alone_advances_the_global_stream(net, batch):
    for name in set(SCORERS) - {"random"}:
        state = torch.get_rng_state()
        SCORERS[name](net, batch)
        assert torch.equal(torch.get_rng_state(), state)
    random(net)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_snip_is_the_mask_gradient(net, batch, mode):
    "By differentiating with respect to the masks themselves, half of them 0."
    masks = {n: (torch.rand(p.shape, generator=generator(1, n)) < 0.5).float() for n, p in prunable(net).items()}
    twin, leaves = copy.deepcopy(net).train(mode == "train"), {n: m.clone().requires_grad_() for n, m in masks.items()}
    out = torch.func.functional_call(
        twin, {n: p.detach() * leaves[n] for n, p in prunable(twin).items()}, (batch[0][0],)
    )
    raw = {
        n: g.abs()
        for n, g in zip(leaves, torch.autograd.grad(F.cross_entropy(out, batch[0][1]), list(leaves.values())))
    }
    total, got = sum(float(r.double().sum()) for r in raw.values()), snip(net, batch, masks=masks, mode=mode)
    for n in raw:
        torch.testing.assert_close(got[n], raw[n] / total, rtol=1e-5, atol=1e-9)
    assert sum(float(s.double().sum()) for s in got.values()) == pytest.approx(1, abs=1e-5)
    assert any(bool((got[n][masks[n] == 0] > 0).any()) for n in got)


def test_train_and_eval_mode_differ_where_there_is_batchnorm(net, batch):
    a, b = snip(net, batch, mode="eval"), snip(net, batch, mode="train")
    assert not torch.allclose(a["deep.weight"], b["deep.weight"], rtol=0.05)


@pytest.mark.parametrize("masked", [False, True])
def test_synflow_in_float32_is_accurate_to_1e_minus_5(net, batch, masked):
    "Against a copy whose every value was made absolute by hand, in float64."
    masks = (
        {n: (torch.rand(p.shape, generator=generator(1, n)) < 0.5).float() for n, p in prunable(net).items()}
        if masked
        else None
    )
    twin = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        for t in [*twin.parameters(), *(b for b in twin.buffers() if b.is_floating_point())]:
            t.abs_()
        if masks:
            for n, p in prunable(twin).items():
                p.mul_(masks[n])
    r = twin(torch.ones(1, 1, 4, 4).double()).sum()
    own = prunable(twin)
    grads = torch.autograd.grad(r, list(own.values()))
    for (n, p), g in zip(own.items(), grads):
        want, got = (p * g).abs().detach(), synflow(net, batch, masks=masks)[n].double()
        assert float(((got - want).abs() / want.clamp_min(1e-30))[want > 0].max()) < 1e-5
        assert bool((got[want == 0] == 0).all())


def test_grasp_through_the_mask_by_double_backward(net, batch):
    masks = {n: (torch.rand(p.shape, generator=generator(1, n)) < 0.5).float() for n, p in prunable(net).items()}
    own = {n: p.detach().clone().requires_grad_() for n, p in prunable(net).items()}
    net.eval()
    out = torch.func.functional_call(net, {n: w * masks[n] for n, w in own.items()}, (batch[0][0],))
    g = torch.autograd.grad(F.cross_entropy(out / 200, batch[0][1]), list(own.values()), create_graph=True)
    inner = sum((a.detach() * a).sum() for a in g)
    raw = {n: (w * h).detach() for (n, w), h in zip(own.items(), torch.autograd.grad(inner, list(own.values())))}
    norm = abs(sum(float(r.double().sum()) for r in raw.values())) + 1e-10
    for n, s in grasp(net, batch, masks=masks).items():
        torch.testing.assert_close(s, (raw[n] / norm).float(), rtol=1e-4, atol=1e-8)


def test_a_split_batch_scores_like_the_whole(net, batch):
    ((x, y),) = batch
    for f, tolerance in ((snip, 1e-5), (grasp, 1e-3)):
        whole, split = f(net, batch), f(net, [(x[:1], y[:1]), (x[1:], y[1:])])
        for n in whole:
            torch.testing.assert_close(split[n], whole[n], rtol=tolerance, atol=tolerance * float(whole[n].abs().max()))


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
def test_synflow_survives_any_scale(net, batch, scale):
    synflow(net, batch)
    deep = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(30)])
    with torch.no_grad():
        for p in deep.parameters():
            p.mul_(scale)
    x = [(torch.zeros(1, 8), torch.zeros(1))]
    scores = synflow(deep, x)
    assert all(torch.isfinite(s).all() and (s > 0).any() for s in scores.values())
    masks = prune(deep, synflow, 0.5, x)
    with torch.no_grad():
        for p in deep.parameters():
            p.div_(scale)
    same = prune(deep, synflow, 0.5, x)
    assert sum(int((masks[n] != same[n]).sum()) for n in masks) <= 4  # of 1,920: rounding at the threshold only


def test_bad_input_is_one_sentence(net, batch):
    for call, word in (
        (lambda: lookup("snpi"), "snip"),
        (lambda: snip(net, []), "batches"),
        (lambda: snip(net, batch, mode="test"), "eval"),
        (lambda: snip(nn.ReLU(), batch), "nothing to score"),
        (lambda: scorer("snip>>synflow"), "no stage"),
        (lambda: scorer("once(snip>synflow)"), "no stage"),
    ):
        with pytest.raises(ScoreError, match=word) as e:
            call()
        assert "\n" not in str(e.value)
    with torch.no_grad():
        net.fc.weight.fill_(float("nan"))
    with pytest.raises(ScoreError, match="not finite"):
        snip(net, batch)


def test_a_taken_name_is_refused_and_can_be_replaced_by_word():
    with pytest.raises(ScoreError, match="registered already"):
        register("snip")(lambda model, batches: {})
    assert SCORERS["snip"] is snip


# --- stacks and the notation

stage = st.one_of(
    st.sampled_from(sorted(SCORERS)),
    st.sampled_from(sorted(SCORERS)).map(lambda n: f"{n}@train"),
    st.sampled_from(sorted(SCORERS)).map(lambda n: f"once({n})"),
)
notation = st.lists(stage, min_size=1, max_size=5).map(">".join)
inits = st.one_of(st.just("standard"), notation.map("saw:{}".format), notation.map("saw*:{}".format))


@given(notation)
def test_parse_and_print_is_the_identity(text):
    assert scorer(text).name == text and scorer(scorer(text).name).name == text


@given(inits, notation, st.sampled_from(["U-SS", "U-MS", "I-SS", "I-MS"]), st.sampled_from(["", " "]))
def test_methods_parse_and_print(init, name, rounds, gap):
    text = f"{init} {name} {rounds}"
    assert str(Method.parse(text)) == text
    assert str(Method.parse(text.replace(">", f"{gap}/{gap}"))) == text


@given(st.text(max_size=40))
@settings(max_examples=300)
def test_any_text_parses_or_is_refused(text):
    try:
        assert scorer(scorer(text).name).name == scorer(text).name
    except ScoreError as e:
        assert "\n" not in str(e).replace(repr(text), "")


def test_a_stack_can_be_stacked(net, batch):
    a, b = stack(stack(magnitude, snip), synflow), stack(magnitude, stack(snip, synflow))
    assert a.name == b.name == "magnitude>snip>synflow"
    for n, s in a(net, batch).items():
        assert torch.equal(s, b(net, batch)[n])


def test_once_freezes_within_a_run_and_not_across(net, batch):
    calls = []

    def counted(model, batches, *, masks=None, mode="eval", generator=None):
        calls.append(1)
        return snip(model, batches, masks=masks, mode=mode)

    counted.name = "counted"
    for times in (1, 2):
        prune(net, stack(once(counted), synflow), 0.2, batch, rounds=5)
        assert len(calls) == times


def test_frozen_and_fresh_stacks_differ(net, batch):
    a, b = (prune(net, s, 0.1, batch, rounds=10) for s in ("once(snip)>synflow", "snip>synflow"))
    assert any(not torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "pair,same",
    [
        ("magnitude>synflow", "synflow"),
        ("snip>magnitude", "snip"),
        ("synflow>magnitude", "synflow"),
        ("magnitude>magnitude", "magnitude"),
    ],
)
def test_the_equivalences_hold_on_masks_over_ten_rounds(net, batch, pair, same):
    assert canonical(pair) == same
    a, b = (
        prune(net, s, 0.05, batch, rounds=10, revive=True, ties="seeded", generator=generator(0, "t"))
        for s in (pair, same)
    )
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_prune_leaves_the_model_alone(net, batch):
    before = copy.deepcopy(net.state_dict())
    prune(net, "snip>synflow", 0.1, batch, rounds=3)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
