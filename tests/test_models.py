"""Networks: counts by hand and against torchvision's, outputs and gradients against plain references, widths, sizes
and refusals.
"""

import copy
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lth_companion.methods.scorers import grasp, snip, synflow
from lth_companion.tickets import generator, prunable
from lth_companion.training.models import (
    MLP,
    MODELS,
    ConvNet,
    ModelError,
    cifar_resnet,
    create,
    first_layer,
    layer_shapes,
    register_model,
)
from lth_companion.training.sources import import_torchvision

IMAGE = (3, 32, 32)
NAMES = [
    "lenet-300-100",
    "conv-2",
    "conv-4",
    "conv-6",
    "conv-8",
    "vgg-11",
    "vgg-19",
    "resnet-20",
    "resnet-32",
    "resnet-18",
    "resnet-50",
    "mobilenet-v2",
]


def net(name, shape=IMAGE, classes=10, width=1 / 8, seed=0):
    return create(name, shape, classes, generator(seed, "init"), width)


def images(n=4, shape=IMAGE, dtype=torch.float32):
    return torch.randn(n, *shape, generator=generator(0, "images"), dtype=dtype)


def on_meta(make):
    with torch.device("meta"):
        return make()


def total(model):
    return sum(p.numel() for p in model.parameters())


def weights(model):
    return sum(map(prod, layer_shapes(model).values()))


def full(name, shape=IMAGE, classes=10):
    return on_meta(lambda: MODELS[name](shape, classes))


def test_the_models_are_these():
    assert sorted(set(NAMES)) == sorted(n for n, f in MODELS.items() if f.__module__ == "lth_companion.training.models")


# ---------------------------------------------------------------- counts


def convolutions(channels, kernel=3):
    return sum(a * b * kernel**2 for a, b in zip(channels, channels[1:]))


