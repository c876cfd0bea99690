"""Who may use which route: every route of the table, by every kind of caller, asked of a real daemon."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tests.admin.site import Site, running, until
from tests.proxy.fakes import FakeGate
from vllmd.admin.public import add_public
from vllmd.admin.routes import add_metrics, add_operator
from vllmd.config.types import ServerConfig
from vllmd.engines.base import Listen
from vllmd.ollama.endpoints import add_ollama_routes
from vllmd.proxy.access import Reach
from vllmd.proxy.forward import Relay
from vllmd.proxy.limits import Limits
from vllmd.proxy.models import FORM_PATHS, QUERY_PATHS, add_model_routes
from vllmd.proxy.routing import Route, Router

MODELS = """\
devices: [{{memory: 80GiB, file: {folder}/gpu0}}]
server: {{idle_exit: never}}
models:
  alpha: {{engine: sim, gpu_memory: 20GiB, options: {{load_time: 0.01s}}, runtime_adapters: true}}
  beta: {{engine: sim, gpu_memory: 20GiB, options: {{load_time: 0.01s}}}}
"""
KEYS = """\
auth:
  keys:
    - {key: models-key}
    - {key: beta-key, models: [beta]}
    - {key: read-key, scopes: [read]}
    - {key: read-beta-key, scopes: [read], models: [beta]}
    - {key: admin-key, scopes: [admin]}
    - {key: admin-beta-key, scopes: [admin], models: [beta]}
    - {key: both-key, scopes: [models, admin]}
    - {key: both-beta-key, scopes: [models, admin], models: [beta]}
"""
PUBLIC = frozenset({"open", "health", "metrics"})


@dataclass(frozen=True)
class Kind:
    """A kind of caller: what opens what is written down here once more, by hand."""

    name: str
    opens: frozenset[str]
    key: str = ""
    socket: str = ""  # admin or read
    only_beta: bool = False


CALLERS = (
    Kind("nobody", PUBLIC),
    Kind("a wrong key", PUBLIC, "wrong"),
    Kind("a key", PUBLIC | {"models"}, "models-key"),
    Kind("another model's key", PUBLIC | {"models"}, "beta-key", only_beta=True),
    Kind("a key that reads", PUBLIC | {"read"}, "read-key"),
    Kind("a key that reads of beta", PUBLIC | {"read"}, "read-beta-key", only_beta=True),
    Kind("an admin's key", PUBLIC | {"read", "admin"}, "admin-key"),
    Kind("a restricted admin's key", PUBLIC | {"read", "admin"}, "admin-beta-key", only_beta=True),
    Kind("the admin socket", PUBLIC | {"models", "read", "admin"}, socket="admin"),
    Kind("the read-only socket", PUBLIC | {"read"}, socket="read"),
)
VALUES = {"model": "alpha", "name": "alpha", "rest": "alpha/health", "id": "resp_x", "pid": "999999", "version": "1"}
VALUES |= {"device": "9"}  # there is none: to drain the one there is would let nothing be served after
BOUNDARY = "zz"


def table() -> list[Route]:
    """Every row of the daemon's route table. Nothing of the daemon is needed to write it down."""
    router, control = Router(), SimpleNamespace(guests=None, runtime_models=None, store=None, adapters=None)
    add_public(router, control)  # type: ignore[arg-type]
    add_metrics(router, control)  # type: ignore[arg-type]
    add_operator(router, control)  # type: ignore[arg-type]
    relay = Relay(FakeGate(Listen()), Limits(ServerConfig()))
    add_model_routes(router, relay)
    add_ollama_routes(router, relay, control)  # type: ignore[arg-type]
    return router.routes


def path_of(route: Route) -> str:
    path = route.pattern.replace(":path}", "}")
    for name, value in VALUES.items():
        path = path.replace("{" + name + "}", value)
    path = re.sub(r"\{\w+\}", "9", path)  # of whatever it is, there are fewer
    return path + ("?model=alpha" if path in ("/v1/realtime", *QUERY_PATHS) else "")


def body_of(route: Route) -> tuple[bytes | None, str]:
    """What such a request has to have to be understood, about the model alpha; and its type."""
    if route.pattern in FORM_PATHS:
        part = 'Content-Disposition: form-data; name="model"'
        form = f"--{BOUNDARY}\r\n{part}\r\n\r\nalpha\r\n--{BOUNDARY}--\r\n"
        return form.encode(), f"multipart/form-data; boundary={BOUNDARY}"
    if route.method not in ("POST", "PUT"):
        return None, ""
    if route.scope == "models":
        asked = {"model": "alpha", "messages": [{"role": "user", "content": "x"}], "input": "x", "prompt": "x"}
        return json.dumps({**asked, "max_tokens": 1}).encode(), "application/json"
    own: dict[str, Any] = {"load_lora_adapter": {"lora_name": "l", "lora_path": "/l", "model": "alpha"}}
    own |= {
        "unload_lora_adapter": {"lora_name": "l"},
        "lease": {"lease": "l"},
        "suspend": {"suspended": False},  # else the routes behind it would wait for the machine's sleep to be over
        "start": {"model_name": "alpha"},
        "stop": {"model_name": "alpha"},
    }
    return json.dumps(own.get(route.pattern.rpartition("/")[2], {})).encode(), "application/json"


