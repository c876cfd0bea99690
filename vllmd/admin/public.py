"""The route table of what any client may read: models, health, the version. It is there from the daemon's start on.

``routes`` has the others; see there what the columns are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vllmd.admin.control import Control
from vllmd.admin.models import ModelEndpoints
from vllmd.api.answers import Alive, Answer, Health, Model, ModelList, Version
from vllmd.proxy.access import Reach
from vllmd.proxy.routing import Doc, Router

NOTHING, EACH = Reach.NOTHING, Reach.EACH  # a row without one is about one model


def add_public(router: Router, control: Control) -> None:
    """Add the routes for every client: models, health, the version."""
    models, add, well = ModelEndpoints(control), router.add, answers(Health, also={503: Health})
    add("GET", "/v1/models", models.every, "models", "The models, loaded or not, and their aliases",
        answers(ModelList), EACH)  # fmt: skip
    add("GET", "/v1/models/{model:path}", models.one, "models", "One model", answers(Model))
    add("GET", "/health", models.health, "health", "Whether vllmd is well, its devices and models", well, EACH)
    add("GET", "/health/live", models.live, "open", "Whether vllmd answers", answers(Alive), NOTHING)
    add("GET", "/health/ready", models.ready, "health", "Whether vllmd can serve at once", well, EACH)
    for method in ("GET", "POST"):
        add(method, "/ping", models.health, "health", "The same as /health, as SageMaker asks it", well, EACH)
    add("GET", "/version", models.version, "open", "The version of vllmd", answers(Version), NOTHING)


def answers(shape: type[Answer], also: Mapping[int, type[Answer]] | None = None) -> Callable[[], Doc]:
    """As ``schemas.answers``, drawn when ``/openapi.json`` is asked for."""

    def draw() -> Doc:
        from vllmd.admin import schemas  # which needs all of the verbs

        return schemas.answers(shape, also=also)

    return draw
