"""A virtual machine for what a container here cannot have: its own kernel with all control group controllers.

Software emulation, so it is slow: a boot takes half a minute. It runs one program, whose output is the result.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.machine.container import REPOSITORY, CannotBoot, cache

SUITE = "bookworm"
KERNEL = cache() / "qemu"
BEGIN, END = "=== result", "=== end"
# $1 base tree, $2 work folder, $3 in-tree, $4 package; files to be added are in $2/files.
_MAKE = """
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
cp "$4" "$2/root/root/package.deb"
cp -r "$2/files/." "$2/root/"
"$3" "$2/root" '
    dpkg --force-unsafe-io --force-confold --install /root/package.deb
    systemctl enable experiment.service' >"$2/log" 2>&1
truncate --size=2G "$2/disk"
mkfs.ext4 -q -E root_owner=0:0 -d "$2/root" "$2/disk"
"""
_UNIT = f"""
[Service]
Type=oneshot
ExecStart=/bin/sh -c '{{ echo; echo "{BEGIN}"; /usr/bin/python3 /opt/experiment.py 2>&1; echo "{END}"; }} >/dev/ttyS0'
ExecStopPost=/usr/bin/systemctl --no-block poweroff
TimeoutStartSec=infinity
[Install]
WantedBy=multi-user.target
"""


def run(package: Path, program: str, files: Mapping[str, str], *, memory: int = 1024, timeout: float = 600.0) -> str:
    """What ``program`` (Python) prints in a machine with vllmd installed. ``memory``: MiB. Raises CannotBoot."""
    if not (KERNEL / "vmlinuz").exists() or shutil.which("qemu-system-x86_64") is None:
        raise CannotBoot("no qemu or no kernel for it: packaging/dev/setup qemu")
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        work = Path(folder)
        for part in ("upper", "work", "root", "files"):
            (work / part).mkdir()
        added = {"/opt/experiment.py": program, "/etc/systemd/system/experiment.service": _UNIT, **files}
        for path, text in added.items():
            target = work / "files" / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        in_tree = REPOSITORY / "packaging/dev/in-tree"
        argv = ["unshare", "--mount", "--propagation", "private", "bash", "-euc", _MAKE, "make"]
        made = subprocess.run(
            [*argv, cache() / f"tree-{SUITE}", work, in_tree, package], capture_output=True, text=True
        )
        if made.returncode:
            raise CannotBoot(f"no disk: {made.stderr}{(work / 'log').read_text()[-2000:]}")
        return _boot(work / "disk", memory, timeout)


def _boot(disk: Path, memory: int, timeout: float) -> str:
    machine = [
        "qemu-system-x86_64",
        "-M",
        "q35",
        "-cpu",
        "max",
        "-accel",
        "tcg,thread=multi",
        "-smp",
        "2",
        "-m",
        str(memory),
    ]
    machine += ["-nographic", "-no-reboot", "-nic", "none", "-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"]
    machine += ["-kernel", str(KERNEL / "vmlinuz"), "-initrd", str(KERNEL / "initrd")]
    machine += ["-append", "console=ttyS0 quiet panic=1 systemd.show_status=0"]
    try:
        done = subprocess.run(
            machine, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout
        )
        told = done.stdout
    except subprocess.TimeoutExpired as error:
        told = (error.stdout or b"").decode(errors="replace")
    if BEGIN not in told or END not in told:
        raise AssertionError(f"it did not come to its end:\n{told[-5000:]}")
    return told.partition(BEGIN)[2].partition(END)[0].replace("\r", "").strip()
