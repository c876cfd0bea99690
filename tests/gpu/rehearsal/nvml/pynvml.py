"""A stand-in for ``pynvml`` whose one GPU is a pretended device's file, named by $GPU_CHECK_DEVICE."""

from __future__ import annotations

import os
from typing import Any

from tests.gpu.fake_nvml import FakeNvml, Gpu, NVMLError
from vllmd.simengine.device import device_usage

__all__ = ["NVMLError"]
UUID = "GPU-0badcafe-0000-4000-8000-000000000000"


class FileNvml(FakeNvml):
    """Reads the file anew for each question."""

    def _ask(self, gpu: Gpu, what: str) -> Gpu:
        usage = device_usage(os.environ["GPU_CHECK_DEVICE"])
        gpu.total, gpu.used, gpu.computing = usage.memory, usage.used, dict(usage.processes)
        return super()._ask(gpu, what)


_library = FileNvml(Gpu(UUID, name="Rehearsed GPU"))


def __getattr__(name: str) -> Any:
    return getattr(_library, name)
