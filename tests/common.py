"""What several test files say: the defaults that all trials of a network have for ever, and how results compare."""

import torch

# a field equal to the default that it had when it was introduced is left out of a hash, so these never change
NETWORK = {
    "data": "mnist",
    "train_size": None,
    "validation": 0,
    "model": "lenet-300-100",
    "width": 1,
    "seed": 0,
    "device": "cpu",
}


def same_training(a, b):
    "Two networks with their `Result`s are equal to the bit: parameters and buffers, ticket, losses, accuracies, end."
    (net, result), (net2, result2) = a, b
    state, state2 = net.state_dict(), net2.state_dict()
    assert list(state) == list(state2) and all(torch.equal(state[n], state2[n]) for n in state)
    assert result.ticket.digest == result2.ticket.digest
    assert (result.losses, result.accuracies, result.iterations, result.stopped) == (
        result2.losses,
        result2.accuracies,
        result2.iterations,
        result2.stopped,
    )


def sentence(error):
    "The one sentence of an error (pydantic's frame around our own left out)."
    found = (
        error.value.errors()[0]["msg"].removeprefix("Value error, ")
        if hasattr(error.value, "errors")
        else str(error.value)
    )
    assert "\n" not in found and ". " not in found.rstrip(".") + " ", found
    return found
