"""Devices that come, go, do not answer, are ill, or are given to maintenance (9 in ``design.md``).

How much memory a device has free comes with ``MemorySampled``. Here it is about whether a device can be used at all.
The rule: "it could not be read" is never taken for "there is none". While nobody knows which devices there are nothing
is put on any, and a client that asks for that is told why; engines that run are left alone.
"""

from __future__ import annotations

from vllmd.core.admission import Admission
from vllmd.core.commands import RejectReason
from vllmd.core.common import Core
from vllmd.core.events import DeviceDrained, DevicesChanged, DevicesTroubled
from vllmd.core.lifecycle import Kind, Reason
from vllmd.core.model import Job, Replica
from vllmd.core.types import CPU, State


class Devices:
    """What is said about devices as a whole: known or not, there or not, ill, drained."""

    def __init__(self, core: Core, admission: Admission) -> None:
        self._core = core
        self._admission = admission
        self._recorded = ""  # why nobody knew which devices there are, as recorded last

    def changed(self, e: DevicesChanged) -> None:
        """9.1: these are the devices now, or nobody knows; then who waits for one is told, unless an answer may come.

        What runs is booked anew: an engine may have been adopted while its device was not known. A swap to a device
        that is not there any more is called off, and of those that wait it is looked at again whether they can fit.
        """
        core, ledger = self._core, self._core.engines.ledger
        there = {device.index for device in e.devices}
        was = {index: account.device.runtime for index, account in ledger.accounts.items()}
        ledger.set_devices(e.devices)
        ledger.unknown, ledger.asking = e.unknown, e.asking
        for r in self._concerned():
            if r.loaded and not ledger.held(r):
                ledger.add_gone(r.placement.devices)
                core.engines.rebook(r)
            core.waiting.pop(r, None)
            if e.unknown and r.spec.device_count:  # it does not come up now; whether those that wait go on waiting...
                core.swaps.cancel(r)
                if r.at_rest and not e.asking:  # ... depends on whether the answer may still come
                    self._admission.reject_waiters(r, RejectReason.UNAVAILABLE, e.unknown, 5.0)
            elif (swap := core.swaps.get(r)) and (gone := sorted(set(swap.devices) - there)):
                core.engines.record("cancel", r, f"device {gone[0]} is not there any more")
                core.swaps.cancel(r)
            core.mark_for_review(r)
        for index, runtime in was.items():
            now = ledger.accounts[index].device.runtime if index in ledger.accounts else runtime
            if now != runtime and CPU in (now, runtime):
                for r in self._on(index):  # the CPU has the number that a GPU had, or the other way round
                    why = f"device {index} is another one now: {ledger.accounts[index].device.name}"
                    core.send_away(r, Reason.DEVICE, why)
        if e.unknown != self._recorded and not e.asking:  # they are asked at each start, which is no decision
            self._recorded = e.unknown
            core.engines.record("devices", None, e.unknown or f"there are {len(e.devices)}, and they answer")
        core.news_for_all = True

    def _concerned(self) -> list[Replica]:
        """The replicas to be looked at when devices are others; a model at rest, as most are, is only shown anew."""
        concerned = []
        for r in self._core.replicas.values():
            if self._core.at_rest(r.model):
                r.model.unused_view = None
            else:
                concerned.append(r)
        return concerned

    def troubled(self, e: DevicesTroubled) -> None:
        """9.2: an ill device is avoided, and what is on it leaves once it has drained; on a lost one it has failed."""
        engines = self._core.engines
        for index, account in engines.ledger.accounts.items():
            why = e.lost.get(index) or e.ill.get(index, "")
            if why == account.ill:
                continue
            account.ill = why
            if why:
                engines.record("avoid", None, f"device {index} is avoided: {why}", {"device": index})
            for r in self._on(index) if why else ():
                if index in e.lost:
                    # Its device is not there any more: the engine has failed, and nothing that it runs can end well.
                    reason = r.failure = f"device {index}: {why}"
                    engines.cut(r, reason)
                    if r.state is not State.STOPPING:
                        engines.record("stop", r, reason)
                    engines.ask(r, Job(Kind.STOP, Reason.DEVICE, reason, self._core.now, force=True))
                else:
                    self._core.send_away(r, Reason.DEVICE, f"device {index}: {why}")
        self._core.news_for_all = True

    def drained(self, e: DeviceDrained) -> None:
        """9.3: an operator takes a device out, or gives it back. What is on it leaves as its requests end.

        A device that goes and comes back meanwhile is still drained, and one that takes its index is not.
        """
        ledger = self._core.engines.ledger
        if e.device not in ledger.accounts and (e.drained or e.device not in ledger.drained):
            return
        ledger.drain(e.device, (e.why or "an operator drained it") if e.drained else "")
        whose = e.why or "by an operator"
        numbers = {"device": e.device}
        self._core.engines.record("drain" if e.drained else "undrain", None, f"device {e.device}: {whose}", numbers)
        for r in self._on(e.device) if e.drained else ():
            why = e.why or "it is drained for maintenance"
            self._core.send_away(r, Reason.DEVICE, f"device {e.device}: {why}")
        self._core.news_for_all = True

    def _on(self, index: int) -> list[Replica]:
        return [r for r in self._core.replicas.values() if index in r.placement.devices and r.loaded]
