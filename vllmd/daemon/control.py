"""What the admin endpoints may ask: the daemon behind ``vllmd.admin.control.Control``."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import vllmd
from vllmd.core import events
from vllmd.core.types import Decision, ModelView, Snapshot, State
from vllmd.errors import Unavailable

if TYPE_CHECKING:
    from vllmd.daemon.service import Daemon

MOVING = frozenset({State.STARTING, State.WAKING, State.DRAINING, State.FALLING_ASLEEP, State.STOPPING})
WATCH_BACKLOG = 1000  # decisions kept for a watcher that does not read; then the oldest are lost to it


class DaemonControl:
    """Reads snapshots, posts events; keeps no state but who is watching."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._watchers: set[asyncio.Queue[Decision]] = set()
        self._changed = asyncio.Event()
        self._followed = 0  # how many wait for a change

    # -- reading ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot | None:
        """The core's own words; None until the daemon has found its devices and engines."""
        if not self._daemon.opened.is_set():
            return None
        heart = self._daemon.heart
        return heart.scheduler.snapshot(heart.now())

    def models(self) -> list[dict[str, Any]]:
        """Every configured model for ``/v1/models``."""
        snapshot = self.snapshot()
        states = {view.name: _state(view) for view in snapshot.models} if snapshot else {}
        return [
            {
                "id": model.name,
                "aliases": list(model.aliases),
                "state": states.get(model.name, State.STOPPED.value),
                "max_model_len": model.max_model_len,
                "engine": model.engine,
                "routes": sorted(self._daemon.kinds(model).routes(model)),
            }
            for model in self._daemon.config.models.values()
        ]

    def health(self) -> dict[str, Any]:
        """Whether we are well, with devices and models as P's document has them."""
        snapshot, broken = self.snapshot(), self._daemon.broken
        views = snapshot.models if snapshot else ()
        return {
            "status": f"the configuration is invalid: {broken}" if broken else "ok",
            "gpu": [asdict(device) for device in snapshot.devices] if snapshot else [],
            "loaded_models": [view.name for view in views if view.state not in (State.STOPPED, State.FAILED)],
            "model_status": {view.name: _state(view) for view in views},
        }

    def status(self) -> dict[str, Any]:
        """Everything that ``vllmctl`` shows."""
        daemon, snapshot = self._daemon, self.snapshot()
        about = {
            "version": vllmd.__version__,
            "pid": os.getpid(),
            "uptime": time.time() - daemon.started,
            "policy": daemon.config.policy,
            "opened": snapshot is not None,
            "configuration": {"files": [str(path) for path in daemon.config.files], "error": daemon.broken},
            "requests": daemon.turnstile.open,
            "connections": daemon.doors.connections,
        }
        if snapshot is None:
            return {**about, "backend": "", "source": "", "devices": [], "models": [],
                    "host_memory": {"budget": 0, "promised": 0}}  # fmt: skip
        return {
            **about,
            "backend": daemon.backend,
            "source": daemon.memory.source,
            "devices": [asdict(device) for device in snapshot.devices],
            "host_memory": {"budget": snapshot.host_memory, "promised": snapshot.host_promised},
            "models": [self._line(view) for view in snapshot.models],
        }

    def _line(self, view: ModelView) -> dict[str, Any]:
        daemon = self._daemon
        model, member = daemon.config.models.get(view.name), daemon.fleet.members.get(view.name)
        line = {**asdict(view), "state": _state(view), "pid": None, "unit": "", "socket": ""}
        line.update(instance="", detail="", phase="")
        line["last_start_seconds"] = daemon.fleet.last_start.get(view.name)
        line["config"] = {"engine": model.engine, "model": model.source, "aliases": model.aliases} if model else {}
        if member:
            line["instance"] = member.instance
            if view.state is State.STARTING:
                line.update(phase=member.phase.phase, detail=member.phase.detail)
            line["socket"] = member.listen.uds or f"{member.listen.host}:{member.listen.port}"
        if member and member.running:
            line.update(pid=member.running.pid, unit=member.running.unit)
        return line

    def line(self, model: str) -> dict[str, Any]:
        """One model's line of ``status``. Raises Unavailable while the daemon opens."""
        snapshot = self.snapshot()
        if snapshot is None:
            raise Unavailable("vllmd is still looking for its devices and engines; try again", retry_after=1)
        return next(self._line(view) for view in snapshot.models if view.name == model)

    def resolve(self, name: str) -> str:
        """The configured name of a model."""
        return self._daemon.turnstile.resolve(name).model

    def decisions(self, model: str) -> list[dict[str, Any]]:
        """The last decisions, oldest first."""
        snapshot = self.snapshot()
        made = snapshot.decisions if snapshot else ()
        return [self._dated(decision) for decision in made if not model or _concerns(decision, model)]

    def _dated(self, decision: Decision) -> dict[str, Any]:
        """The decision with Unix time instead of the core's clock."""
        return {**asdict(decision), "at": time.time() - self._daemon.heart.now() + decision.at}

    # -- verbs -----------------------------------------------------------------------------

    async def load(self, model: str) -> None:
        """Have it started or woken."""
        await self._post(events.LoadAsked(model))

    async def unload(self, model: str, *, force: bool) -> None:
        """Have it stopped; clears a failure."""
        await self._post(events.StopAsked(model, force))

    async def sleep(self, model: str, level: int) -> None:
        """Have it put to sleep, or stopped at 3."""
        await self._post(events.SleepAsked(model, level))

    async def pin(self, model: str, pinned: bool) -> None:
        """Pin or unpin it."""
        await self._post(events.PinSet(model, pinned))

    async def lease(self, lease: str, model: str, seconds: float | None) -> None:
        """Keep it for ``seconds``."""
        await self._daemon.opened.wait()
        deadline = None if seconds is None else self._daemon.heart.now() + seconds
        await self._post(events.LeaseTaken(lease, model, deadline))

    async def release(self, lease: str, *, stop: bool) -> None:
        """Give a lease back."""
        await self._post(events.LeaseReleased(lease, stop))

    async def reload(self) -> dict[str, Any]:
        """Take the configuration anew. Raises ConfigError."""
        return await self._daemon.reload()

    async def _post(self, event: events.Event) -> None:
        await self._daemon.opened.wait()
        self._daemon.post(event)

    # -- following -------------------------------------------------------------------------

    def note(self, decision: Decision) -> None:
        """Hand a decision to whoever watches."""
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(decision)

    def stir(self) -> None:
        """Something changed: wake whoever follows a model."""
        if self._followed:
            self._changed.set()
            self._changed = asyncio.Event()

    async def progress(self, model: str) -> AsyncIterator[dict[str, Any]]:
        """How it comes along, until it has come to rest."""
        began, shown = time.monotonic(), ("", "", "")
        self._followed += 1
        try:
            while self._moves(model):
                changed = self._changed  # taken before looking: a change while the reader is busy is not missed
                line = self.line(model)
                if (line["state"], line["phase"], line["detail"]) != shown:
                    shown = (line["state"], line["phase"], line["detail"])
                    yield {
                        "state": shown[0],
                        "phase": shown[1],
                        "detail": shown[2],
                        "elapsed": time.monotonic() - began,
                    }
                await changed.wait()
        finally:
            self._followed -= 1
        yield _at_rest(self.line(model), time.monotonic() - began)

    async def changed(self, limit: float) -> None:
        """Wait until something has happened, at most ``limit`` seconds."""
        self._followed += 1
        try:
            async with asyncio.timeout(limit):
                await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            self._followed -= 1

    def _moves(self, model: str) -> bool:
        """Whether it is on its way somewhere, or about to be."""
        snapshot = self.snapshot()
        view = next((view for view in snapshot.models if view.name == model), None) if snapshot else None
        return view is not None and (view.state in MOVING or bool(view.waiting_for))

    async def watch(self) -> AsyncIterator[dict[str, Any]]:
        """Decisions as they are made."""
        queue: asyncio.Queue[Decision] = asyncio.Queue(WATCH_BACKLOG)
        self._watchers.add(queue)
        try:
            while True:
                yield self._dated(await queue.get())
        finally:
            self._watchers.discard(queue)

    async def log(self, model: str, lines: int, *, follow: bool) -> AsyncIterator[str]:
        """The engine's last log lines, and what comes."""
        member = self._daemon.fleet.members.get(model) if self._daemon.opened.is_set() else None
        if member is None:
            raise Unavailable(f"{model} has no engine now; 'journalctl -t vllmd' or 'vllmctl logs' shows earlier ones")
        async for line in self._daemon.fleet.log_of(member, lines, follow=follow):
            yield line


def _concerns(decision: Decision, model: str) -> bool:
    """Whether it is about the model, or makes it leave."""
    victims = str(decision.numbers.get("victims", "")).split(",")
    return decision.model == model or model in (victim.rpartition(":")[0] for victim in victims)


def _at_rest(line: dict[str, Any], elapsed: float) -> dict[str, Any]:
    """The last line of a progress."""
    if line["state"] == State.FAILED.value:
        return {"error": {"message": line["failure"]}, "done": True, "state": line["state"]}
    return {"done": True, "state": line["state"], "seconds": elapsed}


def _state(view: ModelView) -> str:
    """``sleeping_l1`` says more than ``sleeping``."""
    return f"sleeping_l{view.level}" if view.state is State.SLEEPING else view.state.value
