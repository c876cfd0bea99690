"""What an operator's verb would do, in a few sentences, before it is done; from the core's ``core/preview.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vllmd.api.answers import Preview
from vllmd.config.types import Config
from vllmd.core.types import COMING, ModelView, ReplicaView, State
from vllmd.daemon.current import Later
from vllmd.errors import NotFound, UnknownModel
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.sizes import in_words

if TYPE_CHECKING:
    from vllmd.core.preview import Leaving, Loading
    from vllmd.daemon.back_end import BackEnd

View = ModelView | ReplicaView


class Previews:
    """Implements ``vllmd.admin.control.Previews``; changes nothing."""

    def __init__(self, back: Later[BackEnd], config: Callable[[], Config]) -> None:
        self._back = back
        self._config = config
        self._of_model: Mapping[str, Callable[[BackEnd, View, Caller], tuple[str, bool]]] = {
            "load": self._load,
            "sleep": self._sleep,
            "unload": self._unload,
            "restart": self._restart,
            "pin": lambda back, view, caller: (_pin(view), not view.pinned),
            "unpin": lambda back, view, caller: ("It may sleep, and make room for others, again.", view.pinned),
            "lease": self._lease,
            "release": lambda back, view, caller: (_release(view), bool(view.leases)),
            "probe": self._probe,
            "disable": self._disable,
            "enable": self._enable,
        }

    async def of_model(self, model: str, action: str, *, caller: Caller = ANYBODY) -> Preview:
        """What the verb would do with a model or a replica. Raises UnknownModel.

        A caller who may use some models only is not told the names of others.
        """
        back = await self._back.wait()
        text, possible = self._of_model[action](back, _view(back, model), caller)
        return Preview(action, text, possible)

    async def of_device(self, device: int, action: str) -> Preview:
        """What draining a device, or giving it back, would do. Raises NotFound."""
        back = await self._back.wait()
        seen = back.activity()
        view = next((each for each in seen.devices if each.index == device), None)
        if view is None and (action != "undrain" or device not in seen.drained):
            raise NotFound(f"there is no device {device}; vllmctl gpus lists those that there are")
        if view is None or action == "undrain":
            return Preview(action, f"Models may be put on GPU {device} again.", device in seen.drained)
        there = back.dispatcher.scheduler.would_drain(device)
        parts = [f"Nothing new is put on GPU {device}."]
        parts += [f"{each.replica} is stopped. {_end(each)}" for each in there] or ["Nothing is on it now."]
        parts.append("It holds until it is given back or the daemon restarts, which does not exit meanwhile.")
        return Preview(action, " ".join(parts), not view.drained)

    # -- verbs

    def _load(self, back: BackEnd, view: View, caller: Caller) -> tuple[str, bool]:
        seen = back.dispatcher.scheduler.would_load(view.name)
        return _loading(seen, caller), not seen.never and seen.state is not State.READY

    def _sleep(self, back: BackEnd, view: View, caller: Caller) -> tuple[str, bool]:
        there = back.dispatcher.scheduler.would_leave(view.name, 1)
        return _joined([f"{_called(each, there)}{_leaving(each)}" for each in there], "It is not loaded."), any(
            each.state is not State.SLEEPING for each in there
        )

    def _unload(self, back: BackEnd, view: View, caller: Caller) -> tuple[str, bool]:
        there = back.dispatcher.scheduler.would_leave(view.name, 0)
        parts = [f"{_called(each, there)}{_leaving(each)}" for each in there]
        parts += [_refused(view)] if view.queued else []
        parts += ["Its failure is forgotten."] if view.failure else []
        return _joined(parts, "It is not loaded."), bool(parts)

    def _restart(self, back: BackEnd, view: View, caller: Caller) -> tuple[str, bool]:
        there = back.dispatcher.scheduler.would_leave(view.name, 0)
        parts = [f"{_called(each, there)}{_end(each)} Its engine is stopped and started anew" for each in there]
        parts = [f"{part}, about {_seconds(each.back)}." for part, each in zip(parts, there, strict=True)]
        return _joined([*parts, _refused(view)] if view.queued else parts, "It is not loaded: it is started."), True

    def _lease(self, back: BackEnd, view: View, caller: Caller) -> tuple[str, bool]:
        held = f" It is leased to {', '.join(view.leases)} already." if view.leases else ""
        loaded = "" if view.state is not State.STOPPED else " This does not load it."
        return (
            "Until the lease ends it is neither put to sleep nor stopped to make room for others. When the last lease "
            f"ends by its time, it finishes its requests and stops.{loaded}{held}"
        ), True

    def _probe(self, back: BackEnd, view: View, caller: Caller) -> tuple[str, bool]:
        serving = [each.name for each in back.replicas_of(view.name) if each.state is State.READY]
        if not serving:
            return "None of its engines serves now, so there is nobody to ask.", False
        engines = f"Each of its {len(serving)} engines that serve gets" if len(serving) > 1 else "Its engine gets"
        return f"{engines} one short question of vllmd's own, beside its clients' requests.", True

    def _disable(self, back: BackEnd, view: View, caller: Caller) -> tuple[str, bool]:
        there = back.dispatcher.scheduler.would_leave(view.name, 0)
        parts = ["Who asks for it from now on gets status 503 with your message, over restarts as well."]
        parts += [f"{_called(each, there)}{_end(each)} Then it is stopped{_frees(each)}." for each in there]
        parts += [f"{_count(view.queued, 'request')} that wait for it get the message now."] if view.queued else []
        return _joined(parts, ""), True

    def _enable(self, back: BackEnd, view: View, caller: Caller) -> tuple[str, bool]:
        preloaded = any(model.preload for name, model in self._config().models.items() if name == view.name)
        how = (
            "It is loaded now, where it fits, as it is to be preloaded." if preloaded else "The next request loads it."
        )
        return f"It is served again. {how}", bool(view.disabled)


def _view(back: BackEnd, name: str) -> View:
    """The core's view of a model, or of a replica."""
    scheduler = back.dispatcher.scheduler
    views = scheduler.replicas_of(name, back.dispatcher.now())
    for model in scheduler.snapshot_of(name, back.dispatcher.now()).models:
        return model if model.name == name else next(view for view in views if view.id == name)
    raise UnknownModel(f"the model {name!r} is no longer configured", param="model")


