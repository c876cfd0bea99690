"""A request of Ollama's -> the request of OpenAI's that an engine gets. Pure."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import field
from itertools import count
from typing import Any

from vllmd.errors import BadRequest
from vllmd.frozen import frozen
from vllmd.ollama.context import Turn, decoded
from vllmd.ollama.fields import Fields, wrong
from vllmd.ollama.files import Files
from vllmd.ollama.options import translated
from vllmd.proxy.peek import NO_NAME, model_name

CHAT, COMPLETIONS, EMBEDDINGS, INFILL = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/infill"
EFFORTS = ("low", "medium", "high", "max")
MAX_LOGPROBS = 20
# (the first bytes of a file, the kind of its part of a message, its type)
FILES: tuple[tuple[bytes, str, str], ...] = (
    (rb"\x89PNG", "image", "png"),
    (rb"\xff\xd8\xff", "image", "jpeg"),
    (rb"GIF8", "image", "gif"),
    (rb"RIFF....WEBP", "image", "webp"),
    (rb"BM", "image", "bmp"),
    (rb"RIFF....WAVE", "audio", "wav"),
    (rb"ID3|\xff[\xf2\xf3\xfb]", "audio", "mp3"),
    (rb"fLaC", "audio", "flac"),
)
SNIFFED_CHARACTERS = 16  # of base64, enough for these patterns
URL_SAFE = str.maketrans("-_", "+/")


@frozen
class Translated:
    """A request in OpenAI's form: ``body`` for ``path``, without the model's name, which the relay puts in.

    ``stream`` and ``keep_alive`` are the client's, the latter as it came. ``load``: the request has no prompt, and only
    loads the model. ``ignored``: names of options without effect. ``thinking``: whether the client gets it. ``turns``:
    the conversation up to the answer, if it is returned as ``context``. ``inputs``: the number of texts to embed.
    ``files``: taken out of a large body, and put back into the body that is sent.
    """

    model: str
    path: str
    body: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    keep_alive: object = None
    load: bool = False
    ignored: tuple[str, ...] = ()
    thinking: bool = True
    turns: tuple[Turn, ...] | None = None
    inputs: int = 1
    files: Files | None = None


def chat(members: Mapping[str, Any]) -> Translated:
    """The body for the engine's chat route, from one of ``/api/chat``. Raises BadRequest."""
    request = Fields(members)
    messages = _messages(request.objects("messages"))
    body = {"messages": messages, **_tools(request), **_logprobs(request)}
    return _generated(request, CHAT, body, load=not messages)


def generate(members: Mapping[str, Any], *, infill: bool = False) -> Translated:
    """``POST /api/generate``; ``infill``: the engine has llama.cpp's route for text between. Raises BadRequest."""
    request = Fields(members)
    prompt, suffix, system = request.text("prompt"), request.text("suffix"), request.text("system")
    raw, images = request.flag("raw"), request.texts("images")
    if request.text("template"):
        if raw:
            raise BadRequest("with 'raw' there is no 'template': the prompt is taken as it is", param="template")
        why = "the engine has the model's own; send 'raw': true with a prompt that is complete"
        raise BadRequest(f"'template' cannot be used here: {why}", param="template")
    if raw and (system or request.get("context")):
        name = "system" if system else "context"
        raise BadRequest(f"with 'raw' there is no {name!r}: the prompt is taken as it is", param=name)
    if suffix:
        if infill:
            return _generated(request, INFILL, {"input_prefix": prompt, "input_suffix": suffix})
        return _generated(request, COMPLETIONS, {"prompt": prompt, "suffix": suffix, **_logprobs(request, old=True)})
    if raw:
        return _generated(request, COMPLETIONS, {"prompt": prompt, **_logprobs(request, old=True)}, load=not prompt)
    turns = decoded(request.get("context"))
    if system and ("system", system) not in turns:
        turns = [("system", system), *(turn for turn in turns if turn[0] != "system")]
    turns.append(("user", prompt))
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    messages[-1]["content"] = _content(request, prompt)
    body = {"messages": messages, **_logprobs(request)}
    return _generated(request, CHAT, body, load=not prompt and not images, turns=tuple(turns))


def embed(members: Mapping[str, Any]) -> Translated:
    """``POST /api/embed``: one text or several. Raises BadRequest."""
    request = Fields(members)
    texts = request.texts("input")
    return _embedded(request, [] if texts == [""] else texts)


def embeddings(members: Mapping[str, Any]) -> Translated:
    """``POST /api/embeddings``, the older form: one text. Raises BadRequest."""
    request = Fields(members)
    prompt = request.text("prompt")
    return _embedded(request, [prompt] if prompt else [])


def model_of(members: Mapping[str, Any], *names: str) -> str:
    """The model's name, which older clients send as ``name``. Raises BadRequest."""
    request = Fields(members)
    found = model_name(next((request.get(name) for name in names or ("model", "name") if request.get(name)), None))
    if not found:
        raise BadRequest(NO_NAME, param="model")
    return found


def _generated(
    request: Fields, path: str, body: dict[str, Any], *, load: bool = False, turns: tuple[Turn, ...] | None = None
) -> Translated:
    parameters, ignored = translated(request.object("options"))
    stream, think = request.flag("stream", True), _think(request)
    if stream and path != INFILL:
        body["stream_options"] = {"include_usage": True}
    if path == INFILL and "max_tokens" in parameters:
        parameters["n_predict"] = parameters.pop("max_tokens")
    body |= {**parameters, **_format(request), **think}
    for name in ("truncate", "shift"):
        request.flag(name)
    return Translated(
        model_name(request.get("model")),
        path,
        body,
        stream=bool(stream),
        keep_alive=request.get("keep_alive"),
        load=load,
        ignored=tuple(ignored),
        thinking=request.get("think") is not False,
        turns=turns,
    )


