"""The SDK for programs that wait.

Made of ``asynchronous.py`` by ``packaging/dev/make-clients``: change that, and make this anew.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
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


class Client:
    """A vllmd, from Python.

    ``base_url`` is vllmd's address, or ``unix:/run/vllmd/admin.sock``; ``timeout`` counts in seconds for each wait for
    more of an answer. Methods raise the classes of ``vllmd.errors`` for what vllmd says, and ``Unreachable``,
    ``TimedOut`` and ``StreamFailed`` for what happens on the way. Nothing is ever sent twice.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float | None = 300) -> None:
        self.address = Address.of(base_url)
        transport = httpx.HTTPTransport(uds=self.address.socket) if self.address.socket else None
        self._http = httpx.Client(transport=transport, **self.address.options(api_key, timeout))

    def close(self) -> None:
        """Close the client's connections; it cannot be used any more."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- models --------------------------------------------------------------------------------

    def chat_completion(self, model: str, messages: Sequence[Message], **more: Any) -> dict[str, Any]:
        """OpenAI's chat completion; ``more`` are its other fields, such as ``max_tokens``."""
        return self._object(calls.chat(model, messages, more))

    def chat_completion_stream(
        self, model: str, messages: Sequence[Message], **more: Any
    ) -> Generator[str, None, None]:
        """The text of a chat completion, piece by piece as it is made."""
        for chunk in self.stream(calls.chat(model, messages, more)):
            if text := text_of(chunk):
                yield text

    def text_completion(self, model: str, prompt: str | Sequence[Any], **more: Any) -> dict[str, Any]:
        """``POST /v1/completions``: the answer as a dictionary. ``more``: further members of the request."""
        return self._object(calls.completion(model, prompt, more))

    def text_completion_stream(
        self, model: str, prompt: str | Sequence[Any], **more: Any
    ) -> Generator[str, None, None]:
        """The text of a completion, piece by piece."""
        for chunk in self.stream(calls.completion(model, prompt, more)):
            if text := text_of(chunk):
                yield text

    def embeddings(self, model: str, input: str | Sequence[Any], **more: Any) -> dict[str, Any]:
        """``POST /v1/embeddings``: a vector for each input. ``more``: further members of the request."""
        return self._object(calls.embeddings(model, input, more))

    def rerank(self, model: str, query: str, documents: Sequence[str], **more: Any) -> dict[str, Any]:
        """How well each document fits the query."""
        return self._object(calls.rerank(model, query, documents, more))

    def score(
        self, model: str, text_1: str | Sequence[str], text_2: str | Sequence[str], **more: Any
    ) -> dict[str, Any]:
        """``POST /v1/score``: how alike texts are. ``more``: further members of the request."""
        return self._object(calls.score(model, text_1, text_2, more))

    def list_models(self) -> list[dict[str, Any]]:
        """Every model, loaded or not."""
        return list((self._object(calls.models()))["data"])

    def get_model(self, model: str) -> dict[str, Any]:
        """One model as ``GET /v1/models/{id}`` has it. Raises UnknownModel."""
        return self._object(calls.model(model))

    def health(self) -> dict[str, Any]:
        """vllmd's state, its devices and models. Raises Unavailable where it is not well."""
        return self._object(calls.health())

    # -- what an operator may: an admin key, or the admin socket ---------------------------------

    def put_model(self, model: str, settings: Mapping[str, Any]) -> answers.Known:
        """Make a model known with the settings of vllmd.yaml(5), for as long as the daemon lives."""
        return answer_of(answers.Known, self._object(calls.put_model(model, settings)))

    def drop_model(self, model: str) -> answers.Dropped:
        """Have a model forgotten that was put."""
        return answer_of(answers.Dropped, self._object(calls.drop_model(model)))

    def fastest(self, model: str) -> tuple[str, float] | None:
        """The engine of it that answers first, and after how many seconds; None if none does, or none serves."""
        try:
            return figures.fastest(self.probe(model))
        except Conflict:
            return None

    def latencies(self, model: str | None = None) -> dict[str, float | None]:
        """By replica: seconds to the first byte of its answers, None where none is known. Raises UnknownModel."""
        return figures.latencies(self.status(), model)

    def running(self) -> list[str]:
        """The models of which an engine serves now."""
        return figures.running(self.status())

    # -- operators' verbs, made of the table vllmd/api/verbs.py by packaging/dev/make-clients: begin

    def load_model(self, model: str, *, wait: bool = True) -> answers.ModelLine:
        """Start or wake a model. Raises EngineFailed if the caller waits and the model does not start."""
        return self._perform("load", answers.ModelLine, model=model, wait=wait)

    def wake_model(self, model: str, *, wait: bool = True) -> answers.ModelLine:
        """Wake the model, or start it where it is not loaded."""
        return self._perform("wake", answers.ModelLine, model=model, wait=wait)

    def unload_model(self, model: str, *, force: bool = False, wait: bool = True) -> answers.ModelLine:
        """Stop a model, after its requests unless ``force``."""
        return self._perform("unload", answers.ModelLine, model=model, force=force, wait=wait)

    def sleep_model(self, model: str, level: int = 1, *, wait: bool = True) -> answers.ModelLine:
        """Put a model to sleep at level 1 or 2, or stop it (3)."""
        return self._perform("sleep", answers.ModelLine, model=model, level=level, wait=wait)

    def pin_model(self, model: str, pinned: bool = True) -> answers.ModelLine:
        """Keep a model loaded once it is, or let it be evicted again."""
        return self._perform("pin", answers.ModelLine, model=model, pinned=pinned)

    def disable_model(self, model: str, message: str | None = None) -> answers.ModelLine:
        """Take a model out of use, after its requests; clients get ``message`` then."""
        return self._perform("disable", answers.ModelLine, model=model, message=message)

    def enable_model(self, model: str) -> answers.ModelLine:
        """Serve a disabled model again, with all its replicas."""
        return self._perform("enable", answers.ModelLine, model=model)

    def probe(self, model: str, all: bool = False, *, limit: float | None = None) -> answers.Probed:
        """Probe the model's engines, all at once. Returns the ``fastest``, and the seconds of each of the ``replicas``.

        Without ``all`` none is waited for once another has answered; with it each has ``limit`` seconds.
        Raises Conflict where none of them serves.
        """
        return self._perform("probe", answers.Probed, model=model, all=all, limit=limit)

    def lease_model(self, model: str, lease: str, seconds: float | None = None) -> answers.ModelLine:
        """Keep a model loaded under the name ``lease``, for ``seconds``; the last lease to end stops it."""
        return self._perform("lease", answers.ModelLine, model=model, lease=lease, seconds=seconds)

    def release_model(self, model: str, lease: str, *, stop: bool = False) -> answers.ModelLine:
        """Give a lease back; ``stop``: if it was the last, stop the model at once."""
        return self._perform("release", answers.ModelLine, model=model, lease=lease, stop=stop)

    def preview(self, model: str, action: str) -> answers.Preview:
        """What the verb ``action`` would do with a model now; nothing is done."""
        return self._perform("preview", answers.Preview, model=model, action=action)

    def preview_device(self, device: int, action: str) -> answers.Preview:
        """What draining the device, or giving it back, would do; nothing is done."""
        return self._perform("preview_device", answers.Preview, device=device, action=action)

    def status(self) -> answers.Status:
        """The status of the daemon, its devices and its models."""
        return self._perform("status", answers.Status)

    def decisions(self, model: str = "") -> tuple[answers.Decision, ...]:
        """The last decisions with their numbers, oldest first."""
        return (self._perform("decisions", answers.Decisions, model=model)).decisions

    def plan(
        self,
        since: float | None = None,
        devices: str | None = None,
        policy: str | None = None,
        host_memory: str | None = None,
        models: Mapping[str, object] = {},
    ) -> answers.Plan:
        """Simulate the recorded traffic as it is, and with other devices, models or rules."""
        return self._perform(
            "plan", answers.Plan, since=since, devices=devices, policy=policy, host_memory=host_memory, models=models
        )

    def reload(self) -> answers.Reloaded:
        """Read the configuration again. Raises ConfigError where it is invalid."""
        return self._perform("reload", answers.Reloaded)

    def kill_process(self, pid: int, *, force: bool = False) -> answers.Killed:
        """Kill the whole engine that a process belongs to."""
        return self._perform("kill", answers.Killed, pid=pid, force=force)

    def drain_device(self, device: int, drained: bool = True) -> answers.Device:
        """Take a device out of use, or give it back."""
        return self._perform("drain", answers.Device, device=device, drained=drained)

    def suspend(self, suspended: bool = True) -> answers.Suspended:
        """Take the engines off the GPUs, or let them back. Returns those that were there."""
        return self._perform("suspend", answers.Suspended, suspended=suspended)

    def cached_models(self) -> tuple[answers.CachedModel, ...]:
        """The models in the engines' caches, and which served models use each."""
        return (self._perform("cached", answers.Cached)).cached

    def stop_download(self, model: str) -> answers.Download:
        """End a download; the part that is here is kept for the next one."""
        return self._perform("stop-download", answers.Download, model=model)

    def remove_model(self, model: str, *, files: bool = False, dry: bool = False) -> answers.Removed:
        """Remove an added model, and with ``files`` its files; ``dry``: only say what would go."""
        return self._perform("remove", answers.Removed, model=model, files=files, dry=dry)

    def keys(self) -> tuple[answers.KeyLine, ...]:
        """All keys, without their text."""
        return (self._perform("keys", answers.Keys)).keys

    def create_key(self, name: str, settings: Mapping[str, object] = {}) -> answers.NewKey:
        """Make a key; only this answer has its text."""
        return self._perform("create_key", answers.NewKey, name=name, settings=settings)

    def limit_key(self, name: str, settings: Mapping[str, object] = {}) -> answers.KeyLine:
        """Change the named settings of a key, and no others."""
        return self._perform("limit_key", answers.KeyLine, name=name, settings=settings)

    def revoke_key(self, name: str) -> tuple[answers.KeyLine, ...]:
        """Revoke a key. Returns the keys that are left."""
        return (self._perform("revoke_key", answers.Keys, name=name)).keys

    def requests(
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
        return self._perform(
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

    def request(self, request_id: str) -> answers.RequestInFull:
        """One of the last requests, with its head. Raises NotFound."""
        return self._perform("request", answers.RequestInFull, request_id=request_id)

    def cancel_request(self, request_id: str) -> tuple[answers.RequestEntry, ...]:
        """Cancel a request that waits or runs. Raises NotFound."""
        return (self._perform("cancel", answers.Cancelled, request_id=request_id)).cancelled

    def recordings(self) -> answers.Recordings:
        """The recordings of bodies under way, and the size of what they have kept."""
        return self._perform("recordings", answers.Recordings)

    def record(
        self, model: str | None = None, key: str | None = None, seconds: float = 600.0, most_bytes: int = 65536
    ) -> answers.Recordings:
        """Keep bodies, in memory, of a model's requests, a key's, or of both together."""
        return self._perform("record", answers.Recordings, model=model, key=key, seconds=seconds, most_bytes=most_bytes)

    def stop_recording(self, number: int | None = None) -> answers.Recordings:
        """End one recording, or all."""
        return self._perform("stop-recording", answers.Recordings, number=number)

    def usage(
        self,
        by: str = "key",
        since: float | None = None,
        until: float | None = None,
        key: str | None = None,
        model: str = "",
    ) -> answers.Usage:
        """Sums of use; ``since`` and ``until``: Unix time, the last 30 days without them."""
        return self._perform("usage", answers.Usage, by=by, since=since, until=until, key=key, model=model)

    # -- end

    # -- sending -------------------------------------------------------------------------------

    def stream(self, call: Call) -> Generator[dict[str, Any], None, None]:
        """The chunks of a streamed answer. Raises StreamFailed if it breaks off, also where a chunk says so."""
        request = request_of(self._http, Call(call.method, call.path, {**(call.body or {}), "stream": True}))
        events, begun = Events(), False
        try:
            answer = self._http.send(request, stream=True)
            try:
                _raise_error(answer)
                begun = True
                for data in answer.iter_bytes():
                    yield from events.feed(data)
            finally:
                answer.close()
        except httpx.HTTPError as error:
            raise of_transport(error, str(self.address), begun=begun) from error
        events.end()

    def _perform(self, verb: str, kind: type[T], **arguments: object) -> T:
        """The answer to a verb of the table. Raises UpstreamFailed for one that is not as the table says."""
        return answer_of(kind, self._object(calls.verb(verb, arguments)))

    def _object(self, call: Call) -> dict[str, Any]:
        try:
            answer = self._http.send(request_of(self._http, call))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise of_transport(error, str(self.address)) from error
        return cast(dict[str, Any], decoded(answer))


def _raise_error(answer: httpx.Response) -> None:
    if answer.status_code >= 300:
        answer.read()
        check(answer)
    elif "text/event-stream" not in answer.headers.get("content-type", ""):
        answer.read()
        raise StreamFailed(f"a stream was asked for, but the answer is {answer.headers.get('content-type')!r}")
