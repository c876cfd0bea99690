"""What every route needs: the state, the options, the checks that vLLM makes first, its errors."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from vllmd.simengine.http import Request
from vllmd.simengine.options import Options
from vllmd.simengine.state import EngineState

VERSION = "0.32.0"


class Refused(Exception):
    """The request is answered with vLLM's error object."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param

    @property
    def content(self) -> dict[str, Any]:
        return error_content(self.message, self.kind, self.status, self.param)


def error_content(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """The JSON object in which vLLM reports an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None) -> Refused:
    """400, from vLLM's own checks."""
    return Refused(400, message, "BadRequestError", param)


def invalid(what: str, where: str, kind: str = "missing", got: str = "<dict>") -> Refused:
    """400, from the check of the request's shape, in FastAPI's and vLLM's words."""
    detail = {"type": kind, "loc": where, "msg": what, "input": got}
    return Refused(400, f"1 validation error:\n  {detail}", "Bad Request", where)


def missing(name: str) -> Refused:
    """400 for a field that must be there."""
    return invalid("Field required", f"body.{name}")


class Context:
    """One engine, as its routes see it."""

    def __init__(self, options: Options, state: EngineState) -> None:
        self.options = options
        self.state = state
        self.began = time.time()
        self.in_flight = 0
        self.answered = 0
        self.adapters = lora_modules(options.lora_modules)  # name -> path
        self.responses: dict[str, dict[str, Any]] = {}  # /v1/responses with store, newest last
        self.background: dict[str, asyncio.Task[None]] = {}  # by the response's id

    @property
    def created(self) -> int:
        return int(time.time()) if self.options.created is None else self.options.created

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON body of a request that names a model of ours, or none. Raises Refused as vLLM does."""
        if request.get("content-type").lower().split(";")[0] != "application/json":
            what = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
            raise Refused(400, what, "Bad Request")
        body = parse_json(request.body)
        self.check_model(body.get("model"))
        return body

    def check_model(self, name: object) -> None:
        """Raise Refused (404) for a name that is not ours; none is the base model."""
        if name and name not in self.options.names and name not in self.adapters:
            valid = ", ".join(self.options.names)
            message = f"The model `{name}` does not exist. Valid aliases: {valid}."
            raise Refused(404, message, "NotFoundError", "model")

    def check_length(self, prompt_tokens: int, wanted: int | None) -> None:
        """Raise Refused (400) for a prompt that does not fit, with the answer wanted."""
        limit = self.options.max_model_len
        if wanted is not None and wanted > limit:
            raise bad_request(
                f"max_tokens={wanted} cannot be greater than max_model_len={limit}. Please request fewer output "
                f"tokens. (parameter=max_tokens, value={wanted})",
                "max_tokens",
            )
        if prompt_tokens + (wanted or 1) > limit:
            raise bad_request(
                f"This model's maximum context length is {limit} tokens. However, you requested {wanted or 1} output "
                f"tokens and your prompt contains {prompt_tokens} input tokens, for a total of "
                f"{prompt_tokens + (wanted or 1)} tokens. Please reduce the length of the input prompt or the number "
                "of requested output tokens.",
                "input_tokens",
            )

    def name(self, body: dict[str, Any]) -> str:
        """The name to give in an answer: the one that was asked for."""
        return str(body.get("model") or self.options.names[0])

    @staticmethod
    def request_id(request: Request, prefix: str, mark: str = "-") -> str:
        """``X-Request-Id`` behind the prefix, or a random one."""
        return f"{prefix}{mark}{request.get('x-request-id') or uuid.uuid4().hex}"


def lora_modules(words: Sequence[str]) -> dict[str, str]:
    """Adapters by name, from ``NAME=PATH`` or JSON objects."""
    found = {}
    for word in words:
        if word.startswith("{"):
            adapter = json.loads(word)
        else:
            adapter = dict(zip(("name", "path"), word.split("=", 1), strict=True))
        found[str(adapter["name"])] = str(adapter["path"])
    return found


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises Refused."""
    try:
        body = json.loads(data)
    except ValueError as error:
        raise invalid(f"JSON decode error: {error}", "body.1", "json_invalid") from None
    if not isinstance(body, dict):
        raise invalid("Input should be a valid dictionary", "body", "model_attributes_type", type(body).__name__)
    return body


def usage(prompt: int, completion: int | None = None) -> dict[str, Any]:
    """OpenAI's ``usage`` object for so many tokens."""
    total = {"prompt_tokens": prompt, "total_tokens": prompt + (completion or 0)}
    details = {"prompt_tokens_details": None, "completion_tokens_details": None}
    return total | {"completion_tokens": completion or 0} | details
