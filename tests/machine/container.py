"""A booted Debian for tests: systemd as PID 1, a network of its own, its files on an overlay.

It takes about two seconds. Whatever happens to the test process, the container
dies with it (SIGKILL at the parent's death), its mounts go with their mount
namespace, and the next run removes the files and the control group left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.machine import cgroups

REPOSITORY = Path(__file__).resolve().parents[2]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BOOT_LIMIT = 120.0
STOP_LIMIT = 30.0
# What real vLLM and its model are called inside; not under /root, which hardened services cannot see.
VLLM_INSIDE = "/opt/vllm"
MODEL_INSIDE = "/opt/tiny-model"

Command = str | Sequence[str]
_numbers = itertools.count()


class CannotBoot(Exception):
    """This computer cannot run a container; the message says why."""


class TimedOut(AssertionError):
    """What a test waited for did not happen within its limit."""


def cache() -> Path:
    """The folder of the development caches, outside the repository."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllmd-dev"
    return Path(os.environ.get("VLLMD_DEV_CACHE") or default)


def check_host() -> None:
    """Raise CannotBoot with the first thing that is missing here."""
    if os.geteuid() != 0:
        raise CannotBoot("booting a container needs root")
    for program in ("systemd-nspawn", "nsenter", "unshare", "setpriv"):
        if shutil.which(program) is None:
            raise CannotBoot(f"{program} is not installed (packaging/dev/setup host)")
    if cgroups.hierarchy() is None:
        raise CannotBoot("no cgroup v2 hierarchy is mounted")


def base_layers(suite: str, build: bool) -> str:
    """The folders with a minimal Debian, and what building packages needs; made when missing or outdated."""
    argv = [REPOSITORY / "packaging/dev/setup", "build" if build else "tree"]
    made = subprocess.run(argv, env={**os.environ, "VLLMD_SUITE": suite}, stderr=subprocess.PIPE, text=True)
    if made.returncode:
        raise CannotBoot(made.stderr.strip())
    layers = [f"{cache()}/build-{suite}"] if build else []
    return ":".join([*layers, f"{cache()}/tree-{suite}"])


