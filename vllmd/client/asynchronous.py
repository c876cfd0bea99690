"""The SDK for asyncio; the same methods as ``Client``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, cast

import httpx

from vllmd.api import answers
from vllmd.client import calls, figures
from vllmd.client.address import Address, answer_of, check, decoded, request_of
from vllmd.client.calls import Call, Message
from vllmd.client.errors import StreamFailed, of_transport
from vllmd.client.sse import Events, text_of
from vllmd.errors import Conflict

T = TypeVar("T", bound=answers.Answer)


class AsyncClient:
    """A vllmd, from asyncio.

    ``base_url`` is vllmd's address, or ``unix:/run/vllmd/admin.sock``; ``timeout`` counts in seconds for each wait for
    more of an answer. Methods raise the classes of ``vllmd.errors`` for what vllmd says, and ``Unreachable``,
    ``TimedOut`` and ``StreamFailed`` for what happens on the way. Nothing is ever sent twice.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float | None = 300) -> None:
        self.address = Address.of(base_url)
        transport = httpx.AsyncHTTPTransport(uds=self.address.socket) if self.address.socket else None
        self._http = httpx.AsyncClient(transport=transport, **self.address.options(api_key, timeout))

    async def aclose(self) -> None:
        """Close the client's connections; it cannot be used any more."""
        await self._http.aclose()

    close = aclose

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- models --------------------------------------------------------------------------------

    async def chat_completion(self, model: str, messages: Sequence[Message], **more: Any) -> dict[str, Any]:
        """OpenAI's chat completion; ``more`` are its other fields, such as ``max_tokens``."""
        return await self._object(calls.chat(model, messages, more))

    async def chat_completion_stream(
        self, model: str, messages: Sequence[Message], **more: Any
    ) -> AsyncGenerator[str, None]:
        """The text of a chat completion, piece by piece as it is made."""
        async for chunk in self.stream(calls.chat(model, messages, more)):
            if text := text_of(chunk):
                yield text

    async def text_completion(self, model: str, prompt: str | Sequence[Any], **more: Any) -> dict[str, Any]:
        """``POST /v1/completions``: the answer as a dictionary. ``more``: further members of the request."""
        return await self._object(calls.completion(model, prompt, more))

    async def text_completion_stream(
        self, model: str, prompt: str | Sequence[Any], **more: Any
    ) -> AsyncGenerator[str, None]:
        """The text of a completion, piece by piece."""
        async for chunk in self.stream(calls.completion(model, prompt, more)):
            if text := text_of(chunk):
                yield text

    async def embeddings(self, model: str, input: str | Sequence[Any], **more: Any) -> dict[str, Any]:
        """``POST /v1/embeddings``: a vector for each input. ``more``: further members of the request."""
        return await self._object(calls.embeddings(model, input, more))

    async def rerank(self, model: str, query: str, documents: Sequence[str], **more: Any) -> dict[str, Any]:
        """How well each document fits the query."""
        return await self._object(calls.rerank(model, query, documents, more))

    async def score(
        self, model: str, text_1: str | Sequence[str], text_2: str | Sequence[str], **more: Any
    ) -> dict[str, Any]:
        """``POST /v1/score``: how alike texts are. ``more``: further members of the request."""
        return await self._object(calls.score(model, text_1, text_2, more))

    async def list_models(self) -> list[dict[str, Any]]:
        """Every model, loaded or not."""
        return list((await self._object(calls.models()))["data"])

    async def get_model(self, model: str) -> dict[str, Any]:
        """One model as ``GET /v1/models/{id}`` has it. Raises UnknownModel."""
        return await self._object(calls.model(model))

    async def health(self) -> dict[str, Any]:
        """vllmd's state, its devices and models. Raises Unavailable where it is not well."""
        return await self._object(calls.health())

    # -- what an operator may: an admin key, or the admin socket ---------------------------------

    async def put_model(self, model: str, settings: Mapping[str, Any]) -> answers.Known:
        """Make a model known with the settings of vllmd.yaml(5), for as long as the daemon lives."""
        return answer_of(answers.Known, await self._object(calls.put_model(model, settings)))

    async def drop_model(self, model: str) -> answers.Dropped:
        """Have a model forgotten that was put."""
        return answer_of(answers.Dropped, await self._object(calls.drop_model(model)))

    async def fastest(self, model: str) -> tuple[str, float] | None:
        """The engine of it that answers first, and after how many seconds; None if none does, or none serves."""
        try:
            return figures.fastest(await self.probe(model))
        except Conflict:
            return None

    async def latencies(self, model: str | None = None) -> dict[str, float | None]:
        """By replica: seconds to the first byte of its answers, None where none is known. Raises UnknownModel."""
        return figures.latencies(await self.status(), model)

    async def running(self) -> list[str]:
        """The models of which an engine serves now."""
        return figures.running(await self.status())

    # -- operators' verbs, made of the table vllmd/api/verbs.py by packaging/dev/make-clients: begin

    async def load_model(self, model: str, *, wait: bool = True) -> answers.ModelLine:
        """Start or wake a model. Raises EngineFailed if the caller waits and the model does not start."""
        return await self._perform("load", answers.ModelLine, model=model, wait=wait)

    async def wake_model(self, model: str, *, wait: bool = True) -> answers.ModelLine:
        """Wake the model, or start it where it is not loaded."""
        return await self._perform("wake", answers.ModelLine, model=model, wait=wait)

    async def unload_model(self, model: str, *, force: bool = False, wait: bool = True) -> answers.ModelLine:
        """Stop a model, after its requests unless ``force``."""
        return await self._perform("unload", answers.ModelLine, model=model, force=force, wait=wait)

    async def sleep_model(self, model: str, level: int = 1, *, wait: bool = True) -> answers.ModelLine:
        """Put a model to sleep at level 1 or 2, or stop it (3)."""
        return await self._perform("sleep", answers.ModelLine, model=model, level=level, wait=wait)

    async def pin_model(self, model: str, pinned: bool = True) -> answers.ModelLine:
        """Keep a model loaded once it is, or let it be evicted again."""
        return await self._perform("pin", answers.ModelLine, model=model, pinned=pinned)

    async def disable_model(self, model: str, message: str | None = None) -> answers.ModelLine:
        """Take a model out of use, after its requests; clients get ``message`` then."""
        return await self._perform("disable", answers.ModelLine, model=model, message=message)

    async def enable_model(self, model: str) -> answers.ModelLine:
        """Serve a disabled model again, with all its replicas."""
        return await self._perform("enable", answers.ModelLine, model=model)

    async def probe(self, model: str, all: bool = False, *, limit: float | None = None) -> answers.Probed:
        """Probe the model's engines, all at once. Returns the ``fastest``, and the seconds of each of the ``replicas``.

        Without ``all`` none is waited for once another has answered; with it each has ``limit`` seconds.
        Raises Conflict where none of them serves.
        """
        return await self._perform("probe", answers.Probed, model=model, all=all, limit=limit)

    async def lease_model(self, model: str, lease: str, seconds: float | None = None) -> answers.ModelLine:
        """Keep a model loaded under the name ``lease``, for ``seconds``; the last lease to end stops it."""
        return await self._perform("lease", answers.ModelLine, model=model, lease=lease, seconds=seconds)

    async def release_model(self, model: str, lease: str, *, stop: bool = False) -> answers.ModelLine:
        """Give a lease back; ``stop``: if it was the last, stop the model at once."""
        return await self._perform("release", answers.ModelLine, model=model, lease=lease, stop=stop)

    async def preview(self, model: str, action: str) -> answers.Preview:
        """What the verb ``action`` would do with a model now; nothing is done."""
        return await self._perform("preview", answers.Preview, model=model, action=action)

    async def preview_device(self, device: int, action: str) -> answers.Preview:
        """What draining the device, or giving it back, would do; nothing is done."""
        return await self._perform("preview_device", answers.Preview, device=device, action=action)

    async def status(self) -> answers.Status:
        """The status of the daemon, its devices and its models."""
        return await self._perform("status", answers.Status)

    async def decisions(self, model: str = "") -> tuple[answers.Decision, ...]:
        """The last decisions with their numbers, oldest first."""
        return (await self._perform("decisions", answers.Decisions, model=model)).decisions

    async def plan(
        self,
        since: float | None = None,
        devices: str | None = None,
        policy: str | None = None,
        host_memory: str | None = None,
        models: Mapping[str, object] = {},
    ) -> answers.Plan:
        """Simulate the recorded traffic as it is, and with other devices, models or rules."""
        return await self._perform(
            "plan", answers.Plan, since=since, devices=devices, policy=policy, host_memory=host_memory, models=models
        )

    async def reload(self) -> answers.Reloaded:
        """Read the configuration again. Raises ConfigError where it is invalid."""
        return await self._perform("reload", answers.Reloaded)

    async def kill_process(self, pid: int, *, force: bool = False) -> answers.Killed:
        """Kill the whole engine that a process belongs to."""
        return await self._perform("kill", answers.Killed, pid=pid, force=force)

    async def drain_device(self, device: int, drained: bool = True) -> answers.Device:
        """Take a device out of use, or give it back."""
        return await self._perform("drain", answers.Device, device=device, drained=drained)

    async def suspend(self, suspended: bool = True) -> answers.Suspended:
        """Take the engines off the GPUs, or let them back. Returns those that were there."""
        return await self._perform("suspend", answers.Suspended, suspended=suspended)

    async def cached_models(self) -> tuple[answers.CachedModel, ...]:
        """The models in the engines' caches, and which served models use each."""
        return (await self._perform("cached", answers.Cached)).cached

    async def stop_download(self, model: str) -> answers.Download:
        """End a download; the part that is here is kept for the next one."""
        return await self._perform("stop-download", answers.Download, model=model)

    async def remove_model(self, model: str, *, files: bool = False, dry: bool = False) -> answers.Removed:
        """Remove an added model, and with ``files`` its files; ``dry``: only say what would go."""
        return await self._perform("remove", answers.Removed, model=model, files=files, dry=dry)

    async def keys(self) -> tuple[answers.KeyLine, ...]:
        """All keys, without their text."""
        return (await self._perform("keys", answers.Keys)).keys

    async def create_key(self, name: str, settings: Mapping[str, object] = {}) -> answers.NewKey:
        """Make a key; only this answer has its text."""
        return await self._perform("create_key", answers.NewKey, name=name, settings=settings)

    async def limit_key(self, name: str, settings: Mapping[str, object] = {}) -> answers.KeyLine:
        """Change the named settings of a key, and no others."""
        return await self._perform("limit_key", answers.KeyLine, name=name, settings=settings)

    async def revoke_key(self, name: str) -> tuple[answers.KeyLine, ...]:
        """Revoke a key. Returns the keys that are left."""
        return (await self._perform("revoke_key", answers.Keys, name=name)).keys

    async def requests(
        self,
        model: str = "",
        key: str | None = None,
        status: str = "",
        since: float | None = None,
        failed: bool = False,
        slower: float | None = None,
        limit: int = 100,
    ) -> answers.Requests:
        """The last requests and those under way that match the filters."""
        return await self._perform(
            "requests",
            answers.Requests,
            model=model,
            key=key,
            status=status,
            since=since,
            failed=failed,
            slower=slower,
            limit=limit,
        )

    async def request(self, request_id: str) -> answers.RequestInFull:
        """One of the last requests, with its head. Raises NotFound."""
        return await self._perform("request", answers.RequestInFull, request_id=request_id)

    async def cancel_request(self, request_id: str) -> tuple[answers.RequestEntry, ...]:
        """Cancel a request that waits or runs. Raises NotFound."""
        return (await self._perform("cancel", answers.Cancelled, request_id=request_id)).cancelled

    async def recordings(self) -> answers.Recordings:
        """The recordings of bodies under way, and the size of what they have kept."""
        return await self._perform("recordings", answers.Recordings)

    async def record(
        self, model: str | None = None, key: str | None = None, seconds: float = 600.0, most_bytes: int = 65536
    ) -> answers.Recordings:
        """Keep bodies, in memory, of a model's requests, a key's, or of both together."""
        return await self._perform(
            "record", answers.Recordings, model=model, key=key, seconds=seconds, most_bytes=most_bytes
        )

    async def stop_recording(self, number: int | None = None) -> answers.Recordings:
        """End one recording, or all."""
        return await self._perform("stop-recording", answers.Recordings, number=number)

    async def usage(
        self,
        by: str = "key",
        since: float | None = None,
        until: float | None = None,
        key: str | None = None,
        model: str = "",
    ) -> answers.Usage:
        """Sums of use; ``since`` and ``until``: Unix time, the last 30 days without them."""
        return await self._perform("usage", answers.Usage, by=by, since=since, until=until, key=key, model=model)

    # -- end

    # -- sending -------------------------------------------------------------------------------

    async def stream(self, call: Call) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed answer. Raises StreamFailed if it breaks off, also where a chunk says so."""
        request = request_of(self._http, Call(call.method, call.path, {**(call.body or {}), "stream": True}))
        events, begun = Events(), False
        try:
            answer = await self._http.send(request, stream=True)
            try:
                await _raise_error(answer)
                begun = True
                async for data in answer.aiter_bytes():
                    for chunk in events.feed(data):
                        yield chunk
            finally:
                await answer.aclose()
        except httpx.HTTPError as error:
            raise of_transport(error, str(self.address), begun=begun) from error
        events.end()

    async def _perform(self, verb: str, kind: type[T], **arguments: object) -> T:
        """The answer to a verb of the table. Raises UpstreamFailed for one that is not as the table says."""
        return answer_of(kind, await self._object(calls.verb(verb, arguments)))

    async def _object(self, call: Call) -> dict[str, Any]:
        try:
            answer = await self._http.send(request_of(self._http, call))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise of_transport(error, str(self.address)) from error
        return cast(dict[str, Any], decoded(answer))


async def _raise_error(answer: httpx.Response) -> None:
    if answer.status_code >= 300:
        await answer.aread()
        check(answer)
    elif "text/event-stream" not in answer.headers.get("content-type", ""):
        await answer.aread()
        raise StreamFailed(f"a stream was asked for, but the answer is {answer.headers.get('content-type')!r}")
