"""Devices that others leave free, for models that start nowhere else (``when_free``). Pure functions.

Others are those who will still be there: strangers, and models that must stay
(pinned or leased). Models that can leave do not count. They are not somebody
else's work that a start would disturb, their memory is booked to the byte, and
if they counted, a model would wait for ever for what one swap can give it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vllmd.core.ledger import Account, Ledger, gib
from vllmd.core.model import INFINITY, Replica


def size_there(m: Replica, a: Account, others: int) -> int | None:
    """Bytes of the device that a start of ``m`` takes while others hold ``others`` of it; None: it does not start."""
    rule = m.spec.when_free
    if rule is None:
        return m.booking
    if others >= rule.used_below:
        return None
    if not rule.shares:
        return m.booking
    share = rule.share(_free(a, others))
    return None if share is None else math.ceil(share * a.device.memory)


def _free(a: Account, others: int) -> float:
    return (a.device.memory - others) / a.device.memory


def others_on(a: Account, room: Mapping[int, int]) -> int:
    """Bytes that others hold of it. ``room``: see :func:`room_beside_kept`."""
    return a.capacity - room[a.device.index]


def room_beside_kept(ledger: Ledger, models: Iterable[Replica]) -> dict[int, int]:
    """Bytes per device that neither strangers nor models that must stay hold; none on a wedged device."""
    room = {index: a.capacity - a.external for index, a in ledger.accounts.items()}
    for m in models:
        if m.kept:
            for index, share in ledger.held(m).items():
                room[index] -= share
    return {index: -1 if ledger.accounts[index].avoided else size for index, size in room.items()}


def allowed(ledger: Ledger, m: Replica) -> list[Account]:
    """The devices that it may use."""
    wanted = m.devices or tuple(ledger.accounts)
    return [ledger.accounts[index] for index in dict.fromkeys(wanted) if index in ledger.accounts]


def vacant(ledger: Ledger, m: Replica, room: Mapping[int, int], since: float = -INFINITY) -> dict[int, int]:
    """The devices on which ``m`` may start now, with what it would take of each.

    ``since``: what was read before counts no more. When nothing is loaded nobody looks at the devices.
    """
    sizes = {}
    for a in allowed(ledger, m):
        size = size_there(m, a, others_on(a, room))
        if size is not None and _read(a, since) and not a.avoided:
            sizes[a.device.index] = size
    return sizes


def _read(a: Account, since: float) -> bool:
    return a.looked is None or a.looked >= since


class Grant(NamedTuple):
    """What a start takes, by how free its devices are at that moment."""

    size: int | None  # bytes per device; None: by its footprint
    why: str
    numbers: Mapping[str, float | int | str]


def grant(m: Replica, accounts: Sequence[Account], room: Mapping[int, int]) -> Grant:
    """For a start on vacant devices: the share that the fullest of them allows."""
    fullest = min(accounts, key=lambda a: _free(a, others_on(a, room)))
    used, free = others_on(fullest, room), _free(fullest, others_on(fullest, room))
    why = f"others hold {gib(used)} of device {fullest.device.index}{', the fullest' * (len(accounts) > 1)}"
    why = f"{why}, {free:.3f} of it is free"
    devices = ",".join(str(a.device.index) for a in accounts)
    numbers: dict[str, float | int | str] = {"devices": devices, "used": used, "free": round(free, 4)}
    share = m.spec.when_free.share(free) if m.spec.when_free else None
    if share is None:
        return Grant(None, why, numbers)
    size = math.ceil(share * min(a.device.memory for a in accounts))
    return Grant(size, f"{why}: it takes {share:g}, {gib(size)}", {**numbers, "share": share, "memory": size})


class Wait(NamedTuple):
    """Why a start waits for others."""

    why: str
    numbers: Mapping[str, float | int | str]
    unread: bool  # some device is yet to be looked at


def held_back(ledger: Ledger, m: Replica, room: Mapping[int, int], since: float) -> Wait | None:
    """Who keeps a start of ``m`` waiting, and for what; None where others leave it enough devices."""
    rule = m.spec.when_free
    if rule is None or len(vacant(ledger, m, room, since)) >= m.spec.device_count:
        return None
    accounts = allowed(ledger, m)
    devices = "a free device" if m.spec.device_count == 1 else f"{m.spec.device_count} free devices"
    least = f", at least {min(rule.shares):g} of it free" if rule.shares else ""
    reasons = filter(None, (_reason(m, a, others_on(a, room), since) for a in accounts))
    why = f"{devices} (others use less than {gib(rule.used_below)}{least}): {'; '.join(reasons)}"
    used = {f"used_{a.device.index}": others_on(a, room) for a in accounts}
    return Wait(why, {"used_below": rule.used_below, **used}, not all(_read(a, since) for a in accounts))


def _reason(m: Replica, a: Account, others: int, since: float) -> str:
    index = a.device.index
    if a.avoided:
        return f"device {index} is avoided: {a.wedged}"
    if not _read(a, since):
        return f"device {index} is yet to be looked at"
    if size_there(m, a, others) is not None:
        return ""
    kept = others - a.external
    holders = [f"strangers hold {gib(a.external)}"] * (a.external > 0)
    holders += [f"models that stay hold {gib(kept)}"] * (kept > 0)
    return f"{' and '.join(holders)} on device {index}, {_free(a, others):.3f} is free"
