"FLOPs: hand counts, torch's own counter, published counts, RigL's formula from segments; the model stays as it was."
import copy
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from lth_companion.branches import BranchTrial
from lth_companion.costs import (FASTEST, CostError, dense_flops, gains, gpu_rate, inference_flops, network_size, positions, rates,
                                 scoring_flops, sizes, step_ms, training_flops, training_multiple)
from lth_companion.data import import_torchvision
from lth_companion.experiments import TicketTrial
from lth_companion.models import MODELS, create, layer_shapes
from lth_companion.searches import EnsembleTrial, SupermaskTrial
from lth_companion.selection import count, erk
from lth_companion.sparse_training import PlasticityTrial, SparseTrial, granet_recipe, settings as methods
from lth_companion.supermasks import Supermask
from lth_companion.tickets import Ticket, generator, prunable
from lth_companion.training import Recipe

def on_meta(make):
    with torch.device("meta"): return make().eval()

def counted(f):
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()

LENET = {"fc1.weight": 784 * 300, "fc2.weight": 300 * 100, "fc3.weight": 100 * 10}
ONES = dict.fromkeys(LENET, 1)
TENTH = {n: k // 10 for n, k in LENET.items()}

# ---------------------------------------------------------------- counts by hand

def test_lenet_by_hand():
    net = create("lenet-300-100", generator=generator(0, "init"))
    assert positions(net, (1, 28, 28)) == ONES and list(positions(net, (1, 28, 28))) == list(prunable(net))
    assert sizes(net) == LENET
    assert dense_flops(net, (1, 28, 28)) == 2 * 266_200
    masks = {n: (torch.rand(w.shape, generator=generator(0, n)) < .3).float() for n, w in prunable(net).items()}
    assert inference_flops(ONES, Ticket.of(net, masks).kept) == 2 * sum(int(m.sum()) for m in masks.values())

def test_conv_2_by_hand():
    "Two 3x3 convolutions that keep 28x28, one pooling to 14x14, three linear layers."
    net = create("conv-2", (1, 28, 28), generator=generator(0, "init"))
    assert list(positions(net, (1, 28, 28)).values()) == [784, 784, 1, 1, 1]
    by_hand = 784 * (9 * 64) + 784 * (9 * 64 * 64) + 196 * 64 * 256 + 256 * 256 + 256 * 10
    assert dense_flops(net, (1, 28, 28)) == 2 * by_hand == 65_264_640
    assert list(positions(create("conv-2"), [1, 28, 28]).values())[0] == 784        # a list is a shape too

def test_a_filter_removed_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(5, 4, 2, groups=1))
    kept = {"0.weight": 4 * 27, "1.weight": 4 * 4 * 4}                       # one filter, and what reads it
    assert positions(net, (3, 9, 9)) == {"0.weight": 16, "1.weight": 9}
    assert inference_flops(positions(net, (3, 9, 9)), kept) == 2 * (16 * 108 + 9 * 64)

# ---------------------------------------------------------------- torch's counter

@pytest.mark.parametrize("name", sorted(n for n, f in MODELS.items() if f.__module__ == "lth_companion.models"))
def test_every_model_against_torch(name):
    net = on_meta(lambda: create(name, (3, 32, 32)))
    assert dense_flops(net, (3, 32, 32)) == counted(lambda: net(torch.empty(1, 3, 32, 32, device="meta")))

@pytest.mark.parametrize("layer, shape", [
    (nn.Conv1d(2, 4, 3, dilation=2), (2, 11)), (nn.Conv3d(2, 4, 2), (2, 4, 5, 6)), (nn.Conv2d(6, 9, (1, 3), groups=3, padding="same"), (6, 5, 7)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 6)), (nn.ConvTranspose1d(4, 2, 4), (4, 7)), (nn.Linear(5, 3), (7, 5))])
def test_layers_against_torch(layer, shape):
    net = nn.Sequential(layer)
    assert dense_flops(net, shape) == counted(lambda: net(torch.zeros(1, *shape)))

def test_a_step_is_three_passes_less_the_first_input_gradient():
    net = create("conv-2", (1, 8, 8), generator=generator(0, "init"), width=1/8)
    f = dense_flops(net, (1, 8, 8))
    first = 2 * 64 * net.convs[0].weight.numel()
    assert counted(lambda: F.cross_entropy(net(torch.rand(4, 1, 8, 8)), torch.arange(4)).backward()) == 4 * (3 * f - first)

