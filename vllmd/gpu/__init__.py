"""The devices: NVIDIA's, AMD's, Intel's, or those that the configuration declares, or none.

::

    sources      which of them it is on this machine: these devices, none, or something that does not answer
    trouble      "there is none" against "it does not answer", and what mends that
    inventory    what every source tells without reading: its devices, and notes about them
    sample       one reading: figures per device, and what could not be read
    nvml         NVIDIA's library, through nvidia-ml-py
    sysfs        AMD's and Intel's kernel drivers, through their files
    amdsmi       AMD's library, where it is installed, before those
    hwmon        power and heat, as kernel drivers tell them
    topology     how near devices are to each other and to the CPUs
    visible      which devices the environment leaves to us (CUDA_VISIBLE_DEVICES and its like)
    visibility   how an engine is told which devices are its own
    present      what there is, and whether a model's settings fit it, for commands without a daemon
    cpu          the CPU as a device, where there is no other
    declared     devices from the configuration; their usage from a stand-in's file
    attribution  whose memory it is: a model's by its processes, or external
    figures      a sample as the HTTP API shows it
    uevents      the kernel's word that the devices changed
    thread       calls that may never return

Everything here may block for as long as the driver likes (a wedged one: for
ever), so the daemon calls ``open_devices`` and ``sample`` by ``in_thread``, with a
time limit. One thread at a time: a ``Devices`` has no lock.
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
