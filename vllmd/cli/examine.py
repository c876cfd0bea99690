"""The checks of ``vllmctl doctor``: one function for each question, which examines a ``Host`` and yields findings.

A finding is (verdict, what, advice); the verdict is ``ok``, ``warning`` (works, but) or ``bad``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from vllmd.cli.examine_devices import driver
from vllmd.cli.examined import Finding, Host
from vllmd.place import cpus, port_limits, tasks
from vllmd.sizes import GiB

NEEDED = {"h11": "python3-h11", "yaml": "python3-yaml", "sdnotify": "python3-sdnotify", "pystemd": "python3-pystemd"}
SOCKETS = ("vllmd.socket", "vllmd-admin.socket", "vllmd-read.socket", "vllmd-installer.socket")
USERS_SOCKETS = ("vllmd.socket", "vllmd-admin.socket")  # of systemctl --user
LAUNCHER = "vllmd-launcher.socket"  # static: it comes up with vllmd.service, and is down before the first start
FEWEST_TASKS = 1024
# How a user's own daemon gets another port than the system's: one line that can be pasted.
OWN_PORT = (
    "use that one, or give yours its own: "
    r"printf '[Socket]\nListenStream=\nListenStream=127.0.0.1:33259\n' | "
    "install -D -m 644 /dev/stdin ~/.config/systemd/user/vllmd.socket.d/port.conf && "
    "systemctl --user daemon-reload && systemctl --user stop vllmd.service && "
    "systemctl --user enable --now vllmd.socket"
)


# What units/vllmd.sysusers and units/vllmd.tmpfiles make, and the sockets' files.
GROUPS = ("vllmd-sockets", "vllmd-admin", "vllmd-read")
FOLDERS = ("/run/vllmd", "/run/vllmd-engine", "/var/lib/vllmd-engine", "/var/lib/vllmd-engines")
SOCKET_FILES = {"vllmd-admin.socket": "/run/vllmd/admin.sock", "vllmd-read.socket": "/run/vllmd/read.sock"}


def python(host: Host) -> Iterator[Finding]:
    """The Python packages that vllmd needs."""
    missing = [package for module, package in NEEDED.items() if not host.has_module(module)]
    if missing:
        yield "bad", f"Python packages are missing: {', '.join(missing)}", f"apt install {' '.join(missing)}"
    else:
        yield "ok", "the Python packages are there", ""


def systemd(host: Host) -> Iterator[Finding]:
    """A booted systemd that is new enough, and the unified control groups."""
    if not host.path("/run/systemd/system").is_dir():
        yield "warning", "systemd does not run this machine", "vllmd serve works, but its engines end with it"
        return
    words = host.run("systemctl", "--version").split()
    version = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    if version < 252:
        yield "bad", f"systemd is version {version or 'unknown'}", "252 or newer is needed"
    else:
        yield "ok", f"systemd {version}", ""
    if not host.path("/sys/fs/cgroup/cgroup.controllers").exists():
        advice = "boot with systemd.unified_cgroup_hierarchy=1"
        if host.path("/sys/fs/cgroup/unified/cgroup.controllers").exists():
            what = "control groups are of both versions: memory_high, memory_swap_max and oom_policy have no effect"
            yield "warning", what, advice
        else:
            yield "bad", "control groups are of version 1: no engine can be started", advice


def units(host: Host) -> Iterator[Finding]:
    """The sockets listen, no unit has failed, no scope is left over."""
    if not host.path("/run/systemd/system").is_dir():
        return
    systemctl = "systemctl --user" if host.user else "systemctl"
    for unit in USERS_SOCKETS if host.user else SOCKETS:
        state = host.systemctl("is-active", unit)
        file = SOCKET_FILES.get(unit, "")
        if state == "active" and file and not host.user and not host.path(file).exists():
            yield "bad", f"{unit} listens at {file}, which is not there any more", f"systemctl restart {unit}"
        elif state == "active":
            yield "ok", f"{unit} listens", ""
        elif host.user and unit == "vllmd.socket" and host.run("systemctl", "is-active", unit) == "active":
            yield "bad", f"{unit} is {state or 'unknown'}: the port is that of the system's vllmd", OWN_PORT
        elif host.systemctl("show", "--property=LoadState", "--value", unit) == "not-found":
            yield "bad", f"{unit} is not installed", "install vllmd anew"
        else:
            yield "bad", f"{unit} is {state or 'unknown'}", f"{systemctl} enable --now {unit}"
    if host.systemctl("is-active", "vllmd.service") == "active" and host.systemctl("is-active", LAUNCHER) != "active":
        yield "bad", f"{LAUNCHER} does not listen", f"{systemctl} start {LAUNCHER}"
    for unit in ("vllmd.service", "vllmd-launcher.service"):
        if host.systemctl("is-failed", unit) == "failed":
            journal = f"journalctl {'--user ' * host.user}-u {unit}"
            yield "bad", f"{unit} has failed", f"{journal}, then {systemctl} reset-failed {unit}"
    yield from leftover_engines(host)


def leftover_engines(host: Host) -> Iterator[Finding]:
    """Engines that run while no daemon does."""
    scopes = host.systemctl("list-units", "--no-legend", "--plain", "--state=active", "vllmd-model-*.scope")
    names = [line.split()[0] for line in scopes.splitlines() if line.strip()]
    if names and host.systemctl("is-active", "vllmd.service") != "active":
        what = f"{len(names)} engines run, but no daemon manages them: {', '.join(names)}"
        yield "warning", what, "the next request or systemctl start vllmd takes them over"


def accounts(host: Host) -> Iterator[Finding]:
    """The users of the system's daemon and engines, and their directories."""
    if host.user or not host.path("/run/systemd/system").is_dir():
        return
    users = _names(host.path("/etc/passwd"))
    for name in ("vllmd", "vllmd-engine"):
        if name not in users:
            yield "bad", f"there is no user {name}", "systemd-sysusers"
    groups = _names(host.path("/etc/group"))
    for name in GROUPS:
        if groups and name not in groups:
            yield "bad", f"there is no group {name}", "systemd-sysusers, then systemctl restart vllmd.socket"
    for folder in FOLDERS:
        if not users.isdisjoint(("vllmd", "vllmd-engine")) and not host.path(folder).is_dir():
            yield "bad", f"{folder} is missing", "systemd-tmpfiles --create"


