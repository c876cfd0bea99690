"""The Python that runs ``fetch.py``: one that has huggingface_hub, which vllmd itself does not need."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from vllmd.engines import environments

FETCH = Path(__file__).with_name("fetch.py")
MODULE = "huggingface_hub"
SYSTEM_PYTHON = Path("/usr/bin/python3")
INSTALL = "the environments of vLLM and transformers have it: vllmctl engine install transformers"
_PYTHON = re.compile(rb"#!\s*(/\S*/python[\d.]*)\b")


def interpreter(variables: Mapping[str, str] = os.environ, *, system: bool) -> str:
    """The first Python that has huggingface_hub, else any: ``fetch.py`` then has pip fetch the library.

    ``system``: engines run as another user, for whom our own environment does not count.
    """
    interpreters = list(candidates(variables, system))
    return str(next((python for python, has in interpreters if has), interpreters[0][0]))


def candidates(variables: Mapping[str, str], system: bool) -> Iterator[tuple[Path, bool]]:
    """Pythons in the order of preference, each with whether it has huggingface_hub: of environments, of programs in
    PATH, the system's, our own."""
    for root in environments.roots(variables):
        kinds = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        for kind in kinds:
            for one in environments.installed(kind, {**variables, "VLLMD_ENGINES": str(root)}):
                yield one.python, any(one.path.glob(f"lib/python3*/site-packages/{MODULE}/__init__.py"))
    path = environments.PATH if system else variables.get("PATH", environments.PATH)
    for program in ("vllm", "hf", "huggingface-cli", "sglang"):
        script = shutil.which(program, path=path)
        match = None
        if script:
            with contextlib.suppress(OSError), open(script, "rb") as file:
                match = _PYTHON.match(file.readline(300))
        if match:
            python = Path(os.fsdecode(match[1]))
            yield python, any(python.parents[1].glob(f"lib/python3*/site-packages/{MODULE}/__init__.py"))
    yield SYSTEM_PYTHON, Path(f"/usr/lib/python3/dist-packages/{MODULE}/__init__.py").exists()
    if not system and any(Path(entry, MODULE, "__init__.py").exists() for entry in sys.path if entry):
        yield Path(sys.executable), True
