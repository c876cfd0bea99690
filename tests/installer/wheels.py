"""Wheels that stand in for PyPI's xllamacpp: they install in no time, tell their version, and do nothing else."""

from __future__ import annotations

import zipfile
from pathlib import Path

GOOD = "__version__ = '{version}'\ndef get_system_info(): return 'stand-in'\n"
LACKS_A_LIBRARY = "raise ImportError('libgomp.so.1: cannot open shared object file: No such file or directory')\n"


def wheel(folder: Path, version: str, module: str = GOOD, requires_python: str = ">=3.8") -> Path:
    """A wheel of that version in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / f"xllamacpp-{version}-py3-none-any.whl", f"xllamacpp-{version}.dist-info"
    files = {
        "xllamacpp.py": module.replace("{version}", version),
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: xllamacpp\nVersion: {version}\nRequires-Python: {requires_python}\n"
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return path
