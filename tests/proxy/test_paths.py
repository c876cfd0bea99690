"""Paths as clients write them: served as meant, or refused with where to go; a spelling opens nothing by itself."""

from __future__ import annotations

import contextlib
import errno
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.proxy.engine_routes import LLAMA_SERVER_ROUTES, VLLM_ROUTES, table
from vllmd.admin.public import add_public
from vllmd.config.types import ServerConfig
from vllmd.daemon.other_routes import PageEndpoints, add_others
from vllmd.errors import Forbidden, MethodNotAllowed, NotFound, VllmdError
from vllmd.proxy.access import ADMIN, EVERYTHING, READ, Caller
from vllmd.proxy.forward import Relay
from vllmd.proxy.heads import split_target
from vllmd.proxy.http import Headers, Request
from vllmd.proxy.limits import Limits
from vllmd.proxy.models import add_model_routes
from vllmd.proxy.routing import OPERATORS, Route, Router, compiled

CALLER = Caller("k", EVERYTHING - {ADMIN, READ}, refusal=lambda: Forbidden("not yours"))


class ByScope:
    """Lets in whoever asks for no more than a model."""

    def identify(self, request: Request) -> Caller:
        return CALLER


class Anything:
    """Stands for the daemon: the table is looked at, nothing is called."""

    def __getattr__(self, name: str) -> Anything:
        return self


def router() -> Router:
    """All routes of a listener, as ``daemon.listeners`` puts them in."""
    found = Router(ByScope())
    relay = Relay(SimpleNamespace(), Limits(ServerConfig()))  # type: ignore[arg-type]
    add_public(found, Anything())  # type: ignore[arg-type]
    add_model_routes(found, relay)
    found.add_later(lambda: add_others(found, PageEndpoints(*[Anything()] * 4, []), relay, Anything()))  # type: ignore[arg-type]
    return found


ROUTER = router()


def test_what_is_added_later_is_what_no_other_route_fits() -> None:
    """So that it makes no difference when it is added."""
    first = Router()
    add_public(first, Anything())  # type: ignore[arg-type]
    add_model_routes(first, Relay(SimpleNamespace(), Limits(ServerConfig())))  # type: ignore[arg-type]
    known = {(route.method, route.pattern) for route in first.routes}
    later = [route for route in ROUTER.routes if (route.method, route.pattern) not in known]
    assert len(later) > 70
    for route in later:
        path = re.sub(r"\{\w+(:path)?\}", "x", route.pattern)
        assert not any(compiled(each.pattern).fullmatch(path) for each in first.routes), route.pattern


def test_routes_are_added_when_a_path_is_none_of_those_there_are() -> None:
    """Once, and another time if it failed: an import may, of a process without a descriptor left."""
    asked, outcomes = Router(), [OSError(errno.EMFILE, "full"), None]
    asked.add_raw(Route("GET", "/first", Anything()))

    def add() -> None:
        if failed := outcomes.pop(0):
            raise failed
        asked.add_raw(Route("GET", "/later/{name}", Anything()))

    asked.add_later(add)
    asked.begin(sent("GET", "/first"))
    assert len(outcomes) == 2
    with pytest.raises(OSError, match="full"):
        asked.begin(sent("GET", "/later/a"))
    later = sent("GET", "/later/a")
    asked.begin(later)
    assert (later.route, later.params, outcomes) == ("/later/{name}", {"name": "a"}, [])
    with pytest.raises(NotFound):
        asked.begin(sent("GET", "/neither"))


def sent(method: str, target: str) -> Request:
    """A request with this target."""
    path, query = split_target(method, target, "")
    return Request(method, target, path, query, Headers())


@pytest.mark.parametrize(("method", "path"), table(VLLM_ROUTES) + table(LLAMA_SERVER_ROUTES))
def test_whatever_engines_serve_is_served_or_answered_with_where_to_go(method: str, path: str) -> None:
    """A client that was made for vLLM or llama-server is never told 404 and nothing else."""
    told = ""
    try:
        ROUTER.begin(sent(method, path))
    except (MethodNotAllowed, NotFound) as error:
        told = error.message
    except Forbidden:  # it is served, for operators
        assert path.endswith("load_lora_adapter")
    assert "GET /v1/models lists the models" not in told
    assert "does not take" not in told or (method, path) == ("POST", "/props")  # which changes what everybody gets


