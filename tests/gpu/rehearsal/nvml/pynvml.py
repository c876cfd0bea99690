"""A stand-in for ``pynvml`` whose GPUs are pretended devices' files, named by $GPU_CHECK_DEVICE (with ``:`` between).

The file $GPU_CHECK_FAULT, where there is one, says what fails from now on: ``{"init": ["Driver Not Loaded", 9],
"memory": ["GPU is lost", 15], "hang": true}``; it may be changed while the library is in use.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tests.gpu.fake_nvml import FakeNvml, Gpu, NVMLError
from vllmd.simengine.device import device_usage

__all__ = ["NVMLError"]
UUID = "GPU-0badcafe-0000-4000-8000-000000000000"


def _fault() -> dict[str, Any]:
    path = os.environ.get("GPU_CHECK_FAULT")
    fault: dict[str, Any] = json.loads(Path(path).read_text()) if path and Path(path).exists() else {}
    while fault.get("hang"):
        time.sleep(0.05)
        fault = _fault()
    return fault


class FileNvml(FakeNvml):
    """Reads its files anew for each question."""

    def __init__(self, paths: dict[str, str]) -> None:
        super().__init__(*(Gpu(uuid, name="Rehearsed GPU") for uuid in paths))
        self._paths = paths

    def nvmlInit(self) -> None:
        fault = _fault()
        self.broken = NVMLError(*fault["init"]) if "init" in fault else ""
        super().nvmlInit()

    def nvmlDeviceGetCount(self) -> int:
        return int(_fault().get("count", len(self.gpus)))

    def _ask(self, gpu: Gpu, what: str) -> Gpu:
        fault = _fault()
        gpu.refuses = {name: NVMLError(*told) for name, told in fault.items() if isinstance(told, list)}
        gpu.errors = fault.get("ecc_errors", 0)
        usage = device_usage(self._paths[gpu.uuid])
        gpu.total, gpu.used, gpu.computing = usage.memory, usage.used, dict(usage.processes)
        return super()._ask(gpu, what)


_files = os.environ.get("GPU_CHECK_DEVICE", "").split(":")
_library = FileNvml({f"{UUID[:-1]}{number}": path for number, path in enumerate(_files)})


def __getattr__(name: str) -> Any:
    return getattr(_library, name)
