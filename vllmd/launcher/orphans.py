"""End engines that no daemon manages any more.

``PartOf=vllmd.service`` stops their scopes with the daemon, and ``vllmd-cleanup.service`` after the daemon has failed
for good. Both miss a scope that was made in the very moment of the stop, and a service that was stopped while its unit
was being changed. Those are found here: no daemon is connected, its service is down, and has no job.
"""

from __future__ import annotations

import logging

from vllmd.launcher.loop import Loop
from vllmd.launcher.scopes import SERVICE, Scopes
from vllmd.launcher.service import Service

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0  # between checks
CHECKS = 2  # in a row; an ending daemon is disconnected a moment before systemd has its next job


class Orphans:
    """Checks once a second; asks systemd only while engines run and no client is connected."""

    def __init__(self, loop: Loop, scopes: Scopes, service: Service) -> None:
        self._loop, self._scopes, self._service = loop, scopes, service
        self._seen = 0

    def watch(self) -> None:
        """Check now, and again every ``CHECK_SECONDS``."""
        self._loop.later(CHECK_SECONDS, self.watch)
        engines = [] if self._service.clients else self._service.supervisor.list()
        self._seen = self._seen + 1 if engines and self._scopes.abandoned() else 0
        if self._seen < CHECKS:
            return
        self._seen = 0
        for engine in engines:
            if not engine.ending:
                log.warning("stopping %s: no daemon manages it, %s is down and has no job", engine.unit, SERVICE)
                self._scopes.end(engine.instance)
