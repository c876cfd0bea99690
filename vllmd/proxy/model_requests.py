"""Parse a request for a model: one method for each way in which clients name the model.

Each reads a request and returns the ``UpstreamRequest`` that ``forward`` sends to an engine, or None if it has answered
the client itself.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from functools import lru_cache
from urllib.parse import quote, unquote

from vllmd.api.names import LONGEST_NAME
from vllmd.config.types import RequestRules
from vllmd.errors import BadRequest, Forbidden, NotFound, UnknownModel
from vllmd.proxy import system_prompt
from vllmd.proxy.answer import UpstreamRequest
from vllmd.proxy.decoding import charset_of, decode_body, to_utf8
from vllmd.proxy.engine_api import allows
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.gate import Gate, Target
from vllmd.proxy.http import Request, Response
from vllmd.proxy.keep_alive import WITHOUT_KEEP_ALIVE, requested_keep_alive
from vllmd.proxy.large import LARGE_BYTES, apply_rules_large, in_turns, parse_large_json_body
from vllmd.proxy.limits import Limits
from vllmd.proxy.paths import INSTEAD
from vllmd.proxy.peek import ParsedBody, apply_rules, model_name, parse_form_body, parse_json_body

WELL_KNOWN = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/rerank", "/v1/score", "/classify"),
    *("/pooling", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/v1/images/generations"),
)
MAX_RESPONSES_KEPT = 10_000
MAX_NAME_SEGMENTS = 16  # of a path below /upstream that may be a model's name; each number of them is looked up
JSON = "application/json"
BRACE = ord("{")
KEY_IN_QUERY = re.compile(r"(?:^|(?<=&))(?:api[-_]?key|key|access_token|token)=", re.IGNORECASE)

quoted = lru_cache(maxsize=256)(quote)


class StoredResponses:
    """Which engine has which response of ``/v1/responses``. An engine keeps its responses only while it runs."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, str]] = OrderedDict()  # id -> engine; the client's name of the model

    def note(self, response_id: str, engine: str, model: str) -> None:
        """The engine has made the response to a request for ``model``, as the client called it."""
        self._known[response_id] = engine, model
        if len(self._known) > MAX_RESPONSES_KEPT:
            self._known.popitem(last=False)

    def find(self, response_id: str) -> tuple[str, str]:
        """The engine, and the client's name of its model. Raises NotFound."""
        if response_id not in self._known:
            raise NotFound(f"no response {response_id!r} is known; it is kept only while its model runs")
        return self._known[response_id]

    def forget(self, engine: str) -> None:
        """The engine has ended, and its responses with it: a request for one must not start the engine."""
        for response_id in [known for known, (maker, _) in self._known.items() if maker == engine]:
            del self._known[response_id]


