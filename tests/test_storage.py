"""Storage: every form returns a ticket to the bit, a file costs the bits that are stated, and no file makes the
reader believe a number.
"""

import copy
import itertools
import json
import math
import resource
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from lth_companion.measures import storage
from lth_companion.measures.packing import pack_bits, unpack_bits
from lth_companion.measures.storage import (
    FORMS,
    PARTS,
    Source,
    StorageError,
    bits,
    mask_bound,
    pack,
    payload,
    possible,
    tensor_bits,
    unpack,
)
from lth_companion.methods.supermasks import Search, Supermask
from lth_companion.tickets import Ticket, TicketError, generator, prunable
from lth_companion.training.models import create
from lth_companion.training.recipe import Recipe

SHAPES = {"lenet-300-100": (1, 11, 11), "conv-2": (1, 12, 12), "resnet-20": (3, 8, 8)}
WIDTHS = {"lenet-300-100": 0.05, "conv-2": 0.125, "resnet-20": 0.25}
DENSITIES = [1e-6, 1e-3, 0.1, 0.37, 0.5, 0.9, 1.0]
KEY = "lth_companion.storage"


def network(name="lenet-300-100", dtype=torch.float32, last=False):
    model = create(name, SHAPES[name], 10, generator(0, "init"), width=WIDTHS[name]).to(dtype)
    model.eval()(torch.randn(4, *SHAPES[name], generator=generator(0, "x")).to(dtype))
    for n, b in model.named_buffers():
        # statistics that show if they are lost
        b.copy_(torch.rand(b.shape, generator=generator(1, n)).to(b.dtype) + 0.5 if b.is_floating_point() else b + 7)
    for n, p in model.named_parameters():
        if n not in prunable(model):
            p.data += 0.1 * torch.randn(p.shape, generator=generator(0, n)).to(dtype)
    return model.to(memory_format=torch.channels_last) if last else model


def found(name="lenet-300-100", dtype=torch.float32, last=False, changes=3, seed=3, **fields):
    "A search whose scores wander instead of learn, so that much is copied, drawn anew, and comes up again."
    model = network(name, dtype, last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work = Search(
            model, Supermask(**{"frequency": 1, **fields}), Recipe(lr=0.1, max_epochs=99, patience=None), seed, 5
        )
    for e in range(1, changes + 1):
        work.change(e, 99)
        with torch.no_grad():
            for n, s in work.scores.items():
                s += 2 * s.abs().mean() * torch.randn(s.shape, generator=generator(e, n)).to(s.dtype)
    return Ticket.of(model, work.put()), work


def same(a, b):
    "Effective weights, masks and rest to the bit."
    pairs = [(a.effective, b.effective), (a.masks, b.masks), (a.rest, b.rest)]
    return (
        all(
            list(x) == list(y) and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)
            for x, y in pairs
        )
        and a.digest == b.digest
    )


def sentence(error):
    assert "\n" not in str(error.value) and ". " not in str(error.value), str(error.value)


# --- an account of the bits from the definitions alone


