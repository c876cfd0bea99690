"""Chat, completions, responses and messages: the routes that generate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from vllmd.simengine.context import Context, Refused, bad_request, error_content, missing, usage
from vllmd.simengine.http import Connection, Request, dump
from vllmd.simengine.state import CallFailed, Job
from vllmd.simengine.text import answer, content_text, token_id, token_text, tokens

_DONE = b"data: [DONE]\n\n"
_KEPT_RESPONSES = 1000


def _data(content: Any) -> bytes:
    return b"data: " + dump(content) + b"\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return f"event: {content['type']}\n".encode() + _data(content)


def _limit(body: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or value < 1:
            raise bad_request(f"{name} must be at least 1, got {value}.", name)
        return value
    return None


def _job(context: Context, body: dict[str, Any], prompt: str, prompt_tokens: int, limit: int | None) -> Job:
    least = body.get("min_tokens") or 0
    fill = bool(body.get("ignore_eos")) or least > len(tokens(prompt))
    context.check_length(prompt_tokens, limit)
    if body.get("model") in context.adapters:
        prompt = prompt.upper()
    words, finish = answer(prompt, limit=limit or (least if fill else None), fill=fill)
    return Job(prompt_tokens, words, finish)


async def _whole(context: Context, job: Job) -> str:
    return "".join([token async for token in context.state.run(job)])


# Chat


@dataclass(frozen=True, slots=True)
class _Chat:
    """One chat request's unchanging parts."""

    id: str
    created: int
    model: str
    job: Job
    tool: str  # the function that is called instead of answering; "" for none

    def chunk(self, delta: dict[str, Any], finish: str | None = None, *, counted: bool = False) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        more = {"usage": usage(self.job.prompt_tokens, self.job.sent)} if counted else {}
        return self._chunk([choice], **more)

    def usage(self) -> bytes:
        return self._chunk([], usage=usage(self.job.prompt_tokens, self.job.sent))

    def _chunk(self, choices: list[Any], **more: Any) -> bytes:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return _data(head | {"choices": choices} | more)

    @property
    def finish(self) -> str:
        return "tool_calls" if self.tool and self.job.finish == "stop" else self.job.finish

    def call(self, arguments: str) -> dict[str, Any]:
        function = {"name": self.tool, "arguments": arguments}
        return {"id": f"call-{self.id}", "type": "function", "function": function}


async def chat(context: Context, request: Request, out: Connection) -> None:
    """POST /v1/chat/completions: the last message's words; a call of the first tool if tools are given."""
    body = context.body(request)
    messages = _messages(body)
    tool = _tool(body, messages)
    text = content_text(messages[-1].get("content"))
    job = _job(context, body, text, _count(messages), _limit(body, "max_completion_tokens", "max_tokens"))
    if tool:
        job.answer, job.finish = tokens(dump({"text": text}).decode()), "stop"  # the function's arguments
    started = _Chat(context.request_id(request, "chatcmpl"), context.created, context.name(body), job, tool)
    if body.get("stream"):
        return await _stream(out, _chat_chunks(context, started, _stream_options(body)))
    content = await _whole(context, job)
    return await out.send_json(200, _chat_answer(started, content))


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise missing("messages")
    return messages


def _count(messages: list[dict[str, Any]]) -> int:
    return sum(len(tokens(content_text(message.get("content")))) for message in messages)


