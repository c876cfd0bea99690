"""What is on the wire stays as it was: the names and values of a scene, as they were before answers had types."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllmd.admin import instances, models
from vllmd.api import codec
from vllmd.api.answers import DeviceNow
from vllmd.config.types import Config, ModelConfig, ReplicaConfig
from vllmd.core.types import Decision, DeviceView, ModelView, ReplicaView, Snapshot, State
from vllmd.daemon import serializers, status
from vllmd.daemon.dates import Dates
from vllmd.daemon.last_starts import Start
from vllmd.daemon.self_description import SelfDescription
from vllmd.engines.base import Listen, Progress
from vllmd.proxy.access import Caller

WIRE = Path(__file__).with_name("wire.json")
GiB = 1 << 30
# What each moment has for itself.
OF_NOW = frozenset({"created", "uptime", "pid", "version", "started_at", "at", "updated_at", "created_at"})


def replica(name: str, state: State = State.READY, **over: Any) -> ReplicaView:
    """One engine's view."""
    told = {
        "level": 0, "devices": (0,), "memory": GiB, "in_flight": 1, "queued": 0, "oldest_wait": None, "idle": None,
        "since": 5.0, "pinned": False, "leases": ("ann",), "waiting_for": "", "failure": "",
    }  # fmt: skip
    return ReplicaView(name=name, state=state, **{**told, **over})


def model(name: str, *replicas: ReplicaView, balanced: bool = False) -> ModelView:
    """A model's, as its first replica is."""
    first = replicas[0]
    told = {each: getattr(first, each) for each in ReplicaView.__dataclass_fields__ if each != "bound"}
    more: dict[str, Any] = {"replicas": replicas, "balanced": balanced, "serving": 1, "degraded": balanced}
    return ModelView(**{**told, "name": name, **more})


ALONE = ModelConfig(name="org/alone", model="/srv/alone", aliases=("a", "b"), engine="sim", max_model_len=4096)
PAIR = ModelConfig(name="pair", engine="sim", replicas=ReplicaConfig(of=()))
ENGINES = {"org/alone": ALONE, "pair@1": replace(PAIR, name="pair@1"), "pair@2": replace(PAIR, name="pair@2")}
VIEWS = (
    model("org/alone", replica("org/alone", State.STARTING, since=None, waiting_for="its start (2 of about 37 s)")),
    model("pair", replica("pair@1", health="serving", latency=0.25, rests_in=12.0),
          replica("pair@2", State.SLEEPING, level=1, devices=(), idle=3.0), balanced=True),
    model("gone", replica("gone", State.FAILED, failure="the engine exited with status 1\nTraceback", devices=())),
)  # fmt: skip
DEVICE = DeviceView(0, 80 * GiB, GiB, 30 * GiB, 0, "an operator drained it", drained=True)
DECISION = Decision(90.0, "evict", "pair", "it makes room", {"victims": "a:1", "need": 1.5, "cause": "swap"}, "pair@1")


def process(name: str, listen: Listen) -> Any:
    phase = Progress("weights", "3/8")
    running = SimpleNamespace(pid=77, unit=f"vllmd-model-{name}.scope")
    phases = SimpleNamespace(whole=True, spent=lambda at: {"imports": 8.0})
    return SimpleNamespace(instance=f"{name}#1", started=1.0, started_at=1.0, listen=listen, phase=phase,
                           running=running, phase_text="weights", phases=phases, loader="")  # fmt: skip


def status_input(**over: Any) -> status.StatusInput:
    """One moment, with whatever can be told in it."""
    device_now: Any = {"name": "H200", "id": "GPU-1", "links": (1,), "node": None, "power": 120.5, "temperature": 40.0}
    processes = {"org/alone": process("alone", Listen(uds="/run/x/s")), "pair@1": process("pair", Listen(port=8001))}
    memory = SimpleNamespace(source="declared", trouble="", about=lambda view: DeviceNow(**asdict(view), **device_now),
                             power=SimpleNamespace(watts={"pair@1": 99.5}, since_used={"pair@1": 7.5}))  # fmt: skip
    back: Any = SimpleNamespace(
        engines=SimpleNamespace(processes=processes, standbys=SimpleNamespace(kept={})), memory=memory,
        learnt=SimpleNamespace(dates=Dates(), runs={}, starts={"org/alone": Start(44.0)}), launched_by="systemd",
    )  # fmt: skip
    snapshot = Snapshot(100.0, VIEWS, (DEVICE,), 64 * GiB, GiB, (DECISION,))
    config = Config(models={"org/alone": ALONE, "pair": PAIR}, files=(Path("/etc/vllmd/vllmd.yaml"),))
    told = {"config": config, "engines": ENGINES, "broken": "", "refused": "", "requests": 2, "connections": 3,
            "back": back}  # fmt: skip
    return status.StatusInput(**{**told, "snapshot": snapshot, **over})


def without_now(value: Any) -> Any:
    """The same without what each moment has for itself."""
    if isinstance(value, dict):
        return {key: "now" if key in OF_NOW and each is not None else without_now(each) for key, each in value.items()}
    return [without_now(each) for each in value] if isinstance(value, list) else value


def told() -> Any:
    """Everything that is told of the scene, decoded from its bytes."""
    seen = status_input()
    lines = tuple(status.model_line(seen, view) for view in VIEWS)
    whole, alone = status.status(seen, 0.0, lines), status.line_of(seen, "org/alone")
    card = serializers.card(ALONE, ["/v1/chat/completions", "/tokenize"], VIEWS[0], "generate", SelfDescription(8192))
    some = Caller(name="narrow", models=frozenset({"pair"}))
    said = {
        "status": whole,
        "opening": status.status(status_input(back=None, snapshot=None), 0.0, ()),
        "broken, for some": status.of_caller(status.status(status_input(broken="vllmd.yaml:1: x"), 0.0, lines), some),
        "line": alone,
        "replica": status.line_of(seen, "pair@2"),
        "health": serializers.health(VIEWS, [DEVICE], "", "", ready=True),
        "ill": serializers.health(VIEWS, [], "", "NVML: mismatch", ready=True),
        "card": models._card(card, "a"),
        "unloaded card": models._card(serializers.card(PAIR, [], None, ""), "pair"),
        "decision": serializers.decision(DECISION, 100.0),
        "instance": instances.instance(status.line_of(seen, "pair")),
        "items": instances.items(status.line_of(seen, "pair")),
    }
    return without_now(json.loads(codec.encoded(said)))


def missing(was: Any, now: Any, where: str = "") -> list[str]:
    """What was told and is not told so any more."""
    if isinstance(was, dict) and isinstance(now, dict):
        return [each for key in was for each in missing(was[key], now.get(key, "nothing"), f"{where}.{key}")]
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return [one for at, pair in enumerate(zip(was, now, strict=True)) for one in missing(*pair, f"{where}[{at}]")]
    return [] if was == now else [f"{where}: {was!r} is {now!r}"]


def test_what_is_told_is_what_was_told() -> None:
    """To a name and a value; what is new may stand beside it."""
    assert missing(json.loads(WIRE.read_text()), told()) == []