class Machine:
    """One container. Use `booted()` to get one that is certainly taken down again."""

    def __init__(
        self,
        suite: str = "bookworm",
        binds: Mapping[Path, str] | None = None,
        *,
        build: bool = False,
        lower: str = "",
        network: bool = False,
    ) -> None:
        """``build``: with compilers. ``lower``: of these files instead. ``network``: this computer's, not its own."""
        check_host()
        remove_leftovers()
        self.name = f"vllmd-{os.getpid()}-{next(_numbers)}"
        self.lower = lower or base_layers(suite, build)
        self.network = network
        self.binds = dict(binds or {})
        self.folder = machines_folder() / self.name
        with _nobody_removes_leftovers():
            for part in ("upper", "work", "root"):
                (self.folder / part).mkdir(parents=True)
            self._lock = (self.folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.cgroup = cgroups.create(self.name)
        self._started: list[subprocess.Popen[str]] = []

    # --- its life ---

    def boot(self) -> None:
        """Start it and wait until systemd has finished starting (state running or degraded)."""
        parts = (self.cgroup, self.lower, self.folder)
        self._nspawn = subprocess.Popen(
            [*_DIES_WITH_US, "sh", "-euc", _MOUNT_AND_EXEC, "boot", *map(str, parts), *self._argv()],
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "console.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
        )
        self.leader = self._await("the container to have a PID 1", self._find_leader)
        self._await("systemd to listen", lambda: self.run("test -S /run/systemd/private", check=False).returncode == 0)
        self.run("systemctl is-system-running --wait", check=False, timeout=BOOT_LIMIT)

    def _argv(self) -> list[str]:
        return [
            *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--settings=no"),
            *(() if self.network else ("--private-network",)),
            *("--boot", "--kill-signal=SIGRTMIN+4", "--console=read-only", "--link-journal=no"),
            *("--resolv-conf=off", "--timezone=off", f"--machine={self.name}", f"--directory={self.folder}/root"),
            *(f"--bind-ro={outside}:{inside}" for outside, inside in self.binds.items()),
        ]

    def _await(self, what: str, condition: Callable[[], int | bool | None]) -> int:
        """Wait for a step of booting; its console tells why it did not come."""
        end = time.monotonic() + BOOT_LIMIT
        while not (found := condition()):
            if self._nspawn.poll() is not None or time.monotonic() > end:
                raise CannotBoot(f"waited in vain for {what}:\n{(self.folder / 'console.log').read_text()[-2000:]}")
            time.sleep(0.02)
        return int(found)

    def _find_leader(self) -> int | None:
        """The grandchild of unshare, child of systemd-nspawn, that is a PID 1 and has become systemd."""
        for nspawn in _children(self._nspawn.pid):
            for child in _children(nspawn):
                status = _status(child)
                if status.get("Name") == "systemd" and status["NSpid"].split()[-1] == "1":
                    return child
        return None

    def stop(self) -> None:
        """Power it off, by force if need be; its files stay, so that it can boot again."""
        self._kill_commands()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.leader, signal.SIGRTMIN + 4)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._nspawn.wait(STOP_LIMIT)
        cgroups.kill(self.cgroup)
        self._nspawn.wait()

    def _kill_commands(self) -> None:
        """End what tests started, so that nobody outside has a child inside: the kernel would wait for it.

        Only the inner processes are killed, each nsenter then reaps its own and ends. (At shutdown systemd
        stops every process for a moment, which nsenter repeats to itself, for good.)
        """
        group = self.cgroup / "payload/test.run"
        end = time.monotonic() + STOP_LIMIT
        while group.exists() and cgroups.populated(group) and time.monotonic() < end:
            for pid in cgroups.pids(group):
                if len(_status(pid).get("NSpid", "").split()) > 1:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        for process in self._started:
            process.wait()
        self._started.clear()

    def reboot(self) -> None:
        """Off and on again, with the same files."""
        self.stop()
        self.boot()

    def remove(self) -> None:
        """Kill whatever is left of it and remove its files and its control group."""
        cgroups.kill(self.cgroup)
        if hasattr(self, "_nspawn"):
            self._nspawn.wait()
        cgroups.remove(self.cgroup)
        shutil.rmtree(self.folder)  # while the lock is held: others clean up whatever is free
        self._lock.close()

    # --- commands in it ---

    def _enter(self, command: Command, user: str, env: Mapping[str, str]) -> list[str]:
        """The argv that runs `command` inside, in a control group of its own beside the services."""
        argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
        setting = {"HOME": "/root", "PATH": PATH, "LC_ALL": "C.UTF-8", **self._session(user), **env}
        return [
            *("sh", "-euc", _JOIN_AND_EXEC, "enter", str(self.cgroup / "payload")),
            *("nsenter", f"--target={self.leader}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"),
            *("--root", "--wd", "env", "-i", *(f"{key}={value}" for key, value in setting.items())),
            *(["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user != "root" else []),
            *argv,
        ]

    def _session(self, user: str) -> dict[str, str]:
        """What a login session of `user` would have in its environment."""
        if user == "root":
            return {}
        runtime = f"/run/user/{self.uid(user)}"
        bus = {"XDG_RUNTIME_DIR": runtime, "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus"}
        return {"HOME": self.read("/etc/passwd").split(f"\n{user}:")[1].split(":")[4], "USER": user, **bus}

    def run(
        self,
        command: Command,
        *,
        check: bool = True,
        timeout: float = 60.0,
        user: str = "root",
        input: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell line or an argv to its end, output captured; a failure shows that output.

        Raises AssertionError when `check` and the status is not 0, TimedOut after `timeout` seconds.
        """
        process = self.popen(command, user=user, env=env, stdin=subprocess.PIPE)
        try:
            out, err = process.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            try:
                out, err = process.communicate(timeout=5)
            except subprocess.TimeoutExpired:  # what it left in the background holds the pipes
                out, err = "", "(its output is held open by a process that it left)"
            raise TimedOut(f"{command!r} still ran after {timeout} s:\n{out}{err}") from None
        if check and process.returncode:
            raise AssertionError(f"{command!r} exited {process.returncode}:\n{out}{err}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def out(self, command: Command, **options: object) -> str:
        """The output of a command that succeeds, without white space around it."""
        return self.run(command, **options).stdout.strip()  # type: ignore[arg-type]

    def popen(
        self,
        command: Command,
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[str]:
        """Start a command, output on pipes. Killed at the latest when the machine stops."""
        process = subprocess.Popen(
            self._enter(command, user, env or {}),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._started = [*(each for each in self._started if each.poll() is None), process]
        return process

    def python(self, code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run Python code with Debian's interpreter."""
        return self.run(["/usr/bin/python3", "-c", code, *arguments], **options)  # type: ignore[arg-type]

    # --- files, units, waiting ---

    def write(self, path: str, text: str, *, mode: str = "644", owner: str = "root") -> None:
        """Write a file, and the folders to it."""
        self.run(["install", "-D", "-m", mode, "-o", owner, "/dev/stdin", path], input=text)

    def read(self, path: str) -> str:
        return self.run(["cat", path]).stdout

    def copy_in(self, source: Path, path: str) -> None:
        """Copy a file of the host to `path` inside."""
        inside = f"/proc/{self.leader}/root/run/copy-in"
        shutil.copyfile(source, inside)
        self.run(f"install -D -m 644 /run/copy-in {shlex.quote(path)}; rm /run/copy-in")

    def uid(self, user: str) -> int:
        return int(self.run(["id", "-u", user]).stdout)

    def add_user(self, name: str, *, groups: str = "") -> int:
        """Make a person with a running user manager (lingering). Returns the uid."""
        self.run(["useradd", "--create-home", "--shell=/bin/bash", f"--groups={groups}", name])
        self.run(["loginctl", "enable-linger", name])
        self.wait_until(f"systemctl is-active user@{self.uid(name)}.service")
        self.wait_until("systemctl --user is-system-running | grep -E 'running|degraded'", user=name)
        return self.uid(name)

    def wait_until(self, condition: str | Callable[[], object], timeout: float = 60.0, *, user: str = "root") -> None:
        """Wait until a shell line succeeds, or a function returns something true."""
        end = time.monotonic() + timeout
        said: object = None
        while True:
            if isinstance(condition, str):
                said = done = self.run(condition, check=False, user=user, timeout=timeout)
                if done.returncode == 0:
                    return
            elif said := condition():
                return
            if time.monotonic() > end:
                raise TimedOut(f"not within {timeout} s: {condition}; last: {said}\n{self.journal()[-3000:]}")
            time.sleep(0.05)

    def journal(self, unit: str = "", *arguments: str) -> str:
        """What was logged so far, by one unit or by all."""
        selection = [f"--unit={unit}"] if unit else []
        self.run("journalctl --sync", check=False)
        command = ["journalctl", "--no-pager", "--quiet", "--output=short-monotonic", *selection, *arguments]
        return self.run(command, check=False).stdout

    def show(self, unit: str, property: str) -> str:
        """One property of a unit, as `systemctl show` prints it."""
        return self.run(["systemctl", "show", "--value", f"--property={property}", unit]).stdout.strip()

    def cgroup_pids(self, unit: str) -> list[int]:
        """The processes in a unit's control group and below it, by their numbers inside the machine."""
        group = self.show(unit, "ControlGroup")
        if not group:
            return []
        found = self.run(f"find /sys/fs/cgroup{group} -name cgroup.procs -exec cat {{}} +", check=False)
        return [int(pid) for pid in found.stdout.split()]


# A PID namespace around systemd-nspawn: when we die, or its first process, the kernel kills all in it.
_DIES_WITH_US = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"),
)

# $1 control group, $2 base layers, $3 the machine's folder, then the argv.
_MOUNT_AND_EXEC = """
echo 0 >"$1/cgroup.procs"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$3/upper,workdir=$3/work" "$3/root"
shift 3; exec "$@" """

# $1 the container's root control group, then the argv.
_JOIN_AND_EXEC = """
mkdir -p "$1/test.run"; echo 0 >"$1/test.run/cgroup.procs"
shift; exec "$@" """


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status; none when it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {}


def machines_folder() -> Path:
    return cache() / "machines"


@contextlib.contextmanager
def _nobody_removes_leftovers() -> Iterator[None]:
    """Other test processes wait here: a new folder is not taken for a leftover, and no leftover is removed twice."""
    machines_folder().mkdir(parents=True, exist_ok=True)
    with (machines_folder() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_leftovers() -> None:
    """Clean up after test processes that died: their lock files are free."""
    with _nobody_removes_leftovers():
        for folder in machines_folder().glob("vllmd-*"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), (folder / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_leftover(folder)


def _remove_leftover(folder: Path) -> None:
    group = cgroups.path_of(folder.name)
    if group.exists():
        cgroups.kill(group)
        cgroups.remove(group)
    shutil.rmtree(folder)


@contextlib.contextmanager
def booted(
    suite: str = "bookworm", binds: Mapping[Path, str] | None = None, *, build: bool = False
) -> Iterator[Machine]:
    """A fresh machine, booted; gone without trace at the end. ``build``: with compilers, rpm and the like."""
    machine = Machine(suite, binds, build=build)
    try:
        machine.boot()
        yield machine
        machine.stop()
    finally:
        machine.remove()


def install(machine: Machine, package: Path) -> None:
    """Install a .deb whose dependencies the base tree has."""
    machine.copy_in(package, "/root/vllmd.deb")
    machine.run("DEBIAN_FRONTEND=noninteractive dpkg --install /root/vllmd.deb", timeout=120)


def vllm_binds() -> dict[Path, str]:
    """Real vLLM and the tiny model, where this computer has them."""
    wanted = {cache() / "vllm": VLLM_INSIDE, cache() / "tiny-model": MODEL_INSIDE}
    return {outside: inside for outside, inside in wanted.items() if (outside / ".vllmd-stamp").exists()}


def later_version(machine: Machine) -> str:
    """Make of /root/vllmd.deb, which is there, the same under a later version, as the next release would be; its path.

    The daemon of it tells 99.0.
    """
    machine.run(
        "dpkg-deb --raw-extract /root/vllmd.deb /root/newer && "
        "sed -i 's/^Version: .*/Version: 99.0/' /root/newer/DEBIAN/control && "
        "sed -i '/vllmd.__init__.py/d' /root/newer/DEBIAN/md5sums && cd /root/newer/usr/lib/python3/dist-packages && "
        "sed -i 's/^__version__ = .*/__version__ = \"99.0\"/' vllmd/__init__.py && "
        "dpkg-deb --build --root-owner-group /root/newer /root/newer.deb"
    )
    return "/root/newer.deb"