# ---------------------------------------------------------------- published counts

@pytest.fixture(scope="module")
def imagenet():
    net = on_meta(import_torchvision().models.resnet50)
    return positions(net, (3, 224, 224)), sizes(net), layer_shapes(net), counted(lambda: net(torch.empty(1, 3, 224, 224, device="meta")))

def test_dense_resnet_50(imagenet):
    used, size, _, torchs = imagenet
    assert inference_flops(used, size) == torchs == pytest.approx(8.18e9, rel=1e-3)

def test_erk_resnet_50(imagenet):
    "The follow-up's script has 5.8446e9 at density 0.5; 0.42 and 0.24 of the dense count are RigL's at 0.2 and 0.1, SNFS trains at 0.61 and 0.50."
    used, size, shapes, dense = imagenet
    def kept(density): return {n: count(d, size[n]) for n, d in erk(shapes, density).items()}
    assert inference_flops(used, kept(.5)) == pytest.approx(5.8446e9, rel=5e-3)
    for density, inference, snfs in ((.2, .42, .61), (.1, .24, .50)):
        assert inference_flops(used, kept(density)) / dense == pytest.approx(inference, abs=.01)
        assert training_multiple(used, size, [(7, kept(density), 7)]) == pytest.approx(snfs, abs=.01)

# ---------------------------------------------------------------- training

@pytest.mark.parametrize("every", [1, 100, 4000])
def test_rigl_formula(every):
    fs, fd = 2 * sum(TENTH.values()), 2 * sum(LENET.values())
    step = training_flops(ONES, LENET, [(every + 1, TENTH, 1)])
    assert step == 3 * fs * every + 2 * fs + fd
    assert training_flops(ONES, LENET, [(every, TENTH), (1, TENTH, 1)]) == step

def test_multiples():
    fs, fd = sum(TENTH.values()), sum(LENET.values())
    assert training_multiple(ONES, LENET, [(10, LENET)]) == 1
    assert training_multiple(ONES, LENET, [(10, LENET, 10)]) == 1                  # a dense gradient costs a dense run nothing
    assert training_multiple(ONES, LENET, [(10, TENTH)]) == pytest.approx(fs / fd)
    assert training_multiple(ONES, LENET, [(10, TENTH, 10)]) == pytest.approx((2 * fs + fd) / (3 * fd))
    assert training_multiple(ONES, LENET, [(10, TENTH)], dense_images_total=2) == pytest.approx(5 * fs / fd)
    assert training_multiple(ONES, LENET, [(30, LENET), (10, TENTH)]) == pytest.approx((3 + fs / fd) / 4)

layers = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 10 ** 4), st.integers(1, 10 ** 7)), min_size=1)

@settings(max_examples=60)
@given(layers, st.data())
def test_segments_add_up(layers, data):
    "Exact in whole numbers: a run is the sum of its parts, in any order, and lies between the static and the all-dense-gradient run."
    used, size = {n: p for n, (p, _) in layers.items()}, {n: s for n, (_, s) in layers.items()}
    kept = st.fixed_dictionaries({n: st.integers(0, s) for n, s in size.items()})
    segments = data.draw(st.lists(st.integers(0, 10 ** 9).flatmap(lambda i: st.tuples(st.just(i), kept, st.integers(0, i))), max_size=4))
    cost = training_flops(used, size, segments)
    assert cost == sum(training_flops(used, size, [s]) for s in segments) == training_flops(used, size, segments[::-1])
    by_hand = 0
    for images, k, dense in segments:
        for n in used: by_hand += 2 * used[n] * ((images - dense) * 3 * k[n] + dense * (2 * k[n] + size[n]))
    assert cost == by_hand

@pytest.mark.parametrize("scorer, images, rounds, passes", [("random", 9, 9, 0), ("magnitude", 9, 9, 0), ("snip", 100, 1, 300), ("snip", 100, 7, 2100),
                                                            ("grasp", 100, 1, 1200), ("synflow", 100, 100, 300)])
def test_scoring(scorer, images, rounds, passes):
    assert scoring_flops(ONES, LENET, scorer, images, rounds) == passes * 2 * 266_200

# ---------------------------------------------------------------- the model, and what it shares

