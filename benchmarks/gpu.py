"""What a GPU makes of the recipe's options: images a second, beside what another GPU gave
(lth_companion/tables/rates.csv).

python benchmarks/gpu.py [PART ...] [--quick] [--json FILE]     (make bench-gpu: all but `compiled` and `table`)

All but these two take at most two minutes. Each part is a process with a limit of time of its own: one that hangs
costs no other. Where NVIDIA's MPS can be started it is, for the parts that measure processes side by side. Exit code
1 if a part failed or hung, 2 where torch finds no GPU.
"""

import argparse
import contextlib
import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = pathlib.Path(__file__).resolve().parent.parent
RATES = ROOT / "lth_companion" / "tables" / "rates.csv"
# seconds a part, torch's start included
LIMITS = dict(training=45, searches=30, stacks=25, sharing=25, mps=40, compiled=150, table=600)
USUAL = ("training", "searches", "stacks", "sharing", "mps")
HOW = [
    ("float32", "contiguous"),
    ("float32", "channels_last"),
    ("tf32", "contiguous"),
    ("tf32", "channels_last"),
    ("bf16", "contiguous"),
    ("bf16", "channels_last"),
]
BEST = dict(precision="bf16", memory_format="channels_last", graph=True)


# ---------------------------------------------------------------- what is measured
def tools():
    "torch and the library, imported by the parts alone: the parent needs neither."
    import types

    import torch

    from lth_companion import tickets
    from lth_companion.lab import sweeps
    from lth_companion.methods import supermasks
    from lth_companion.papers import learning_to_learn as experiments
    from lth_companion.papers import weight_recycling as searches
    from lth_companion.training import cohorts, costs, data, models
    from lth_companion.training import loop as training

    torch.set_num_threads(1)
    return types.SimpleNamespace(
        torch=torch,
        device=torch.device(os.environ.get("BENCH_DEVICE", "cuda")),
        cohorts=cohorts,
        costs=costs,
        data=data,
        experiments=experiments,
        models=models,
        searches=searches,
        supermasks=supermasks,
        tickets=tickets,
        training=training,
        sweeps=sweeps,
    )


def images(t, n, shape=(3, 32, 32)):
    "Random images on the device; a tenth more for the test."
    every = n + n // 10
    x, y = (
        t.torch.randint(256, (every, *shape), dtype=t.torch.uint8, device=t.device),
        t.torch.randint(10, (every,), device=t.device),
    )
    return t.data.Data(
        "made", "made", "0", 10, x[:n], y[:n], x[n:], y[n:], x[:0], y[:0], (0.5,) * shape[0], (0.25,) * shape[0]
    )


def recipe(t, **fields):
    return t.training.Recipe(
        **(dict(lr=0.05, momentum=0.9, weight_decay=5e-4, patience=None, batch_size=128, augment="crop-flip") | fields)
    )


def trainer(t, name, data, r, width=1.0):
    "`go(n)`: n training steps on random batches of the recipe's size."
    model = t.models.create(name, data.shape, 10, t.tickets.generator(0, "init"), width).to(t.device)
    if r.memory_format == "channels_last":
        model.to(memory_format=t.torch.channels_last)
    model.train()
    one = t.training.Stepper(model, t.training.optimizer(model, r), data, r)
    draws = data.draw(r.augment, r.batch_size, t.tickets.generator(0, "crops")).to(t.device) if r.augment else None
    indices = t.torch.randint(len(data.train_y), (r.batch_size,), device=t.device)

    def go(n):
        with t.training.numerics(r, t.device):
            for _ in range(n):
                one(indices, draws)

    return go


def searcher(t, name, method, data, r, width=1.0):
    "`go(n)`: n steps of a search on random batches."
    model = t.models.create(name, data.shape, 10, t.tickets.generator(0, "init"), width).to(t.device)
    if r.memory_format == "channels_last":
        model.to(memory_format=t.torch.channels_last)
    model.train()
    work = t.supermasks.Search(model, t.supermasks.Supermask(density=0.1, **t.searches.METHODS[method]), r)
    steps = t.supermasks._Steps(work, data, r, None, 0)
    draws = data.draw(r.augment, r.batch_size, t.tickets.generator(0, "crops")).to(t.device) if r.augment else None
    indices = t.torch.randint(len(data.train_y), (r.batch_size,), device=t.device)

    def go(n):
        with t.training.numerics(r, t.device):
            for _ in range(n):
                (
                    steps.replay([i for i in (indices, draws) if i is not None], 0)
                    if r.graph
                    else steps.step(indices, draws)
                )

    return go


