"""From files, environment and command line to one ``Config``; every problem is found, not only the first.

The steps, in order: compose the files into nodes; give other systems' names
ours; lay the environment and then the command line over the file (presence
counts, not value); canonicalise spellings; merge ``idle`` and ``defaults`` beneath
each model; parse by the table; check what spans several settings.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllmd.config import checks, secrets
from vllmd.config.kinds import Kind, Wrong, loopback, shown
from vllmd.config.nodes import Node, Where, compose, from_plain, from_text, overlay
from vllmd.config.settings import (
    AUTH,
    COMBINED,
    DEFAULTS,
    DEVICE,
    IDLE,
    KEY,
    LEGACY,
    LEGACY_SECTIONS,
    MODEL,
    ROOT,
    SERVER,
    Group,
    Setting,
    variables,
)
from vllmd.config.types import AuthConfig, Config, DeviceConfig, KeyConfig, ModelConfig, ServerConfig
from vllmd.core.types import IdleRules
from vllmd.errors import ConfigError

NOWHERE = Where("defaults")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong (or, as a warning, doubtful): where, of which key, why, and what would be right."""

    where: Where
    path: str
    what: str
    accepted: str = ""
    nearest: str = ""

    def __str__(self) -> str:
        parts = [self.what]
        if self.accepted:
            parts.append(f"accepted: {self.accepted}")
        if self.nearest:
            parts.append(f'did you mean "{self.nearest}"?')
        path = f"{self.path}: " if self.path else ""
        return f"{self.where}: {path}" + "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Reading:
    """All that reading brought to light. ``origins``: from where each setting that was given came, by path."""

    config: Config
    problems: tuple[Problem, ...] = ()
    origins: Mapping[str, Where] = field(default_factory=dict)


def default_file(env: Mapping[str, str] = os.environ) -> Path:
    """``VLLMD_CONFIG``, else /etc/vllmd/vllmd.yaml for root and system users, else ~/.config/vllmd/vllmd.yaml."""
    if env.get("VLLMD_CONFIG"):
        return Path(env["VLLMD_CONFIG"])
    if os.getuid() < 1000:
        return Path("/etc/vllmd/vllmd.yaml")
    own = Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "vllmd" / "vllmd.yaml"
    return own if own.exists() or not Path("/etc/vllmd/vllmd.yaml").exists() else Path("/etc/vllmd/vllmd.yaml")


def load(
    config_file: str | Path | None = None,
    env: Mapping[str, str] = os.environ,
    overrides: Mapping[str, object] | None = None,
) -> Config:
    """The configuration. ``overrides``: setting paths from the command line, such as ``server.port``.

    Raises ConfigError whose message has one line per problem:
    ``file:line: key.path: what is wrong; accepted: ...; did you mean "..."?``
    """
    reading = read(config_file, env, overrides)
    if reading.problems:
        raise ConfigError("\n".join(map(str, reading.problems)))
    return reading.config


def read(
    config_file: str | Path | None = None,
    env: Mapping[str, str] = os.environ,
    overrides: Mapping[str, object] | None = None,
    texts: Mapping[Path, str] | None = None,
) -> Reading:
    """As ``load``, but problems are returned, with what could be read all the same.

    ``texts`` stand for the contents of files that are about to be written.
    """
    return _Reader(env, texts or {}).read(config_file, overrides or {})


