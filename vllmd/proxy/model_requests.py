"""What a request for a model asks for: one function for each way in which clients name the model.

Each reads the request and says what is to be sent to an engine, an ``UpstreamRequest``; ``forward`` sends it. None:
the client has its answer already.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import quote, unquote

from vllmd.api.names import LONGEST_NAME
from vllmd.errors import BadRequest, Forbidden, NotFound, UnknownModel
from vllmd.proxy import system_prompt
from vllmd.proxy.answer import UpstreamRequest
from vllmd.proxy.decoding import charset_of, decoded, in_utf8
from vllmd.proxy.engine_api import allows
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.gate import Gate, Rules, Target
from vllmd.proxy.http import Request, Response
from vllmd.proxy.keep_alive import WITHOUT, wish
from vllmd.proxy.large import LARGE, in_large, in_turns, ruled_large
from vllmd.proxy.limits import Limits
from vllmd.proxy.paths import INSTEAD
from vllmd.proxy.peek import Asked, in_json, in_multipart, model_name, ruled

WELL_KNOWN = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/rerank", "/v1/score", "/classify"),
    *("/pooling", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/v1/images/generations"),
)
RESPONSES_KEPT = 10_000
MOST_SEGMENTS = 16  # of a path below /upstream that can be a model's name; each number of them is looked up
JSON = "application/json"
KEY_IN_QUERY = re.compile(r"(?:^|(?<=&))(?:api[-_]?key|key|access_token|token)=", re.IGNORECASE)

quoted = lru_cache(maxsize=256)(quote)


class StoredResponses:
    """Which engine has which response of ``/v1/responses``: it keeps them only while it runs."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, str]] = OrderedDict()  # id -> engine; model as asked for

    def note(self, response_id: str, engine: str, asked: str) -> None:
        """The engine has made the response to a request for the model called ``asked``."""
        self._known[response_id] = engine, asked
        if len(self._known) > RESPONSES_KEPT:
            self._known.popitem(last=False)

    def find(self, response_id: str) -> tuple[str, str]:
        """The engine, and what the client called its model. Raises NotFound."""
        if response_id not in self._known:
            raise NotFound(f"no response {response_id!r} is known; it is kept only while its model runs")
        return self._known[response_id]

    def forget(self, engine: str) -> None:
        """The engine has ended, and its responses with it: asking for one must not start it."""
        for response_id in [kept for kept, (of, _) in self._known.items() if of == engine]:
            del self._known[response_id]


@dataclass(frozen=True)
class _Named:
    """Rules (``gate.Rules``) that give a request its model's name."""

    set: Mapping[str, object]
    strip: tuple[str, ...] = ()
    default: Mapping[str, object] = field(default_factory=dict)
    system: str = ""