def wait(t):
    if t.device.type == "cuda":
        t.torch.cuda.synchronize()


def ms_a_step(t, go, quick, seconds=0.6):
    "Milliseconds: as many steps as fill the time, in three lots; their median."
    go(3)
    wait(t)

    def lot(n):
        start = time.perf_counter()
        go(n)
        wait(t)
        return 1000 * (time.perf_counter() - start) / n

    n = 2 if quick else max(3, int(1000 * seconds / 3 / lot(5)))
    return sorted(lot(n) for _ in range(3))[1]


def say(what, how, side, ms=None, rate=None):
    "One row, as a line of JSON that the parent reads."
    print("row " + json.dumps(dict(what=what, how=how, side=side, ms=ms, rate=rate)), flush=True)


# ---------------------------------------------------------------- parts
def training(quick):
    t = tools()
    data, nets = (
        images(t, 400 if quick else 20_000),
        (
            ("ResNet-20", "resnet-20", HOW),
            ("VGG-19", "vgg-19", [h for h in HOW if h not in HOW[1:5:3]]),
            ("Conv-6", "conv-6", HOW[0::2] + HOW[5:]),
        ),
    )
    if quick:
        nets = (("ResNet-20", "resnet-20", HOW[:1] + HOW[5:]),)
    for title, name, ways in nets:
        for precision, layout in ways:
            if title != "ResNet-20" and (precision, layout) == ("bf16", "contiguous"):
                continue
            ms = ms_a_step(
                t,
                trainer(
                    t,
                    name,
                    data,
                    recipe(t, batch_size=8 if quick else 128, precision=precision, memory_format=layout, graph=True),
                    0.25 if quick else 1.0,
                ),
                quick,
            )
            say(f"{title} graph", f"{precision} {layout}", "1", ms, 128_000 / ms)
        if title == "ResNet-20":
            ms = ms_a_step(
                t, trainer(t, name, data, recipe(t, batch_size=8 if quick else 128), 0.25 if quick else 1.0), quick
            )
            say("ResNet-20 eager", "float32 contiguous", "1", ms, 128_000 / ms)


def searches(quick):
    t = tools()
    data = images(t, 400 if quick else 20_000)
    for title, name, method in (
        ("Conv-2 Edge-Popup search", "conv-2", "Edge-Popup"),
        ("Conv-6 Biprop search", "conv-6", "Biprop"),
    )[: 1 if quick else 2]:
        for how, fields in (("eager", {}), ("graph", dict(graph=True)), ("graph", BEST)):
            fields = dict(memory_format="channels_last") | fields
            ms = ms_a_step(
                t,
                searcher(
                    t, name, method, data, recipe(t, batch_size=8 if quick else 128, **fields), 0.125 if quick else 1.0
                ),
                quick,
            )
            say(f"{title} {how}", f"{fields.get('precision', 'float32')} channels_last", "1", ms, 128_000 / ms)


def stacks(quick):
    t = tools()
    data = images(t, 1000 if quick else 20_000, (1, 28, 28))
    r = recipe(t, batch_size=64, momentum=0.0, weight_decay=0.0, augment=None, max_epochs=2 if quick else 4, graph=True)
    for density in (0.005, 0.05):
        for count in (1, 20):
            made = []
            for seed in range(count):
                net = t.models.create("lenet-300-100", data.shape, 10, t.tickets.generator(seed, "init"))
                made.append(
                    t.tickets.Ticket.of(
                        net,
                        {
                            n: (t.torch.rand(w.shape, generator=t.tickets.generator(seed, n)) < density).float()
                            for n, w in t.tickets.prunable(net).items()
                        },
                    )
                )
            by_size, order = {}, t.torch.arange(len(data.train_y)).numpy()
            for ticket in made:
                by_size.setdefault(t.cohorts.padded(ticket, r), []).append(ticket)
            blocks = [t.cohorts._Block(some, data, r) for some in by_size.values()]

            def epoch(blocks=blocks, order=order):
                for block in blocks:
                    block.epoch(block.members, order, lr=0.05)

            with t.training.numerics(r, t.device):
                epoch()
                wait(t)
                start = time.perf_counter()
                epoch()
                epoch()
                wait(t)
            say(
                f"LeNet-300-100 stack graph (density {str(density)[1:]})",
                "float32",
                "1" if count == 1 else f"{count} in a stack",
                None,
                2 * count * len(order) / (time.perf_counter() - start),
            )