def ask(site: Site, route: Route, kind: Kind, **headers: str) -> tuple[int, str]:
    """The status, and the beginning of the answer: some never end."""
    body, content_type = body_of(route)
    sent = {**({"Content-Type": content_type} if content_type else {}), **headers}
    if kind.key:
        sent["Authorization"] = f"Bearer {kind.key}"
    if route.pattern == "/v1/realtime":
        sent |= {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        sent["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    source = "127.0.0.2" if kind.key == "wrong" else "127.0.0.1"  # whoever guesses is slowed, and only there
    connected = site.connect(admin=kind.socket == "admin", read=kind.socket == "read", source=source)
    with contextlib.closing(connected) as connection:
        connection.request(route.method, path_of(route), body, sent)
        answer = connection.getresponse()
        endless = answer.status == 101 or "event-stream" in (answer.getheader("content-type") or "")
        return answer.status, "" if endless else answer.read().decode()


def wrong(route: Route, kind: Kind, status: int, text: str) -> str:
    """What is not as it must be."""
    if route.scope not in kind.opens:
        refused = {"nobody": (401,), "a wrong key": (401, 429)}.get(kind.name, (403,))
        return "" if status in refused else f"must be {refused}"
    if kind.only_beta or kind.name in ("nobody", "a wrong key"):  # who may not use alpha
        if "alpha" in text and status < 300:
            return "tells of alpha"
        if route.reach is Reach.MACHINE and status != 403:
            return "must be 403: it concerns all models"
        unknown = route.pattern.startswith(("/v1/models/{", "/v1/responses/{"))  # these do not tell what there is
        unknown |= route.pattern == "/v1/unload_lora_adapter"
        unknown |= (route.method, route.pattern) == ("GET", "/admin/models/{model:path}")
        if route.reach is Reach.ONE and status != (404 if unknown else 403):
            return "must be refused: it is about alpha"
        return ""
    if status in (401, 403, 421, 429) and "is not passed on to the engine" not in text:
        return "must be allowed"
    tell = ("/health", "/metrics", "/v1/models", "/admin/status", "/api/tags")
    if route.pattern in tell and "alpha" not in text:
        return "must tell of alpha"
    return ""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("authorisation")
    with running(folder, MODELS.format(folder=folder) + KEYS) as site:
        yield site


@pytest.mark.parametrize("kind", CALLERS, ids=lambda kind: kind.name)
def test_every_route_by_every_caller(site: Site, kind: Kind) -> None:
    """A route is added with its row, and its row says who may: none is forgotten, here or there."""
    found = []
    for route in table():
        status, text = ask(site, route, kind)
        if what := wrong(route, kind, status, text):
            found.append(f"{route.method} {route.pattern} ({route.scope}, {route.reach.name}): {status}; {what}")
    assert found == []


def test_metrics_name_keys_to_those_who_may_know(site: Site) -> None:
    """A key sees what it did itself, an operator what all did, a stranger nothing of it."""
    site.ask("GET", "/v1/models", key="models-key")
    site.ask("GET", "/v1/models", key="beta-key")

    def told(key: str = "", **how: Any) -> set[str]:
        text = site.ask("GET", "/metrics", key=key, **how).text
        return {name for name in ("key1", "key2") if f'vllmd_key_requests_total{{key="{name}"}}' in text}

    assert told() == told("wrong") == set()
    assert told("models-key") == {"key1"}
    assert told("beta-key") == {"key2"}
    assert told("read-key") == told("admin-key") == told(admin=True) == {"key1", "key2"}
    assert told("admin-beta-key") == set()


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("keyless")
    with running(folder, MODELS.format(folder=folder)) as site:
        yield site


CROSS_SITE = (
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
)


@pytest.mark.parametrize("fields", CROSS_SITE, ids=str)
def test_no_page_of_another_site_loads_moves_or_asks_a_model(keyless: Site, fields: dict[str, str]) -> None:
    """On any route, whatever browsers send without asking; being there is no secret."""
    for route in table():
        status, _ = ask(keyless, route, CALLERS[0], **fields)
        if route.scope in ("open", "health"):
            assert status in (200, 503), route.pattern
        else:
            assert status in (401, 403), f"{route.method} {route.pattern}: {status}"
    states = keyless.ask("GET", "/health").json["model_status"]
    assert states == {"alpha": "stopped", "beta": "stopped"}


def test_no_route_answers_under_a_name_that_is_not_ours(keyless: Site) -> None:
    """A page whose name points here (DNS rebinding) has our origin, and would read every answer."""
    for route in table():
        status, text = ask(keyless, route, CALLERS[0], Host="evil.example:33258")
        assert status == 421, f"{route.method} {route.pattern}: {status}"
        assert "alpha" not in text
    assert keyless.ask("GET", "/v1/models", headers={"Host": "localhost:1"}).status == 200


def test_with_keys_any_name_is_good(site: Site) -> None:
    """Whoever has a key has shown it; names are for load balancers and certificates."""
    assert site.ask("GET", "/v1/models", key="models-key", headers={"Host": "gpu.example"}).status == 200


def test_suggestions_and_candidates_are_the_keys_own(site: Site) -> None:
    """An error is an answer, too."""
    answer = site.chat("alpa", "beta-key")
    assert (answer.status, "alpha" in answer.text) == (404, False)
    assert "did you mean 'alpha'" in site.chat("alpa", "models-key").error
    assert "'beta'" in site.chat("bet", "beta-key").error


def test_ollamas_operators_are_operators_of_all_models_and_leave_a_record(site: Site) -> None:
    """A key for some models adds no other one; whoever may, and tried, is named in the log."""
    body = {"model": "../none", "source": "none", "destination": "x", "from": "none", "stream": False}
    for key in ("models-key", "both-beta-key"):
        assert site.ask("POST", "/api/pull", body, key=key).status == 403
    assert site.ask("POST", "/api/pull", body, key="both-key").status == 400
    for method, path in (("POST", "pull"), ("POST", "copy"), ("POST", "create"), ("DELETE", "delete")):
        site.ask(method, f"/api/{path}", body, admin=True)
        until(lambda said=f"{method} /api/{path} by pid": said in site.log)  # type: ignore[misc]
    assert site.log.count("POST /api/pull by the key") == 1
