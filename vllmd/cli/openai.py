"""Requests to a model as any client sends them: over HTTP, with the standard library only."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator

from vllmd.api.json_types import ForeignJson
from vllmd.cli.admin import Admin, decoded
from vllmd.cli.failures import EX_UNAVAILABLE, Failure
from vllmd.text import printable

DEFAULT_URL = "http://127.0.0.1:33258"


def client(arguments: Namespace) -> Admin:
    """The HTTP side: --url, else $VLLMD_URL, else the standard address."""
    url = arguments.url or os.environ.get("VLLMD_URL") or DEFAULT_URL
    return Admin(Namespace(**{**vars(arguments), "url": url}))


def stream(
    http: Admin, request: ForeignJson, on_comment: Callable[[str], None] = lambda comment: None
) -> Iterator[ForeignJson]:
    """The chunks of a streamed chat completion. Raises Failure for an error in the stream, too.

    ``on_comment`` gets the comments in the stream, by which vllmd reports the loading of the model.
    """
    body = {**request, "stream": True}
    for line in http.lines("POST", "/v1/chat/completions", "text/event-stream", body):
        if line.startswith(":"):
            on_comment(printable(line[1:].strip()))
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        chunk = decoded(data)
        if "error" in chunk:
            raise Failure(str(chunk["error"].get("message", chunk["error"])), EX_UNAVAILABLE)
        yield chunk


def delta(chunk: ForeignJson) -> tuple[str, str]:
    """The text that a chunk adds, and the reasoning."""
    choices = chunk.get("choices") or [{}]
    added = choices[0].get("delta") or {}
    return added.get("content") or "", added.get("reasoning_content") or added.get("reasoning") or ""
