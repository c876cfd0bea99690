"""Trees of /dev, /sys and /proc as the kernel's graphics drivers make them."""

from __future__ import annotations

import os
from pathlib import Path


def write(root: Path, *empty: str, **files: str) -> None:
    """Files by their path under ``root``."""
    for path, text in {**dict.fromkeys(empty, ""), **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def _function(root: Path, address: str, vendor: str, driver: str, kind: str = "0x030000") -> Path:
    folder = root / "sys/bus/pci/devices" / address
    write(folder, vendor=f"{vendor}\n", **{"class": f"{kind}\n"})
    if driver:
        (root / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (folder / "driver").symlink_to(root / "sys/bus/pci/drivers" / driver)
    return folder


def nvidia_card(root: Path, address: str = "0000:01:00.0", driver: str = "") -> None:
    """On the bus, and nothing more."""
    _function(root, address, "0x10de", driver, "0x030200")


def _drm(root: Path, number: int, function: Path) -> Path:
    card = root / "sys/class/drm" / f"card{number}"
    card.mkdir(parents=True)
    (card / "device").symlink_to(function)
    write(root, f"sys/class/drm/card{number}-DP-1/status")  # a connector, which is no card
    return card


def amd_card(
    root: Path, number: int, address: str, total: int, used: int, *, unique: str = "", busy: int = 0, watts: int = 0
) -> Path:
    """Returns its folder in /sys/class/drm."""
    function = _function(root, address, "0x1002", "amdgpu", "0x120000")
    write(
        function,
        mem_info_vram_total=f"{total}\n",
        mem_info_vram_used=f"{used}\n",
        gpu_busy_percent=f"{busy}\n",
        **({"unique_id": f"{unique}\n"} if unique else {}),
        **{"hwmon/hwmon3/power1_average": f"{watts * 1_000_000}\n"},
    )
    return _drm(root, number, function)


def kfd_node(root: Path, number: int, gpu: int, bus: int, held: dict[int, int]) -> None:
    """AMD's compute driver: node 0 is the CPU's, the others are GPUs; ``held``: bytes by pid."""
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    write(nodes, **{"0/gpu_id": "0\n", "0/properties": "cpu_cores_count 8\n"})
    write(nodes, **{f"{number}/gpu_id": f"{gpu}\n", f"{number}/properties": f"domain 0\nlocation_id {bus << 8}\n"})
    for pid, size in held.items():
        write(root / "sys/class/kfd/kfd/proc", **{f"{pid}/vram_{gpu}": f"{size}\n"})


def intel_card(root: Path, number: int, address: str, driver: str, total: int | None, free: int | None = None) -> Path:
    """One with ``free`` is i915's; without ``total`` it is integrated."""
    function = _function(root, address, "0x8086", driver)
    card = _drm(root, number, function)
    if total is not None and free is None:
        write(function, **{"tile0/physical_vram_size_bytes": f"0x{total:x}\n"})
    elif total is not None:
        write(card, lmem_total_bytes=f"{total}\n", lmem_avail_bytes=f"{free}\n")
    return card


def fdinfo(root: Path, pid: int, address: str, client: int, resident: int, times: int = 1) -> None:
    """A process's open files of one client of the driver."""
    text = (
        f"pos:\t0\ndrm-driver:\txe\ndrm-client-id:\t{client}\ndrm-pdev:\t{address}\n"
        f"drm-total-vram0:\t{resident >> 9} KiB\ndrm-resident-vram0:\t{resident >> 10} KiB\n"
    )
    write(root, **{f"proc/{pid}/fdinfo/{number}": text for number in range(times)})
    write(root, **{f"proc/{pid}/fdinfo/{times}": "pos:\t0\nflags:\t0100002\n"})
    os.makedirs(root / f"proc/{pid}/task", exist_ok=True)