@pytest.mark.parametrize(
    ("target", "route"),
    [
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/v1/chat/completions/", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/chat/completions/", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/openai/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/chat/completions", "/v1/chat/completions"),
        ("/api/chat/completions", "/v1/chat/completions"),
        ("/v1beta/openai/chat/completions", "/v1/chat/completions"),
        ("/v1/openai/chat/completions", "/v1/chat/completions"),
        ("/api/v0/chat/completions", "/v1/chat/completions"),
        ("/engines/llama.cpp/v1/chat/completions", "/v1/chat/completions"),
        ("/llm/v1/chat/completions/", "/v1/chat/completions"),
        ("/a/v1/b/v1/chat/completions", "/v1/chat/completions"),
        ("/ollama/api/chat", "/api/chat"),
        ("/ollama/v1/chat/completions", "/v1/chat/completions"),
        ("/anthropic/v1/messages", "/v1/messages"),
        ("/responses", "/v1/responses"),
        ("/messages", "/v1/messages"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/reranking", "/v1/rerank"),
        ("/reranking", "/rerank"),
        ("/audio/transcriptions", "/v1/audio/transcriptions"),
        ("/v1/classify", "/classify"),
    ],
)
def test_what_is_meant_is_served(target: str, route: str) -> None:
    """The path that the engine sees is the plain one, and the answer says so."""
    request = sent("POST", target)
    ROUTER.begin(request)
    assert (request.route, request.path) == (route, route)
    assert ("x-vllmd-path", route) in request.answer_fields


@pytest.mark.parametrize(
    ("target", "route", "scope"),
    [
        ("/models", "/v1/models", "models"),
        ("/v1/models/", "/v1/models", "models"),
        ("/models/org/name", "/v1/models/{model:path}", "models"),
        ("/v1/health", "/health", "health"),
        ("/v1/metrics", "/metrics", "metrics"),
        ("//health/live", "/health/live", "open"),
        ("/healthz", "/health", "health"),
        ("/livez", "/health/live", "open"),
        ("/proxy/v1/models", "/v1/models", "models"),
        ("//admin/status", "/admin/status", "read"),
        ("/admin/status/", "/admin/status", "read"),
        ("/v1/admin/status", "/admin/status", "read"),
    ],
)
def test_reading_is_forgiven_too(target: str, route: str, scope: str) -> None:
    """With the scope of the route that is meant, so that no rule of a reverse proxy need keep a path away."""
    request = sent("GET", target)
    with contextlib.nullcontext() if scope not in OPERATORS else pytest.raises(Forbidden):
        ROUTER.begin(request)
    assert request.route == route
    assert next(each.scope for each in ROUTER.routes if each.pattern == route) == scope


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/files/x", "/files", "/v1/batches", "/v1/usage", "/upstream/", "/v1/complete"]
)
def test_what_others_serve_and_we_do_not_is_answered_with_where_to_go(path: str) -> None:
    """OpenAI's own service has more than engines have."""
    with pytest.raises(NotFound) as caught:
        ROUTER.begin(sent("GET", path))
    assert "GET /v1/models lists the models" not in caught.value.message


@pytest.mark.parametrize(
    ("path", "meant"),
    [("/v1/chat/completion", "/v1/chat/completions"), ("/v1/embedings", "/v1/embeddings"), ("/v1/nothing", "")],
)
def test_a_misspelt_path_is_told_the_one_that_was_meant(path: str, meant: str) -> None:
    """The commonest mistake by hand is one letter; operators' paths are suggested to nobody."""
    with pytest.raises(NotFound) as caught:
        ROUTER.begin(sent("POST", path))
    assert (f"did you mean {meant}?" in caught.value.message) == bool(meant)
    with pytest.raises(NotFound) as caught:
        ROUTER.begin(sent("GET", "/admin/statu"))
    assert "did you mean" not in caught.value.message


def test_a_path_that_is_right_gets_no_header() -> None:
    """There is nothing to tell."""
    request = sent("POST", "/v1/chat/completions")
    ROUTER.begin(request)
    assert request.answer_fields == ()


@given(
    st.sampled_from([route for route in ROUTER.routes if "{" not in route.pattern]),
    st.lists(st.sampled_from(["slash", "v1", "tail", "openai", "api", "root"]), max_size=4),
)
def test_no_spelling_gets_around_a_scope(route: object, changes: list[str]) -> None:
    """Whatever a path was changed by: who gets in gets in by the scope of the route that answers."""
    path = route.pattern  # type: ignore[attr-defined]
    for change in changes:
        path = {
            "slash": "/" + path,
            "v1": "/v1" + path,
            "tail": path + "/",
            "openai": "/openai" + path,
            "root": "/any/v1" + path,
            "api": "/api" + path,
        }[change]
    request = sent(route.method, path)  # type: ignore[attr-defined]
    try:
        ROUTER.begin(request)
    except VllmdError:
        return
    found = next(each for each in ROUTER.routes if each.pattern == request.route)
    assert found.scope in CALLER.scopes
