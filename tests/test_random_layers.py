"""What a network itself draws (dropout and its like) follows from the seed of its training: again, resumed,
rewound, in company; torch's global generators stay where they are.
"""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from pretend_cuda import pretended
from test_training import images, same, stand_in  # noqa: F401  (a fixture)
from torch import nn

from lth_companion.methods.imp import admm
from lth_companion.methods.plasticity import dense_gradients
from lth_companion.methods.supermasks import Supermask, search
from lth_companion.tickets import generator, prunable
from lth_companion.training import devices, loop, recipe
from lth_companion.training.loop import train
from lth_companion.training.models import initialise
from lth_companion.training.recipe import Recipe

DATA = images((1, 8, 8), n=100)
# four steps an epoch, the last of four images
RECIPE = Recipe(lr=0.05, momentum=0.9, batch_size=32, max_epochs=3, patience=None)
SETTINGS = Supermask(density=0.5, change="hybrid", frequency=1, rate=0.2)


class Drawing(nn.Module):
    """Draws in every way there is: a layer, a function, a slope, and (`always`) also in eval mode. `p`: the chance
    of a drop.
    """

    def __init__(self, p=0.3, always=False):
        super().__init__()
        self.conv, self.fc1, self.fc2, self.drop, self.slope, self.p, self.always = (
            nn.Conv2d(1, 4, 3),
            nn.Linear(144, 16),
            nn.Linear(16, 10),
            nn.Dropout2d(p),
            nn.RReLU(),
            p,
            always,
        )

    def forward(self, x):
        x = self.slope(self.fc1(self.drop(self.conv(x).relu()).flatten(1)))
        return self.fc2(F.dropout(x, self.p, self.training or self.always))


def net(kind=Drawing, **fields):
    with torch.random.fork_rng([]):
        # torch draws the first weights, which `initialise` then replaces
        return initialise(kind(**fields), generator(0, "init"))


def masks(model):
    return {n: (torch.rand(w.shape, generator=generator(1, n)) < 0.5).float() for n, w in prunable(model).items()}


def trained(seed=0, recipe=RECIPE, model=None, **kw):
    model = model or net()
    return train(model, DATA, recipe, masks(model), seed, **kw)


def searched(seed=0, recipe=RECIPE, **kw):
    return search(net(), DATA, recipe, SETTINGS, seed, **kw)[0]


def equal(a, b):
    assert a.losses == b.losses and a.accuracies == b.accuracies and a.ticket.digest == b.ticket.digest


@pytest.fixture(autouse=True)
def undisturbed():
    "Every test begins with its own state of the global generator, and must leave it."
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


WAYS = {"train": trained, "search": searched}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_twice_is_once_and_another_seed_is_another(way):
    first = way()
    with torch.random.fork_rng([]):
        torch.rand(17)
        equal(way(), first)
    assert way(seed=1).losses != first.losses


def test_every_step_draws_anew():
    "What a dropout keeps in each of twelve steps, and that the seeds tell runs, epochs and levels apart."
    seen, model = [], net()
    model.drop.register_forward_hook(
        lambda layer, x, y: (
            seen.append(tuple((y[:4, :, 0, 0] == 0)[x[0][:4, :, 0, 0] != 0].tolist())) if layer.training else None
        )
    )
    trained(model=model)
    assert len(seen) == 12 and len(set(seen)) > 10 and any(map(any, seen))
    seeds = [s for k in ((0, 0), (1, 0), (0, 1)) for level in (0, 1) for s in recipe.layer_seeds(*k, 50, level)]
    assert len(set(seeds)) == len(seeds) == 6 * 50
    assert trained(level=1).losses != trained().losses


