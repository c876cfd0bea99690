"""Embeddings, rerank, score, classify, pooling, audio: one answer per request, no generation."""

from __future__ import annotations

import base64
import email.parser
import email.policy
import struct
from typing import Any

from vllmd.simengine.context import Context, bad_request, missing, parse_json, usage
from vllmd.simengine.http import Connection, Request, dump
from vllmd.simengine.text import similarity, token_text, tokens, vector


async def embeddings(context: Context, request: Request, out: Connection) -> None:
    """POST /v1/embeddings: a vector that depends on the text only, as floats or base64."""
    body = context.body(request)
    texts = _texts(body.get("input"), "input")
    count = await _pool(context, texts)
    size = body.get("dimensions") or context.options.dimensions
    encode = _base64 if body.get("encoding_format") == "base64" else list
    data = [_item(i, "embedding", embedding=encode(vector(text, size))) for i, text in enumerate(texts)]
    await out.send_json(200, _list(context, request, body, "embd", data, count))


async def pooling(context: Context, request: Request, out: Connection) -> None:
    """POST /pooling: the embedding under another name."""
    body = context.body(request)
    texts = _texts(body.get("input"), "input")
    count = await _pool(context, texts)
    data = [_item(i, "pooling", data=vector(text, context.options.dimensions)) for i, text in enumerate(texts)]
    await out.send_json(200, _list(context, request, body, "pool", data, count))


async def classify(context: Context, request: Request, out: Connection) -> None:
    """POST /classify: two classes, chosen by the text's length."""
    body = context.body(request)
    texts = _texts(body.get("input"), "input")
    count = await _pool(context, texts)
    data = [
        {"index": i, "label": f"LABEL_{chosen}", "probs": [1.0 - chosen, float(chosen)], "num_classes": 2}
        for i, chosen in enumerate(len(text) % 2 for text in texts)
    ]
    await out.send_json(200, _list(context, request, body, "classify", data, count))


async def score(context: Context, request: Request, out: Connection) -> None:
    """POST /score: the share of common words of each pair."""
    body = context.body(request)
    left = _texts(body.get("text_1", body.get("queries")), "text_1")
    right = _texts(body.get("text_2", body.get("documents")), "text_2")
    if len(left) not in (1, len(right)):
        raise bad_request("Input lengths must be either 1:1, 1:N or N:N", "text_1")
    count = await _pool(context, left + right)
    pairs = zip(left * (len(right) if len(left) == 1 else 1), right, strict=True)
    data = [_item(i, "score", score=similarity(a, b)) for i, (a, b) in enumerate(pairs)]
    await out.send_json(200, _list(context, request, body, "score", data, count))


async def rerank(context: Context, request: Request, out: Connection) -> None:
    """POST /rerank: the documents by the share of words they have in common with the query."""
    body = context.body(request)
    query = body.get("query")
    if not isinstance(query, str):
        raise missing("query")
    documents = _texts(body.get("documents"), "documents")
    count = await _pool(context, [query, *documents])
    results = [
        {"index": i, "document": {"text": text, "multi_modal": None}, "relevance_score": similarity(query, text)}
        for i, text in enumerate(documents)
    ]
    results.sort(key=lambda result: -float(str(result["relevance_score"])))
    head = {"id": context.request_id(request, "rerank"), "model": context.name(body)}
    tokens_used = {"prompt_tokens": count, "total_tokens": count}
    await out.send_json(200, head | {"usage": tokens_used, "results": results[: body.get("top_n") or None]})


def _texts(given: Any, param: str) -> list[str]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, dict):
        return [str(given.get("text", ""))]
    if isinstance(given, list) and given:
        if all(isinstance(item, int) for item in given):
            return ["".join(token_text(item) for item in given)]
        return [text for item in given for text in _texts(item, param)]
    raise missing(param)


async def _pool(context: Context, texts: list[str]) -> int:
    count = sum(len(tokens(text)) for text in texts)
    await context.state.pool(count)
    return count


def _item(index: int, kind: str, **more: Any) -> dict[str, Any]:
    return {"index": index, "object": kind} | more


def _base64(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _list(
    context: Context, request: Request, body: dict[str, Any], prefix: str, data: list[Any], count: int
) -> dict[str, Any]:
    head = {"id": context.request_id(request, prefix), "object": "list", "created": context.created}
    return head | {"model": context.name(body), "data": data, "usage": usage(count)}


# Audio


async def audio(context: Context, request: Request, out: Connection) -> None:
    """POST /v1/audio/transcriptions and translations: says what it heard, the file's name and length."""
    fields = _multipart(request)
    context.check_model(fields.get("model", (b"", ""))[0].decode(errors="replace"))
    if "file" not in fields:
        raise missing("file")
    data, name = fields["file"]
    await _pool(context, [name])
    text = f"heard {len(data)} bytes of {name}"
    if fields.get("response_format", (b"json", ""))[0] == b"text":
        return await out.send(200, dump(text), "application/json")
    return await out.send_json(200, {"text": text, "usage": {"type": "duration", "seconds": 1}})


def _multipart(request: Request) -> dict[str, tuple[bytes, str]]:
    """Field name -> content and file name. Raises Refused."""
    kind = request.get("content-type")
    if not kind.lower().startswith("multipart/form-data"):
        raise missing("file")
    head = f"Content-Type: {kind}\r\n\r\n".encode("latin-1")
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + request.body)
    fields: dict[str, tuple[bytes, str]] = {}
    for part in message.iter_parts() if message.is_multipart() else ():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(content, bytes):
            fields[name] = (content, part.get_filename() or "")
    return fields


# SageMaker's one route for all


def body_shape(request: Request) -> str:
    """The route that /invocations means: by the body's shape, as vLLM decides."""
    body = parse_json(request.body)
    for key, path in _SHAPES:
        if key in body:
            return path
    raise bad_request(f"Cannot find suitable handler for request. Expected one of: {[key for key, _ in _SHAPES]}")


_SHAPES = (
    ("messages", "/v1/chat/completions"),
    ("prompt", "/v1/completions"),
    ("documents", "/rerank"),
    ("text_1", "/score"),
    ("input", "/v1/embeddings"),
)
