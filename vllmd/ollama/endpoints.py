"""The route table of Ollama's API, and what becomes of a request at each route."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from vllmd.admin.control import Control
from vllmd.api.answers import Card
from vllmd.errors import BadRequest, Forbidden, NotFound, UnknownModel, Unsupported, VllmdError
from vllmd.ollama import models, requests, schemas
from vllmd.ollama.answers import Piece, Reply, Timing, chat_piece, generate_piece
from vllmd.ollama.embedding import embed_answer, embeddings_answer
from vllmd.ollama.fields import Fields, read
from vllmd.ollama.files import Files
from vllmd.ollama.inner import Inner, Whole
from vllmd.ollama.lines import Lines, stamp
from vllmd.ollama.requests import CHAT, COMPLETIONS, EMBEDDINGS, INFILL, Translated
from vllmd.ollama.schemas import described
from vllmd.ollama.store import CONFIGURED, NoStore, Store
from vllmd.proxy.access import ADMIN, MODELS, OPEN, Reach, authorise
from vllmd.proxy.answer import UpstreamRequest
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.forward import Relay
from vllmd.proxy.gate import Target
from vllmd.proxy.http import Pairs, Request, Response, json_response, list_response, text_response
from vllmd.proxy.keep_alive import requested_keep_alive
from vllmd.proxy.large import LARGE_BYTES, in_turns
from vllmd.proxy.model_requests import parse_after_rules, quoted
from vllmd.proxy.paths import alternative_for
from vllmd.proxy.peek import ParsedBody
from vllmd.proxy.routing import LocalHandler, Route, Router

RUNNING = "Ollama is running"  # what its clients look for
VERSION = "0.24.0"  # of Ollama, whose API this is like: programs ask for it to know what they may send
DOCS: Pairs = (("link", '</docs>; rel="service-doc"'),)
ABLE = {CHAT: "chat", COMPLETIONS: "complete a prompt", EMBEDDINGS: "embed", INFILL: "fill in"}

Audited = Callable[..., LocalHandler]
Parse = Callable[[Mapping[str, Any], Target], Translated]


def add_ollama_routes(
    router: Router,
    relay: Relay,
    control: Control,
    store: Store | None = None,
    audited: Audited = lambda handler, **_: handler,
) -> None:
    """Put Ollama's routes into ``router``. Without a ``store`` nothing is fetched or deleted.

    ``audited`` notes who used one that changes which models there are.
    """
    asks, lists, changes = ModelRoutes(relay), ListRoutes(control), StoreRoutes(control, store or NoStore(), audited)
    for path, handler, takes, about in (
        ("/api/chat", asks.chat, schemas.CHAT, "a chat"),
        ("/api/generate", asks.generate, schemas.GENERATE, "an answer to a prompt, or text between two"),
        ("/api/embed", asks.embed, schemas.EMBED, "embeddings of texts"),
        ("/api/embeddings", asks.embeddings, schemas.EMBEDDINGS, "the embedding of a text, in the older form"),
    ):
        gives = {**schemas.OBJECT, **schemas.LINES} if "stream" in takes else schemas.OBJECT
        router.add_raw(Route("POST", path, handler, MODELS, f"Ollama's: {about}", described(takes, gives), Reach.ONE))
    add, one, plain = router.add, described(schemas.MODEL), described()
    add("GET", "/", lists.running, OPEN, "Ollama's: that it runs", described(gives=schemas.TEXT), Reach.NOTHING)
    add("GET", "/api/version", lists.version, OPEN, "Ollama's: its version", plain, Reach.NOTHING)
    add("GET", "/api/tags", lists.tags, MODELS, "Ollama's: the models", plain, Reach.EACH)
    add("GET", "/api/ps", lists.ps, MODELS, "Ollama's: the models that are loaded", plain, Reach.EACH)
    add("POST", "/api/show", lists.show, MODELS, "Ollama's: about a model", one, Reach.ONE)
    pulled = described(schemas.PULL, {**schemas.OBJECT, **schemas.LINES})
    add("POST", "/api/pull", changes.pull, MODELS, "Ollama's: have a model here", pulled, Reach.ONE)
    copied, created = described(schemas.COPY), described(schemas.CREATE)
    add("POST", "/api/copy", audited(changes.copy), ADMIN, "Ollama's: another name for a model", copied, Reach.MACHINE)
    add("POST", "/api/create", audited(changes.create), ADMIN, "Ollama's: another name of one", created, Reach.MACHINE)
    add("DELETE", "/api/delete", audited(changes.delete), ADMIN, "Ollama's: delete a model", one, Reach.MACHINE)
    for path, why in (
        ("/api/push", "models are not pushed anywhere"),
        ("/api/blobs/{digest}", f"files of models are not taken: {CONFIGURED}"),
    ):
        add("POST", path, refusal(why), MODELS, "Ollama's: refused", plain, Reach.NOTHING)
    add("GET", "/api/blobs/{digest}", changes.blob, MODELS, "Ollama's: whether a file is here", plain, Reach.NOTHING)


class ModelRoutes:
    """Requests that an engine answers."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def chat(self, exchange: Exchange) -> None:
        """``POST /api/chat``, by the engine's chat route."""
        await self._generate(exchange, lambda members, target: requests.chat(members), chat_piece)

    async def generate(self, exchange: Exchange) -> None:
        """``POST /api/generate``, by the engine's completion route, or that for infills."""

        def parse(members: Mapping[str, Any], target: Target) -> Translated:
            return requests.generate(members, infill=target.routes is not None and INFILL in target.routes)

        await self._generate(exchange, parse, generate_piece)

    async def embed(self, exchange: Exchange) -> None:
        """``POST /api/embed``, by the engine's embeddings route: a vector for each input."""

        def answer(translated: Translated, timing: Timing) -> Whole:
            return lambda body: embed_answer(body, translated.inputs, translated.model, timing.durations({}))

        await self._embed(
            exchange, requests.embed, answer, lambda translated: {"model": translated.model, "embeddings": []}
        )

    async def embeddings(self, exchange: Exchange) -> None:
        """``POST /api/embeddings``, likewise, for one input."""
        parse = requests.embeddings
        await self._embed(
            exchange, parse, lambda translated, timing: embeddings_answer, lambda translated: {"embedding": []}
        )

    async def _generate(self, exchange: Exchange, parse: Parse, piece: Piece) -> None:
        timing = Timing()
        translated, target = await self._read(exchange, parse)
        if translated.load:
            reason = await self._load(exchange, translated, target)
            answer = {
                "model": translated.model,
                "created_at": stamp(),
                **piece(""),
                "done": True,
                "done_reason": reason,
            }
            await exchange.respond(json_response(answer))
            return
        reply = Reply(piece, timing, thinking=translated.thinking, turns=None if translated.files else translated.turns)
        lines = Lines(translated.model, reply)
        await self._forward(exchange, translated, target, lines if translated.stream else None, lines.whole, timing)

    async def _embed(
        self,
        exchange: Exchange,
        parse: Callable[[Mapping[str, Any]], Translated],
        answer: Callable[[Translated, Timing], Whole],
        nothing: Callable[[Translated], Mapping[str, Any]],
    ) -> None:
        timing = Timing()
        translated, target = await self._read(exchange, lambda members, target: parse(members))
        if translated.load:
            await self._load(exchange, translated, target)
            await exchange.respond(json_response(nothing(translated)))
            return
        await self._forward(exchange, translated, target, None, answer(translated, timing), timing)

    async def _read(self, exchange: Exchange, parse: Parse) -> tuple[Translated, Target]:
        """Translate the request, and find its model. Raises BadRequest, UnknownModel, Forbidden."""
        request = exchange.request
        await self._relay.requests.make_plain(exchange, "application/json")
        files = Files() if len(request.body) > LARGE_BYTES else None
        members = read(request.body if files is None else await in_turns(files.take_out(request.body)))
        target = self._relay.requests.target(request, requests.model_of(members), "")
        translated = replace(parse(members, target), files=files)
        if not translated.load and target.routes is not None and translated.path not in target.routes:
            raise BadRequest(f"the model {target.model!r} does not {ABLE[translated.path]}", param="model")
        if translated.ignored:
            request.answer_fields = (
                *request.answer_fields,
                ("x-vllmd-ignored", ", ".join(map(quoted, translated.ignored))[:1000]),
            )
        exchange.model, exchange.offer = target.model, target.offer
        return translated, target

    async def _load(self, exchange: Exchange, translated: Translated, target: Target) -> str:
        """Load the model, or let it go if the keep-alive is 0. Returns the ``done_reason``, ``load`` or ``unload``."""
        gate, request = self._relay.gate, exchange.request
        seconds = requested_keep_alive(request, _keeps(translated))
        if seconds != 0:
            if self._relay.limits.now.request_timeout is not None:
                exchange.expire(self._relay.limits.now.request_timeout)
            permit = await gate.acquire(target.model, request.key, offer=target.offer)
            permit.release()
        if seconds is not None:
            gate.keep_alive(target.model, request.key, seconds)
        return "unload" if seconds == 0 else "load"

    async def _forward(
        self,
        exchange: Exchange,
        translated: Translated,
        target: Target,
        lines: Lines | None,
        whole: Whole,
        timing: Timing,
    ) -> None:
        request = exchange.request
        body = openai_body(translated, target)
        if target.rules is not None:
            body = await parse_after_rules(body.raw, target.rules, translated.path)
        upstream_request = UpstreamRequest(
            target,
            body,
            translated.path,
            public_path=translated.path,
            keep_alive=requested_keep_alive(request, _keeps(translated)),
        )
        request.body = b""  # the translated body takes its place
        exchange.charge_body(len(body.raw))

        async def parse(_: Exchange) -> UpstreamRequest:
            return upstream_request

        inner = Inner(exchange, translated.path, lines, whole, timing.sent)
        exchange.follow_pauses(inner.pause)
        try:
            await self._relay.forward(parse, inner)
        finally:
            exchange.error, exchange.message = exchange.error or inner.error, exchange.message or inner.message
            exchange.account = inner.account
            inner.close()
        if inner.response is not None:
            await exchange.respond(inner.response)