def reckoned(ticket, form, source=None):
    def word(t):
        return 8 * t.element_size()

    def need(n):
        return math.ceil(math.log2(n)) if n > 1 else 0

    sizes, used = {"rest/" + n: t.numel() * word(t) for n, t in ticket.rest.items()}, {0}
    if form == "seed":
        sizes["seed"] = 64
        for n, o in source.origin.items():
            used |= {int(v) // o.numel() for v in o.flatten()[ticket.masks[n].flatten().bool()]}
    for n, w in ticket.effective.items():
        kept, N = w[ticket.masks[n].bool()].tolist(), w.numel()
        k, V = len(kept), len(set(kept))
        if k < N:
            sizes["masks/" + n] = N
        if form in ("dense", "values"):
            sizes["values/" + n] = k * word(w)
        if form == "distinct":
            sizes |= {"values/" + n: V * word(w), "indices/" + n: k * need(V)}
        if form == "binary":
            sizes |= {"signs/" + n: k, "gains/" + n: word(w)}
        if form == "seed":
            if source.settings.method == "biprop":
                sizes["gains/" + n] = word(w)
            origin, place = (
                source.origin[n].flatten()[ticket.masks[n].flatten().bool()],
                torch.arange(N)[ticket.masks[n].flatten().bool()],
            )
            moved = origin != place
            if M := int(moved.sum()):
                sizes["log/moved/" + n] = min(k, M * need(k))
                sizes["log/from/" + n] = M * need(len(used) * (1 if bool((origin % N == place).all()) else N))
    return {n: b for n, b in sizes.items() if b}


def check(ticket, form, source, path, model=None):
    "Round trip by file, the account, the payload, and the logits of a network that gets the ticket."
    again = Ticket.load(ticket.save(path, form, source))
    assert same(again, ticket)
    assert all(not again.weights[n][m == 0].any() and again.weights[n].is_contiguous() for n, m in again.masks.items())
    each, total = tensor_bits(ticket, form, source), bits(ticket, form, source)
    assert {n: b for n, b in each.items() if b} == reckoned(ticket, form, source)
    with safe_open(path, "pt") as f:
        stored = {k: f.get_tensor(k) for k in f.keys()}
    assert {n: t.numel() * t.element_size() for n, t in stored.items()} == {n: -(-b // 8) for n, b in each.items()} | {
        n: 0 for n in stored if n not in each
    }
    assert payload(path)[0] == sum(-(-b // 8) for b in each.values()) and sum(payload(path)) == path.stat().st_size
    assert (
        set(total) == {*PARTS, "total"}
        and all(type(b) is int for b in total.values())
        and total["total"] == sum(total[p] for p in PARTS) == sum(each.values())
    )
    if model is not None:
        x = torch.randn(6, *SHAPES[model], generator=generator(9, "x")).to(next(iter(ticket.weights.values())).dtype)
        one, two = (
            t.apply(create(model, SHAPES[model], 10, generator(s, "other"), width=WIDTHS[model]).to(x.dtype)).eval()
            for s, t in enumerate((ticket, again))
        )
        with torch.no_grad():
            assert torch.equal(one(x), two(x))


@given(
    st.sampled_from(list(SHAPES)),
    st.sampled_from(DENSITIES),
    st.sampled_from(["edge-popup", "biprop"]),
    st.sampled_from(["constant", "normal"]),
    st.booleans(),
    st.sampled_from(["none", "recycle", "next-lowest", "iterand", "hybrid"]),
    st.sampled_from([0.01, 0.2, 0.5]),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([torch.float32] * 3 + [torch.float64]),
)
@budget(max_examples=50)
def test_every_possible_form_returns_what_a_search_found(
    tmp_path, name, density, method, weights, scaled, change, rate, changes, last, dtype
):
    t, work = found(
        name,
        dtype,
        last,
        changes,
        density=density,
        method=method,
        weights=weights,
        scaled=scaled,
        change=change,
        rate=rate,
    )
    source = Source.of(work)
    forms = possible(t, source)
    assert "seed" in forms and {"values", "distinct"} <= set(forms) and ("dense" in forms) == (density == 1)
    if method == "biprop" or weights == "constant" or density == 1e-6:
        assert "binary" in forms
    for form in forms:
        check(t, form, source, tmp_path / "t", name)
    assert possible(t) == tuple(f for f in forms if f != "seed")


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-40, 3e38]), min_size=1, max_size=40),
    st.sampled_from(["none", "some", "all"]),
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
@budget(max_examples=80)
def test_any_weights(tmp_path, values, kept, seed, dtype):
    w = torch.tensor(values).clamp(-6e4, 6e4).to(dtype)
    m = {
        "none": torch.zeros(len(w)),
        "all": torch.ones(len(w)),
        "some": torch.rand(len(w), generator=generator(seed)).round(),
    }[kept]
    t = Ticket(
        {"a/b": w, "moved/x": w.flip(0).reshape(1, -1)},
        {"a/b": m, "moved/x": m.flip(0).reshape(1, -1)},
        {"empty": torch.zeros(0, 3), "count": torch.tensor(3), "on": torch.tensor([True])},
    )
    magnitudes = {abs(v) for v in t.effective["a/b"][m.bool()].tolist()}
    assert ("binary" in possible(t)) == (len(magnitudes) <= 1) and ("dense" in possible(t)) == (
        kept == "all" or bool(m.all())
    )
    for form in possible(t):
        check(t, form, None, tmp_path / "t")


@given(st.integers(0, 62), st.lists(st.integers(0, 2**62 - 1), max_size=50))
@budget(max_examples=150)
def test_packed_bits_are_the_binary_digits(width, numbers):
    numbers = [n % 2**width for n in numbers]
    text = "".join(f"{n:0{width}b}" for n in numbers) if width else ""
    packed = pack_bits(numbers, width)
    assert packed.dtype == torch.uint8 and packed.tolist() == [
        int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8)
    ]
    assert unpack_bits(packed, len(numbers), width).tolist() == numbers


