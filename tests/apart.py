"""What a GPU may differ by: bounds that follow from what a CPU does by itself. Rounding is compared with that of a
CPU's own float32 around a run in float64; an accuracy after a chaotic training, with what another seed makes of it.
"""

import torch

from lth_companion.lab.store import Store
from lth_companion.lab.sweeps import run

# three times the largest of a few distances, which a GPU would exceed about never if it rounds no worse than a CPU
SLACK = 3


def farthest(values, reference) -> float:
    "The largest distance of numbers, or of tensors by name, from those of a reference."
    if isinstance(reference, dict):
        return max(
            float((values[n].cpu().double() - t.cpu().double()).abs().max()) for n, t in reference.items() if t.numel()
        )
    return max(abs(float(a) - float(b)) for a, b in zip(values, reference, strict=True))


def as_near(found, reference, own, floor=0.0):
    """Assert that `found` lies no farther from a float64 `reference` than SLACK times the farthest of a CPU's `own`
    float32 runs.
    """
    got, allowed = farthest(found, reference), SLACK * max(farthest(o, reference) for o in own) + floor
    assert got <= allowed, f"{got:.3g} from the float64 run, where a CPU's float32 comes within {allowed / SLACK:.3g}"


def swept(trials, folder, **options):
    rows = run(trials, Store(folder), progress="silent", **options)
    assert rows.failed.isna().all(), rows.failed.dropna().iloc[0]
    return rows


def as_near_as_seeds(make, folder, columns=("accuracy",), seeds=(0, 1, 2)):
    """Run `make(device, seed)` (a list of trials) on the CPU for all seeds and on the GPU for the first: every
    number of these columns differs between the devices by no more than two seeds differ somewhere on the CPU. The
    rows of seed 0 on both.
    """
    cpu, gpu = (
        [swept(make("cpu", s), folder / f"cpu-{s}") for s in seeds],
        swept(make("cuda", seeds[0]), folder / "cuda"),
    )
    for column in columns:
        by_seed = torch.tensor([[float(v) for v in rows[column]] for rows in cpu], dtype=torch.float64)
        spread = by_seed.nan_to_num().max(0).values - by_seed.nan_to_num().min(0).values
        apart = (
            torch.tensor([float(v) for v in gpu[column]], dtype=torch.float64).nan_to_num() - by_seed[0].nan_to_num()
        ).abs()
        assert apart.max() <= spread.max(), (
            f"{column}: the devices are {apart.max():.2f} apart, two seeds at most {spread.max():.2f}"
        )
    return cpu[0], gpu
