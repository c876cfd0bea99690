"""How a download is shown, and how one is followed to its end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from vllmd.api.answers import Download, Pulled, Status
from vllmd.cli import show
from vllmd.cli.admin import Admin, decoded, understood
from vllmd.cli.failures import CODES, EX_DATAERR, EX_NOPERM, EX_UNAVAILABLE, Failure

NDJSON = "application/x-ndjson"
STATUSES = {"model_not_found": EX_DATAERR, "not_found": EX_DATAERR, "insufficient_permissions": EX_NOPERM, **CODES}
PHASES = {"waiting": "waiting for its turn", "looking": "asking", "unpacking": "unpacking"}


def line(told: Download | Pulled, since: float = 0.0) -> str:
    """``34.1MiB of 93.8MiB, 36 %, 4.2MiB/s, 14s left``; before and after that what is done."""
    phase = told.phase
    if phase == "waiting" and told.behind:
        return f"waiting for the {'download' if len(told.behind) == 1 else 'downloads'} of {', '.join(told.behind)}"
    if phase != "downloading":
        return " ".join(filter(None, (PHASES.get(phase, phase), told.source if phase == "looking" else "")))
    done, total, rate = told.completed, told.total, told.rate
    parts = [f"{show.size(done)} of {show.size(total)}"] if total else [show.size(done)]
    if total:
        parts.append(f"{min(100, int(100 * done / total))} %")
    if rate:
        parts.append(f"{show.size(rate)}/s")
        left = max(0.0, (total - done) / rate - since)
        parts.append(f"{show.age(left)} left" if total else "")
    return ", ".join(filter(None, parts))


def under_way(status: Status) -> list[str]:
    """A line for each download that runs."""
    running = [each for each in status.downloads if each.phase not in ("done", "failed")]
    return [f"fetching {each.model}: {line(each)}" for each in running]


def follow(admin: Admin, model: str, *, add: bool, quiet: bool) -> Pulled:
    """Have the model fetched, and show how it comes along; its last line. Raises Failure."""
    shown, last = show.StatusLine(quiet), Pulled(model)
    try:
        for text in admin.lines("POST", "/admin/store/pull", NDJSON, {"model": model, "add": add}):
            last = understood(Pulled, decoded(text))
            if not last.done and last.phase not in ("done", "failed"):
                shown.say(_render(model, last), _key(last))
    finally:
        shown.clear()
    if last.error:
        raise Failure(_with_advice(last.error.message), STATUSES.get(str(last.error.code), EX_UNAVAILABLE))
    if not last.done:
        raise Failure(f"the download of {model} broke off; vllmctl pull {model} goes on where it was", EX_UNAVAILABLE)
    return last


def _with_advice(message: str) -> str:
    """What fails without a hub, and what does not need one."""
    if "cannot be reached" not in message:
        return message
    from vllmd.cli.verbs.search import without_hub

    return f"{message}. {without_hub()}"


def _render(model: str, told: Pulled) -> Callable[[float], str]:
    def render(since: float) -> str:
        rest = f": {line(told, since)}"
        most = show.columns(sys.stderr)
        return (model if most is None else show.shortened(model, max(12, most - 1 - show.width(rest)))) + rest

    return render


def _key(told: Pulled) -> str:
    """Without a terminal a line is written for each phase, and for each tenth of the way."""
    tenth = 10 * told.completed // told.total if told.total and told.phase == "downloading" else 0
    return json.dumps([told.phase, told.source, tenth])