class ModelRequests:
    """The parsers: one method for each way in which clients name the model."""

    def __init__(self, gate: Gate, limits: Limits) -> None:
        self.responses = StoredResponses()
        self._gate = gate
        self._limits = limits

    async def json(self, exchange: Exchange) -> UpstreamRequest:
        """A route whose JSON body names the model."""
        request = exchange.request
        if is_plain(request) and len(request.body) <= LARGE_BYTES:  # the common case
            parsed = parse_json_body(request.body)
        else:
            parsed = await self._parse_json(exchange)
        return await self.to_model(exchange, parsed, request.path)

    async def deployment(self, exchange: Exchange) -> UpstreamRequest:
        """Azure's ``/openai/deployments/{model}/...``, and OpenAI's own old form of it: the path names the model.

        The body's ``model`` is replaced, as there.
        """
        parsed, request = await self._parse_json(exchange), exchange.request
        request.path = "/v1" + request.route.partition(":path}")[2]
        name = model_name(request.params["model"])
        if parsed.model != name:
            parsed = await parse_after_rules(request.body, RequestRules(set={"model": name}), request.path)
            request.body = parsed.raw
        return await self.to_model(exchange, parsed, request.path)

    async def _parse_json(self, exchange: Exchange) -> ParsedBody:
        """Parse the body of a route that takes JSON. Raises BadRequest."""
        request = exchange.request
        if not is_plain(request):
            content_type = request.headers.get("content-type")
            kind = content_type.partition(";")[0].strip().lower()
            if kind != JSON and kind != "text/json" and not kind.endswith("+json"):
                raise BadRequest("the Content-Type must be application/json")
            plain = kind == JSON and "charset" not in content_type.lower()
            request.headers.plain_json = plain and not request.headers.get("content-encoding")
            if not is_plain(request):
                await self.make_plain(exchange, content_type)
            if kind != JSON:  # engines know no other name of it
                request.headers = request.headers.but("content-type", ("content-type", JSON))
        large = len(request.body) > LARGE_BYTES
        return await in_turns(parse_large_json_body(request.body)) if large else parse_json_body(request.body)

    async def form(self, exchange: Exchange) -> UpstreamRequest:
        """A route whose multipart form names the model."""
        request = exchange.request
        content_type = request.headers.get("content-type")
        if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
            raise BadRequest("the Content-Type must be multipart/form-data")
        await self.make_plain(exchange, "")
        parsed = await in_turns(parse_form_body(request.body, content_type))
        return await self.to_model(exchange, parsed, request.path)

    async def query(self, exchange: Exchange) -> UpstreamRequest:
        """A GET for a property of an engine; the query names the model, and is not sent to the engine."""
        request = exchange.request
        parsed = ParsedBody(request.query.get("model", ""), False, b"")
        return UpstreamRequest(self.target(request, parsed.model, request.path), parsed, request.path)

    async def response(self, exchange: Exchange) -> UpstreamRequest:
        """``/v1/responses/{id}`` and below: only the engine that made the response has it."""
        request = exchange.request
        engine, model = self.responses.find(request.params["id"])
        parsed = ParsedBody(model, False, request.body)
        return await self.to_model(exchange, parsed, "/v1/responses", only_replica=engine)

    async def kserve(self, exchange: Exchange) -> UpstreamRequest:
        """``/v2/models/{model}/...``: KServe's protocol, which Triton speaks, names the model in the path."""
        request = exchange.request
        route = request.route.replace(":path}", "}")
        target = self.target(request, request.params["model"], route)

        def path_for(replica: Target) -> str:
            names = {**request.params, "model": replica.served_name}
            return with_query(request, re.sub(r"\{(\w+)\}", lambda name: quote(names[name[1]], safe=""), route))

        return UpstreamRequest(target, ParsedBody("", False, request.body), path_for(target), path_for=path_for)

    async def upstream(self, exchange: Exchange) -> UpstreamRequest | None:
        """``/upstream/{model}/...``: a path of the engine's own API, if its kind lists it, passed on as it came."""
        request = exchange.request
        path = request.target[request.target.index("/upstream/") :].partition("?")[0]
        segments = path.split("/")[2:]
        most = min(len(segments), MAX_NAME_SEGMENTS)
        if most == len(segments) and self._model(request, unquote("/".join(segments))):
            # Only the model is named: redirect to the engine's "/". Links in a page are relative to the last slash, and
            # would leave the engine's own paths without one.
            location = f"{path}/?{request.query_string}" if request.query_string else f"{path}/"
            await exchange.respond(Response(308, headers=(("location", location), ("cache-control", "no-store"))))
            return None
        for cut in range(min(most, len(segments) - 1), 0, -1):
            name, rest = "/".join(segments[:cut]), segments[cut:]
            if len(name) > 4 * LONGEST_NAME or (target := self._model(request, unquote(name))) is None:
                continue
            if not allows(target.own_api, request.method, rest):
                call = f"{request.method} /{unquote('/'.join(rest))}"
                raise Forbidden(
                    f"{call} is not passed on to the engine of {target.model!r}: vllmd passes on only what its engine "
                    "kind lists, and changes the engine's state itself"
                )
            engine_path = "/" + "/".join(rest)
            if request.query_string:  # the engine's own clients', so unlike elsewhere nothing is taken out
                engine_path += f"?{request.query_string}"
            parsed = ParsedBody("", False, request.body)
            return UpstreamRequest(target, parsed, engine_path, client_prefix=f"/upstream/{name}")
        raise UnknownModel(f"{request.params['rest']!r} does not begin with the name of a model")

    def _model(self, request: Request, name: str) -> Target | None:
        """The model called ``name``, if any; an adapter or a variant has no API of its own. Raises Forbidden."""
        try:
            target = self.target(request, name, "")
        except (UnknownModel, BadRequest):
            return None
        return None if target.offer else target

    async def to_model(
        self, exchange: Exchange, parsed: ParsedBody, route: str, only_replica: str = ""
    ) -> UpstreamRequest:
        """The request for the model that the body names, under the path as it came.

        ``route``: the public path, which the model must serve. ``only_replica``: the one that can serve the request.
        """
        request = exchange.request
        target = self.target(request, parsed.model, route)
        keep_alive = None
        if parsed.keep_alive or request.headers.keep_alive != "":
            keep_alive = requested_keep_alive(request, parsed)
        model_rules = target.rules if parsed.quoted or parsed.raw[:1] == b"{" else None
        for rules in (model_rules, WITHOUT_KEEP_ALIVE if parsed.keep_alive else None):
            if rules is not None:
                parsed = await parse_after_rules(parsed.raw, rules, route)
                request.body = parsed.raw  # so that the body that came is freed
        path = quoted(request.path)
        if request.query_string:
            path = with_query(request, path)
        return UpstreamRequest(target, parsed, path, route, only_replica, keep_alive)

    def target(self, request: Request, name: str, route: str) -> Target:
        """The model that ``name`` means to this caller, which must serve ``route`` ("" below /upstream).

        Raises UnknownModel, BadRequest, Forbidden, NotFound.
        """
        target = self._gate.resolve(name, request.caller)
        if request.caller.models is not None:
            request.caller.check(target.permit_name, name)
        if route and target.routes is not None and route not in target.routes:
            raise unserved(target, route)
        if target.names and name not in target.names:  # a similar name (``api.names``): tell which model it is
            request.answer_fields = (*request.answer_fields, ("x-vllmd-model", quoted(target.permit_name)))
        return target

    async def make_plain(self, exchange: Exchange, content_type: str) -> None:
        """Decode the body's Content-Encoding, and JSON in another charset than UTF-8 (``content_type`` "": no JSON).

        The engine gets the plain body, without the fields that said how it was encoded.
        """
        request, most = exchange.request, self._limits.now.max_body
        coding = request.headers.get("content-encoding")
        if coding and coding.lower() != "identity":
            coded = len(request.body)
            # While it is decoded, both forms are in memory, and both are charged.
            work = decode_body(request.body, coding, most, lambda size: exchange.charge_body(coded + size))
            request.body = await in_turns(work)
            exchange.charge_body(len(request.body))
            request.headers = request.headers.but("content-encoding")
        if content_type and (charset := charset_of(request.body, content_type)):
            wide = len(request.body)
            work = to_utf8(request.body, charset, most, lambda size: exchange.charge_body(wide + size))
            request.body = await in_turns(work)
            exchange.charge_body(len(request.body))
            request.headers = request.headers.but("content-type", ("content-type", "application/json"))


