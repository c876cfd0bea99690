"""Which Python the program that fetches runs in: one that has huggingface_hub, which vllmd itself does not need."""

from __future__ import annotations

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
    """A Python for it: the first that has huggingface_hub, else any; the program then has pip fetch it.

    ``system``: engines run as another user, who has not what we have in our own environment.
    """
    candidates = list(_candidates(variables, system))
    return str(next((python for python, has in candidates if has), candidates[0][0]))


def _candidates(variables: Mapping[str, str], system: bool) -> Iterator[tuple[Path, bool]]:
    for root in environments.roots(variables):
        kinds = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        for kind in kinds:
            for one in environments.installed(kind, {**variables, "VLLMD_ENGINES": str(root)}):
                yield one.python, any(one.path.glob(f"lib/python3*/site-packages/{MODULE}/__init__.py"))
    path = environments.PATH if system else variables.get("PATH", environments.PATH)
    for program in ("vllm", "hf", "huggingface-cli", "sglang"):
        found = shutil.which(program, path=path)
        if found and (python := _of_script(Path(found))):
            yield python, any(python.parents[1].glob(f"lib/python3*/site-packages/{MODULE}/__init__.py"))
    yield SYSTEM_PYTHON, Path(f"/usr/lib/python3/dist-packages/{MODULE}/__init__.py").exists()
    if not system and any(Path(entry, MODULE, "__init__.py").exists() for entry in sys.path if entry):
        yield Path(sys.executable), True


def _of_script(path: Path) -> Path | None:
    """The Python that a script's first line names."""
    try:
        with path.open("rb") as file:
            found = _PYTHON.match(file.readline(300))
    except OSError:
        return None
    return Path(os.fsdecode(found[1])) if found else None