def openai_body(translated: Translated, target: Target) -> ParsedBody:
    """The body that an engine gets, with its own name for the model."""
    members = dict(translated.body)
    if translated.stream:
        members["stream"] = True
    name = json.dumps(target.served_name)
    start = len('{"model":')
    body = f'{{"model":{name},{json.dumps(members, separators=(",", ":"))[1:]}'.encode()
    if translated.files is not None:
        body = translated.files.put_back(body)
    options = (members["stream_options"],) if "stream_options" in members else ()
    return ParsedBody(
        target.served_name, translated.stream, body, start, start + len(name), True, stream_options=options
    )


def _keeps(translated: Translated) -> ParsedBody:
    return ParsedBody(translated.model, translated.stream, b"", keep_alive=(translated.keep_alive,))


class ListRoutes:
    """The routes that need no engine: lists, versions, what is loaded."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._since = time.time()

    async def running(self, request: Request) -> Response:
        """``GET /``, by which clients look whether it runs. A person with a browser is shown the way."""
        if "text/html" in request.headers.get("accept"):
            raise NotFound(f"there is no page here: {alternative_for('/')}")
        answer = text_response(RUNNING)
        answer.headers = DOCS
        return answer

    async def version(self, request: Request) -> Response:
        """``GET /api/version``: the version of Ollama's API that is spoken."""
        return json_response({"version": VERSION})

    async def tags(self, request: Request) -> Response:
        """``GET /api/tags``: what the key may use and is not hidden."""
        listed = {"models": models.names(await self._cards(request))}
        return await list_response(listed, "models", make=lambda each: models.tag(each[0], each[1], self._since))

    async def ps(self, request: Request) -> Response:
        """``GET /api/ps``: the models that are loaded."""
        cards = await self._cards(request)
        lines = (await self._control.status.status()).models
        return json_response(models.ps(cards, lines, time.time()))

    async def show(self, request: Request) -> Response:
        """``POST /api/show``. Raises UnknownModel, Forbidden."""
        name = self._control.status.called(requests.model_of(read(request.body)), request.caller)
        card = await self._control.status.model(name)
        if card is not None:
            return json_response(models.show(card, self._since))
        raise UnknownModel(f"the model {name!r} is no longer configured", param="model")

    async def _cards(self, request: Request) -> list[Card]:
        return [card for card in await self._control.status.models() if request.caller.may_use(card.id)]