def _tool(body: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    choice, tools = body.get("tool_choice", "auto"), body.get("tools") or []
    if choice == "none" or not tools or messages[-1].get("role") == "tool":
        return ""
    named = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    return str(named or tools[0].get("function", {}).get("name", ""))


def _stream_options(body: dict[str, Any]) -> dict[str, Any]:
    options = body.get("stream_options") or {}
    return options if isinstance(options, dict) else {}


def _chat_answer(chat: _Chat, content: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": None}
    message |= {"audio": None, "function_call": None, "reasoning": None}
    if chat.tool:
        message |= {"content": None, "tool_calls": [chat.call(content)]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": chat.finish, "stop_reason": None}
    head = {"id": chat.id, "object": "chat.completion", "created": chat.created, "model": chat.model}
    tail = {"service_tier": None, "system_fingerprint": None, "prompt_logprobs": None, "kv_transfer_params": None}
    return head | {"choices": [choice]} | {"usage": usage(chat.job.prompt_tokens, chat.job.sent)} | tail


async def _chat_chunks(context: Context, chat: _Chat, options: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    first = True
    async with aclosing(context.state.run(chat.job)) as words:
        async for token in words:
            if first:
                call = {"tool_calls": [{"index": 0, **chat.call("")}]} if chat.tool else {}
                yield chat.chunk({"role": "assistant", "content": "", **call})
                first = False
            finish = chat.finish if chat.job.cut else None
            delta: dict[str, Any] = {"content": token}
            if chat.tool:
                delta = {"tool_calls": [{"index": 0, "function": {"arguments": token}}]}
            yield chat.chunk(delta, finish, counted=bool(options.get("continuous_usage_stats")))
    if first:
        yield chat.chunk({"role": "assistant", "content": ""})
    if not chat.job.cut:
        yield chat.chunk({"content": ""}, chat.finish)
    if options.get("include_usage"):
        yield chat.usage()
    yield _DONE


async def _stream(out: Connection, chunks: AsyncGenerator[bytes, None]) -> None:
    """Send server-sent events as they come. The head waits for the first, so that errors before it have a status."""
    async with aclosing(chunks):
        async for chunk in chunks:
            if not out.streaming:
                await out.start(200, "text/event-stream; charset=utf-8")
            await out.write(chunk)
    await out.end()


async def stream_failed(out: Connection, error: CallFailed) -> None:
    """An error after the head has gone: an error event and [DONE], under status 200, as vLLM does."""
    await out.write(_data(error_content(str(error), "InternalServerError", 500)))
    await out.write(_DONE)
    await out.end()


# Completions


async def completions(context: Context, request: Request, out: Connection) -> None:
    """POST /v1/completions: the prompt's words, once more."""
    body = context.body(request)
    prompts = _prompts(body)
    limit = _limit(body, "max_tokens") or 16
    jobs = [_job(context, body, prompt, len(tokens(prompt)), limit) for prompt in prompts]
    head: dict[str, Any] = {"id": context.request_id(request, "cmpl"), "object": "text_completion"}
    head |= {"created": context.created, "model": context.name(body)}
    if body.get("stream"):
        return await _stream(out, _completion_chunks(context, jobs, head, _stream_options(body)))
    texts = await asyncio.gather(*(_whole(context, job) for job in jobs))
    choices = [_choice(i, text, job.finish) for i, (text, job) in enumerate(zip(texts, jobs, strict=True))]
    return await out.send_json(200, head | {"choices": choices, "usage": _total(jobs)})


def _prompts(body: dict[str, Any]) -> list[str]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, int) for part in prompt):
            return ["".join(token_text(part) for part in prompt)]
        return [text for part in prompt for text in _prompts({"prompt": part})]
    raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}


def _total(jobs: list[Job]) -> dict[str, Any]:
    return usage(sum(job.prompt_tokens for job in jobs), sum(job.sent for job in jobs))


async def _completion_chunks(
    context: Context, jobs: list[Job], head: dict[str, Any], options: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    for index, job in enumerate(jobs):
        async with aclosing(context.state.run(job)) as words:
            async for token in words:
                yield _data(head | {"choices": [_choice(index, token, job.finish if job.cut else None)]})
        if not job.cut:
            yield _data(head | {"choices": [_choice(index, "", job.finish)]})
    if options.get("include_usage"):
        yield _data(head | {"choices": [], "usage": _total(jobs)})
    yield _DONE


# Responses


async def responses(context: Context, request: Request, out: Connection) -> None:
    """POST /v1/responses, streamed, in one piece, or in the background."""
    body = context.body(request)
    text, count = _input(body)
    job = _job(context, body, text, count, _limit(body, "max_output_tokens"))
    response = _new_response(context, context.request_id(request, "resp", "_"), body)
    if body.get("store", True):
        context.responses[response["id"]] = response
        while len(context.responses) > _KEPT_RESPONSES:
            oldest = next(iter(context.responses))
            del context.responses[oldest]
            context.background.pop(oldest, None)
    if body.get("stream"):
        return await _stream(out, _response_events(context, job, response))
    if body.get("background"):
        response["status"] = "queued"
        _in_background(context, job, response)
    else:
        _complete(response, await _whole(context, job), job)
    return await out.send_json(200, response)


def _input(body: dict[str, Any]) -> tuple[str, int]:
    given = body.get("input")
    if isinstance(given, str):
        return given, len(tokens(given))
    if isinstance(given, list) and given and all(isinstance(item, dict) for item in given):
        return content_text(given[-1].get("content", given[-1].get("output"))), _count(given)
    raise missing("input")


def _new_response(context: Context, name: str, body: dict[str, Any]) -> dict[str, Any]:
    head = {"id": name, "created_at": context.created, "object": "response", "model": context.name(body)}
    asked = {"instructions": body.get("instructions"), "metadata": body.get("metadata")}
    asked |= {"tool_choice": body.get("tool_choice", "auto"), "tools": body.get("tools") or []}
    asked |= {"temperature": body.get("temperature", 1.0), "top_p": body.get("top_p", 1.0)}
    state: dict[str, Any] = {"status": "in_progress", "output": [], "usage": None}
    state |= {"incomplete_details": None}
    return head | asked | {"parallel_tool_calls": True, "background": bool(body.get("background"))} | state


def _in_background(context: Context, job: Job, response: dict[str, Any]) -> None:
    async def work() -> None:
        response["status"] = "in_progress"
        try:
            _complete(response, await _whole(context, job), job)
        except asyncio.CancelledError:
            response["status"] = "cancelled"

    context.background[response["id"]] = asyncio.ensure_future(work())


def _complete(response: dict[str, Any], text: str, job: Job) -> None:
    response["status"] = "completed" if job.finish == "stop" else "incomplete"
    if job.finish == "length":
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    response["output"] = [_message(response["id"], text)]
    response["usage"] = {
        "input_tokens": job.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": job.sent,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.prompt_tokens + job.sent,
    }


def _message(name: str, text: str, status: str = "completed") -> dict[str, Any]:
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
    content = [part] if text else []
    return {"id": f"msg-{name}", "type": "message", "role": "assistant", "status": status, "content": content}


async def _response_events(context: Context, job: Job, response: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    number = iter(range(1 << 62))
    place = {"item_id": f"msg-{response['id']}", "output_index": 0, "content_index": 0}

    def event(kind: str, **more: Any) -> bytes:
        return _event({"type": f"response.{kind}", "sequence_number": next(number), **more})

    text = ""
    async with aclosing(context.state.run(job)) as words:
        async for token in words:
            if not text:
                yield event("created", response=response)
                yield event("in_progress", response=response)
                yield event("output_item.added", output_index=0, item=_message(response["id"], "", "in_progress"))
                yield event("content_part.added", **place, part={"type": "output_text", "text": "", "annotations": []})
            text += token
            yield event("output_text.delta", **place, delta=token, logprobs=[])
    _complete(response, text, job)
    yield event("output_text.done", **place, text=text, logprobs=[])
    yield event("content_part.done", **place, part={"type": "output_text", "text": text, "annotations": []})
    yield event("output_item.done", output_index=0, item=_message(response["id"], text))
    yield event("completed", response=response)  # also when it is incomplete


async def get_response(context: Context, request: Request, out: Connection) -> None:
    """``GET /v1/responses/ID``. Raises Refused for one that is not stored."""
    await out.send_json(200, _stored(context, request.path.split("/")[3]))


async def cancel_response(context: Context, request: Request, out: Connection) -> None:
    """POST /v1/responses/ID/cancel: stops one that runs in the background."""
    response = _stored(context, request.path.split("/")[3])
    task = context.background.get(response["id"])
    if task is None:
        raise bad_request("Cannot cancel a synchronous response.", "response_id")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await out.send_json(200, response)


def _stored(context: Context, name: str) -> dict[str, Any]:
    if name not in context.responses:
        raise Refused(404, f"Response with id '{name}' not found.", "invalid_request_error", "response_id")
    return context.responses[name]


# Messages (Anthropic's)


async def messages(context: Context, request: Request, out: Connection) -> None:
    """``POST /v1/messages``: Anthropic's API, whole or streamed."""
    body = context.body(request)
    _require_model(body)
    given = _messages(body)
    text = content_text(given[-1].get("content"))
    job = _job(context, body, text, _count(given), _limit(body, "max_tokens"))
    message: dict[str, Any] = {"id": context.request_id(request, "msg"), "type": "message", "role": "assistant"}
    message |= {"content": [], "model": context.name(body)}
    if body.get("stream"):
        return await _stream(out, _message_events(context, job, message | {"stop_reason": None, "stop_sequence": None}))
    content = await _whole(context, job)
    message |= {"content": [{"type": "text", "text": content}], "stop_reason": _stop_reason(job)}
    return await out.send_json(200, message | {"usage": {"input_tokens": job.prompt_tokens, "output_tokens": job.sent}})


def _require_model(body: dict[str, Any]) -> None:
    if not body.get("model"):
        raise missing("model")


def _stop_reason(job: Job) -> str:
    return {"stop": "end_turn", "length": "max_tokens"}.get(job.finish, job.finish)


async def _message_events(context: Context, job: Job, message: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    counts = {"input_tokens": job.prompt_tokens, "output_tokens": 0}
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    started = False
    async with aclosing(context.state.run(job)) as words:
        async for token in words:
            if not started:
                yield _event({"type": "message_start", "message": message | {"usage": counts}})
                yield _event(block)
                started = True
            yield _event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": token}})
    if not started:
        yield _event({"type": "message_start", "message": message | {"usage": counts}})
        yield _event(block)
    yield _event({"type": "content_block_stop", "index": 0})
    delta = {"stop_reason": _stop_reason(job), "stop_sequence": None}
    yield _event({"type": "message_delta", "delta": delta, "usage": counts | {"output_tokens": job.sent}})
    yield _event({"type": "message_stop"})


async def count_tokens(context: Context, request: Request, out: Connection) -> None:
    """``POST /v1/messages/count_tokens``: Anthropic's count of a request's tokens."""
    body = context.body(request)
    _require_model(body)
    count = _count(_messages(body)) + len(tokens(content_text(body.get("system"))))
    await out.send_json(200, {"input_tokens": count})


# The tokenizer


async def tokenize(context: Context, request: Request, out: Connection) -> None:
    """POST /tokenize, of a prompt or of messages."""
    body = context.body(request)
    texts = _prompts(body) if "prompt" in body else [content_text(each.get("content")) for each in _messages(body)]
    words = tokens(" ".join(texts))
    numbers = {"count": len(words), "tokens": [token_id(word) for word in words]}
    strings = words if body.get("return_token_strs") else None
    await out.send_json(200, numbers | {"max_model_len": context.options.max_model_len, "token_strs": strings})


async def detokenize(context: Context, request: Request, out: Connection) -> None:
    """POST /detokenize: exactly the text that was tokenized."""
    body = context.body(request)
    numbers = body.get("tokens")
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        raise missing("tokens")
    await out.send_json(200, {"prompt": "".join(token_text(number) for number in numbers)})