@pytest.mark.parametrize("n", [65535, 65536, 65537, 200001])
@pytest.mark.parametrize("width", [1, 3, 17])
def test_packed_bits_of_more_than_one_chunk(n, width):
    numbers = torch.randint(2**width, (n,), generator=generator(0, n))
    assert np.array_equal(unpack_bits(pack_bits(numbers, width), n, width), numbers.numpy()) and len(
        pack_bits(numbers, width)
    ) == -(-n * width // 8)


def test_a_plain_file_is_what_it_was(tmp_path):
    t, _ = found(density=0.5)
    tensors = {}
    for name, w in t.weights.items():
        tensors |= {
            f"weights/{name}": w,
            f"masks/{name}": torch.from_numpy(np.packbits(t.masks[name].bool().numpy().ravel())),
        }
    tensors |= {f"rest/{n}": v for n, v in t.rest.items()}
    meta = {
        "format": "lth_companion.ticket",
        "version": "1",
        "names": json.dumps(list(t.weights)),
        "rest": json.dumps(list(t.rest)),
    }
    raw, old = t.save(tmp_path / "t").read_bytes(), save(tensors, meta)

    def head(b):
        return json.loads(b[8 : 8 + int.from_bytes(b[:8], "little")])

    assert (
        head(raw) == head(old)
        and raw[len(raw) - payload(tmp_path / "t")[0] :] == old[len(old) - payload(tmp_path / "t")[0] :]
    )
    assert same(Ticket.load(tmp_path / "t"), t) and all(
        torch.equal(w, t.weights[n]) for n, w in Ticket.load(tmp_path / "t").weights.items()
    )


def test_equal_tickets_make_equal_files(tmp_path):
    t, work = found(density=0.5, change="hybrid")
    assert len({t.save(tmp_path / f"t{i}", "seed", Source.of(work)).read_bytes() for i in range(5)}) == 1


def test_a_compact_file_is_read_where_only_tickets_is_imported(tmp_path):
    t, work = found(density=0.5, change="recycle")
    t.save(tmp_path / "t", "seed", Source.of(work))
    code = (
        f"import sys; from lth_companion.tickets import Ticket; assert '{KEY}' not in sys.modules;"
        f" print(Ticket.load({str(tmp_path / 't')!r}).digest)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == t.digest
    )


# --- what the seed tells and what it does not


def test_which_log_is_kept():
    kinds = {
        change: pack(*(lambda t, w: (t, "seed", Source.of(w)))(*found(density=0.5, change=change)))[1]
        for change in ("none", "recycle", "iterand", "hybrid")
    }
    logs = {change: {layer["log"] for layer in h["layers"]} for change, h in kinds.items()}
    assert (
        logs["none"] == {"none"}
        and "place" in logs["recycle"]
        and "draw" in logs["iterand"]
        and "place" not in logs["iterand"]
        and "place" in logs["hybrid"]
    )
    assert kinds["none"]["draws"] == kinds["recycle"]["draws"] == [0] and kinds["iterand"]["draws"] == kinds["hybrid"][
        "draws"
    ] == [0, 1, 2, 3]


def test_without_changes_seed_and_masks_are_all():
    t, work = found("resnet-20", density=0.5)
    b = bits(t, "seed", Source.of(work))
    assert (
        {p for p in PARTS if b[p]} == {"seed", "masks", "rest"}
        and b["seed"] == 64
        and b["masks"] == sum(m.numel() for m in t.masks.values())
    )


def test_the_bound_of_masks():
    t, _ = found(density=0.1)

    def H(p):
        return 0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)

    assert math.isclose(mask_bound(t), sum(m.numel() * H(float(m.mean())) for m in t.masks.values()), rel_tol=1e-6)
    assert mask_bound(found(density=1e-6)[0]) == mask_bound(found(density=1.0)[0]) == 0


