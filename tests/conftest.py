"""One thread, and a store of trials of the tests' own: a test run never reads or writes the user's."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile

os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", LTH_RUNS=tempfile.mkdtemp(prefix="lth-tests-"))
os.environ.pop("LTH_PLUGINS", None)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)

# No limit of wall time, which a busy machine breaks, and the same examples in every run: `pytest --hypothesis-profile
# explore` draws others.
for name, same in {"house": True, "explore": False}.items():
    settings.register_profile(
        name,
        deadline=None,
        derandomize=same,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
settings.load_profile("house")


@pytest.fixture
def killed(request):
    """Calls the test module's own `dies(name, path)` in a process of its own, which must end by signal 9; gives the
    path back.
    """

    def run(name, path):
        code = f"import {request.module.__name__} as t; t.dies({name!r}, {str(path)!r})"
        here = pathlib.Path(__file__).parent
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=here,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        return path

    return run


def pytest_collection_modifyitems(items):
    "Tests of a GPU are named and skipped where there is none."
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none here"))
