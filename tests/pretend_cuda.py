"""A pretended CUDA device, for machines without one: `with pretended():`, and `device="cuda"` works as far as a
machine without a GPU can tell.

What is pretended. A tensor's memory stays where it is and is marked: `.device` says `cuda:0`, views and gradients
share the mark, what is computed from marked tensors is marked. Every operation is the CPU's own, on the same bytes,
so results are the CPU's to the bit. What a GPU refuses is refused:
- tensors of both sides in one operation, but for what may cross (`CROSSING`: copies, shapes; indices on the CPU of
a tensor on the device; numbers, which are CPU tensors without dimensions);
- `numpy()` of the device's tensors, generators of the CPU for draws on the device, gradients of the other side,
other devices than the one.
`torch.cuda` answers as with one device. A graph (`torch.cuda.graph`) is a tape: capture notes every operation with
the very tensors and numbers it was given, and refuses what would wait for the device; `replay` repeats the
operations on what these tensors hold then, and writes the results where those of the capture lie. What the captured
Python did, or a number it read, is not looked at again. So a step that forgets to be a graph's step is found.

What is not. Kernels and their numerics, memory, streams side by side; `autocast("cuda")` is the CPU's; draws
without a generator are the CPU's; a call is looked at as Python makes it, not what `torch` does within it;
`torch.compile`, DLPack, pickles and a model split over both sides are not pretended.

`install()` pretends for the rest of the process; `pretended/sitecustomize.py` does that in processes that others
start (workers, kernels, `lth`).
"""

import contextlib
import threading
import types
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

DEVICE, NAME, MEMORY = torch.device("cuda", 0), "pretended CUDA device", 16 * 2**30
# shapes and types alone
CROSSING = {
    "copy_",
    "_foreach_copy_",
    "fill_",
    "to",
    "type_as",
    "data.__set__",
    "_has_compatible_shallow_copy_type",
    "backward",  # values, or whole tensors
    "view_as",
    "expand_as",
    "reshape_as",
    "is_same_size",
    "broadcast_tensors",
    "result_type",
    "__deepcopy__",
    "is_set_to",
}
# here even a number must be on the device
NUMBERS_TOO = {
    "cat",
    "concat",
    "concatenate",
    "stack",
    "hstack",
    "vstack",
    "dstack",
    "equal",
    "index_select",
    "gather",
    "take",
}
# the host waits for what these give
WAITING = {
    "item",
    "tolist",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
    "unique_consecutive",
    "bincount",
    "equal",
    "allclose",
    "is_nonzero",
}
NOT_OURS = {"_parse_to", "device"}  # they read a device and make no tensor


# ---------------------------------------------------------------- marks


def on_cuda(tensor) -> bool:
    "Whether a tensor's memory is marked as the device's."
    try:
        return getattr(tensor.untyped_storage(), "pretended", False)
    except RuntimeError:
        return False  # it has no memory of its own (sparse, or a wrapper)


def mark(tensor):
    tensor.untyped_storage().pretended = True


def moved(tensor, there: bool):
    "The tensor on that side: itself, or a copy."
    if on_cuda(tensor) == there:
        return tensor
    copy = tensor.clone()
    if there:
        mark(copy)
    return copy


def tensors_in(value):
    "All tensors in nested lists, tuples and dicts."
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_in(v)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def side_of(device) -> bool | None:
    "True for the device, False for the CPU, None for any other; RuntimeError for a second device."
    device = (
        DEVICE
        if isinstance(device, int) and not device
        else torch.device("cuda", device)
        if isinstance(device, int)
        else torch.device(device)
    )
    if device.type == "cuda" and device.index:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return {"cuda": True, "cpu": False}.get(device.type)


def mixed(name):
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (in {name})"
    )


# ---------------------------------------------------------------- what a tensor says of itself


def _device(f, t):
    return DEVICE if on_cuda(t) else f(t)


def _is_cuda(f, t):
    return on_cuda(t)


def _is_cpu(f, t):
    return f(t) and not on_cuda(t)


def _get_device(f, t):
    return 0 if on_cuda(t) else f(t)


def _type(f, t, *a, **k):
    if a or k:
        return settle(f(t, *a, **k), on_cuda(t), None, [t])
    return f(t).replace("torch.", "torch.cuda.", 1) if on_cuda(t) else f(t)


def _repr(f, t, *a, **k):
    return f"{f(t, *a, **k)[:-1]}, device='cuda:0')" if on_cuda(t) else f(t, *a, **k)


def _numpy(f, t, *a, **k):
    if on_cuda(t):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory"
            " first."
        )
    return f(t, *a, **k)