JOBS = [
    ("ResNet-20 graph", "float32 contiguous", "training", "resnet-20", dict(graph=True)),
    ("ResNet-20 graph", "bf16 channels_last", "training", "resnet-20", BEST),
    (
        "Conv-2 Edge-Popup search eager",
        "float32 channels_last",
        "search",
        "conv-2",
        dict(memory_format="channels_last"),
    ),
    ("Conv-2 Edge-Popup search graph", "bf16 channels_last", "search", "conv-2", BEST),
    ("VGG-19 graph", "bf16 channels_last", "training", "vgg-19", BEST),
]


def member(quick, folder, number, count, jobs):
    "One of several processes: each job in turn, all of them in the same window of time."
    t, folder = tools(), pathlib.Path(folder)
    data = images(t, 400 if quick else 5_000)
    for j in jobs:
        title, how, kind, name, fields = JOBS[j]
        r, width = recipe(t, batch_size=8 if quick else 128, **fields), 0.125 if quick else 1.0
        go = trainer(t, name, data, r, width) if kind == "training" else searcher(t, name, "Edge-Popup", data, r, width)
        go(5)
        wait(t)
        (folder / f"ready-{j}-{number}").touch()
        while len(list(folder.glob(f"ready-{j}-*"))) < count:
            go(1)
            wait(t)  # nobody rests while others measure
        begin, steps, end = time.time(), 0, time.time() + (0.3 if quick else 2.0)
        while time.time() < end:
            go(5)
            wait(t)
            steps += 5
        (folder / f"done-{j}-{number}").write_text(json.dumps([begin, time.time(), steps]))
        while len(list(folder.glob(f"done-{j}-*"))) < count:
            go(1)
            wait(t)
        del go


