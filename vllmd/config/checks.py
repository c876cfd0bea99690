"""What spans several settings: names that clash, devices that do not exist, models that cannot fit.

A finding is (where, path, what). ``check`` finds what is impossible, ``warnings_of`` what
is possible but hardly meant.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator

from vllmd.addresses import is_loopback
from vllmd.config import offers, secrets
from vllmd.config.engine_kinds import WITH_VERSIONS, one_name
from vllmd.config.nodes import Where
from vllmd.config.types import Config, ModelConfig
from vllmd.config.value_types import show_duration, show_size

Finding = tuple[Where, str, str]
MEMORY_FLAGS = ("--gpu-memory-utilization", "--mem-fraction-static")  # of vLLM and SGLang


def check(config: Config) -> Iterator[Finding]:
    """Every reason why this configuration cannot work, as findings with their place."""
    yield from _names(config)
    yield from _ports(config)
    yield from _keys(config)
    yield from _tls(config)
    for model_name, path, what in offers.wrong(config):
        yield _place(config.models[model_name]) if model_name else _auth(config), path, what
    for model in config.models.values():
        yield from _model(model, config)
        yield from _version(model)
        yield from _idle(model)
        yield from _replicas(model, config)


def unfit(config: Config) -> Iterator[Finding]:
    """What keeps a model from ever being loaded on the devices that are declared; others can be served beside it."""
    for model in config.models.values():
        for each in (model, *(model.replicas.of if model.replicas else ())):
            yield from _devices(each, config)
            yield from _fits(each, config)


def warnings_of(config: Config) -> Iterator[Finding]:
    """Everything that works, but hardly as meant."""
    yield from _pins(config)
    yield from _flags(config)
    if config.records.spans and (why := without_otlp()):
        yield _auth(config), "records.spans", why
    if config.server.max_buffered < 2 * config.server.max_body:
        what = f"less than twice max_body ({show_size(config.server.max_body)}): one address may hold half of it"
        yield _auth(config), "server.max_buffered", f"{what}, so the largest bodies are never taken"
    if config.auth.keys and not any("models" in key.scopes for key in config.auth.keys):
        what = "no key has the scope models: as there are keys, nobody can use a model over the network"
        yield _auth(config), "auth.keys", what
    for key in config.auth.keys:
        if key.models and not any(_known(name, config) for name in key.models) and not config.discover:
            yield _auth(config), f"auth.keys.{key.name}.models", f"none of them is there: {key.name} can use no model"
            continue
        for name in key.models:
            if not _known(name, config):
                yield _auth(config), f"auth.keys.{key.name}.models", f"there is no model {name!r}"


def without_otlp() -> str:
    """Why no spans can be sent: OpenTelemetry's packages are optional; "" if they are there."""
    package = "opentelemetry-exporter-otlp-proto-http"
    with contextlib.suppress(ModuleNotFoundError):  # it asks for the packages around it
        if importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None:
            return ""
    return f"needs {package}, which the Python that runs vllmd does not have: no spans are sent"


GOOD_NAME = (
    "1 to 200 printable characters without spaces at its ends, the first of them not '-', without backslash, "
    "and '.' or '..' is no part between slashes"
)


def _flags(config: Config) -> Iterator[Finding]:
    """Secrets on command lines: every user of the machine can list these."""
    for model in config.models.values():
        for setting, argv in (("extra_args", model.extra_args), ("command", model.command)):
            for flag in secrets.flags_with_secrets(argv):
                what = f"the value of {flag} stands in the list of processes, which everybody can read; give it in env"
                yield _place(model), f"models.{model.name}.{setting}", what


def _version(model: ModelConfig) -> Iterator[Finding]:
    """A version is that of an environment, which not every kind has, and which a command of its own goes before."""
    if model.engine_version and (model.command or one_name(model.engine) not in WITH_VERSIONS):
        why = "command says what runs" if model.command else f"{model.engine} has none; {', '.join(WITH_VERSIONS)} have"
        yield _place(model), f"models.{model.name}.engine_version", f"there is no version to choose: {why}"