def _cuda(f, t, device=None, *a, **k):
    side_of(DEVICE if device is None else device)
    return moved(t, True)


def _cpu(f, t, *a, **k):
    return moved(t, False)


def _get_grad(f, t):
    found = f(t)
    if found is not None and on_cuda(t):
        mark(found)
    return found


def _set_grad(f, t, new):
    if new is not None and on_cuda(new) != on_cuda(t):
        raise RuntimeError("assigned grad has data located on a different device")
    return f(t, new)


def _gradients(f, outputs, inputs, *a, **k):
    found = f(outputs, inputs, *a, **k)
    for t, g in zip([inputs] if isinstance(inputs, torch.Tensor) else inputs, found):
        if g is not None and on_cuda(t):
            mark(g)
    return found


ANSWERS = {
    "device.__get__": _device,
    "is_cuda.__get__": _is_cuda,
    "is_cpu.__get__": _is_cpu,
    "get_device": _get_device,
    "type": _type,
    "__repr__": _repr,
    "numpy": _numpy,
    "__array__": _numpy,
    "cuda": _cuda,
    "cpu": _cpu,
    "grad.__get__": _get_grad,
    "grad.__set__": _set_grad,
    "grad": _gradients,
}


# ---------------------------------------------------------------- what may meet


def _advanced(index):
    "The parts of an index that are tensors, lists or arrays, but for numbers."
    parts = index if isinstance(index, tuple) else (index,)
    return [
        i
        for i in parts
        if not (
            i is None
            or i is Ellipsis
            or isinstance(i, (int, slice))
            or isinstance(i, torch.Tensor)
            and not i.dim()
            and i.dtype != torch.bool
        )
    ]


def check_index(name, target, index, value=None):
    """Indices may lie on the CPU; a value on the other side can be copied into a slice, not scattered. RuntimeError
    otherwise.
    """
    if not on_cuda(target) and any(on_cuda(t) for t in tensors_in(_advanced(index))):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if _advanced(index) and isinstance(value, torch.Tensor) and value.dim() and on_cuda(value) != on_cuda(target):
        raise mixed(name)


def check_meeting(name, tensors, out):
    """RuntimeError where others meet a tensor of the device; numbers of the CPU are welcome, but not as the result
    (the first tensor of an operation in place, and `out`).
    """
    written = [
        *tensors[:1]
        * (name.endswith("_") and not name.endswith("__") or name.startswith("__i") and name != "__index__"),
        *tensors_in(out),
    ]
    guests = [t for t in tensors if t.dim() or name in NUMBERS_TOO] + written
    if not all(map(on_cuda, guests)):
        raise mixed(name)


# ---------------------------------------------------------------- the mode


def name_of(f) -> str:
    "The name of a function, or of a property's accessor as `property.__get__`."
    owner = getattr(f, "__self__", None)
    return (
        f"{owner.__name__}.{f.__name__}"
        if f.__name__ in ("__get__", "__set__") and hasattr(owner, "__name__")
        else f.__name__
    )


class Pretending(TorchFunctionMode):
    "Looks at every call of torch while it is entered."

    tape = None  # of the graph that is being captured: one a process, as on a GPU

    def __torch_function__(self, f, types, args=(), kwargs=None):
        name, kwargs = name_of(f), kwargs or {}
        if name in NOT_OURS:
            return f(*args, **kwargs)
        if Pretending.tape is not None:
            refuse_to_wait(name, args, kwargs)
        out = ANSWERS[name](f, *args, **kwargs) if name in ANSWERS else self.call(f, name, args, kwargs)
        if Pretending.tape is not None:
            Pretending.tape.note(f, args, kwargs, out)
        return out

    def call(self, f, name, args, kwargs):
        tensors, asked = list(tensors_in(args[:1] if name == "__deepcopy__" else [args, kwargs])), None
        if kwargs.get("device") is not None:
            asked = side_of(kwargs["device"])
            if asked is None:
                return f(*args, **kwargs)
            kwargs = kwargs | {"device": "cpu"}
        elif name == "to" and len(args) > 1 and isinstance(args[1], (str, int, torch.device)):
            asked = side_of(args[1])
            if asked is None:
                return f(*args, **kwargs)
            args = (args[0], "cpu", *args[2:])
        elif name in ("to", "type_as") and len(tensors) > 1:
            asked = on_cuda(tensors[1])
        elif name in ("tensor", "as_tensor", "asarray"):
            # a list of numbers goes to the CPU, wherever the numbers are
            asked = isinstance(args[0], torch.Tensor) and on_cuda(args[0])
        here = any(map(on_cuda, tensors))
        if name in ("__getitem__", "__setitem__"):
            check_index(name, *args)
        elif here and asked is None and name not in CROSSING:
            check_meeting(name, tensors, kwargs.get("out"))
        side = (
            asked if asked is not None else on_cuda(tensors[0]) if here and name in CROSSING | {"__getitem__"} else here
        )
        if side and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        return settle(f(*args, **kwargs), side, asked, tensors)


