"Cohorts: the same computation as the dense masked loop, and nobody can tell who rides along."

import itertools

import pytest
import torch
from apart import as_near

from lth_companion.methods.pruning import prune
from lth_companion.tickets import Ticket, TicketError, generator
from lth_companion.training import data as datasets
from lth_companion.training.cohorts import block_units, coarse, engine, live, padded, train_cohort
from lth_companion.training.loop import train
from lth_companion.training.models import MLP, create, initialise
from lth_companion.training.recipe import Recipe


class Pictures:
    "A small data set of the data chapter's interface, 28x28: LeNet-300-100 on it trains 500 steps in a moment."

    name = id = "pictures"
    shape = (1, 28, 28)
    classes = 10

    def __init__(self, n=320):
        g = generator(0, "pictures")
        means = torch.randint(0, 256, (10, 1, 28, 28), generator=g)

        def draw(k):
            y = torch.randint(0, 10, (k,), generator=g)
            return (means[y] * 0.6 + torch.randint(0, 100, (k, 1, 28, 28), generator=g)).clamp(0, 255).to(
                torch.uint8
            ), y

        (self.train_x, self.train_y), (self.test_x, self.test_y) = draw(n), draw(200)
        self.val_x, self.val_y = self.test_x[:0], self.test_y[:0]

    def normalise(self, x):
        return (x.float() / 255 - 0.13) / 0.31

    def batch(self, x, y, i, augment=None, generator=None):
        return self.normalise(x[i]), y[i]


@pytest.fixture(scope="module")
def data():
    return Pictures()


@pytest.fixture(scope="module")
def tickets(data):
    net = create("lenet-300-100", generator=generator(0, "init"))
    batch = [(data.normalise(data.train_x[:100]), data.train_y[:100])]
    made = {}
    for name, density in (
        ("synflow", 0.005),
        ("snip", 0.005),
        ("random", 0.005),
        ("magnitude", 0.01),
        ("grasp", 0.05),
        ("snip", 0.3),
    ):
        made[f"{name} {density}"] = Ticket.of(
            net, prune(net, name, density, batch, rounds=10, generator=generator(0, "s"))
        )
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made["no live input"] = Ticket.of(net, prune(net, "synflow", 0.005, batch, rounds=1))
    return made


def as_double(t):
    return Ticket(*({n: v.double() for n, v in part.items()} for part in (t.weights, t.masks, t.rest)))


STEPS = Recipe(max_epochs=100, patience=None)  # 320 images, 64 a batch: 500 steps
KINDS = ["synflow 0.005", "snip 0.005", "random 0.005", "magnitude 0.01", "no live input"]


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_dense_masked_loop_after_500_steps(data, tickets, kind):
    t = as_double(tickets[kind])
    net = create("lenet-300-100").double()
    t.apply(net)
    want = train(net, data, STEPS, t.masks)
    for force in ("sparse", "block"):
        agrees(t, want, train_cohort([t], data, STEPS, force_engine=force)[0], force)


def test_the_dense_engine_is_that_loop(data, tickets):
    t, recipe = as_double(tickets["snip 0.3"]), Recipe(max_epochs=4, patience=None)
    net = create("lenet-300-100").double()
    t.apply(net)
    want, got = train(net, data, recipe, t.masks), train_cohort([t], data, recipe)[0]
    agrees(t, want, got, "dense", 20)
    assert want.ticket.digest == got.ticket.digest