def good_name(name: str) -> bool:
    """Whether it can name a model wherever it comes from, a file or a folder's name: it becomes a word of a
    command line, a value in records and answers, a part of the admin API's paths, where dot segments and backslashes
    are refused, and what people type. ``GOOD_NAME`` says it in words."""
    if "\\" in name or not {".", ".."}.isdisjoint(name.split("/")):
        return False
    return 0 < len(name) <= 200 and name.isprintable() and name == name.strip() and not name.startswith("-")


def _place(model: ModelConfig) -> Where:
    source, _, line = model.where.rpartition(":")
    return Where(source, int(line)) if line.isdigit() else Where(model.where)


def _tls(config: Config) -> Iterator[Finding]:
    """Whether the certificate can be used, by whoever looks: the daemon does so before it takes a configuration."""
    tls = config.server.tls
    if tls is None:
        return
    if tls.cert is None or tls.key is None:
        given = "server.tls.cert" if tls.cert else "server.tls.key" if tls.key else "server.tls"
        yield _auth(config), given, "TLS needs both cert and key, two files in PEM"
        return
    from vllmd.config.tls import context  # most configurations have none

    try:
        context(tls.cert, tls.key)
    except ValueError as error:
        yield _auth(config), "server.tls", str(error)


def _auth(config: Config) -> Where:
    return Where(str(config.files[0]) if config.files else "configuration")


def _known(name: str, config: Config) -> bool:
    return name in offers.names_of(config) or name in config.pools


def _names(config: Config) -> Iterator[Finding]:
    owner: dict[str, str] = {}
    for model in config.models.values():
        for alias in model.aliases:
            what = ""
            if not good_name(alias):
                what = f"an alias has {GOOD_NAME}"
            elif alias == model.name:
                what = f"{alias!r} is the model's own name"
            elif alias in config.models:
                what = f"{alias!r} is the name of a model"
            elif alias in owner:
                what = f"{alias!r} is an alias of {owner[alias]!r} already"
            if what:
                yield _place(model), f"models.{model.name}.aliases", what
            owner.setdefault(alias, model.name)


def _ports(config: Config) -> Iterator[Finding]:
    engines = config.engines
    if engines.port_start > engines.port_end:
        what = f"the last port, {engines.port_end}, is before the first, {engines.port_start}"
        yield _auth(config), "engines.port_end", what


def _keys(config: Config) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for key in config.auth.keys:
        if key.digest in seen:
            yield _auth(config), "auth.keys", f"{key.name!r} and {seen[key.digest]!r} are the same key"
        seen.setdefault(key.digest, key.name)
    if not config.auth.keys and not config.auth.allow_anonymous:
        for address in config.server.listen:
            if not is_private(address):
                what = (
                    f"{address} can be reached by others and auth.keys has no key; add one there, "
                    "or set auth.allow_anonymous if everybody may use it"
                )
                yield _auth(config), "server.listen", what


def is_private(address: str) -> bool:
    """Whether only this machine reaches a listen address."""
    host = address.rpartition(":")[0].strip("[]")
    return address.startswith("/") or not host or is_loopback(host)


def _devices(model: ModelConfig, config: Config) -> Iterator[Finding]:
    """Devices that are not declared, or too few of them."""
    where, path, count = _place(model), f"models.{model.name}", model.devices_here
    declared = len(config.devices) if config.devices is not None else None
    if declared is not None:
        for index in model.devices:
            if index >= declared:
                yield where, f"{path}.devices", f"there is no device {index}; {_declared(declared)}"
    have = len(model.devices) or declared
    if have and count > have:  # none declared: engines run on the CPU
        product = " (tensor_parallel_size times pipeline_parallel_size)" if model.local_devices is None else ""
        name = "tensor_parallel_size" if product else "local_devices"
        yield where, f"{path}.{name}", f"it takes {count} devices{product}, but may use {have} only"


def _model(model: ModelConfig, config: Config) -> Iterator[Finding]:
    where, path, count = _place(model), f"models.{model.name}", model.devices_here
    if count > model.all_devices:
        what = f"{count} is more than tensor_parallel_size times pipeline_parallel_size, {model.all_devices}"
        yield where, f"{path}.local_devices", what
    yield from _words(model)
    yield from _shares(model)


