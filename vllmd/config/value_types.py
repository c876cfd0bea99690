"""Kinds of values: how a value is parsed, what is accepted (in words), its JSON Schema, how a default is shown.

A parser takes a ``Node`` and raises ``Wrong`` with a reason that reads well behind the key's path; the loader adds the
place and what would be right. The kinds by name, which the table of settings uses, are at the end.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import Any

from vllmd import sizes
from vllmd.config.nodes import Node
from vllmd.frozen import frozen
from vllmd.sizes import GiB, MiB
from vllmd.text import control_character

Parse = Callable[[Node], Any]
YEAR = 365 * 86400.0


class Wrong(ValueError):
    """A value that cannot be accepted.

    ``node``: the wrong part of the value, where that is not the whole. ``accepted``: what would be right, in place of
    the kind's own words.
    """

    def __init__(self, reason: str, node: Node | None = None, accepted: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.accepted = reason, node, accepted


@frozen
class Kind:
    """One kind of value of a setting: what it accepts, how it is parsed, shown and put into JSON Schema."""

    accepts: str
    parse: Parse
    schema: Mapping[str, Any] = field(default_factory=dict)
    show: Callable[[Any], str] = str
    none: str = "none"  # the word for a default of None


def what_it_is(node: Node) -> str:
    """The form of a value, without the value: it may be a secret in the wrong place."""
    if node.is_map or node.is_list:
        return "a mapping" if node.is_map else "a list"
    if isinstance(node.value, str):
        return "text"
    return "nothing" if node.value is None else "yes or no" if isinstance(node.value, bool) else "a number"


def shown(node: Node) -> str:
    """A value as it is quoted in a complaint."""
    if node.is_map or node.is_list or node.secret:
        return what_it_is(node)
    return repr(node.text) if isinstance(node.value, str) else (node.text or "nothing")


def wrong(node: Node, what: str) -> Wrong:
    return Wrong(f"{shown(node)} is not {what}")


# ---- scalars -------------------------------------------------------------------------------------------------


def parse_bool(node: Node) -> bool:
    word = node.text.lower() if isinstance(node.value, str) else node.value
    if word in (True, "true", "yes", "on", "1") and not isinstance(word, float):
        return True
    if word in (False, "false", "no", "off", "0") and word is not None:
        return False
    raise wrong(node, "a yes or a no")


def parse_text(node: Node) -> str:
    if node.is_map or node.is_list or node.value is None:
        raise wrong(node, "text")
    if not node.text.isprintable():
        raise Wrong("control characters are not allowed")
    return node.text


def parse_lines(node: Node) -> str:
    """Text of one line or several."""
    if node.is_map or node.is_list or node.value is None:
        raise wrong(node, "text")
    if not node.text.replace("\n", "").replace("\t", "").isprintable():
        raise Wrong("control characters are not allowed")
    return node.text


def parse_user(node: Node) -> str:
    """The name of a user of this machine, ``own``, or "" for the engines' user."""
    name = parse_text(node)
    if not re.fullmatch(r"(?:[A-Za-z_][A-Za-z0-9_.-]{0,31})?", name) or name == "root":
        raise wrong(node, "the name of a user who is not root, or own")
    return name


def parse_number(node: Node) -> float:
    if isinstance(node.value, bool):
        raise wrong(node, "a number")
    try:
        number = float(node.value)
    except (TypeError, ValueError):
        raise wrong(node, "a number") from None
    except OverflowError:  # a whole number of more than 308 digits
        number = float("inf")
    if number != number or abs(number) == float("inf"):
        raise wrong(node, "a finite number")
    return number


def integer(low: int, high: int = 2**31) -> Parse:
    def parse(node: Node) -> int:
        if type(node.value) is int and low <= node.value <= high:
            return node.value  # the object that is there, which ten thousand models share
        number = parse_number(node)
        if number != int(number):
            raise wrong(node, "a whole number")
        if not low <= number <= high:
            raise Wrong(f"{int(number)} is out of range")
        return int(number)

    return parse


def real(low: float, high: float) -> Parse:
    def parse(node: Node) -> float:
        number = parse_number(node)
        if not low < number <= high:
            raise Wrong(f"{node.text} is out of range")
        return number

    return parse


def parse_size(node: Node) -> int:
    """Bytes. ``GiB`` and ``G`` are powers of 1024 (as in systemd), ``GB`` of 1000; a bare number is bytes."""
    size = sizes.parse(node.text) if not isinstance(node.value, bool | dict | list) else None
    if size is None:
        raise wrong(node, "a size")
    return size


