"""What can never fit, with the arithmetic, so that nobody waits for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllmd.core.ledger import Account, Ledger, gib
from vllmd.core.model import Replica
from vllmd.core.vacancy import allowed, size_there


def never_fits(ledger: Ledger, m: Replica) -> str:
    """Why ``m`` cannot fit even with these devices to itself; empty if it can."""
    count = m.spec.device_count
    if not ledger.accounts or not count:
        return ""
    accounts = allowed(ledger, m)
    if len(accounts) < count:
        return f"{m.id!r} needs {_devices(count)}, and there {_are(len(accounts))} for it"
    if sum(_fits(m, a, 0) for a in accounts) >= count:
        return ""
    need = max(size_there(m, a, 0) or 0 for a in accounts)
    sizes = "; ".join(
        f"device {a.device.index} has {gib(a.device.memory)} less a reserve of {gib(a.device.reserve)}: "
        f"{gib(a.capacity)}"
        for a in accounts
    )
    return f"{m.id!r} needs {gib(need)} on each of {_devices(count)}; {sizes}"


def pinned_out(ledger: Ledger, m: Replica, models: Iterable[Replica]) -> str:
    """Why pinned models leave no room for ``m``; empty if they do."""
    count = m.spec.device_count
    if not ledger.accounts or not count:
        return ""
    pinned = [other for other in models if other.pinned and other.loaded and other is not m]
    taken = {index: sum(ledger.held(p).get(index, 0) for p in pinned) for index in ledger.accounts}
    if sum(_fits(m, a, taken[a.device.index]) for a in allowed(ledger, m)) >= count:
        return ""
    names = ", ".join(f"{p.id!r}" for p in pinned)
    if m.spec.when_free:
        return f"{m.id!r} starts on devices that others leave free, and pinned models ({names}) do not leave enough"
    return f"{m.id!r} needs {gib(m.booking)} on {_devices(count)}, and pinned models ({names}) leave less"


def stuck(ledger: Ledger, m: Replica, room: Mapping[int, int]) -> str:
    """Why a sleeper cannot wake where it is although it could start elsewhere; empty if that is not so.

    ``room``: see room_beside_kept. What it holds itself, if it is kept, counts for it.
    """
    mine = ledger.held(m) if m.kept else {}
    bad = [i for i in m.placement.devices if room[i] + mine.get(i, 0) < m.footprint.awake]
    if not bad:
        return ""
    left = {index: size + mine.get(index, 0) for index, size in room.items()}
    good = [a for a in allowed(ledger, m) if _fits(m, a, a.capacity - left[a.device.index])]
    if len(good) < m.spec.device_count:
        return ""
    return f"it cannot wake on device {bad[0]}, and can start elsewhere"


def has_room(ledger: Ledger, m: Replica) -> bool:
    """Whether it could start, or wake where it sleeps, with nobody leaving."""
    held = ledger.held(m)
    if held:
        need = m.footprint.awake
        return all(ledger.accounts[index].free + share >= need for index, share in held.items())
    good = [a for a in allowed(ledger, m) if _fits(m, a, a.promised + a.external) and not a.avoided]
    return not ledger.accounts or len(good) >= m.spec.device_count


def _fits(m: Replica, a: Account, taken: int) -> bool:
    """Whether it could start there if ``taken`` bytes were all that others hold."""
    size = size_there(m, a, taken)
    return size is not None and a.capacity - taken >= size


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count or 'none'}"
