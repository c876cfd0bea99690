"""How the progress of a download is shown, and how a download is followed to its end."""

from __future__ import annotations

import json
import sys

from vllmd.api.answers import Download, Pulled, Status
from vllmd.cli import show
from vllmd.cli.admin import Admin, decoded, understood
from vllmd.cli.failures import CODES, EX_DATAERR, EX_NOPERM, EX_UNAVAILABLE, Failure

NDJSON = "application/x-ndjson"
STATUSES = {"model_not_found": EX_DATAERR, "not_found": EX_DATAERR, "insufficient_permissions": EX_NOPERM, **CODES}
PHASES = {"waiting": "waiting for its turn", "looking": "asking", "unpacking": "unpacking"}


def line(progress: Download | Pulled, since: float = 0.0) -> str:
    """``34.1MiB of 93.8MiB, 36 %, 4.2MiB/s, 14s left``; in other phases than downloading the phase.

    ``since``: seconds since that progress was reported.
    """
    phase = progress.phase
    if phase == "waiting" and progress.behind:
        noun = "download" if len(progress.behind) == 1 else "downloads"
        return f"waiting for the {noun} of {', '.join(progress.behind)}"
    if phase != "downloading":
        return " ".join(filter(None, (PHASES.get(phase, phase), progress.source if phase == "looking" else "")))
    done, total, rate = progress.completed, progress.total, progress.rate
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
    """Download a model, and show the progress. Returns the last line of it. Raises Failure."""
    shown, last = show.StatusLine(quiet), Pulled(model)

    def render(since: float) -> str:
        rest, most = f": {line(last, since)}", show.columns(sys.stderr)
        return (model if most is None else show.shortened(model, max(12, most - 1 - show.width(rest)))) + rest

    try:
        for text in admin.lines("POST", "/admin/store/pull", NDJSON, {"model": model, "add": add}):
            last = understood(Pulled, decoded(text))
            if not last.done and last.phase not in ("done", "failed"):
                # Where no terminal is, a line is written for each phase, and for each tenth of the way.
                tenth = 10 * last.completed // last.total if last.total and last.phase == "downloading" else 0
                shown.say(render, json.dumps([last.phase, last.source, tenth]))
    finally:
        shown.clear()
    if last.error:
        message = last.error.message
        if "cannot be reached" in message:
            from vllmd.cli.verbs.search import without_hub

            message = f"{message}. {without_hub()}"
        raise Failure(message, STATUSES.get(str(last.error.code), EX_UNAVAILABLE))
    if not last.done:
        raise Failure(f"the download of {model} broke off; vllmctl pull {model} goes on where it was", EX_UNAVAILABLE)
    return last
