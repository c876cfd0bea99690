"""A standby: an engine's program with its modules imported ahead of time, which waits for the order to serve a model.

usage: VLLMD_STANDBY_LINK=FD PYTHON standby_main.py SPEC

A program of its own. It runs in the engine's environment, whose Python may be another one than vllmd's, as the
engine's user, in a control group of its own. ``FD`` is one end of a pair of sockets (SOCK_SEQPACKET) that it has
inherited from the launcher, the only one who can talk to it; its end means: exit. ``SPEC`` is JSON:

    program   the Python script to be run in the end, such as /opt/vllm/bin/vllm
    imports   modules to import; one that is not there is left out, for versions differ
    late      names of variables that may differ between now and the start, because nothing reads them at import
    ours      names of variables that it was born with on its own account, and keeps
    set       variables that it adds at the start, unless the order has them
    then      a file of Python that is executed when the imports are done; "": none

Its words are ``ready``, ``taken``, and ``refused: WHY``. One message comes in: JSON with ``argv``, ``env`` (all of
it), ``cwd``, ``cpus`` and ``node`` (as in ``launcher.affinity``), together with one descriptor for stdout and stderr.
Then it becomes the program, as if that had just been started: the same arguments, environment, directory and output. It
serves one model and no second one.

What was read at import cannot be taken back, so an order whose environment differs in anything but ``late`` is
refused, and so is every order after an import that has opened a device.
"""

from __future__ import annotations

import array
import gc
import importlib
import json
import os
import runpy
import socket
import struct
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

LONGEST = 256 << 10  # bytes of the message
AFFINITY = os.path.join(os.path.dirname(__file__), "../launcher/affinity.py")


class Order(NamedTuple):
    """The order: what to become. ``output``: the descriptor for stdout and stderr."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    cpus: list[int]
    node: int
    output: int


class Refused(Exception):
    """The order cannot be carried out here; the message says why, and quotes no value of a variable."""


def main() -> int:
    """Import, wait, become the program."""
    fd, spec = int(os.environ.pop("VLLMD_STANDBY_LINK")), json.loads(sys.argv[1])
    sys.path[0] = os.path.dirname(os.path.realpath(spec["program"]))  # as for a script; ours would shadow its modules
    link = socket.socket(fileno=fd)
    link.set_inheritable(False)
    born = dict(os.environ)
    import_all(spec["imports"])
    if spec.get("then"):
        runpy.run_path(spec["then"])
    made = {name: value for name, value in os.environ.items() if born.get(name) != value}
    if device := device_in_use():
        link.send(b"refused: its imports have opened " + device.encode())
        return 1
    gc.collect()
    gc.freeze()  # what exists now stays: the collector must not write into pages that forks share
    link.send(b"ready")
    try:
        order = received(link)
        check(order.env, born, {*spec["late"], *spec["ours"]})
        become(order, {**{name: born[name] for name in spec["ours"] if name in born}, **made}, spec)
    except Refused as error:
        link.send(f"refused: {error}".encode())
        return 1
    link.send(b"taken")
    link.close()
    runpy.run_path(spec["program"], run_name="__main__")
    return 0


def import_all(names: Iterable[str]) -> None:
    """Import the modules. A failure is logged; the program itself will fail on it in its own words, if it does."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"standby: {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def device_in_use() -> str:
    """The device that an import has opened, so that a fork could not use it, nor we another one; "" if none has.

    The driver's own files tell also of what torch does not know of: opening a device reads which ones are visible.
    """
    for fd in os.listdir("/proc/self/fd"):
        try:
            file = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if file in ("/dev/nvidia-uvm", "/dev/kfd"):
            return file
    torch = sys.modules.get("torch")
    for kind in ("cuda", "xpu"):
        part = getattr(torch, kind, None)
        if part is not None and getattr(part, "is_initialized", bool)():
            return kind
    return ""


def received(link: socket.socket) -> Order:
    """Wait for the order. Raises Refused; exits when the other end is gone."""
    owner = struct.unpack("iII", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    if owner not in (0, os.getuid()):
        raise Refused("the other end is a stranger's")
    fds = array.array("i")
    data, more, flags, _ = link.recvmsg(LONGEST, socket.CMSG_SPACE(4 * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, part in more:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(part[: len(part) - len(part) % fds.itemsize])
    if not data:
        sys.exit(0)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) != 1:
        raise Refused("the message is too long, or not with one descriptor")
    try:
        return read(json.loads(data), fds[0])
    except ValueError:
        raise Refused("the message is not JSON") from None


def read(members: Any, output: int) -> Order:
    """What the message says. Raises Refused."""
    if not isinstance(members, dict) or sorted(members) != ["argv", "cpus", "cwd", "env", "node"]:
        raise Refused("the message is not an object with argv, env, cwd, cpus and node")
    argv, env, cwd, cpus, node = (members[name] for name in ("argv", "env", "cwd", "cpus", "node"))
    if not (isinstance(argv, list) and argv and all(isinstance(word, str) for word in argv)):
        raise Refused("argv is not a list of words")
    if not (isinstance(env, dict) and all(isinstance(value, str) for value in env.values())):
        raise Refused("env is not variables and their values")
    if not isinstance(cwd, str):
        raise Refused("cwd is not a path")
    if not (isinstance(cpus, list) and all(type(number) is int for number in (node, *cpus))):
        raise Refused("cpus and node are not numbers")
    return Order(argv, env, cwd, cpus, node, output)


def check(env: Mapping[str, str], born: Mapping[str, str], free: set[str]) -> None:
    """Raises Refused where an import may have read something else than what the order says."""
    differing = sorted(name for name in {*env, *born} - free if env.get(name) != born.get(name))
    if differing:
        raise Refused("its environment differs in " + ", ".join(differing)[:500])


def become(order: Order, kept: Mapping[str, str], spec: Mapping[str, Any]) -> None:
    """Take on output, directory, environment and arguments. Raises Refused for a directory that is not there.

    ``kept``: variables that the imports have set, or that the process was started with for itself.
    """
    try:
        os.chdir(order.cwd or "/")
    except OSError as error:
        raise Refused(f"cannot change to its directory: {error.strerror}") from None
    settle(order)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(order.output, 1)
    os.dup2(order.output, 2)
    os.close(order.output)
    overridden = {*spec["late"]} & {*order.env}
    os.environ.clear()
    os.environ.update({**spec["set"], **order.env, **{name: kept[name] for name in kept if name not in overridden}})
    sys.argv[:] = [spec["program"], *order.argv[1:]]
    try:
        with open("/proc/self/comm", "w") as comm:  # as a script's process is called
            comm.write(os.path.basename(spec["program"]))
    except OSError:
        pass


def settle(order: Order) -> None:
    """Move to the order's CPUs, with all threads that imports have begun; take memory of the node from now on."""
    if order.cpus:
        for thread in os.listdir("/proc/self/task"):
            try:
                os.sched_setaffinity(int(thread), order.cpus)
            except OSError:  # a CPU is offline: the thread stays where it is
                break
    runpy.run_path(AFFINITY)["set_affinity"](order.cpus, order.node)


if __name__ == "__main__":
    sys.exit(main())
