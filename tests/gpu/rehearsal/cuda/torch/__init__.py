"""A stand-in for torch, as far as gpu-check and the stand-in engine use it.

Its one CUDA device is the file named by $GPU_CHECK_DEVICE, where this process holds what its tensors take and a
context. As the real one does, it refuses to work in a child that was forked after CUDA had been initialised.
"""

from __future__ import annotations

import os
import weakref
from types import SimpleNamespace
from typing import Any

from tests.gpu.rehearsal.nvml import pynvml
from vllmd.simengine.device import FakeGpu, device_usage

__version__ = "0 (rehearsal)"
version = SimpleNamespace(cuda="0")
uint8 = "uint8"
CONTEXT = 96 << 20


class OutOfMemoryError(RuntimeError):
    """As torch.cuda.OutOfMemoryError."""


class device:
    """``device("cuda", 0)``."""

    def __init__(self, kind: str, index: int = 0) -> None:
        self.kind, self.index = kind, index


class _Cuda:
    def __init__(self) -> None:
        self.initialised = self.forked = False
        self.held = 0

    def is_available(self) -> bool:
        return self.device_count() > 0

    def device_count(self) -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return int(visible is None or visible == "0" or (visible != "" and pynvml.UUID.startswith(visible)))

    def is_initialized(self) -> bool:
        return self.initialised and not self.forked

    def init(self) -> None:
        if self.forked:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")
        if not self.device_count():
            raise RuntimeError("No CUDA GPUs are available")
        if not self.initialised:
            self.initialised = True
            self.take(0)

    def take(self, size: int) -> None:
        self.held += size
        FakeGpu(os.environ["GPU_CHECK_DEVICE"]).hold(self.held + CONTEXT if self.initialised else 0)

    def mem_get_info(self, _device: object = 0) -> tuple[int, int]:
        self.init()
        usage = device_usage(os.environ["GPU_CHECK_DEVICE"])
        return usage.free, usage.memory

    def get_device_properties(self, _device: object) -> SimpleNamespace:
        self.init()
        memory = device_usage(os.environ["GPU_CHECK_DEVICE"]).memory
        return SimpleNamespace(name="Rehearsed GPU", total_memory=memory, uuid=pynvml.UUID.removeprefix("GPU-"))

    def get_device_name(self, _device: object) -> str:
        return "Rehearsed GPU"

    def synchronize(self, _device: object = 0) -> None: ...

    def empty_cache(self) -> None: ...


cuda = _Cuda()


def _after_fork() -> None:
    cuda.forked = cuda.forked or cuda.initialised


os.register_at_fork(after_in_child=_after_fork)


class Tensor:
    """So many bytes that are all the same."""

    def __init__(self, size: int, place: object, value: int = 0) -> None:
        self._size, self._value = size, value
        self._on_device = place is not None
        if self._on_device:
            cuda.init()
            cuda.take(size)
            weakref.finalize(self, cuda.take, -size)

    def numel(self) -> int:
        return self._size

    def __getitem__(self, _index: int) -> int:
        return self._value

    def fill_(self, value: int) -> Tensor:
        self._value = value
        return self

    def copy_(self, other: Tensor, non_blocking: bool = False) -> Tensor:
        self._value = other._value
        return self


def empty(size: int, *, dtype: str, device: Any = None, pin_memory: bool = False) -> Tensor:
    """In host memory without a device."""
    return Tensor(size, device)


def full(size: tuple[int, ...], value: int, *, dtype: str, device: Any = None) -> Tensor:
    return Tensor(size[0], device, value)


_C = SimpleNamespace(_host_emptyCache=lambda: None)