def dies(name, path):
    "A run with a checkpoint that is killed after its second epoch."
    WAYS[name](checkpoint=path, on_epoch=lambda _, result: result.epochs == 2 and os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("name", WAYS)
def test_killed_and_resumed_is_the_whole(name, killed, tmp_path):
    path, epochs = killed(name, tmp_path / "run.safetensors"), []
    again = WAYS[name](checkpoint=path, on_epoch=lambda _, result: epochs.append(result.epochs))
    assert epochs == [2, 3]  # the checkpoint is written after the callback
    equal(again, WAYS[name]())


@pytest.mark.parametrize("k", [4, 6, 7])
def test_rewound_into_an_epoch_it_draws_what_the_whole_run_drew(k):
    whole = trained(save_at=(k,))
    left = trained(until=k)
    assert left.ticket.digest == whole.saved[k].digest
    model = whole.saved[k].apply(net())
    again = train(model, DATA, RECIPE, whole.saved[k].masks, 0, begin=k, velocity=whole.velocities[k])
    assert again.losses == whole.losses[k // 4 :] and again.ticket.digest == whole.ticket.digest


def losses(way, seed):
    return WAYS[way](seed).losses


def test_beside_others_is_alone():
    "Two processes, each with one run after the other."
    asked = [(way, seed) for seed in (0, 1, 0) for way in WAYS]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(losses, *zip(*asked)))
    for (way, seed), got in zip(asked, found):
        assert got == losses(way, seed)


def test_a_network_that_draws_in_eval_mode_is_evaluated_by_the_seed():
    first = trained(model=net(always=True))
    with torch.random.fork_rng([]):
        torch.rand(5)
        equal(trained(model=net(always=True)), first)


class Broken(Drawing):
    "Draws, and ends in an error at its sixth step."

    steps = 0

    def forward(self, x):
        out, self.steps = super().forward(x), self.steps + 1
        if self.steps == 6:
            raise FloatingPointError("the sixth step")
        return out


RUNS = {
    "train": lambda m: train(m, DATA, RECIPE),
    "search": lambda m: search(m, DATA, RECIPE, SETTINGS),
    "admm": lambda m: admm(m, DATA, RECIPE, 0.5, epochs=2),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_an_error_leaves_the_generator_too(run):
    "(The fixture looks.)"
    with pytest.raises(FloatingPointError):
        run(net(Broken))


def test_a_callback_draws_from_the_generator_of_the_caller():
    "What it draws there is no part of the run, and the run is no part of what it draws."
    drawn = []
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        noted = trained(on_epoch=lambda *_: drawn.append(torch.rand(3)))
        torch.manual_seed(3)
        assert torch.equal(torch.stack(drawn), torch.stack([torch.rand(3) for _ in range(3)]))
    equal(noted, trained())


def test_admm_and_dense_gradients_draw_by_the_seed():
    def pruned(seed):
        return admm(net(), DATA, RECIPE, 0.5, seed=seed, epochs=2)[1]["residual"]

    def gradients(seed, epoch=1):
        return torch.cat([g.flatten() for g in dense_gradients(net(), DATA, RECIPE, seed, epoch).values()])

    a, b = pruned(0), gradients(0)
    with torch.random.fork_rng([]):
        torch.rand(5)
        assert pruned(0) == a and torch.equal(gradients(0), b)
    assert pruned(1) != a and not torch.equal(gradients(0, 2), b)


def test_dense_gradients_are_those_of_the_step_itself():
    seen = []

    class Watch:
        "A sparsity that looks at the first gradient and changes nothing."

        key, history = None, []

        def attach(self, names, weights, *_):
            self.weights = weights

        def wants(self, t):
            return t == 1

        def observe(self):
            seen.extend(w.grad.clone() for w in self.weights)

        def update(self, t):
            pass

    model = net()
    train(model, DATA, RECIPE, {n: torch.ones_like(w) for n, w in prunable(model).items()}, sparsity=Watch(), until=1)
    for ours, theirs in zip(dense_gradients(net(), DATA, RECIPE, 0, 0).values(), seen):
        assert torch.equal(ours, theirs)


def test_without_random_layers_nothing_changes(monkeypatch):
    "Not one bit: the seeds are set, and nobody reads them."

    def plain():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def run():
        return trained(model=net(plain)), search(net(plain), DATA, RECIPE, SETTINGS)[0]

    now = run()
    for place in ("training.loop", "methods.supermasks"):
        monkeypatch.setattr(f"lth_companion.{place}.reseed", lambda *_: None)
    for a, b in zip(run(), now):
        equal(a, b)


def test_a_replayed_step_draws_as_an_eager_one(stand_in):  # noqa: F811
    "The warm-up of a graph draws, and the step after it does not notice."
    model = net()
    results = [
        train(m, DATA, RECIPE.model_copy(update=dict(graph=graph, lr=2**-5)), masks(model))
        for graph, m in ((False, model), (True, net()))
    ]
    same(*results)
    assert stand_in
    equal(*(searched(recipe=RECIPE.model_copy(update=dict(graph=graph, lr=2**-5))) for graph in (False, True)))


def test_on_the_pretended_device_graphs_draw_as_eager_steps():
    "(Its generator is the CPU's: its operations are.)"
    with pretended():
        data, found = images((1, 8, 8), n=100, device="cuda"), []
        for graph in (False, True):
            recipe = RECIPE.model_copy(update=dict(graph=graph, lr=2**-5))
            found.append(
                (
                    train(net().to("cuda"), data, recipe).losses,
                    search(net().to("cuda"), data, recipe, SETTINGS)[0].losses,
                )
            )
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_on_a_gpu_the_device_draws_by_the_seed(graph):
    data, recipe = images((1, 8, 8), n=100, device="cuda"), RECIPE.model_copy(update=dict(graph=graph))
    before = torch.cuda.get_rng_state()

    def run(seed=0, **kw):
        return train(net().cuda(), data, recipe, seed=seed, **kw)

    first, searched_first = run(), search(net().cuda(), data, recipe, SETTINGS)[0]
    torch.rand(7, device="cuda")
    moved = torch.cuda.get_rng_state()
    assert (
        run().losses == first.losses and search(net().cuda(), data, recipe, SETTINGS)[0].losses == searched_first.losses
    )
    assert run(1).losses != first.losses
    assert torch.equal(torch.cuda.get_rng_state(), moved) and not torch.equal(moved, before)


@pytest.mark.gpu
def test_a_graph_draws_on_a_gpu_what_an_eager_step_draws():
    "By the zeros that a dropout leaves: those of a replay, and of the eager step with the same seed."
    layer, kept, x = nn.Dropout(0.5).cuda(), torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda")
    replay = devices.capture(lambda: kept.copy_(layer(x)))
    for seed in (1, 2, 1):
        with loop.forked("cuda"):
            loop.reseed(seed, "cuda")
            replay()
            graphed = kept.clone()
            loop.reseed(seed, "cuda")
            assert torch.equal(layer(x), graphed)
