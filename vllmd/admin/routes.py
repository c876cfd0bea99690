"""The route tables of what an operator may do, of metrics and of documentation.

They are behind every listener, as ``public`` is; the scope of each row, and its reach, decide which callers may use it
(``vllmd.proxy.access``). A row's other columns are its documentation in ``/openapi.json``. Operators' verbs are rows
of ``vllmd.api.verbs``.
"""

from __future__ import annotations

from dataclasses import replace

from vllmd.admin.adapters import add_adapters
from vllmd.admin.control import Control
from vllmd.admin.instances import KILL, START, STOP, InstanceEndpoints
from vllmd.admin.metrics import MetricsEndpoints
from vllmd.admin.models import ModelEndpoints
from vllmd.admin.openapi import Documentation
from vllmd.admin.records import add_records
from vllmd.admin.runtime_models import add_runtime_models
from vllmd.admin.schemas import TEXT, answers, doc, streams, takes
from vllmd.admin.store import add_store
from vllmd.admin.streams import LOG, StreamEndpoints
from vllmd.admin.verbs import add_verbs, audited
from vllmd.api.answers import (
    Error,
    GPUInfo,
    KillProcessResponse,
    Model,
    ModelInstanceInfo,
    ModelList,
    ModelStatusItem,
)
from vllmd.api.verbs import OF_MODEL
from vllmd.proxy.access import Reach
from vllmd.proxy.routing import Router

OBJECT = {"type": "object"}
ENGINE_OF = replace(OF_MODEL, about="that model's engine's own metrics instead")
NOTHING, EACH, MACHINE = Reach.NOTHING, Reach.EACH, Reach.MACHINE  # a row without one is about one model
ANOTHER = """\
On a GPU that has none of its instances, one of its replicas that is not loaded is started there; a model without
replicas in the configuration gets one more instance, which lasts until it is stopped there, or until a reload."""
ONE = "With a gpu_id only the instance on that GPU; the last instance to stop takes the model along."
PLAIN = streams("text/plain", "Prometheus' text format", {"application/openmetrics-text": {"schema": TEXT}})


def add_metrics(router: Router, control: Control) -> None:
    """Add the routes for any client that no client needs to use a model: metrics and documentation."""
    metrics, documentation, add = MetricsEndpoints(control), Documentation(router), router.add
    add("GET", "/metrics", metrics.own, "metrics", "Metrics for Prometheus",
        doc(PLAIN, takes((ENGINE_OF,))), EACH)  # fmt: skip
    add("GET", "/metrics/engines", metrics.engines, "metrics", "All engines' own metrics, labelled by model", PLAIN,
        EACH)  # fmt: skip
    add("GET", "/openapi.json", documentation.schema, "open", "This API as an OpenAPI document",
        answers({"type": "object"}), NOTHING)  # fmt: skip
    add("GET", "/docs", documentation.page, "open", "The same as a page", streams("text/html", "a page"), NOTHING)


def add_operator(router: Router, control: Control) -> None:
    """Add the routes for operators: the verbs, streams, the instances API, run-time models, adapters, the store."""
    add_verbs(router, control)
    follow, models, add = StreamEndpoints(control), ModelEndpoints(control), router.add
    add("GET", "/admin/models", models.every, "read", "The models as /v1/models has them, for operators",
        answers(ModelList), EACH)  # fmt: skip
    add("GET", "/admin/models/{model:path}", models.one, "read", "One model, likewise", answers(Model))
    add("GET", "/admin/config", models.settings, "read", "The settings in force, and where each comes from",
        doc(streams("text/plain", "vllmd.yaml without secrets", {"application/yaml": {"schema": OBJECT}}),
            takes((OF_MODEL,))),
        MACHINE)  # fmt: skip
    add("GET", "/admin/events", follow.events, "read", "Decisions as they are made, and what becomes of them",
        streams("text/event-stream", "events whose data is a Decision"), MACHINE)  # fmt: skip
    add("GET", "/admin/logs/{model:path}", follow.log, "read", "An engine's log",
        doc(streams("text/plain", "its lines"), takes(LOG)))  # fmt: skip
    add_instances(router, InstanceEndpoints(control))
    add_runtime_models(router, control.runtime_models, audited)
    add_adapters(router, control.adapters, audited)
    add_store(router, control.store, audited)
    add_records(router, control)


def add_instances(router: Router, instances: InstanceEndpoints) -> None:
    """Add the routes of ``/api/v1``, the instances API."""
    add = router.add
    add("GET", "/api/v1/gpus", instances.gpus, "read", "The GPUs and the processes on them",
        answers(tuple[GPUInfo, ...], also={501: Error}), MACHINE)  # fmt: skip
    add("DELETE", "/api/v1/processes/{pid}", audited(instances.kill), "admin", "Kill the engine that has a process",
        doc(answers(KillProcessResponse), takes(KILL)), MACHINE)  # fmt: skip
    add("POST", "/api/v1/models/start", audited(instances.start), "admin", "Start a model, on a GPU",
        doc(answers(ModelInstanceInfo, 202), takes(START), about=ANOTHER))  # fmt: skip
    add("POST", "/api/v1/models/stop", audited(instances.stop), "admin", "Stop a model",
        doc(answers(ModelInstanceInfo), takes(STOP), about=ONE))  # fmt: skip
    items = answers(tuple[ModelStatusItem, ...])
    add("GET", "/api/v1/models/status", instances.status, "read", "The instances that are loaded", items, EACH)
    add("GET", "/api/v1/models/status/{name:path}", instances.status_of, "read", "The instances of a model", items)
