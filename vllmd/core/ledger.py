"""Who holds how much memory: on each device, and of the host for level-1 sleepers. All in bytes.

The ledger is written before a command goes out (a start is booked at once with what it may need) and after an answer
came back (memory is released only when it is known to be free), so that it never promises the same byte twice. It knows
no engines: a holder is only a key here.

``free = memory - reserve - promised - external``. It may be negative: other programs, and engines that take more than
they were measured at, do not ask. Then nothing starts on that device, and nothing is ended for it either.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping

from vllmd.core.types import CPU, Device
from vllmd.sizes import in_words

NEVER = -math.inf


class Account:
    """One device: what it has, what models were promised, and what others hold."""

    __slots__ = ("capacity", "device", "drained", "external", "gone", "ill", "missing", "promised", "read_at")

    def __init__(self, device: Device) -> None:
        self.device = device
        self.capacity = device.memory - device.reserve  # what can ever be promised
        self.promised = 0
        self.external = 0
        self.read_at = _never_read(device)  # when ``external`` was last read; NEVER: not yet; None: nobody reads it
        self.missing = 0  # bytes that did not come back after a stop: the device is wedged
        self.ill = ""  # what its driver says against using it
        self.gone = False  # it is not there any more, but models still hold some of it
        self.drained = ""  # why an operator, or somebody else, has it left; "" if nobody has

    def redefine(self, device: Device) -> None:
        """The same device with another size or reserve, or again; or another one, of which nothing is known yet.

        What was read before it went says nothing of what is held since.
        """
        is_another = _identity(device) != _identity(self.device)
        if is_another:
            self.external, self.missing, self.ill = 0, 0, ""
        if is_another or self.gone or device.read != self.device.read:
            self.read_at = _never_read(device)
        self.device, self.gone = device, False
        self.capacity = device.memory - device.reserve

    @property
    def free(self) -> int:
        """What can be promised now, bytes; negative when more was taken than was left."""
        return self.capacity - self.promised - self.external

    @property
    def wedged(self) -> str:
        """Why the device is avoided; empty if it is not."""
        if self.gone:
            return "it is not there any more"
        if self.missing and not self.ill:
            return f"{in_words(self.missing)} did not come back after a stop"
        return self.ill or self.drained

    @property
    def avoided(self) -> bool:
        """Whether nothing is put there."""
        return bool(self.missing or self.ill or self.gone or self.drained)


def _identity(device: Device) -> tuple[str, str]:
    """The device itself, whatever its index; by that where nothing else is known of it (``Ledger.add_gone``)."""
    return device.id or str(device.index), device.runtime


def _never_read(device: Device) -> float | None:
    return NEVER if device.read else None


class Ledger:
    """The accounts of all devices and of the host's memory."""

    def __init__(self, devices: Iterable[Device], host_budget: int) -> None:
        self.accounts = {device.index: Account(device) for device in devices}
        self.host_budget = host_budget
        self.unknown = ""  # why nobody knows what devices there are or what they hold; "": it is known
        self.asking = False  # that may yet be known in a moment
        self.host_promised = 0
        self.standbys = 0  # host bytes of processes that are given up for whoever is promised them
        # The drained devices, also those that are not there just now and may come back: their last index, and why.
        self._drains: dict[tuple[str, str], tuple[int, str]] = {}
        self._held: dict[Hashable, dict[int, int]] = {}
        self._host: dict[Hashable, int] = {}

    def set_devices(self, devices: Iterable[Device]) -> None:
        """Take the devices as they are now. One that is gone keeps its account as long as an engine is on it."""
        now = {device.index: device for device in devices}
        # By who is there, not by bytes: an engine whose footprint is 0 has to be unbooked from its account as well.
        held = {index for shares in self._held.values() for index in shares}
        for index, account in list(self.accounts.items()):
            account.gone = account.gone or index not in now
            if index not in now and index not in held:
                del self.accounts[index]
        for index in sorted(now):
            if index in self.accounts:
                self.accounts[index].redefine(now[index])
                self._find_drain(self.accounts[index])
            else:
                self._open(now[index])

    @property
    def has_devices(self) -> bool:
        """Whether any device is there. Where none is, engines run without: on the CPU, as the configuration has it."""
        return any(not account.gone for account in self.accounts.values())

    def add_gone(self, indices: Iterable[int]) -> None:
        """Have an account, marked as gone, for each device that is not there although an adopted engine is on it."""
        for index in indices:
            if index not in self.accounts and not self.unknown:
                self._open(Device(index, "", 0)).gone = True

    def _open(self, device: Device) -> Account:
        account = self.accounts[device.index] = Account(device)
        self._find_drain(account)
        return account

    def _find_drain(self, account: Account) -> None:
        device = _identity(account.device)
        _, account.drained = self._drains.get(device, (0, ""))
        if account.drained and not account.gone:
            self._drains[device] = account.device.index, account.drained

    @property
    def drained(self) -> frozenset[int]:
        """The indices of the drained devices; of those that are not there, the last that they had."""
        return frozenset(index for index, _ in self._drains.values())

    def drain(self, index: int, why: str) -> None:
        """Have nothing put on the device of this index, whenever and by whatever index it is there.

        With "" as ``why`` it is given back, and so are those that are gone and had this index.
        """
        here = _identity(self.accounts[index].device) if index in self.accounts else None
        if not why:
            kept = self._drains.items()
            self._drains = {device: drain for device, drain in kept if device != here and drain[0] != index}
        elif here:
            self._drains[here] = index, why
        for account in self.accounts.values():
            self._find_drain(account)

    def hold(self, holder: Hashable, shares: Mapping[int, int]) -> None:
        """``holder`` holds these bytes per device index, and no others. Absurd (negative) shares count as none."""
        self._unbook(holder)
        known = {index: max(0, share) for index, share in shares.items() if index in self.accounts}
        for index, share in known.items():
            self.accounts[index].promised += share
        if known:
            self._held[holder] = known

    def release(self, holder: Hashable) -> None:
        """Every process of ``holder`` is gone: it holds nothing any more."""
        self._unbook(holder)
        self.hold_host(holder, 0)

    def _unbook(self, holder: Hashable) -> None:
        for index, share in self._held.pop(holder, {}).items():
            self.accounts[index].promised -= share

    def held(self, holder: Hashable) -> Mapping[int, int]:
        """Bytes that ``holder`` holds, per device index."""
        return self._held.get(holder, {})

    def largest_share(self, holder: Hashable) -> int:
        """Bytes that ``holder`` holds on the device where it holds most."""
        return max(self._held.get(holder, {}).values(), default=0)

    def hold_host(self, holder: Hashable, size: int) -> None:
        """``holder`` keeps ``size`` bytes of host memory; 0: none."""
        self.host_promised += size - self._host.pop(holder, 0)
        if size:
            self._host[holder] = size

    def host_held(self, holder: Hashable) -> int:
        """Host bytes that ``holder`` keeps."""
        return self._host.get(holder, 0)

    def host_free_for(self, holder: Hashable) -> int:
        """Host bytes that ``holder`` could have, what it keeps already included."""
        return self.host_budget - self.host_promised + self._host.get(holder, 0)

    def set_external(self, held: Mapping[int, int], now: float, largest: int = 0) -> None:
        """Take NVML's word for what other programs hold; what cannot be (negative, more than there is) is cut to size.

        What they hold of the CPU's memory never keeps an engine of ``largest`` bytes from running there alone: the
        machine's own programs hold some at all times, and an engine that is short of it is slow and does not fail.
        """
        for index, size in held.items():
            account = self.accounts.get(index)
            if account:
                account.read_at = now
                most = account.device.memory
                if account.device.runtime == CPU:
                    most = max(0, account.capacity - largest)
                account.external = min(max(0, size), most)
                if account.external < account.missing // 2:
                    account.missing = 0

    def mark_unread(self, indices: Iterable[int]) -> None:
        """Note devices that could not be read: their last figures stand, but say nothing of what is free now."""
        for index in indices:
            if index in self.accounts:
                self.accounts[index].read_at = NEVER

    def wedge(self, missing: Mapping[int, int]) -> None:
        """Note bytes that did not come back: avoid the devices until a sample shows that they did."""
        for index, size in missing.items():
            if index in self.accounts and size > 0:
                self.accounts[index].missing = size
                self.accounts[index].external = max(self.accounts[index].external, size)
