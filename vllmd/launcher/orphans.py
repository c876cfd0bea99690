"""Engines that nobody manages any more are ended.

``PartOf=vllmd.service`` ends them with the daemon, and ``vllmd-cleanup.service``
where it has failed for good. What both miss (a scope that was made in the very
moment of the stop, a service that was stopped while its unit was being changed)
is found here: no daemon is connected, its service is down, and nothing is about
to start it.
"""

from __future__ import annotations

import logging

from vllmd.launcher.loop import Loop
from vllmd.launcher.scopes import SERVICE, Scopes
from vllmd.launcher.service import Service

log = logging.getLogger(__name__)

LOOK = 1.0  # seconds between looks
LOOKS = 2  # in a row; a daemon that ends is disconnected a moment before systemd knows what comes next


class Orphans:
    """Looks for them once a second; asks systemd only while engines run and nobody is connected."""

    def __init__(self, loop: Loop, scopes: Scopes, service: Service) -> None:
        self._loop, self._scopes, self._service = loop, scopes, service
        self._seen = 0

    def watch(self) -> None:
        """Look now and from now on."""
        self._loop.later(LOOK, self.watch)
        engines = [] if self._service.clients else self._service.supervisor.list()
        self._seen = self._seen + 1 if engines and self._scopes.abandoned() else 0
        if self._seen < LOOKS:
            return
        self._seen = 0
        for engine in engines:
            if not engine.ending:
                log.warning("%s is left over: %s is down and nothing starts it; stopping it", engine.unit, SERVICE)
                self._scopes.end(engine.instance)