class ModelRequests:
    """Works out what a request is for: one method for each way in which clients name the model."""

    def __init__(self, gate: Gate, limits: Limits) -> None:
        self.responses = StoredResponses()
        self._gate = gate
        self._limits = limits

    async def json(self, exchange: Exchange) -> UpstreamRequest:
        """A route whose JSON body names the model."""
        return await self.to_model(exchange, await self._asked(exchange), exchange.request.path)

    async def deployment(self, exchange: Exchange) -> UpstreamRequest:
        """Azure's ``/openai/deployments/{model}/...``, and OpenAI's own old form of it: the path names the model.

        What the body says of it counts for nothing, as there.
        """
        asked, request = await self._asked(exchange), exchange.request
        request.path = "/v1" + request.route.partition(":path}")[2]
        name = model_name(request.params["model"])
        if asked.model != name:
            asked = await after_rules(request.body, _Named({"model": name}), request.path)
            request.body = asked.body
        return await self.to_model(exchange, asked, request.path)

    async def _asked(self, exchange: Exchange) -> Asked:
        """What the JSON body asks for. Raises BadRequest for one that is none."""
        request = exchange.request
        if not request.headers.plain_json or not request.body.startswith(b"{") or request.body[1:2] == b"\0":
            content_type = request.headers.get("content-type")
            kind = content_type.partition(";")[0].strip().lower()
            if kind != JSON and kind != "text/json" and not kind.endswith("+json"):
                raise BadRequest("the Content-Type must be application/json")
            plain = kind == JSON and "charset" not in content_type.lower()
            request.headers.plain_json = plain and not request.headers.get("content-encoding")
            if not request.headers.plain_json or not request.body.startswith(b"{") or request.body[1:2] == b"\0":
                await self.make_plain(exchange, content_type)
            if kind != JSON:  # engines take no other name of it
                request.headers = request.headers.but("content-type", ("content-type", JSON))
        large = len(request.body) > LARGE
        return await in_turns(in_large(request.body)) if large else in_json(request.body)

    async def form(self, exchange: Exchange) -> UpstreamRequest:
        """A route whose multipart form names the model."""
        request = exchange.request
        content_type = request.headers.get("content-type")
        if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
            raise BadRequest("the Content-Type must be multipart/form-data")
        await self.make_plain(exchange, "")
        asked = await in_turns(in_multipart(request.body, content_type))
        return await self.to_model(exchange, asked, request.path)

    async def query(self, exchange: Exchange) -> UpstreamRequest:
        """A GET that asks about an engine; the query names the model, and does not go on with it."""
        request = exchange.request
        asked = Asked(request.query.get("model", ""), False, b"")
        return UpstreamRequest(self.target(request, asked.model, request.path), asked, request.path)

    async def response(self, exchange: Exchange) -> UpstreamRequest:
        """``/v1/responses/{id}`` and below: the engine that made the response is the one that has it."""
        request = exchange.request
        engine, asked = self.responses.find(request.params["id"])
        return await self.to_model(exchange, Asked(asked, False, request.body), "/v1/responses", only=engine)

    async def kserve(self, exchange: Exchange) -> UpstreamRequest:
        """``/v2/models/{model}/...``: KServe's protocol, which Triton speaks, names the model in the path."""
        request = exchange.request
        route = request.route.replace(":path}", "}")
        target = self.target(request, request.params["model"], route)

        def path_at(at: Target) -> str:
            names = {**request.params, "model": at.served_name}
            return with_query(request, re.sub(r"\{(\w+)\}", lambda name: quote(names[name[1]], safe=""), route))

        return UpstreamRequest(target, Asked("", False, request.body), path_at(target), path_at)

    async def upstream(self, exchange: Exchange) -> UpstreamRequest | None:
        """``/upstream/{model}/...``: what the engine's kind lists of its own API, under the path as it came."""
        request = exchange.request
        path = request.target[request.target.index("/upstream/") :].partition("?")[0]
        segments = path.split("/")[2:]
        most = min(len(segments), MOST_SEGMENTS)
        if most == len(segments) and self._model(request, unquote("/".join(segments))):
            # Nothing more than a model: its page is one slash further, and the client is told so. Links in a page are
            # relative to the last slash: without one they would leave the engine's own paths.
            location = f"{path}/?{request.query_string}" if request.query_string else f"{path}/"
            await exchange.respond(Response(308, headers=(("location", location), ("cache-control", "no-store"))))
            return None
        for cut in range(min(most, len(segments) - 1), 0, -1):
            name, rest = "/".join(segments[:cut]), segments[cut:]
            if len(name) > 4 * LONGEST_NAME or (target := self._model(request, unquote(name))) is None:
                continue
            if not allows(target.own_api, request.method, rest):
                what = f"{request.method} /{unquote('/'.join(rest))} is not among what is passed on"
                raise Forbidden(f"{what} to the engine of {target.model!r}: what changes it, vllmd does alone")
            onward = "/" + "/".join(rest)
            onward = f"{onward}?{request.query_string}" if request.query_string else onward  # its own clients', whole
            return UpstreamRequest(target, Asked("", False, request.body), onward, outside=f"/upstream/{name}")
        raise UnknownModel(f"no model's name begins {request.params['rest']!r}")

    def _model(self, request: Request, name: str) -> Target | None:
        """What ``name`` means, if anything. Raises Forbidden. An adapter or a variant has no API of its own."""
        try:
            target = self.target(request, name, "")
        except (UnknownModel, BadRequest):
            return None
        return None if target.offer else target

    async def to_model(self, exchange: Exchange, asked: Asked, route: str, only: str = "") -> UpstreamRequest:
        """The request as it came, for the model that was ``asked`` for, which must serve ``route``.

        ``only``: the replica that alone can answer.
        """
        request = exchange.request
        target = self.target(request, asked.model, route)
        keep_alive = wish(request, asked) if asked.keep_alive or request.headers.keep_alive != "" else None
        ours = target.rules if asked.quoted or asked.body[:1] == b"{" else None
        for rules in (ours, WITHOUT if asked.keep_alive else None):
            if rules is not None:
                asked = await after_rules(asked.body, rules, route)
                request.body = asked.body  # the one that came is held no longer
        path = quoted(request.path)
        if request.query_string:
            path = with_query(request, path)
        return UpstreamRequest(target, asked, path, only=only, public=route, keep_alive=keep_alive)

    def target(self, request: Request, name: str, route: str) -> Target:
        """What ``name`` means to this client, who asks for ``route`` ("" for none of the public ones).

        Raises UnknownModel, BadRequest, Forbidden, NotFound.
        """
        target = self._gate.resolve(name, request.caller)
        if request.caller.models is not None:
            request.caller.check(target.called, name)
        if route and target.routes is not None and route not in target.routes:
            raise unserved(target, route)
        if target.names and name not in target.names:  # found by habit (``api.names``): say what was found
            request.answer_fields = (*request.answer_fields, ("x-vllmd-model", quoted(target.called)))
        return target

    async def make_plain(self, exchange: Exchange, content_type: str) -> None:
        """Take the body out of its Content-Encoding, and JSON (of this type, "" for a form) out of another charset.

        The engine gets the plain body, and fields that say no more of what it was.
        """
        request, most = exchange.request, self._limits.now.max_body
        coding = request.headers.get("content-encoding")
        if coding and coding.lower() != "identity":
            coded = len(request.body)
            work = decoded(request.body, coding, most, lambda size: exchange.body_grew(coded + size))
            request.body = await in_turns(work)
            exchange.body_grew(len(request.body))
            request.headers = request.headers.but("content-encoding")
        if content_type and (charset := charset_of(request.body, content_type)):
            wide = len(request.body)
            work = in_utf8(request.body, charset, most, lambda size: exchange.body_grew(wide + size))
            request.body = await in_turns(work)
            exchange.body_grew(len(request.body))
            request.headers = request.headers.but("content-type", ("content-type", "application/json"))


