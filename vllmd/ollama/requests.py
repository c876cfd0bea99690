"""A request of Ollama's -> the request of OpenAI's that an engine gets. Pure."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from vllmd.errors import BadRequest
from vllmd.ollama.context import Turn, decoded
from vllmd.ollama.fields import Fields, wrong
from vllmd.ollama.files import Files
from vllmd.ollama.options import translated
from vllmd.proxy.peek import NO_NAME, model_name

CHAT, COMPLETIONS, EMBEDDINGS, INFILL = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/infill"
EFFORTS = ("low", "medium", "high", "max")
MOST_LOGPROBS = 20
# What a file begins with -> what kind of part of a message it is, and its type
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
SNIFFED = 16  # base64 characters that are enough for it
URL_SAFE = str.maketrans("-_", "+/")


@dataclass(frozen=True, slots=True)
class Translated:
    """What the engine is asked: ``body`` at ``path``, without the model's name, which the relay puts in.

    ``stream`` and ``keep_alive`` (as it came) are the client's wishes; ``load``: there is nothing to be asked, the
    model shall only be there. ``ignored``: options without effect. ``thinking``: False where the client wants none
    shown. ``said``: the conversation up to the answer, where that is to be given back as ``context``. ``inputs``: how
    many texts are embedded. ``files``: those that were taken out of a large body, and go back into what is sent.
    """

    model: str
    path: str
    body: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    keep_alive: object = None
    load: bool = False
    ignored: tuple[str, ...] = ()
    thinking: bool = True
    said: tuple[Turn, ...] | None = None
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
    said = decoded(request.get("context"))
    if system and ("system", system) not in said:
        said = [("system", system), *(turn for turn in said if turn[0] != "system")]
    said.append(("user", prompt))
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
    messages[-1]["content"] = _content(request, prompt)
    body = {"messages": messages, **_logprobs(request)}
    return _generated(request, CHAT, body, load=not prompt and not images, said=tuple(said))


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
    request: Fields, path: str, body: dict[str, Any], *, load: bool = False, said: tuple[Turn, ...] | None = None
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
        said=said,
    )


def _embedded(request: Fields, texts: list[str]) -> Translated:
    body: dict[str, Any] = {"input": texts, "encoding_format": "float"}
    if (dimensions := request.whole("dimensions")) is not None:
        body["dimensions"] = dimensions
    if request.flag("truncate"):
        body["truncate_prompt_tokens"] = -1  # vLLM's; the others truncate by themselves or have no such thing
    _, ignored = translated(request.object("options"))
    model, keep_alive = model_name(request.get("model")), request.get("keep_alive")
    return Translated(
        model, EMBEDDINGS, body, keep_alive=keep_alive, load=not texts, ignored=tuple(ignored), inputs=len(texts)
    )


# -- messages


def _messages(messages: Iterable[Fields]) -> list[dict[str, Any]]:
    """OpenAI's messages. There calls of tools have ids, by which results name them; Ollama's go by their order."""
    found: list[dict[str, Any]] = []
    open_calls: deque[tuple[str, str]] = deque()  # id and name of those that have no result yet
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
            one["tool_call_id"] = message.text("tool_call_id") or _answered(open_calls, name)
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


def _answered(open_calls: deque[tuple[str, str]], name: str) -> str:
    """The id of the oldest call without a result, of that name if there is one."""
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
    """An image or a sound in base64, or an image that is a URL with its data already."""
    if data.startswith("data:"):
        return {"type": "image_url", "image_url": {"url": data}}
    start = _bytes(data[:SNIFFED])
    for pattern, kind, form in FILES:
        if re.match(pattern, start, re.DOTALL):
            if kind == "audio":
                return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
            return {"type": "image_url", "image_url": {"url": f"data:image/{form};base64,{data}"}}
    raise wrong(name, "a PNG, JPEG, GIF, WebP or BMP image, or a WAV, MP3 or FLAC sound, in base64")


def _bytes(text: str) -> bytes:
    """What the beginning of a base64 text stands for; nothing if it is none."""
    try:
        return base64.b64decode(text.replace("\\/", "/").translate(URL_SAFE), validate=True)
    except binascii.Error:
        return b""


# -- what else there is


def _tools(request: Fields) -> dict[str, Any]:
    tools = []
    for tool in request.objects("tools"):
        tool.object("function").object("parameters")
        tools.append({"type": "function", "function": tool.get("function") or {}})
    return {"tools": tools} if tools else {}


def _logprobs(request: Fields, *, old: bool = False) -> dict[str, Any]:
    """``old``: of /v1/completions, where it is one number."""
    wanted, most = request.flag("logprobs"), request.whole("top_logprobs") or 0
    if not 0 <= most <= MOST_LOGPROBS:
        raise wrong("top_logprobs", f"a whole number from 0 to {MOST_LOGPROBS}")
    if not wanted:
        return {}
    if old:
        return {"logprobs": most}
    return {"logprobs": True, "top_logprobs": most}


def _format(request: Fields) -> dict[str, Any]:
    wanted = request.get("format")
    if wanted is None or wanted == "":
        return {}
    if wanted == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(wanted, dict):
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}}}
    raise wrong("format", '"json" or a JSON schema')


def _think(request: Fields) -> dict[str, Any]:
    """What chat templates and engines call it; those that know nothing of it pass over it."""
    wanted = request.get("think")
    if wanted is None or wanted == "":
        return {}
    if not isinstance(wanted, bool) and wanted not in EFFORTS:
        raise wrong("think", f"true, false, or one of {', '.join(EFFORTS)}")
    effort = {"reasoning_effort": "high" if wanted == "max" else wanted} if isinstance(wanted, str) else {}
    return {"chat_template_kwargs": {"enable_thinking": bool(wanted), "thinking": bool(wanted)}, **effort}