def several(quick, under, jobs, count=8):
    """Rows of `count` processes at work at once. A process's rate counts over its own window; windows begin within
    a step of each other, and all work until the last has ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        count = 2 if quick else count
        crew = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    "--member",
                    folder,
                    str(i),
                    str(count),
                    *map(str, jobs),
                    *(["--quick"] if quick else []),
                ]
            )
            for i in range(count)
        ]
        try:
            codes = [p.wait() for p in crew]
        finally:
            [p.kill() for p in crew if p.poll() is None]
        if any(codes):
            raise SystemExit(f"{sum(map(bool, codes))} of {count} processes failed")
        for j in jobs:
            found = [json.loads((pathlib.Path(folder) / f"done-{j}-{i}").read_text()) for i in range(count)]
            ms = [1000 * (end - begin) / steps for begin, end, steps in found]
            say(JOBS[j][0], JOBS[j][1], f"{count} processes {under}", sum(ms) / count, sum(128_000 / m for m in ms))


def sharing(quick):
    several(quick, "sharing time", (0, 2))


@contextlib.contextmanager
def under_mps():
    "MPS with folders of its own, ended afterwards; gives False where it cannot be started."
    tool = shutil.which("nvidia-cuda-mps-control")
    if not tool:
        yield False
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        os.environ.update(CUDA_MPS_PIPE_DIRECTORY=folder, CUDA_MPS_LOG_DIRECTORY=folder)
        started = subprocess.run([tool, "-d"], stdout=subprocess.DEVNULL, timeout=10).returncode == 0
        try:
            yield started
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([tool], input="quit\n", text=True, timeout=10, stdout=subprocess.DEVNULL)


def mps(quick):
    with under_mps() as there:
        if not there:
            print("MPS is not on this machine: not measured", flush=True)
            return
        several(quick, "under MPS", range(len(JOBS)))


def compiled(quick):
    "ResNet-18, bf16, compiled: the share of the machine's own matrix rate."
    t = tools()
    torch = t.torch
    r = recipe(t, batch_size=8 if quick else 1024, precision="bf16", memory_format="channels_last", compile=True)
    data, n = images(t, 40 if quick else 50_000), 256 if quick else 8192
    ms = ms_a_step(t, trainer(t, "resnet-18", data, r, 0.125 if quick else 1.0), quick)
    a, b = (torch.randn(n, n, device=t.device, dtype=torch.bfloat16) for _ in range(2))

    def product(k):
        for _ in range(k):
            a @ b

    peak, flops = (
        2 * n**3 / (ms_a_step(t, product, quick) / 1000),
        3 * t.costs.dense_flops(t.models.create("resnet-18", data.shape), data.shape) * r.batch_size,
    )
    print(
        f"ResNet-18 reaches {flops / (ms / 1000) / peak:.2f} of the matrix rate {peak / 1e12:.0f} TFLOP/s", flush=True
    )
    say("ResNet-18 compiled, batch 1024", "bf16 channels_last", "1", ms, 1000 * r.batch_size / ms)


def table(quick):
    "The thesis's table of methods, densities and ten seeds under graphs: wall time."
    t = tools()
    size = t.experiments.thesis_size("smoke" if quick else "gpu", t.device.type)
    methods = [
        f"standard {s} {k}" for s in ("random", "magnitude", "snip", "grasp", "synflow") for k in ("U-SS", "U-MS")
    ] + [f"{i} {s} U-MS" for i in ("saw:snip", "saw:grasp", "saw:synflow") for s in ("snip", "magnitude>synflow")]
    if quick:
        methods, size = methods[:2], size._replace(fields=size.fields | dict(data="digits", train_size=200))
    fields = size.fields | {"recipe": size.fields["recipe"].model_copy(update={"graph": True})}
    trials = [t.experiments.thesis(m, d, seed=s, **fields) for m in methods for d in size.densities for s in size.seeds]
    with tempfile.TemporaryDirectory() as folder:
        rows = t.sweeps.run(trials, folder, progress="plain")
    assert rows.failed.isna().all(), rows.failed.dropna().iloc[0]
    print(f"{len(trials)} trials of the thesis's table in {rows.attrs['seconds']:.0f} s", flush=True)


PARTS = dict(
    training=training, searches=searches, stacks=stacks, sharing=sharing, mps=mps, compiled=compiled, table=table
)


# ---------------------------------------------------------------- the parent
def known():
    "Images a second by (what, how, side by side), as another GPU gave them."
    if not RATES.exists():
        return {}
    with open(RATES) as file:
        rows = [r for r in csv.DictReader(line for line in file if not line.startswith("#"))]
    return {
        (r["what"], r["how"], r["side by side"].split(" (")[0]): float(r["images a second together"])
        for r in rows
        if r["images a second together"]
    }


def line(row, before):
    was = before.get((row["what"], row["how"], row["side"]))
    beside = f"{was:>11,.0f}  {row['rate'] / was:5.2f}" if was else f"{'-':>11s}  {'-':>5s}"
    return (
        f"{row['what']:46s} {row['how']:22s} {row['side']:24s}"
        f" {'' if row['ms'] is None else format(row['ms'], '8.2f'):>8s} {row['rate']:>11,.0f} {beside}"
    )


def part(name, quick, before):
    "Run one part in a process of its own and print its rows; (rows, whether all went well)."
    began, found = time.monotonic(), []
    process = subprocess.Popen(
        [sys.executable, __file__, "--part", name, *(["--quick"] if quick else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMITS[name])
        hung = False
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        (out, err), hung = process.communicate(), True
    for text in out.splitlines():
        if text.startswith("row "):
            found.append(json.loads(text[4:]))
            print(line(found[-1], before), flush=True)
        else:
            print(text, flush=True)
    if hung:
        print(f"HUNG {name}: ended after its {LIMITS[name]} s", flush=True)
    elif process.returncode:
        print(f"FAILED {name}: {(err.strip().splitlines() or ['no reason given'])[-1]}", flush=True)
    print(f"     {name} took {time.monotonic() - began:.0f} s", flush=True)
    return found, not hung and not process.returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; {', '.join(USUAL)} if none"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how fast")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--member", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        PARTS[args.part](args.quick)
        return 0
    if args.member:
        member(args.quick, args.member[0], *map(int, args.member[1:3]), [int(j) for j in args.member[3:]])
        return 0
    if unknown := set(args.names) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    import torch

    if not torch.cuda.is_available() and "BENCH_DEVICE" not in os.environ:
        print(
            "These benchmarks need a CUDA device, and torch finds none here: not measured; benchmarks/run.py has those"
            " of the CPU.",
            file=sys.stderr,
        )
        return 2
    device, before, rows, well = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", known(), [], True
    print(
        f"{device}, torch {torch.__version__}\n{'what':46s} {'how':22s} {'side by side':24s} {'ms/step':>8s}"
        f" {'images/s':>11s} {'rates.csv':>11s}  ratio",
        flush=True,
    )
    for name in args.names or USUAL:
        found, fine = part(name, args.quick, before)
        rows, well = rows + found, well and fine
    if args.json:
        args.json.write_text(
            json.dumps(
                dict(
                    device=device,
                    torch=torch.__version__,
                    date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    rows=rows,
                ),
                indent=1,
            )
            + "\n"
        )
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
