"""The process in which ``ModelManager`` has vLLM's offline engine. Run as a script; imports nothing of ours.

Messages are pickles with their length before them, over one socket: in comes
``(method, arguments, more)``, out goes ``(RETURNED, result)`` or ``(RAISED, (error, traceback))``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

RETURNED, RAISED = "returned", "raised"
LENGTH = struct.Struct("!Q")
PR_SET_CHILD_SUBREAPER = 36


class Channel:
    """Objects over a socket, whole."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")

    def send(self, value: Any) -> None:
        """Raises what pickle raises before anything is sent."""
        data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        self._sock.sendall(LENGTH.pack(len(data)))
        self._sock.sendall(data)

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


def descendants(pid: int) -> list[int]:
    """All processes below ``pid`` now."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found, new = [], [pid]
    while new:
        new = [child for each in new for child in children.get(each, ())]
        found += new
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat") as file:
                    yield int(name), int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it went while we looked


def main() -> None:
    """Answer until the other side is gone."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # grandchildren whose parent dies stay ours to kill
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    threading.Thread(target=_follow, args=(int(sys.argv[2]),), daemon=True).start()
    sys.path[:] = dict.fromkeys([*channel.receive(), *sys.path])
    engine: Any = None
    while True:
        try:
            method, arguments, more = channel.receive()
        except EOFError:
            break
        except Exception as error:  # what cannot be unpickled here is the caller's to know
            _answer(channel, RAISED, _told(error))
            continue
        try:
            if method == "load":
                engine, result = _load(more), None
            else:
                result = getattr(engine, method)(*arguments, **more)
        except Exception as error:
            _answer(channel, RAISED, _told(error))
        else:
            _answer(channel, RETURNED, result)
    del engine  # vLLM's own good order first
    _kill(descendants(os.getpid()))


def _load(arguments: dict[str, Any]) -> Any:
    from vllm import LLM  # type: ignore[import-not-found]

    return LLM(**arguments)


def _answer(channel: Channel, outcome: str, value: Any) -> None:
    try:
        channel.send((outcome, value))
    except OSError:
        pass
    except Exception as error:  # a result that cannot be pickled
        channel.send((RAISED, (None, f"the result cannot be handed over: {error}")))


def _told(error: Exception) -> tuple[Exception | None, str]:
    """The exception, if the other side can have it, and its traceback."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return None, trace
    return error, trace


def _follow(parent: int) -> None:
    """End with the program that started us, with all our descendants, even in the middle of a call."""
    try:
        pidfd = os.pidfd_open(parent)
        if os.getppid() == parent:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
    except ProcessLookupError:
        pass
    _kill([*descendants(os.getpid()), os.getpid()])


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
