"""Embeddings on their way back. Pure: the numbers are moved as they are written, not read and written again."""

from __future__ import annotations

import json
import re

from vllmd.errors import UpstreamFailed

# In sound JSON these bytes cannot be within a string, whose quotes would be escaped.
VECTOR = re.compile(rb'"embedding"\s*:\s*(\[[-+0-9.eE,\s]*\])')
PROMPT_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d{1,12})')


def vectors(answer: bytes, inputs: int) -> list[bytes]:
    """The lists of numbers in OpenAI's answer, in its order, which is that of the ``inputs``. Raises UpstreamFailed."""
    found = VECTOR.findall(answer)
    if len(found) != inputs:
        raise UpstreamFailed(f"the engine gave {len(found)} embeddings for {inputs} texts")
    return found


def embed_answer(answer: bytes, inputs: int, model: str, durations: dict[str, int]) -> bytes:
    """``/api/embed``'s answer. ``durations`` in nanoseconds."""
    members: dict[str, object] = {"model": model, **durations}
    if tokens := PROMPT_TOKENS.search(answer):
        members["prompt_eval_count"] = int(tokens[1])
    return json.dumps(members)[:-1].encode() + b', "embeddings": [' + b",".join(vectors(answer, inputs)) + b"]}"


def embeddings_answer(answer: bytes) -> bytes:
    """The answer of ``/api/embeddings``, which has one vector."""
    return b'{"embedding": ' + vectors(answer, 1)[0] + b"}"
