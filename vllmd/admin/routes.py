"""The route tables: what any client may read, and what an operator may do.

Both are behind every listener; the scope of each row, and what it reaches, say who
may (``vllmd.proxy.access``). A row's last columns are what ``/openapi.json`` says of
it. Every verb of an operator leaves a record of who used it, and how that went.
"""

from __future__ import annotations

import logging

from vllmd.admin import schemas
from vllmd.admin.control import Control
from vllmd.admin.instances import InstanceEndpoints
from vllmd.admin.metrics import MetricsEndpoints
from vllmd.admin.models import ModelEndpoints
from vllmd.admin.openapi import Documentation
from vllmd.admin.operate import LONGEST_PROBE, OperatorEndpoints
from vllmd.admin.records import add_records
from vllmd.admin.runtime_models import add_guests
from vllmd.admin.schemas import FLAG, TEXT, WAIT, answers, asks, doc, requires, streams, takes
from vllmd.admin.store import add_store
from vllmd.errors import ConfigError, VllmdError
from vllmd.proxy.access import Reach
from vllmd.proxy.http import Request, Response
from vllmd.proxy.routing import LocalHandler, Router

log = logging.getLogger("vllmd.admin")

NOTHING, EACH, MACHINE = Reach.NOTHING, Reach.EACH, Reach.MACHINE  # a row without one is about one model
MODEL = "/admin/models/{model:path}"
LEVEL = {"type": "string", "enum": ["1", "2", "3"], "default": "1"}
SECONDS = {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_PROBE}
LINES = {"type": "integer", "minimum": 0, "maximum": 10_000, "default": 50}
FORCE = {"force": (FLAG, "also a process of nobody's that is on a GPU")}
ANOTHER = """\
On a GPU where none of its instances is, one of its replicas that is not loaded is started there; a model without
replicas in the configuration gets one more instance, which is known until it is stopped there, or until a reload."""
ONE = "With a gpu_id the instance on that GPU only; the last one to go takes the model along."
LINE, CHANGE = answers("ModelLine"), answers("ModelLine", also={202: "ModelLine"})
PLAIN = streams("text/plain", "Prometheus' text format", {"application/openmetrics-text": {"schema": TEXT}})


def add_public(router: Router, control: Control) -> None:
    """What any client may read."""
    models, metrics = ModelEndpoints(control), MetricsEndpoints(control)
    add = router.add
    add("GET", "/v1/models", models.every, "models", "The models, loaded or not, and their aliases",
        answers("ModelList"), EACH)  # fmt: skip
    add("GET", "/v1/models/{model:path}", models.one, "models", "One model", answers("Model"))
    add("GET", "/health", models.health, "health", "Whether vllmd is well, its devices and models",
        answers("Health", also={503: "Health"}), EACH)  # fmt: skip
    add("GET", "/health/live", models.live, "open", "Whether vllmd answers", answers("Alive"), NOTHING)
    add("GET", "/health/ready", models.ready, "health", "Whether vllmd can serve at once",
        answers("Health", also={503: "Health"}), EACH)  # fmt: skip
    for method in ("GET", "POST"):
        add(method, "/ping", models.health, "health", "The same as /health, as SageMaker asks it",
            answers("Health", also={503: "Health"}), EACH)  # fmt: skip
    add("GET", "/version", models.version, "open", "The version of vllmd", answers("Version"), NOTHING)
    add("GET", "/metrics", metrics.own, "metrics", "Metrics for Prometheus",
        doc(PLAIN, asks(model=(TEXT, "that model's engine's own metrics instead"))), EACH)  # fmt: skip
    add("GET", "/metrics/engines", metrics.engines, "metrics", "All engines' own metrics, labelled by model", PLAIN,
        EACH)  # fmt: skip
    documentation = Documentation(router)
    add(
        "GET",
        "/openapi.json",
        documentation.schema,
        "open",
        "What the paths take and give",
        answers({"type": "object"}),
        NOTHING,
    )
    add("GET", "/docs", documentation.page, "open", "The same as a page", streams("text/html", "a page"), NOTHING)


def add_operator(router: Router, control: Control) -> None:
    """What an operator may do."""
    operator = OperatorEndpoints(control)
    _add_verbs(router, operator)
    add = router.add
    add("GET", "/admin/status", operator.status, "read", "Everything vllmctl shows", answers("Status"), EACH)
    models = ModelEndpoints(control)
    add("GET", "/admin/models", models.every, "read", "The models as /v1/models has them, for operators",
        answers("ModelList"), EACH)  # fmt: skip
    add("GET", "/admin/models/{model:path}", models.one, "read", "One model, likewise", answers("Model"))
    add("GET", "/admin/decisions", operator.decisions, "read", "The last decisions and their numbers",
        doc(answers("Decisions"), asks(model=(TEXT, "of that model only"))), MACHINE)  # fmt: skip
    add("GET", "/admin/events", operator.events, "read", "Decisions as they are made, and what becomes of them",
        streams("text/event-stream", "events whose data is a Decision"), MACHINE)  # fmt: skip
    add("GET", "/admin/logs/{model:path}", operator.log, "read", "An engine's log",
        doc(streams("text/plain", "its lines"),
            asks(lines=(LINES, "how many of the last"), follow=(FLAG, "and what comes"))))  # fmt: skip
    add("POST", "/admin/reload", audited(operator.reload), "admin", "Take the configuration anew",
        answers("Reloaded"), MACHINE)  # fmt: skip
    add("POST", "/admin/processes/{pid}/kill", audited(operator.kill), "admin", "Kill the engine that has a process",
        doc(answers("Killed"), asks(**FORCE)), MACHINE)  # fmt: skip
    add("POST", "/admin/devices/{device}/drain", audited(operator.drain), "admin",
        "Take a device out of use for maintenance, or give it back",
        doc(answers("Device"), takes("Drain", required=False)), MACHINE)  # fmt: skip
    _add_instances(router, InstanceEndpoints(control))
    add_guests(router, control.runtime_models, audited)
    add_store(router, control.store, audited)
    add_records(router, control, audited)