def is_plain(request: Request) -> bool:
    """Whether the body is as an engine can take it: JSON in UTF-8, without a Content-Encoding.

    The headers remember that they announce it: the next request on the connection mostly shares them.
    """
    body = request.body
    return request.headers.plain_json is True and len(body) > 1 and body[0] == BRACE and body[1] != 0


def unserved(target: Target, route: str) -> NotFound:
    """The model does not serve this public path: why, and what it serves instead."""
    message = f"the model {target.model!r} does not serve {route}"
    if route in INSTEAD:
        return NotFound(f"{message}; {INSTEAD[route]}")
    known = [each for each in WELL_KNOWN if each in (target.routes or ())]
    served = f"it serves {', '.join(known[:4])}" if known else ""
    if target.nature:
        return NotFound(f"{message}: it is {target.nature}{served and ', ' + served}")
    return NotFound(f"{message}{served and '; ' + served}")


def with_query(request: Request, path: str) -> str:
    """``path`` with the request's query, without parameters that look like keys: engines log what they get."""
    query = request.query_string
    if query and KEY_IN_QUERY.search(query):
        query = "&".join(each for each in query.split("&") if not KEY_IN_QUERY.match(each))
    return f"{path}?{query}" if query else path


async def parse_after_rules(body: bytes, rules: RequestRules, route: str) -> ParsedBody:
    """Apply ``rules`` to a sound body of the ``route``, and parse the result."""
    prompt = system_prompt.Prompt(rules.system, route) if rules.system else None
    if len(body) > LARGE_BYTES:
        return await in_turns(parse_large_json_body(await in_turns(apply_rules_large(body, rules, prompt))))
    return parse_json_body(apply_rules(body, rules, prompt))
