"""The processes in which ``ModelManager`` has vLLM's offline engine. Run as a script; imports nothing of ours.

The first one keeps the second, which has the engine: whichever way that or the program ends, in the middle of a
call, too, the keeper kills what is left of the engine, and ends as the engine did.

Messages are pickles with their length before them, over one socket: in comes
``(method, arguments, more)``, out goes ``(RETURNED, result)`` or ``(RAISED, (error, traceback))``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from typing import Any

RETURNED, RAISED = "returned", "raised"
LENGTH = struct.Struct("!Q")
PR_SET_CHILD_SUBREAPER = 36


class Channel:
    """Sends and receives whole objects over a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")

    def send(self, value: Any) -> None:
        """Raises what ``packed`` raises before anything is sent."""
        self.write(packed(value))

    def write(self, message: bytes) -> None:
        """Send what ``packed`` has made."""
        self._sock.sendall(LENGTH.pack(len(message)))
        self._sock.sendall(message)

    def receive(self) -> Any:
        """Raises EOFError when the other side has closed or ended."""
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        data = self._read(length)
        try:
            return pickle.loads(data)
        except (AttributeError, ImportError) as error:
            raise pickle.UnpicklingError(str(error)) from error

    def close(self) -> None:
        """The other side sees the end, whoever else holds the socket."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._sock.close()

    def _read(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) < length:
            raise EOFError
        return data


def packed(value: Any) -> bytes:
    """An object as a message. Raises what pickle raises."""
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def descendants(pid: int) -> list[int]:
    """All processes below ``pid`` now."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:  # it may end meanwhile
                parent = int(file.read().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, new = [], [pid]
    while new:
        new = [child for each in new for child in children.get(each, ())]
        found += new
    return found


def main() -> None:
    """Become the keeper, and have a child with the engine, which answers until the program is gone."""
    sock, program, keeper = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), os.getpid()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # descendants whose parent dies stay ours to kill
    if engine := os.fork():
        sock.close()
        keep(engine, program)
        return

    def end_with_keeper() -> None:  # should even the keeper be killed
        _await_end(keeper)
        _kill([*descendants(os.getpid()), os.getpid()])

    threading.Thread(target=end_with_keeper, daemon=True).start()
    answer_calls(Channel(sock))
    _kill(descendants(os.getpid()))  # processes that vLLM's own shutdown has left


def keep(engine: int, program: int) -> None:
    """Wait for the end of either, or for SIGTERM; then kill all that the engine has started, and end as it did."""
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(engine, signal.SIGKILL))
    _await_end(program, engine)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    status = 0
    while victims := descendants(os.getpid()):
        _kill(victims)
        ended, how = os.waitpid(-1, 0)
        status = how if ended == engine else status
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    # By the same signal, which is what the program then reads.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the engine's own dump is the one that tells something
    with contextlib.suppress(OSError):  # SIGKILL is always at its default
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))


def _await_end(parent: int, *children: int) -> None:
    """Return when the parent or one of these children has ended."""
    poll = select.poll()
    try:
        for pid in (parent, *children):
            poll.register(os.pidfd_open(pid), select.POLLIN)
    except ProcessLookupError:
        return
    if os.getppid() == parent:  # else it went before we could look
        poll.poll()


def answer_calls(channel: Channel) -> None:
    """Answer calls until the program closes the channel; then the engine is dropped, and shuts down by itself."""
    sys.path[:] = dict.fromkeys([*channel.receive(), *sys.path])
    engine: Any = None
    while True:
        try:
            method, arguments, more = channel.receive()
        except EOFError:
            return
        except Exception as error:  # arguments that cannot be unpickled here
            _answer(channel, RAISED, _as_sent(error))
            continue
        try:
            if method == "load":
                from vllm import LLM  # type: ignore[import-not-found]

                engine, result = LLM(**more), None
            else:
                result = getattr(engine, method)(*arguments, **more)
        except Exception as error:
            _answer(channel, RAISED, _as_sent(error))
        else:
            _answer(channel, RETURNED, result)


def _answer(channel: Channel, outcome: str, value: Any) -> None:
    try:
        channel.send((outcome, value))
    except OSError:
        pass
    except Exception as error:  # a result that cannot be pickled
        channel.send((RAISED, (None, f"the result cannot be handed over: {error}")))


def _as_sent(error: Exception) -> tuple[Exception | None, str]:
    """The exception, or None if it cannot be pickled, and its traceback."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return None, trace
    return error, trace


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
