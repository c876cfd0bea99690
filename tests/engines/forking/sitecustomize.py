"""Imported first by every Python that has this folder in its PYTHONPATH: a real vLLM's other processes are forks.

On a CPU vLLM spawns its engine core and its worker, and each of the three imports for 10 to 15 s of processor time what
the first one has already. Where a test claims nothing of how vLLM starts, its processes are forked as those of vllmd's
standbys are, by the same file.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

METHOD_IS_CHOSEN_IN = "vllm.utils.system_utils"
PLACES = (*Path(__file__).resolve().parents, Path("/usr/lib/python3/dist-packages"))  # a checkout, an installed vllmd
FORK = next(file for place in PLACES if (file := place / "vllmd/engines/vllm_standby_fork.py").exists())


class Finder:
    """Finds that one module where it is, and has ``FORK`` executed once it is there."""

    def find_spec(self, name, path, target=None):
        if name != METHOD_IS_CHOSEN_IN:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_fork(module):
            load(module)
            runpy.run_path(str(FORK))

        spec.loader.exec_module = load_and_fork
        return spec


sys.meta_path.insert(0, Finder())