def settle(out, side, asked, inputs):
    """The output on its side: new memory is marked; that of an input keeps its mark, and is copied where another
    side was asked for.
    """
    if (
        asked is not None
        and isinstance(out, torch.Tensor)
        and any(out.untyped_storage() is t.untyped_storage() for t in inputs)
    ):
        return moved(out, asked)
    if side:
        given = {id(t.untyped_storage()) for t in inputs}
        for t in tensors_in(out):
            if id(t.untyped_storage()) not in given:
                mark(t)
    return out


# ---------------------------------------------------------------- graphs

CAPTURING = "CUDA error: operation not permitted when stream is capturing"


def selects(name, args) -> bool:
    "Whether a call indexes by a mask, whose count decides a shape; a number written through one is a fill."
    if name not in ("__getitem__", "__setitem__") or not any(
        t.dtype == torch.bool for t in tensors_in(_advanced(args[1]))
    ):
        return False
    return name == "__getitem__" or isinstance(args[2], torch.Tensor) and args[2].numel() != 1


def fetches(name, args, kwargs) -> bool:
    "Whether a call carries numbers from one side to the other."
    device = kwargs.get("device", kwargs.get("other", args[1] if len(args) > 1 else None))
    if name == "copy_":
        return on_cuda(args[0]) != on_cuda(args[1])
    if name == "cuda":
        return not on_cuda(args[0])
    if name == "to" and isinstance(device, (str, int, torch.device, torch.Tensor)):
        return on_cuda(args[0]) != (on_cuda(device) if isinstance(device, torch.Tensor) else side_of(device))
    return (
        name in ("tensor", "as_tensor")
        and kwargs.get("device") is not None
        and bool(side_of(kwargs["device"]))
        and not (isinstance(args[0], torch.Tensor) and on_cuda(args[0]))
    )


def refuse_to_wait(name, args, kwargs):
    "RuntimeError for a call in a capture that would wait for the device, or fetch from the CPU."
    if (
        fetches(name, args, kwargs)
        or (name in WAITING or selects(name, args))
        and any(map(on_cuda, tensors_in([args, kwargs])))
    ):
        raise RuntimeError(f"{CAPTURING} (in {name})")


def replaced(value, tensor):
    "Nested lists, tuples and dicts anew, with `tensor(t)` for every tensor."
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if isinstance(value, (list, tuple)) and any(True for _ in tensors_in(value)):
        return type(value)([replaced(v, tensor) for v in value])
    return {k: replaced(v, tensor) for k, v in value.items()} if isinstance(value, dict) else value


class Tape:
    "The operations of a capture, with the tensors they were given and gave."

    def __init__(self):
        self.steps, self.made = [], []

    def note(self, f, args, kwargs, out):
        given = list(tensors_in([args, kwargs]))
        found = list(tensors_in(out))
        if not found and (out is not None or not given):
            return  # it asked for a shape, say
        ambient = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        # lists of tensors as they are now
        self.steps.append((f, *(replaced(given, lambda t: t) for given in (args, kwargs)), found, ambient))
        memory = {id(t.untyped_storage()) for t in given}
        self.made += [
            t
            for t in found
            if id(t.untyped_storage()) not in memory
            and t.numel() <= t.untyped_storage().nbytes() // max(t.element_size(), 1)
        ]

    def run(self):
        now = {}  # id of a tensor of the capture -> what stands for it in this replay

        def present(value):
            return replaced(value, lambda t: now.get(id(t), t))

        for f, args, kwargs, found, (grad, cast, dtype) in self.steps:
            with (
                torch.set_grad_enabled(grad),
                torch.autocast("cpu", dtype, cast, cache_enabled=False) if cast else contextlib.nullcontext(),
            ):
                now |= {
                    id(old): new
                    for old, new in zip(found, tensors_in(f(*present(args), **present(kwargs))))
                    if new is not old
                }
        with torch.no_grad():
            for old in self.made:
                if id(old) in now:
                    old.detach().copy_(now[id(old)])