def _embedded(request: Fields, texts: list[str]) -> Translated:
    body: dict[str, Any] = {"input": texts, "encoding_format": "float"}
    if (dimensions := request.whole("dimensions")) is not None:
        body["dimensions"] = dimensions
    if request.flag("truncate"):
        body["truncate_prompt_tokens"] = -1  # vLLM's; other engines truncate by themselves, or cannot
    _, ignored = translated(request.object("options"))
    model, keep_alive = model_name(request.get("model")), request.get("keep_alive")
    return Translated(
        model, EMBEDDINGS, body, keep_alive=keep_alive, load=not texts, ignored=tuple(ignored), inputs=len(texts)
    )


# -- messages


def _messages(messages: Iterable[Fields]) -> list[dict[str, Any]]:
    """OpenAI's messages. Their tool calls have ids, which the results refer to; in Ollama's only the order tells."""
    found: list[dict[str, Any]] = []
    open_calls: deque[tuple[str, str]] = deque()  # id and name of calls without a result yet
    numbers = count()
    for message in messages:
        role = message.text("role").lower()
        if not role:
            raise wrong(message.path("role"), "a string such as user")
        one: dict[str, Any] = {"role": role, "content": _content(message, message.text("content"))}
        if thinking := message.text("thinking"):
            one["reasoning"] = one["reasoning_content"] = thinking
        if calls := [_call(call, next(numbers)) for call in message.objects("tool_calls")]:
            one["tool_calls"] = calls
            open_calls.extend((call["id"], call["function"]["name"]) for call in calls)
        if role == "tool":
            name = message.text("tool_name") or message.text("name")
            one["tool_call_id"] = message.text("tool_call_id") or _take_call(open_calls, name)
            if name:
                one["name"] = name
        found.append(one)
    return found


def _call(call: Fields, number: int) -> dict[str, Any]:
    function = call.object("function")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        function.object("arguments")
        arguments = json.dumps(arguments or {})
    named = {"name": function.text("name"), "arguments": arguments}
    return {"id": call.text("id") or f"call_{number}", "type": "function", "function": named}


def _take_call(open_calls: deque[tuple[str, str]], name: str) -> str:
    """Take the oldest call without a result, one of that name if there is any. Returns its id."""
    for call in open_calls:
        if call[1] == name:
            open_calls.remove(call)
            return call[0]
    return open_calls.popleft()[0] if open_calls else "call_0"


def _content(message: Fields, text: str) -> str | list[dict[str, Any]]:
    """The text, with the files of ``message`` if there are any."""
    files = message.texts("images")
    if not files:
        return text
    parts = [_file(data, f"{message.path('images')}[{place}]") for place, data in enumerate(files)]
    return [{"type": "text", "text": text}, *parts] if text else parts


def _file(data: str, name: str) -> dict[str, Any]:
    """The part of a message for an image or a sound in base64, or for an image as a data: URL. Raises BadRequest."""
    if data.startswith("data:"):
        return {"type": "image_url", "image_url": {"url": data}}
    try:
        start = base64.b64decode(data[:SNIFFED_CHARACTERS].replace("\\/", "/").translate(URL_SAFE), validate=True)
    except binascii.Error:
        start = b""
    for pattern, kind, form in FILES:
        if re.match(pattern, start, re.DOTALL):
            if kind == "audio":
                return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
            return {"type": "image_url", "image_url": {"url": f"data:image/{form};base64,{data}"}}
    raise wrong(name, "a PNG, JPEG, GIF, WebP or BMP image, or a WAV, MP3 or FLAC sound, in base64")


# -- other members


def _tools(request: Fields) -> dict[str, Any]:
    tools = []
    for tool in request.objects("tools"):
        tool.object("function").object("parameters")
        tools.append({"type": "function", "function": tool.get("function") or {}})
    return {"tools": tools} if tools else {}


def _logprobs(request: Fields, *, old: bool = False) -> dict[str, Any]:
    """The members for log probabilities. ``old``: those of /v1/completions, one number. Raises BadRequest."""
    enabled, most = request.flag("logprobs"), request.whole("top_logprobs") or 0
    if not 0 <= most <= MAX_LOGPROBS:
        raise wrong("top_logprobs", f"a whole number from 0 to {MAX_LOGPROBS}")
    if not enabled:
        return {}
    if old:
        return {"logprobs": most}
    return {"logprobs": True, "top_logprobs": most}


def _format(request: Fields) -> dict[str, Any]:
    form = request.get("format")
    if form is None or form == "":
        return {}
    if form == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(form, dict):
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": form}}}
    raise wrong("format", '"json" or a JSON schema')


def _think(request: Fields) -> dict[str, Any]:
    """The members for thinking, by all names that chat templates and engines have for it; others ignore them."""
    think = request.get("think")
    if think is None or think == "":
        return {}
    if not isinstance(think, bool) and think not in EFFORTS:
        raise wrong("think", f"true, false, or one of {', '.join(EFFORTS)}")
    effort = {"reasoning_effort": "high" if think == "max" else think} if isinstance(think, str) else {}
    return {"chat_template_kwargs": {"enable_thinking": bool(think), "thinking": bool(think)}, **effort}
