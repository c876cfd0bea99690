"""One tree of errors, each with the HTTP status and OpenAI error type it becomes.

Foreign exceptions are translated into these at one seam per room, so that
the code that catches one knows whose fault it is and what to answer.
"""

from __future__ import annotations

import errno
import os
from typing import Any, ClassVar

# What the kernel says where this process, or the machine, has no more files, sockets or memory to give: of whoever
# was to be asked it says nothing.
OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def out_of_files() -> bool:
    """Whether this process can open no file at this moment, so that what just failed says nothing of anybody else."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in OUT_OF_FILES
    return False


def replaced(error: Exception) -> bool:
    """Whether ``error`` is that of importing a part of vllmd that does not fit what is imported already.

    A daemon imports some parts only when they are needed. If the package was upgraded meanwhile, and the daemon has not
    been restarted yet, they are another version's.
    """
    return isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "vllmd"


class VllmdError(Exception):
    """Base of all errors of vllmd.

    ``message`` says what was wrong, where, and what would be right.
    ``param`` names the offending request field, ``retry_after`` is in seconds.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def to_openai(self) -> dict[str, Any]:
        """The body OpenAI's clients expect: ``{"error": {message, type, param, code}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def to_ollama(self) -> dict[str, Any]:
        """The body Ollama's clients expect: ``{"error": message}``."""
        return {"error": self.message}

    def to_anthropic(self) -> dict[str, Any]:
        """The body Anthropic's clients expect: ``{"type": "error", "error": {type, message}}``."""
        kind = ANTHROPIC_TYPES.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ConfigError(VllmdError):
    """The configuration is wrong; the message names file:line, key path and accepted values."""

    status, type, code = 400, "invalid_request_error", "invalid_configuration"


class BadRequest(VllmdError):
    """The client's request is malformed."""

    status, type, code = 400, "invalid_request_error", None


class SpokenTls(BadRequest):
    """The client speaks TLS to an address where plain HTTP is spoken."""


class Unauthorized(VllmdError):
    """No key, or a wrong one."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(VllmdError):
    """The key is good but does not allow this."""

    status, type, code = 403, "invalid_request_error", "insufficient_permissions"


class RequestCancelled(VllmdError):
    """An administrator has ended the request. Its status is one after which clients do not try again by themselves."""

    status, type, code = 403, "invalid_request_error", "request_cancelled"


class NotFound(VllmdError):
    """The path is no route of vllmd."""

    status, type, code = 404, "invalid_request_error", "not_found"


class UnknownModel(NotFound):
    """No configured model has this name; the message names the close matches."""

    code = "model_not_found"


class MethodNotAllowed(VllmdError):
    """The route exists, the method does not."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class Conflict(VllmdError):
    """The thing asked for contradicts the present state."""

    status, type, code = 409, "invalid_request_error", "conflict"


class TooLarge(VllmdError):
    """The body is larger than the limit."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class RequestTimeout(VllmdError):
    """The client took too long to send its request."""

    status, type, code = 408, "invalid_request_error", "request_timeout"


class Misdirected(VllmdError):
    """The request is for another server, by the name that it gives."""

    status, type, code = 421, "invalid_request_error", "misdirected_request"


class NoUpgrade(VllmdError):
    """The path does not change to the protocol that the client asks for; without that it would be served."""

    status, type, code = 426, "invalid_request_error", "upgrade_required"
    headers = (("connection", "upgrade"), ("upgrade", "HTTP/1.1"))


class HeadTooLarge(VllmdError):
    """The request's head is larger than the limit."""

    status, type, code = 431, "invalid_request_error", "header_too_large"


class TooManyRequests(VllmdError):
    """A limit on number (queue, key, address) is reached; come back later."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class Unavailable(VllmdError):
    """The model cannot be served now; the message says why and for how long."""

    status, type, code = 503, "server_error", "model_unavailable"


class EngineFailed(Unavailable):
    """The engine did not start, or died; the message ends with its last log lines."""

    code = "engine_failed"


class ModelDisabled(Unavailable):
    """An operator has disabled the model; the message has the operator's words."""

    code = "model_disabled"


class UpstreamFailed(VllmdError):
    """The engine broke off before it answered anything."""

    status, type, code = 502, "server_error", "upstream_failed"


class TookTooLong(VllmdError):
    """The request was not answered within the time that requests have."""

    status, type, code = 504, "server_error", "request_timeout"


class InternalError(VllmdError):
    """A defect of vllmd: nothing was done, or not all of it, and the log says why."""

    code = "internal_error"


class Unsupported(VllmdError):
    """The machine cannot do what was asked: it has, for example, no device that can be read."""

    status, type, code = 501, "server_error", "not_supported"


class LauncherFailed(VllmdError):
    """The launcher refused or could not do what was asked."""

    code = "launcher_failed"


class InstallFailed(VllmdError):
    """An engine could not be installed; the message has the cause and what would help."""

    status, type, code = 502, "server_error", "install_failed"


class ModelTooLarge(VllmdError):
    """The model can never fit on this machine's devices; the message has the arithmetic."""

    status, type, code = 400, "invalid_request_error", "model_too_large"