class Odd(nn.Module):
    "A weight shared by two layers, a layer called twice, a buffer that the forward pass rewrites, and layers in modes of their own."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.drop = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout()
        self.b.weight = self.a.weight
        self.register_buffer("calls", torch.zeros(()))
        self.norm.eval()
    def forward(self, x):
        self.calls += 1
        return self.drop(self.norm(self.b(self.b(self.a(x)))))

def test_shared_weights_add_up(): assert positions(Odd(), (2, 4, 5)) == {"a.weight": 3 * 20}

@pytest.mark.parametrize("shape", [(2, 4, 5), (3, 4, 5), (5,), 7, ("x",)])
def test_the_model_is_as_before(shape):
    "Modes, parameters, buffers (also one that the pass rewrites), gradients, hooks and the global generator; where the shape fits and where not."
    net = Odd()
    net(torch.rand(2, 2, 4, 5)).sum().backward()
    loss = net(torch.rand(2, 2, 4, 5)).sum()                  # a graph that is still wanted
    twin, grads = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    buffers, random = dict(net.named_buffers()), torch.get_rng_state()
    if shape == (2, 4, 5): positions(net, shape)
    else:
        with pytest.raises(CostError, match="cannot read one image of shape"): positions(net, shape)
    for n, t in net.state_dict().items(): assert torch.equal(t, twin[n])
    for n, b in net.named_buffers(): assert b is buffers[n]
    for p, g in zip(net.parameters(), grads): assert torch.equal(p.grad, g)
    assert [m.training for m in net.modules()] == [True, True, True, False, True]
    assert not any(m._forward_hooks for m in net.modules()) and torch.equal(torch.get_rng_state(), random)
    loss.backward()

def test_float64_and_half(): 
    for dtype in (torch.float64, torch.bfloat16): assert positions(nn.Sequential(nn.Linear(3, 2)).to(dtype), (3,)) == {"0.weight": 1}

# ---------------------------------------------------------------- refusals

class Attend(nn.Module):
    def __init__(self, **more): super().__init__(); self.attend, self.fc = nn.MultiheadAttention(4, 2, batch_first=True, **more), nn.Linear(4, 3)
    def forward(self, x): return self.fc(self.attend(x, x, x, need_weights=False)[0])

class Spare(nn.Module):
    def __init__(self): super().__init__(); self.fc, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)
    def forward(self, x): return self.fc(x)

def one_sentence(text): return "\n" not in text and text.endswith(".") and len(text) < 400

@pytest.mark.parametrize("net, shape, names, mend", [
    (Attend(), (5, 4), "attend.in_proj_weight, attend.out_proj.weight", "nn.MultiheadAttention"),
    (Attend(kdim=4, vdim=4), (5, 4), "attend", "nn.Linear projections"), (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (5, 4), "in_proj_weight", "nn.MultiheadAttention"),
    (Spare(), (4,), "spare.weight", "remove layers"), (nn.Sequential(nn.BatchNorm2d(2)), (2, 3, 3), "no linear or convolution", "network itself")])
def test_models_that_cannot_be_counted(net, shape, names, mend):
    with pytest.raises(ValueError) as e: positions(net, shape)
    assert names in str(e.value) and mend in str(e.value) and one_sentence(str(e.value))

@pytest.mark.parametrize("segments, why", [
    ([(5, LENET, 6)], "count them among its images"), ([(-5, LENET)], "at least 0"), ([(5, LENET, -1)], "at least 0"), ([(5.5, LENET)], "whole number"),
    ([(5, {**LENET, "fc2.weight": 30_001})], "keeps 30001 weights of 30000"), ([(5, {**LENET, "fc2.weight": -1})], "at least 0"),
    ([(5, dict.fromkeys(LENET, .1))], "whole number"), ([(5, {"fc1.weight": 3})], "one model"), ([(5, .1)], "by layer"), ([5], "(images, kept)"),
    ([(1, LENET, 1, 1)], "(images, kept)")])
def test_bad_segments(segments, why):
    for f in (training_flops, training_multiple):
        with pytest.raises(CostError) as e: f(ONES, LENET, segments)
        assert why in str(e.value) and one_sentence(str(e.value))

def test_other_bad_input():
    for f, why in ((lambda: inference_flops(ONES, {"fc4.weight": 1}), "one model"), (lambda: training_flops(ONES, {"fc1.weight": 1}, []), "one model"),
                   (lambda: training_multiple(ONES, LENET, []), "at least one image"), (lambda: training_multiple(ONES, LENET, [], dense_images_total=-1), "at least 0"),
                   (lambda: scoring_flops(ONES, LENET, "snpi", 1), "known: random"), (lambda: scoring_flops(ONES, LENET, "snip", -1), "at least 0")):
        with pytest.raises(CostError) as e: f()
        assert why in str(e.value) and one_sentence(str(e.value))

