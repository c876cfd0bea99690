"""Models that programs bring along: one that is in use stays as it is, also if its use began while it was changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vllmd.config.types import Config
from vllmd.daemon.runtime_models import RuntimeModels
from vllmd.errors import Conflict


class FakeDaemon:
    """A daemon whose change of configuration takes a moment, in which ``meanwhile`` happens."""

    def __init__(self) -> None:
        self.config = Config()
        self.in_flight = 0
        self.meanwhile: Callable[[], None] = lambda: None
        self.now = self  # it is open

    async def wait(self) -> FakeDaemon:
        return self

    async def take(self, config: Config, unless_used: frozenset[str]) -> None:
        self.meanwhile()
        if "m" in unless_used and self.in_flight:
            raise Conflict("m is in use")
        self.config = config


def test_one_that_is_asked_for_while_it_is_changed_stays_as_it_is() -> None:
    """Between the look and the change a request came: it is not cut off by an engine that restarts."""
    asyncio.run(_one_that_is_asked_for_while_it_is_changed())


async def _one_that_is_asked_for_while_it_is_changed() -> None:
    daemon = FakeDaemon()
    models = RuntimeModels(daemon, daemon, daemon.take, asyncio.Lock(), lambda model: model, ())  # type: ignore[arg-type]
    first = await models.put("m", {"model": "org/a"}, trusted=True)
    assert first.differs == ()
    daemon.meanwhile = lambda: setattr(daemon, "in_flight", 1)
    again = await models.put("m", {"model": "org/b"}, trusted=True)
    assert again.differs == ("model",)
    assert daemon.config.models["m"].model == "org/a"
    daemon.in_flight, daemon.meanwhile = 0, lambda: None
    assert (await models.put("m", {"model": "org/b"}, trusted=True)).differs == ()
    assert daemon.config.models["m"].model == "org/b"
