"""A main process: a pidfd for its life, its start time for its identity, its status when it has ended."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import struct

from vllmd.frozen import frozen

_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_INFO_SIZE = 64  # struct pidfd_info up to and with exit_code
_PIDFD_GET_INFO = (3 << 30) | (_PIDFD_INFO_SIZE << 16) | (0xFF << 8) | 11  # _IOWR(PIDFS_IOCTL_MAGIC, 11, size)
_EXIT_CODE_OFFSET = 8 + 8 + 11 * 4  # after mask, cgroupid and eleven ids
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# What the kernel says where a process, or a control group, is not there any more. Any other error says nothing of that.
GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV})


@frozen
class Ending:
    """How a process ended; both None if that cannot be known."""

    status: int | None = None
    signal: int | None = None


class Process:
    """A process, signalled only through its pidfd, so that no other process of the same number gets a signal."""

    def __init__(self, pid: int, start_time: int | None = None) -> None:
        """Raises ProcessLookupError if the process is gone, or has another ``start_time`` (clock ticks).

        Raises another OSError where that cannot be known: there may be no file descriptor for it.
        """
        self.pid = pid
        self.fd = os.pidfd_open(pid)
        try:
            self.start_time = start_time_of(pid) or 0
        except OSError:  # for want of a file descriptor, say
            os.close(self.fd)
            raise
        if start_time is not None and self.start_time != start_time:
            os.close(self.fd)
            raise ProcessLookupError(f"process {pid} is not the one that was started")

    def signal(self, number: int) -> None:
        """Send it a signal; harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, number)

    def ending(self) -> Ending | None:
        """Reap the process, or ask the kernel if it is no child; None while it runs, or if its status is not known."""
        try:
            result = os.waitid(os.P_PIDFD, self.fd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return self._ending_of_other()
        if result is None:
            return None
        return Ending(result.si_status) if result.si_code == os.CLD_EXITED else Ending(signal=result.si_status)

    def _ending_of_other(self) -> Ending | None:
        """The status by PIDFD_GET_INFO (since Linux 6.15), once the parent has reaped the process."""
        buffer = bytearray(_PIDFD_INFO_SIZE)
        struct.pack_into("<Q", buffer, 0, _PIDFD_INFO_EXIT)
        try:
            fcntl.ioctl(self.fd, _PIDFD_GET_INFO, buffer, True)
        except OSError:
            return None
        if not struct.unpack_from("<Q", buffer)[0] & _PIDFD_INFO_EXIT:
            return None
        code = os.waitstatus_to_exitcode(struct.unpack_from("<i", buffer, _EXIT_CODE_OFFSET)[0])
        return Ending(code) if code >= 0 else Ending(signal=-code)

    def close(self) -> None:
        """Close the pidfd; the process can no longer be signalled."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def start_time_of(pid: int) -> int | None:
    """The start of a process in clock ticks after boot; None if there is no such process."""
    fields = stat_of(pid)
    return int(fields[19]) if fields else None


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state, ppid, pgrp, session, ...) on; empty if it is gone.

    Raises OSError where that cannot be known.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def memory_of(pid: int) -> int:
    """The resident memory of a process in bytes, shared memory included; 0 if it is gone or cannot be looked at now."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def prctl(option: int, argument: int) -> None:
    """Call prctl(2) with one argument. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
