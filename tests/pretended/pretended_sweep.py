"""Trials for a sweep on the pretended device: workers import this module by its name, from the folder that brings
them the device.
"""

import os
import pathlib
import time
from typing import ClassVar

from lth_companion.lab.trials import Trial
from lth_companion.training.recipe import Recipe


class OnDevice(Trial):
    """A LeNet at a tenth of its width, pruned by magnitude and trained on the device; begin and end are written to
    the file `PRETENDED_LOG`.
    """

    kind: ClassVar[str] = "pretended-on-device"
    group_size: ClassVar[int] = 1
    seed: int

    @classmethod
    def run_group(cls, trials):
        import torch

        from lth_companion.lab.sparse_trials import SparseTrial

        (seed,) = [t.seed for t in trials]
        note("begin", seed)
        while hold(seed).exists():
            time.sleep(0.01)
        recipe = Recipe(batch_size=64, max_epochs=1, patience=None)
        (row,) = SparseTrial.run_group(
            [
                SparseTrial(
                    data="digits",
                    train_size=128,
                    width=0.1,
                    scorer="magnitude",
                    density=0.2,
                    recipe=recipe,
                    seed=seed,
                    device="cuda",
                )
            ]
        )
        note("end", seed)
        return [{"losses": row["losses"], "digest": row["digest"], "gpu": torch.cuda.get_device_name()}]


def hold(seed) -> pathlib.Path:
    "While this file is there, the trial of that seed does not end."
    return pathlib.Path(f"{os.environ['PRETENDED_LOG']}.hold-{seed}")


def note(what, seed):
    "One line, in one call of the system: processes do not write into each other's."
    log = os.open(os.environ["PRETENDED_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{what} {seed} {os.getpid()}\n".encode())
    os.close(log)
