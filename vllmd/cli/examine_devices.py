"""``vllmctl doctor`` about devices: drivers, device nodes, groups, libraries; then whether the devices answer.

Each finding has the one command that mends it. Where the files show a fault, the driver is not asked as well: it would
report the same in other words.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vllmd.cli.examined import Finding, Host
from vllmd.gpu import Devices, Presence, Sample, gpus
from vllmd.gpu.thread import answer_within
from vllmd.sizes import in_words

PATIENCE_SECONDS = 10.0  # for a driver's answer: without persistence mode it takes a few
UNKNOWN = "dmesg says what it met; it comes back with a reset of the GPU, or a reboot"
RULES = "udevadm trigger --subsystem-match=drm --subsystem-match=kfd"


def driver(host: Host) -> Iterator[Finding]:
    """The GPUs' drivers, device nodes and libraries, by their files; then, if these are well, the driver's answer."""
    here = Presence(host.root)
    findings = [*nvidia(host, here), *amd(host, here), *intel(host)]
    yield from findings
    if not any(verdict == "bad" for verdict, _, _ in findings):
        yield from driver_answers(host, quiet=not findings)


def declared(host: Host) -> bool:
    """Whether the configuration says which devices there are."""
    return host.reading.config.devices is not None


def nvidia(host: Host, here: Presence) -> Iterator[Finding]:
    """NVIDIA's driver, of Linux or in WSL of Windows, its device nodes, and the library that reads it."""
    if host.path("/dev/dxg").exists():
        if host.path("/usr/lib/wsl/lib/libnvidia-ml.so.1").exists():
            yield "ok", "Windows' NVIDIA driver is there", ""
        else:
            what = "this is WSL, but Windows gives it no NVIDIA library"
            yield "bad", what, "wsl --update in Windows, and NVIDIA's driver there; none belongs into Linux"
        return
    if not host.path("/proc/driver/nvidia/version").exists():
        if cards := here.displays("0x10de"):
            advice = "modprobe nvidia; if it fails, dmesg says why (no module for this kernel, Secure Boot, nouveau)"
            yield "bad", f"there is an NVIDIA card at {', '.join(cards)}, but its driver is not loaded", advice
        return
    yield "ok", "NVIDIA's driver is loaded", ""
    yield from nvidia_nodes(host)
    # The library's release is in its file's name; a package upgrade leaves the old module loaded until a reboot.
    folders = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
    libraries = [path for folder in folders for path in host.path(folder).glob("libnvidia-ml.so.*.*")]
    module = _text(host.path("/sys/module/nvidia/version"))
    library = libraries[0].name.removeprefix("libnvidia-ml.so.") if libraries else ""
    if module and library and module != library:
        what = f"the driver was upgraded: module {module} is loaded, the library is {library}"
        yield "bad", what, "reboot"
    if not host.has_module("pynvml"):
        yield "bad", "NVIDIA's GPUs cannot be read without NVML's Python package", "apt install python3-pynvml"


def nvidia_nodes(host: Host) -> Iterator[Finding]:
    """The device nodes of NVIDIA's driver, and their permissions."""
    nodes = sorted(path for path in host.path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    if not nodes:
        yield "bad", "there are no /dev/nvidia0, /dev/nvidia1, ...", "nvidia-modprobe -c 0"
    for path in (*nodes, host.path("/dev/nvidiactl")):
        if path.exists() and path.stat().st_mode & 0o006 != 0o006:
            yield "bad", f"/dev/{path.name} is not open to everybody", f"chmod 0666 /dev/{path.name}"
    if nodes and not host.path("/dev/nvidia-uvm").exists():
        advice = "nvidia-modprobe -u -c 0, or enable nvidia-persistenced; engines may not load it themselves"
        yield "bad", "/dev/nvidia-uvm is missing", advice


def amd(host: Host, here: Presence) -> Iterator[Finding]:
    """AMD's compute driver, and whether engines may use it."""
    unbound = set(here.unbound("0x1002"))
    if host.path("/dev/kfd").exists():
        yield "ok", "AMD's compute driver is loaded", ""
        yield from _access(host, "/dev/kfd", "AMD's")
    elif host.path("/sys/class/kfd").is_dir():
        yield "bad", "AMD's compute driver is loaded, but there is no /dev/kfd", RULES
    elif unbound:
        advice = "modprobe amdgpu; if it fails, dmesg says why (firmware: apt install firmware-amd-graphics)"
        yield "warning", f"there is an AMD card at {', '.join(sorted(unbound))}, but its driver is not loaded", advice


def intel(host: Host) -> Iterator[Finding]:
    """Intel's driver for GPUs with memory of their own; nearly every office machine has a GPU of Intel's without."""
    drivers = [name for name in ("xe", "i915") if host.path(f"/sys/bus/pci/drivers/{name}").is_dir()]
    if not drivers or (not list(host.path("/sys/class/drm").glob("card*/lmem_total_bytes")) and "xe" not in drivers):
        return
    yield "ok", f"Intel's driver is loaded ({', '.join(drivers)})", ""
    yield from _access(host, "/dev/dri", "Intel's")


def _access(host: Host, what: str, whose: str) -> Iterator[Finding]:
    """Whether engines may open the device node ``what``, and the render nodes beside it: of the group render."""
    nodes = [path for path in sorted(host.path("/dev/dri").glob("renderD*")) if path.exists()]
    if not nodes:
        yield "bad", f"there is no /dev/dri/renderD128, by which {whose} GPUs are used", RULES
    user = "vllmd-engine"
    if host.user or user not in {line.partition(":")[0] for line in _text(host.path("/etc/passwd")).splitlines()}:
        return
    groups = dict(line.split(":")[0::3] for line in _text(host.path("/etc/group")).splitlines() if line.count(":") == 3)
    closed = [path for path in (host.path(what), *nodes) if path.exists() and path.stat().st_mode & 0o006 != 0o006]
    if "render" not in groups:
        yield "bad", f"there is no group render, which owns {what}", "systemd-sysusers"
    elif closed and user not in groups["render"].split(","):
        yield "bad", f"{user} is not in the group render, which owns {what}", f"usermod -aG render,video {user}"


def driver_answers(host: Host, *, quiet: bool) -> Iterator[Finding]:
    """The devices and a reading of them, as the daemon would get them now."""
    if declared(host):
        return

    def ask() -> tuple[Devices, Sample]:
        opened = host.devices(Presence(host.root))
        return opened, opened.sample() if opened.readable else Sample()

    answer = answer_within(PATIENCE_SECONDS, ask)
    if answer is None:
        yield "bad", f"the GPU driver has not answered for {PATIENCE_SECONDS:.0f} s", UNKNOWN
        return
    devices, sample = answer
    if devices.trouble:
        yield "bad", devices.trouble.why, devices.trouble.remedy or UNKNOWN
    elif not gpus(devices.inventory()) and quiet:
        yield "warning", devices.note, "devices may be declared (devices: in vllmd.yaml(5))"
    for device in gpus(devices.inventory()):
        name = f"device {device.index}, {device.name or device.id}"
        wrong = sample.lost.get(device.index) or sample.failed.get(device.index) or sample.ill.get(device.index)
        seen = sample.devices.get(device.index)
        if wrong:
            yield "bad", f"{name}: {wrong}", f"vllmctl drain {device.index} keeps engines off it meanwhile"
        elif seen and seen.throttled:
            yield "warning", f"{name}: it is slowed down: {seen.throttled}", "look after its cooling and its power"
        else:
            yield "ok", f"{name}: {in_words(device.memory, gap='', digits='.0f')}", ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