@pytest.mark.parametrize("method", ["edge-popup", "biprop"])
def test_sources_that_tell_nothing(method):
    model = network()
    given_ones = Search(
        model, Supermask(density=0.5), Recipe(), frozen={n: torch.randn(p.shape) for n, p in prunable(model).items()}
    )
    with pytest.raises(StorageError, match="given and not drawn") as e:
        Source.of(given_ones)
    sentence(e)
    t = Ticket.of(model, given_ones.put())
    for form in possible(t):
        assert same(unpack(*pack(t, form)), t)
    t, mixed = found(density=0.5, method="biprop", weights="normal", change="iterand-all")
    with pytest.raises(StorageError, match="mixtures") as e:
        Source.of(mixed)
    sentence(e)
    assert possible(t) == ("values", "distinct", "binary")
    t, work = found(density=0.5, method=method, weights="normal", change="hybrid")
    source, (_other, another) = Source.of(work), found("conv-2", density=0.5)
    # constants are no Biprop of normal weights
    wrong = {
        "seed": Source(source.settings, 4, source.origin),
        "origin": Source(
            source.settings, 3, {n: torch.arange(o.numel()).view(o.shape) for n, o in source.origin.items()}
        ),
        "network": Source.of(another),
        "none": None,
        "method": Source(Supermask(density=0.5, method="edge-popup", change="hybrid"), 3, source.origin),
    }
    for kind, s in wrong.items():
        assert "seed" not in possible(t, s), kind
        with pytest.raises(StorageError) as e:
            pack(t, "seed", s)
        sentence(e)
    assert "seed" in possible(t, source)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits(seed):
    with pytest.raises(StorageError, match="64 bits"):
        Source(Supermask(density=0.5), seed, {})


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 0])
def test_a_seed_of_64_bits(tmp_path, seed):
    t, work = found(density=0.5, change="hybrid", seed=seed)
    check(t, "seed", Source.of(work), tmp_path / "t")


def test_origins_must_be_origins():
    for bad in (torch.tensor([-1]), torch.tensor([1.0])):
        with pytest.raises(StorageError, match="origins of a"):
            Source(Supermask(density=0.5), 0, {"a": bad})


def test_another_machines_draws_are_noticed(tmp_path, monkeypatch):
    t, work = found(density=0.5, weights="normal", change="recycle")
    t.save(tmp_path / "t", "seed", Source.of(work))
    real = storage.drawn
    monkeypatch.setattr(storage, "drawn", lambda *a: torch.nextafter(real(*a), torch.tensor(9.0)))
    with pytest.raises(TicketError, match="draws other numbers") as e:
        Ticket.load(tmp_path / "t")
    sentence(e)