def unserved(target: Target, route: str) -> NotFound:
    """The model does not serve this public path: why, and what it serves instead."""
    told = f"the model {target.model!r} does not serve {route}"
    if route in INSTEAD:
        return NotFound(f"{told}; {INSTEAD[route]}")
    known = [each for each in WELL_KNOWN if each in (target.routes or ())]
    served = f"it serves {', '.join(known[:4])}" if known else ""
    if target.nature:
        return NotFound(f"{told}: it is {target.nature}{served and ', ' + served}")
    return NotFound(f"{told}{served and '; ' + served}")


def with_query(request: Request, path: str) -> str:
    """``path`` with the request's own query, without what looks like a key: none reaches an engine, nor its log."""
    query = request.query_string
    if query and KEY_IN_QUERY.search(query):
        query = "&".join(each for each in query.split("&") if not KEY_IN_QUERY.match(each))
    return f"{path}?{query}" if query else path


async def after_rules(body: bytes, rules: Rules, route: str) -> Asked:
    """What a sound body of the ``route`` asks for after ``rules``."""
    prompt = system_prompt.Prompt(rules.system, route) if rules.system else None
    if len(body) > LARGE:
        return await in_turns(in_large(await in_turns(ruled_large(body, rules, prompt))))
    return in_json(ruled(body, rules, prompt))