# ---------------------------------------------------------------- seconds on a GPU

def recipe(**fields): return Recipe(**(dict(batch_size=128, max_epochs=10, patience=None) | fields))

def of_row(r): return recipe(batch_size=r.batch, precision=r.precision, memory_format=r.memory_format, graph=r.launch == "graph")

NETWORKS = [(name, width) for name in ("conv-2", "conv-6", "resnet-20", "resnet-32", "vgg-11", "vgg-19", "mobilenet-v2") for width in (.25, 1., 1.5)]

def test_the_table_of_rates_holds_together():
    "Layers and FLOPs are those of the networks, a rate is what its milliseconds say, and nothing stands twice."
    assert len(rates()) == 25 == len(set(rates()))
    for r in rates():
        assert network_size(r.network, 1., (1, 28, 28) if r.network == "lenet-300-100" else (3, 32, 32), 10) == (r.layers, r.flops), r
        assert 1e3 * r.beside * r.batch / r.ms == pytest.approx(r.images, rel=.02), r

@pytest.mark.parametrize("r", [r for r in rates() if r.beside == 1 and r.work != "stack"], ids=lambda r: "-".join((r.network, *r[3:7])))
def test_what_was_timed_is_estimated_as_it_was_timed(r):
    assert step_ms((r.layers, r.flops), of_row(r), r.work) == r.ms
    assert gpu_rate((r.layers, r.flops), of_row(r), r.work) == pytest.approx(r.images, rel=.02)

@pytest.mark.parametrize("work", ["training", "search"])
def test_more_is_never_faster(work):
    "More layers or products, a larger batch, fewer of the fast options: at least as many milliseconds. (10 %: between rows of two networks.)"
    sizes_ = {k: network_size(*k, (3, 32, 32), 10) for k in NETWORKS}
    plain, graph, fast = recipe(), recipe(graph=True), recipe(**FASTEST)
    for a, small in sizes_.items():
        assert step_ms(small, fast, work) <= step_ms(small, graph, work) <= step_ms(small, plain, work), a
        for b, large in sizes_.items():
            if small[0] > large[0] or small[1] > large[1]: continue
            for r in (plain, graph, fast): assert step_ms(small, r, work) <= 1.1 * step_ms(large, r, work), (a, b, r)
        assert step_ms(small, plain, work) <= step_ms(small, recipe(batch_size=1024), work) <= 8 * step_ms(small, plain, work), a

def test_narrow_networks_gain_little_and_wide_ones_pay_their_products():
    narrow, own, wide = (step_ms(network_size("vgg-19", w, (3, 32, 32), 10), recipe(**FASTEST)) for w in (.25, 1., 2.))
    assert .5 * own < narrow < own and wide == pytest.approx(4 * own, rel=.05)

def test_gains_are_ratios_of_the_table():
    by = {(r.network, r.launch, r.precision, r.memory_format): r.ms for r in rates() if r.beside == 1 and r.work == "training"}
    best = {n: by[n, "graph", "bf16", "channels_last"] for n in ("resnet-20", "vgg-19", "conv-6")}
    assert gains(recipe(graph=True)) == pytest.approx({n: by[n, "graph", "float32", "contiguous"] / ms for n, ms in best.items()})
    assert gains(recipe())["resnet-20"] == pytest.approx(by["resnet-20", "eager", "float32", "contiguous"] / best["resnet-20"])
    assert set(gains(recipe(**FASTEST)).values()) == {1.}

def vgg(**fields): return dict(data="cifar10-jpeg", model="vgg-19", device="cuda", recipe=granet_recipe(20, **FASTEST, augment="crop-flip")) | fields

@pytest.mark.parametrize("method", ["GMP", "RigL", "GraNet (s_i=0)", "GraNet (s_i=0.5)", "SET"])
def test_the_twenty_trials_that_ran(method):
    "Ten side by side took 127 to 145 s each: so many seconds of the device, a tenth of that, for each."
    cost = SparseTrial(**vgg(), dynamic=methods(method, .02, interval=140)).cost()
    assert 145 / 10 / 2 < cost < 127 / 10 * 2

