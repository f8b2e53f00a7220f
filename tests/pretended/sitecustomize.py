"""Put this folder first on PYTHONPATH and set LTH_PRETEND_CUDA=1: every Python that starts so has the pretended
CUDA device of `../pretend_cuda.py` from the moment it imports torch, and one that never does pays nothing. So it
reaches worker processes, Jupyter kernels and the command line.
"""

import importlib.abc
import importlib.util
import os
import pathlib
import sys


def pretend():
    "Load `pretend_cuda.py` by its place: the folder of the tests need not be on the path."
    spec = importlib.util.spec_from_file_location("pretend_cuda", pathlib.Path(__file__).parents[1] / "pretend_cuda.py")
    module = sys.modules["pretend_cuda"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


class AfterTorch(importlib.abc.MetaPathFinder):
    "Finds torch as the others do, and pretends when it has been loaded (not when somebody asked whether it is there)."

    asking = False

    def find_spec(self, name, path=None, target=None):
        if name != "torch" or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec and spec.loader:
            spec.loader.exec_module = self.then_pretend(spec.loader.exec_module)
        return spec

    def then_pretend(self, load):
        def exec_module(module):
            load(module)
            sys.meta_path.remove(self)
            pretend()

        return exec_module


def next_one():
    "Run the `sitecustomize` that this one hides, if there is any."
    here = pathlib.Path(__file__).parent
    for folder in sys.path:
        other = pathlib.Path(folder or ".") / "sitecustomize.py"
        if other.is_file() and other.parent.resolve() != here.resolve():
            return exec(
                compile(other.read_text(), str(other), "exec"), {"__name__": "sitecustomize", "__file__": str(other)}
            )


if os.environ.get("LTH_PRETEND_CUDA") == "1":
    sys.meta_path.insert(0, AfterTorch())
next_one()
