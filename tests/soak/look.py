"""In the machine: what daemon, kernel and stand-ins say at this moment, as one JSON object.

usage: look.py DEVICE_FILE
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")


def output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True).stdout


def process(unit: str) -> dict[str, int]:
    """What the unit's main process holds: descriptors, threads, bytes of memory."""
    pid = output("systemctl", "show", "--property=MainPID", "--value", unit).strip()
    try:
        descriptors, threads = len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))
        with open(f"/proc/{pid}/statm") as file:
            memory = int(file.read().split()[1]) * PAGE
    except FileNotFoundError:
        return {"pid": 0, "descriptors": 0, "threads": 0, "memory": 0}
    return {"pid": int(pid), "descriptors": descriptors, "threads": threads, "memory": memory}


def engines() -> dict[int, tuple[str, str]]:
    """The instance and the scope of each process of the engines' user."""
    found = {}
    for pid in map(int, output("pgrep", "-u", "vllmd-engine").split()):
        try:
            with open(f"/proc/{pid}/environ") as environ, open(f"/proc/{pid}/cgroup") as cgroup:
                names = [each for each in environ.read().split("\0") if each.startswith("VLLMD_INSTANCE=")]
                found[pid] = ("".join(names).partition("=")[2], cgroup.read().strip().rpartition("/")[2])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def held(path: str, instances: dict[int, tuple[str, str]]) -> dict[str, int]:
    """Bytes on the pretended device, by instance; those of nobody by their process id."""
    from vllmd.simengine.device import device_usage

    sums: dict[str, int] = {}
    for pid, size in device_usage(path).processes.items():
        instance = instances.get(pid, (f"process {pid}", ""))[0]
        sums[instance] = sums.get(instance, 0) + size
    return sums


def asked(path: str) -> str:
    return output("curl", "-sf", "-m", "20", "--unix-socket", "/run/vllmd/admin.sock", f"http://x/{path}")


def main() -> None:
    status: Any = json.loads(asked("admin/status") or "{}")
    lines = [line for line in asked("metrics").splitlines() if line.startswith("vllmd_http_requests_total{")]
    counted = [line for line in lines if "chat" in line]
    instances = engines()
    units = output("systemctl", "list-units", "--plain", "--no-legend", "vllmd-model-*.scope").splitlines()
    groups = os.listdir("/sys/fs/cgroup/vllmd.slice") if os.path.isdir("/sys/fs/cgroup/vllmd.slice") else []
    found = {
        "status": status,
        "answered": sum(float(line.rpartition(" ")[2]) for line in counted),
        "held": {name: size for name, size in held(sys.argv[1], instances).items() if size},
        "processes": sorted({scope for _, scope in instances.values()}),
        "scopes": sorted({line.split()[0] for line in units} | {name for name in groups if name.endswith(".scope")}),
        "run directories": sorted(os.listdir("/run/vllmd-engine")),
        "vllmd.service": process("vllmd.service"),
        "vllmd-launcher.service": process("vllmd-launcher.service"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