class StoreRoutes:
    """The routes that add, remove and rename models."""

    def __init__(self, control: Control, store: Store, audited: Audited) -> None:
        self._control = control
        self._store = store
        self._fetch = audited(self._fetched, ends_with_client=True)

    async def pull(self, request: Request) -> Response:
        """``POST /api/pull``: nothing to do for a model that is here; others are for operators to fetch."""
        name, stream = _pulled(request)
        try:
            self._control.status.called(name, request.caller)
        except UnknownModel as error:
            if ADMIN not in request.caller.scopes:
                raise Forbidden(f"{error.message}; pulling one needs a key of the scope admin", param="model") from None
            authorise(request.caller, ADMIN, Reach.MACHINE)  # whoever may use some models only adds no others
            return await self._fetch(request)
        return await _progress(here(), stream=stream)

    async def _fetched(self, request: Request) -> Response:
        name, stream = _pulled(request)
        request.params = {"model": name}
        return await _progress(self._store.pull(name), stream=stream)

    async def delete(self, request: Request) -> Response:
        """``DELETE /api/delete``: the model and, where nothing else needs them, its files."""
        name = requests.model_of(read(request.body))
        request.params = {"model": name}
        await self._store.delete(self._control.status.called(name, request.caller))
        return Response(200)

    async def copy(self, request: Request) -> Response:
        """``POST /api/copy`` with ``source`` and ``destination``."""
        fields = Fields(read(request.body))
        await self._copied(request, fields.text("source"), fields.text("destination"))
        return Response(200)

    async def create(self, request: Request) -> Response:
        """``POST /api/create``: another name for a model (``from``); whatever would be made of it is refused."""
        members = read(request.body)
        more = sorted(set(members) - {"model", "name", "from", "stream"})
        if more or not members.get("from"):
            what = f"{', '.join(more)} cannot be made part of a model here" if more else "say from which model"
            raise Unsupported(f"{what}: variants in the configuration give a model other names and parameters")
        await self._copied(request, Fields(members).text("from"), requests.model_of(members))
        return json_response({"status": "success"})

    async def _copied(self, request: Request, source: str, name: str) -> None:
        if not source or not name:
            raise BadRequest("name both: the model that is here, and what it is to be called as well")
        request.params = {"model": name}
        await self._store.copy(self._control.status.called(source, request.caller), name.removesuffix(":latest"))

    async def blob(self, request: Request) -> Response:
        """``HEAD /api/blobs/DIGEST``: none is here."""
        raise NotFound(f"the file {request.params['digest'][:100]} is not here")