def test_every_kind_of_trial_is_estimated_on_a_gpu():
    "Dearer in float32 without a graph; cheaper than on a core; a search dearer than a training; more epochs cost more."
    found = {}
    for name, r in (("fast", recipe(**FASTEST)), ("plain", recipe()), ("long", recipe(**FASTEST, max_epochs=30))):
        base = dict(data="cifar10-jpeg", model="conv-6", device="cuda", recipe=r)
        kinds = dict(branch=BranchTrial(**base), sparse=SparseTrial(**base), plasticity=PlasticityTrial(**base, epoch=2, after=r.max_epochs), search=SupermaskTrial(**base, search=Supermask(density=.1)),
                     ensemble=EnsembleTrial(**base, search=Supermask(density=.1)), pretrained=SupermaskTrial(**base, search=Supermask(density=.1), trained=r))
        found[name] = {k: t.cost() for k, t in kinds.items()}
        cpu = {k: t.model_copy(update=dict(device="cpu", recipe=r.model_copy(update=dict(graph=False)))).cost() for k, t in kinds.items()}
        assert all(found[name][k] < cpu[k] / 50 for k in kinds), (found[name], cpu)
    assert all(found["fast"][k] < found["plain"][k] and 2.5 * found["fast"][k] < found["long"][k] < 3 * found["fast"][k] for k in found["fast"])
    fast = found["fast"]
    assert fast["branch"] == fast["sparse"] < fast["search"] < fast["pretrained"] == pytest.approx(fast["search"] + fast["sparse"], abs=.31) and fast["ensemble"] == pytest.approx(3 * fast["search"], rel=.02)

def test_tickets_in_a_stack_share_the_device():
    "A one-shot ticket costs its share of sixteen in a stack; an iterative one trains alone, level after level; a convolutional one too."
    graphed = dict(device="cuda", recipe=recipe(batch_size=64, graph=True, max_epochs=25))
    one, levels = TicketTrial(**graphed, density=.05).cost(), TicketTrial(**graphed, density=.05, rounds="I-SS", levels=4).cost()
    slowest = min(r.images for r in rates() if r.beside == 20)
    assert one == pytest.approx(60_000 * 25 * 1.15 / (slowest * 16 / 20) + .4)
    assert levels == pytest.approx(60_000 * 25 * 1.15 * 5 / 469_000 + .4, rel=.02)
    assert TicketTrial(device="cuda", density=.05, recipe=recipe(batch_size=64)).cost() > one and TicketTrial(**graphed, density=.05, model="conv-2").cost() > 5 * one

def test_estimates_on_a_core_are_as_they_were():
    "By the constants that stood here before a GPU was timed: multiplications of the dense network, six a weight and image, at a rate a kind."
    macs, images = 266_200, (60_000 + 10_000 / 3) * 10
    assert BranchTrial(recipe=recipe()).cost() == pytest.approx(images * macs * 6 / 7e10 + .3)
    assert BranchTrial(recipe=recipe(), masks="imp", level=8).cost() == pytest.approx(images * .8 ** 8 * macs * 6 / 7e10 + .3)
    assert SparseTrial(recipe=recipe()).cost() == pytest.approx(images * 6 * macs / 5e10 + .3)
    assert SparseTrial(recipe=recipe(), scorer="snip", density=.02).cost() == pytest.approx(.15 * images * 6 * macs / 5e10 + .3)
    assert PlasticityTrial(recipe=recipe(), epoch=1, after=2).cost() == pytest.approx(images / 5 * 6 * macs / 5e10 + .1)
    conv = dict(data="fashion-mnist", model="conv-2", recipe=recipe())
    searched = images * 6 * 32_632_320 / 2.5e10
    assert SupermaskTrial(**conv, search=Supermask(density=.1)).cost() == pytest.approx(searched + .3)
    assert SupermaskTrial(**conv, search=Supermask(density=.1), trained=recipe()).cost() == pytest.approx(2 * searched + .3)
    assert EnsembleTrial(**conv, search=Supermask(density=.1), members=4).cost() == pytest.approx(4 * (searched + .3))
    assert TicketTrial(density=.005).cost() == pytest.approx(60_000 * 25 * 1.15 / 1.2e6 + .4) and TicketTrial(density=.5).cost() == pytest.approx(60_000 * 25 * 1.15 / 40_000 + .4)
