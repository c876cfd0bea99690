"""From files, environment and command line to one ``Config``; every problem is found, not only the first.

Theory of operation. Until the last step a configuration is a tree of nodes, each of which knows its file and line:

1. The files are composed into one tree (``sources.Files``).
2. Other systems' names and other spellings become ours (``shape.Shape``). From here on a key is a row's name.
3. The environment and then the command line are laid over the tree. What is present wins, even where its value is the
   default: ``VLLMD_SERVER_UI=false`` overrides a file's ``true``.
4. ``idle`` and ``defaults`` are laid beneath each model, of ``defaults`` only what is for the model's kind of engine.
5. Every value is parsed by its row of the table (``settings.py``). A value that cannot be parsed is complained of and
   left out, so that its default stands in for it and the rest of the file is still checked.
6. What spans several settings is checked on the finished ``Config`` (``checks.py``).

``Findings`` collects the complaints by place and reason: a bad default that a hundred models inherit is one problem.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllmd.config import checks, secrets
from vllmd.config.engine_kinds import ENGINES_OWN, one_name
from vllmd.config.findings import Findings, Problem, Reading
from vllmd.config.nodes import Node, Where, overlay
from vllmd.config.settings import (
    AUTH,
    COMBINED,
    DEFAULTS,
    DEFAULTS_OF_KIND,
    DEVICE,
    IDLE,
    KEY,
    MODEL,
    REPLICA,
    ROOT,
    SERVER,
    Group,
)
from vllmd.config.shape import Shape
from vllmd.config.sources import Files, added_folder, command_line, default_file, environment
from vllmd.config.trees import join, listen_of, overlay_layer
from vllmd.config.types import AuthConfig, Config, DeviceConfig, KeyConfig, ModelConfig, ServerConfig
from vllmd.config.value_types import COMMAND, HOST, PORT, TEXT, Kind, Wrong
from vllmd.core.types import IdleRules
from vllmd.errors import ConfigError

__all__ = ["Problem", "Reading", "default_file", "load", "read"]

NOWHERE = Where("defaults")
NOTHING = Node(NOWHERE, {})
DEFAULT_ENGINE = ModelConfig("").engine
MOST_SHARED = 1000  # mappings among which an equal one is looked for
FAILED: Any = object()  # the result of parsing a value that was complained of; None is a value


def load(
    config_file: str | Path | None = None,
    env: Mapping[str, str] = os.environ,
    overrides: Mapping[str, object] | None = None,
    *,
    strict: bool = False,
) -> Config:
    """Read and check the configuration. ``overrides``: values of the command line by path, such as ``server.port``.

    A model that can never fit is a warning, because all others can be served; where ``strict``, it is a problem as any.

    Raises ConfigError whose message has one line per problem:
    ``file:line: key.path: what is wrong; did you mean "..."? accepted: ...``
    """
    reading = read(config_file, env, overrides)
    alone = tuple(str(problem) for problem in reading.problems if problem.unfit)
    if len(alone) < len(reading.problems) or (alone and strict):
        raise ConfigError("\n".join(map(str, reading.problems)))
    return replace(reading.config, warnings=(*reading.config.warnings, *alone))


def read(
    config_file: str | Path | None = None,
    env: Mapping[str, str] = os.environ,
    overrides: Mapping[str, object] | None = None,
    texts: Mapping[Path, str] | None = None,
) -> Reading:
    """Read the configuration as ``load`` does, but return its problems beside whatever could be read.

    ``texts``: the new contents of files that are about to be written, checked before they are.
    """
    findings = Findings()
    named = config_file or env.get("VLLMD_CONFIG")
    main = Path(named) if named else default_file(env)
    added = added_folder(main, env)
    files, shape = Files(findings, texts or {}, added), Shape(findings)
    tree = shape.canonical(ROOT, shape.adopt_legacy(files.tree(main, required=bool(named))), "")
    for layer in (environment(env), command_line(overrides or {})):
        tree = overlay_layer(tree, shape.canonical(ROOT, layer, ""))
    config = replace(_Parser(findings, env).config(tree), files=tuple(files.read), added=added)
    for where, path, what in checks.check(config):
        findings.complain(findings.origins.get(path, where), path, what)
    for name, (where, path, what) in checks.unfit(config):
        findings.complain(findings.origins.get(path, where), path, what, unfit=name)
    for where, path, what in checks.warnings_of(config):
        findings.warn(findings.origins.get(path, where), path, what)
    warnings, problems = tuple(map(str, findings.warnings)), findings.problems()
    unfit = frozenset(problem.unfit for problem in problems if problem.unfit)
    config = replace(config, warnings=warnings, unfit=unfit, origins=findings.origins)
    return Reading(config, problems, findings.origins)


def parse_model(name: str, node: Node, findings: Findings) -> tuple[ModelConfig, frozenset[str]]:
    """Parse one model without any file. Returns it, and the canonical names of the settings that ``node`` has."""
    shape, parser = Shape(findings), _Parser(findings, {})
    root = shape.canonical(ROOT, node.with_value({"models": node.with_value({name: node})}), "")
    settings = root.value["models"].value.get(name) or node.with_value({})
    no_defaults = node.with_value({"idle": node.with_value({})})
    return parser.model(name, settings, no_defaults), frozenset(settings.value)


class _Parser:
    """Parses a canonical tree by the table of settings (step 5)."""

    def __init__(self, findings: Findings, env: Mapping[str, str]) -> None:
        self.findings, self.env = findings, env
        self.by_kind: Mapping[str, Node] = {}  # the part of ``defaults`` for models of one kind of engine, by kind
        self.bases: dict[str, Node] = {}  # what ``beneath`` has found, by kind
        self.mappings: dict[str, Mapping[str, Any]] = {}  # one object for all that are equal, by how each is written

    def config(self, tree: Node) -> Config:
        """The whole configuration; the sections that more than one row decides have a method each."""
        values = self.values(ROOT, tree, "", skip=("server", "auth", "devices", "defaults", "models", "idle"))
        idle = tree.value.get("idle") or Node(NOWHERE, {})
        values["idle"] = self.idle(idle, "idle")
        values["server"] = self.server(tree.value.get("server"))
        values["auth"], model_keys = self.auth(tree.value.get("auth")), self.model_keys(tree.value.get("models"))
        values["auth"] = replace(values["auth"], keys=(*values["auth"].keys, *model_keys))
        values["devices"] = self.devices(tree.value.get("devices"))
        base = self.base(tree, idle)
        values["models"] = self.models(tree, base)
        values["template"] = self.model("discovered", Node(NOWHERE, {}), base)
        values["templates"] = {kind: self.model("discovered", of_kind(kind), base) for kind in self.by_kind}
        return Config(**values)

    def values(self, group: Group, node: Node, path: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
        """The fields of the group's dataclass that ``node`` gives, parsed; the rest keep their defaults."""
        fields: dict[str, Any] = {}
        names, places = list[str](), list[Where]()
        for name, value in node.value.items():
            row = group.row(name)
            if row is None or name in skip:
                continue
            kind = row.kind
            if isinstance(kind, Group) and row.many == "map":
                fields[row.field or name] = self.by_name(kind, value, join(path, name))
            elif isinstance(kind, Group):
                inner = self.values(kind, value, join(path, name)) if value.is_map else None
                fields[row.field or name] = None if inner is None else kind.target(**inner)
            else:
                names.append(name)
                places.append(value.where)
                try:
                    parsed = kind.parse(value)
                except Wrong as error:
                    self.complain(kind, value, join(path, name), error, secret=row.secret)
                    continue
                if row.field is not None:
                    fields[row.field or name] = self.shared(parsed) if type(parsed) is dict else parsed
        if names:
            self.findings.origins.note_section(path, names, places)
        return fields

    def shared(self, mapping: dict[str, Any]) -> Mapping[str, Any]:
        """The first mapping that is written the same: of ten thousand models most have the options of many others."""
        text = repr(mapping)
        if len(self.mappings) < MOST_SHARED:
            self.mappings.setdefault(text, mapping)
        return self.mappings.get(text, mapping)

    def by_name(self, group: Group, node: Node, path: str) -> dict[str, Any]:
        """A mapping from name to group, such as the pools or a model's variants, parsed."""
        entries = {}
        for name, value in node.value.items():
            if not checks.is_good_name(name):
                self.findings.complain(value.key or value.where, f"{path}.{name}", f"a name has {checks.GOOD_NAME}")
            self.findings.origins.note(f"{path}.{name}", value.key or value.where)
            entries[name] = group.target(**self.values(group, value, f"{path}.{name}"))
        return entries

    def parse(self, kind: Kind, node: Node, path: str) -> Any:
        self.findings.origins.note(path, node.where)
        try:
            return kind.parse(node)
        except Wrong as error:
            self.complain(kind, node, path, error)
            return FAILED

    def complain(self, kind: Kind, node: Node, path: str, error: Wrong, *, secret: bool = False) -> None:
        """Complain of a value that ``kind`` cannot be; of one that may be ``secret`` in words that do not quote it."""
        if secret:
            try:
                kind.parse(node.as_secret())
            except Wrong as quiet:
                error = quiet
        self.findings.complain((error.node or node).where, path, error.reason, error.accepted or kind.accepts)

    def server(self, node: Node | None) -> ServerConfig:
        """The section ``server``; ``host`` and ``port`` are a short form of ``listen``."""
        if node is None or not node.is_map:
            return ServerConfig()
        values = self.values(SERVER, node, "server")
        short = {name: node.value[name] for name in ("host", "port") if name in node.value}
        kinds = {"host": HOST, "port": PORT}
        parsed = {name: self.parse(kinds[name], value, f"server.{name}") for name, value in short.items()}
        where = next((value.where for value in short.values()), node.where)
        if short and "listen" in node.value:
            self.findings.complain(where, "server", "give either listen or host and port, not both")
        elif short and FAILED not in parsed.values():
            values["listen"] = listen_of(**parsed)
            self.findings.origins.note("server.listen", where)
        return ServerConfig(**values)

    def devices(self, node: Node | None) -> tuple[DeviceConfig, ...] | None:
        if node is None:
            return None
        devices = []
        for index, item in enumerate(node.value):
            path = f"devices[{index}]"
            if "memory" not in item.value:
                self.findings.complain(item.where, path, "memory is missing", "a size such as 80GiB")
                continue
            values = self.values(DEVICE, item, path)
            if "memory" in values:
                devices.append(DeviceConfig(**values))
        return tuple(devices)

    def idle(self, node: Node, path: str) -> IdleRules:
        return settle_idle(tuple(sorted(self.values(IDLE, node, path).items())))

    def auth(self, node: Node | None) -> AuthConfig:
        """The section ``auth``; a key that has a fault is complained of and left out."""
        if node is None or not node.is_map:
            return AuthConfig()
        values = self.values(AUTH, node, "auth", skip=("keys",))
        listed = node.value.get("keys")
        nodes = listed.value if listed is not None and listed.is_list else []
        self.findings.origins.note("auth.keys", listed.where if listed is not None else node.where)
        keys = [self.key(item, f"auth.keys[{index}]", index) for index, item in enumerate(nodes)]
        return AuthConfig(**values, keys=tuple(key for key in keys if key is not None))

    def key(self, node: Node, path: str, index: int) -> KeyConfig | None:
        values = self.values(KEY, node, path)
        forms = [name for name in ("key", "key_file") if name in node.value]
        if len(forms) != 1:
            what = "give either key or key_file, not both" if forms else "the key is missing"
            self.findings.complain(node.where, path, what, "key or key_file")
            return None
        (form,) = forms
        secret = self.secret(node.value[form], f"{path}.{form}", is_file=form == "key_file")
        if secret is None:
            return None
        try:
            digest = secrets.digest(secret)
        except ValueError as error:
            self.findings.complain(node.value[form].where, f"{path}.{form}", str(error))
            return None
        values.setdefault("name", f"key{index + 1}")
        return KeyConfig(**values, digest=digest)

    def secret(self, node: Node, path: str, *, is_file: bool) -> str | None:
        """The secret that a setting is, or (``is_file``) names the file of; None where there is none to be had."""
        if not isinstance(node.value, str | int | float) or not node.text:
            return None
        if not is_file:
            if not node.text.startswith("sha256:"):
                self.warn_if_readable(node, path)
            return node.text
        beside = Path(node.where.source).parent
        try:
            secret = secrets.read(node.text, beside, self.env)
            self.warn_of_file(secrets.place(node.text, beside, self.env), node, path)
            return secret
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            self.findings.complain(
                node.where, path, what, "a file that the daemon's user may read, or a systemd credential"
            )
        except ValueError as error:
            self.findings.complain(node.where, path, str(error), "a file with the secret on its only line")
        return None

    def warn_if_readable(self, node: Node, path: str) -> None:
        """Warn of a secret that stands in a configuration file which every user may read."""
        if node.where.line:
            self.warn_of_file(Path(node.where.source), node, path)

    def warn_of_file(self, file: Path, node: Node, path: str) -> None:
        """Warn where every user may read ``file``, which holds the secret of the setting ``path``."""
        if advice := secrets.readable_by_all(file):
            what = f"everybody on this machine can read this secret; {advice}"
            self.findings.warn(node.where, path, what)

    def warn_of_secrets(self, node: Node, path: str) -> None:
        """Warn likewise of a model's variables and options whose names look like a secret's."""
        for setting in ("env", "options"):
            inner = node.value.get(setting)
            for name, value in inner.value.items() if inner is not None and inner.is_map else ():
                if setting == "options" and name == "key_file" and isinstance(value.value, str):
                    self.warn_of_file(secrets.place(value.text, Path(value.where.source).parent, self.env), value, path)
                elif secrets.is_secret_name(name) and value.text:
                    self.warn_if_readable(value, f"{path}.{setting}.{name}")

    def model_keys(self, models: Node | None) -> list[KeyConfig]:
        """``api_key`` of a model: a client key for that model only, unless it is a Hugging Face token."""
        keys = []
        for name, node in models.value.items() if models is not None and models.is_map else ():
            value = node.value.get("api_key")
            if value is None or not value.text or value.text.startswith("hf_"):
                continue
            secret = self.secret(value, f"models.{name}.api_key", is_file=False)
            if secret:
                keys.append(KeyConfig(f"model {name}", secrets.digest(secret), models=(name,)))
        return keys

    def base(self, tree: Node, idle: Node) -> Node:
        """The settings beneath every model: ``idle`` and ``defaults``, less what is for one kind of engine."""
        defaults = tree.value.get("defaults") or Node(NOWHERE, {})
        entries = defaults.value if defaults.is_map else {}
        self.by_kind = {name: node for name, node in entries.items() if is_for_kind(name, node)}
        defaults = defaults.with_value({name: node for name, node in entries.items() if name not in self.by_kind})
        # Parsed here only to complain: before any model inherits a wrong value, so that the path is that of defaults.
        for name, node in self.by_kind.items():
            self.values(DEFAULTS_OF_KIND, node, f"defaults.{name}")
        self.values(DEFAULTS, defaults, "defaults")
        # An engine's own settings that no model can inherit are hardly meant so.
        models = tree.value.get("models")
        kinds = {kind_of(node, defaults) for node in models.value.values()} if models and models.is_map else set()
        own = kind_of(defaults, defaults)
        for name in sorted(ENGINES_OWN & set(defaults.value)):
            if kinds and own not in kinds:
                what = f"it is for models of the engine {own}, and there are none; for others it belongs in"
                places = ", ".join(f"defaults.{kind}.{name}" for kind in sorted(kinds))
                self.findings.warn(defaults.value[name].where, f"defaults.{name}", f"{what} {places}")
        return overlay(Node(NOWHERE, {"idle": idle}), defaults, COMBINED.__contains__)

    def beneath(self, node: Node, base: Node) -> Node:
        """The settings beneath one model: an engine's own (flags, options, ...) only where they are for its kind."""
        kind = kind_of(node, base)
        if kind in self.bases:
            return self.bases[kind]
        if kind != kind_of(base, base):
            base = base.with_value({name: value for name, value in base.value.items() if name not in ENGINES_OWN})
        for_kind = self.by_kind.get(kind)
        self.bases[kind] = overlay(base, for_kind, COMBINED.__contains__) if for_kind else base
        return self.bases[kind]

    def models(self, tree: Node, base: Node) -> dict[str, ModelConfig]:
        """All models by name. Empties the tree's mapping of them."""
        models = tree.value.get("models")
        nodes = models.value if models is not None and models.is_map else {}
        # Of ten thousand models the nodes are most of the memory: each goes as soon as its model is there, which takes
        # its place. Freed all at once, they would leave holes among what stays, and the daemon would keep its size.
        return {name: self.model(name, nodes.pop(name), base) for name in list(nodes)}

    def model(self, name: str, node: Node, base: Node) -> ModelConfig:
        """One model with its replicas, over the settings ``base`` of every model."""
        path, where = f"models.{name}", node.key or node.where
        if not checks.is_good_name(name):
            self.findings.complain(where, path, f"a model's name has {checks.GOOD_NAME}")
        merged = overlay(self.beneath(node, base), node, COMBINED.__contains__)
        values = self.values(MODEL, merged, path, skip=("idle",))
        values["idle"] = self.idle(merged.value["idle"], f"{path}.idle")
        token = self.token(merged, path)
        if token is not None:
            values["hf_token"] = token
        self.warn_of_secrets(merged, path)
        model = ModelConfig(name=name, **values, where=str(where))
        if model.replicas is None:
            return model
        return replace(model, replicas=replace(model.replicas, of=tuple(self.replicas(model, merged, path))))

    def replicas(self, model: ModelConfig, node: Node, path: str) -> Iterator[ModelConfig]:
        """Each replica's settings: those of the model, and over them its entry in ``replicas.of``, if there is one."""
        rules, base = model.replicas, replace(model, replicas=None, aliases=(), replica_of=model.name)
        listed = node.value["replicas"].value.get("of")
        if rules is None or listed is None:
            number = (rules and (rules.max or rules.min)) or 1
            yield from (replace(base, name=f"{model.name}@{index + 1}") for index in range(number))
            return
        for index, entry in enumerate(listed.value if listed.is_list else ()):
            if entry.is_map:
                yield self.replica(base, node, entry, f"{path}.replicas.of[{index}]", index)

    def replica(self, base: ModelConfig, node: Node, entry: Node, path: str, index: int) -> ModelConfig:
        """One entry of ``replicas.of`` over its model: ``base`` is that model parsed, ``node`` its settings."""
        entry = Shape(self.findings).canonical(REPLICA, entry, path)
        if "engine" in entry.value and kind_of(entry, node) != kind_of(node, node):
            others = ENGINES_OWN | {"env"}  # the model's variables, too, were written for its engine
            node = node.with_value({name: value for name, value in node.value.items() if name not in others})
            base = replace(base, options={}, extra_args=(), env={}, command=())
            entry = overlay(self.by_kind.get(kind_of(entry, node), NOTHING), entry, COMBINED.__contains__)
        merged = overlay(node, entry, COMBINED.__contains__)
        own = merged.with_value({name: merged.value[name] for name in entry.value})
        values = self.values(MODEL, own, path, skip=("idle",))
        if "idle" in own.value:
            values["idle"] = self.idle(own.value["idle"], f"{path}.idle")
        if (token := self.token(own, path)) is not None:
            values["hf_token"] = token
        label = self.parse(TEXT, own.value["name"], f"{path}.name") if "name" in own.value else f"{index + 1}"
        return replace(base, **values, name=f"{base.name}@{label}", where=str(entry.where))

    def token(self, node: Node, path: str) -> str | None:
        """A model's Hugging Face token, from whichever of its three settings gives it."""
        entries = node.value
        legacy = entries.get("api_key")
        if legacy is not None and legacy.text.startswith("hf_"):
            what = "a Hugging Face token is called hf_token here; it is taken as that"
            self.findings.warn(legacy.where, f"{path}.api_key", what)
            if "hf_token" not in entries and "hf_token_file" not in entries:
                return self.secret(legacy, f"{path}.api_key", is_file=False)
        if "hf_token" in entries and "hf_token_file" in entries:
            first, second = entries["hf_token"], entries["hf_token_file"]
            self.findings.complain(
                second.where, path, f"hf_token on {first.where} says the same as hf_token_file; keep one"
            )
            return None
        if "hf_token_file" in entries:
            return self.secret(entries["hf_token_file"], f"{path}.hf_token_file", is_file=True)
        if "hf_token" in entries:
            return self.secret(entries["hf_token"], f"{path}.hf_token", is_file=False)
        return None