class Graph:
    "`torch.cuda.CUDAGraph`."

    tape = None

    def replay(self):
        if self.tape is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if Pretending.tape is not None:
            raise RuntimeError(CAPTURING)
        self.tape.run()

    def reset(self):
        self.tape = None

    def pool(self):
        return (0, 0)


@contextlib.contextmanager
def capturing(graph, pool=None, stream=None, **_):
    """`torch.cuda.graph`. Unlike a GPU's capture, this one computes too; both leave changed tensors for the caller
    to put back.
    """
    if Pretending.tape is not None:
        raise RuntimeError(CAPTURING)
    Pretending.tape = tape = Tape()
    try:
        yield
    finally:
        Pretending.tape = None
    graph.tape = tape


class Stream:
    "`torch.cuda.Stream`: all work is done at once, so that no stream waits."

    def __init__(self, *a, **k):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event

    def query(self):
        return True

    def synchronize(self):
        synchronize()


def synchronize(device=None):
    if Pretending.tape is not None:
        raise RuntimeError(CAPTURING)


# ---------------------------------------------------------------- torch.cuda


def _of_the_device(value=None):
    """A function of `torch.cuda` that takes a device, the present one by default. (A new one each time: dynamo,
    which every optimizer imports, allows no function two names.)
    """

    def answer(device=None):
        side_of(DEVICE if device is None else device)
        return value

    return answer


def _always(value=None):
    return lambda *a, **k: value


CUDA = dict(
    is_available=_always(True),
    is_initialized=_always(True),
    init=_always(),
    _lazy_init=_always(),
    device_count=_always(1),
    current_device=_always(0),
    set_device=_of_the_device(),
    get_device_name=_of_the_device(NAME),
    get_device_capability=_of_the_device((9, 0)),
    is_bf16_supported=_always(True),
    synchronize=synchronize,
    empty_cache=_always(),
    ipc_collect=_always(),
    get_device_properties=_of_the_device(
        types.SimpleNamespace(name=NAME, total_memory=MEMORY, multi_processor_count=1, major=9, minor=0)
    ),
    mem_get_info=_of_the_device((MEMORY, MEMORY)),
    memory_stats=_of_the_device({}),
    reset_peak_memory_stats=_of_the_device(),
    manual_seed=_always(),
    manual_seed_all=_always(),
    set_rng_state=_always(),
    get_rng_state=lambda *a: torch.zeros(0, dtype=torch.uint8),
    default_generators=(torch.Generator(),),
    Stream=Stream,
    current_stream=lambda device=None: Stream(),
    default_stream=lambda device=None: Stream(),
    stream=lambda s: contextlib.nullcontext(s),
    device=lambda d: contextlib.nullcontext(side_of(d)),
    CUDAGraph=Graph,
    graph=capturing,
    is_current_stream_capturing=lambda: Pretending.tape is not None,
    **{f"{kind}memory_{what}": _of_the_device(0) for kind in ("", "max_") for what in ("allocated", "reserved")},
)

_plain_autocast, _plain_groups = torch.autocast.__init__, torch.optim.Optimizer._group_tensors_by_device_and_dtype


def _autocast(self, device_type, *a, **k):
    "`autocast('cuda')` is the CPU's, whose operations these are."
    _plain_autocast(self, "cpu" if device_type == "cuda" else device_type, *a, **k)


def _groups(lists, with_indices=False):
    "The optimizers' groups by device, which C++ reads off the memory."
    found = {}
    for (device, dtype), (columns, indices) in _plain_groups(lists, with_indices).items():
        sides = {on_cuda(t) for t in tensors_in(columns)}
        if len(sides) > 1:
            raise mixed("an optimizer's step")
        found[DEVICE if sides == {True} else device, dtype] = columns, indices
    return found


_plain_run = threading.Thread.run


def _run(thread):
    "A thread pretends as the process does: modes belong to threads."
    with Pretending():
        _plain_run(thread)


@contextlib.contextmanager
def pretended():
    "While entered, this process has a CUDA device."
    if any(isinstance(mode, Pretending) for mode in torch.overrides._get_current_function_mode_stack()):
        raise RuntimeError("The CUDA device is pretended already; enter once.")
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.multiple(torch.cuda, **CUDA))
        enter(mock.patch.object(torch.autocast, "__init__", _autocast))
        enter(mock.patch.object(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(_groups)))
        enter(mock.patch.object(threading.Thread, "run", _run))
        enter(Pretending())
        yield DEVICE


_for_good = contextlib.ExitStack()


def install():
    "Pretend for the rest of this process."
    _for_good.enter_context(pretended())