class _Reader:
    """One reading of the configuration: collects problems, warnings and origins on its way."""

    def __init__(self, env: Mapping[str, str], texts: Mapping[Path, str]) -> None:
        self.env, self.texts = env, texts
        self.problems: dict[tuple[Where, str], Problem] = {}
        self.warnings: list[Problem] = []
        self.origins: dict[str, Where] = {}
        self.files: list[Path] = []

    # ---- the steps -------------------------------------------------------------------------------------------

    def read(self, config_file: str | Path | None, overrides: Mapping[str, object]) -> Reading:
        tree = self.files_tree(Path(config_file) if config_file else default_file(self.env), bool(config_file))
        tree = self.adopt_legacy(tree)
        tree = self.canonical(ROOT, tree, "")
        tree = self.overlay_layer(tree, self.environment())
        tree = self.overlay_layer(tree, self.command_line(overrides))
        config = self.config(tree)
        for where, path, what in checks.check(config):
            self.complain(self.origins.get(path, where), path, what)
        for where, path, what in checks.doubts(config):
            self.warnings.append(Problem(self.origins.get(path, where), path, what))
        warnings = tuple(map(str, self.warnings))
        return Reading(replace(config, warnings=warnings), tuple(sorted_problems(self.problems)), self.origins)

    def complain(self, where: Where, path: str, what: str, accepted: str = "", nearest: str = "") -> None:
        """Each place and reason once, however many models inherit it."""
        self.problems.setdefault((where, what), Problem(where, path, what, accepted, nearest))

    # ---- files -----------------------------------------------------------------------------------------------

    def files_tree(self, main: Path, required: bool) -> Node:
        root = self.file(main, required or bool(self.env.get("VLLMD_CONFIG"))) or Node(Where(str(main)), {})
        for extra in self.directory(main.parent / "models.d"):
            node = self.file(extra, True)
            if node is not None:
                root = self.add_models(root, node)
        return root

    def directory(self, path: Path) -> list[Path]:
        try:
            names = sorted(os.listdir(path))
        except FileNotFoundError:
            return []
        except OSError as error:
            self.complain(Where(str(path)), "", f"cannot be read: {error.strerror}")
            return []
        return [path / name for name in names if name.endswith((".yaml", ".yml")) and not name.startswith(".")]

    def file(self, path: Path, required: bool) -> Node | None:
        source = str(path)
        try:
            data = self.texts[path].encode() if path in self.texts else path.read_bytes()
        except FileNotFoundError:
            if required:
                self.complain(Where(source), "", "there is no such file")
            return None
        except OSError as error:
            self.complain(Where(source), "", f"cannot be read: {error.strerror}")
            return None
        self.files.append(path)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            self.complain(Where(source, line), "", "this is not UTF-8 text")
            return None
        node = compose(text, source, lambda where, what: self.complain(where, "", what))
        return self.mapping(node, "", ROOT.accepts) if node is not None and node.value is not None else None

    def mapping(self, node: Node, path: str, accepts: str) -> Node | None:
        if node.is_map:
            return node
        self.complain(node.where, path, f"{shown(node)} is not a mapping", accepts)
        return None

    def add_models(self, root: Node, extra: Node) -> Node:
        """A file of models.d: ``models:`` with models, or, flat, nothing but models."""
        sectioned = "models" in extra.value
        for name, node in extra.value.items():
            known = ROOT.row(name) or name in LEGACY_SECTIONS
            if name != "models" and (sectioned or known):
                self.complain(node.key or node.where, name, "a file in models.d holds models only", "models")
        found = extra.value.get("models") if sectioned else extra
        if found is None or found.value is None or self.mapping(found, "models", "models by name") is None:
            return root
        models = root.value.get("models")
        merged = dict(models.value) if models is not None and models.is_map else {}
        for name, node in found.value.items():
            if not sectioned and (ROOT.row(name) or name in LEGACY_SECTIONS):
                continue
            if name in merged:
                first = merged[name].key or merged[name].where
                self.complain(node.key or node.where, f"models.{name}", f"this model is configured already in {first}")
            merged.setdefault(name, node)
        return root.with_value({**root.value, "models": (models or found).with_value(merged)})

    # ---- other names -----------------------------------------------------------------------------------------

    def adopt_legacy(self, tree: Node) -> Node:
        """Moves the sections ``gpu`` and ``proxy`` of other systems to where their settings live here."""
        sections = {name: tree.value[name] for name in LEGACY_SECTIONS if name in tree.value}
        tree = tree.with_value({name: node for name, node in tree.value.items() if name not in sections})
        for section, node in sections.items():
            known = {row.key.split(".")[1]: row for row in LEGACY if row.key.startswith(section + ".")}
            if node.value is None or self.mapping(node, section, ", ".join(known)) is None:
                continue
            for name, value in node.value.items():
                if name not in known:
                    self.unknown(value, f"{section}.{name}", name, tuple(known))
                    continue
                row = known[name]
                if row.path == "auth.keys":
                    tree = self.add_key(tree, value)
                elif self.taken(tree, row.path, value, f"{section}.{name}"):
                    tree = put(tree, row.path, row.convert(value))
        return tree

    def add_key(self, tree: Node, value: Node) -> Node:
        word = Node(value.where, "proxy", "proxy")
        both = Node(value.where, [Node(value.where, scope, scope) for scope in ("models", "admin")])
        key = Node(value.where, {"name": word, "key": value, "scopes": both})
        auth = tree.value.get("auth")
        have = auth.value.get("keys") if auth is not None and auth.is_map else None
        keys = list(have.value) if have is not None and have.is_list else []
        return put(tree, "auth.keys", Node(value.where, [*keys, key]))

    def taken(self, tree: Node, path: str, value: Node, legacy: str) -> bool:
        """Whether the legacy setting may take the place, that is, unless ours is given too."""
        ours = find(tree, path)
        if ours is not None:
            self.complain(value.key or value.where, legacy, f"{path} is the same setting, given in {ours.where}")
        return ours is None

    def canonical(self, group: Group, node: Node, path: str) -> Node:
        """Unknown keys complained of and dropped, other spellings renamed, groups within likewise."""
        entries: dict[str, Node] = {}
        for name, value in node.value.items():
            row, full = group.row(name), join(path, name)
            if row is None:
                self.unknown(value, full, name, spellings(group), self.advice(group, name, value))
            elif row.name in entries:
                other = entries[row.name].where
                what = f"{row.name} is the same setting, given in {other}"
                self.complain(value.key or value.where, full, what)
            elif value.value is not None:  # null is as if it were not written
                entries[row.name] = self.canonical_value(row, value, join(path, row.name))
        return node.with_value(entries)

    def canonical_value(self, row: Setting, value: Node, path: str) -> Node:
        group = row.kind
        if not isinstance(group, Group):
            return value
        if row.many == "map":
            return self.canonical_map(group, value, path)
        if row.many == "list":
            return self.canonical_list(group, value, path)
        value = group.short(value) or value
        checked = self.mapping(value, path, group.accepts)
        return value.with_value({}) if checked is None else self.canonical(group, value, path)

    def canonical_map(self, group: Group, value: Node, path: str) -> Node:
        if self.mapping(value, path, "models by name") is None:
            return value.with_value({})
        entries = {}
        for name, node in value.value.items():
            node = node.with_value({}) if node.value is None else node
            if self.mapping(node, f"{path}.{name}", group.accepts) is not None:
                entries[name] = self.canonical(group, node, f"{path}.{name}")
        return value.with_value(entries)

    def canonical_list(self, group: Group, value: Node, path: str) -> Node:
        if not value.is_list:
            what = f"{shown(value)} is not a list"
            self.complain(value.where, path, what, f"a list of mappings with {', '.join(group.names())}")
            return value.with_value([])
        accepts = f"a mapping with {', '.join(group.names())}"
        good = [
            self.canonical(group, node, f"{path}[{index}]")
            for index, node in enumerate(value.value)
            if self.mapping(node, f"{path}[{index}]", accepts) is not None
        ]
        return value.with_value(good)

    def unknown(self, value: Node, path: str, name: str, known: tuple[str, ...], advice: str = "") -> None:
        import difflib

        near = difflib.get_close_matches(name.replace("-", "_"), known, 1, 0.6)
        what = "there is no such setting" + (f"; {advice}" if advice and not near else "")
        self.complain(value.key or value.where, path, what, ", ".join(known), near[0] if near else "")

    def advice(self, group: Group, name: str, value: Node) -> str:
        if group is MODEL or group is DEFAULTS:
            return "flags of the engine belong in extra_args"
        return "models belong beneath models:" if group is ROOT and "/" in name and value.is_map else ""

    # ---- environment and command line ------------------------------------------------------------------------

    def environment(self) -> Node:
        convert = {row.env: row.convert for row in LEGACY if row.env}
        layer = Node(Where("environment"), {})
        for name, path in variables().items():
            text = self.env.get(name, "")
            if text:
                node = from_text(text, Where(f"environment {name}"))
                layer = put(layer, path, convert[name](node) if name in convert else node)
        return self.canonical(ROOT, layer, "")

    def command_line(self, overrides: Mapping[str, object]) -> Node:
        layer = Node(Where("command line"), {})
        for path, value in overrides.items():
            layer = put(layer, path, from_plain(value, Where(f"command line {flag_of(path)}")))
        return self.canonical(ROOT, layer, "")

    def overlay_layer(self, under: Node, over: Node) -> Node:
        """A layer wins where it says something; ``listen`` and ``host`` with ``port`` replace each other."""
        merged = dict(under.value)
        for name, node in over.value.items():
            below = merged.get(name)
            if below is None or not (below.is_map and node.is_map):
                merged[name] = node
            elif name == "models":
                merged[name] = overlay(below, node, lambda _: True)
            else:
                merged[name] = overlay(forget_listen(below, node) if name == "server" else below, node, lambda _: True)
        return under.with_value(merged)

    # ---- parsing ---------------------------------------------------------------------------------------------

    def config(self, tree: Node) -> Config:
        values = self.values(ROOT, tree, "", skip=("server", "auth", "devices", "defaults", "models", "idle"))
        idle = tree.value.get("idle") or Node(NOWHERE, {})
        values["idle"] = self.idle(idle, "idle")
        values["server"] = self.server(tree.value.get("server"))
        values["auth"], model_keys = self.auth(tree.value.get("auth")), self.model_keys(tree.value.get("models"))
        values["auth"] = replace(values["auth"], keys=(*values["auth"].keys, *model_keys))
        values["devices"] = self.devices(tree.value.get("devices"))
        values["models"] = self.models(tree, idle)
        return Config(**values, files=tuple(self.files))

    def values(self, group: Group, node: Node, path: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
        """The group's fields that were given, parsed; what could not be parsed is complained of and left out."""
        found: dict[str, Any] = {}
        for name, value in node.value.items():
            row = group.row(name)
            if row is None or name in skip:
                continue
            full = join(path, name)
            if isinstance(row.kind, Group):
                found[row.field or name] = row.kind.target(**self.values(row.kind, value, full))
            else:
                parsed = self.parse(row.kind, value, full)
                if parsed is not FAILED and row.field is not None:
                    found[row.field or row.name] = parsed
        return found

    def parse(self, kind: Kind, node: Node, path: str) -> Any:
        self.origins.setdefault(path, node.where)
        try:
            return kind.parse(node)
        except Wrong as error:
            self.complain((error.node or node).where, path, error.reason, error.accepted or kind.accepts)
            return FAILED

    def server(self, node: Node | None) -> ServerConfig:
        if node is None or not node.is_map:
            return ServerConfig()
        values = self.values(SERVER, node, "server")
        short = [node.value[name] for name in ("host", "port") if name in node.value]
        if short and "listen" in node.value:
            self.complain(short[0].where, "server", "give either listen or host and port, not both")
        elif short:
            values["listen"] = listen_of(node.value.get("host"), node.value.get("port"))
            self.origins["server.listen"] = short[0].where
        return ServerConfig(**values)

    def devices(self, node: Node | None) -> tuple[DeviceConfig, ...] | None:
        if node is None:
            return None
        found = []
        for index, item in enumerate(node.value):
            path = f"devices[{index}]"
            if "memory" not in item.value:
                self.complain(item.where, path, "memory is missing", "a size such as 80GiB")
                continue
            values = self.values(DEVICE, item, path)
            if "memory" in values:
                found.append(DeviceConfig(**values))
        return tuple(found)

    def idle(self, node: Node, path: str) -> IdleRules:
        return settle_idle(self.values(IDLE, node, path))

    # ---- keys ------------------------------------------------------------------------------------------------

    def auth(self, node: Node | None) -> AuthConfig:
        if node is None or not node.is_map:
            return AuthConfig()
        values = self.values(AUTH, node, "auth", skip=("keys",))
        listed = node.value.get("keys")
        nodes = listed.value if listed is not None and listed.is_list else []
        self.origins["auth.keys"] = listed.where if listed is not None else node.where
        keys = [self.key(item, f"auth.keys[{index}]", index) for index, item in enumerate(nodes)]
        return AuthConfig(**values, keys=tuple(key for key in keys if key is not None))

    def key(self, node: Node, path: str, index: int) -> KeyConfig | None:
        values = self.values(KEY, node, path)
        given = [name for name in ("key", "key_file") if name in node.value]
        if len(given) != 1:
            what = "give either key or key_file, not both" if given else "the key is missing"
            self.complain(node.where, path, what, "key or key_file")
            return None
        secret = self.secret(node.value[given[0]], f"{path}.{given[0]}", given[0] == "key_file")
        if secret is None:
            return None
        try:
            digest = secrets.digest(secret)
        except ValueError as error:
            self.complain(node.value[given[0]].where, f"{path}.{given[0]}", str(error))
            return None
        values.setdefault("name", f"key{index + 1}")
        return KeyConfig(**values, digest=digest)

    def secret(self, node: Node, path: str, is_file: bool) -> str | None:
        if not isinstance(node.value, str | int | float) or not node.text:
            return None
        if not is_file:
            if not node.text.startswith("sha256:"):
                self.warn_if_readable(node, path)
            return node.text
        try:
            return secrets.read(node.text, Path(node.where.source).parent, self.env)
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            self.complain(node.where, path, what, "a file that the daemon's user may read, or a systemd credential")
        except ValueError as error:
            self.complain(node.where, path, str(error), "a file with the secret on its only line")
        return None

    def warn_if_readable(self, node: Node, path: str) -> None:
        """A secret in a file that everybody may read deserves a word."""
        try:
            mode = os.stat(node.where.source).st_mode if node.where.line else 0
        except OSError:
            return
        if mode & stat.S_IROTH:
            what = "everybody on this machine can read this secret; chmod 640 the file, or keep it in a file of its own"
            self.warnings.append(Problem(node.where, path, what))

    def model_keys(self, models: Node | None) -> list[KeyConfig]:
        """``api_key`` of a model: a client key for that model only, unless it is a Hugging Face token."""
        keys = []
        for name, node in models.value.items() if models is not None and models.is_map else ():
            value = node.value.get("api_key")
            if value is None or not value.text or value.text.startswith("hf_"):
                continue
            secret = self.secret(value, f"models.{name}.api_key", False)
            if secret:
                keys.append(KeyConfig(f"model {name}", secrets.digest(secret), models=(name,)))
        return keys

    # ---- models ----------------------------------------------------------------------------------------------

    def models(self, tree: Node, idle: Node) -> dict[str, ModelConfig]:
        defaults = tree.value.get("defaults") or Node(NOWHERE, {})
        defaults = defaults if defaults.is_map else Node(NOWHERE, {})
        self.values(DEFAULTS, defaults, "defaults")  # complains under its own path, before any model inherits it
        base = overlay(Node(NOWHERE, {"idle": idle}), defaults, COMBINED.__contains__)
        models = tree.value.get("models")
        found = models.value if models is not None and models.is_map else {}
        return {name: self.model(name, node, base) for name, node in found.items()}

    def model(self, name: str, node: Node, base: Node) -> ModelConfig:
        path, where = f"models.{name}", node.key or node.where
        if not checks.good_name(name):
            self.complain(where, path, "a model's name has 1 to 200 printable characters without spaces at its ends")
        merged = overlay(base, node, COMBINED.__contains__)
        values = self.values(MODEL, merged, path, skip=("idle",))
        values["idle"] = self.idle(merged.value["idle"], f"{path}.idle")
        token = self.token(merged, path)
        if token is not None:
            values["hf_token"] = token
        return ModelConfig(name=name, **values, where=str(where))

    def token(self, node: Node, path: str) -> str | None:
        entries = node.value
        legacy = entries.get("api_key")
        if legacy is not None and legacy.text.startswith("hf_"):
            what = "a Hugging Face token is called hf_token here; it is taken as that"
            self.warnings.append(Problem(legacy.where, f"{path}.api_key", what))
            if "hf_token" not in entries and "hf_token_file" not in entries:
                return self.secret(legacy, f"{path}.api_key", False)
        if "hf_token" in entries and "hf_token_file" in entries:
            first, second = entries["hf_token"], entries["hf_token_file"]
            self.complain(second.where, path, f"hf_token on {first.where} says the same as hf_token_file; keep one")
            return None
        if "hf_token_file" in entries:
            return self.secret(entries["hf_token_file"], f"{path}.hf_token_file", True)
        if "hf_token" in entries:
            return self.secret(entries["hf_token"], f"{path}.hf_token", False)
        return None


FAILED: Any = object()


def sorted_problems(problems: Mapping[Any, Problem]) -> list[Problem]:
    """By file and line, files in the order in which they were read."""
    order: dict[str, int] = {}
    for problem in problems.values():
        order.setdefault(problem.where.source, len(order))
    return sorted(problems.values(), key=lambda p: (order[p.where.source], p.where.line, p.where.column))


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def spellings(group: Group) -> tuple[str, ...]:
    """Every spelling that a key of the group may have."""
    return tuple(name for row in group.rows for name in (row.name, *row.also))


def put(tree: Node, path: str, value: Node) -> Node:
    """The tree with ``value`` at ``path``, mappings made on the way."""
    name, _, rest = path.partition(".")
    entries = dict(tree.value) if tree.is_map else {}
    below = entries.get(name)
    if rest:
        value = put(below if below is not None and below.is_map else Node(value.where, {}), rest, value)
    entries[name] = value
    return tree.with_value(entries)


def find(tree: Node, path: str) -> Node | None:
    """What stands at ``path``, under whichever spelling."""
    node: Node | None = tree
    for name in path.split("."):
        row = DEFAULTS.row(name)
        names = (name, *row.also) if row else (name,)
        node = next((node.value[n] for n in names if n in node.value), None) if node and node.is_map else None
    return node


def forget_listen(under: Node, over: Node) -> Node:
    """A higher layer's ``listen`` replaces ``host`` and ``port`` beneath it, and the other way round."""
    dropped: set[str] = set()
    if "listen" in over.value:
        dropped = {"host", "port"}
    elif {"host", "port"} & set(over.value):
        dropped = {"listen"}
    return under.with_value({name: node for name, node in under.value.items() if name not in dropped})


def listen_of(host: Node | None, port: Node | None) -> tuple[str, ...]:
    """Addresses from ``host`` and ``port``, each with its default when only the other is given."""
    number = port.text if port is not None else "33258"
    if host is None:
        return loopback(number)
    name = host.text.strip("[]")
    return (f"[{name}]:{number}",) if ":" in name else (f"{name}:{number}",)


def settle_idle(values: dict[str, Any]) -> IdleRules:
    """Level 3 means to stop where others sleep; a stage that is not given keeps its distance to a later sleep."""
    usual = IdleRules()
    if values.get("level") == 3:
        return IdleRules(None, 1, None, values.get("sleep_after", usual.sleep_after))
    rules = IdleRules(**values)
    later = (rules.sleep_after or 0.0) - (usual.sleep_after or 0.0)
    if later > 0:
        unsaid = {name: getattr(usual, name) + later for name in ("deepen_after", "stop_after") if name not in values}
        rules = replace(rules, **unsaid)
    return rules


def flag_of(path: str) -> str:
    from vllmd.config.settings import flags

    return next((flag for flag, leaf in flags().items() if leaf.path == path), path)