def agrees(t, want, got, force, steps=500):
    assert want.iterations == got.iterations == steps and got.engine == force
    for n, w in want.ticket.weights.items():
        assert float((w * t.masks[n] - got.ticket.effective[n]).abs().max()) < 1e-9
        assert float((want.gradient[n] - got.gradient[n]).abs().max()) < 1e-9
    for n, b in want.ticket.rest.items():
        assert float((b - got.ticket.rest[n]).abs().max()) < 1e-9
    assert want.accuracies == got.accuracies
    moved = sum(float((got.ticket.rest[n] - t.rest[n]).abs().max()) for n in t.rest)
    assert moved > 0  # biases train even where no weight does


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(max_epochs=3, patience=None, momentum=0.9),
        Recipe(max_epochs=3, patience=None, momentum=0.9, nesterov=True, weight_decay=1e-3),
        Recipe(max_epochs=3, patience=None, weight_decay=1e-2),
    ],
)
@pytest.mark.parametrize("force", ["sparse", "block"])
def test_momentum_nesterov_and_decay_follow_torch(data, tickets, recipe, force):
    t = as_double(tickets["synflow 0.005"])
    net = t.apply(create("lenet-300-100").double())
    want, got = train(net, data, recipe, t.masks), train_cohort([t], data, recipe, force_engine=force)[0]
    for n, w in want.ticket.weights.items():
        assert float((w * t.masks[n] - got.ticket.effective[n]).abs().max()) < 1e-11


@pytest.mark.parametrize("force", ["sparse", "block"])
@pytest.mark.parametrize("batch", [33, 64, 100])
def test_bit_equal_for_any_company(data, tickets, force, batch):
    "Alone, in pairs, in sixteen, at any position: to the last bit in float32."
    recipe = Recipe(max_epochs=3, patience=None, batch_size=batch)
    own = [tickets[k] for k in KINDS[:4]]
    alone = [train_cohort([t], data, recipe, force_engine=force)[0] for t in own]
    for order in (own[::-1], own * 4, own[1:2] + own):
        for t, r in zip(order, train_cohort(order, data, recipe, force_engine=force)):
            mine = alone[next(i for i, o in enumerate(own) if o is t)]
            assert r.ticket.digest == mine.ticket.digest and r.losses == mine.losses and r.accuracies == mine.accuracies


def test_members_leave_when_they_stop_and_nobody_notices(data, tickets):
    recipe = Recipe(max_epochs=40, patience=2)
    own = [tickets[k] for k in KINDS]
    for force in ("sparse", "block"):
        own = own if force == "sparse" else own[:1] + own[-1:]
        together = train_cohort(own, data, recipe, force_engine=force)
        assert len({r.epochs for r in together}) > 1  # they did stop at different times
        for t, r in zip(own, together):
            mine = train_cohort([t], data, recipe, force_engine=force)[0]
            assert (r.ticket.digest, r.stopped, r.losses) == (mine.ticket.digest, mine.stopped, mine.losses)


def test_pruned_weights_stay_exactly_zero(data, tickets):
    recipe = Recipe(max_epochs=4, patience=None, momentum=0.9, weight_decay=1e-3)
    for force, (kind, t) in itertools.product(("sparse", "block", "dense"), tickets.items()):
        r = train_cohort([t], data, recipe, force_engine=force)[0]
        assert all(bool((w[t.masks[n] == 0] == 0).all()) for n, w in r.ticket.effective.items()), (force, kind)


def test_the_live_block_is_what_can_change(data, tickets):
    "Weights outside it are bit for bit as before; each one inside with a path from the input has moved."
    t = tickets["snip 0.005"]
    r = train_cohort([t], data, Recipe(max_epochs=3, patience=None))[0]
    for (n, w), alive in zip(r.ticket.effective.items(), live(t)):
        assert torch.equal(w[~alive], t.effective[n][~alive])
    moved = sum(int((w != t.effective[n]).sum()) for n, w in r.ticket.effective.items())
    assert moved > 0.8 * sum(int(a.sum()) for a in live(t))


def test_the_padded_size_follows_from_the_ticket(tickets):
    assert [coarse(n, 784) for n in (0, 32, 33, 129, 784)] == [32, 32, 64, 256, 784]
    sizes = padded(tickets["synflow 0.005"], Recipe())
    units = block_units(tickets["synflow 0.005"], Recipe())
    assert all(len(u) <= s for u, s in zip(units, sizes)) and sizes[1] <= 64  # SynFlow's ticket is narrow
    assert padded(tickets["synflow 0.005"], Recipe(weight_decay=1e-3))[1] == 304  # decay moves every weight


def test_the_engine_follows_from_the_ticket(tickets):
    assert (
        engine(tickets["snip 0.3"]) == "dense"
        and engine(tickets["snip 0.005"]) == "sparse"
        and engine(tickets["snip 0.005"], "cuda") == "block"
    )


