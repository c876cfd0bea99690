"""The devices: NVML's, or those that the configuration declares, or none.

::

    inventory    which there are, and notes about them
    sample       one reading: figures per device, and what could not be read
    nvml         NVIDIA's library, through nvidia-ml-py
    visible      which devices CUDA_VISIBLE_DEVICES leaves
    declared     devices from the configuration; their usage from a stand-in's file
    attribution  whose memory it is: a model's by its processes, or a stranger's
    figures      a sample as the HTTP API shows it
    sources      which of them it is on this machine, and why
    thread       calls that may never return

Everything here may block for as long as the driver likes (a wedged one: for
ever), so the daemon calls ``open_devices`` and ``sample`` by ``in_thread``, with a
time limit. One thread at a time: a ``Devices`` has no lock.
"""

from vllmd.gpu.attribution import attribute, pids_of
from vllmd.gpu.declared import NoDevices
from vllmd.gpu.figures import GpuInfo, GpuProcess, gpu_infos
from vllmd.gpu.sample import DeviceSample, Sample
from vllmd.gpu.sources import Devices, open_devices
from vllmd.gpu.thread import in_thread

__all__ = [
    "DeviceSample",
    "Devices",
    "GpuInfo",
    "GpuProcess",
    "NoDevices",
    "Sample",
    "attribute",
    "gpu_infos",
    "in_thread",
    "open_devices",
    "pids_of",
]
