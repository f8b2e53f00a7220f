"Tickets: what is saved comes back, what does not fit is refused in one sentence, what is damaged is never read."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lth_companion.tickets import Ticket, TicketError, check_masks, generator, prunable
from lth_companion.training.models import MLP, create


def random_ticket(seed, sizes=(7, 5, 3), density=0.4, dtype=torch.float32):
    net = MLP(*sizes).to(dtype)
    masks = {
        n: (torch.rand(p.shape, generator=generator(seed, n)) < density).to(dtype) for n, p in prunable(net).items()
    }
    return net, Ticket.of(net, masks)


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
@settings(max_examples=40)
def test_save_and_load_is_the_identity(tmp_path, seed, sizes, density, dtype):
    _, t = random_ticket(seed, sizes, density, dtype)
    again = Ticket.load(t.save(tmp_path / "t.safetensors"))
    for part in ("weights", "masks", "rest"):
        mine, theirs = getattr(t, part), getattr(again, part)
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[n], theirs[n]) and mine[n].dtype == theirs[n].dtype for n in mine)
    assert again.digest == t.digest


def test_the_digest_is_of_what_trains():
    net, t = random_ticket(0)
    changed = {n: torch.where(t.masks[n] == 0, torch.full_like(w, 9.0), w) for n, w in t.weights.items()}
    assert Ticket(changed, t.masks, t.rest).digest == t.digest  # pruned weights do not train
    flipped = {n: torch.where(t.masks[n] == 0, w * -1, w) for n, w in t.weights.items()}
    assert Ticket(flipped, t.masks, t.rest).digest == t.digest  # nor the sign of a zero
    moved = {n: w.clone() for n, w in t.weights.items()}
    first = torch.nonzero(t.masks["fc1.weight"])[0]
    moved["fc1.weight"][tuple(first)] = torch.nextafter(moved["fc1.weight"][tuple(first)], torch.tensor(9.0))
    assert Ticket(moved, t.masks, t.rest).digest != t.digest


def test_apply_writes_the_effective_weights_and_biases():
    net, t = random_ticket(0)
    other = t.apply(MLP(7, 5, 3))
    assert all(torch.equal(p, t.effective[n]) for n, p in prunable(other).items())
    assert torch.equal(other.fc1.bias, net.fc1.bias)


@pytest.mark.parametrize("model", [MLP(7, 5, 4), MLP(7, 3), nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))])
def test_masks_for_another_model_are_refused(model):
    _, t = random_ticket(0)
    with pytest.raises(TicketError, match="keep_top|prune|scores") as e:
        t.apply(model)
    assert "\n" not in str(e.value)
    with pytest.raises(TicketError):
        check_masks(t.masks, model)


@given(st.binary(max_size=300))
@settings(max_examples=60)
def test_random_bytes_are_no_ticket(tmp_path, noise):
    (tmp_path / "noise").write_bytes(noise)
    with pytest.raises(TicketError, match="copy it again"):
        Ticket.load(tmp_path / "noise")


@pytest.mark.parametrize("harm", ["cut", "names", "shape"])
def test_a_damaged_ticket_is_refused(tmp_path, harm):
    from safetensors.torch import load_file, save_file

    _, t = random_ticket(0)
    path = t.save(tmp_path / "t.safetensors")
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        tensors = load_file(path)
        tensors["masks/fc1.weight"] = torch.zeros(1, dtype=torch.uint8)
        meta = {
            "format": "lth_companion.ticket",
            "version": "1",
            "names": '["fc1.weight", "fc2.weight"]' if harm == "shape" else "not json",
            "rest": "[]",
        }
        save_file(tensors, path, meta)
    with pytest.raises(TicketError) as e:
        Ticket.load(path)
    assert "\n" not in str(e.value)


def test_a_pickle_posing_as_a_ticket_runs_nothing(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(TicketError):
        Ticket.load(tmp_path / "bomb")
    assert not (tmp_path / "ran").exists()


def test_weights_and_masks_must_be_sound():
    with pytest.raises(TicketError, match="finite"):
        Ticket({"w": torch.tensor([torch.inf])}, {"w": torch.ones(1)})
    with pytest.raises(TicketError, match="other than 0 and 1"):
        Ticket({"w": torch.ones(2)}, {"w": torch.tensor([0.5, 1])})
    with pytest.raises(TicketError, match="at least one"):
        Ticket({}, {})


def test_density_by_layer():
    t = Ticket.of(create("lenet-300-100", generator=generator(0, "init")))
    assert t.density == 1 and set(t.densities.values()) == {1.0} and not t.empty


def test_packed_attention_is_prunable_and_batchnorm_is_not():
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(8, 2), "norm": nn.BatchNorm1d(8), "conv": nn.Conv1d(8, 8, 3)}
    )
    assert list(prunable(model)) == ["attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"]