def test_divergence_is_a_result(data, tickets):
    for force in ("sparse", "block", "dense"):
        r = train_cohort([tickets["snip 0.3"]], data, Recipe(lr=1e30, max_epochs=20, patience=5), force_engine=force)[0]
        assert (
            r.diverged is not None
            and r.ticket is None
            and r.accuracy == r.accuracies[-1]
            and r.accuracy_at(20) == r.accuracies[-1]
        )


def test_early_stopping_and_the_fixed_budget_are_one_run(data, tickets):
    t = tickets["synflow 0.005"]
    early = train_cohort([t], data, Recipe(lr=1.0, max_epochs=60, patience=1))[0]
    both = train_cohort([t], data, Recipe(lr=1.0, max_epochs=60, patience=1, min_epochs=50))[0]
    fixed = train_cohort([t], data, Recipe(lr=1.0, max_epochs=50, patience=None))[0]
    assert (
        early.stopped == both.stopped < 50
        and early.accuracy == both.accuracy
        and both.accuracy_at(50) == fixed.accuracy
    )


def test_other_seeds_and_levels_see_other_orders(data, tickets):
    t, recipe = tickets["synflow 0.005"], Recipe(max_epochs=1, patience=None)
    runs = [train_cohort([t], data, recipe, seed, level)[0].losses for seed, level in ((0, 0), (1, 0), (0, 1))]
    assert runs[0] != runs[1] and runs[0] != runs[2]


def test_what_does_not_fit_is_refused(data, tickets):
    from torch import nn

    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 10))
    with pytest.raises(TicketError, match="multilayer"):
        train_cohort([Ticket.of(conv)], data)
    with pytest.raises(TicketError, match="inputs"):
        train_cohort([Ticket.of(MLP(64, 10, 10))], data)
    with pytest.raises(ValueError, match="augment"):
        train_cohort([tickets["synflow 0.005"]], data, Recipe(augment="crop-flip"))
    with pytest.raises(ValueError, match="validation=5000"):
        train_cohort([tickets["synflow 0.005"]], data, Recipe(stop_on="validation"))


def test_validation_stops_where_it_is_asked_to():
    digits = datasets.load("digits", validation=200)
    net = initialise(MLP(64, 30, 20, 10), generator(0, "init"))
    t = Ticket.of(net, prune(net, "magnitude", 0.1, digits.scoring_batches(50, generator(0, "b"))))
    r = train_cohort([t], digits, Recipe(max_epochs=30, patience=3, stop_on="validation"))[0]
    assert len(r.stop_losses) == r.epochs and r.stop_losses != r.losses
    twin = t.apply(MLP(64, 30, 20, 10))
    dense = train(twin, digits, Recipe(max_epochs=30, patience=3, stop_on="validation"), t.masks)
    assert abs(dense.stopped - r.stopped) <= 1


@pytest.mark.gpu
def test_the_block_engine_on_cuda_rounds_as_a_cpu_does(data, tickets):
    "After 50 steps: weights and losses as near to a float64 run's as those of the CPU's own float32 engines."
    import copy

    there = copy.copy(data)
    for s in ("train", "test", "val"):
        for k in "xy":
            setattr(there, f"{s}_{k}", getattr(data, f"{s}_{k}").cuda())
    for t in tickets.values():
        exact = train_cohort([as_double(t)], data, FIFTY_STEPS, force_engine="dense")[0]
        own = [train_cohort([t], data, FIFTY_STEPS, force_engine=e)[0] for e in ("dense", "block", "sparse")]
        gpu = [train_cohort([t], there, FIFTY_STEPS.model_copy(update=g))[0] for g in ({}, dict(graph=True))]
        for g in gpu:
            as_near(g.ticket.effective, exact.ticket.effective, [o.ticket.effective for o in own], floor=1e-6)
            as_near(g.losses, exact.losses, [o.losses for o in own], floor=1e-6)


FIFTY_STEPS = Recipe(max_epochs=10, patience=None)