# -- sentences


def _loading(seen: Loading, caller: Caller) -> str:
    where = f" on GPU {', '.join(map(str, seen.devices))}" if seen.devices else ""
    takes = f", about {_seconds(seen.seconds)}" if seen.seconds is not None else ""
    if seen.never:
        return f"It cannot be loaded: {seen.never if caller.models is None else 'it does not fit'}."
    if seen.state is State.READY:
        return f"It serves already{where}; nothing changes."
    if seen.state in COMING:
        return f"It is on its way up already{where}{takes}; nothing changes."
    how = "It is woken" if seen.state is State.SLEEPING else "Its engine is started"
    if seen.waits:
        return f"{how} as soon as it can be; first it waits for {seen.waits if caller.models is None else 'room'}."
    if not seen.victims:
        return f"{how}{where}{takes}. Nobody has to leave for it."
    if caller.models is not None:
        return f"{how}{where}{takes}, after others have made room."
    others = [f"{each.replica} {_outcome(each)}. {_end(each)}" for each in seen.victims]
    return f"{how}{where}{takes}, after others have made room: {' '.join(others)}"


def _outcome(each: Leaving) -> str:
    return f"is put to sleep at level {each.level}" if each.level else "is stopped"


def _leaving(each: Leaving) -> str:
    """The end of its requests, what becomes of the engine, and how it comes back."""
    host = {1: "Its weights move to host memory", 2: "Its weights are dropped", 0: "Its engine is stopped"}[each.level]
    back = "wakes it" if each.level else "starts it again"
    if each.state is State.SLEEPING and each.level:
        return "It sleeps already."
    return f"{_end(each)} {host}{_frees(each)}. The next request {back}, about {_seconds(each.back)}."


def _end(each: Leaving) -> str:
    if not each.running:
        return "It answers nothing now."
    cut = f"; what is left after {_seconds(each.cut_after)} is cut" if each.cut_after is not None else ""
    verb = "comes to its" if each.running == 1 else "come to their"
    return f"{_count(each.running, 'request')} that it answers now {verb} end first{cut}."


def _frees(each: Leaving) -> str:
    if not each.devices or not each.frees:
        return ""
    where = f"GPU {', '.join(map(str, each.devices))}"
    return f", and {in_words(each.frees)} on {'each of ' if len(each.devices) > 1 else ''}{where} come free"


def _refused(view: View) -> str:
    return f"{_count(view.queued, 'request')} that wait for it are refused."


def _pin(view: View) -> str:
    loaded = "" if view.state is not State.STOPPED else " This does not load it."
    kept = "It is neither put to sleep nor stopped to make room for others, until it is unpinned or vllmd restarts."
    return kept + loaded


def _release(view: View) -> str:
    if not view.leases:
        return "It has no lease."
    last = len(view.leases) == 1 and not view.pinned
    return "It may sleep, and make room for others, again." if last else "It stays: others keep it as well."


def _called(each: Leaving, every: Sequence[Leaving]) -> str:
    return f"{each.replica}: " if len(every) > 1 else ""


def _joined(parts: Sequence[str], nothing: str) -> str:
    return " ".join(parts) or nothing


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
