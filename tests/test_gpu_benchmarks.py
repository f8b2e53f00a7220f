"""The GPU's benchmarks, rehearsed on the CPU: every line of them runs, with graphs replaced by the step they would replay."""
import pathlib, subprocess, sys
import pytest, torch
from lth_companion import training
from test_training import stand_in  # noqa: F401  (the fixture)

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"

def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "need a CUDA device" in done.stderr and "Traceback" not in done.stderr

@pytest.mark.parametrize("name", ["large", "graph", "together", "table"])
def test_every_benchmark_runs(name, stand_in, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda model, **k: model)
    before = len(gpu.ROWS)
    gpu.ALL[name](quick=True)
    rows = gpu.ROWS[before:]
    assert rows and all(r.value > 0 for r in rows)
    assert (name != "graph") or stand_in

@pytest.mark.gpu
def test_on_a_gpu():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py", "--quick"], capture_output=True, text=True)
    assert done.returncode in (0, 1) and done.stdout.count("\n") >= 7, done.stderr
