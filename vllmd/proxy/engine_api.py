"""The paths of an engine's own API that are passed on under ``/upstream``: those on its kind's list, and no others.

A rule is a method and a path such as ``GET /assets/{rest:path}``. Paths are compared segment by segment, as they stand
in the request line, each percent-decoded by itself:

- ``{name}`` is one segment without a slash in it, ``{name:file}`` one with a dot in it (``index.html``);
- ``{name:path}`` is one or more segments, and the only place where ``%2F`` may stand: some engines take it for a
  slash, others for part of a name, and here either reading is on the list;
- any other segment matches itself, case included.

The path is passed on as it came, since an engine's own files and names are spelled in many ways.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from urllib.parse import unquote

PART = re.compile(r"\{\w+(?::(path|file))?\}")
FORBIDDEN = frozenset({"", ".", ".."})  # segments that some reader takes away


def allows(rules: Collection[str], method: str, segments: Sequence[str]) -> bool:
    """Whether a rule covers these segments of a request's path, still percent-encoded; ``[""]`` is ``/``."""
    wanted = "GET" if method == "HEAD" else method
    decoded = [unquote(segment) for segment in segments]
    if decoded != [""] and any(part in FORBIDDEN for segment in decoded for part in segment.split("/")):
        return False
    return any(_fits(parts, decoded) for rule in rules for verb, parts in [_parsed(rule)] if verb == wanted)


@lru_cache(maxsize=1024)
def _parsed(rule: str) -> tuple[str, tuple[str, ...]]:
    """The method, and the segments of its path."""
    method, _, path = rule.partition(" ")
    return method, tuple(path.removeprefix("/").split("/"))


def _fits(parts: tuple[str, ...], segments: Sequence[str]) -> bool:
    for place, part in enumerate(parts):
        kind = PART.fullmatch(part)
        if kind and kind[1] == "path":
            return len(segments) > place
        if place >= len(segments):
            return False
        segment = segments[place]
        if not (segment == part if not kind else "/" not in segment and (kind[1] is None or "." in segment)):
            return False
    return len(segments) == len(parts)
