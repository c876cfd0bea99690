"""What spans several settings: names that clash, devices that do not exist, models that cannot fit.

A rule is a function of the whole configuration, or of one model, that yields findings: (where, path, what is wrong).
``check`` has what is impossible, ``warnings_of`` what is possible but hardly meant.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import lru_cache

from vllmd.addresses import is_loopback
from vllmd.config import offers, secrets
from vllmd.config.engine_kinds import WITH_VERSIONS, one_name
from vllmd.config.nodes import Where
from vllmd.config.types import Config, ModelConfig
from vllmd.config.unfit import declared, memory_of
from vllmd.config.unfit import unfit as unfit_of
from vllmd.config.value_types import show_duration, show_size
from vllmd.core.types import IdleRules

Finding = tuple[Where, str, str]
MEMORY_FLAGS = ("--gpu-memory-utilization", "--mem-fraction-static")  # of vLLM and SGLang


def check(config: Config) -> Iterator[Finding]:
    """Every reason why this configuration cannot work, as findings with their place."""
    yield from aliases(config)
    if config.engines.port_start > config.engines.port_end:
        what = f"the last port, {config.engines.port_end}, is before the first, {config.engines.port_start}"
        yield _main_file(config), "engines.port_end", what
    yield from keys(config)
    yield from tls(config)
    for model_name, path, what in offers.wrong(config):
        yield _place(config.models[model_name]) if model_name else _main_file(config), path, what
    for model in config.models.values():
        yield from of_model(model)
        # A version is that of an environment, which not every kind has, and which a command of its own goes before.
        if model.engine_version and (model.command or one_name(model.engine) not in WITH_VERSIONS):
            have = ", ".join(WITH_VERSIONS)
            why = "command says what runs" if model.command else f"{model.engine} has none; {have} have"
            yield _place(model), f"models.{model.name}.engine_version", f"there is no version to choose: {why}"
        yield from idle(model)
        yield from replicas(model, config)


def unfit(config: Config) -> Iterator[tuple[str, Finding]]:
    """What keeps a model from ever being loaded on the devices that are declared; others can be served beside it.

    Each finding with the name of the model that it is about, also where it is about one of its replicas.
    """
    there = declared(config)
    for model in config.models.values():
        for each in (model, *(model.replicas.of if model.replicas else ())):
            for found in unfit_of(each, there):
                yield model.name, (_place(each), f"models.{each.name}.{found.setting}", found.why)


def warnings_of(config: Config) -> Iterator[Finding]:
    """Everything that works, but hardly as meant."""
    yield from pins(config)
    yield from secrets_on_command_lines(config)
    if config.records.spans and (why := without_otlp()):
        yield _main_file(config), "records.spans", why
    if config.server.max_buffered < 2 * config.server.max_body:
        what = f"less than twice max_body ({show_size(config.server.max_body)}): one address may hold half of it"
        yield _main_file(config), "server.max_buffered", f"{what}, so the largest bodies are never taken"
    if config.auth.keys and not any("models" in key.scopes for key in config.auth.keys):
        what = "no key has the scope models: as there are keys, nobody can use a model over the network"
        yield _main_file(config), "auth.keys", what
    names = offers.names_of(config).keys() | config.pools.keys() if config.auth.keys else set()
    for key in config.auth.keys:
        path, unknown = f"auth.keys.{key.name}.models", [name for name in key.models if name not in names]
        if unknown and len(unknown) == len(key.models) and not config.discover:
            yield _main_file(config), path, f"none of them is there: {key.name} can use no model"
        else:
            yield from ((_main_file(config), path, f"there is no model {name!r}") for name in unknown)


def without_otlp() -> str:
    """Why no spans can be sent: OpenTelemetry's packages are optional; "" if they are there."""
    package = "opentelemetry-exporter-otlp-proto-http"
    import importlib.util  # few send spans

    with contextlib.suppress(ModuleNotFoundError):  # raised where a package around it is missing
        if importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None:
            return ""
    return f"needs {package}, which the Python that runs vllmd does not have: no spans are sent"


GOOD_NAME = (
    "1 to 200 printable characters without spaces at its ends, the first of them not '-', without backslash, "
    "and '.' or '..' is no part between slashes"
)


def secrets_on_command_lines(config: Config) -> Iterator[Finding]:
    """Secrets in flags: every user of the machine can list the command lines of all processes."""
    for model in config.models.values():
        for setting, argv in (("extra_args", model.extra_args), ("command", model.command)):
            for flag in secrets.flags_with_secrets(argv):
                what = f"the value of {flag} stands in the list of processes, which everybody can read; give it in env"
                yield _place(model), f"models.{model.name}.{setting}", what