@pytest.mark.parametrize(
    "name, convs, every, published",
    [
        ("conv-2", 38_592, 4_300_992, ("38K", "4.3M")),
        ("conv-4", 259_776, 2_425_024, ("260K", "2.4M")),
        ("conv-6", 1_144_512, 2_261_184, ("1.1M", None)),
        ("conv-8", 4_683_456, 5_275_840, (None, None)),
    ],
)
def test_conv_n(name, convs, every, published):
    """Frankle and Carbin's figure 2, but for the total of Conv-6 (1.7 M there), which their list of layers does not
    give; weight recycling's list.
    """
    depth, shapes = int(name[-1]), list(layer_shapes(full(name)).values())
    channels = [3, 64, 64, 128, 128, 256, 256, 512, 512][: depth + 1]
    flat = channels[-1] * (32 >> depth // 2) ** 2
    assert sum(map(prod, shapes[:depth])) == convolutions(channels) == convs
    assert sum(map(prod, shapes)) == convs + flat * 256 + 256 * 256 + 2560 == every == weights(full(name))
    assert total(full(name)) == every + sum(channels[1:]) + 256 + 256 + 10  # biases everywhere
    for count, text in zip((convs, every), published):
        if text:
            assert abs(count / float(text[:-1]) / {"K": 1e3, "M": 1e6}[text[-1]] - 1) < 0.05
    if depth == 6:
        assert round(every / 1e6, 1) != 1.7


@pytest.mark.parametrize(
    "name, blocks, every", [("vgg-11", (1, 1, 2, 2, 2), 9_228_362), ("vgg-19", (2, 2, 4, 4, 4), 20_035_018)]
)
def test_vgg(name, blocks, every):
    channels = [3] + [c for c, n in zip((64, 128, 256, 512, 512), blocks) for _ in range(n)]
    assert weights(full(name)) == convolutions(channels) + 5120
    assert total(full(name)) == convolutions(channels) + 2 * sum(channels[1:]) + 5120 + 10 == every
    theirs = on_meta(lambda: getattr(import_torchvision().models, name.replace("-", "") + "_bn")()).features
    assert every == total(theirs) - sum(channels[1:]) + 5130  # its convolutions have biases


@pytest.mark.parametrize("depth, every", [(20, 269_722), (32, 464_154), (44, None), (56, None)])
def test_cifar_resnet(depth, every):
    n, model = depth // 6, on_meta(lambda: cifar_resnet(depth))
    convs = 27 * 16 + 2 * n * 9 * 16**2 + 9 * 16 * 32 + (2 * n - 1) * 9 * 32**2 + 9 * 32 * 64 + (2 * n - 1) * 9 * 64**2
    assert weights(model) == convs + 640
    assert total(model) == convs + 650 + 2 * (16 * (2 * n + 1) + 32 * 2 * n + 64 * 2 * n)
    # option A has no weights
    assert len(layer_shapes(model)) == depth and len(list(model.buffers())) == 3 * (depth - 1)
    if every:
        assert total(full(f"resnet-{depth}")) == every == total(model)
    if depth == 20:
        assert round(every / 1e6, 2) == 0.27


@pytest.mark.parametrize("name, every", [("resnet-18", 11_173_962), ("resnet-50", 23_520_842)])
def test_resnet_against_torchvision(name, every):
    theirs = on_meta(lambda: getattr(import_torchvision().models, name.replace("-", ""))(num_classes=10))
    assert total(full(name)) == every == total(theirs) - 64 * 3 * 7 * 7 + 64 * 3 * 3 * 3


def test_mobilenet_against_torchvision():
    assert (
        total(full("mobilenet-v2"))
        == 2_236_682
        == total(on_meta(lambda: import_torchvision().models.mobilenet_v2(num_classes=10)))
    )


# ---------------------------------------------------------------- the same function as torchvision's, and as plain
# references


def theirs(name):
    "torchvision's network with the stem, strides and biases of ours."
    tv = import_torchvision().models
    if name.startswith("vgg"):
        model = getattr(tv, name.replace("-", "") + "_bn")()
        for m in model.features:
            if isinstance(m, nn.Conv2d):
                m.bias = None
        return nn.Sequential(model.features, nn.Flatten(), nn.Linear(512, 10))
    if name.startswith("resnet"):
        model = getattr(tv, name.replace("-", ""))(num_classes=10)
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        return model
    model = tv.mobilenet_v2(num_classes=10, dropout=0.0)
    model.features[0][0].stride = (1, 1)
    model.features[2].conv[1][0].stride = (1, 1)
    return model


@pytest.mark.parametrize("name", ["vgg-11", "vgg-19", "resnet-18", "resnet-50", "mobilenet-v2"])
def test_outputs_and_gradients_are_torchvisions(name):
    """With our weights in their network, in both modes; parameters in the same order (VGG: ours has convolutions
    before BatchNorm).
    """
    ours, other = net(name, width=1.0), theirs(name)

    def groups(m):
        return [
            [p for k in m.modules() if isinstance(k, kind) for p in (*k.parameters(), *k.buffers())]
            for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        ]

    torch.manual_seed(0)
    for mine, its in zip(groups(ours), groups(other)):
        assert [p.shape for p in mine] == [p.shape for p in its]
        for a, b in zip(mine, its):
            b.data.copy_(a)
    ours.double()
    other.double()
    x, y = images(2, dtype=torch.float64), torch.tensor([3, 7])
    for training in (True, False):  # training first: eval then sees running statistics that it moved
        outs = [m.train(training)(x) for m in (ours, other)]
        torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
        grads = [
            torch.autograd.grad(
                F.cross_entropy(out, y), [k.weight for k in m.modules() if isinstance(k, (nn.Conv2d, nn.Linear))]
            )
            for m, out in zip((ours, other), outs)
        ]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def plain_resnet(state, x, blocks):
    "A CIFAR ResNet with option A, written out, in eval mode."

    def bn(x, n):
        mean, var, w, b = (
            state[f"{n}.{k}"].view(1, -1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * w + b

    x = bn(F.conv2d(x, state["conv.weight"], padding=1), "norm").clamp(min=0)
    for i in range(blocks):
        w, stride = state[f"blocks.{i}.conv1.weight"], 2 if i in (blocks // 3, 2 * blocks // 3) else 1
        h = bn(F.conv2d(x, w, stride=stride, padding=1), f"blocks.{i}.norm1").clamp(min=0)
        h = bn(F.conv2d(h, state[f"blocks.{i}.conv2.weight"], padding=1), f"blocks.{i}.norm2")
        short = x[..., ::stride, ::stride]
        x = (
            h + torch.cat([short, torch.zeros(len(x), len(w) - short.shape[1], *short.shape[2:], dtype=x.dtype)], 1)
        ).clamp(min=0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize(
    "name, blocks, width, shape",
    [("resnet-20", 9, 1 / 4, IMAGE), ("resnet-20", 9, 0.35, (1, 29, 31)), ("resnet-32", 15, 1 / 8, (1, 28, 28))],
)
def test_resnet_20_written_out(name, blocks, width, shape):
    model = net(name, shape, width=width).double()
    model(images(8, shape, torch.float64))  # moves the running statistics
    state = model.eval().state_dict()
    torch.testing.assert_close(
        model(images(3, shape, torch.float64)),
        plain_resnet(state, images(3, shape, torch.float64), blocks),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("depth", [2, 4, 6, 8])
def test_relu_may_follow_the_pooling(depth):
    "Outputs and gradients equal, bit for bit, those of conv-relu-pool."
    model = net(f"conv-{depth}", (3, 28, 28))

    def usual(x):
        for i, conv in enumerate(model.convs):
            x = torch.relu(conv(x))
            if i % 2:
                x = F.max_pool2d(x, 2)
        x = x.flatten(1)
        for i, linear in enumerate(model.linears):
            x = linear(torch.relu(x) if i else x)
        return x

    runs = []
    for f in (model, usual):
        out = f(images(4, (3, 28, 28)))
        runs.append((out, *torch.autograd.grad(F.cross_entropy(out, torch.arange(4)), model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


# ---------------------------------------------------------------- over the whole registry


@pytest.mark.parametrize("name", NAMES)
def test_forward_in_both_precisions_and_layouts(name):
    model, x = net(name).eval(), images()
    wide = copy.deepcopy(model).double()(x.double()).detach()
    assert wide.dtype == torch.float64 and wide.shape == (4, 10) and wide.isfinite().all() and wide.std() > 0
    torch.testing.assert_close(model(x), wide.float(), rtol=1e-3, atol=1e-3 * float(wide.abs().max()))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    layouts = []
    for m in last.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, _, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(
        last(x.contiguous(memory_format=torch.channels_last)), model(x), rtol=1e-3, atol=1e-4 * float(wide.abs().max())
    )
    assert all(layouts)  # no layer falls back to the other layout


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_deterministic_and_reaches_every_parameter(name):
    runs = []
    for _ in range(2):
        model = net(name)
        loss = F.cross_entropy(model(images()), torch.arange(4))
        runs.append([loss, *torch.autograd.grad(loss, model.parameters()), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    for _, g in zip(model.parameters(), runs[0][1:]):
        assert g.isfinite().all()
    assert all(g.any() for (n, p), g in zip(model.named_parameters(), runs[0][1:]) if n in prunable(model))


@pytest.mark.parametrize("name", NAMES)
def test_prunable_and_first_layer(name):
    model, seen = net(name), []
    own = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for n, m in own.items():
        m.register_forward_hook(lambda m, x, y, n=n: seen.append((n, x[0].numel())))
    x = images()
    model(x)
    assert list(prunable(model)) == [n for n, _ in model.named_parameters() if n.removesuffix(".weight") in own]
    assert sorted(n for n, _ in seen) == sorted(own)  # each is used, once
    assert first_layer(model) == seen[0][0] + ".weight" and seen[0][1] == x.numel()
    assert layer_shapes(model) == {
        f"{n}.weight": tuple(own[n].weight.shape) for n in (k.removesuffix(".weight") for k in prunable(model))
    }
    for m in own.values():  # a bias where no BatchNorm follows, and only there
        normed = isinstance(m, nn.Conv2d) and not isinstance(model, ConvNet)
        assert (m.bias is None) == normed


@pytest.mark.parametrize("name", NAMES)
def test_create_draws_from_the_generator_alone(name):
    a, b, c = net(name), net(name), net(name, seed=1)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    for n, w in prunable(a).items():
        assert w.numel() < 9 or not torch.equal(w, prunable(c)[n])
        if w.numel() > 2000:
            assert abs(float(w.detach().std()) / (2 / prod(w.shape[1:])) ** 0.5 - 1) < 0.1
    norms = [m for m in a.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool((m.weight == 1).all()) and not m.bias.any() for m in norms)
    assert not any(p.any() for n, p in a.named_parameters() if n.endswith("bias"))


@settings(max_examples=40)
@given(
    st.sampled_from(NAMES),
    st.floats(0.01, 1.3),
    st.sampled_from([1, 3]),
    st.integers(32, 41),
    st.integers(32, 41),
    st.integers(1, 12),
)
def test_any_width_and_size(name, width, channels, high, wide, classes):
    "Shapes fit at every width; nothing is computed."
    model = on_meta(lambda: MODELS[name]((channels, high, wide), classes, width=width))
    assert on_meta(lambda: model(torch.empty(2, channels, high, wide))).shape == (2, classes)

    def narrow(n):
        return max(1, round(n * width))

    first = {"l": 300, "c": 64, "v": 64, "r": 16 if name[-2:] in ("20", "32") else 64, "m": 32}[name[0]]
    shapes = list(layer_shapes(model).values())
    assert shapes[0][0] == narrow(first) and shapes[-1][0] == classes and min(map(min, shapes)) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_width_scales_the_hidden_widths_only(name):
    one, two = (list(layer_shapes(on_meta(lambda w=w: MODELS[name](IMAGE, 10, width=w))).values()) for w in (1, 2))
    assert len(one) == len(two)
    for i, (a, b) in enumerate(zip(one, two)):
        depthwise = name == "mobilenet-v2" and a[1:] == (1, 3, 3)
        assert b == (a[0] * (1 if i == len(one) - 1 else 2), a[1] * (1 if i == 0 or depthwise else 2), *a[2:])


# ---------------------------------------------------------------- what was there before


def test_old_calls_give_the_old_bits():
    "create of LeNet-300-100 as it was: torch's default draws for three layers, then Kaiming-normal in order."
    torch.manual_seed(3)
    model = create("lenet-300-100", (1, 8, 8), 7, generator(5, "init"))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    layers = [nn.Linear(64, 300), nn.Linear(300, 100), nn.Linear(100, 7)]
    assert torch.equal(state, torch.get_rng_state())
    g = generator(5, "init")
    for layer, got in zip(layers, (model.fc1, model.fc2, model.fc3)):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=g)
        assert torch.equal(layer.weight, got.weight) and not got.bias.any()
    assert list(dict(model.named_parameters())) == [f"fc{i}.{k}" for i in (1, 2, 3) for k in ("weight", "bias")]
    again = create("lenet-300-100", shape=(1, 8, 8), classes=7, generator=generator(5, "init"), width=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


# ---------------------------------------------------------------- refusals and plug-ins


@pytest.mark.parametrize(
    "name, side",
    [
        ("conv-2", 2),
        ("conv-4", 4),
        ("conv-6", 8),
        ("conv-8", 16),
        ("vgg-11", 32),
        ("vgg-19", 32),
        ("resnet-20", 1),
        ("resnet-50", 1),
        ("mobilenet-v2", 1),
    ],
)
def test_the_smallest_image(name, side):
    model = net(name, (1, side, side + 3), width=1 / 16)
    assert model.eval()(images(2, (1, side, side + 3))).shape == (2, 10)
    if side == 1:
        return
    for shape in ((1, side - 1, side + 3), (1, side + 3, side - 1)):
        with pytest.raises(
            ModelError,
            match=f"^{name} halves .* needs at least {side}x{side} pixels, not {shape[1]}x{shape[2]}; take [^.]*\\.$",
        ):
            create(name, shape)


def test_mnist_fits_all_but_vgg():
    for name in NAMES:
        if name.startswith("vgg"):
            with pytest.raises(ModelError, match="at least 32x32 pixels, not 28x28"):
                create(name)
        else:
            assert net(name, (1, 28, 28), width=1 / 16)(images(2, (1, 28, 28))).shape == (2, 10)


@pytest.mark.parametrize("width", [0, 0.0, -1, float("nan"), float("inf"), 16.001, "1", None])
@pytest.mark.parametrize("name", ["lenet-300-100", "resnet-20"])
def test_bad_widths(name, width):
    with pytest.raises(ModelError, match=r"^The width is .*; give a number above 0 and at most 16, [^.]*\.$"):
        create(name, IMAGE, width=width)


def test_other_refusals():
    for shape in ((784,), (0, 32, 32), (2, 3, 32, 32)):
        with pytest.raises(ModelError, match=r"^resnet-20 reads images of a shape \(channels, height, width\)"):
            create("resnet-20", shape)
    with pytest.raises(ModelError, match="did you mean 'resnet-20'"):
        create("resnet20")
    with pytest.raises(ModelError, match="6n \\+ 2 layers, not 21"):
        cifar_resnet(21)
    with pytest.raises(ModelError, match="no first layer"):
        first_layer(nn.BatchNorm2d(3))


def test_plug_ins(monkeypatch):
    for name in ("mine", "mine-wide", "mine-bare"):
        monkeypatch.setitem(MODELS, name, None)
        del MODELS[name]

    @register_model("mine")
    def mine(shape, classes):
        return MLP(prod(shape), 5, classes)

    @register_model("mine-wide")
    def mine_wide(shape, classes, width):
        return MLP(prod(shape), int(8 * width), classes)

    @register_model("mine-bare")
    class Bare(nn.Linear):
        def __init__(self, shape, classes):
            super().__init__(prod(shape), classes)

        def forward(self, x):
            return super().forward(x.flatten(1))

    assert layer_shapes(create("mine", (1, 2, 2), 3)) == {"fc1.weight": (5, 4), "fc2.weight": (3, 5)}
    assert layer_shapes(create("mine", (1, 2, 2), 3, width=1)) == layer_shapes(create("mine", (1, 2, 2), 3))
    assert layer_shapes(create("mine-wide", (1, 2, 2), 3))["fc1.weight"] == (8, 4)
    assert layer_shapes(create("mine-wide", (1, 2, 2), 3, width=0.5))["fc1.weight"] == (4, 4)
    assert layer_shapes(create("mine-bare", (1, 2, 2), 3)) == {"weight": (3, 4)}
    for name in ("mine", "mine-bare"):
        with pytest.raises(ModelError, match=f"^The model '{name}' has no width multiplier; use width 1, or [^.]*\\.$"):
            create(name, (1, 2, 2), 3, width=0.5)
    with pytest.raises(ModelError, match="registered already"):
        register_model("mine")(lambda shape, classes: None)


# ---------------------------------------------------------------- scoring


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("scorer", [synflow, snip, grasp])
@pytest.mark.parametrize("name", ["resnet-20", "mobilenet-v2", "vgg-11", "conv-4"])
def test_scoring_leaves_the_model_bit_for_bit(name, scorer, mode):
    "Also with operations in place, under double differentiation (GraSP)."
    model, batch = net(name, width=1 / 4), [(images(4), torch.arange(4))]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scores = scorer(model, batch, mode=mode)
    assert list(scores) == list(prunable(model)) and all(s.isfinite().all() for s in scores.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(
        state, torch.get_rng_state()
    )
    assert model.training and all(p.grad is None for p in model.parameters())
    seen = [n for n, s in scores.items() if s.any()]
    if scorer is synflow and name == "mobilenet-v2" and mode == "eval":
        assert seen == ["fc.weight"]  # ReLU6 is at its top everywhere
    elif not (scorer is synflow and mode == "train"):
        assert seen == list(scores)  # one all-ones image normalised by its own statistics


def test_grasp_through_in_place_operations_is_right():
    "H g by finite differences of the gradient, in float64, on ResNet-20."
    model = net("resnet-20", (1, 8, 8), width=1 / 8).double().eval()
    x, y = images(6, (1, 8, 8), torch.float64), torch.arange(6)
    names, params = zip(*prunable(model).items())

    def gradient():
        return torch.autograd.grad(F.cross_entropy(model(x) / 200, y), params)

    scores, g = grasp(model, [(x, y)]), gradient()
    step = 1e-4 / max(float(t.abs().max()) for t in g)

    def moved(by):
        with torch.no_grad():
            [p.add_(t, alpha=by) for p, t in zip(params, g)]
        out = gradient()
        with torch.no_grad():
            [p.sub_(t, alpha=by) for p, t in zip(params, g)]
        return out

    raw = [p.detach() * (a - b) / (2 * step) for p, a, b in zip(params, moved(step), moved(-step))]
    norm = abs(sum(r.sum() for r in raw))
    a, b = torch.cat([scores[n].flatten() for n in names]), torch.cat([(r / norm).flatten() for r in raw])
    assert torch.nn.functional.cosine_similarity(a, b, 0) > 0.999