ENERGIES = {"j": 1.0, "kj": 1e3, "mj": 1e6, "wh": 3600.0, "kwh": 3.6e6}


def parse_energy(node: Node) -> float:
    """Joules, from a number with its unit: ``5Wh`` are 18000. A bare number is an error, as nobody thinks in joules."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", node.text.strip(), re.I)
    scale = ENERGIES.get(match[2].lower()) if match and not isinstance(node.value, bool | dict | list) else None
    if match is None or scale is None or not 0 < float(match[1]) * scale < float("inf"):
        raise wrong(node, "an energy above 0 with its unit, such as 5Wh")
    return float(match[1]) * scale


def show_energy(joules: float) -> str:
    """Joules as watt-hours, as they are written in the configuration: ``5Wh``."""
    return f"{joules / 3600:g}Wh"


def sized_or_nothing(node: Node) -> int:
    """A size of memory, or 0."""
    return sized(node) if parse_size(node) else 0


def sized(node: Node) -> int:
    """A size of memory: at least 1 MiB, at most 1 PiB (``80`` without a unit is a slip, not 80 bytes)."""
    size = parse_size(node)
    if size < MiB:
        unit = f"; write {node.text.strip()}GiB if GiB were meant" if node.text.strip().isdigit() and size else ""
        raise Wrong(f"{size} bytes is too small{unit}")
    if size > 1 << 50:
        raise Wrong(f"{node.text} is more memory than any machine has")
    return size


def small_size(node: Node) -> int:
    """Bytes of a buffer or a limit: from 1 KiB to 1 TiB."""
    size = parse_size(node)
    if not 1024 <= size <= 1 << 40:
        raise Wrong(f"{node.text} is out of range")
    return size


def reserve_size(node: Node) -> int:
    return 0 if node.value == 0 and not isinstance(node.value, bool) else sized(node)


def show_size(size: int) -> str:
    """Bytes in the largest unit that divides them, or half of which does; else to a tenth of a GiB."""
    for unit, scale in sizes.UNITS:
        if size >= scale and size * 2 % scale == 0:
            return f"{size / scale:g}{unit}"
    return f"{size / GiB:.1f}GiB" if size >= GiB else str(size)


DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|sec|m|min|h|d|w|)\s*", re.I)
SECONDS = {"ms": 0.001, "": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_duration(node: Node) -> float:
    """Seconds, from ``300``, ``5m`` or ``1h30m``; at most a year."""
    text = node.text.strip()
    if isinstance(node.value, bool | dict | list) or not text:
        raise wrong(node, "a duration")
    if text.startswith("-"):
        raise Wrong(f"{text} is negative")
    if DURATION.sub("", text):
        raise wrong(node, "a duration")
    seconds = sum(float(number) * SECONDS[unit.lower()] for number, unit in DURATION.findall(text))
    if seconds > YEAR:
        raise Wrong(f"{text} is more than a year")
    return seconds


def positive_duration(node: Node) -> float:
    seconds = parse_duration(node)
    if not seconds:
        raise Wrong("0 is too short")
    return seconds


def show_duration(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"


def or_none(parse: Parse, *words: str) -> Parse:
    """A parser that returns None for null and for each of ``words``, else what ``parse`` returns."""

    def either(node: Node) -> Any:
        spelled = node.text.lower() if not (node.is_map or node.is_list) else "?"
        return None if node.value is None or spelled in words else parse(node)

    return either


def parse_share(node: Node) -> float | int:
    """A fraction (0.35, 35%) as float, a size (20GiB) as int."""
    text = node.text.strip()
    if text.endswith("%"):
        return _fraction(node, text[:-1], 100.0)
    if isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _fraction(node, text, 1.0) if node.value < 1024 else sized(node)
    try:
        return _fraction(node, text, 1.0)
    except Wrong:
        if sizes.parse(text) is not None and not text.replace(".", "").isdigit():
            return sized(node)
        raise


def _fraction(node: Node, text: str, scale: float) -> float:
    try:
        share = float(text) / scale
    except ValueError:
        raise wrong(node, "a share of the memory or a size") from None
    if not 0 < share <= 1:
        raise Wrong(f"{node.text} is not between 0 and {'100%' if scale > 1 else '1'}")
    return share


def parse_shares(node: Node) -> dict[float, float]:
    """Shares of a device by free ratio, the highest ratio first; the word none means an empty mapping."""
    if node.text.lower() == "none":
        return {}
    if not node.is_map or not node.value:
        raise wrong(node, "a mapping from free ratio to share") if not node.is_map else Wrong("it is empty")
    shares: dict[float, float] = {}
    for key, value in node.value.items():
        place = Node(value.key or value.where, key, key, secret=value.secret)
        ratio, share = _ratio(place), _ratio(value)
        if share > ratio:
            raise Wrong(f"where {ratio:g} is free it cannot take {share:g}", place)
        if ratio in shares:
            raise Wrong(f"the free ratio {ratio:g} is given twice", place)
        shares[ratio] = share
    rows = sorted(shares.items(), reverse=True)
    for (more, larger), (less, smaller) in itertools.pairwise(rows):
        if smaller > larger:
            raise Wrong(f"it would take {smaller:g} where {less:g} is free, and less ({larger:g}) where {more:g} is")
    return dict(rows)


def _ratio(node: Node) -> float:
    if node.is_map or node.is_list or node.value is None:
        raise wrong(node, "a ratio")
    text = node.text.strip()
    return _fraction(node, text.removesuffix("%"), 100.0 if text.endswith("%") else 1.0)


def parse_part(node: Node) -> float:
    """A share from 0 to 1, from ``0.1`` or ``10%``; both ends are included. Raises Wrong."""
    text = node.text.strip()
    return 0.0 if text in ("0", "0.0", "0%") else _ratio(node)


def show_shares(shares: Mapping[float, float]) -> str:
    return f"{{{', '.join(f'{ratio:g}: {share:g}' for ratio, share in shares.items())}}}" if shares else "none"


def choice(*words: str) -> Kind:
    def parse(node: Node) -> str:
        word = node.text.lower() if not (node.is_map or node.is_list) else ""
        if word not in words:
            raise Wrong(f"{shown(node)} is not one of them" if not node.is_map else "a mapping is not one of them")
        return word

    return Kind(", ".join(words), parse, {"enum": list(words)})


# ---- addresses and paths -------------------------------------------------------------------------------------


def parse_listen(node: Node) -> str:
    """``HOST:PORT``, ``[IPV6]:PORT``, ``PORT`` or ``/PATH`` of a Unix socket."""
    text = parse_text(node)
    if text.startswith(("/", "unix:/")):
        return text.removeprefix("unix:")
    host, colon, port = text.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise wrong(node, "an address with a port from 0 to 65535")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise Wrong(f"{text!r}: an IPv6 address is written in brackets", accepted=f"[{host}]:{port}")
    if colon and not host:
        raise wrong(node, "an address (use 0.0.0.0 or [::] for every address)")
    return text


def parse_url(node: Node) -> str:
    """An address of HTTP without a query; it becomes part of a command line and of messages."""
    text = parse_text(node)
    if not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:_-]+(/[A-Za-z0-9._~/%-]*)?", text):
        raise Wrong("this is no address of HTTP, or has a password or a query in it")
    return text.rstrip("/")


def parse_host(node: Node) -> str:
    """A host name or an address, without a port."""
    text = parse_text(node)
    if ":" in text:
        import ipaddress

        try:
            ipaddress.IPv6Address(text.strip("[]"))
        except ValueError:
            raise wrong(node, "a host name or address (the port goes into port)") from None
    return text


def parse_listens(node: Node) -> tuple[str, ...]:
    """Addresses; a port alone means both loopback addresses."""
    texts: tuple[str, ...] = list_of(parse_listen)(node)
    return tuple(address for text in texts for address in (loopback(text) if text.isdigit() else (text,)))


def loopback(port: str) -> tuple[str, str]:
    return f"127.0.0.1:{port}", f"[::1]:{port}"


def parse_path(node: Node) -> Any:
    from vllmd.config.user_home import expanded

    try:
        path = expanded(parse_text(node))
    except ValueError as error:
        raise wrong(node, f"an absolute path ({error})") from None
    if not path.is_absolute():
        raise wrong(node, "an absolute path")
    return path


# ---- lists and mappings --------------------------------------------------------------------------------------


def items(node: Node) -> list[Node]:
    """The nodes of a list; a text with commas counts as a list, any other value as a list of one."""
    if node.is_list:
        return list(node.value)
    if node.is_map or node.value is None:
        raise wrong(node, "a list")
    return [node.with_value(part.strip(), part.strip()) for part in node.text.split(",") if part.strip()]


def list_of(item: Parse) -> Parse:
    def parse(node: Node) -> tuple[Any, ...]:
        values = []
        for part in items(node):
            try:
                values.append(item(part))
            except Wrong as error:
                raise Wrong(error.reason, error.node or part, error.accepted) from None
        repeated = next((value for value in values if values.count(value) > 1), None)
        if repeated is not None:
            raise Wrong("an entry is listed twice" if node.secret else f"{repeated} is listed twice")
        return tuple(values)

    return parse


def parse_devices(node: Node) -> tuple[int, ...]:
    if node.value is None or node.text == "auto":
        return ()
    try:
        numbers: tuple[int, ...] = list_of(integer(0, 1023))(node)
        return numbers
    except Wrong as error:
        raise Wrong(f"{error.reason}: devices are numbers from 0", error.node) from None


def parse_command(node: Node) -> tuple[str, ...]:
    if node.is_list:
        words = tuple(parse_text(part) for part in node.value)
    else:
        import shlex

        try:
            words = tuple(shlex.split(parse_text(node)))
        except ValueError as error:
            raise Wrong(f"quotes do not match: {error}") from None
    if not words:
        raise Wrong("the command is empty")
    return words


def parse_env(node: Node) -> dict[str, str]:
    if not node.is_map:
        raise wrong(node, "a mapping from variable to value")
    for name, value in node.value.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise Wrong(f"{name!r} cannot be the name of an environment variable", value)
        if value.is_map or value.is_list:
            raise Wrong(f"{name}: {shown(value)} is not text", value)
        if character := control_character(value.text.replace("\n", "").replace("\t", "")):
            raise Wrong(f"{name}: the control character {character} is not allowed", value)
    return {name: value.text for name, value in node.value.items()}


def parse_map(node: Node) -> dict[str, Any]:
    if not node.is_map:
        raise wrong(node, "a mapping")
    plain: dict[str, Any] = node.plain()
    return plain


def parse_args(node: Node) -> tuple[str, ...]:
    """argv from a list of words, a line as a shell splits it, or a mapping from flag to value.

    In a mapping true is ``--flag``, false ``--no-flag``, null no flag at all, a list several values after one flag.
    """
    if node.value is None:
        return ()
    if not node.is_map:
        return parse_command(node) if not node.is_list else tuple(_word(part) for part in node.value)
    words = list[str]()
    for key, value in node.value.items():
        flag = key if key.startswith("-") else ("-" if len(key) == 1 else "--") + key.replace("_", "-")
        if value.value is False:
            words.append("--no-" + flag.lstrip("-"))
        elif value.value is not None:
            values = [] if value.value is True else value.value if value.is_list else [value]
            words += [flag, *(_word(part) for part in values)]
    return tuple(words)


def _word(node: Node) -> str:
    """One word of a command line; lists and mappings are JSON."""
    if node.is_map or node.is_list:
        import json

        return json.dumps(node.plain())
    return parse_text(node)


def command_line(argv: tuple[str, ...]) -> str:
    import shlex

    return shlex.join(argv) or "none"


# ---- the kinds by name ---------------------------------------------------------------------------------------

NUMBER_OR_TEXT = {"type": ["number", "string"]}
TEXTS = {"type": "array", "items": {"type": "string"}}


def count(low: int, high: int = 2**31, none: str = "", *words: str) -> Kind:
    """The kind of whole numbers from ``low`` to ``high``; the word ``none``, if given, means no number (None)."""
    to = f" to {high}" if high < 2**31 else " or more"
    text = f"a whole number, {low}{to}" + (f", or {none}" if none else "")
    parse = or_none(integer(low, high), none, *words) if none else integer(low, high)
    number = {"type": "integer", "minimum": low, **({"maximum": high} if high < 2**31 else {})}
    return Kind(text, parse, {"anyOf": [number, {"enum": [none, None]}]} if none else number, none=none or "none")


BOOL = Kind("true or false", parse_bool, {"type": "boolean"}, lambda value: "true" if value else "false")
TEXT = Kind("text", parse_text, {"type": "string"}, none="none")
USER = Kind("a user's name, or own", parse_user, {"type": "string"}, none="the engines' user")
SECRET = Kind("text", parse_text, {"type": "string"}, lambda value: "(hidden)")
SIZE_KIND = Kind("a size such as 20GiB or 512MiB", sized, NUMBER_OR_TEXT, show_size)
SMALL_SIZE = Kind("a size from 1KiB to 1TiB such as 64MiB", small_size, NUMBER_OR_TEXT, show_size)
RESERVE = Kind("0 or a size such as 512MiB", reserve_size, NUMBER_OR_TEXT, show_size)
AUTO_SIZE = Kind(
    "a size such as 20GiB, or auto", or_none(sized, "auto"), {"type": ["number", "string", "null"]}, show_size, "auto"
)
LIMIT_SIZE = replace(AUTO_SIZE, accepts="a size such as 20GiB, or none", parse=or_none(sized, "none"), none="none")
SWAP_SIZE = replace(
    LIMIT_SIZE, accepts="a size such as 20GiB, 0 for no swap at all, or none", parse=or_none(sized_or_nothing, "none")
)
DURATION_KIND = Kind("a duration such as 300, 5m or 1h30m", positive_duration, NUMBER_OR_TEXT, show_duration)
PAUSE = Kind("a duration such as 0, 300, 5m or 1h30m", parse_duration, NUMBER_OR_TEXT, show_duration)
UP_TO = Kind(
    "a duration such as 0, 300, 5m or 1h30m, or unlimited",
    or_none(parse_duration, "unlimited", "never", "infinity"),
    {"type": ["number", "string", "null"]},
    show_duration,
    "unlimited",
)
ENERGY = Kind(
    "an energy such as 5Wh, 0.2kWh or 900J, or never",
    or_none(parse_energy, "never"),
    {"type": ["string", "null"]},
    show_energy,
    "never",
)
OR_NEVER = Kind(
    "a duration such as 300, 5m or 1h30m, or never",
    or_none(positive_duration, "never", "off", "infinity"),
    {"type": ["number", "string", "null"]},
    show_duration,
    "never",
)
SHARE = Kind(
    "a share such as 0.35 or 35%, a size such as 20GiB, or auto",
    or_none(parse_share, "auto"),
    {"type": ["number", "string", "null"]},
    str,
    "auto",
)
PART = Kind("a share from 0 to 1 such as 0.1 or 10%", parse_part, NUMBER_OR_TEXT)
DEVICES = Kind(
    "auto, or device numbers such as [0, 1]",
    parse_devices,
    {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 0}, {"type": "array", "items": {"type": "integer"}}]},
    lambda value: str(list(value)) if value else "auto",
    "auto",
)
LISTEN = Kind(
    "addresses such as 127.0.0.1:33258, [::1]:33258 or /run/vllmd.sock",
    parse_listens,
    {"anyOf": [{"type": ["string", "integer"]}, {"type": "array", "items": {"type": ["string", "integer"]}}]},
    lambda value: ", ".join(value),
)
NAMES = Kind(
    "a list of names",
    list_of(parse_text),
    {"anyOf": [{"type": "string"}, TEXTS]},
    lambda value: ", ".join(value) or "none",
)
PATH = Kind("an absolute path", parse_path, {"type": "string"})
ACCESS_LOG = Kind(
    "journal, the absolute path of a file, or none",
    or_none(lambda node: "journal" if node.text == "journal" else str(parse_path(node)), "none", "off"),
    {"type": ["string", "null"]},
    none="none",
)
FILE = Kind("the path of a file", parse_text, {"type": "string"})
URL = Kind("an address such as https://mirror.example", parse_url, {"type": "string"}, none="none")
COMMAND = Kind(
    "a command as a list of words or one line",
    parse_command,
    {"anyOf": [{"type": "string"}, TEXTS]},
    command_line,
)
ARGS = Kind(
    "a mapping from flag to value, or a list of words",
    parse_args,
    {"type": ["object", "array", "string", "null"]},
    command_line,
)
ENV = Kind(
    "a mapping from variable to value",
    parse_env,
    {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}},
    lambda value: "none" if not value else str(dict(value)),
)
MAP = Kind("a mapping", parse_map, {"type": "object"}, lambda value: "none" if not value else str(dict(value)))
MAPPINGS = Kind(
    "a list of mappings",
    list_of(parse_map),
    {"type": "array", "items": {"type": "object"}},
    lambda value: f"{len(value)} of them" if value else "none",
)
TEXT_OF_LINES = Kind("text", parse_lines, {"type": "string"}, none="none")
TEXT_OR_NONE = Kind("text, or none", or_none(parse_text, "none", "off"), {"type": ["string", "null"]}, none="none")
HOST = Kind("a host name or address", parse_host, {"type": "string"}, none="both loopback addresses")
PORT = count(0, 65535)
