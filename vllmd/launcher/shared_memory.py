"""Shared memory that an engine leaves in /dev/shm, and that nobody would ever give back.

Of Python's programs a helper process, the resource tracker, removes it, and may be killed with the engine. A vLLM on a
CPU has two files of 400 MB in all, of which it takes what its messages have filled. The kernel frees a file there when
it has no name any more, so it is enough to remove it.

Which of the files were an engine's is written nowhere, and other engines may have the same user. So a file is removed
if its name is one that is given to memory which ends with its processes, and no process of the user has it open or
mapped. Whoever makes such a file keeps it open until it is mapped.

In a container that has the host's IPC namespace (``--ipc=host``) the folder is the host's, and other containers', whose
processes are not to be seen: there nothing is removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

FIRST_PID_NAMESPACE, FIRST_IPC_NAMESPACE = "pid:[4026531836]", "ipc:[4026531839]"  # the host's, in every kernel
NAMES = ("psm_", "sem.mp-", "vllm_offload_", "nccl-")  # Python's multiprocessing, vLLM, NCCL


def remove_unused(folder: str = "/dev/shm", proc: str = "/proc") -> None:
    """Remove the files of the calling user that none of its processes uses. ``proc``: where proc(5) is.

    Raises OSError, and has removed nothing, where it is not known what a process uses.
    """
    pids, ipc = (os.readlink(f"{proc}/self/ns/{kind}") for kind in ("pid", "ipc"))
    if pids != FIRST_PID_NAMESPACE and ipc == FIRST_IPC_NAMESPACE:
        return
    uid, unused = os.getuid(), dict[int, str]()  # path by inode
    with os.scandir(folder) as entries:
        for each in entries:
            with contextlib.suppress(FileNotFoundError):
                if each.name.startswith(NAMES) and each.stat(follow_symlinks=False).st_uid == uid:
                    unused[each.inode()] = each.path
    seen: set[str] = set()
    for _ in range(2):  # a process that appears meanwhile may have been given a file by one that was looked at before
        new = {pid for pid in os.listdir(proc) if pid.isdecimal()} - seen
        seen |= new
        for pid in new if unused else ():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                if _is_of(f"{proc}/{pid}", uid):
                    for inode in _used(f"{proc}/{pid}", folder):
                        unused.pop(inode, None)
    for path in unused.values():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _is_of(process: str, uid: int) -> bool:
    """Whether any of a process's user ids is ``uid``. The owner of its folder does not tell: it may be root."""
    with open(f"{process}/status", "rb") as file:
        return str(uid).encode() in next(line for line in file if line.startswith(b"Uid:")).split()


def _used(process: str, folder: str) -> Iterator[int]:
    """The inodes that a process has mapped, or open in ``folder``.

    Names would not do: a semaphore is mapped under the name that it has before it is complete. What is open comes
    first: what it maps, and closes, between the two looks is found by the second.
    """
    for number in os.listdir(f"{process}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"{process}/fd/{number}").startswith(f"{folder}/"):
                yield os.stat(f"{process}/fd/{number}").st_ino
    with open(f"{process}/maps", "rb") as file:
        for line in file:
            yield int(line.split(maxsplit=5)[4])
