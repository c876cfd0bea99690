"""A start's loader: chosen before the order goes to the launcher, measured when the engine is up (``engines.loaders``).

Looking at the files may wait for a disk, so it is done in a thread, for ``LOOKING`` at most; only where the engine's
environment has a loader to choose. Whatever goes wrong leaves the engine to itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.daemon.read_ahead import is_cached
from vllmd.engines import loaders
from vllmd.engines.base import Engine
from vllmd.engines.environments import interpreter
from vllmd.engines.loaders import CanLoadFast, Files, LoaderBook
from vllmd.engines.start_phases import WEIGHTS
from vllmd.engines.weight_files import WeightFile
from vllmd.foreign import Unreadable, within
from vllmd.frozen import frozen
from vllmd.launcher.client import StartOrder

log = logging.getLogger("vllmd.engines")

LOOKING = 0.5  # seconds
MOUNTS = Path("/proc/self/mountinfo")
DOWNLOAD = "download"  # a phase that would be in the other


@frozen
class Loading:
    """How a start loads. ``format``: "" is the engine's own choice. ``size``: bytes. ``place``: of ``loaders``."""

    format: str
    place: str
    size: int


class Loaders:
    """Chooses the loader of each start, and learns from how that went."""

    def __init__(
        self,
        book: LoaderBook | None = None,
        files: Callable[[str], Sequence[WeightFile]] = lambda replica: (),
        wanted: Callable[[], bool] = lambda: False,
        past_the_cache: Callable[[str], None] = lambda replica: None,
    ) -> None:
        """``files`` gives what a replica's engine will read, and may block. ``wanted``: whether it is switched on.

        ``past_the_cache`` is called with a replica whose files will not be read from the page cache.
        """
        self._book = LoaderBook() if book is None else book
        self._files, self._wanted, self._past_the_cache = files, wanted, past_the_cache
        self._excused: set[tuple[str, str, str]] = set()  # place, format, model

    async def choose(
        self, model: ModelConfig, engine: Engine, order: StartOrder, room: Callable[[int], int]
    ) -> tuple[StartOrder, Loading | None]:
        """The order with the chosen loader in it; and what is to be measured, or None.

        ``room``: bytes of each device that so many bytes of weights leave of what was promised.
        """
        if not self._wanted() or not isinstance(engine, CanLoadFast):
            return order, None
        if not (candidates := engine.loaders(model, order.argv)):
            return order, None
        try:
            files = await asyncio.to_thread(within, LOOKING, lambda: self._look(model.name))
        except (OSError, Unreadable) as error:
            log.info("%s: its loader is not chosen: %s", model.name, error)
            return order, None
        except Exception:  # a defect of ours; the engine loads as it would by itself
            log.exception("%s: its loader is not chosen", model.name)
            return order, None
        python = interpreter(model, order.argv)
        if not files.size or not (place := loaders.place(python, files)):
            return order, None
        formats = loaders.fitting(candidates, files, room(files.size))
        chosen = self._book.choose(place, model.name, formats, files.size)
        if chosen:
            log.info("%s: its weights are loaded by %s (%s)", model.name, chosen, place)
            order = replace(order, argv=engine.load_with(order.argv, chosen))
        if chosen in loaders.DIRECT:
            self._past_the_cache(model.name)
        return order, Loading(chosen, place, files.size)

    def _look(self, replica: str) -> Files:
        return loaders.look(self._files(replica), is_cached, MOUNTS.read_text())

    def came_up(self, loading: Loading | None, spent: Mapping[str, float], *, alone: bool = True) -> None:
        """Measure a start that has come through; ``spent``: seconds by phase.

        ``alone``: no other engine was starting meanwhile. Two that share a disk both seem slow, and a loader that seems
        slow once is not tried again. So of such starts only the engine's own loader counts, and only where nothing is
        known of it yet.
        """
        if loading is None or DOWNLOAD in spent:
            return
        if alone or (not loading.format and not self._book.knows(loading.place)):
            self._book.measured(loading.place, loading.format, spent.get(WEIGHTS, 0.0), loading.size)

    def failed(self, model: str, loading: Loading) -> None:
        """Note that an engine did not come up with a loader, and is started again without it."""
        self._book.failed(loading.place, loading.format, model)

    def failed_without(self, model: str, loading: Loading) -> None:
        """Note that the engine did not come up without it either: the loader may be tried once more, and no more."""
        tried = (loading.place, loading.format, model)
        if tried not in self._excused:
            self._excused.add(tried)
            self._book.excused(*tried)
