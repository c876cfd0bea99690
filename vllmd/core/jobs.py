"""What a new job does to a replica's present one: the table of merges (``lifecycle.py``), carried out."""

from __future__ import annotations

from vllmd.core.lifecycle import BY_HAND, MERGES, OWN, UP, WANTS, Current, Kind, Merge, New, Reason
from vllmd.core.model import Job, wanted_start


def current(job: Job | None, runs: bool) -> Current:
    """The row of a job; ``runs``: its command is out."""
    if job is None:
        return Current.NONE
    if runs:
        rows = {Kind.START: Current.STARTS, Kind.WAKE: Current.WAKES, Kind.STOP: Current.STOPS}
        return rows.get(job.kind, Current.DOWN)
    if job.kind in UP:
        return Current.WANTED
    if job.reason in OWN:
        return Current.OWN
    if job.reason is Reason.SWAP:
        return Current.SWAP
    return Current.BY_HAND if job.reason in BY_HAND else Current.MUST


def new(job: Job) -> New:
    """The column of a job."""
    if job.kind in UP:
        return New.START
    if job.force:
        return New.FORCE
    if job.reason in OWN:
        return New.OWN
    if job.reason is Reason.OPERATOR:
        return New.SLEEP if job.kind is Kind.SLEEP else New.STOP
    return New.MUST


def merge(job: Job | None, runs: bool, requested: Job) -> Job | None:
    """The job of a replica that had ``job`` when ``requested`` was asked for. Changes both of them."""
    verb = MERGES[current(job, runs)][new(requested)]
    if requested.leaves and requested.reason in BY_HAND:
        job = unwanted(job, runs)
    if job is None or verb is Merge.TAKE:
        if job and requested.leaves:
            requested.target = requested.target or job.target
            requested.then = requested.then or wanted_start(job)
        return requested
    if verb is Merge.JOIN:
        job.then = None
        if job.reason not in WANTS or requested.reason is Reason.OPERATOR:
            job.since = job.since if job.reason in WANTS else requested.since
            job.reason, job.why = requested.reason, requested.why
    elif verb is Merge.AFTER:
        job.then = merge(job.then, False, requested)
    elif verb is Merge.FIRST:
        requested.then = job
        return requested
    return job


def unwanted(job: Job | None, runs: bool) -> Job | None:
    """What is left of ``job`` when nobody wants the engine on any more; a start that ``runs`` is let end."""
    if job is None:
        return None
    job.then = unwanted(job.then, False)
    if job.kind not in UP or job.reason not in WANTS:
        return job
    if runs:
        job.reason = Reason.REQUEST
        return job
    return job.then
