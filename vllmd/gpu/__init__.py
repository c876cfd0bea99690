"""The devices: NVIDIA's, AMD's, Intel's, or those that the configuration declares, or none.

::

    sources      which of them this machine has: these devices, none, or something that does not answer
    trouble      "there is none" against "it does not answer", and the remedy for that
    inventory    the devices of a source as they were found, and notes about them
    sample       one reading: figures per device, and what could not be read
    nvml         NVIDIA's library, through nvidia-ml-py
    sysfs        AMD's and Intel's kernel drivers, through their files
    amdsmi       AMD's library, where it is installed, before those
    hwmon        power and heat, from the kernel drivers
    topology     links between devices, PCIe switches and NUMA nodes
    visible      the devices that the daemon's environment leaves (CUDA_VISIBLE_DEVICES and its like)
    visibility   the variables by which an engine gets its devices
    present      the devices, and whether a model's settings fit them, for commands without a daemon
    cpu          the CPU as a device, where there is no other
    declared     devices from the configuration; their usage from a stand-in's file
    attribution  the memory of each model by its processes, and external memory
    figures      a sample as the HTTP API shows it
    uevents      the kernel's events that devices changed
    thread       calls that may never return

Everything here may block in the driver (a wedged one: for ever), so the daemon calls ``open_devices`` and ``sample`` by
``in_thread``, with a time limit. One thread at a time: a ``Devices`` has no lock.
"""

from vllmd.gpu.attribution import attribute, pids_of
from vllmd.gpu.cpu import gpus, the_cpu
from vllmd.gpu.figures import GpuInfo, GpuProcess, gpu_infos
from vllmd.gpu.inventory import NoDevices, Unanswered
from vllmd.gpu.sample import DeviceSample, Sample
from vllmd.gpu.sources import Devices, open_devices
from vllmd.gpu.thread import in_thread
from vllmd.gpu.trouble import Presence, Trouble
from vllmd.gpu.uevents import Uevents
from vllmd.gpu.visibility import environment

__all__ = [
    "DeviceSample",
    "Devices",
    "GpuInfo",
    "GpuProcess",
    "NoDevices",
    "Presence",
    "Sample",
    "Trouble",
    "Uevents",
    "Unanswered",
    "attribute",
    "environment",
    "gpu_infos",
    "gpus",
    "in_thread",
    "open_devices",
    "pids_of",
    "the_cpu",
]