def _words(model: ModelConfig) -> Iterator[Finding]:
    """What becomes a word of the engine's command line cannot pose as a flag."""
    for each in (model, *(model.replicas.of if model.replicas else ())):
        for name, value in (("model", each.model), ("dtype", each.dtype or "")):
            if value.startswith("-"):
                what = f"{value!r} begins with '-': the engine would take it for a flag"
                yield _place(each), f"models.{each.name}.{name}", what


def _declared(number: int) -> str:
    if not number:
        return "no device is declared"
    return "the only declared device is 0" if number == 1 else f"the declared devices are 0 to {number - 1}"


def _fits(model: ModelConfig, config: Config) -> Iterator[Finding]:
    if not config.devices or not isinstance(model.gpu_memory, int):
        return
    own = [config.devices[i] for i in model.devices if i < len(config.devices)] or list(config.devices)
    room = max(device.memory for device in own) - config.reserve
    if model.gpu_memory > room:
        what = f"{show_size(model.gpu_memory)} does not fit: {show_size(max(device.memory for device in own))} "
        what += f"less the reserve of {show_size(config.reserve)} leaves {show_size(max(0, room))}"
        yield _place(model), f"models.{model.name}.gpu_memory", what


def _shares(model: ModelConfig) -> Iterator[Finding]:
    """``when_free.shares`` says what it takes, and so does another setting."""
    flags = [word.partition("=")[0] for word in model.extra_args if word.startswith(MEMORY_FLAGS)]
    said = ["gpu_memory"] * (model.gpu_memory is not None) + [f"extra_args ({flag})" for flag in flags]
    if model.when_free and model.when_free.shares and said:
        what = f"when_free.shares says how much it takes, and so does {said[0]}; drop that, or set the shares to none"
        yield _place(model), f"models.{model.name}.when_free", what


def _replicas(model: ModelConfig, config: Config) -> Iterator[Finding]:
    """What its list of replicas says beside other settings; then each of them as any model."""
    rules, path = model.replicas, f"models.{model.name}.replicas"
    if rules is None:
        return
    if rules.given and rules.max is not None:
        yield _place(model), f"{path}.max", "give either max or of, not both: of lists all that there may be"
    elif rules.max is not None and rules.min is not None and rules.min > rules.max:
        yield _place(model), f"{path}.min", f"min is {rules.min}, and max only {rules.max}"
    if not rules.of:
        yield _place(model), f"{path}.of", "it lists no replica"
    names = [one.name for one in rules.of]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield _place(model), f"{path}.of", f"two of them are called {name}"
    for name in names:
        if name in config.models or not good_name(name):
            yield _place(model), path, f"{name!r} is {'another model' if name in config.models else 'no good name'}"
    for one in rules.of:
        yield from _model(one, config)
        yield from _idle(one)


def _idle(model: ModelConfig) -> Iterator[Finding]:
    idle, path = model.idle, f"models.{model.name}.idle"
    stages = (("sleep_after", idle.sleep_after), ("deepen_after", idle.deepen_after), ("stop_after", idle.stop_after))
    given = [(name, age) for name, age in stages if age is not None]
    if idle.level == 2:
        given = [stage for stage in given if stage[0] != "deepen_after"]
    for (first, earlier), (second, later) in itertools.pairwise(given):
        if later < earlier and second == "stop_after":
            what = f"{second} ({show_duration(later)}) comes before {first} ({show_duration(earlier)})"
            yield _place(model), path, what


def _pins(config: Config) -> Iterator[Finding]:
    """A device whose pinned models leave no room for any other."""
    if not config.devices:
        return
    for index, device in enumerate(config.devices):
        pinned = [m for m in config.models.values() if m.pin and (m.devices == (index,) or len(config.devices) == 1)]
        total = sum(memory_of(model, device.memory) for model in pinned)
        room = device.memory - config.reserve
        if pinned and total > room:
            names = ", ".join(model.name for model in pinned)
            taken, given = show_size(total), show_size(room)
            what = f"the pinned models {names} take {taken} of device {index}, which has {given} to give"
            yield _place(pinned[-1]), f"models.{pinned[-1].name}.pin", what


def memory_of(model: ModelConfig, device: int) -> int:
    """Bytes on a device of ``device`` bytes, as far as the configuration says; 0 for auto."""
    memory = model.gpu_memory
    return int(memory * device) if isinstance(memory, float) else memory or 0
