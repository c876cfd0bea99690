"""Failures of a verb: a message that says what to do next, and an exit status of sysexits(3)."""

from __future__ import annotations

import errno
from typing import Any

EX_OK = 0
EX_LATER = 3
EX_USAGE = 64
EX_DATAERR = 65
EX_NOINPUT = 66
EX_UNAVAILABLE = 69
EX_SOFTWARE = 70
EX_CANTCREAT = 73
EX_TEMPFAIL = 75
EX_NOPERM = 77
EX_CONFIG = 78
EX_INTERRUPTED = 130
EX_PIPE = 141

# The manual's table. ``logs`` ends as journalctl does where that shows them.
EXITS = {
    EX_OK: "It is done.",
    EX_LATER: "reload: the configuration is in force, but for settings that take effect at the next start of vllmd(8), "
    "which are named.",
    EX_USAGE: "The command line is wrong.",
    EX_DATAERR: "What was named or given is wrong: there is no such model, or a file is broken.",
    EX_NOINPUT: "A file is missing.",
    EX_UNAVAILABLE: "The daemon does not run, an engine fails, a model can never fit, the devices do not answer, "
    "or doctor found a fault.",
    EX_SOFTWARE: "A fault in vllmd.",
    EX_CANTCREAT: "A file cannot be written; it is as it was.",
    EX_TEMPFAIL: "Not now; try again later.",
    EX_NOPERM: "You may not.",
    EX_CONFIG: "The configuration is wrong.",
    EX_INTERRUPTED: "It was interrupted, as by Ctrl-C.",
    EX_PIPE: "Whoever read its output has gone.",
}

STATUSES = {
    400: EX_DATAERR,
    401: EX_NOPERM,
    403: EX_NOPERM,
    404: EX_DATAERR,
    405: EX_SOFTWARE,
    408: EX_TEMPFAIL,
    409: EX_TEMPFAIL,
    413: EX_DATAERR,
    429: EX_TEMPFAIL,
    502: EX_UNAVAILABLE,
    503: EX_TEMPFAIL,
    504: EX_TEMPFAIL,
}
CODES = {"invalid_configuration": EX_CONFIG, "engine_failed": EX_UNAVAILABLE, "launcher_failed": EX_UNAVAILABLE,
         "model_too_large": EX_UNAVAILABLE}  # fmt: skip


NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")  # what OpenSSL makes of an answer in plain HTTP


class Failure(Exception):
    """Ends the verb: ``message`` is printed, ``status`` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.message, self.status = message, status


def of_answer(status: int, body: Any) -> Failure:
    """An error answer of the admin API as a failure."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return Failure(f"vllmd answered {status} without saying why", STATUSES.get(status, EX_SOFTWARE))
    code = str(error.get("code") or "")
    message = str(error.get("message") or f"vllmd answered {status}")
    message = message.replace("GET /v1/models lists those", "vllmctl ps lists those")
    invalid, _, where = message.partition(", tell its administrator: ")
    if where:  # users of vllmctl are its administrators
        return Failure(f"{invalid}, see vllmctl config check: {where}", EX_CONFIG)
    return Failure(message, CODES.get(code, STATUSES.get(status, EX_SOFTWARE)))


def of_socket(path: str, error: OSError) -> Failure:
    """Why the admin socket cannot be reached, and what helps."""
    user_mode = path.startswith("/run/user/")
    systemctl = "systemctl --user" if user_mode else "systemctl"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Failure(
            f"vllmd is not running: there is no {path}; {systemctl} start vllmd.socket, "
            f"and if that is not enough, vllmctl {'--user ' * user_mode}doctor",
            EX_UNAVAILABLE,
        )
    if error.errno == errno.ECONNREFUSED:
        return Failure(
            f"vllmd is not running: nobody listens on {path}; {systemctl} start vllmd-admin.socket", EX_UNAVAILABLE
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        import getpass

        return Failure(
            f"you may not use {path}, which is open to the group vllmd-admin (vllmd-read: read-only); "
            f"sudo usermod -aG vllmd-admin {getpass.getuser()}, then log in again",
            EX_NOPERM,
        )
    return of_url(path, error)


def of_url(url: str, error: OSError) -> Failure:
    """Why a URL cannot be reached."""
    if isinstance(error, TimeoutError):
        return Failure(f"vllmd at {url} does not answer; see journalctl -u vllmd", EX_TEMPFAIL)
    what = f"{url} cannot be reached: {error.strerror or error}"
    if getattr(error, "reason", "") in NO_TLS:
        what = f"{url} cannot be reached: TLS is not spoken there; if that is vllmd, its URL begins with http://"
    if isinstance(error, ConnectionRefusedError):
        what += "; on that machine: systemctl start vllmd.socket"
    return Failure(what, EX_UNAVAILABLE)