def _add_verbs(router: Router, operator: OperatorEndpoints) -> None:
    """The verbs on a model."""

    def add(verb: str, handler: LocalHandler, summary: str, *parts: schemas.Schema, method: str = "POST") -> None:
        router.add(method, f"{MODEL}/{verb}", audited(handler), "admin", summary, doc(*parts))

    lines = {"application/x-ndjson": {"schema": TEXT}}
    change = {**CHANGE, "responses": {**CHANGE["responses"]}}
    change["responses"]["200"] = {**change["responses"]["200"]}
    change["responses"]["200"]["content"] = {**change["responses"]["200"]["content"], **lines}
    add("load", operator.load, "Start or wake a model", change, asks(**WAIT))
    add("wake", operator.wake, "Wake or start a model", change, asks(**WAIT))
    add("unload", operator.unload, "Stop a model", change, asks(**WAIT, force=(FLAG, "break off its requests")))
    add("sleep", operator.sleep, "Put a model to sleep", change, asks(**WAIT, level=(LEVEL, "3 stops it")))
    add("pin", operator.pin, "Pin or unpin a model", LINE, takes("Pin", required=False))
    add("probe", operator.probe, "How soon each of a model's engines answers", answers("Probed", also={409: "Error"}),
        asks(all=(FLAG, "wait for all, not only for the fastest"), limit=(SECONDS, "how long to wait")))  # fmt: skip
    add("lease", operator.lease, "Keep a model for a time", LINE, takes("Lease"))
    add("lease", operator.release, "Give a lease back", LINE, requires(lease=({**TEXT, "minLength": 1}, "its name")),
        asks(stop=(FLAG, "the last one to go stops the model")), method="DELETE")  # fmt: skip


def _add_instances(router: Router, instances: InstanceEndpoints) -> None:
    """M's API."""
    add = router.add
    add("GET", "/api/v1/gpus", instances.gpus, "read", "The GPUs and the processes on them",
        answers({"type": "array", "items": schemas.ref("GPUInfo")}, also={501: "Error"}), MACHINE)  # fmt: skip
    add("DELETE", "/api/v1/processes/{pid}", audited(instances.kill), "admin", "Kill the engine that has a process",
        doc(answers("KillProcessResponse"), asks(**FORCE)), MACHINE)  # fmt: skip
    add("POST", "/api/v1/models/start", audited(instances.start), "admin", "Start a model, on a GPU",
        doc(answers("ModelInstanceInfo", 202), takes("StartRequest"), about=ANOTHER))  # fmt: skip
    add("POST", "/api/v1/models/stop", audited(instances.stop), "admin", "Stop a model",
        doc(answers("ModelInstanceInfo"), takes("StopRequest"), about=ONE))  # fmt: skip
    items = answers({"type": "array", "items": schemas.ref("ModelStatusItem")})
    add("GET", "/api/v1/models/status", instances.status, "read", "The instances that are loaded", items, EACH)
    add("GET", "/api/v1/models/status/{name:path}", instances.status_of, "read", "The instances of a model", items)


def audited(handler: LocalHandler) -> LocalHandler:
    """``handler``, and a record of who asked for it, and how it went."""

    async def handle(request: Request) -> Response:
        try:
            response = await handler(request)
        except VllmdError as error:
            known = isinstance(error, ConfigError) and request.path == "/admin/reload"  # the log has all of it already
            _record(request, f"refused: {'the configuration is invalid' if known else error.message.splitlines()[0]}")
            raise
        _record(request, "done" if response.status == 200 and isinstance(response.body, bytes) else "begun")
        return response

    return handle


def _record(request: Request, outcome: str) -> None:
    who = f"the key {request.key}" if request.key else str(request.peer)
    if request.caller.page:
        who = f"{request.key} on the page"
    fields = {"VLLMD_VERB": f"{request.method} {request.path}", "VLLMD_BY": who, "REQUEST_ID": request.id}
    if "model" in request.params:
        fields["MODEL"] = request.params["model"]
    query = f"?{request.query_string}" if request.query_string else ""
    log.info("%s %s%s by %s: %s", request.method, request.path, query, who, outcome, extra={"journal": fields})
