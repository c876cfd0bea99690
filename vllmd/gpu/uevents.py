"""Events of the kernel and of udev that devices changed: a module was loaded, a card was bound or removed.

They come by a netlink socket that every user may open. udev sends its event after its rules have run, when the device
nodes are there; the kernel's is for machines without udev.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping

UEVENT, KERNEL_AND_UDEV = 15, 1 | 2  # NETLINK_KOBJECT_UEVENT and its multicast groups
DRIVERS = frozenset({"nvidia", "nvidia_uvm", "amdgpu", "i915", "xe", "dxgkrnl"})
SUBSYSTEMS = frozenset({"drm", "kfd", "nvidia"})


class Uevents:
    """The netlink socket. If it cannot be opened, no event ever comes, and devices are searched at intervals alone."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, UEVENT)
            self._socket.setblocking(False)
            self._socket.bind((0, KERNEL_AND_UDEV))
        except OSError:
            self.close()

    async def wait(self, limit: float | None) -> bool:
        """Wait for an event about GPUs (returns True), at most ``limit`` seconds (returns False)."""
        end = None if limit is None else time.monotonic() + limit
        while True:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            try:
                if concerns_gpus(parse(await asyncio.wait_for(self._receive(), left))):
                    return True
            except TimeoutError:
                return False

    async def _receive(self) -> bytes:
        if self._socket is not None:
            try:
                return await asyncio.get_running_loop().sock_recv(self._socket, 65536)
            except OSError:  # ENOBUFS: events were lost, so pretend one about a GPU
                return b"add@/module/nvidia\0SUBSYSTEM=module\0DEVPATH=/module/nvidia\0"
        await asyncio.Event().wait()
        return b""

    def close(self) -> None:
        """Close the netlink socket; no further events come."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def parse(message: bytes) -> dict[str, str]:
    """The properties of one message, the kernel's or udev's."""
    pairs = (part.partition(b"=") for part in message.split(b"\0"))
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, is_one, value in pairs if is_one}


def concerns_gpus(event: Mapping[str, str]) -> bool:
    """Whether the devices may have changed by the event."""
    subsystem, path = event.get("SUBSYSTEM", ""), event.get("DEVPATH", "")
    if subsystem == "module":
        return path.rpartition("/")[2] in DRIVERS
    if subsystem == "pci":
        return event.get("DRIVER", "") in DRIVERS or event.get("PCI_CLASS", "").startswith("3")
    return subsystem in SUBSYSTEMS
