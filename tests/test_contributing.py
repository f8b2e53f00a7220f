"""The examples of CONTRIBUTING and README, run as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lth_companion.tickets import Ticket
from lth_companion.training.data import fetch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    "A folder with the example's two files, and the environment that its shell block sets."
    folder = tmp_path_factory.mktemp("contributing")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", text, re.S)
    assert [name for name, _ in blocks] == ["my_scorers.py", "my_sweep.py"]
    for name, code in blocks:
        (folder / name).write_text(code)
    exports = re.search(r"```sh\nexport (.*)\nlth list\n```", text)[1]
    return folder, os.environ | dict(pair.split("=") for pair in exports.split()) | {"LTH_RUNS": str(folder / "runs")}


def there(workshop, *command):
    folder, env = workshop
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=250)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed(workshop):
    out = there(workshop, str(Path(sys.executable).parent / "lth"), "list", "--repo", str(ROOT))
    assert re.search(r"scorer\s+lamp\s+version 1\s+my_scorers", out), out


def test_it_computes_lamp_and_stacks(workshop):
    code = """
import torch
from torch import nn
from lth_companion.methods.stacking import scorer
from lth_companion.methods.pruning import prune
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
batches = [(torch.randn(8, 6), torch.randint(3, (8,)))]
for name, got in scorer("lamp")(net, batches).items():
    squares = net.get_parameter(name).detach().flatten().square().tolist()
    want = [s / sum(t for t in squares if t >= s) for s in squares]
    assert torch.allclose(got.flatten(), torch.tensor(want), rtol=1e-5), name
for notation in ("lamp>snip", "magnitude>once(lamp)>synflow"):
    masks = prune(net, notation, 0.5, batches, rounds=3)
    assert sum(int(m.sum()) for m in masks.values()) == 18, notation
print("right")
"""
    assert there(workshop, sys.executable, "-c", code).strip() == "right"


def test_it_runs_in_a_sweep_over_two_workers(workshop):
    out = there(workshop, sys.executable, "my_sweep.py")
    accuracy = dict(re.findall(r"^(\S+)\s+([\d.]+)$", out, re.M))
    assert set(accuracy) == {"lamp", "lamp>synflow", "magnitude"} and float(accuracy["lamp"]) > 50, out  # chance is 10
    assert len(list((workshop[0] / "runs" / "results").rglob("*.json"))) == 6


def test_the_example_of_the_readme(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    fetch("mnist")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("0.01 {"), done.stdout + done.stderr
    trained, found = done.stdout.splitlines()[-2:]
    # 469 iterations an epoch: an event every 100 of 1,407
    assert trained == f"{round(0.02 * 266_200) / 266_200} 14", done.stdout
    # 266,200 mask bits, 26,620 signs, 3 gains and 410 biases of 32 bits
    assert re.fullmatch(r"(9\d\.\d+) 306036 \(\d+, \d+\)", found), done.stdout
    assert Ticket.load(tmp_path / "ticket.safetensors").density == pytest.approx(0.01, abs=1e-5)