def _pulled(request: Request) -> tuple[str, bool]:
    """The model to pull, and whether to stream the progress. Raises BadRequest."""
    members = read(request.body)
    return requests.model_of(members), bool(Fields(members).flag("stream", True))


async def _progress(lines: AsyncIterator[dict[str, Any]], *, stream: bool) -> Response:
    """The lines as a stream, or only the last one."""
    if stream:
        first = await anext(lines, None)  # an error before the first line is an answer of its own, not a stream
        return Response(200, _lines(first, lines), "application/x-ndjson")
    async for last in lines:
        final = last
    return json_response(final)


def refusal(why: str) -> Callable[[Request], Awaitable[Response]]:
    """A handler that always raises Unsupported."""

    async def refuse(request: Request) -> Response:
        raise Unsupported(why)

    return refuse


async def here() -> AsyncIterator[dict[str, Any]]:
    """The progress of pulling what is here already."""
    yield {"status": "pulling manifest"}
    yield {"status": "success"}


async def _lines(first: dict[str, Any] | None, rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    if first is not None:
        yield json.dumps(first).encode() + b"\n"
    try:
        async for line in rest:
            yield json.dumps(line).encode() + b"\n"
    except VllmdError as error:  # once the answer has begun, its last line says so, as Ollama's does
        yield json.dumps(error.to_ollama()).encode() + b"\n"
