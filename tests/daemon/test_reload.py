"""What a reload does with every setting of the table is what its column says, and nothing but the table says it."""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import itertools
import json
import logging
import re
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from vllmd.admin.models import ModelEndpoints
from vllmd.admin.responses import json_in_turns
from vllmd.api.answers import Decision, Reloaded
from vllmd.cli import standing
from vllmd.cli.verbs import doctor, ps
from vllmd.config.loader import load
from vllmd.config.nodes import Where, from_plain
from vllmd.config.reload import BY_SYSTEMD, LATER
from vllmd.config.settings import Group, Leaf, Reload, leaves
from vllmd.config.types import Config, ModelConfig
from vllmd.config.value_types import Wrong
from vllmd.core import commands, events
from vllmd.core.types import Placement, State
from vllmd.daemon import startup
from vllmd.daemon.admission_gate import AdmissionGate
from vllmd.daemon.back_end import BackEnd
from vllmd.daemon.boot_clock import seconds_since
from vllmd.daemon.current import RuntimeEnvironment
from vllmd.daemon.dates import Dates
from vllmd.daemon.device_readings import devices_found
from vllmd.daemon.disabled import Disabled
from vllmd.daemon.engine_manager import EngineManager
from vllmd.daemon.engine_process import EngineProcess
from vllmd.daemon.front_end import FrontEnd
from vllmd.daemon.last_starts import Start
from vllmd.daemon.operator_commands import OperatorCommands
from vllmd.daemon.previews import Previews
from vllmd.daemon.self_description import Descriptions
from vllmd.daemon.service import Daemon, for_this_host
from vllmd.engines.base import Listen
from vllmd.engines.sim import Sim
from vllmd.errors import NotFound, Unavailable, VllmdError
from vllmd.gpu.declared import DeclaredDevices
from vllmd.launcher.client import LauncherClient, Running
from vllmd.launcher.protocol import PROTOCOL
from vllmd.proxy.access import ANYBODY
from vllmd.proxy.http import MEMBERS_PER_TURN
from vllmd.sizes import GiB

BASE: dict[str, Any] = {
    "devices": [{"memory": "80GiB"}, {"memory": "80GiB"}],
    "models": {"m": {"engine": "sim", "gpu_memory": "10GiB"}},
}
# What two values of a setting are, where the first two that fit its kind would change nothing or not be valid.
VALUES: dict[str, tuple[Any, Any]] = {
    "server.listen": (["127.0.0.1:1024"], ["127.0.0.1:1025"]),
    "server.host": ("127.0.0.1", "127.0.0.2"),
    "server.port": (1024, 1025),
    "auth.keys[].key": ("first-key-of-all", "second-key-of-all"),
    "devices[].memory": ("70GiB", "80GiB"),
    "auth.public": (["health"], ["metrics"]),
    "engines.port_start": (33400, 33401),
    "engines.port_end": (33400, 33401),
    "models.NAME.engine": ("sim", "vllm"),
    "models.NAME.devices": ([0], [1]),
    "models.NAME.local_devices": (1, 2),
    "models.NAME.host": (socket.gethostname(), "elsewhere.example"),
    "models.NAME.user": ("own", "somebody"),
    "models.NAME.api_key": ("first-key-of-all", "second-key-of-all"),
    "models.NAME.capabilities": (["chat"], ["embeddings"]),
    "models.NAME.command": (["/bin/true"], ["/bin/false"]),
    "models.NAME.env": ({"A": "1"}, {"A": "2"}),
    "models.NAME.options": ({"load_time": "1s"}, {"load_time": "2s"}),
    "models.NAME.extra_args": ({"a": 1}, {"a": 2}),
    "models.NAME.request.set": ({"top_p": 1}, {"top_p": 0.5}),
    "models.NAME.request.default": ({"top_p": 1}, {"top_p": 0.5}),
    "models.NAME.variants.NAME.request.set": ({"top_p": 1}, {"top_p": 0.5}),
    "models.NAME.variants.NAME.request.default": ({"top_p": 1}, {"top_p": 0.5}),
    "pools.NAME.models": (["m"], ["one"]),
    "models.NAME.when_free.shares": ({0.9: 0.5}, {0.9: 0.6}),
    "models.NAME.replicas.of": ([{"name": "a"}, {"name": "b"}], [{"name": "a"}, {"name": "c"}]),
    "models.NAME.tensor_parallel_size": (1, 2),
    "models.NAME.pipeline_parallel_size": (1, 2),
    "idle.level": (1, 2),
    "pull.endpoint": ("http://one.example", "http://two.example"),
    "server.event_loop": ("asyncio", "uvloop"),
    "records.spans": ("http://one.example", "http://two.example"),
    "pull.index": ("http://one.example", "http://two.example"),
    "models.NAME.preload": (False, True),
    "models.NAME.gpu_memory": ("10GiB", "20GiB"),
    "models.NAME.idle.level": (1, 2),
    "idle.energy": ("7Wh", "8Wh"),
    "models.NAME.idle.energy": ("7Wh", "8Wh"),
}
FILES = frozenset({"key_file", "hf_token_file"})
WITH_KEY: dict[str, dict[str, str]] = {"key_file": {}}  # the setting that is a key's secret itself
CANDIDATES: list[Any] = [
    *(True, False, "70MiB", "80MiB", 7, 8, "7s", "8s", 0.5, 0.6, "models", "read", "lru", "adaptive"),
    *("debug", "warning", "continue", "kill", "wait", "evict", "/tmp/one", "/tmp/two", ["one"], ["two"], "one", "two"),
]  # fmt: skip


