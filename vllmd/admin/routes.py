"""The route tables of the two listeners: ``http`` for everybody, ``admin`` for operators.

An operator may use the public routes too, and with an admin key everything over
TCP; the scope of each row says who may.
"""

from __future__ import annotations

from vllmd.admin.control import Control
from vllmd.admin.models import ModelEndpoints
from vllmd.admin.operate import OperatorEndpoints
from vllmd.proxy.routing import Router


def add_public(router: Router, control: Control) -> None:
    """What any client may read."""
    models = ModelEndpoints(control)
    router.add("GET", "/v1/models", models.list, "models", "The models, loaded or not")
    router.add("GET", "/v1/models/{model:path}", models.one, "models", "One model")
    router.add("GET", "/health", models.health, "open", "Whether vllmd is well, its devices and models")
    router.add("GET", "/health/live", models.live, "open", "Whether vllmd answers")
    router.add("GET", "/health/ready", models.health, "open", "Whether vllmd can serve")
    router.add("GET", "/version", models.version, "open", "vllmd's version")


def add_operator(router: Router, control: Control) -> None:
    """What an operator may do."""
    operator = OperatorEndpoints(control)
    router.add("GET", "/admin/status", operator.status, "admin", "Everything vllmctl shows")
    router.add("POST", "/admin/models/{model:path}/load", operator.load, "admin", "Start or wake a model")
    router.add("POST", "/admin/models/{model:path}/wake", operator.wake, "admin", "Wake or start a model")
    router.add("POST", "/admin/models/{model:path}/unload", operator.unload, "admin", "Stop a model")
    router.add("POST", "/admin/models/{model:path}/sleep", operator.sleep, "admin", "Put a model to sleep")
    router.add("POST", "/admin/models/{model:path}/pin", operator.pin, "admin", "Pin or unpin a model")
    router.add("POST", "/admin/models/{model:path}/lease", operator.lease, "admin", "Keep a model for a time")
    router.add("DELETE", "/admin/models/{model:path}/lease", operator.release, "admin", "Give a lease back")
    router.add("GET", "/admin/decisions", operator.decisions, "admin", "The last decisions and their numbers")
    router.add("GET", "/admin/events", operator.events, "admin", "Decisions as they are made")
    router.add("GET", "/admin/logs/{model:path}", operator.log, "admin", "An engine's log")
    router.add("POST", "/admin/reload", operator.reload, "admin", "Take the configuration anew")