def _names(passwd: Path) -> set[str]:
    try:
        return {line.partition(":")[0] for line in passwd.read_text().splitlines()}
    except OSError:
        return set()


def memory(host: Host) -> Iterator[Finding]:
    """Room in /dev/shm and on the disk of the engines' home."""
    for path, least, why in (
        ("/dev/shm", GiB, "engines exchange tensors there"),
        ("/var/lib/vllmd-engine", 20 * GiB, "models are kept there"),
        ("/var/lib/vllmd", GiB // 8, "keys, added models, disabled ones and who used what are kept there"),
    ):
        if not host.path(path).is_dir():
            continue
        free = shutil.disk_usage(host.path(path)).free
        if free < least:
            yield "warning", f"only {free / GiB:.1f}GiB are free in {path}", why


def place(host: Host) -> Iterator[Finding]:
    """What a container, control groups and sysctls leave of the machine, where that is less than an engine wants."""
    here, limit = cpus(host.root), tasks(host.root)
    if here.quota is not None and here.quota < 1:
        what = f"control groups leave engines {here.quota:g} of a CPU"
        yield "warning", what, "systemctl set-property vllmd.slice CPUQuota= lifts vllmd's own limit"
    if limit is not None and limit < FEWEST_TASKS:
        advice = "systemctl set-property vllmd.slice TasksMax=infinity, or the container's --pids-limit=-1"
        yield "warning", f"only {limit} processes and threads may run here; an engine has some hundred", advice
    engines, limits = host.reading.config.engines, port_limits(host.root)
    ports = range(engines.port_start, engines.port_end + 1)
    if not any(port >= limits.least for port in ports):
        what = f"engines' ports {ports.start}-{ports.stop - 1} are below {limits.least}, where only root may listen"
        yield "bad", what, "move them: engines.port_start and port_end"


def configuration(host: Host) -> Iterator[Finding]:
    """Whether the configuration is valid, and the engines' programs and files are there."""
    from vllmd.cli.examine_engines import programs, vllm_on_cpu
    from vllmd.config.as_daemon import problems_of_daemon

    reading = host.reading
    closed = [path for path in reading.config.files if not host.user and not host.readable_by("vllmd", path)]
    for path in closed:
        yield "bad", f"the daemon's user vllmd cannot read {path}", f"chown root:vllmd {path} && chmod 640 {path}"
    problems = reading.problems or ([] if host.user or closed else problems_of_daemon(None, host.env))
    for problem in problems:
        yield "bad", str(problem), "vllmctl config check"
    for warning in reading.config.warnings:
        yield "warning", warning, ""
    if not problems and not closed:
        yield "ok", f"the configuration is valid, with {len(reading.config.models)} models", ""
    if not problems and not reading.config.models:
        yield "warning", "no models are configured", "vllmctl run smollm2 fetches a small one and asks it"
    for name, model in reading.config.models.items():
        yield from model_files(host, name, model.source)
    yield from programs(reading.config, users=host.user)
    yield from vllm_on_cpu(reading.config)


def model_files(host: Host, name: str, source: str) -> Iterator[Finding]:
    """Whether the path from which a model is loaded exists, and can be read by the engines' user."""
    try:
        missing = source.startswith("/") and not host.path(source).exists()
    except PermissionError:
        yield "warning", f"{name}: you may not look at {source}", "sudo vllmctl doctor may"
        return
    if missing:
        yield "bad", f"{name}: there is no {source}", "say where it is with model:"
    elif source.startswith(("/root/", "/home/")) and not host.user:
        advice = "vllmd-engine must be able to read every directory of that path"
        yield "warning", f"{name}: {source} lies in somebody's home", advice


QUESTIONS = (python, systemd, units, accounts, driver, memory, place, configuration)


def examine(host: Host) -> list[Finding]:
    """Every finding, in the order in which things depend on each other."""
    return [finding for question in QUESTIONS for finding in question(host)]
