"""``ServerManager``: a served model for as long as a program needs it, shared with other programs.

Programs share a model by leases: each holds one (``Holding``), and the model stops when the last one has ended. A lease
is renewed by a thread, so a program that crashes keeps its model for a minute at most. Where no vllmd runs, one is
started as a child process that all managers of the program share (``PrivateDaemons``).
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vllmd.api.answers import NO_ENGINE, ModelLine
from vllmd.client import locate
from vllmd.client.address import Address
from vllmd.client.engine_args import VLLMEngineArgs
from vllmd.client.errors import TimedOut, Unreachable
from vllmd.client.figures import names
from vllmd.client.holding import Holding
from vllmd.client.port_forwarder import PortForwarder
from vllmd.client.private import PRIVATE_DAEMONS, PrivateDaemon
from vllmd.client.sync import Client
from vllmd.errors import Conflict, EngineFailed, Unavailable, VllmdError

if TYPE_CHECKING:
    import openai

log = logging.getLogger("vllmd.client")

MODES = ("delay", "never", "directly")
LOOK = 0.1  # seconds between two looks at a model that starts or stops
STOP_LIMIT = 60.0  # seconds for a model to be gone
ANSWER = 30.0  # seconds for the daemon to answer what it need not wait for
DELAY = 60.0  # seconds


class ServerManager:
    """Keeps a model served by the machine's vllmd, or by a private one where none runs.

    With ``auto_terminate`` "delay" the model goes ``resource_timeout`` seconds after the ``with`` block, with
    "directly" at its end, with "never" at the end of the program; always only if nobody else holds it, and its
    requests are finished first. ``address`` and ``api_key`` (with the scope admin) name a vllmd instead of looking
    for one, ``settings`` are more settings of the model and ``daemon_settings`` those of a private vllmd, both as in
    vllmd.yaml(5).
    """

    def __init__(
        self,
        engine_args: Any,
        server_name: str | None = None,
        auto_terminate: str = "delay",
        verbose: bool = False,
        resource_timeout: float = DELAY,
        server_startup_timeout: float = 300,
        *,
        address: str | None = None,
        api_key: str | None = None,
        settings: Mapping[str, Any] | None = None,
        daemon_settings: Mapping[str, Any] | None = None,
    ) -> None:
        if auto_terminate not in MODES:
            raise ValueError(f"auto_terminate is one of {', '.join(MODES)}, not {auto_terminate!r}")
        self.engine_args = VLLMEngineArgs.of(engine_args)
        self.server_name = server_name or self.engine_args.name
        self.auto_terminate, self.verbose, self.resource_timeout = auto_terminate, verbose, resource_timeout
        self.failure = ""  # why the last start failed
        self._settings = {**self.engine_args.settings(), "start_timeout": server_startup_timeout, **(settings or {})}
        self._startup_timeout = server_startup_timeout
        self._address = Address.of(address) if address else None
        self._key = api_key or os.environ.get("VLLMD_API_KEY")
        self._daemon_settings = daemon_settings or {}
        self._private: PrivateDaemon | None = None
        self._client: Client | None = None
        self._holding: Holding | None = None
        self._forwarder: PortForwarder | None = None
        self._listen: list[str] = []
        self._lock = threading.RLock()
        self._owner = os.getpid()

    # -- a life --------------------------------------------------------------------------------

    def start(self) -> bool:
        """Load the model, and wait until it serves. False if it does not; ``failure`` says why."""
        try:
            self._start()
        except VllmdError as error:
            self.failure = error.message
            log.error("%s does not serve: %s", self.server_name, error.message)  # without any handler, on stderr
            return False
        return True

    def stop(self) -> None:
        """Give the model up now; unless another lease holds it, it has stopped on return. Harmless if not started."""
        with self._lock:
            atexit.unregister(self._at_exit)
            holding, self._holding = self._holding, None
            if holding:
                try:
                    holding.give_back()
                    self._await_stop(time.monotonic() + STOP_LIMIT)
                except VllmdError as error:
                    self._forget(holding, error)
            self._close()

    def reset_shutdown_timer(self, seconds: float) -> None:
        """Give the model up ``seconds`` from now; replaces an earlier countdown. Raises Conflict if it was not started.

        Requests in flight then are finished first.
        """
        with self._lock:
            if self._holding is None:
                raise Conflict(f"{self.server_name} was not started")
            self._holding.count_down(seconds)

    @property
    def remaining_time(self) -> float | None:
        """Seconds left of a countdown; None if there is none."""
        return self._holding.remaining if self._holding else None

    @property
    def running(self) -> bool:
        """Whether the model is loaded at this moment, awake or asleep."""
        with self._lock:
            try:
                return self._client is not None and self._line().state not in NO_ENGINE
            except VllmdError:
                return False

    def __enter__(self) -> ServerManager:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        holding = self._holding  # another thread may call ``stop`` meanwhile
        if self.auto_terminate == "directly":
            self.stop()
        elif self.auto_terminate == "delay" and holding and holding.kept:
            try:
                holding.count_down(self.resource_timeout)
            except VllmdError as error:  # the block may have its own error to raise
                self._forget(holding, error)

    # -- clients of the model ------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        """Where OpenAI's API is, without ``/v1``. Raises Conflict if it was not started."""
        if self._forwarder:
            return f"http://127.0.0.1:{self._forwarder.port}"
        if self._client is None:
            raise Conflict(f"{self.server_name} was not started")
        if not self._client.address.socket:
            return self._client.address.url
        if not self._listen:
            raise Conflict(f"the vllmd at {self._client.address} listens on no TCP address: add one to server.listen")
        return f"http://{self._listen[0]}"

    def make_client(
        self, host: str | None = None, port: int | None = None, api_key: str | None = None
    ) -> openai.OpenAI:
        """The official client, pointed at the model's server. Raises ImportError if it is not installed."""
        try:
            import openai
        except ImportError:
            what = "make_client() returns the official client, which is not installed: pip install openai"
            raise ImportError(what) from None
        base = f"http://{host or 'localhost'}:{port}" if port else self.base_url
        return openai.OpenAI(base_url=f"{base}/v1", api_key=api_key or self._key or "EMPTY")

    # -- within --------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._lock:
            self.failure = ""
            try:
                self._connect()
                port = self.engine_args.arguments.get("port")
                if port is not None and self._forwarder is None:  # before the load, which may take minutes
                    parts = urlsplit(self.base_url)
                    if parts.scheme != "http":
                        what = f"port cannot lead to {self.base_url}, which is encrypted: leave port out"
                        raise Conflict(what)
                    self._forwarder = PortForwarder(int(port), (parts.hostname or "localhost", parts.port or 80))
                    self._say(f"answers at port {port}")
                self._load(time.monotonic() + self._startup_timeout)
            except BaseException:
                self.stop()
                raise
            atexit.unregister(self._at_exit)
            atexit.register(self._at_exit)

    def _connect(self) -> None:
        """Find a daemon, and take a lease on the model there."""
        if self._private and not self._private.running:
            self._close()
            self._holding = None
        if self._client is None:
            address = self._address or locate.find()
            if address is None:
                self._private = PRIVATE_DAEMONS.join(self, self._daemon_settings)
                address = self._private.address
                self._say(f"no vllmd runs here: started a private one, pid {self._private.pid}")
            self._client = Client(f"unix:{address.socket}" if address.socket else address.url, self._key, ANSWER)
        self._introduce()
        if self._holding is None:
            self._holding = Holding(self._client, self.server_name, self._introduce)
        self._holding.keep()

    def _introduce(self) -> None:
        """Make the model known to the daemon; warn of settings that are not as requested, since others use it."""
        try:
            known = self._connected().put_model(self.server_name, self._settings)
        except Unreachable:
            if self._private:
                self._private.check(within=1.0)
            raise
        self._listen = list(known.listen)
        if known.differs:
            by = "is configured" if known.configured else "is in use already"
            what = f"{self.server_name} {by} with other settings, which count: {', '.join(known.differs)}"
            warnings.warn(what, stacklevel=2)

    def _load(self, deadline: float) -> None:
        """Load the model and wait until it serves. Raises EngineFailed, Unavailable, TimedOut."""
        began, shown = time.monotonic(), tuple[str, ...]()
        line = self._connected().load_model(self.server_name, wait=False)
        while line.state != "running":
            if line.state == "error":
                raise EngineFailed(line.failure)
            if line.state == "stopped" and not line.waiting_for:
                raise Unavailable(f"{self.server_name} was stopped while it was loaded: {line.failure or line.never}")
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"{self.server_name} was not ready within {self._startup_timeout:g} s: {_progress_text(line)}"
                )
            if _progress_key(line) != shown:
                shown = _progress_key(line)
                self._say(_progress_text(line))
            time.sleep(LOOK)
            line = self._line()
        self._say(f"ready after {time.monotonic() - began:.1f} s")

    def _line(self) -> ModelLine:
        """The model's line of the daemon's status."""
        if self._private:
            self._private.check()
        for line in self._connected().status().models:
            if self.server_name in names(line):
                return line
        raise Unavailable(f"vllmd does not know {self.server_name} any more")

    def _connected(self) -> Client:
        if self._client is None:
            raise Conflict(f"{self.server_name} was not started")
        return self._client

    def _forget(self, holding: Holding, error: VllmdError) -> None:
        holding.forget()
        log.warning("%s could not be given up, its lease will run out: %s", self.server_name, error.message)

    def _await_stop(self, deadline: float) -> None:
        """Wait until the model has stopped, unless another lease or a pin holds it."""
        while time.monotonic() < deadline:
            line = self._line()
            if line.state in NO_ENGINE or line.leases or line.pinned:
                others = ", ".join(line.leases)
                self._say(f"given up; it is {line.state}{others and f', held by {others}'}")
                return
            time.sleep(LOOK)
        log.warning("%s still finishes its requests", self.server_name)

    def _close(self) -> None:
        if self._forwarder:
            self._forwarder.close()
        if self._client:
            self._client.close()
        if self._private:
            PRIVATE_DAEMONS.leave(self)
        self._forwarder, self._client, self._private = None, None, None

    def _at_exit(self) -> None:
        """Give the model up as the program ends, unless a countdown runs at a daemon that goes on without it."""
        holding = self._holding
        if os.getpid() != self._owner:  # a fork of the program ends, which has no lease
            return
        if holding and self._private is None and holding.remaining is not None:
            return
        try:
            if holding and self._private is None:
                holding.give_back()
        except (VllmdError, RuntimeError):  # the lease runs out by itself
            pass
        finally:
            self._close()

    def _say(self, what: str) -> None:
        if self.verbose:
            print(f"{self.server_name}: {what}", flush=True)


def _progress_text(line: ModelLine) -> str:
    """The progress of a start: ``starting: weights: Loading safetensors checkpoint shards``, or why it waits."""
    if line.state == "stopped" and line.waiting_for:
        return f"waits for {line.waiting_for}"
    parts = (line.state, line.phase, line.detail, line.waiting_for)
    return ": ".join(dict.fromkeys(part for part in parts if part))


def _progress_key(line: ModelLine) -> tuple[str, ...]:
    """The parts of the progress whose change is worth another line: not how many seconds it has been waiting."""
    return line.state, line.phase, line.detail, re.sub(r"\d+", "", line.waiting_for)
