"""Real device memory, held through torch: the stand-in as a load for ``make gpu-check``."""

from __future__ import annotations

import importlib
from typing import Any

from vllmd.simengine.device import OutOfDeviceMemory


class NoCuda(Exception):
    """torch is missing, or it sees no CUDA device; the message says which and what to do."""


class CudaMemory:
    """A block of bytes on one CUDA device, with the same two verbs as a pretended GPU."""

    def __init__(self, index: int) -> None:
        self._torch = _torch()
        if index >= self._torch.cuda.device_count():
            raise NoCuda(f"--cuda: there is no device {index}; torch sees {self._torch.cuda.device_count()}")
        self._device = self._torch.device("cuda", index)
        self._block: Any = None

    @property
    def memory(self) -> int:
        """Bytes the device has in all."""
        return int(self._torch.cuda.mem_get_info(self._device)[1])

    def hold(self, size: int) -> None:
        """Hold ``size`` bytes beside CUDA's own context, instead of what was held before."""
        self._block = None
        self._torch.cuda.empty_cache()
        self.check(size)
        if size:
            self._block = self._torch.empty(size, dtype=self._torch.uint8, device=self._device)
            self._torch.cuda.synchronize(self._device)

    def check(self, size: int) -> None:
        """Raise OutOfDeviceMemory if ``size`` bytes could not be held now."""
        free, total = self._torch.cuda.mem_get_info(self._device)
        mine = 0 if self._block is None else self._block.numel()
        if size > free + mine:
            raise OutOfDeviceMemory(size, free + mine, total)


def _torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise NoCuda(f"--cuda needs torch, which this Python cannot import: {error}") from error
    if not torch.cuda.is_available():
        raise NoCuda("--cuda: torch is here but sees no CUDA device")
    return torch