def test_what_cannot_be_stored_says_so():
    t, _ = found(density=0.5, weights="normal")
    for form, why in (
        ("dense", "pruned"),
        ("binary", "more than one magnitude"),
        ("seed", "source=Source.of"),
        ("gzip", "choose one of"),
    ):
        with pytest.raises(StorageError, match=why) as e:
            pack(t, form)
        sentence(e)
    whole = Ticket({"w": torch.arange(3)}, {"w": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(StorageError, match="convert it to float32"):
        pack(whole, "values")
    assert possible(whole) == ()


def test_an_unstorable_ticket_leaves_the_old_file(tmp_path):
    t, _ = found(density=0.5, weights="normal")
    before = t.save(tmp_path / "t").read_bytes()
    with pytest.raises(StorageError):
        t.save(tmp_path / "t", "binary")
    assert (tmp_path / "t").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t"]


# --- files from elsewhere


def refused(path, most=400 << 20):
    "Loading raises one sentence, soon, within so many bytes more of address space than now."
    now, old, start = (
        int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize(),
        resource.getrlimit(resource.RLIMIT_AS),
        time.process_time(),
    )
    resource.setrlimit(resource.RLIMIT_AS, (now + most, old[1]))
    try:
        with pytest.raises(TicketError) as e:
            Ticket.load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    text = str(e.value)
    assert (
        "\n" not in text
        and len(text) < 400 + len(str(path))
        and "alloc" not in text
        and time.process_time() - start < 5
    ), text


def rewrite(path, tensors, header, sign=True):
    "A file with these tensors and header, its checksum made to fit: a liar who knows the format."
    if sign:
        try:
            header = header | {"checksum": storage._checksum(tensors, storage._Header.model_validate(header))}
        except Exception:
            pass
    save_file(tensors, path, {KEY: header if isinstance(header, str) else json.dumps(header)})


def layered(header, **fields):
    header = copy.deepcopy(header)
    header["layers"][0] |= fields
    return header


def made(form):
    t, work = found(density=0.5, change="hybrid", **({"method": "biprop"} if form == "binary" else {}))
    if form == "dense":
        t = Ticket(t.weights, {n: torch.ones_like(m) for n, m in t.masks.items()}, t.rest)
    return pack(t, form, Source.of(work))


@pytest.mark.parametrize("form", list(FORMS))
def test_any_altered_byte_is_noticed(tmp_path, form):
    tensors, header = made(form)
    rewrite(tmp_path / "t", tensors, header)
    raw = (tmp_path / "t").read_bytes()
    same_as = Ticket.load(tmp_path / "t").digest
    g = np.random.default_rng(0)
    for i in sorted({0, 8, len(raw) - 1, *g.integers(0, len(raw), 60)}):
        (tmp_path / "t").write_bytes(raw[:i] + bytes([raw[i] ^ 1 << int(g.integers(8))]) + raw[i + 1 :])
        try:
            assert Ticket.load(tmp_path / "t").digest == same_as and raw[i] in b' "'  # a blank that pads the header
        except TicketError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("cut", [1, 10, 0.5, 0.99])
def test_a_cut_file_is_noticed(tmp_path, form, cut):
    rewrite(tmp_path / "t", *made(form))
    raw = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(raw[: len(raw) - (cut if isinstance(cut, int) else int(cut * len(raw)))])
    refused(tmp_path / "t")


SHAPES_OF_LIARS = [
    [2**39, 2**39],
    [2**40],
    [-1, 5],
    [-5, -121],
    [10**30],
    [5.5],
    ["5"],
    [True, 605],
    None,
    [1] * 99,
    [2**39] * 8,
    [604],
    [606],
    [0],
    605,
]


@pytest.mark.parametrize("form", list(FORMS))
def test_shapes_that_lie(tmp_path, form):
    tensors, header = made(form)
    for shape, full in itertools.product(SHAPES_OF_LIARS, (True, False)):
        rewrite(tmp_path / "t", tensors, layered(header, shape=shape, full=full))
        refused(tmp_path / "t")


@pytest.mark.parametrize("form", list(FORMS))
def test_headers_that_lie(tmp_path, form):
    tensors, header = made(form)
    several = [
        layered(header, name="other"),
        layered(header, dtype="float16"),
        layered(header, dtype="complex64"),
        layered(header, dtype=3),
        layered(header, extra=1),
        header | {"layers": []},
        header | {"layers": header["layers"] * 2},
        header | {"layers": header["layers"][:-1]},
        header | {"layers": [1]},
        header | {"rest": []},
        header | {"rest": header["rest"] * 2},
        header | {"rest": ["fc1.weight"]},
        header | {"form": "plain"},
        header | {"version": 2},
        header | {"draws": []},
        header | {"draws": [1, 0]},
        header | {"draws": [0, -1]},
        header | {"draws": list(range(2**20 + 1))},
        header | {"settings": {"density": 1e400}},
        header | {"settings": {"density": 0.5, "frequency": 0}},
        header | {"digest": "0"},
        header | {"digest": 7},
        {},
        [],
        3,
        None,
        "text",
    ]
    several += [
        header | {"form": other} for other in FORMS if other != form and not {form, other} == {"dense", "values"}
    ]
    if form == "seed":
        several += [
            layered(header, log="none"),
            layered(header, log="draw"),
            layered(header, log="everything"),
            header | {"settings": None},
            header | {"draws": [0]},
            header | {"draws": [0, 2, 3, 4]},
        ]
        several += [layered(header, moved=m) for m in (1, 0, -1, 2**39, 2**70, 1.5)]
        several += [
            header | {"settings": header["settings"] | s}
            for s in (
                {"weights": "normal"},
                {"method": "biprop"},
                {"density": 0.0, "scaled": True},
                {"density": 1e-320, "scaled": True},
                {"change": "iterand-all"},
                {"zip": 1},
            )
        ]
    for bad in several:
        rewrite(tmp_path / "t", tensors, bad)
        refused(tmp_path / "t")
    for text in ("", "{", "[" * 200000, '{"layers":' * 50000, "1" * 5000, "\x00", "NaN"):
        rewrite(tmp_path / "t", tensors, text, sign=False)
        refused(tmp_path / "t")


@pytest.mark.parametrize("form", list(FORMS))
def test_tensors_that_lie(tmp_path, form):
    tensors, header = made(form)
    for name, t in tensors.items():
        for bad in (
            None,
            t[:-1] if t.dim() else t.reshape(1, 1),
            torch.cat([t.reshape(-1)] * 2),
            t.reshape(1, *t.shape),
            t.reshape(-1)[:0],
            t.view(torch.int8) if t.dtype == torch.uint8 else t.to(torch.float16),
            t.to(torch.float8_e5m2),
            t.to(torch.complex64),
        ):
            rewrite(tmp_path / "t", {n: u for n, u in (tensors | {name: bad}).items() if u is not None}, header)
            refused(tmp_path / "t")
        if t.dtype == torch.uint8:
            rewrite(tmp_path / "t", tensors | {name: torch.full_like(t, 255)}, header)
            refused(tmp_path / "t")
        if t.is_floating_point():
            rewrite(tmp_path / "t", tensors | {name: torch.full_like(t, torch.nan)}, header)
            refused(tmp_path / "t")
    rewrite(tmp_path / "t", tensors | {"more": torch.zeros(1)}, header)
    refused(tmp_path / "t")


@pytest.mark.parametrize("form", ["distinct", "seed"])
def test_a_header_alone_stands_for_no_great_tensor(tmp_path, form):
    "A layer that keeps all and whose weights need no bits: a few hundred bytes may not ask for terabytes."
    settings = Supermask(density=1.0) if form == "seed" else None

    def layers(n, many):
        return [{"name": f"w{i}", "shape": [n], "dtype": "float32", "full": True} for i in range(many)]

    for n, many in ((2**39, 1), (2**24 + 1, 1), (2**20, 40)):
        header = {
            "form": form,
            "layers": layers(n, many),
            "digest": "",
            "settings": settings and settings.model_dump(mode="json"),
        }
        tensors = (
            {"seed": torch.tensor([0])} if form == "seed" else {f"values/w{i}": torch.ones(1) for i in range(many)}
        )
        rewrite(tmp_path / "t", tensors, header)
        refused(tmp_path / "t")
        if form == "seed":
            header["layers"] = [layer | {"log": "draw", "moved": 1} for layer in header["layers"]]
            rewrite(
                tmp_path / "t",
                tensors | {"log/moved/w0": torch.zeros(5, dtype=torch.uint8)},
                header | {"draws": [0, 1]},
            )
            refused(tmp_path / "t")


def test_more_than_a_header_may_stand_for_gets_masks(tmp_path, monkeypatch):
    "The writer writes nothing that the reader refuses."
    t = Ticket({n: torch.ones(10) for n in "abc"}, {n: torch.ones(10) for n in "abc"})
    assert bits(t, "distinct")["masks"] == 0
    monkeypatch.setattr(storage, "_BARE", 25)
    assert bits(t, "distinct")["masks"] == 10 and bits(t, "values")["masks"] == 0
    assert same(unpack(*pack(t, "distinct")), t)


@given(st.binary(max_size=200))
@budget(max_examples=60)
def test_any_text_is_no_header(tmp_path, noise):
    save_file({"a": torch.zeros(1)}, tmp_path / "t", {KEY: noise.decode("latin-1")})
    with pytest.raises(TicketError, match="not a readable ticket") as e:
        Ticket.load(tmp_path / "t")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"\xff" * 100), lambda p: p.mkdir()]
)
def test_the_payload_of_no_file(tmp_path, make):
    make(tmp_path / "t")
    with pytest.raises(TicketError, match="no readable safetensors file") as e:
        payload(tmp_path / "t")
    sentence(e)