def is_good_name(name: str) -> bool:
    """Whether ``name``, of a configuration or of a folder, can be a model's. ``GOOD_NAME`` says it in words.

    A name becomes a word of a command line, a value in records and answers, what people type, and a part of the admin
    API's paths, where dot segments and backslashes are refused.
    """
    if "\\" in name or not {".", ".."}.isdisjoint(name.split("/")):
        return False
    return 0 < len(name) <= 200 and name.isprintable() and name == name.strip() and not name.startswith("-")


def _place(model: ModelConfig) -> Where:
    source, _, line = model.where.rpartition(":")
    return Where(source, int(line)) if line.isdigit() else Where(model.where)


def tls(config: Config) -> Iterator[Finding]:
    """A certificate that the user who checks cannot use; the daemon checks before it takes a configuration."""
    files = config.server.tls
    if files is None:
        return
    if files.cert is None or files.key is None:
        given = "server.tls.cert" if files.cert else "server.tls.key" if files.key else "server.tls"
        yield _main_file(config), given, "TLS needs both cert and key, two files in PEM"
        return
    from vllmd.config.tls import context  # most configurations have none

    try:
        context(files.cert, files.key)
    except ValueError as error:
        yield _main_file(config), "server.tls", str(error)


def _main_file(config: Config) -> Where:
    return Where(str(config.files[0]) if config.files else "configuration")


def aliases(config: Config) -> Iterator[Finding]:
    """Aliases that are no name, or the name of another model."""
    owner: dict[str, str] = {}
    for model in config.models.values():
        for alias in model.aliases:
            what = ""
            if not is_good_name(alias):
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


def keys(config: Config) -> Iterator[Finding]:
    """The same key twice; no key at all where others than this machine can connect."""
    names: dict[str, str] = {}  # by digest
    for key in config.auth.keys:
        if key.digest in names:
            yield _main_file(config), "auth.keys", f"{key.name!r} and {names[key.digest]!r} are the same key"
        names.setdefault(key.digest, key.name)
    if not config.auth.keys and not config.auth.allow_anonymous:
        for address in config.server.listen:
            if not is_private(address):
                what = (
                    f"{address} can be reached by others and auth.keys has no key; add one there, "
                    "or set auth.allow_anonymous if everybody may use it"
                )
                yield _main_file(config), "server.listen", what


def is_private(address: str) -> bool:
    """Whether only processes of this machine reach a listen address."""
    host = address.rpartition(":")[0].strip("[]")
    return address.startswith("/") or not host or is_loopback(host)


def of_model(model: ModelConfig) -> Iterator[Finding]:
    """What is wrong with one model or replica by itself, whatever devices there are."""
    path, here = f"models.{model.name}", model.local_devices
    if here is not None and here > model.all_devices:
        what = f"{here} is more than tensor_parallel_size times pipeline_parallel_size, {model.all_devices}"
        yield _place(model), f"{path}.local_devices", what
    for name, value in (("model", model.model), ("dtype", model.dtype or "")):
        if value.startswith("-"):
            yield _place(model), f"{path}.{name}", f"{value!r} begins with '-': the engine would take it for a flag"
    if not model.when_free or not model.when_free.shares:
        return
    # Two settings that decide how much memory the model takes.
    flags = [word.partition("=")[0] for word in model.extra_args if word.startswith(MEMORY_FLAGS)]
    others = ["gpu_memory"] * (model.gpu_memory is not None) + [f"extra_args ({flag})" for flag in flags]
    if others:
        what = f"when_free.shares says how much it takes, and so does {others[0]}; drop that, or set the shares to none"
        yield _place(model), f"{path}.when_free", what


def replicas(model: ModelConfig, config: Config) -> Iterator[Finding]:
    """Contradictions in the replicas' rules; then each replica as any model."""
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
        if name in config.models or not is_good_name(name):
            yield _place(model), path, f"{name!r} is {'another model' if name in config.models else 'no good name'}"
    for one in rules.of:
        yield from of_model(one)
        yield from idle(one)


def idle(model: ModelConfig) -> Iterator[Finding]:
    """Stages of the idle rules in the wrong order."""
    for what in wrong_stages(model.idle):
        yield _place(model), f"models.{model.name}.idle", what


@lru_cache  # most models have the same rules
def wrong_stages(rules: IdleRules) -> tuple[str, ...]:
    """A sentence for each stage that comes before an earlier one."""
    stages = ("sleep_after", rules.sleep_after), ("deepen_after", rules.deepen_after), ("stop_after", rules.stop_after)
    given = [(name, age) for name, age in stages if age is not None]
    if rules.level == 2:
        given = [stage for stage in given if stage[0] != "deepen_after"]
    return tuple(
        f"{second} ({show_duration(later)}) comes before {first} ({show_duration(earlier)})"
        for (first, earlier), (second, later) in itertools.pairwise(given)
        if later < earlier and second == "stop_after"
    )


def pins(config: Config) -> Iterator[Finding]:
    """A device that has not the memory for all models that are pinned to it."""
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
