"""Pure functions on trees of nodes: find, put, overlay, and what the layers of the configuration need."""

from __future__ import annotations

from vllmd.config.nodes import Node, overlay
from vllmd.config.settings import DEFAULTS
from vllmd.config.value_types import loopback


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


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
    """``under`` without what ``over`` replaces: ``listen`` replaces ``host`` and ``port``, and these replace it."""
    dropped: set[str] = set()
    if "listen" in over.value:
        dropped = {"host", "port"}
    elif {"host", "port"} & set(over.value):
        dropped = {"listen"}
    return under.with_value({name: node for name, node in under.value.items() if name not in dropped})


def listen_of(host: str | None = None, port: int = 33258) -> tuple[str, ...]:
    """Addresses from ``host`` and ``port``, each with its default when only the other is given."""
    if host is None:
        return loopback(str(port))
    name = host.strip("[]")
    return (f"[{name}]:{port}",) if ":" in name else (f"{name}:{port}",)


def overlay_layer(under: Node, over: Node) -> Node:
    """The layer ``over`` upon ``under``: what it has wins, entry by entry within a section."""
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
