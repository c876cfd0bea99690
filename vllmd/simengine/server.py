"""The start, the phases of the load, the end.

As vLLM does, it binds its address first and listens only once it is loaded: until
then a connection is refused, though the socket's file is there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from vllmd.simengine.app import App
from vllmd.simengine.context import VERSION, Context
from vllmd.simengine.cuda import CudaMemory, NoCuda
from vllmd.simengine.device import FakeGpu, OutOfDeviceMemory, make_device
from vllmd.simengine.http import Connection
from vllmd.simengine.logs import gib, log, plain
from vllmd.simengine.options import Options
from vllmd.simengine.state import EngineState

_BACKLOG = 2048
_PIECE = 8 << 20  # bytes of a file that are read at a time
_FLUSH = 0.2  # seconds that aborted answers have to leave at the end
_CORE = "EngineCore"


class StartFailed(Exception):
    """The load failed; the message is the core's last line. The process ends with status 1."""


def run(options: Options) -> int:
    """Serve until SIGTERM or SIGINT; the exit status."""
    try:
        return asyncio.run(_main(options))
    except StartFailed as error:
        _report(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


async def _main(options: Options) -> int:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    if "ignore-sigterm" in options.failures:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        loop.add_signal_handler(signal.SIGTERM, stop.set)
    log(f"vLLM API server version {VERSION} (stand-in)", source="api_utils.py:347")
    log(f"non-default args: {{'model': {options.model!r}}}", source="api_utils.py:286")
    listener = _bind(options)
    _fork_grandchildren(options)
    devices = _devices(options)
    if not options.memory and options.gpu_memory_utilization is not None and devices:
        smallest = min(device.memory for device in devices)
        options = replace(options, memory=int(smallest * options.gpu_memory_utilization))
    state = EngineState(options, devices)
    loading = asyncio.ensure_future(_load(options, state))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        return 0
    if (status := loading.result()) is not None:
        return status
    await _serve(options, state, listener, stopping)
    return 0


def _bind(options: Options) -> socket.socket:
    try:
        if options.uds:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(options.uds)
        else:
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            listener = socket.socket(family)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((options.host, options.port))
    except OSError as error:
        raise StartFailed(f"OSError: [Errno {error.errno}] {os.strerror(error.errno or 0)}") from error
    return listener


def _devices(options: Options) -> Sequence[FakeGpu | CudaMemory]:
    try:
        for path in options.device_file if options.device_memory else ():
            make_device(path, options.device_memory)
        return [*map(FakeGpu, options.device_file), *map(CudaMemory, options.cuda)]
    except (NoCuda, OSError) as error:
        raise StartFailed(f"RuntimeError: {error}") from error


# The load


async def _load(options: Options, state: EngineState) -> int | None:
    """Go through the phases of a start; a status means to exit with it. Raises StartFailed."""
    log(f"Initializing a V1 LLM engine (v{VERSION}) with config: model={options.model!r}", process=_CORE)
    _take_memory(options, state)
    log(f"Starting to load model {options.model}...", process=_CORE, source="gpu_model_runner.py:5040")
    if options.read_weights:
        await _read_weights(options.model)
    began = time.monotonic()
    for share, lines in _phases(options):
        await asyncio.sleep(max(0.0, began + options.load_time * share - time.monotonic()))
        if share > 0.5 and (status := options.failures.get("exit-at-start")) is not None:
            log("EngineCore failed to start.", level="ERROR", process=_CORE, source="core.py:1268")
            return int(status)
        for line in lines:
            log(line, process=_CORE, source="gpu_model_runner.py:5150")
    if "never-ready" in options.failures:
        await asyncio.Event().wait()
    state.hold(options.memory)
    return None


def _take_memory(options: Options, state: EngineState) -> None:
    """vLLM's check of free memory, and the memory itself."""
    wanted = options.memory if options.memory_starting is None else options.memory_starting
    if "oom-at-start" in options.failures:
        raise StartFailed(_too_little(wanted, 0, max(wanted, 1)))
    try:
        state.hold(wanted)
    except OutOfDeviceMemory as error:
        raise StartFailed(_too_little(wanted, error.free, error.memory)) from error
    except OSError as error:
        raise StartFailed(f"RuntimeError: device file: {error}") from error


async def _read_weights(path: str) -> None:
    """Read a model's files as loaders do: in order, and in large pieces. Raises StartFailed."""
    reading = _pieces(path)
    while await asyncio.to_thread(next, reading, None):
        pass


def _pieces(path: str) -> Iterator[int]:
    """The size of each piece, once it is read."""
    file = path
    try:
        names = sorted(os.listdir(path)) if os.path.isdir(path) else [""]
        for file in (os.path.join(path, name) if name else path for name in names):
            with open(file, "rb", buffering=0) as opened:
                while piece := len(opened.read(_PIECE)):
                    yield piece
    except OSError as error:
        raise StartFailed(f"OSError: [Errno {error.errno}] {os.strerror(error.errno or 0)}: {file!r}") from error


def _too_little(wanted: int, free: int, memory: int) -> str:
    return (
        f"ValueError: Free memory on device cuda:0 ({gib(free)}/{gib(memory)} GiB) on startup is less than desired "
        f"GPU memory utilization ({round(wanted / memory, 4)}, {gib(wanted)} GiB). Decrease GPU memory utilization "
        "or reduce GPU memory used by other processes."
    )


def _phases(options: Options) -> list[tuple[float, list[str]]]:
    """By the share of the load time: what the log says then."""
    took = options.load_time
    weights = options.memory // 2 if options.weights is None else options.weights
    cache = max(options.memory - weights, 0)
    tokens = max(cache // (128 << 10), options.max_model_len)
    return [
        (0.45, [f"Loading weights took {took * 0.4:.2f} seconds"]),
        (0.5, [f"Model loading took {gib(weights)} GiB memory and {took * 0.45:.6f} seconds"]),
        (0.6, [f"Dynamo bytecode transform time: {took * 0.1:.2f} s"]),
        (0.75, [f"torch.compile took {took * 0.25:.2f} s in total"]),
        (
            0.8,
            [
                f"Available KV cache memory: {gib(cache)} GiB",
                f"GPU KV cache size: {tokens:,} tokens, Maximum concurrency for {options.max_model_len:,} tokens per "
                f"request: {tokens / options.max_model_len:.2f}x",
            ],
        ),
        (0.95, [f"Graph capturing finished in {took * 0.15:.0f} secs, took {gib(options.memory * 0.02)} GiB"]),
        (1.0, [f"init engine (profile, create kv cache, warmup model) took {took * 0.5:.2f} s"]),
    ]


def _report(message: str) -> None:
    """A failed start as vLLM's log ends: the core's traceback, then the API server's."""
    log("EngineCore failed to start.", level="ERROR", process=_CORE, source="core.py:1268")
    log(f"Traceback (most recent call last):\n{message}", level="ERROR", process=_CORE, source="core.py:1268")
    plain("Traceback (most recent call last):")
    plain("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}")


# Serving


async def _serve(
    options: Options, state: EngineState, listener: socket.socket, stopping: asyncio.Task[Literal[True]]
) -> None:
    loop, connections = asyncio.get_running_loop(), set[Connection]()
    app = App(Context(options, state))

    def connection() -> Connection:
        return Connection(app, connections, options.keep_alive)

    address = f"unix:{options.uds}" if options.uds else f"http://{options.host}:{options.port}"
    log(f"Starting vLLM server on {address}", source="entry.py:140")
    if options.uds:
        keep = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        server = await loop.create_unix_server(connection, sock=listener, backlog=_BACKLOG, **keep)  # type: ignore[arg-type]
    else:
        server = await loop.create_server(connection, sock=listener, backlog=_BACKLOG)
    plain(f"INFO:     Started server process [{os.getpid()}]")
    plain("INFO:     Waiting for application startup.\nINFO:     Application startup complete.")
    await stopping
    server.close()
    await _end(options, state, connections)


async def _end(options: Options, state: EngineState, connections: set[Connection]) -> None:
    """vLLM's quick end: requests are aborted, their answers have a moment to leave."""
    plain("INFO:     Shutting down")
    if aborted := state.abort_all():
        log(f"{aborted} requests were aborted by the shutdown", level="WARNING")
    for connection in list(connections):
        connection.finish()
    if leaving := [asyncio.ensure_future(connection.gone.wait()) for connection in connections]:
        await asyncio.wait(leaving, timeout=_FLUSH)
    await asyncio.sleep(options.failures.get("slow-exit") or 0)
    plain("INFO:     Application shutdown complete.")


# Grandchildren


def _fork_grandchildren(options: Options) -> None:
    """Leave processes that only the kill of a cgroup reaches, as an orphaned EngineCore is."""
    for _ in range(int(options.failures.get("fork-grandchildren") or 0)):
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with open("/proc/self/comm", "w") as comm:
            comm.write("VLLM::EngineCor")
        while True:
            signal.pause()
