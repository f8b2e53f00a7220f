"""One thread, and a store of trials of the tests' own: a test run never reads or writes the user's."""
import os
import tempfile

os.environ.update(OMP_NUM_THREADS='1', MPLBACKEND='Agg', LTH_RUNS=tempfile.mkdtemp(prefix='lth-tests-'))
os.environ.pop('LTH_PLUGINS', None)

import torch  # noqa: E402

torch.set_num_threads(1)