def kind_of(node: Node, base: Node) -> str:
    """The kind of a model's engine: its own setting, else that of ``base``, else the default."""
    engine = node.value.get("engine") or base.value.get("engine")
    return one_name(engine.text) if engine is not None and engine.text else DEFAULT_ENGINE


def of_kind(kind: str) -> Node:
    """The node of a model whose only setting is its engine."""
    return Node(NOWHERE, {"engine": Node(NOWHERE, kind, kind)})


def is_for_kind(name: str, node: Node) -> bool:
    """Whether an entry of ``defaults`` is for one kind of engine; ``Shape`` has refused what is neither."""
    row = DEFAULTS.row(name)
    return row is None or (node.is_map and row.kind is COMMAND)


@lru_cache  # most models have the same rules, and then share one object
def settle_idle(given: tuple[tuple[str, Any], ...]) -> IdleRules:
    """The idle rules that these settings (name and value) mean.

    Level 3 stops the engine where others sleep. A stage that is not given keeps its distance to a later sleep, and
    never comes if the stop is before it.
    """
    values, usual = dict(given), IdleRules()
    if values.get("level") == 3:
        energy = values.get("energy")
        return IdleRules(None, 3 if energy else 1, None, values.get("sleep_after", usual.sleep_after), energy)
    rules = IdleRules(**values)
    delay = (rules.sleep_after or 0.0) - (usual.sleep_after or 0.0)
    if delay > 0:
        stages = [name for name in ("deepen_after", "stop_after") if name not in values]
        rules = replace(rules, **{name: getattr(usual, name) + delay for name in stages})
    stop = rules.stop_after if rules.stop_after is not None else float("inf")
    late = [name for name in ("sleep_after", "deepen_after") if (getattr(rules, name) or 0.0) > stop]
    never: dict[str, Any] = dict.fromkeys(name for name in late if name not in values)
    return replace(rules, **never) if never else rules
