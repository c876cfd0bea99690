"""``ModelManager``: vLLM's offline engine in a process of its own, so that its end frees all memory of the GPU.

Three processes take part: the program, the keeper and the engine (``offline_child``). Calls go to the engine over one
socket, one at a time. An engine that ends takes its last log lines into the error; a call that is interrupted (Ctrl-C)
makes the engine unusable, since the next call would read the answer of this one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vllmd.client.engine_args import VLLMEngineArgs, changed_fields
from vllmd.client.offline_child import RAISED, Channel, packed
from vllmd.errors import Conflict, EngineFailed

END_LIMIT = 10.0  # seconds for the engine to end in order; then all of it is killed
GONE_LIMIT = 30.0  # seconds for killed processes to be gone
LAST_LINES = 15
INSTALL = "; install it with: pip install vllm, or name the Python that has it: ModelManager(..., python=...)"


class ModelManager:
    """Loads a model into a process of its own with ``vllm.LLM``; what its methods return are vLLM's own objects.

    ``engine_args`` are VLLMEngineArgs, vLLM's EngineArgs or a mapping. ``python`` is the interpreter that has vLLM,
    this one by default. ``verbose`` lets the engine's log through; otherwise its end is in the error of a failure.
    """

    def __init__(self, engine_args: Any, verbose: bool = False, *, python: str = sys.executable) -> None:
        self._arguments = _arguments(engine_args)
        self.verbose = verbose
        self._python = python
        self._child: _Child | None = None
        self._timer: threading.Timer | None = None
        self._deadline: float | None = None
        self._lock = threading.RLock()  # who loads or stops
        self._calling = threading.Lock()  # one call at a time: the engine's process has one thread for them
        self.llm = RemoteLLM(self._call)

    def load_model(self) -> None:
        """Load the model, unless it is loaded. Raises EngineFailed with the end of the engine's log."""
        with self._lock:
            if self.loaded:
                return
            self._stop_child()
            self._child = _Child(self._python, self.verbose)
            atexit.register(self.stop)
            self._say("loading")
            began = time.monotonic()
            try:
                self._child.ask("load", (), self._arguments)
            except BaseException:
                self._stop_child()
                raise
            self._say(f"loaded after {time.monotonic() - began:.1f} s in process {self._child.pid}")

    @property
    def loaded(self) -> bool:
        """Whether the engine's process runs."""
        return self._child is not None and self._child.running

    @property
    def pid(self) -> int | None:
        """The process that all of the engine's are below, if it runs."""
        return self._child.pid if self._child else None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, a copy in this process."""
        return self.llm.get_tokenizer()

    @property
    def remaining_time(self) -> float | None:
        """Seconds left of a countdown; None if there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def reset_shutdown_timer(self, seconds: float) -> None:
        """Release the model ``seconds`` from now, after a call that runs then; replaces an earlier countdown."""

        def release() -> None:
            with self._calling, self._lock:
                if self._timer is threading.current_thread():  # else it was replaced while this one waited
                    self._say("its time is up")
                    self.stop()

        with self._lock:
            if not self.loaded:
                raise Conflict(f"{self._name} is not loaded")
            self._end_countdown()
            self._timer = threading.Timer(seconds, release)
            self._timer.daemon = True
            self._deadline = time.monotonic() + seconds
            self._timer.start()

    def stop(self) -> None:
        """Release the model now; all of its processes have ended on return. Harmless if it is not loaded."""
        with self._lock:
            self._end_countdown()
            self._stop_child()

    def __enter__(self) -> ModelManager:
        self.load_model()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- within --------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return str(self._arguments["model"])

    def _call(self, method: str, arguments: tuple[Any, ...], more: dict[str, Any]) -> Any:
        with self._calling:
            child = self._child
            if child is None:
                raise Conflict(f"{self._name} is not loaded: call load_model() first")
            return child.ask(method, arguments, more)

    def _end_countdown(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer, self._deadline = None, None

    def _stop_child(self) -> None:
        child, self._child = self._child, None
        if child:
            child.end()
            atexit.unregister(self.stop)
            self._say("released")

    def _say(self, what: str) -> None:
        if self.verbose:
            print(f"{self._name}: {what}", flush=True)


class RemoteLLM:
    """Stands for the ``vllm.LLM`` in the other process: every method of it, by its name."""

    def __init__(self, call: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self._call = call

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)

        def remote(*arguments: Any, **more: Any) -> Any:
            return self._call(method, arguments, more)

        return remote

    def generate(self, *arguments: Any, **more: Any) -> Any:
        """``LLM.generate``: a list of RequestOutput."""
        return self._call("generate", arguments, more)

    def chat(self, *arguments: Any, **more: Any) -> Any:
        """``LLM.chat``: a list of RequestOutput."""
        return self._call("chat", arguments, more)


class _Child:
    """The engine's process and the way to it."""

    def __init__(self, python: str, verbose: bool) -> None:
        ours, theirs = socket.socketpair()
        self._log: IO[bytes] | None = None if verbose else tempfile.TemporaryFile()  # noqa: SIM115 (ends with us)
        script = str(Path(__file__).with_name("offline_child.py"))
        self._owner = os.getpid()
        self._lost = ""  # why it cannot be asked any more
        with theirs:
            self._process = subprocess.Popen(
                [python, "-P", script, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log and subprocess.STDOUT,
                start_new_session=True,
            )
        self._channel = Channel(ours)
        with contextlib.suppress(OSError):  # a child that ended at once is noticed when it is asked
            self._channel.send([path for path in sys.path if path])

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it can be asked."""
        return not self._lost and self._process.poll() is None

    def ask(self, method: str, arguments: tuple[Any, ...], more: dict[str, Any]) -> Any:
        """Call a method of the engine: its result, or what it raised. Raises EngineFailed if the process has ended."""
        message = packed((method, arguments, more))  # raises before anything is sent
        if self._lost:
            raise EngineFailed(self._lost)
        try:
            self._channel.write(message)
            outcome, value = self._channel.receive()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_LIMIT)
            status = self._process.poll()
            ended = "closed its connection" if status is None else f"exited with status {status}"
            if status is not None and status < 0:
                ended = f"was killed by {signal.Signals(-status).name}"
            self._lost = f"the engine's process {ended}{self._last_lines()}"
            raise EngineFailed(self._lost) from None
        except pickle.UnpicklingError as error:
            raise EngineFailed(f"what {method} returned cannot be read here: {error}") from error
        except BaseException:  # as Ctrl-C: the next call would read the answer of this one
            self._lost = "an earlier call of it was interrupted: load_model() loads it anew"
            self._channel.close()
            raise
        if outcome == RAISED:
            raise remote_error(value, method, self._last_lines() if method == "load" else "")
        return value

    def end(self) -> None:
        """End the engine: in order, unless a call was interrupted, then by force. The keeper ends last."""
        if os.getpid() != self._owner:
            return
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._lost else END_LIMIT)
        self._process.terminate()  # if it has not ended
        with contextlib.suppress(subprocess.TimeoutExpired):  # one of its processes cannot even be killed
            self._process.wait(GONE_LIMIT)
        if self._log:
            self._log.close()

    def _last_lines(self) -> str:
        if not self._log:
            return ""
        try:
            self._log.seek(0)
            lines = self._log.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:]
        except ValueError:  # closed: stop() was called while a call was waiting
            return ""
        return "; its last lines:\n" + "\n".join(lines) if lines else ""


def remote_error(value: tuple[BaseException | None, str], method: str, lines: str) -> BaseException:
    """The exception that a method raised in the engine, with its traceback as a note; of a load an EngineFailed."""
    error, trace = value
    if error is None or method == "load":
        absent = isinstance(error, ModuleNotFoundError) and error.name == "vllm"
        what = f"{trace.strip().splitlines()[-1]}{INSTALL if absent else lines}"
        failed = EngineFailed(f"{method} failed: {what}")
        failed.__cause__ = error
        return failed
    error.add_note(f"in the engine's process:\n{trace}")
    return error


def _arguments(given: Any) -> dict[str, Any]:
    """The keyword arguments of ``vllm.LLM``."""
    if isinstance(given, VLLMEngineArgs):
        if given.extra_args:
            raise TypeError("extra_args are words of a command line; vllm.LLM takes arguments by name only")
        return {"model": given.source, **{k: v for k, v in given.arguments.items() if k not in _OF_THE_SERVER}}
    arguments = changed_fields(given) if hasattr(given, "__dataclass_fields__") else dict(given)
    if not arguments.get("model"):
        raise TypeError("model must be a path or a repository id such as Qwen/Qwen3-0.6B")
    return arguments


_OF_THE_SERVER = frozenset({"port", "served_model_name", "enable_auto_tool_choice", "tool_call_parser"})