def settings() -> list[Leaf]:
    """Every setting that has a value of its own."""
    return [leaf for leaf in leaves() if not isinstance(leaf.row.kind, Group)]


def values(leaf: Leaf, folder: Path) -> tuple[Any, Any]:
    """Two values of the setting."""
    alike = leaf.path.replace("defaults.", "models.NAME.") if leaf.path.startswith("defaults.") else leaf.path
    if leaf.path.startswith("server.tls."):
        one, two, key, other = certificates()
        return (str(one), str(two)) if leaf.row.name == "cert" else (str(key), str(other))
    if leaf.row.name in FILES:
        for name in ("one", "two"):
            (folder / name).write_text(f"the-key-of-{name}")
            (folder / name).chmod(0o600)
        return str(folder / "one"), str(folder / "two")
    return VALUES.get(alike) or next(_two(leaf))


@functools.cache
def certificates() -> tuple[Path, Path, Path, Path]:
    """Two certificates of one key, the key, and the key once more."""
    folder = Path(tempfile.mkdtemp(prefix="vllmd-test-tls-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    paths = folder / "one.pem", folder / "two.pem", folder / "key.pem", folder / "other.pem"
    new = ["openssl", "req", "-x509", "-days", "2", "-subj", "/CN=test"]
    made = [
        *new,
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-keyout",
        paths[2],
        "-out",
        paths[0],
    ]
    subprocess.run(made, check=True, capture_output=True)
    subprocess.run([*new, "-key", paths[2], "-out", paths[1]], check=True, capture_output=True)
    shutil.copy(paths[2], paths[3])
    return paths


def _two(leaf: Leaf) -> Iterator[tuple[Any, Any]]:
    fitting = []
    for value in CANDIDATES:
        try:
            fitting.append((value, leaf.row.kind.parse(from_plain(value, Where("test")))))  # type: ignore[union-attr]
        except Wrong:
            continue
    yield from ((one, two) for (one, a), (two, b) in itertools.pairwise(fitting) if a != b)


def document(leaf: Leaf, value: Any) -> dict[str, Any]:
    """A configuration in which the setting has that value, and all else that makes it count."""
    found = surroundings(leaf)
    place: Any = found
    first = "pool" if leaf.path.startswith("pools.") else "m"
    *path, name = leaf.path.replace("[]", "").replace("NAME", first, 1).replace("NAME", "other").split(".")
    for step in path:
        place = place.setdefault(step, {})
        place = place[0] if isinstance(place, list) else place
    place[name] = value
    return found


def server(path: list[str]) -> dict[str, Any]:
    """The same of a setting of the server."""
    if path[0] == "tls":
        cert, _, key, _ = certificates()
        return {"tls": {"cert": str(cert), "key": str(key)}}
    return {"host": "127.0.0.1", "port": 1024} if path[0] in ("host", "port") else {}


def surroundings(leaf: Leaf) -> dict[str, Any]:
    """What makes the setting count."""
    found = json.loads(json.dumps(BASE))
    model, defaults = found["models"]["m"], found.setdefault("defaults", {})
    match leaf.path.split("."):
        case ["server", *rest]:
            found["server"] = server(rest)
        case ["auth", *_]:
            found["auth"] = {"keys": [{"name": "somebody", **WITH_KEY.get(leaf.row.name, {"key": "a-key-of-his"})}]}
        case [*_, "when_free", _]:
            del model["gpu_memory"]
            model["when_free"] = defaults["when_free"] = {"shares": {0.9: 0.7}}
        case [*_, "local_devices"]:
            defaults["tensor_parallel_size"] = 2
        case ["pools", *_]:
            found["models"]["one"] = {"engine": "sim", "command": "/bin/false"}
            found["pools"] = {"pool": {"models": ["m"]}}
        case [*_, "adapters", "NAME", _]:
            model["adapters"] = {"other": {"path": "/lora"}}
        case [*_, "replicas", name]:
            model["replicas"] = {} if name == "of" else {"min": 2, "max": 16}
        case [*_, "engine_version"]:
            model["engine"] = defaults["engine"] = "vllm"  # a kind that has versions; none is installed, which is said
        case ["defaults", name]:
            model.pop(name, None)
            defaults["engine"] = "sim"  # whose kind what is an engine's own is for
    return found


class NoLauncher:
    """Nothing runs, and what is to be started never comes up."""

    connected, trouble = True, ""

    async def start(self, order: Any) -> Any:
        await asyncio.get_running_loop().create_future()

    async def info(self) -> Any:
        return SimpleNamespace(backend="none", protocol=PROTOCOL)

    async def list(self) -> list[Any]:
        return []


@dataclass(frozen=True)
class Living:
    """A daemon that has opened."""

    daemon: Daemon
    back: BackEnd

    @property
    def front(self) -> FrontEnd:
        return self.daemon.front

    @property
    def config(self) -> Config:
        return self.front.current.config


Act = Callable[[Living], Awaitable[None]]


def lives(
    config: Config,
    folder: Path,
    act: Act,
    *,
    activated: bool = False,
    learnt: Path | None = None,
    again: Callable[[], Config] | None = None,
    broken: str = "",
) -> None:
    """A whole daemon by that configuration, but for its sockets and its launcher. ``again``: what a reload reads."""

    async def main() -> None:
        around = RuntimeEnvironment(Path("/nowhere"), logs=folder / "logs", activated=activated, learnt=learnt)
        daemon = Daemon(await for_this_host(config, around), around, again or (lambda: config), {}, broken)
        back = await startup.back_end(daemon.front)
        daemon.front.open(back)
        await act(Living(daemon, back))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "launcher_client", lambda *_: NoLauncher())
        level = logging.getLogger().level
        logging.getLogger().setLevel(config.log_level.upper())
        try:
            asyncio.run(asyncio.wait_for(main(), 60))
        finally:
            logging.getLogger().setLevel(level)


# What the HTTP side reads of ServerConfig, each time that it needs it.
SOURCES = [path.read_text() for path in (Path(__file__).resolve().parents[2] / "vllmd").rglob("*.py")]
READ = {name for text in SOURCES for name in re.findall(r"limits\.now\.(\w+)", text)}


async def in_effect(living: Living) -> dict[str, Any]:
    """Everything by which the daemon acts, read where it acts by it and not from the configuration."""
    listeners, core = living.front.listeners, living.back.dispatcher.scheduler.core
    server, records = living.config.server, living.front.records
    living.back.post(events.TimePassed())  # what is to be preloaded is looked at
    return {
        "limits": {each: getattr(listeners.limits.now, each) for each in READ} | {"buffered": listeners.memory.limit},
        "callers": [(digest, replace(caller, refusal=None)) for digest, caller in listeners.keys.callers],
        "stranger": replace(listeners.keys.anonymous, refusal=None),
        "quotas": {name: quota.key for name, quota in listeners.quotas.by_key.items()},
        "ranks": listeners.quotas.ranks,
        "page": (listeners.ui, listeners.tls),
        "records": (records.config, records.keeps, records._ring._entries.maxlen),
        "hosts": listeners.keys.hosts._names,
        "origins": listeners.cors.origins,
        "policy": (core.settings, core.policy.name, core.engines.ledger.host_budget),
        "devices": [(a.device, a.capacity) for a in core.engines.ledger.accounts.values()],
        "files": (living.back.memory.files, living.back.memory.inventory),
        "models": {name: model.spec for name, model in core.models.items()},
        "pinned": {name: r.pinned for name, r in core.replicas.items()},
        "targets": {name: living.front.gate.resolve(name)
                    for name in (*living.config.models, *living.front.gate.offers)},
        "names": [resolved(living, name) for name in ("m", "one", "two")],
        "cards": await living.front.status.models(),
        "launches": {name: launch(living, name) for name in living.front.current.engines},
        "standbys": living.back.engines.standbys.count,
        "ports": living.back.engines.launch_planner.ports.range,
        "level": logging.getLogger().level,
        "replicas": {name: model.replicas and (model.replicas.probe, model.replicas.probe_route)
                     for name, model in living.config.models.items()},
        # read each time when they are needed
        "keep_alive": living.front.gate.keep_alive_limit,
        "pull": living.config.pull,
        "read": (server.idle_exit, server.drain_timeout, living.config.discover, living.config.auth.allow_anonymous,
                 living.config.engines.read_ahead, living.config.engines.fast_loaders),
    }  # fmt: skip


def resolved(living: Living, name: str) -> str:
    try:
        return living.front.gate.resolve(name).model
    except VllmdError:
        return ""


def launch(living: Living, name: str) -> Any:
    """How its engine would be started now."""
    planner = living.back.engines.launch_planner
    try:
        process, order = planner.prepare(commands.StartEngine(name, Placement((0,)), 10 * GiB))
    except VllmdError as error:
        return error.message
    planner.release(process)
    told = str(order).replace(process.instance, "INSTANCE") if order else ""
    told = re.sub(r"'(since|started)(_monotonic)?': '[^']*'", "", told)  # when: of each start another one
    kept = process.model
    return told, kept.warm_up, kept.start_timeout, kept.stop_timeout, kept.log_file, kept.numa


def read(folder: Path, document: dict[str, Any]) -> Config:
    file = folder / "vllmd.yaml"
    file.write_text(yaml.safe_dump(document))
    file.chmod(0o600)
    return load(file, env={})


@pytest.mark.parametrize("leaf", settings(), ids=lambda leaf: leaf.path)
def test_a_reload_does_with_a_setting_what_its_column_says(leaf: Leaf, tmp_path: Path) -> None:
    """What is taken is as after a start; what is not is as before, and named; engines go for settings of their own."""
    one, two = values(leaf, tmp_path)
    before, after = read(tmp_path, document(leaf, one)), read(tmp_path, document(leaf, two))
    assert before != after
    seen: list[dict[str, Any]] = []
    answers: list[Reloaded] = []

    async def look(living: Living) -> None:
        seen.append(await in_effect(living))

    async def reload(living: Living) -> None:
        await look(living)
        answers.append(await living.daemon.apply_configuration(await for_this_host(after, living.front.runtime)))
        await look(living)

    lives(before, tmp_path, reload)
    lives(after, tmp_path, look)
    was, is_now, is_after_a_start = seen
    later = answers[0].later
    if leaf.reload is Reload.NEXT_START:
        assert set(later.values()) == {LATER} and len(later) == 1
        assert is_now == was
        return
    assert later == {}
    assert was != is_after_a_start, "the test cannot see this setting"
    assert is_now == is_after_a_start
    if leaf.reload is not Reload.ENGINE:
        assert answers[0].changed == ()
    elif not leaf.path.startswith("models.NAME.replicas"):
        assert answers[0].changed == ("m",)


def reloaded(before: dict[str, Any], after: dict[str, Any], folder: Path, *, activated: bool = False) -> Reloaded:
    """What the daemon answers."""
    one, two = read(folder, before), read(folder, after)
    answers: list[Reloaded] = []

    async def reload(living: Living) -> None:
        answers.append(await living.daemon.apply_configuration(two))

    lives(one, folder, reload, activated=activated)
    return answers[0]


def test_where_systemd_listens_the_addresses_are_said_to_be_its_own(tmp_path: Path) -> None:
    """A restart would not change them either."""
    after = {**BASE, "server": {"port": 1234}}
    assert reloaded(BASE, after, tmp_path).later == {"server.listen": LATER}
    assert reloaded(BASE, after, tmp_path, activated=True).later == {"server.listen": BY_SYSTEMD}


def test_what_is_not_in_force_is_said_again_until_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the log as in the answer; and the value that is in force is what everybody is shown meanwhile."""
    before, after = read(tmp_path, BASE), read(tmp_path, {**BASE, "server": {"port": 1234}, "policy": "lru"})

    async def reload(living: Living) -> None:
        for _ in range(2):
            answer = await living.daemon.apply_configuration(after)
            assert answer.later == {"server.listen": LATER}
            assert living.config.server.listen == before.server.listen
            assert (await living.front.status.status()).policy == "lru"
        assert (await living.daemon.apply_configuration(before)).later == {}

    lives(before, tmp_path, reload)
    assert [each.getMessage() for each in caplog.records].count(f"server.listen {LATER}") == 2


def test_nothing_more_is_put_on_a_device_than_a_reload_says_that_it_has(tmp_path: Path) -> None:
    """The devices are there when the reload is answered, not half a second later: 100 GiB would run on 80."""
    bare = {"devices": [], "models": {}}
    full = {
        "devices": [{"memory": "80GiB"}],
        "models": {name: {"engine": "sim", "gpu_memory": "50GiB", "preload": True} for name in ("a", "b")},
    }
    one, two = read(tmp_path, bare), read(tmp_path, full)

    async def reload(living: Living) -> None:
        await living.daemon.apply_configuration(two)
        living.back.post(events.TimePassed())
        states = {view.name: view.state for view in living.front.status.status_input().snapshot.models}  # type: ignore[union-attr]
        assert states == {"a": State.STARTING, "b": State.STOPPED}

    lives(one, tmp_path, reload)


def test_a_model_that_can_never_fit_is_told_on_every_screen_and_the_others_are_served(tmp_path: Path) -> None:
    """With the arithmetic, before anybody asks for it; once the device is larger nothing of it is left."""

    def of(memory: str) -> Config:
        models = {"good": {"engine": "sim", "gpu_memory": "10GiB"}, "bad": {"engine": "sim", "gpu_memory": "90GiB"}}
        return read(tmp_path, {"devices": [{"memory": memory}], "models": models})

    async def look(living: Living) -> None:
        bad, good = (await living.front.status.status()).models
        assert (good.never, bad.state) == ("", "stopped")
        assert bad.never == ("'bad' needs 90 GiB on 1 device; device 0 has 80 GiB less a reserve of 512 MiB: 79.5 GiB")
        told = f"can never be loaded: {bad.never}"
        assert ps.note(bad) == told
        assert standing.now(bad, made=True) == f"bad is stopped; it {told}"
        assert [what for _, what, _ in doctor.models(await living.front.status.status())] == [f"bad {told}"]
        (warning,) = (await living.daemon.apply_configuration(small)).warnings
        assert "models.bad.gpu_memory: it needs 90 GiB" in warning
        answer = await living.daemon.apply_configuration(of("100GiB"))
        assert answer.warnings == ()
        assert [line.never for line in (await living.front.status.status()).models] == ["", ""]

    small = of("80GiB")
    lives(small, tmp_path, look)


def test_an_engine_goes_on_when_its_device_is_no_longer_in_the_list(tmp_path: Path) -> None:
    """A list that was read again says nothing about an engine that serves; nothing else is put there."""
    less = {**BASE, "devices": [{"memory": "80GiB"}]}
    one, two = read(tmp_path, BASE), read(tmp_path, less)

    async def reload(living: Living) -> None:
        living.back.post(events.EngineAdopted("m", Placement((1,)), State.READY))
        await living.daemon.apply_configuration(two)
        status = await living.front.status.status()
        assert [(line.name, line.state, line.devices) for line in status.models] == [("m", "running", (1,))]
        assert [(each.index, each.wedged) for each in status.devices] == [
            (0, ""),
            (1, "it is not there any more"),
        ]

    lives(one, tmp_path, reload)


def test_an_engine_is_adopted_although_its_device_is_not_in_the_list(tmp_path: Path) -> None:
    """As after a repair of a broken file, while the devices are not yet those of the file."""
    less = read(tmp_path, {**BASE, "devices": [{"memory": "80GiB"}]})

    async def adopted(living: Living) -> None:
        living.back.post(events.EngineAdopted("m", Placement((1,)), State.SLEEPING, 1))
        living.back.post(events.LoadAsked("m"))
        assert [(each.index, each.wedged) for each in (await living.front.status.status()).devices][1] == (
            1,
            "it is not there any more",
        )

    lives(less, tmp_path, adopted)


def test_settings_for_a_model_that_is_used_by_now_change_nothing(tmp_path: Path) -> None:
    """Two programs bring the same model along at once; whoever comes second finds it used, and leaves it as it is."""

    async def put(living: Living) -> None:
        models, settings = living.front.runtime_models, {"engine": "sim", "gpu_memory": "1GiB"}
        await models.put("guest", settings, trusted=True)
        other, asked = {**settings, "gpu_memory": "2GiB"}, events.RequestArrived("r", "guest")
        first = asyncio.ensure_future(models.put("guest", other, trusted=True))
        await asyncio.sleep(0)
        assert living.front.changing.locked()  # its sizes are being reckoned
        living.back.post(asked)
        assert (await first).differs == ("gpu_memory",)
        assert living.config.models["guest"].gpu_memory == GiB
        living.back.post(events.RequestGone("r"))
        assert (await models.put("guest", other, trusted=True)).differs == ()
        assert living.config.models["guest"].gpu_memory == 2 * GiB

    lives(read(tmp_path, BASE), tmp_path, put)


def test_how_long_it_has_been_so_is_the_models_and_not_the_daemons(tmp_path: Path) -> None:
    """An adopted engine has been ready for as long as it has; of one that never ran nothing is claimed."""
    two = read(tmp_path, {**BASE, "models": {**BASE["models"], "n": {"engine": "sim", "gpu_memory": "1GiB"}}})

    async def look(living: Living) -> None:
        assert living.front.status.line("n")["since"] is None
        living.back.post(events.EngineAdopted("m", Placement((0,)), State.READY, since=3600.0))
        assert 3600 <= living.front.status.line("m")["since"] < 3660
        living.front.learnt.runs["n"] = [("n-000001", time.time() - 7200)]
        assert 7200 <= living.front.status.line("n")["since"] < 7260
        living.front.learnt.runs["n"] = [("n-000001", time.time() + 7200)]  # the clock has been set back
        assert living.front.status.line("n")["since"] is None

    lives(two, tmp_path, look)


def test_a_state_began_when_it_began_whatever_became_of_the_clock_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its date, and the engine's, are those of then: somebody has set the clock, or the machine was suspended."""

    async def look(living: Living) -> None:
        was, ahead = time.time(), [0.0]
        living.front.learnt.dates = Dates(lambda: was + ahead[0])
        dispatcher, changed = living.back.dispatcher, living.front.changes.engine_event
        dispatcher.post(events.LoadAsked("m"))
        process = EngineProcess(living.config.models["m"], Sim(), "m-000001", Listen(), Placement((0,)), "")
        living.back.engines.processes["m"], process.started_at = process, was
        ahead[0] = 86400.0
        changed(events.EngineReady("m"), dispatcher)
        ahead[0] = 2 * 86400.0
        monkeypatch.setattr("time.time", lambda: was + ahead[0])
        line = living.front.status.line("m")
        assert line["state"] == "running"
        assert line["changed_at"] == pytest.approx(was + 86400, abs=60)
        assert line["started_at"] == was

    lives(read(tmp_path, BASE), tmp_path, look)


def test_the_state_of_an_adopted_engine_has_the_date_that_was_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock was set, or the machine suspended, before this daemon began."""

    async def look(living: Living) -> None:
        at, date = time.monotonic() - 3600.0, time.time() - 90000.0
        noted = {"model": "m", "since_monotonic": f"{at:.1f}", "since": f"{date:.1f}"}

        async def listed() -> list[Running]:
            return [Running("m-000001", 1, "", metadata=noted)]

        async def adopted(engines: object, running: list[Running], *_: object) -> None:
            since = seconds_since(running[0].metadata, "since")
            living.back.post(events.EngineAdopted("m", Placement((0,)), State.READY, since=since))

        monkeypatch.setattr(living.back.launcher, "list", listed)
        monkeypatch.setattr(startup, "adopt_all", adopted)
        await startup.adopt_running(living.front, living.back)
        line = living.front.status.line("m")
        assert line["changed_at"] == pytest.approx(date, abs=1)
        assert line["since"] == pytest.approx(3600, abs=60)

    lives(read(tmp_path, BASE), tmp_path, look)


def test_an_engine_that_is_started_while_one_looks_for_others_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator may load a model as soon as its configuration is mended. It was ended as a second one."""

    async def look(living: Living) -> None:
        to_adopt = list[list[Running]]()

        async def listed() -> list[Running]:
            process = EngineProcess(living.config.models["m"], Sim(), "m-000001", Listen(), Placement((0,)), "")
            living.back.engines.processes["m"] = process
            return [Running(process.instance, 1, ""), Running("n-000002", 2, "")]

        async def adopted(engines: object, running: list[Running], *_: object) -> None:
            to_adopt.append(running)

        monkeypatch.setattr(living.back.launcher, "list", listed)
        monkeypatch.setattr(startup, "adopt_all", adopted)
        await startup.adopt_running(living.front, living.back)
        assert [[each.instance for each in running] for running in to_adopt] == [["n-000002"]]

    lives(read(tmp_path, BASE), tmp_path, look)


@pytest.mark.parametrize(("runs", "known"), [((), []), (("m",), ["m", "old", "n"]), (("n",), ["old", "n"])])
def test_what_an_earlier_daemon_started_is_known_to_standbys_where_engines_are_taken_over(
    runs: tuple[str, ...], known: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the starts. A daemon that finds no engine may be there for one question only."""
    sim = {"engine": "sim", "gpu_memory": "1GiB"}
    config = read(tmp_path, {**BASE, "models": {"m": sim, "n": sim, "old": sim}})

    async def look(living: Living) -> None:
        engines, found = living.back.engines, list[str]()

        async def adopted(*_: object) -> None:
            engines.processes.update(dict.fromkeys(runs, SimpleNamespace(instance="")))

        def find(models: Sequence[ModelConfig]) -> None:
            found.extend(model.name for model in models)

        monkeypatch.setattr(startup, "adopt_all", adopted)
        monkeypatch.setattr(engines.standbys, "remember", find)
        for name in ("old", "gone", "n"):
            living.front.learnt.starts.note(name, Start(1.0))
        await startup.adopt_running(living.front, living.back)
        assert found == known

    lives(config, tmp_path, look)


def test_what_is_wrong_with_the_launcher_is_told_while_the_daemon_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the launcher's answers, and until then `vllmctl status` would only say that it opens."""
    config = read(tmp_path, BASE)

    async def main() -> None:
        launcher = LauncherClient.at(tmp_path / "nowhere")
        monkeypatch.setattr(startup, "launcher_client", lambda *_: launcher)
        daemon = Daemon(config, RuntimeEnvironment(Path("/nowhere")), lambda: config, {})
        opening = asyncio.ensure_future(startup.back_end(daemon.front))
        while not launcher.trouble:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        status = await daemon.front.status.status()
        opening.cancel()
        await asyncio.wait({opening})
        assert not status.opened
        assert status.launcher_trouble.startswith("it cannot be connected to: ")

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_drained_device_that_is_gone_can_be_given_back(tmp_path: Path) -> None:
    """Or it would be drained when it comes back, and the daemon would never exit. Of no other is that said."""

    async def look(living: Living) -> None:
        nothing: Any = None
        asked = OperatorCommands(living.front.back, living.front.instances, nothing, nothing, nothing)
        told, there = Previews(living.front.back, lambda: living.config), living.back.memory.inventory
        assert (await asked.drain(1, True)).drained
        living.back.post(devices_found(DeclaredDevices(living.config.devices[:1], 0)))
        with pytest.raises(NotFound):
            await told.of_device(1, "drain")
        assert (await told.of_device(1, "undrain")).possible
        assert (await asked.drain(1, False)).wedged == "it is not there any more"
        for ask in (asked.drain(1, False), told.of_device(1, "undrain")):
            with pytest.raises(NotFound):
                await ask
        living.back.post(events.DevicesChanged(tuple(there)))
        assert not (await told.of_device(1, "undrain")).possible

    lives(read(tmp_path, BASE), tmp_path, look)


PRELOADED = {"engine": "sim", "gpu_memory": "10GiB", "preload": True}


def test_nothing_is_preloaded_before_what_runs_is_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be started anew, and the engine that ran would be ended as a second one. Nor what was disabled."""
    config = read(tmp_path, {**BASE, "models": {"m": PRELOADED, "n": PRELOADED, "o": PRELOADED}})
    at_adoption = list[set[str]]()

    async def adopted(engines: EngineManager, running: object, models: object, of: object, post: Any) -> None:
        for _ in range(20):  # the launcher and the engines are asked meanwhile
            await asyncio.sleep(0)
        at_adoption.append({*engines.processes})
        post(events.EngineAdopted("m", Placement((0,)), State.READY))

    def orders(self: Disabled, names: Collection[str]) -> list[events.ModelDisabled]:
        return [events.ModelDisabled("n", "taken out")]

    async def look(living: Living) -> None:
        living.back.post(events.TimePassed())
        assert (at_adoption, {*living.back.engines.processes}) == ([set()], {"o"})
        assert living.front.status.line("m")["state"] == "running"

    monkeypatch.setattr(startup, "adopt_all", adopted)
    monkeypatch.setattr(Disabled, "orders", orders)
    lives(config, tmp_path, look)


def test_a_mended_configuration_starts_nothing_before_what_runs_is_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to preload it nor for a request, which is answered 503 until it is known what runs."""
    config = read(tmp_path, {**BASE, "models": {"m": PRELOADED}})
    refused = list[str]()

    async def adopted(engines: EngineManager, running: object, models: object, of: object, post: Any) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        assert not engines.processes
        with pytest.raises(Unavailable) as refusal:
            gates[0].resolve("m")
        refused.append(refusal.value.message)
        post(events.EngineAdopted("m", Placement((0,)), State.READY))

    gates = list[AdmissionGate]()

    async def look(living: Living) -> None:
        gates.append(living.front.gate)
        await living.daemon.apply_configuration(config)
        assert len(refused) == 1 and "looked for" in refused[0]
        assert living.front.gate.resolve("m").names == {"m"}
        living.back.post(events.TimePassed())
        assert living.front.status.line("m")["state"] == "running"
        assert not living.back.engines.processes

    monkeypatch.setattr(startup, "adopt_all", adopted)
    lives(Config(), tmp_path, look, broken="vllmd.yaml:3: x")


def test_a_reload_while_the_daemon_ends_lets_nothing_in(tmp_path: Path) -> None:
    """Whoever comes then is for the next daemon; an engine that was begun for him would be ended at once."""

    async def look(living: Living) -> None:
        living.front.refuse_waiting()
        await living.daemon.reload()
        with pytest.raises(Unavailable, match="shutting down"):
            living.front.gate.resolve("m")

    lives(read(tmp_path, BASE), tmp_path, look)


def test_what_was_decided_by_an_earlier_daemon_is_told(tmp_path: Path) -> None:
    """And what is decided now is kept for the next one. Somebody has set the clock back meanwhile."""
    config = read(tmp_path, BASE)

    async def look(living: Living) -> None:
        earlier = Decision(time.time() + 3600, "evict", "m", "for another")
        living.front.learnt.decisions["m"], living.front.learnt.earlier["m"] = [earlier], [earlier]
        living.back.post(events.LoadAsked("m"))
        assert [each.what for each in living.front.status.decisions("m").decisions] == ["evict", "start"]
        assert [each.what for each in living.front.learnt.decisions["m"]] == ["evict", "start"]
        wall = living.front.status.decisions("m").decisions[1].at
        assert abs(wall - time.time()) < 600
        living.front.learnt.dates = Dates(lambda: time.time() - 86400)  # it was yesterday, by the clock as it was then
        assert living.front.status.decisions("m").decisions[1].at == pytest.approx(wall - 86400, abs=600)

    lives(config, tmp_path, look)


def test_a_model_that_comes_back_is_disabled_from_the_first_moment_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order was given when it was configured before. No request may come between the reload and the order."""

    def orders(self: Disabled, names: Collection[str]) -> list[events.ModelDisabled]:
        return [events.ModelDisabled("n", "taken out")] if "n" in names else []

    monkeypatch.setattr(Disabled, "orders", orders)
    config = read(tmp_path, BASE)
    with_it = read(tmp_path, {**BASE, "models": {**BASE["models"], "n": {"engine": "sim", "gpu_memory": "10GiB"}}})

    async def look(living: Living) -> None:
        models = living.back.dispatcher.scheduler.core.models
        reload = asyncio.ensure_future(living.daemon.apply_configuration(with_it))
        while not reload.done():
            assert "n" not in models or models["n"].disabled == "taken out"
            await asyncio.sleep(0)
        assert reload.result().added == ("n",)
        assert models["n"].disabled == "taken out"

    lives(config, tmp_path, look)


def test_metrics_tell_of_no_model_that_was_removed(tmp_path: Path) -> None:
    """How it started is remembered, in case it comes back; that it is there no more is what a scrape has to show."""
    config = read(tmp_path, BASE)

    async def look(living: Living) -> None:
        for name in ("m", "gone"):
            living.front.learnt.starts.note(name, Start(3.0, {"imports": 3.0}))
        gauges = await living.front.status.gauges()
        assert ({*gauges.last_starts}, {*gauges.last_phases}) == ({"m"}, {"m"})

    lives(config, tmp_path, look)


def test_many_models_are_told_of_in_turns_of_the_loop(tmp_path: Path) -> None:
    """Ten thousand held up every stream for seconds. Counted are the turns that others get meanwhile."""
    many = 5 * MEMBERS_PER_TURN
    models = {f"m{n}": {"engine": "sim"} for n in range(many)}
    config = read(tmp_path, {"devices": [], "models": models, "log_level": "error"})

    async def turns(work: Awaitable[Any]) -> int:
        done, turns = asyncio.ensure_future(work), 0
        while not done.done():
            await asyncio.sleep(0)
            turns += 1
        assert done.result()
        return turns

    async def look(living: Living) -> None:
        status = living.front.status
        told = await status.status()
        assert [line.name for line in told.models] == list(config.models)
        request: Any = SimpleNamespace(query={}, caller=ANYBODY)
        endpoints = ModelEndpoints(SimpleNamespace(status=status))  # type: ignore[arg-type]
        for work in (status.status(), status.models(), json_in_turns(told), endpoints.settings(request)):
            assert await turns(work) >= many // MEMBERS_PER_TURN
        card = await status.model("m7")
        assert card is not None and card.id == "m7" and card in await status.models()
        assert await status.model("nobody") is None

    lives(config, tmp_path, look)


def test_a_key_in_a_file_that_has_changed_counts_after_a_reload(tmp_path: Path) -> None:
    """The settings are the same as before, and what they name is not; nor is a file that was missing."""
    key = tmp_path / "key"
    key.write_text("first-key-of-all")
    key.chmod(0o600)
    options = {"url": "http://127.0.0.1:1/v1", "key_file": str(key)}

    def again() -> Config:
        return read(tmp_path, {"devices": [], "models": {"m": {"engine": "remote", "options": options}}})

    async def reload(living: Living) -> None:
        def headers() -> list[tuple[str, str]]:
            return list(living.front.gate.resolve("m").headers)

        assert headers() == [("authorization", "Bearer first-key-of-all")]
        key.write_text("second-key-of-all")
        await living.daemon.reload()
        assert headers() == [("authorization", "Bearer second-key-of-all")]
        key.unlink()
        await living.daemon.reload()
        assert headers() == []
        key.write_text("third-key-of-all")
        key.chmod(0o600)
        await living.daemon.reload()
        assert headers() == [("authorization", "Bearer third-key-of-all")]

    lives(again(), tmp_path, reload, again=again)


def test_what_a_reload_replaces_is_freed(tmp_path: Path) -> None:
    """It would be there twice for good: of ten thousand models of which all have changed that is 15 MB."""
    times = itertools.count(60)

    def again() -> Config:
        # A daemon makes models with replicas anew for its machine, so that nothing of this test's has the same objects.
        model = {"engine": "sim", "replicas": 2, "queue_timeout": next(times)}
        return read(tmp_path, {"devices": [], "models": {"m": model}})

    async def look(living: Living) -> None:
        await living.front.status.models()
        old = weakref.ref(living.config.models["m"])
        assert await living.daemon.reload()
        gc.unfreeze()
        gc.collect()
        assert old() is None

    lives(again(), tmp_path, look, again=again)


def test_a_reload_while_models_are_listed_leaves_the_list_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines are asked for the list, and meanwhile a model gets replicas."""

    def of(**more: Any) -> Config:
        return read(tmp_path, {"devices": [], "models": {"m": {"engine": "sim", **more}}})

    async def look(living: Living) -> None:
        async def said(*_: object) -> dict[str, object]:
            await living.daemon.apply_configuration(of(replicas=2))
            return {}

        monkeypatch.setattr(Descriptions, "of", said)
        assert [card.id for card in await living.front.status.models()] == ["m"]
        assert len(living.front.current.engines) == 2

    lives(of(), tmp_path, look)


def test_of_two_reloads_the_second_reads_what_is_there_after_the_first(tmp_path: Path) -> None:
    """Else files that take seconds to read came into force after those that were written in their place meanwhile."""
    documents = [{"devices": [], "models": {name: {"engine": "sim"}}} for name in ("before", "after")]
    in_force: list[list[str]] = []  # at each reading
    running: list[Living] = []

    def again() -> Config:
        in_force.append(list(running[0].config.models))
        return read(tmp_path, documents.pop(0))

    async def reload(living: Living) -> None:
        running.append(living)
        await asyncio.gather(living.daemon.reload(), living.daemon.reload())
        assert in_force == [[], ["before"]]
        assert list(living.config.models) == ["after"]

    lives(read(tmp_path, {"devices": [], "models": {}}), tmp_path, reload, again=again)
