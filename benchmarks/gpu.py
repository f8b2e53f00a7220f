"""What a GPU makes of a recipe's options: ratios against a base measured in the same run, and shares of the machine's own rates.

python benchmarks/gpu.py [NAME ...] [--quick] [--json FILE]     (make bench-gpu runs all)
Exit code 1 if a bound is missed, 2 where torch finds no GPU. The rows are those of benchmarks/run.py."""
import argparse, json, pathlib, statistics, sys, tempfile, time
import torch
from run import ROWS, note
from lth_companion.data import Data
from lth_companion.costs import dense_flops
from lth_companion.experiments import thesis, thesis_size
from lth_companion.models import create
from lth_companion.tickets import generator
from lth_companion.training import Recipe, Stepper, numerics, optimizer, train_together
from lth_companion.trials import run

DEVICE = torch.device("cuda")

def seconds(f):
    "Wall time of `f`, the device's work included."
    torch.cuda.synchronize(); start = time.perf_counter(); f(); torch.cuda.synchronize()
    return time.perf_counter() - start

def images(n, shape=(3, 32, 32)):
    all_ = n + n // 10
    x, y = torch.randint(256, (all_, *shape), dtype=torch.uint8, device=DEVICE), torch.randint(10, (all_,), device=DEVICE)
    return Data("made", "made", "0", 10, x[:n], y[:n], x[n:], y[n:], x[:0], y[:0], (.5,) * shape[0], (.25,) * shape[0])

def recipe(**fields): return Recipe(**(dict(lr=.05, momentum=.9, weight_decay=5e-4, patience=None, batch_size=128, augment="crop-flip") | fields))

def stepper(name, data, r, width=1.):
    "`go(n)`: n training steps on random batches of the recipe's size."
    model = create(name, data.shape, 10, generator(0, "init"), width).to(DEVICE)
    if r.memory_format == "channels_last": model.to(memory_format=torch.channels_last)
    model.train()
    one = Stepper(model, optimizer(model, r), data, r)
    draws = data.draw("crop-flip", r.batch_size, generator(0, "crops")).to(DEVICE) if r.augment else None
    indices = torch.randint(len(data.train_y), (r.batch_size,), device=DEVICE)
    def go(n):
        with numerics(r, DEVICE):
            for _ in range(n): one(indices, draws)
    return go

def ratios(a, b, rounds):
    "time(a)/time(b), run in turn; median, and the range in words."
    a(), b()
    found = [seconds(a) / seconds(b) for _ in range(rounds)]
    return statistics.median(found), f"range {min(found):.2f} to {max(found):.2f} over {rounds}"

def matmul_rate(quick):
    "FLOP/s of a large bfloat16 product."
    n = 1024 if quick else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3): a @ b
    return 2 * n**3 * 10 / statistics.median(seconds(lambda: [a @ b for _ in range(10)]) for _ in range(5))

def large(quick):
    "ResNet-18 on 32x32 images, as a share of the machine's own matrix rate; and the loader's share of its step."
    r, count = recipe(batch_size=8 if quick else 1024, precision="bf16", memory_format="channels_last", compile=True), 2 if quick else 50
    data = images(40 if quick else 50_000)
    go = stepper("resnet-18", data, r)
    go(2 if quick else 10)
    took = statistics.median(seconds(lambda: go(count)) / count for _ in range(1 if quick else 5))
    flops = 3 * dense_flops(create("resnet-18", data.shape), data.shape) * r.batch_size      # forward, and twice that backward
    peak = matmul_rate(quick)
    note("resnet-18-share-of-matmul", "ResNet-18 training FLOP/s (bf16, channels_last, compiled) over the measured bf16 matrix rate", flops / took / peak, .25, low=True,
         detail=f"{r.batch_size / took:,.0f} images/s, matrix rate {peak / 1e12:.0f} TFLOP/s")
    indices, draws = torch.randint(len(data.train_y), (r.batch_size,), device=DEVICE), data.draw("crop-flip", r.batch_size, generator(0, "crops")).to(DEVICE)
    load = lambda: [data.batch(data.train_x, data.train_y, indices, r.augment, draws) for _ in range(count)]
    load()
    note("loader-share-of-step", "gathering, cropping and normalising a batch, over the whole step", statistics.median(seconds(load) / count for _ in range(5)) / took, .05)

def graph(quick):
    "ResNet-20 under a CUDA graph against the same steps launched one by one."
    data, count = images(40 if quick else 20_000), 2 if quick else 100
    fields = dict(batch_size=8 if quick else 128, memory_format="channels_last")
    eager, graphed = (stepper("resnet-20", data, recipe(graph=g, **fields)) for g in (False, True))
    ratio, detail = ratios(lambda: eager(count), lambda: graphed(count), 1 if quick else 7)
    note("resnet-20-graph", "eager ResNet-20 step over the step under a CUDA graph (batch 128)", ratio, 3, low=True, detail=detail)

def together(quick):
    "Eight small networks, one after another and side by side; each trains for two epochs under a graph."
    data, nets = images(50 if quick else 12_800), 2 if quick else 8
    r = recipe(batch_size=20 if quick else 128, max_epochs=2, graph=True, augment=None)
    for name, width in (("lenet-300-100", 1.), ("resnet-20", .5)):
        jobs = lambda: [dict(model=create(name, data.shape, 10, generator(s, "init"), width).to(DEVICE), seed=s) for s in range(nets)]
        both = [lambda k=k: train_together(jobs(), data, r.model_copy(update={"together": k})) for k in (1, nets)]
        ratio, detail = ratios(*both, 1 if quick else 3)
        note(f"side-by-side-{name}", f"eight {name} at width {width:g} one after another, over side by side", ratio, 2, low=True, detail=detail)

def table(quick):
    "The thesis's table of methods, densities and ten seeds: wall time, eager and under graphs."
    size = thesis_size("smoke" if quick else "gpu", DEVICE.type)
    methods = [f"standard {s} {k}" for s in ("random", "magnitude", "snip", "grasp", "synflow") for k in ("U-SS", "U-MS")] + [f"{i} {s} U-MS" for i in ("saw:snip", "saw:grasp", "saw:synflow") for s in ("snip", "magnitude>synflow")]
    if quick: methods, size = methods[:2], size._replace(fields=size.fields | dict(data="digits", train_size=200))
    for g in (False, True):
        fields = size.fields | {"recipe": size.fields["recipe"].model_copy(update={"graph": g})}
        trials = [thesis(m, d, seed=s, **fields) for m in methods for d in size.densities for s in size.seeds]
        with tempfile.TemporaryDirectory() as folder: rows = run(trials, folder, progress="plain")
        assert rows.failed.isna().all(), rows.failed.dropna().iloc[0]
        note(f"thesis-table{'-graph' if g else ''}-seconds", f"wall seconds of {len(trials)} trials ({len(methods)} methods, {len(size.densities)} densities, {len(size.seeds)} seeds)", rows.attrs["seconds"], float("inf"))

ALL = dict(large=large, graph=graph, together=together, table=table)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(ALL)}; all if none")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how fast")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if unknown := set(args.names) - set(ALL): parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("These benchmarks need a CUDA device, and torch finds none here; benchmarks/run.py has those of the CPU.", file=sys.stderr)
        return 2
    for name in args.names or ALL: ALL[name](args.quick)
    if args.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        args.json.write_text(json.dumps(about | {"rows": [r._asdict() for r in ROWS]}, indent=1) + "\n")
    return 0 if all(r.holds for r in ROWS) else 1

if __name__ == "__main__": sys.exit(main())
