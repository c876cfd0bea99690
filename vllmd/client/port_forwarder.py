"""A TCP port of the program's own choice that leads to vllmd, for as long as the program keeps it open."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading

from vllmd.errors import Conflict

CHUNK = 64 << 10


class PortForwarder:
    """Relays the bytes of every connection to ``127.0.0.1:port`` on to ``target``."""

    def __init__(self, port: int, target: tuple[str, int]) -> None:
        """Open the port. Raises Conflict if it is in use."""
        self._target = target
        try:
            self._listener = socket.create_server(("127.0.0.1", port))
        except OSError as error:
            why = os.strerror(error.errno or errno.EADDRINUSE)
            raise Conflict(f"port {port} cannot be had: {why}; choose another, or none") from None
        self.port: int = self._listener.getsockname()[1]
        self._loop, self._closed = asyncio.new_event_loop(), asyncio.Event()

        def run() -> None:
            self._loop.run_until_complete(self.serve())
            self._loop.close()

        self._thread = threading.Thread(target=run, name=f"port-forwarder-{self.port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the port and its connections."""
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    async def serve(self) -> None:
        """Relay connections until ``close``, then cancel those that are open."""
        server = await asyncio.start_server(self.relay, sock=self._listener)
        await self._closed.wait()
        server.close()
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection in both directions, up to its end."""
        try:
            inner_reader, inner_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        try:
            with contextlib.suppress(asyncio.CancelledError):  # by ``serve``; asyncio would log it as an error
                await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
        finally:
            writer.close()
            inner_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction, up to its end."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
